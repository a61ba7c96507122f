"""Layer files of X-Nets: expander layers, every value, and the channel shuffle."""

import pathlib

import numpy as np
from flax import nnx

from convert import xnets
from convert.sources import assign, by_layer
from nets import connectivity
from nets.layers.expander import ExpanderConv, ExpanderLinear
from nets.layers.interleaved import permute
from tests.support.golden_checks import Comparison, train
from tests.support.golden_files import (
    channels_first,
    channels_last,
    generator,
    read_layers,
)

EXPANDERS = {"ExpanderConv2d": ExpanderConv, "ExpanderLinear": ExpanderLinear}


def reader(facts: dict):
    if facts.get("layer") in EXPANDERS:
        return expander
    return shuffle if facts.get("layer") == "channelShuffle" else None


def shuffle(path: pathlib.Path) -> Comparison:
    """No published net uses it; it equals the permutation of an interleaved pair."""
    comparison, (facts, arrays) = Comparison(), read_layers(path)
    y = permute(channels_last(arrays["x"]), facts["groups"])
    comparison.add("output", channels_first(y), arrays["y"], 0.0)
    return comparison


def expander(path: pathlib.Path) -> Comparison:
    comparison, (facts, arrays) = Comparison(), read_layers(path)
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    channels, weight = (facts["I"], facts["O"]), facts["weight_name"]
    sampling = {
        "head": "smaller_side",
        "output": "per_output",
        "input": "per_input",
    }[facts["rule"]]
    assert connectivity.sampled_side(*channels, sampling) == facts["side"]
    rng = generator(f"{facts['model']}/{weight}/connections")
    edges = connectivity.draw_expander(*channels, facts["k"], sampling, rng)
    np.testing.assert_array_equal(
        connectivity.to_matrix(edges, *channels).T, arrays["mask"]
    )

    geometry = {}
    if facts["layer"] == "ExpanderConv2d":
        geometry = {
            "stride": facts.get("s", 1),
            "padding": facts.get("p", 0),
            "dilation": facts.get("d", facts.get("dilation", 1)),
        }
        channels += (facts["K"],)
    layer = EXPANDERS[facts["layer"]](
        *channels, degree=facts["k"], sampling=sampling, rngs=nnx.Rngs(0), **geometry
    )
    sources = by_layer(layer, lambda path, layer: xnets.leaf(path[-1], layer))
    mask = np.zeros_like(arrays["weight"])
    mask.T[:] = arrays["mask"].T
    assign(layer, sources, {weight: arrays["weight"], "mask": mask})
    assert layer.num_edges == facts["nnz"]

    upstream = channels_last(arrays["gradout"])
    loss = lambda y: (y * upstream).sum()
    result = train(layer, sources, channels_last(arrays["x"]), loss)
    comparison.add("output", channels_first(result["output"]), arrays["y"])
    input_gradient = channels_first(result["input gradient"])
    comparison.add("input gradient", input_gradient, arrays["grad_x"])
    comparison.add("gradient", result["gradients"][weight], arrays["grad_weight"])
    return comparison
