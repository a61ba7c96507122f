"""Layer files of GUNN: one layer, updated gradually and simultaneously."""

import functools
import pathlib
import re

import numpy as np
from flax import nnx

from convert.gunn import layer_name, layer_sources
from convert.sources import assign, empty
from nets.gunn import make_gunn_layer
from tests.support.golden_checks import Comparison, evaluate, train
from tests.support.golden_files import (
    channels_first,
    channels_last,
    draw,
    normal,
    read_layers,
)

KINDS = {"w": "weight", "b": "bias", "beta": "bias", "rm": "mean", "rv": "var"}


def reader(facts: dict):
    return gunn_layers if "segment_width" in facts else None


def gunn_layers(path: pathlib.Path) -> Comparison:
    facts, arrays = read_layers(path)
    x = _tensor(facts, "input", facts["input_shape"])
    upstream = _tensor(facts, "grad_output", facts["input_shape"])
    loss = lambda y: (y * upstream).sum()
    layer, sources = _layer(facts, "gradual")
    trained = train(layer, sources, x, loss)
    evaluated = train(layer, sources, x, loss, train=False)
    simultaneous, _ = _layer(facts, "simultaneous")
    maps = {
        "y_eval": evaluated["output"],
        "y_train": trained["output"],
        "dx_eval": evaluated["input gradient"],
        "dx_train": trained["input gradient"],
        "y_eval_if_simultaneous": evaluate(simultaneous, x),
        "y_train_if_simultaneous": evaluate(simultaneous, x, train=True),
    }
    results = {name: channels_first(y) for name, y in maps.items()}
    results |= {f"buffer_after_train/{k}": v for k, v in trained["statistics"].items()}
    comparison = Comparison()
    for name, actual in results.items():
        exact = arrays[f"{name}_f64" if f"{name}_f64" in arrays else name]
        group, _, tensor = name.partition("/")
        spacing = trained["spacing"].get(tensor)
        comparison.add(group, actual, exact, name=name, spacing=spacing)
    gradients = {f"dparam_train/{k}": v for k, v in trained["gradients"].items()}
    _gradients(facts, arrays, gradients, comparison)
    compared = {*results, *gradients, *(f"{name}_f64" for name in results)}
    assert set(arrays) <= compared
    return comparison


def _gradients(facts, arrays, gradients, comparison) -> None:
    """Compares gradients relative to the largest gradient of the layer, within 1e-5.

    The original computed them in float32, so a small sum of large terms has the
    rounding errors of its terms. Between float32 and float64 we measured differences of
    up to 9e-7 in most random layers, and above 1e-6 in 1 of 50.

    The distance of the original's float64 gradients from them is recorded and must
    agree.
    """
    names = sorted(gradients)
    actual, expected = (
        np.concatenate([np.ravel(x[name]) for name in names])
        for x in (gradients, arrays)
    )
    comparison.add("gradients", actual, expected)
    if "torch7_check_double" in facts:
        recorded = facts["torch7_check_double"]["dparam_vs_float32_arrays"]
        rounding = np.abs(actual - expected).max()
        comparison.add("their rounding", rounding, recorded, 1e-6)


def _layer(facts, order):
    """Builds the layer from the names and shapes of its tensors."""
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in facts["tensors"]}
    first, shortcuts = _form(shapes)
    layer = empty(
        lambda: make_gunn_layer(
            facts["channels"],
            facts["segments"],
            shortcuts=shortcuts,
            expansion=shapes[first][0] // facts["segment_width"],
            order=order,
            rngs=nnx.Rngs(0),
        )
    )
    name = functools.partial(layer_name, layer.units, "")
    stacked = layer_sources(layer.units, name)
    sources = {("units", *path): source for path, source in stacked.items()}
    tensors = {}
    for entry in facts["tensors"]:
        key, kind = f"{facts['model_id']}/{entry['name']}", entry["kind"]
        kind = KINDS.get(kind, kind)
        tensors[entry["name"]] = draw(key, entry["shape"], kind, "float64")
    assign(layer, sources, tensors)
    return layer, sources


def _form(shapes) -> tuple[str, tuple[str, ...]]:
    """Returns the name of the first convolution of a bottleneck, and the shortcuts."""
    places = {re.sub(r"\.\D.*", "", name) for name in shapes}
    depth = max(place.count(".") for place in places)
    if depth == 1:
        return "1.1.weight", ("none",)
    if depth == 3:
        return "1.1.2.1.weight", ("projection",)
    second = "projection" if "1.2.1.1.1" in places else "identity"
    return "1.1.1.2.1.weight", ("projection", second)


def _tensor(facts, name, shape):
    return channels_last(normal(f"{facts['model_id']}/{name}", shape))
