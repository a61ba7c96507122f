"""Gradual layers: which values each unit reads, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nets
from convert.sources import empty
from nets import cost
from nets.gunn import make_gunn_layer
from nets.layers.gradual import Gradual
from nets.layers.wiring import Wiring
from tests.support.compiling import run_once

CHANNELS, SEGMENTS = 12, 4
ORDERS = ("gradual", "simultaneous")
SHORTCUTS = {
    "projection": ("projection",),
    "plain": ("none",),
    "two-identity": ("projection", "identity"),
}


class Matrix(nnx.Module):
    """The simplest unit: o = x K."""

    def __init__(self, in_channels, out_channels):
        self.kernel = nnx.Param(jnp.zeros((in_channels, out_channels)))

    def __call__(self, x):
        return x @ self.kernel[...]


def images(*shape):
    return np.random.default_rng(0).standard_normal((*shape, CHANNELS))


def of_matrices(matrices, order="gradual"):
    """Returns a layer of matrix units (segments, C, C / segments)."""
    segments, channels, width = matrices.shape
    unit = lambda rngs: Matrix(channels, width)
    layer = Gradual(channels, segments, unit, order=order, rngs=nnx.Rngs(0))
    layer.units.kernel[...] = jnp.asarray(matrices, jnp.float32)
    return layer


def of_bottlenecks(shortcuts, segments=SEGMENTS, dtype=np.float32, **options):
    """Returns a layer whose variables are all random."""
    options |= dict(shortcuts=SHORTCUTS[shortcuts])
    sizes = (CHANNELS, segments)
    layer = empty(lambda: make_gunn_layer(*sizes, **options, rngs=nnx.Rngs(0)))
    state, rng = nnx.state(layer), np.random.default_rng(1)

    def draw(path, x):
        value = 0.5 * rng.standard_normal(x.shape)
        positive = path[-2].key in ("var", "scale")
        return jnp.asarray(np.exp(value) if positive else value, dtype)

    nnx.update(layer, jax.tree.map_with_path(draw, state))
    return layer


def by_definition(layer, x):
    """Computes the layer one segment after another, and updates its statistics."""
    graphdef, state = nnx.split(layer.units)
    segments, units = jnp.split(x, layer.segments, -1), []
    for i in range(layer.segments):
        unit = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state), copy=True)
        read = x if layer.order == "simultaneous" else jnp.concatenate(segments, -1)
        segments[i] = segments[i] + unit(read)
        units.append(nnx.state(unit))
    nnx.update(layer.units, jax.tree.map(lambda *a: jnp.stack(a), *units))
    return jnp.concatenate(segments, -1)


def training(layer, x, forward):
    """Returns gradients of parameters and input, output and statistics."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params, x):
        layer = nnx.merge(graphdef, params, rest, copy=True)
        y = forward(layer, x)
        weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return (y * weights).sum(), (y, nnx.state(layer, nnx.BatchStat))

    return run_once(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)


@pytest.mark.parametrize(
    ("order", "shortcuts"),
    [
        ("gradual", "projection"),
        pytest.param("gradual", "plain", marks=pytest.mark.slow),
        pytest.param("gradual", "two-identity", marks=pytest.mark.slow),
        ("simultaneous", "projection"),
    ],
)
def test_the_sweep_equals_its_definition(order, shortcuts):
    """Output, statistics (updated once) and gradients, against autodiff of a loop."""
    with jax.enable_x64(True):
        layer = of_bottlenecks(shortcuts, segments=3, order=order, dtype=float)
        x = images(2, 5, 4)
        actual = training(layer, x, lambda layer, x: layer(x))
        expected = training(layer, x, by_definition)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)
    jax.tree.map(compare, actual, expected)


def jacobian(layer):
    """Returns dy / dx as (C out, C in), at one pixel."""
    channels = layer.channels
    derivative = jax.jacrev(lambda x: layer(x)[0, 0, 0])
    return np.asarray(derivative(jnp.zeros((1, 1, 1, channels)))[:, 0, 0, 0])


def test_units_read_earlier_segments_new_and_later_ones_old():
    """The first and the last unit erase their segments: y = x - x.

    So no output depends on the first segment of x, and other units still read the last
    one. The matrices have whole numbers, so the comparison is exact.
    """
    matrices = np.random.default_rng(0).integers(1, 4, (SEGMENTS, CHANNELS, 3))
    matrices[[0, -1]] = 0
    matrices[0, :3] = matrices[-1, -3:] = -np.eye(3)
    derivative = jacobian(of_matrices(matrices))
    assert not derivative[:, :3].any()
    assert not derivative[-3:].any()
    np.testing.assert_array_equal(derivative[3:6, -3:], matrices[1, -3:].T)
    # In the simultaneous order all units read x, including its first segment.
    derivative = jacobian(of_matrices(matrices, "simultaneous"))
    np.testing.assert_array_equal(derivative[3:6, :3], matrices[1, :3].T)


def test_the_layer_is_the_product_of_its_updates():
    """(1 + K_n-1) ... (1 + K_1)(1 + K_0), the first update on the right."""
    matrices = np.random.default_rng(0).integers(-2, 3, (SEGMENTS, CHANNELS, 3))
    expected = np.eye(CHANNELS)
    for i, matrix in enumerate(matrices):
        update = np.eye(CHANNELS)
        update[3 * i : 3 * i + 3] += matrix.T
        expected = update @ expected
    np.testing.assert_array_equal(jacobian(of_matrices(matrices)), expected)
    together = np.eye(CHANNELS) + np.concatenate(matrices, -1).T
    simultaneous = of_matrices(matrices, "simultaneous")
    np.testing.assert_array_equal(jacobian(simultaneous), together)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("train", [False, True])
def test_a_segment_depends_on_the_units_up_to_its_own(order, train):
    """The gradient of y[segment i] by the weights of unit j is exactly 0 for j > i."""
    layer, x = of_bottlenecks("projection", order=order), images(2, 5, 4)
    definition, variables = nets.split(layer)

    def segments(params):
        y, _ = definition.apply(variables | {"params": params}, x, train=train)
        weighted = y * jnp.cos(jnp.arange(y.size).reshape(y.shape))
        return weighted.reshape(-1, SEGMENTS, 3).sum((0, 2))

    gradients = run_once(jax.jacrev(segments))(variables["params"])
    for path, gradient in jax.tree.leaves_with_path(gradients):
        reached = np.any(np.asarray(gradient).reshape(SEGMENTS, SEGMENTS, -1), -1)
        expected = np.tri(SEGMENTS) if order == "gradual" else np.eye(SEGMENTS)
        np.testing.assert_array_equal(reached, expected, err_msg=str(path))


def test_one_segment_has_no_order():
    x = images(2, 5, 4)
    layers = (of_bottlenecks("projection", segments=1, order=order) for order in ORDERS)
    one, other = (layer(x) for layer in layers)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("segments", [2, 6])
def test_the_backward_pass_stores_two_maps(segments):
    """It stores input and output, but no inner map of a unit."""
    layer, x = of_bottlenecks("plain", segments=segments), images(2, 8, 8)
    definition, variables = nets.split(layer)

    def pull_back(variables, x):
        apply = functools.partial(definition.apply, train=True)
        function = lambda params, x: apply(variables | {"params": params}, x)[0]
        return jax.vjp(function, variables["params"], x)[1]

    stored = jax.tree.leaves(jax.eval_shape(pull_back, variables, x))
    held = {leaf.shape for leaf in jax.tree.leaves(variables)}
    maps = [leaf.shape for leaf in stored if leaf.shape not in held]
    assert sorted(shape for shape in maps if np.prod(shape) > 1) == [x.shape] * 2


def test_units_have_independent_initial_weights_and_graphs():
    net = dict(name="gunn", channels=(12,), segments=(4,), wiring=dict(kind="expander"))
    unit = nets.create(net, nnx.Rngs(0)).layers[0].units.bottlenecks[0]
    first, second = unit.conv1, unit.conv2
    for stacked in (first.kernel, first.edges, second.edges, unit.conv3.kernel):
        values = np.asarray(stacked[...]).reshape(4, -1)
        assert len(np.unique(values, axis=0)) == 4
    std = np.std(np.asarray(unit.conv3.kernel[...]))
    assert std == pytest.approx(np.sqrt(2 / 3), rel=0.3)  # fan-out of one unit


@pytest.mark.parametrize("shortcuts", ["projection", "plain"])
def test_counts_include_all_units(shortcuts):
    """Compares with arithmetic; norms cost no multiply-adds."""
    c, o, norms = 12, 3, 12 if shortcuts == "projection" else 10
    weights = (norms // 2 - 3) * c * c + 38 * c * o
    rows = cost.layers(of_bottlenecks(shortcuts), (2, 8, 6, c))
    assert all(row.output_shape[:3] == (2, 8, 6) for row in rows)
    total = cost.total(rows)
    assert (total.parameters, total.macs) == (weights + norms * c, weights * 48)


def test_the_wiring_applies_to_the_first_two_convolutions():
    for kind in ("expander", "grouped"):
        layer = of_bottlenecks("projection", wiring=Wiring(kind))
        dense = of_bottlenecks("projection")
        for name in ("conv1", "conv2", "conv3", "projection"):
            one, other = (
                getattr(x.units.bottlenecks[0], name).kernel[...].size
                for x in (layer, dense)
            )
            assert one == (other // 2 if name in ("conv1", "conv2") else other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(channels=(12,), segments=(5,)), "5 segments do not divide 12 channels"),
        (
            dict(channels=(12, 24), segments=(4,)),
            r"one number per stage, got \(12, 24\) and \(4,\)",
        ),
        (dict(shortcuts=("identity",)), "identity shortcut .* got 240 -> 12 channels"),
        (
            dict(shortcuts=("no",)),
            "unknown shortcut 'no': .*projection, identity, none",
        ),
        (dict(shortcuts=()), "at least one bottleneck"),
        (dict(order="random"), "unknown order 'random'"),
        (dict(form="svhn"), "unknown form 'svhn'"),
        (
            dict(channels=(12,), segments=(4,), wiring=dict(kind="grouped", groups=5)),
            "5 groups do not divide 12 input channels",
        ),
    ],
)
def test_impossible_nets_are_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: nets.create({"name": "gunn"} | fields, nnx.Rngs(0)))


def test_an_input_of_another_width_is_rejected():
    with pytest.raises(ValueError, match="of 12 channels got 9"):
        of_matrices(np.zeros((4, 12, 3)))(jnp.zeros((1, 1, 1, 9)))
