"""Convolutions and their initialisers, wirings, pooling, expander layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.sources import empty
from nets import connectivity
from nets.layers import conv
from nets.layers.conv import Conv, Linear
from nets.layers.expander import ExpanderConv, ExpanderLinear
from nets.layers.pooling import (
    average_pool,
    global_average_pool,
    max_of_slices,
    max_of_windows,
    max_pool,
)
from nets.layers.wiring import KINDS, Wiring
from tests.support.compiling import run_once


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def fill(layer, seed=0):
    """Sets every parameter of an empty layer to random values."""
    state = nnx.state(layer, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    values = [
        jnp.asarray(normal(*x.shape, seed=seed + i)) for i, x in enumerate(leaves)
    ]
    nnx.update(layer, jax.tree.unflatten(tree, values))
    return layer


# Convolution


@pytest.mark.parametrize(("size", "stride"), [(6, 1), (6, 2), (5, 2)])
def test_padding_is_symmetric_for_every_stride(size, stride):
    """Compares with explicit sums, since "SAME" shifts strided windows."""
    layer = fill(
        empty(lambda: Conv(2, 3, 3, stride=stride, padding=1, rngs=nnx.Rngs(0)))
    )
    x, kernel = normal(2, size, size, 2, seed=9), np.asarray(layer.kernel[...])
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    positions = range(0, size, stride)
    expected = np.stack(
        [
            [
                np.tensordot(padded[:, i : i + 3, j : j + 3], kernel, 3)
                for j in positions
            ]
            for i in positions
        ]
    )
    np.testing.assert_allclose(layer(x), expected.transpose(2, 0, 1, 3), atol=1e-5)


def test_grouped_convolutions_read_their_group_only():
    layer = fill(empty(lambda: Conv(4, 6, 1, groups=2, rngs=nnx.Rngs(0))))
    x = normal(1, 1, 1, 4)
    gradient = jax.jacobian(lambda x: layer(x)[0, 0, 0])(x)[:, 0, 0, 0]
    reached = np.asarray(gradient != 0).T
    np.testing.assert_array_equal(
        reached, connectivity.to_matrix(connectivity.connect_groups(4, 6, 2), 4, 6)
    )


@pytest.mark.parametrize(
    ("channels", "groups", "message"),
    [
        ((6, 8), 4, "4 groups do not divide 6 input"),
        ((8, 6), 4, "6 output"),
        ((4, 4), 0, "0 groups"),
    ],
)
def test_groups_that_do_not_divide_are_rejected(channels, groups, message):
    with pytest.raises(ValueError, match=message):
        Conv(*channels, 3, groups=groups, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("init", "variance", "bound"),
    [
        (conv.he_fan_in, 2 / (9 * 40), np.inf),
        (conv.he_fan_out, 2 / (9 * 60), np.inf),
        (conv.torch_uniform, 1 / (3 * 9 * 40), 1 / np.sqrt(9 * 40)),
        # For ten groups; torch 0.3 counts the inputs of all of them.
        (conv.torch_default(9 * 400), 1 / (3 * 9 * 400), 1 / np.sqrt(9 * 400)),
    ],
    ids=["he_fan_in", "he_fan_out", "torch_uniform", "torch_default"],
)
def test_initialisers_have_the_variance_of_their_original(init, variance, bound):
    values = np.asarray(init(jax.random.key(0), (3, 3, 40, 60), jnp.float32))
    assert abs(values.mean()) < 4 * np.sqrt(variance / values.size)
    assert np.var(values) == pytest.approx(variance, rel=0.03)
    assert np.abs(values).max() <= bound


def test_a_linear_layer_starts_without_bias():
    layer = Linear(4, 3, rngs=nnx.Rngs(0))
    x = normal(2, 4)
    np.testing.assert_allclose(layer(x), x @ layer.kernel[...], rtol=1e-5)
    assert Linear(4, 3, bias=False, rngs=nnx.Rngs(0)).bias is None


def test_a_bias_is_added_to_every_pixel():
    layer = fill(empty(lambda: Conv(2, 3, 1, bias=True, rngs=nnx.Rngs(0))))
    without = empty(lambda: Conv(2, 3, 1, rngs=nnx.Rngs(0)))
    without.kernel = layer.kernel
    x = normal(2, 4, 4, 2)
    np.testing.assert_allclose(layer(x), without(x) + layer.bias[...], rtol=1e-5)
    for kind in (
        Conv(2, 3, 1, bias=True, rngs=nnx.Rngs(0)),
        Linear(2, 3, rngs=nnx.Rngs(0)),
    ):
        assert not kind.bias[...].any()
    options = dict(bias_init=conv.torch_default(100), rngs=nnx.Rngs(0))
    biases = np.asarray(Linear(100, 300, **options).bias[...])
    assert 0.09 < np.abs(biases).max() <= 0.1


def test_wirings_of_linear_layers():
    """Expanders by degree or compression; dense with bias for the other kinds."""
    rngs = nnx.Rngs(0)
    layer = Wiring("expander", compress=5).linear(10, 6, rngs=rngs)
    assert (layer.degree, layer.num_edges) == (2, 12)
    assert Wiring("expander").linear(10, 6, degree=3, rngs=rngs).num_edges == 18
    for kind in ("dense", "grouped", "interleaved"):
        layer = Wiring(kind).linear(10, 7, degree=3, rngs=rngs)
        assert layer.kernel.shape == (10, 7)
        assert layer.bias.shape == (7,)
    with pytest.raises(
        ValueError, match=r"compress=11 leaves no connection .* 10 input"
    ):
        Wiring("expander", compress=11).linear(10, 6, rngs=rngs)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_options_apply_to_dense_and_grouped_convolutions(kind):
    """Expanders and interleaved pairs have an initialiser of their own and no bias."""
    dense = dict(bias=True, init=jax.nn.initializers.ones)
    layer = Wiring(kind).conv(8, 8, 3, dense=dense, rngs=nnx.Rngs(0))
    applies = kind in ("dense", "grouped")
    first = layer.primary if kind == "interleaved" else layer
    assert (first.kernel[...] == 1).all() == applies
    assert (getattr(first, "bias", None) is not None) == applies


@pytest.mark.parametrize(
    ("sampling", "widening", "narrowing"),
    [("smaller_side", 9, 9), ("per_output", 4, 9), ("per_input", 9, 4)],
)
def test_partners_are_the_channels_of_the_other_side(sampling, widening, narrowing):
    wiring = Wiring("expander", sampling=sampling)
    assert wiring.partners(4, 9) == widening
    assert wiring.partners(9, 4) == narrowing


def test_average_pooling_drops_a_remainder():
    x = normal(2, 5, 5, 3)
    windows = x[:, :4, :4].reshape(2, 2, 2, 2, 2, 3)
    np.testing.assert_allclose(average_pool(x, 2), windows.mean((2, 4)), rtol=1e-5)
    assert global_average_pool(x.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("pool", [max_of_slices, max_of_windows])
def test_padding_is_never_the_maximum(pool):
    x = -1 - np.abs(normal(2, 5, 4, 3))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    y = pool(x, 3, 2, 1)
    assert y.shape == (2, 3, 2, 3)
    for i in range(3):
        for j in range(2):
            window = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            np.testing.assert_array_equal(y[:, i, j], window.max((1, 2)))


@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 2, 0), (3, 1, 1)])
def test_both_forms_of_max_pooling_agree(window):
    """Also with ties: the first of equal values in a window receives the gradient."""
    x = np.round(normal(2, 7, 8, 3))
    upstream = lambda y: (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum()

    def run(pool):
        gradient = jax.grad(lambda x: upstream(pool(x, *window)))
        return run_once(lambda x: (pool(x, *window), gradient(x)))(x)

    results = run(max_of_slices), run(max_of_windows)
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    x[0, 0, 0, 0] = np.nan
    assert np.isnan(max_pool(x, 2, stride=2)[0, 0, 0, 0])


def test_maps_smaller_than_a_window_are_rejected():
    with pytest.raises(ValueError, match=r"map of \(1, 4\) .* 2x2 pooling window"):
        average_pool(normal(2, 1, 4, 3), 2)
    with pytest.raises(ValueError, match=r"\(4, 2\) with padding 0 .* 3x3"):
        max_pool(normal(2, 4, 2, 3), 3, stride=2)
    assert max_pool(normal(2, 1, 1, 3), 3, stride=2, padding=1).shape == (2, 1, 1, 3)


# Expanders

EXPANDERS = [
    (ExpanderConv, (6, 10, 3), dict(stride=2, padding=1), (2, 6, 6, 6)),
    (ExpanderConv, (10, 6, 1), {}, (2, 3, 3, 10)),
    (ExpanderLinear, (10, 6), {}, (2, 10)),
]


def expander(kind, sizes, options, sampling="smaller_side"):
    options = dict(degree=3, sampling=sampling) | options
    layer = fill(empty(lambda: kind(*sizes, **options, rngs=nnx.Rngs(0))))
    layer.draw(np.random.default_rng(0))
    return layer


@pytest.mark.parametrize("sampling", ["smaller_side", "per_output", "per_input"])
@pytest.mark.parametrize(("kind", "sizes", "options", "shape"), EXPANDERS)
def test_an_expander_equals_its_masked_twin(kind, sizes, options, shape, sampling):
    """Outputs and gradients are equal; weights outside the mask are not stored."""
    layer = expander(kind, sizes, options, sampling)
    twin_kind = {ExpanderConv: Conv, ExpanderLinear: Linear}[kind]
    bias = {"bias": False} if twin_kind is Linear else {}
    twin = empty(lambda: twin_kind(*sizes, **options, **bias, rngs=nnx.Rngs(0)))
    mask = connectivity.to_matrix(np.asarray(layer.edges[...]), *sizes[:2])
    taps = layer.kernel.shape[:-1]
    assert layer.kernel.shape == (*taps, mask.sum())
    weights = normal(*taps, *sizes[:2], seed=5)
    layer.kernel[...] = weights[..., mask]  # row-major pairs, as the edges are sorted
    x = normal(*shape, seed=6)

    def results(module, values):
        graphdef, state = nnx.split(module)

        def loss(values, x):
            module = nnx.merge(graphdef, state, copy=True)
            module.kernel[...] = values
            y = module(x)
            return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(gradient)(values, x)

    (_, y), (d_values, d_x) = results(layer, layer.kernel[...])
    (_, dense_y), (d_dense, dense_d_x) = results(twin, jnp.asarray(weights * mask))
    np.testing.assert_allclose(y, dense_y, atol=1e-5)
    np.testing.assert_allclose(d_x, dense_d_x, atol=1e-5)
    np.testing.assert_allclose(d_values, d_dense[..., mask], rtol=1e-4, atol=1e-4)
    assert layer.absent_weights == np.prod(taps) * (~mask).sum()


@pytest.mark.parametrize("stride", [1, 2])
def test_an_expander_dilates_its_kernel(stride):
    options = dict(stride=stride, padding=2, dilation=2)
    layer = expander(ExpanderConv, (6, 4, 3), options)
    x = normal(2, 7, 7, 6, seed=7)

    def reference(values, x):
        return jax.lax.conv_general_dilated(
            *(x, layer.dense(values), (stride, stride), [(2, 2)] * 2),
            rhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def ours(values, x):
        graphdef, state = nnx.split(layer)
        module = nnx.merge(graphdef, state, copy=True)
        module.kernel[...] = values
        return module(x)

    y, gradient = jax.vjp(ours, layer.kernel[...], x)
    expected, expected_gradient = jax.vjp(reference, layer.kernel[...], x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for mine, theirs in zip(gradient(y), expected_gradient(y), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_channels_without_a_connection_are_independent():
    layer = expander(ExpanderLinear, (10, 6), {})
    gradient = jax.jacobian(lambda x: layer(x[None])[0])(normal(10))
    mask = connectivity.to_matrix(np.asarray(layer.edges[...]), 10, 6)
    np.testing.assert_array_equal(np.asarray(gradient != 0).T, mask)


@pytest.mark.parametrize(
    ("kind", "sizes", "fan"),
    [(ExpanderConv, (60, 40, 3), 9 * 40), (ExpanderLinear, (200, 100), 200)],
)
def test_expanders_are_initialised_with_the_dense_fan(kind, sizes, fan):
    """As in the original, the variance does not depend on the degree."""
    options = dict(sampling="per_output", rngs=nnx.Rngs(0))
    for degree in (10, 30):
        values = np.asarray(kind(*sizes, degree=degree, **options).kernel[...])
        assert np.var(values) == pytest.approx(2 / fan, rel=0.1)


def test_a_graph_with_another_number_of_edges_is_rejected():
    layer = expander(ExpanderLinear, (10, 6), {})
    with pytest.raises(ValueError, match=r"expected 18 edges, got \(17,\)"):
        layer.connect(np.arange(17))


def test_impossible_expanders_are_rejected_at_construction():
    options = dict(sampling="per_output", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"in 1..10, got 11: .* 10 partners"):
        ExpanderConv(10, 6, 3, degree=11, **options)
