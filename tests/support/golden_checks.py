"""Comparison of our networks with recorded ones."""

import jax
import numpy as np
import optax
from flax import nnx

import convert
import nets
import optimizers
from convert.sources import to_reference
from nets import cost
from nets.layers.norm import BatchNorm
from tests.support.compiling import run_once, run_optimised
from tests.support.golden_files import Golden

EXACT, ROUNDED = 1e-9, 1e-5
# Above this, optimising pays off: AlexNet's golden takes 15 instead of 64 CPU seconds.
OPTIMISED_MACS_PER_TENSOR = 30e6


class Comparison:
    """Relative errors of named quantities, each with its own tolerance."""

    def __init__(self):
        self._errors = []

    def add(
        self,
        group: str,
        actual,
        expected,
        allowed: float | None = None,
        name="",
        *,
        spacing=None,
    ):
        """Adds an error, relative to the largest expected value.

        The default tolerance is 1e-9, or 1e-5 for values recorded in float32: those
        that are all exact in float32.

        spacing: for a running mean, the float32 spacing of the averaged values. A
          mean recorded in float32 may differ by that much, even near zero.
        """
        actual, expected = np.asarray(actual), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape, (group, name)
        if allowed is None:
            allowed = _tolerance(expected)
        if spacing is not None and _is_float32(expected):
            allowed = max(allowed, float(np.max(spacing)) / _scale(expected))
        error = _relative_error(actual, expected)
        self._errors.append((group, name, error, allowed))

    def summary(self) -> str:
        worst = {}
        for group, _, error, _ in self._errors:
            worst[group] = np.maximum(worst.get(group, 0.0), error)
        return "  ".join(f"{group} {error:.0e}" for group, error in worst.items())

    def check(self) -> None:
        wrong = [
            f"{group} {name}: relative error {error:.2e}, allowed {allowed:.0e}"
            for group, name, error, allowed in self._errors
            if not error <= allowed  # true for nan
        ]
        assert self._errors
        assert not wrong, "\n".join(wrong)


def cross_entropy(labels):
    def loss(logits):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    return loss


def network(golden: Golden) -> Comparison:
    """Compares counts, logits, loss, gradient norms, running statistics and updates."""
    facts, arrays, comparison = golden.facts, golden.arrays, Comparison()
    net, tensors = convert.build(facts), golden.tensors()
    images, loss = golden.images(), cross_entropy(golden.labels())
    large = facts["macs"] > OPTIMISED_MACS_PER_TENSOR * len(facts["tensors"])
    jit = run_optimised if large else run_once

    counts = cost.total(cost.layers(net, images.shape))
    trainable = facts["trainable_params"]
    existing = facts["effective_params"] or trainable
    assert counts.parameters == existing
    if existing != trainable:  # the original counts masked weights, too
        assert counts.dense_parameters == trainable
    assert counts.macs == facts["macs"]

    # Loaded for each mode, because DelugeNet's import depends on it.
    net.eval()
    convert.load(net, tensors)
    comparison.add("eval", evaluate(net, images, jit=jit), arrays["logits_eval"])

    net.train()
    convert.load(net, tensors)
    sources = convert.find_sources(net, tensors)
    run, variables = forward_backward(net, loss, jit=jit)
    trained = by_reference(net, sources, variables, run(variables, images))
    comparison.add("train", trained["output"], arrays["logits_train"])
    comparison.add("loss", trained["loss"], arrays["loss_train"])

    norms = dict(zip(facts["grad_names"], arrays["grad_norm"], strict=True))
    assert set(trained["gradients"]) == set(norms)
    for name, expected in norms.items():
        actual = np.linalg.norm(trained["gradients"][name])
        if name in facts["zero_gradient"]:
            zero = actual / max(norms.values())
            comparison.add("zero gradients", zero, 0.0, 1e-10, name)
        else:
            comparison.add("gradients", actual, expected, name=name)

    running = golden.running()
    statistics = _statistics_after(golden, tensors, trained)
    noise = 0.0
    if any(_relative_error(statistics[k], v) > ROUNDED for k, v in running.items()):
        noise = _single_precision_noise(golden, images, statistics)
    for name, expected in running.items():
        allowed = ROUNDED + noise if _is_float32(expected) else EXACT
        spacing = trained["spacing"].get(name)
        comparison.add(
            "statistics", statistics[name], expected, allowed, name, spacing=spacing
        )

    if "sgd_steps" in facts:
        _sgd_steps(facts["sgd_steps"], run, variables, images, comparison)
    return comparison


def _statistics_after(golden: Golden, tensors, trained: dict) -> dict:
    """Returns the running statistics after one step by reference name."""
    keep = golden.facts["batch_norm"]["keep"]
    # Only the change is taken from our net, which may start from other statistics.
    return {
        name: keep * tensors[name]
        + (trained["statistics"][name] - keep * trained["statistics before"][name])
        for name in golden.running()
    }


def _single_precision_noise(golden: Golden, images, exact: dict) -> float:
    """Returns the largest error of our own statistics in float32 arithmetic.

    Some files hold the statistics of a float32 run of the original. After a hundred
    layers their error exceeds one rounding. Measuring it on our net avoids a wider
    tolerance for all files.
    """
    net = convert.build(golden.facts)
    tensors = {k: np.asarray(v, np.float32) for k, v in golden.tensors().items()}
    convert.load(net, tensors)
    sources = convert.find_sources(net, tensors)
    definition, variables = nets.split(net)
    update = run_once(lambda *arguments: definition.apply(*arguments, train=True)[1])
    statistics = {
        "statistics": update(variables, np.asarray(images, np.float32)),
        "statistics before": variables["stats"],
    }
    statistics = {k: to_reference(sources, by_path(v)) for k, v in statistics.items()}
    rounded = _statistics_after(golden, tensors, statistics)
    return max(_relative_error(rounded[name], value) for name, value in exact.items())


def _sgd_steps(facts, run, variables, images, comparison) -> None:
    """Compares updates on one batch. Files with `steps` state the recipe in prose."""
    if "steps" in facts:
        facts = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4) | {
            "losses": [step["loss_before"] for step in facts["steps"]],
            "param_norm_after": [step["param_l2_after"] for step in facts["steps"]],
        }
    fields = {k: facts[k] for k in ("momentum", "nesterov", "weight_decay")}
    optimizer = optimizers.sgd(facts["lr"], **fields)

    def results(images):
        batches = [images] * len(facts["losses"])
        return np.array(trajectory(run, variables, batches, optimizer)[:2])

    expected = np.array([facts["losses"], facts["param_norm_after"]])
    found = results(images)
    errors = abs(found / expected - 1)
    allowed = np.zeros_like(errors) + [[_tolerance(row)] for row in expected]
    for seed in range(8):
        if (errors <= allowed).all():
            break
        # Rounding errors grow over the steps of a deep net until the input of a ReLU
        # changes its sign, so the last bit of the images can decide. What it changes
        # is allowed, within bounds.
        signs = np.random.RandomState(seed).choice([-1, 1], images.shape)
        change = abs(results(images * (1 + 2.0**-52 * signs)) / found - 1)
        allowed = np.maximum(allowed, EXACT + np.minimum(change, 10 * EXACT))
    for step in range(expected.shape[1]):
        for row, group in enumerate(("sgd losses", "sgd norms")):
            values = (found[row, step], expected[row, step], allowed[row, step])
            comparison.add(group, *values, f"step {step}")


def evaluate(net: nnx.Module, x, *, train=False, jit=run_once) -> np.ndarray:
    """Returns the output of a net in eval or train mode."""
    definition, variables = nets.split(net)
    output = jit(lambda variables, x: definition.apply(variables, x, train=train))
    return output(variables, x)[0]


def forward_backward(net: nnx.Module, loss, *, train=True, inputs=False, jit=run_once):
    """Returns a function compiled by `jit` and its first argument, the net's variables.

    (variables, x) -> ((loss, (output, statistics)), gradients)

    inputs: whether to differentiate with respect to x, too: the gradients are then the
      pair (of params, of x), otherwise (of params,). Through the 7x7 stem of an
      ImageNet net, XLA:CPU takes longer for the gradient of x than for all others
      together.
    """
    definition, variables = nets.split(net)

    def objective(params, x, variables):
        variables = variables | {"params": params}
        output, statistics = definition.apply(variables, x, train=train)
        return loss(output), (output, statistics)

    @jit
    def compiled(variables, x):
        arguments = (0, 1) if inputs else (0,)
        gradient = jax.value_and_grad(objective, argnums=arguments, has_aux=True)
        return gradient(variables["params"], x, variables)

    return compiled, variables


def train(net: nnx.Module, sources, x, loss, *, train: bool = True) -> dict:
    """Runs one forward and backward pass; see `by_reference` for the results."""
    run, variables = forward_backward(net, loss, train=train, inputs=True)
    return by_reference(net, sources, variables, run(variables, x))


def by_reference(net: nnx.Module, sources, variables, results) -> dict:
    """Names the results of one pass; gradients and statistics have reference names.

    The input gradient is None unless the pass computed it.
    """
    before, results = jax.device_get((variables["stats"], results))
    (loss, (output, statistics)), (gradients, *input_gradient) = results
    before, after = by_path(before), by_path(statistics)
    return {
        "loss": loss,
        "output": output,
        "gradients": to_reference(sources, by_path(gradients)),
        "input gradient": input_gradient[0] if input_gradient else None,
        "statistics": to_reference(sources, after),
        "statistics before": to_reference(sources, before),
        "spacing": to_reference(sources, _spacing(net, before, after)),
    }


def _spacing(net: nnx.Module, before: dict, after: dict) -> dict:
    """Returns the float32 spacing of the values behind each running mean, by path.

    Their root mean square follows from the statistics that one step added.
    """
    spacing = {}
    for path, norm in nnx.iter_modules(net):
        if isinstance(norm, BatchNorm):
            mean, var = (
                (after[*path, leaf] - norm.keep * before[*path, leaf]) / (1 - norm.keep)
                for leaf in ("mean", "var")
            )
            # A constant channel may have a variance below zero by rounding.
            square = np.square(mean) + np.maximum(var, 0.0)
            spacing[*path, "mean"] = np.spacing(np.sqrt(square).astype(np.float32))
    return spacing


def trajectory(run, variables, batches, optimizer):
    """Trains on each batch in turn, with a function of `forward_backward`.

    optimizer: must treat all parameters alike, because it updates them as one vector.
    Returns the loss of each step, the norm of all parameters after it, and the
    variables at the end.
    """
    # The update of one vector compiles at once, that of 500 tensors in 7 s.
    params, update = _ravel(variables["params"]), updater(optimizer)
    state, losses, norms = run_once(optimizer.init)(params), [], []
    for x in batches:
        (loss, (_, statistics)), (gradients,) = run(variables, x)
        params, state, norm = update(params, state, _ravel(gradients))
        tensors = _unravel(params, variables["params"])
        variables = variables | {"params": tensors, "stats": statistics}
        losses.append(loss)
        norms.append(norm)
    return losses, norms, variables


def _ravel(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _unravel(vector, like):
    """Returns a tree like another from the result of `_ravel`."""
    leaves, structure = jax.tree.flatten(like)
    parts = np.split(np.asarray(vector), np.cumsum([leaf.size for leaf in leaves])[:-1])
    return structure.unflatten(
        [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


def updater(optimizer):
    """Returns (params, state, gradients) -> (params, state, norm of the params)."""

    @run_once
    def update(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return params, state, optax.global_norm(params)

    return update


def by_path(tree) -> dict:
    leaves = jax.tree.leaves_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def _tolerance(expected: np.ndarray) -> float:
    return ROUNDED if _is_float32(expected) else EXACT


def _is_float32(values: np.ndarray) -> bool:
    return np.array_equal(values, values.astype(np.float32))


def _relative_error(actual, expected) -> float:
    return float(np.abs(np.asarray(actual) - expected).max() / _scale(expected))


def _scale(expected) -> float:
    return float(np.abs(expected).max()) or 1.0
