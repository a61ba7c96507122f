"""Ramanujan graphs: degrees, the spectral gap, and the sizes that have one."""

import re

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.connectivity import layers
from analysis.graphs import measure
from configs import xdensenet
from nets import connectivity, ramanujan
from nets.layers.wiring import Wiring


def graph(inputs, outputs, degree):
    edges = ramanujan.connect(inputs, outputs, degree)
    assert edges.dtype == np.int32
    assert (np.diff(edges) > 0).all()  # sorted, no connection twice
    return connectivity.to_matrix(edges, inputs, outputs)


@settings(max_examples=60, deadline=None)
@given(*2 * [st.integers(1, 14)], st.integers(1, 10))
def test_graphs_are_regular_connected_and_below_the_bound(d1, d2, copies):
    """Exceptions are few, and the error is raised before anything is constructed."""
    inputs, outputs = copies * d2, copies * d1
    try:
        ramanujan.check(inputs, outputs, d2)
    except ValueError as error:
        choices = re.findall(r"(\d+) \(compress=", str(error))
        assert str(d2) not in choices
        assert str(inputs) in choices  # the complete graph
        return
    matrix = graph(inputs, outputs, d2)
    assert (matrix.sum(0) == d2).all()
    assert (matrix.sum(1) == d1).all()
    # An output reads one of every `copies` consecutive inputs.
    assert (matrix.reshape(d2, copies, outputs).sum(1) == 1).all()
    found = measure(matrix)
    assert found.components == 1
    assert found.is_ramanujan
    assert found.second <= found.bound + 1e-9


# Layers of X-DenseNet (40-24-2, 40-100-4, 40-200-10, 121-2), X-ResNet-50, X-VGG and
# X-MobileNet: inputs, outputs, compression.
PUBLISHED = [
    *((48 + 24 * i, 96, 2) for i in range(11)),
    *((96, 24, 2), (312, 96, 2), (200, 400, 4), (400, 800, 10), (800, 200, 10)),
    *((64, 128, 2), (128, 32, 2), (64, 64, 2), (64, 256, 2), (512, 256, 2)),
    *((64, 64, 4), (64, 128, 4), (128, 128, 8), (128, 256, 8), (256, 256, 16)),
    *((64, 64, 8), (64, 128, 8), (128, 64, 8), (32, 64, 8), (256, 512, 32)),
]


@pytest.mark.parametrize(("inputs", "outputs", "compress"), PUBLISHED)
def test_published_sizes_have_a_graph(inputs, outputs, compress):
    found = measure(graph(inputs, outputs, inputs // compress))
    assert found.is_ramanujan
    assert found.density == 1 / compress


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            (64, 64, 4, 1),
            r"64 input and 64 output channels with 4 inputs for each output: choose "
            r"64 \(compress=1\), 32 \(compress=2\), 16 \(compress=4\), "
            r"8 \(compress=8\), or another sampling",
        ),
        ((300, 400, 37, 1), r"with 37 inputs .* 75 \(compress=4\)"),
        ((12, 6, 3, 8), r"12 input and 6 output blocks of 8 channels with 3 inputs"),
    ],
)
def test_sizes_without_a_graph_are_rejected_with_the_choices(sizes, message):
    with pytest.raises(ValueError, match=message):
        ramanujan.check(*sizes)


def test_a_wiring_rejects_them_at_construction():
    wiring = Wiring("expander", compress=16, sampling="ramanujan")
    with pytest.raises(ValueError, match=r"8 \(compress=8\), or another sampling"):
        wiring.conv(64, 64, 3, rngs=nnx.Rngs(0))


def test_degrees_are_those_of_an_output_and_nothing_is_drawn():
    wiring = Wiring("expander", sampling="ramanujan")
    assert wiring.partners(24, 48) == 24
    draw = lambda seed: connectivity.draw_expander(
        *(24, 48, 12), "ramanujan", np.random.default_rng(seed)
    )
    np.testing.assert_array_equal(draw(0), draw(1))
    assert len(draw(0)) == connectivity.num_edges(24, 48, 12, "ramanujan") == 24 * 24


def test_the_graph_of_blocks_is_ramanujan():
    edges = connectivity.draw_expander(64, 128, 16, "ramanujan", None, block=4)
    matrix = connectivity.to_matrix(edges, 64, 128)
    assert measure(matrix[::4, ::4]).is_ramanujan
    assert measure(matrix).second == pytest.approx(measure(matrix[::4, ::4]).second)


def test_every_expander_of_a_net_is_ramanujan():
    config = xdensenet.get_config("40-24-2,cifar10")
    config.net.depth = 10
    config.net.wiring.sampling = "ramanujan"
    found = [rows for kind, rows in layers(config).values() if kind == "ExpanderConv"]
    assert len(found) >= 6
    assert all(measures.is_ramanujan for (measures,) in found)
