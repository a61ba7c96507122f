"""What a recorded network claims, and how ours is compared with it."""

import jax
import numpy as np
import optax
from flax import nnx

import convert
import nets
import optimizers
from convert.golden import Golden
from convert.sources import to_reference
from nets import cost
from tests.support.compiling import run_once

EXACT, ROUNDED = 1e-9, 1e-5


class Comparison:
    """Relative errors of named quantities, each beside what is allowed for it."""

    def __init__(self):
        self._errors = []

    def add(self, group: str, actual, expected, allowed: float | None = None, name=""):
        """Error relative to the largest expected value.

        Numbers that are all exact in float32 were kept in float32: 1e-5 is allowed.
        """
        actual, expected = np.asarray(actual), np.asarray(expected, np.float64)
        assert actual.shape == expected.shape, (group, name)
        if allowed is None:
            rounded = np.array_equal(expected, expected.astype(np.float32))
            allowed = ROUNDED if rounded else EXACT
        scale = np.abs(expected).max() or 1.0
        error = np.abs(actual - expected).max() / scale
        self._errors.append((group, name, float(error), allowed))

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
    """Counts, logits, loss, gradient norms, running statistics; a trajectory if any."""
    facts, arrays, comparison = golden.facts, golden.arrays, Comparison()
    net, tensors = convert.build(facts), golden.tensors()
    images, loss = golden.images(), cross_entropy(golden.labels())

    counts = cost.total(cost.layers(net, images.shape))
    assert counts.dense_parameters == facts["trainable_params"]
    existing = facts["effective_params"] or facts["trainable_params"]
    assert counts.parameters == existing
    assert counts.macs == facts["macs"]

    net.eval()
    convert.load(net, tensors)
    comparison.add("eval", evaluate(net, images), arrays["logits_eval"])

    net.train()
    convert.load(net, tensors)
    sources = convert.sources_of(net, tensors)
    trained = train(net, sources, images, loss)
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

    statistics = _statistics_after(golden, tensors, trained)
    noise = 0.0
    if any(error > ROUNDED for error in _errors(golden, statistics).values()):
        noise = _single_precision_noise(golden, images, loss, statistics)
    for name, expected in golden.running().items():
        kept_in_float32 = np.array_equal(expected, expected.astype(np.float32))
        allowed = ROUNDED + noise if kept_in_float32 else EXACT
        comparison.add("statistics", statistics[name], expected, allowed, name)

    if "sgd_steps" in facts:
        _sgd_steps(facts["sgd_steps"], net, images, loss, comparison)
    return comparison


def _statistics_after(golden: Golden, tensors, trained: dict) -> dict:
    """Running statistics after one step, by reference name."""
    keep = golden.facts["batch_norm"]["keep"]
    # What the step added: an importer may start from other statistics.
    return {
        name: keep * tensors[name]
        + (trained["statistics"][name] - keep * trained["statistics before"][name])
        for name in golden.running()
    }


def _errors(golden: Golden, statistics: dict) -> dict[str, float]:
    errors = {}
    for name, expected in golden.running().items():
        scale = np.abs(expected).max() or 1.0
        errors[name] = np.abs(np.asarray(statistics[name]) - expected).max() / scale
    return errors


def _single_precision_noise(golden: Golden, images, loss, exact: dict) -> float:
    """How far float32 arithmetic moves our own statistics: the largest error.

    Some files hold the statistics of a float32 run of the original. After a hundred
    layers that is further than one rounding from the truth, so the net itself is asked
    how far, instead of a wider tolerance for all.
    """
    net = convert.build(golden.facts)
    net.train()
    tensors = {k: np.asarray(v, np.float32) for k, v in golden.tensors().items()}
    convert.load(net, tensors)
    sources = convert.sources_of(net, tensors)
    trained = train(net, sources, np.asarray(images, np.float32), loss)
    rounded = _statistics_after(golden, tensors, trained)
    errors = (
        np.abs(rounded[name] - value).max() / (np.abs(value).max() or 1.0)
        for name, value in exact.items()
    )
    return float(max(errors))


def evaluate(net: nnx.Module, x) -> np.ndarray:
    definition, variables = nets.split(net)
    return run_once(definition.apply)(variables, x)[0]


def train(net: nnx.Module, sources, x, loss) -> dict:
    """One pass in train mode; gradients and statistics by reference name."""
    definition, variables = nets.split(net)

    def objective(params, x, variables):
        variables = variables | {"params": params}
        output, statistics = definition.apply(variables, x, train=True)
        return loss(output), (output, statistics)

    step = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    params = variables["params"]
    (value, (output, statistics)), gradients = run_once(step)(params, x, variables)
    return {
        "loss": value,
        "output": output,
        "gradients": to_reference(sources, by_path(gradients[0])),
        "input gradient": gradients[1],
        "statistics": to_reference(sources, by_path(statistics)),
        "statistics before": to_reference(sources, by_path(variables["stats"])),
    }


def trajectory(net, images, loss, optimizer, steps):
    """Steps on one batch -> losses, norms of all parameters afterwards, variables."""
    definition, variables = nets.split(net)

    def objective(params, variables):
        variables = variables | {"params": params}
        output, statistics = definition.apply(variables, images, train=True)
        return loss(output), statistics

    def step(variables, state):
        params = variables["params"]
        gradient = jax.value_and_grad(objective, has_aux=True)
        (value, statistics), gradients = gradient(params, variables)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        variables = variables | {"params": params, "stats": statistics}
        return variables, state, value, optax.global_norm(params)

    step = run_once(step)
    state, losses, norms = optimizer.init(variables["params"]), [], []
    for _ in range(steps):
        variables, state, value, norm = step(variables, state)
        losses.append(value)
        norms.append(norm)
    return losses, norms, variables


def by_path(tree) -> dict:
    leaves = jax.tree.leaves_with_path(tree)
    return {tuple(key.key for key in path): leaf for path, leaf in leaves}


def _sgd_steps(facts, net, images, loss, comparison) -> None:
    """Steps on the same batch. A second spelling has its recipe, the same, in prose."""
    if "steps" in facts:
        facts = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4) | {
            "losses": [step["loss_before"] for step in facts["steps"]],
            "param_norm_after": [step["param_l2_after"] for step in facts["steps"]],
        }
    fields = {k: facts[k] for k in ("momentum", "nesterov", "weight_decay")}
    optimizer = optimizers.sgd(facts["lr"], **fields)
    steps = len(facts["losses"])
    losses, norms, _ = trajectory(net, images, loss, optimizer, steps)
    comparison.add("sgd losses", losses, facts["losses"])
    comparison.add("sgd norms", norms, facts["param_norm_after"])
