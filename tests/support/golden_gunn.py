"""Reader of the GUNN layer files: one layer alone, in both orders."""

import functools
import json
import pathlib
import re

import jax
import numpy as np
from flax import nnx

import nets
from convert.golden import draw, normal
from convert.gunn import layer_name, layer_sources
from convert.sources import assign, empty
from nets.gunn import gunn_layer
from tests.support.golden_checks import Comparison, evaluate, train

KINDS = {"w": "weight", "b": "bias", "beta": "bias", "rm": "mean", "rv": "var"}


def reader(facts):
    """The function that compares a file, by what the file holds; None if unknown."""
    return gunn_layers if "segment_width" in facts else None


def gunn_layers(path: pathlib.Path) -> Comparison:
    facts, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    x = _tensor(facts, "input", facts["input_shape"])
    upstream = _tensor(facts, "grad_output", facts["input_shape"])
    layer, sources = _layer(facts, "gradual")
    trained = train(layer, sources, x, lambda y: (y * upstream).sum())
    maps = {
        "y_eval": evaluate(layer, x),
        "y_train": trained["output"],
        "dx_eval": _input_gradient(layer, x, upstream),
        "dx_train": trained["input gradient"],
    }
    layer, sources = _layer(facts, "simultaneous")
    maps["y_eval_if_simultaneous"] = evaluate(layer, x)
    simultaneous = train(layer, sources, x, lambda y: (y * upstream).sum())
    maps["y_train_if_simultaneous"] = simultaneous["output"]
    results = {k: np.moveaxis(np.asarray(v), -1, 1) for k, v in maps.items()}
    results |= {f"buffer_after_train/{k}": v for k, v in trained["statistics"].items()}
    comparison = Comparison()
    for name, actual in results.items():
        exact = arrays[f"{name}_f64" if f"{name}_f64" in arrays else name]
        comparison.add(name.partition("/")[0], actual, exact, name=name)
    gradients = {f"dparam_train/{k}": v for k, v in trained["gradients"].items()}
    _gradients(facts, arrays, gradients, comparison)
    compared = {*results, *gradients, *(f"{name}_f64" for name in results)}
    assert set(arrays) <= compared
    return comparison


def _gradients(facts, arrays, gradients, comparison) -> None:
    """The files' were computed in float32, so that those which are small sums of large
    terms are off by their terms' rounding: they are compared with the layer's largest,
    within 1e-5 as all of float32. Up to 9e-7 in most, over 1e-6 in 1 of 50, was seen
    between float32 and float64 where other layers were drawn.

    How far the double precision original is from them is recorded, to many digits.
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
    """The layer, its form read off the names and shapes of its tensors."""
    shapes = {entry["name"]: tuple(entry["shape"]) for entry in facts["tensors"]}
    first, shortcuts = _form(shapes)
    layer = empty(
        lambda: gunn_layer(
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
        value = draw(key, entry["shape"], KINDS.get(kind, kind), "float64")
        tensors[entry["name"]] = value.astype(np.float64)
    assign(layer, sources, tensors)
    return layer, sources


def _form(shapes) -> tuple[str, tuple[str, ...]]:
    """Name of the first bottleneck's first convolution, and the shortcuts."""
    places = {re.sub(r"\.\D.*", "", name) for name in shapes}
    depth = max(place.count(".") for place in places)
    if depth == 1:
        return "1.1.weight", ("none",)
    if depth == 3:
        return "1.1.2.1.weight", ("projection",)
    second = "projection" if "1.2.1.1.1" in places else "identity"
    return "1.1.1.2.1.weight", ("projection", second)


def _tensor(facts, name, shape):
    array = normal(f"{facts['model_id']}/{name}", shape)
    return np.moveaxis(array, 1, -1).astype(np.float64)


def _input_gradient(layer, x, upstream):
    definition, variables = nets.split(layer)
    output = lambda x: (definition.apply(variables, x)[0] * upstream).sum()
    return jax.jit(jax.grad(output))(x)
