"""Expanders between blocks of channels: graphs, counts, and their own lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from nets import connectivity, cost
from nets.layers.expander import ExpanderConv, ExpanderLinear
from nets.layers.wiring import Wiring
from tests.support import tiny
from tests.support.compiling import run_once

RULES = ("smaller_side", "per_output", "per_input")


@settings(max_examples=30, deadline=None)
@given(*3 * [st.integers(1, 6)], st.sampled_from(RULES), st.data())
def test_blocks_draw_blocks(inputs, outputs, block, sampling, data):
    """The channel graph is the block graph with every edge a complete bipartite one."""
    side = connectivity.sampled_side(inputs, outputs, sampling)
    partners = {"input": outputs, "output": inputs}[side]
    degree = data.draw(st.integers(1, partners))
    draw = lambda *sizes, block=1: connectivity.draw_expander(
        *sizes, sampling, np.random.default_rng(0), block
    )
    graph = connectivity.to_matrix(draw(inputs, outputs, degree), inputs, outputs)
    wide = tuple(block * x for x in (inputs, outputs, degree))
    edges = draw(*wide, block=block)
    expected = np.repeat(np.repeat(graph, block, 0), block, 1)
    np.testing.assert_array_equal(connectivity.to_matrix(edges, *wide[:2]), expected)
    assert len(edges) == connectivity.num_edges(*wide, sampling, block)
    assert edges.dtype == np.int32
    assert (np.diff(edges) > 0).all()


LAYERS = {
    "3x3 strided": (ExpanderConv, (8, 12, 3), dict(stride=2, padding=1), (2, 5, 5, 8)),
    "3x3 dilated": (
        ExpanderConv,
        (12, 8, 3),
        dict(padding=2, dilation=2),
        (2, 5, 5, 12),
    ),
    "1x1": (ExpanderConv, (12, 8, 1), {}, (2, 3, 3, 12)),
    "linear": (ExpanderLinear, (8, 8), {}, (3, 8)),
}


def make(kind, sizes, sampling, **options):
    options = dict(degree=4, sampling=sampling, block=2) | options
    layer = kind(*sizes, **options, rngs=nnx.Rngs(0))
    layer.draw(np.random.default_rng(0))
    return layer


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def apply(layer, values, x):
    graphdef, state = nnx.split(layer)
    module = nnx.merge(graphdef, state, copy=True)
    module.kernel[...] = values
    return module(x)


def outcome(layer, x):
    """Returns y and the gradients of its values and of x."""

    @run_once
    def compute(values, x):
        y, pullback = jax.vjp(lambda *args: apply(layer, *args), values, x)
        return y, *pullback(jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    return compute(layer.kernel[...], x)


@pytest.mark.parametrize("sampling", ["per_output", "per_input"])
@pytest.mark.parametrize("case", LAYERS)
def test_blocks_equal_the_expander_with_the_same_edges(case, sampling):
    kind, sizes, options, shape = LAYERS[case]
    layer = make(kind, sizes, sampling, **options)
    layer.lowering = "blocks"
    twin = kind(*sizes, degree=4, sampling=sampling, **options, rngs=nnx.Rngs(1))
    twin.connect(layer.edges[...])
    twin.kernel[...] = layer.kernel[...]
    x = normal(*shape)
    for ours, theirs in zip(outcome(layer, x), outcome(twin, x), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert layer.absent_weights == twin.absent_weights


@pytest.mark.parametrize("sampling", ["per_output", "per_input"])
def test_bfloat16_sums_over_blocks_in_float32(sampling):
    """In bfloat16, with 8 bits, 1024 + 2 is 1024, however often it is added."""
    layer = make(ExpanderConv, (32, 32, 1), sampling, degree=32)
    layer.lowering = "blocks"
    layer.kernel[...] = jnp.ones_like(layer.kernel[...])
    x = jnp.ones((1, 1, 1, 32), jnp.bfloat16).at[..., 0].set(1024)
    graphdef, state = nnx.split(layer)
    y, pullback = jax.vjp(lambda x: nnx.merge(graphdef, state)(x), x)
    assert y.dtype == jnp.bfloat16
    (dx,) = pullback(x)
    for sums in (y, dx):  # 1055, rounded
        np.testing.assert_array_equal(sums.astype(np.float32), 1056)


@pytest.mark.parametrize("sampling", RULES)
def test_arithmetic_falls_with_density(sampling):
    """No operation of the lowering costs as much as the dense product."""

    def flops(degree):
        layer = make(ExpanderConv, (64, 64, 1), sampling, degree=degree, block=16)
        layer.lowering = "blocks"
        loss = lambda *args: jnp.sum(apply(layer, *args) ** 2)
        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        x = jnp.zeros((8, 16, 16, 64))
        return step.lower(layer.kernel[...], x).cost_analysis()["flops"]

    dense = 3 * 2 * 8 * 16 * 16 * 64 * 64
    assert flops(16) < 0.4 * dense
    assert flops(32) < 0.7 * dense


def test_counts_are_those_of_the_block_graph():
    wiring = dict(kind="expander", compress=4, block=4, sampling="per_output")
    layers = cost.of(tiny.config("cfmz_resnet", wiring), (32, 32, 3))
    found = {layer.path: layer for layer in layers if layer.kind == "ExpanderConv"}
    conv = next(x for x in found.values() if x.dense_parameters == 9 * 64 * 64)
    assert conv.parameters == 9 * 64 * 16
    assert conv.macs == 8 * 8 * conv.parameters
    assert conv.dense_macs == 8 * 8 * conv.dense_parameters


def test_wirings_round_degrees_down_to_whole_blocks():
    wiring = Wiring("expander", compress=2, sampling="per_output", block=8)
    layer = wiring.conv(72, 16, 1, rngs=nnx.Rngs(0))
    assert (layer.degree, layer.num_edges) == (32, 32 * 16)
    assert wiring.linear(64, 16, degree=20, rngs=nnx.Rngs(0)).degree == 16
    with pytest.raises(ValueError, match=r"degree of 7 .* 64 input .* at most 7"):
        wiring.conv(64, 16, 1, degree=7, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("sizes", "block", "message"),
    [
        ((12, 18, 3), 4, r"blocks of 4 .* 12 -> 18 channels: .*block must divide 6"),
        ((12, 18, 4), 3, "blocks of 3 channels do not divide the expander degree 4"),
        ((12, 18, 3), 0, "block must be at least 1, got 0"),
        ((12, 18, 15), 3, r"in 1..12, got 15: .* 12 partners"),
    ],
)
def test_blocks_that_do_not_divide_are_rejected(sizes, block, message):
    with pytest.raises(ValueError, match=message):
        connectivity.num_edges(*sizes, "per_output", block)


@pytest.mark.parametrize("sampling", ["per_output", "per_input"])
def test_graphs_without_whole_blocks_or_regular_degrees_are_rejected(sampling):
    layer = make(ExpanderLinear, (8, 8), sampling)
    edges = np.asarray(layer.edges[...])
    layer.connect(edges)
    graph = connectivity.to_matrix(edges, 8, 8)
    irregular = np.zeros((4, 4), bool)
    irregular[[0, 0, 0, 0, 1, 2, 3, 3], [0, 1, 2, 3, 0, 0, 0, 1]] = True
    for other in (np.roll(graph, 1, 0), np.kron(irregular, np.ones((2, 2)))):
        with pytest.raises(ValueError, match=r"whole blocks of 2 .* 2 partners"):
            layer.connect(np.flatnonzero(other).astype(np.int32))
