"""Measures of graphs with known values, and the graphs of layers by their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from analysis import graphs
from nets.connectivity import draw_expander, to_matrix
from nets.layers.conv import Conv, Linear
from nets.layers.expander import ExpanderConv
from nets.layers.interleaved import InterleavedConv


def cycle(n: int) -> np.ndarray:
    """Returns the cycle with 2n vertices: input i meets outputs i and i + 1."""
    return np.eye(n, dtype=bool) | np.roll(np.eye(n, dtype=bool), 1, axis=1)


def blocks(count: int, inputs: int, outputs: int) -> np.ndarray:
    return np.kron(np.eye(count), np.ones((inputs, outputs))).astype(bool)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (1, 5), (4, 6), (7, 3)])
def test_complete_graph(inputs, outputs):
    found = graphs.measure(np.ones((inputs, outputs), bool))
    assert (found.edges, found.density) == (inputs * outputs, 1)
    assert (found.min_in_degree, found.max_in_degree) == (outputs, outputs)
    assert (found.min_out_degree, found.max_out_degree) == (inputs, inputs)
    assert (found.components, found.first, found.second) == (1, 1, 0)
    assert found.is_ramanujan


def test_disjoint_blocks():
    found = graphs.measure(blocks(3, 2, 4))
    assert (found.in_channels, found.out_channels, found.edges) == (6, 12, 24)
    assert found.density == pytest.approx(1 / 3)
    assert (found.components, found.first, found.second) == (3, 1, 1)
    assert found.bound == pytest.approx((1 + np.sqrt(3)) / np.sqrt(8))
    assert not found.is_ramanujan


@pytest.mark.parametrize("n", [3, 4, 9])
def test_a_cycle_has_cosines_and_meets_the_bound(n):
    """Its adjacency matrix has the eigenvalues 2 cos(pi k / n)."""
    found = graphs.measure(cycle(n))
    assert found.second == pytest.approx(np.cos(np.pi / n), abs=1e-12)
    assert found.bound == 1
    assert found.is_ramanujan


def test_two_disjoint_cycles_are_not_ramanujan():
    """Their second value meets the bound of degree 2, but they are disconnected."""
    found = graphs.measure(np.kron(np.eye(2), cycle(3)).astype(bool))
    assert (found.components, found.second, found.bound) == (2, 1, 1)
    assert not found.is_ramanujan


def test_complete_graph_without_a_perfect_matching():
    found = graphs.measure(~np.eye(6, dtype=bool))
    assert found.second == pytest.approx(1 / 5, abs=1e-12)
    assert found.is_ramanujan


def test_a_connected_biregular_graph_above_the_bound_is_not_ramanujan():
    """Two copies of K(8, 8) that exchange the ends of one edge."""
    graph = blocks(2, 8, 8)
    graph[0, 0] = graph[8, 8] = False
    graph[0, 8] = graph[8, 0] = True
    found = graphs.measure(graph)
    assert (found.components, found.min_in_degree, found.max_out_degree) == (1, 8, 8)
    assert found.bound == pytest.approx(2 * np.sqrt(7) / 8)
    # By the Rayleigh quotient of +1 on one copy and -1 on the other.
    assert found.second >= (64 - 2) / 64
    assert not found.is_ramanujan


def test_a_2_lift_adds_the_values_of_its_signs():
    """Bilu and Linial 2006: old values, and those of the signed biadjacency matrix.

    The signs J - 2 I of K(4, 4), with J all ones, have the values 2, 2, 2, 2.
    """
    signs = 1 - 2 * np.eye(4)
    lift = np.kron(signs > 0, np.eye(2)) + np.kron(signs < 0, np.eye(2)[::-1])
    found = graphs.measure(lift.astype(bool))
    assert (found.min_in_degree, found.max_out_degree, found.components) == (4, 4, 1)
    assert found.second == pytest.approx(2 / 4, abs=1e-12)


def test_channels_without_an_edge():
    graph = np.zeros((4, 5), bool)
    graph[:2, :3] = True
    found = graphs.measure(graph)
    assert (found.unused_inputs, found.unused_outputs, found.components) == (2, 2, 5)
    assert (found.min_in_degree, found.max_in_degree) == (0, 3)
    assert (found.min_out_degree, found.max_out_degree) == (0, 2)
    assert (found.first, found.bound, found.is_ramanujan) == (1, None, False)
    assert found.second == pytest.approx(0, abs=1e-12)
    empty = graphs.measure(np.zeros((2, 3), bool))
    assert (empty.first, empty.second, empty.bound) == (0, 0, None)
    assert (empty.components, empty.is_ramanujan) == (5, False)


def test_the_values_of_a_large_graph_equal_those_of_a_full_svd(monkeypatch):
    graph = to_matrix(
        draw_expander(60, 40, 6, "per_output", np.random.default_rng(0)), 60, 40
    )
    degrees = np.maximum(graph.sum(1, keepdims=True) * graph.sum(0), 1)
    values = np.linalg.svd(graph / np.sqrt(degrees), compute_uv=False)
    assert values[0] == pytest.approx(1)
    for limit in (1024, 1):
        monkeypatch.setattr(graphs, "SVD_CHANNELS", limit)
        second = graphs.measure(graph).second
        assert second == pytest.approx(values[1], abs=1e-10)


LAYERS = ("conv", "grouped", "linear", "expander", "secondary")


def make_layers() -> dict[str, nnx.Module]:
    rngs = nnx.Rngs(0)
    expander = ExpanderConv(6, 4, 1, degree=2, sampling="per_output", rngs=rngs)
    expander.draw(np.random.default_rng(0))
    groups = dict(primary_groups=2, secondary_groups=2)
    layers = (
        Conv(4, 6, 1, rngs=rngs),
        Conv(4, 6, 1, groups=2, rngs=rngs),
        Linear(4, 6, rngs=rngs),
        expander,
        InterleavedConv(8, 8, 1, **groups, rngs=rngs).secondary,
    )
    return dict(zip(LAYERS, layers, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_an_edge_is_where_the_derivative_is_not_zero(name):
    layer = make_layers()[name]
    ((_, graph),) = graphs.of(layer).values()
    shape = (1, len(graph)) if name == "linear" else (1, 1, 1, len(graph))
    jacobian = jax.jacobian(lambda x: layer(x.reshape(shape)).ravel())
    derivatives = jacobian(jnp.ones(len(graph)))
    np.testing.assert_array_equal(derivatives.T != 0, graph)


@pytest.mark.parametrize(("primary", "secondary"), [(2, 6), (3, 4), (6, 2)])
def test_interleaved_pair_connects_everything_exactly_once(primary, secondary):
    """IGCNets (arXiv 1707.02725): one path from each input to each output."""
    groups = dict(primary_groups=primary, secondary_groups=secondary)
    pair = InterleavedConv(12, 12, 1, **groups, rngs=nnx.Rngs(0))
    found = graphs.of(pair)
    assert list(found) == ["primary", "secondary"]
    product = found["primary"][1].astype(int) @ found["secondary"][1]
    np.testing.assert_array_equal(product, np.ones((12, 12)))
