"""Layer and trajectory files of cfmz."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import configs.cfmz
import convert
import optimizers
from convert import cfmz
from convert.sources import assign, by_layer, empty, tensor_shapes, to_reference
from nets.layers.conv import Linear, he_fan_in
from nets.layers.pooling import global_average_pool
from nets.layers.wiring import Wiring
from nets.resnet import BasicBlock, NeonBatchNorm
from runtime.clock import step_of_epoch
from tests.support.golden_checks import (
    ROUNDED,
    Comparison,
    by_path,
    cross_entropy,
    evaluate,
    forward_backward,
    train,
)
from tests.support.golden_checks import trajectory as train_on
from tests.support.golden_files import (
    Golden,
    channels_first,
    channels_last,
    draw,
    normal,
    read_layers,
)

KINDS = {"W": "weight", "gamma": "gamma", "beta": "bias", "gmean": "mean"}
KINDS |= {"gvar": "var"}


def reader(facts: dict):
    if all(key.startswith("cfmz_") for key in facts):
        return layers
    return trajectory if "losses_f64" in facts else None


class Head(nnx.Module):
    """The last layers of nets.resnet.CfmzResNet."""

    def __init__(self, channels):
        self.classifier = Linear(channels, 10, bias=False, rngs=nnx.Rngs(0))
        self.classifier_norm = NeonBatchNorm(10)

    def __call__(self, x):
        return self.classifier_norm(self.classifier(global_average_pool(x)))


def layers(path: pathlib.Path) -> Comparison:
    """Two blocks, each with a recorded output gradient, and the head with its loss."""
    comparison, (cases, arrays) = Comparison(), read_layers(path)
    for model, facts in cases.items():
        expected = {
            key.removeprefix(f"{model}/").removesuffix("_mean"): array
            for key, array in arrays.items()
            if key.startswith(f"{model}/")
        }
        case = _head(facts) if "labels" in facts else _block(facts)
        for name, actual in _results(model, facts, *case).items():
            comparison.add(name.split("_")[0], actual, expected.pop(name), name=name)
        assert not expected
    return comparison


def _block(facts):
    channels, stride = (facts["cin"], facts["cout"]), facts["stride"]
    options = dict(wiring=Wiring(), norm=NeonBatchNorm, init=he_fan_in)
    layer = empty(lambda: BasicBlock(*channels, stride, **options, rngs=nnx.Rngs(0)))
    upstream = channels_last(normal(facts["dout_key"], facts["out_shape"]))
    outputs = lambda y: {"out": channels_first(y)}
    return layer, ("stages", 0, 0), lambda y: (y * upstream).sum(), outputs


def _head(facts):
    layer = empty(lambda: Head(facts["C"]))
    loss = cross_entropy(np.asarray(facts["labels"]))
    return layer, (), loss, lambda y: {"probs": jax.nn.softmax(y)}


def _results(model, facts, layer, place, loss, outputs) -> dict:
    """Returns our values by the names in the file."""

    def name(path, layer):
        return cfmz.name((*place, *path), layer).removeprefix("stage1.0.")

    sources = by_layer(layer, name)
    shapes = tensor_shapes(sources)
    tensors = {
        key: draw(f"{model}/{key}", shape, KINDS[key.split(".")[-1]])
        for key, shape in shapes.items()
    }
    assign(layer, sources, tensors)
    channels = facts["cin"] if "cin" in facts else facts["C"]
    size = (facts["B"], channels, facts["H"], facts["H"])
    x = channels_last(normal(facts["input_key"], size))
    evaluated, trained = evaluate(layer, x), train(layer, sources, x, loss)
    results = {"dx": channels_first(trained["input gradient"])}
    if "labels" in facts:
        results["loss"] = trained["loss"]
    for mode, output in (("eval", evaluated), ("train", trained["output"])):
        results |= {f"{mode}_{k}": v for k, v in outputs(output).items()}
    results |= {f"d_{k}": v for k, v in trained["gradients"].items()}
    return results | {f"{k}_after": v for k, v in trained["statistics"].items()}


def trajectory(path: pathlib.Path) -> Comparison:
    """Steps of the original's training, with the optimizer of configs/cfmz.py."""
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

    net, images = convert.build(golden.facts), golden.images()
    convert.load(net, golden.tensors())
    rates = np.asarray(facts["lr"])
    optimizer = optimizers.create(recipe, lambda step: jnp.asarray(rates)[step])
    run, variables = forward_backward(net, cross_entropy(golden.labels()))
    batches = [images] * facts["steps"]
    losses, _, variables = train_on(run, variables, batches, optimizer)
    comparison.add("losses", losses, facts["losses_f64"], 1e-8)
    sources = convert.find(golden.facts["system"], golden.facts["net"]).sources(net)
    after = to_reference(
        sources, by_path(variables["params"]) | by_path(variables["stats"])
    )
    for name, expected in facts["param_norms_f64"].items():
        comparison.add("norms", np.linalg.norm(after[name]), expected, 1e-8, name)
    nnx.update(net, nnx.State(variables["params"]), nnx.State(variables["stats"]))
    comparison.add("eval", evaluate(net, images), facts["eval_logits_after_f64"], 1e-8)
    return comparison
