"""Layer files of fb.resnet.torch: single blocks with a recorded output gradient."""

import pathlib

import numpy as np
from flax import nnx

from convert import fb_resnet
from convert.sources import assign, by_layer, empty, tensor_shapes
from nets import resnet
from nets.layers.wiring import Wiring
from tests.support.golden_checks import Comparison, evaluate, train
from tests.support.golden_files import (
    channels_first,
    channels_last,
    draw,
    normal,
    read_layers,
)

KINDS = {"running_mean": "mean", "running_var": "var", "bias": "bias"}


def reader(facts: dict):
    return blocks if all(key.startswith("fb_") for key in facts) else None


def blocks(path: pathlib.Path) -> Comparison:
    comparison, (cases, arrays) = Comparison(), read_layers(path)
    for model, facts in cases.items():
        found = _block(model, facts)
        names = {key for key in arrays if key.startswith(f"{model}/")}
        assert names == {f"{model}/{name}" for name in found}
        for name, actual in found.items():
            expected = arrays[f"{model}/{name}"]
            comparison.add(name.split("_")[0], actual, expected, name=name)
    return comparison


def _block(model: str, facts: dict) -> dict:
    """Returns our values by the names in the file."""
    layer = empty(lambda: _build(facts))
    naming = fb_resnet.preresnet if "preresnet" in facts["block"] else fb_resnet.resnet
    strip = len("layer1.0.")
    sources = by_layer(layer, lambda p, m: naming(("stages", 0, 0, *p), m)[strip:])
    shapes = tensor_shapes(sources)
    tensors = {name: _draw(f"{model}/{name}", shapes[name]) for name in shapes}
    assign(layer, sources, tensors)
    layer.eval()
    x = channels_last(normal(f"{model}/input", facts["input_shape"]))
    upstream = channels_last(normal(f"{model}/dout", facts["out_shape"]))
    found = {"eval_out": evaluate(layer, x)}
    trained = train(layer, sources, x, lambda y: (y * upstream).sum())
    found |= {"train_out": trained["output"], "dx": trained["input gradient"]}
    found = {name: channels_first(y) for name, y in found.items()}
    found |= {f"d_{k}": v for k, v in trained["gradients"].items()}
    return found | {f"{k}_after": v for k, v in trained["statistics"].items()}


def _build(facts: dict) -> nnx.Module:
    channels = facts["input_shape"][1], facts["out_shape"][1]
    kind = facts["shortcut"][0] if facts["shortcut"][0] in "ABC" else "A"
    options = dict(shortcut=kind, wiring=Wiring(), rngs=nnx.Rngs(0))
    bottleneck = "bottleneck" in facts["block"]
    if "preresnet" not in facts["block"]:
        block = resnet.BottleneckBlock if bottleneck else resnet.BasicBlock
        return block(*channels, facts["stride"], **options)
    activation = "both" if "both" in facts["block"] else "branch"
    if "bn0.weight" not in facts["params"]:  # ImageNet's first block
        activation = "none"
    block = resnet.PreactBottleneckBlock if bottleneck else resnet.PreactBasicBlock
    return block(*channels, facts["stride"], activation=activation, **options)


def _draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    leaf = key.rpartition(".")[2]
    kind = KINDS.get(leaf) or ("weight" if len(shape) > 1 else "gamma")
    return draw(key, shape, kind)
