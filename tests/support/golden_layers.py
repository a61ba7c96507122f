"""What layer, optimizer and trajectory files claim: one reader per form."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import configs.cfmz
import convert
import optimizers
from convert import cfmz
from convert.golden import Golden, draw, normal
from convert.sources import assign, by_layer, empty, to_reference
from nets.layers.conv import Linear, he_fan_in
from nets.layers.pooling import global_average_pool
from nets.layers.wiring import Wiring
from nets.resnet import Block, NeonBatchNorm
from runtime.clock import step_of_epoch
from tests.support import (
    golden_delugenets,
    golden_gunn,
    golden_igcnets,
    golden_resnet,
    golden_xnets,
)
from tests.support.golden_checks import (
    ROUNDED,
    Comparison,
    by_path,
    cross_entropy,
    evaluate,
    train,
    trajectory,
)


def is_golden(path: pathlib.Path, facts) -> bool:
    """Not a table of counts or of graphs, nor the arrays beside a json."""
    if path.suffix == ".npz":
        return path.name.startswith("optimizer_")
    return isinstance(facts, dict) and (
        path.with_suffix(".npz").exists()
        or "steps" in facts
        or golden_igcnets.permutations is golden_igcnets.reader(facts)
    )


def reader(path: pathlib.Path):
    """The function that compares a file, by what the file holds; None if unknown."""
    if path.suffix == ".npz":
        return optimizer_rule
    facts = json.loads(path.read_text())
    if all(key.startswith("cfmz_") for key in facts):
        return cfmz_layers
    if "losses_f64" in facts:
        return cfmz_trajectory
    found = (family.reader(facts) for family in FAMILIES)
    return next(filter(None, found), None)


# Modules with a function `reader(facts)` -> that of a file, or None.
FAMILIES = [golden_delugenets, golden_gunn, golden_igcnets, golden_resnet, golden_xnets]


CFMZ_KINDS = {"W": "weight", "gamma": "gamma", "beta": "bias", "gmean": "mean"}
CFMZ_KINDS |= {"gvar": "var"}


class CfmzHead(nnx.Module):
    """The end of nets.resnet.CfmzResNet."""

    def __init__(self, channels):
        self.classifier = Linear(channels, 10, bias=False, rngs=nnx.Rngs(0))
        self.classifier_norm = NeonBatchNorm(10)

    def __call__(self, x):
        return self.classifier_norm(self.classifier(global_average_pool(x)))


def cfmz_layers(path: pathlib.Path) -> Comparison:
    """Two blocks, with any upstream gradient, and the head with its loss."""
    comparison, arrays = Comparison(), np.load(path.with_suffix(".npz"))
    for model, facts in json.loads(path.read_text()).items():
        expected = {
            key.removeprefix(f"{model}/").removesuffix("_mean"): array
            for key, array in arrays.items()
            if key.startswith(f"{model}/")
        }
        case = _cfmz_head(facts) if "labels" in facts else _cfmz_block(facts)
        for what, actual in _cfmz_layer(model, facts, *case).items():
            comparison.add(what.split("_")[0], actual, expected.pop(what), name=what)
        assert not expected
    return comparison


def _cfmz_block(facts):
    channels, stride = (facts["cin"], facts["cout"]), facts["stride"]
    options = dict(wiring=Wiring(), norm=NeonBatchNorm, init=he_fan_in)
    layer = empty(lambda: Block(*channels, stride, **options, rngs=nnx.Rngs(0)))
    upstream = _channels_last(normal(facts["dout_key"], facts["out_shape"]))
    outputs = lambda y: {"out": _channels_first(y)}
    return layer, ("stages", 0, 0), lambda y: (y * upstream).sum(), outputs


def _cfmz_head(facts):
    layer = empty(lambda: CfmzHead(facts["C"]))
    loss = cross_entropy(np.asarray(facts["labels"]))
    return layer, (), loss, lambda y: {"probs": jax.nn.softmax(y)}


def _cfmz_layer(model, facts, layer, place, loss, outputs) -> dict:
    """Our results, by the names that the file has for them."""

    def name(path, layer):
        return cfmz.name((*place, *path), layer).removeprefix("stage1.0.")

    sources = by_layer(layer, name)
    shapes = {k: v for source in sources.values() for k, v in source.shapes.items()}
    tensors = {
        key: draw(f"{model}/{key}", shape, CFMZ_KINDS[key.split(".")[-1]])
        for key, shape in shapes.items()
    }
    assign(layer, sources, {k: v.astype(np.float64) for k, v in tensors.items()})
    channels = facts["cin"] if "cin" in facts else facts["C"]
    size = (facts["B"], channels, facts["H"], facts["H"])
    x = _channels_last(normal(facts["input_key"], size)).astype(np.float64)
    evaluated, trained = evaluate(layer, x), train(layer, sources, x, loss)
    results = {"dx": _channels_first(trained["input gradient"])}
    if "labels" in facts:
        results["loss"] = trained["loss"]
    for mode, output in (("eval", evaluated), ("train", trained["output"])):
        results |= {f"{mode}_{k}": v for k, v in outputs(output).items()}
    results |= {f"d_{k}": v for k, v in trained["gradients"].items()}
    return results | {f"{k}_after": v for k, v in trained["statistics"].items()}


def cfmz_trajectory(path: pathlib.Path) -> Comparison:
    """Steps of the original's training, by the optimizer of configs/cfmz.py."""
    facts, comparison = json.loads(path.read_text()), Comparison()
    golden = Golden.read(path.with_name(f"{facts['model']}.json"))
    config = configs.cfmz.get_config()
    recipe = config.optimizer
    assert recipe.momentum == facts["momentum"]
    assert recipe.weight_decay == facts["weight_decay"]
    examples, batch_size = 50_000, config.train.batch_size
    schedule = optimizers.schedule(config, examples)
    for epoch, rate in zip(facts["epoch_argument"], facts["lr"], strict=True):
        step = step_of_epoch(epoch, examples / batch_size)
        comparison.add("rates", schedule(step), rate, ROUNDED)

    net = convert.build(golden.facts)
    convert.load(net, golden.tensors())
    rates = np.asarray(facts["lr"])
    optimizer = optimizers.create(recipe, lambda step: jnp.asarray(rates)[step])
    loss = cross_entropy(golden.labels())
    losses, _, variables = trajectory(
        net, golden.images(), loss, optimizer, facts["steps"]
    )
    comparison.add("losses", losses, facts["losses_f64"], 1e-8)
    sources = convert.find(golden.facts["system"], golden.facts["net"]).sources(net)
    after = to_reference(
        sources, by_path(variables["params"]) | by_path(variables["stats"])
    )
    for name, expected in facts["param_norms_f64"].items():
        comparison.add("norms", np.linalg.norm(after[name]), expected, 1e-8, name)
    nnx.update(net, nnx.State(variables["params"]), nnx.State(variables["stats"]))
    logits = evaluate(net, golden.images())
    comparison.add("eval", logits, facts["eval_logits_after_f64"], 1e-8)
    return comparison


def optimizer_rule(path: pathlib.Path) -> Comparison:
    """SGD with Nesterov momentum and decay on bare arrays; the rate changes."""
    arrays, comparison = np.load(path), Comparison()
    rates = jnp.asarray(arrays["lrs"])
    optimizer = optimizers.sgd(
        lambda step: rates[step],
        momentum=float(arrays["momentum"]),
        nesterov=True,
        weight_decay=float(arrays["weight_decay"]),
    )
    weights = jnp.asarray(arrays["w0"])
    state, history = optimizer.init(weights), []
    for gradient in arrays["grads"]:
        updates, state = optimizer.update(jnp.asarray(gradient), state, weights)
        weights = optax.apply_updates(weights, updates)
        history.append(weights)
    comparison.add("weights", history, arrays["weights_after_each_step"])
    (velocity,) = optax.tree.get_all_with_path(state, "trace")
    comparison.add("velocity", velocity[1], arrays["final_momentum_buffer"])
    return comparison


def _channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def _channels_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)
