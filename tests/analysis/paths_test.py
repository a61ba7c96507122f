"""Paths through stacks with known counts, and through every net by its gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nets
from analysis import graphs, paths
from nets import cost
from nets.gunn import make_gunn_layer
from nets.layers.conv import Conv
from nets.layers.cross_layer import CrossLayer
from nets.layers.expander import Expander, ExpanderConv
from nets.layers.interleaved import InterleavedConv
from nets.layers.norm import BatchNorm
from nets.layers.wiring import Wiring
from tests.support import tiny

CLASSES = 10


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    """Counts start with 4 digits, not 16: faster, and enough for most nets here."""
    monkeypatch.setattr(paths, "FIRST_DIGITS", 4)


class Stack(nnx.Module):
    """A dense stem, layers one after another, and a dense classifier."""

    def __init__(self, channels, *layers):
        rngs = nnx.Rngs(0)
        self.stem = Conv(3, channels, 1, rngs=rngs)
        self.layers = nnx.List(layers)
        self.classifier = Conv(channels, CLASSES, 1, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


def count(net, image_size=1) -> paths.Paths:
    return paths.count(net, image_size)


def expander(channels, degree, edges) -> ExpanderConv:
    options = dict(degree=degree, sampling="per_output", rngs=nnx.Rngs(0))
    layer = ExpanderConv(channels, channels, 1, **options)
    layer.connect(edges)
    return layer


def test_a_stack_of_groups_never_mixes_them():
    layers = [Conv(16, 16, 3, padding=1, groups=4, rngs=nnx.Rngs(0)) for _ in range(3)]
    found = count(Stack(16, *layers))
    assert (found.source, found.last) == ("stem", "classifier")
    assert list(found.layers) == ["layers.0", "layers.1", "layers.2"]
    blocks = np.kron(np.eye(4, dtype=int), np.ones((4, 4), int))
    np.testing.assert_array_equal(found.counts, 16 * blocks)
    assert [layer.reach.mean() for layer in found.layers.values()] == [0.25] * 3
    assert found.depth is None


def test_expanders_multiply_their_matrices():
    """The three layers below README's first figure, by matrix products."""
    reached = []
    for seed in range(20):
        net = Stack(16, *(expander(16, 4, np.zeros(64, np.int32)) for _ in range(3)))
        nets.configure(net, graph_seed=seed)
        found = count(net)
        product = np.eye(16, dtype=int)
        for i in range(3):
            product = product @ graphs.of(net)[f"layers.{i}"][1].astype(int)
        np.testing.assert_array_equal(found.counts, product)
        last = found.layers["layers.2"]
        np.testing.assert_array_equal(last.reach, product > 0)
        reached.append(last.reach.mean())
    assert np.mean(reached) == pytest.approx(0.95, abs=0.02)


def test_cycles_have_binomial_counts():
    """Input i of a layer meets its outputs i and i + 1."""
    cycle = np.eye(8, dtype=bool) | np.roll(np.eye(8, dtype=bool), 1, axis=1)
    net = Stack(8, *(expander(8, 2, np.flatnonzero(cycle)) for _ in range(9)))
    found = count(net)
    for n, layer in enumerate(found.layers.values(), 1):
        assert layer.reach.mean() == min(n + 1, 8) / 8
        if n == 7:
            row = [math.comb(7, k) for k in range(8)]
            assert (layer.smallest, layer.largest) == (1, 35)
            assert layer.total == 8 * sum(row)
    assert found.depth == 7


def test_counts_of_any_size_are_exact():
    layers = [Conv(63, 63, 1, rngs=nnx.Rngs(0)) for _ in range(65)]
    found = count(Stack(63, *layers))
    assert set(found.counts.flat) == {63**64}
    assert found.layers["layers.64"].total == 63**66


def test_an_interleaved_pair_is_one_layer_with_one_path_for_each_pair():
    groups = dict(primary_groups=3, secondary_groups=4)
    pairs = [InterleavedConv(12, 12, 1, **groups, rngs=nnx.Rngs(0)) for _ in range(2)]
    found = count(Stack(12, *pairs))
    assert list(found.layers) == ["layers.0", "layers.1"]
    assert (found.layers["layers.0"].smallest, found.layers["layers.0"].largest) == (
        1,
        1,
    )
    assert set(found.counts.flat) == {12}
    assert found.depth == 1


def test_an_unknown_kind_of_layer_is_an_error():
    scale = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layers\.0 is a LayerNorm"):
        count(Stack(4, scale))


def few_connections(order):
    wiring = Wiring("expander", compress=4, sampling="per_output")
    options = dict(shortcuts=("none",), expansion=1, order=order, wiring=wiring)
    layer = make_gunn_layer(16, 4, **options, rngs=nnx.Rngs(0))
    net = Stack(16, layer)
    nets.configure(net, graph_seed=0)
    return net


@pytest.mark.parametrize("order", ["gradual", "simultaneous"])
def test_gradual_updates_are_counted_in_their_order(order):
    net = few_connections(order)
    found = count(net)
    matrices = {k: v.astype(int) for k, (_, v) in graphs.of(net).items()}
    start = state = np.eye(16, dtype=int)
    for i in range(4):
        unit = "layers.0.units.bottlenecks.0"
        update = state if order == "gradual" else start
        for name in (f"conv1[{i}]", f"conv2[{i}]", "conv3"):
            update = update @ matrices[f"{unit}.{name}"]
        state = state.copy()
        state[:, 4 * i : 4 * i + 4] += update
    np.testing.assert_array_equal(found.counts, state)
    assert found.depth is None


class Map(nnx.Variable):
    """A map to differentiate by."""


class Given(nnx.Module):
    """Returns a given map and ignores its input."""

    def __init__(self, x):
        self.x = Map(x)

    def __call__(self, _):
        return self.x[...]


class Select(nnx.Module):
    """Replaces the last layer: its outputs are some of its inputs."""

    def __init__(self, targets):
        self.targets = tuple(targets)

    def __call__(self, x):
        return x[..., self.targets]


def set_weights(net, single_tap: bool) -> None:
    """Sets positive weights, with which each ReLU is active.

    single_tap: 1 at the tap of a window that keeps positions, 0 at all others, so that
      each derivative is a number of paths.
    """
    for _, module in nnx.iter_modules(net):
        if isinstance(module, BatchNorm):
            module.var.set_value(jnp.full(module.var.shape, 1 - module.eps))
        if isinstance(module, CrossLayer):
            module.scale.set_value(jnp.ones(module.scale.shape))
        if getattr(module, "kernel", None) is None:
            continue
        kernel = np.abs(module.kernel[...])
        if single_tap:
            kernel = np.ones_like(kernel)
            if padding := getattr(module, "padding", 0):
                channels = (slice(None),) * (1 if isinstance(module, Expander) else 2)
                tap = (..., padding, padding, *channels)
                kernel = np.zeros_like(kernel)
                kernel[tap] = 1
        module.kernel.set_value(jnp.asarray(kernel))
        if getattr(module, "bias", None) is not None:
            module.bias.set_value(jnp.zeros(module.bias.shape))


def differentiate(net, found, targets, image_size):
    """Yields derivatives (source channels, targets), summed over pixels.

    Those of input channels `targets` of the last layer by the stem's output; first for
    positive weights, then for weights of 1 at a single tap.
    """
    net.eval()
    images = jnp.zeros((CLASSES, image_size, image_size, 3))
    shape = cost.layers(net, images.shape)[0].output_shape
    # Small, for ReLU6.
    paths.replace(net, found.source, Given(jnp.full(shape, 1e-9)))
    paths.replace(net, found.last, Select(targets))

    @jax.jit
    def gradient(maps, weights):
        def total(maps):
            y = nnx.merge(graphdef, maps, weights, copy=True)(images)
            return jnp.trace(y.reshape(CLASSES, -1, CLASSES).mean(1))

        return jax.grad(total)(maps)

    for single_tap in (False, True):
        set_weights(net, single_tap)
        graphdef, maps, weights = nnx.split(net, Map, ...)
        (found_gradient,) = jax.tree.leaves(gradient(maps, weights))
        yield np.asarray(found_gradient).sum((1, 2)).T


def compare(net, image_size):
    """Compares counts with derivatives; returns whether pairs without a path exist."""
    found = count(net, image_size)
    # The channels that the fewest and the most source channels reach.
    targets = np.argsort((found.counts > 0).sum(0), kind="stable")
    targets = np.r_[targets[: CLASSES // 2], targets[-CLASSES // 2 :]]
    counts = found.counts[:, targets]
    positive, single_tap = differentiate(net, found, targets, image_size)
    np.testing.assert_array_equal(positive != 0, counts > 0)
    np.testing.assert_allclose(single_tap, counts.astype(float), rtol=1e-4)
    return (counts == 0).any()


# Nets in which a dense layer follows the stem, so that no pair is without a path.
DENSE_START = {"gunn", "mobilenet"}
FIELDS = {
    "alexnet": dict(published_degrees=False, hidden=64),
    "vgg": dict(published_degrees=False),
    "densenet_imagenet": dict(wired_transitions=True),
}
FEW = dict(kind="expander", compress=8, sampling="per_output")
WIRINGS = {
    "alexnet": FEW | dict(compress=64),
    "igc_resnet_imagenet": dict(kind="grouped", groups=8),
    "vgg": FEW | dict(compress=64),
}
FAST = {"resnet"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in nets.names()
    ],
)
def test_a_derivative_is_zero_where_no_path_exists(name):
    fields = FIELDS.get(name, {})
    config = tiny.config(name, WIRINGS.get(name, FEW), **fields)
    net = nets.create(config, nnx.Rngs(0))
    assert compare(net, tiny.image_size(name)) == (name not in DENSE_START)


@pytest.mark.parametrize("order", ["gradual", "simultaneous"])
def test_derivatives_of_gradual_updates_with_few_connections(order):
    assert compare(few_connections(order), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gunn", "igc_resnet"])
def test_derivatives_of_interleaved_nets(name):
    wiring = dict(kind="interleaved", primary_groups=4)
    net = nets.create(tiny.config(name, wiring), nnx.Rngs(0))
    assert not compare(net, 32)
