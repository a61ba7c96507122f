"""Interleaved pairs: dependencies, the forms of computation, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nets
from nets import connectivity
from nets.layers.interleaved import (
    InterleavedConv,
    mix,
    mix_as_matrix,
    mix_literally,
    permute,
)
from nets.layers.lowerings import convolution
from nets.layers.wiring import Wiring
from tests.support import tiny
from tests.support.compiling import run_once


def abstract(config):
    return nnx.eval_shape(lambda: nets.create(config, nnx.Rngs(0)))


# (primary, secondary groups, channels): canonical; two channels of each partition in a
# secondary group; one partition; partitions of one channel.
SIZES = [(2, 3, 6), (24, 2, 48), (4, 8, 64), (1, 6, 6), (6, 1, 6)]
EVERY_SIZE = pytest.mark.parametrize(("primary", "secondary", "channels"), SIZES)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pair(in_channels, out_channels, kernel_size=3, **options):
    options = dict(padding=kernel_size // 2, rngs=nnx.Rngs(0)) | options
    return InterleavedConv(in_channels, out_channels, kernel_size, **options)


def influence(layer, in_channels) -> np.ndarray:
    """Returns the derivative (in, out) of an output pixel by the input pixel there."""
    graphdef, state = nnx.split(layer)

    def pixel(x):
        x = jnp.zeros((1, 3, 3, in_channels)).at[0, 0, 0].set(x)
        return nnx.merge(graphdef, state)(x)[0, 0, 0]

    return np.asarray(run_once(jax.jacobian(pixel))(jnp.zeros(in_channels))).T


def test_permutation_is_that_of_the_original_readme():
    assert permute(np.arange(6), 2).tolist() == [0, 3, 1, 4, 2, 5]
    assert permute(np.arange(6), 3).tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize(("channels", "branches"), [(6, 2), (48, 24), (64, 8), (5, 1)])
def test_permuting_back_is_identity(channels, branches):
    x = normal(2, 3, channels)
    there = permute(x, branches)
    np.testing.assert_array_equal(there, x[..., permute(np.arange(channels), branches)])
    np.testing.assert_array_equal(permute(there, channels // branches), x)


@EVERY_SIZE
def test_all_forms_agree(primary, secondary, channels):
    """Compares outputs and both gradients with permute, convolve, permute."""
    x, kernel = normal(3, 4, 5, channels), normal(1, 1, channels // secondary, channels)
    weights = normal(*x.shape, seed=1)

    def results(form):
        def loss(x, kernel):
            y = form(x, kernel, primary, secondary)
            return (y * weights).sum(), y

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, y), gradients = run_once(gradient)(x, kernel)
        return y, *gradients

    expected = results(mix_literally)
    for form in (mix, mix_as_matrix):
        for found, known in zip(results(form), expected, strict=True):
            np.testing.assert_allclose(found, known, atol=2e-4)


def test_a_named_lowering_computes_the_literal_form():
    layer = pair(8, 16, primary_groups=4, secondary_groups=4)
    x = normal(2, 4, 4, 8)
    assert layer.secondary.lowering == "auto"
    expected = layer(x)
    for lowering in ("native", "einsum", "block_dense"):
        for part in (layer.primary, layer.secondary):
            part.lowering = lowering
        np.testing.assert_allclose(layer(x), expected, atol=1e-4)


@EVERY_SIZE
def test_a_pair_reaches_every_output_from_every_input(primary, secondary, channels):
    groups = dict(primary_groups=primary, secondary_groups=secondary)
    layer = pair(channels, channels, **groups)
    assert (influence(layer, channels) != 0).all()
    # Unlike the primary convolution alone.
    reached = influence(layer.primary, channels) != 0
    edges = connectivity.connect_groups(channels, channels, primary)
    np.testing.assert_array_equal(
        reached, connectivity.to_matrix(edges, channels, channels)
    )


@EVERY_SIZE
def test_all_inputs_reach_an_output_by_equally_many_paths(primary, secondary, channels):
    """By one path in the canonical pair."""
    groups = dict(primary_groups=primary, secondary_groups=secondary)
    layer = pair(channels, channels, 1, **groups)
    for part in (layer.primary, layer.secondary):
        part.kernel[...] = jnp.ones_like(part.kernel[...])
    paths = channels // (primary * secondary)
    np.testing.assert_array_equal(influence(layer, channels), paths)


def test_one_partition_is_a_regular_convolution_with_scaled_channels():
    layer = pair(6, 8, primary_groups=1, secondary_groups=8)
    x = normal(2, 5, 5, 6)
    kernel = layer.primary.kernel[...] * layer.secondary.kernel[0, 0, 0]
    expected = convolution(x, kernel, padding=1)
    np.testing.assert_allclose(layer(x), expected, atol=1e-4)


def test_partitions_of_one_channel_are_depthwise_then_pointwise():
    layer = pair(6, 6, primary_groups=6, secondary_groups=1)
    x = normal(2, 5, 5, 6)
    depthwise = convolution(x, layer.primary.kernel[...], padding=1, groups=6)
    expected = depthwise @ layer.secondary.kernel[0, 0]
    np.testing.assert_allclose(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "primary", "secondary", "message"),
    [
        ((6, 8), 4, 2, "4 primary groups do not divide 6 input"),
        ((8, 6), 4, 2, "4 primary groups do not divide 6 output"),
        ((8, 8), 4, 3, "3 secondary groups do not divide 8 output"),
        ((8, 8), 4, 4, "4 secondary groups do not divide the 2 .* each of 4 primary"),
        ((8, 8), 0, 4, "1 primary and 1 secondary group, got 0 and 4"),
    ],
)
def test_groups_that_clash_are_rejected_with_both_numbers(
    channels, primary, secondary, message
):
    with pytest.raises(ValueError, match=message):
        pair(*channels, primary_groups=primary, secondary_groups=secondary)


# The wiring


@pytest.mark.parametrize(
    ("fixed", "expected"),
    [((4, 0), [(4, 8), (4, 16)]), ((0, 4), [(8, 4), (16, 4)]), ((2, 4), [(2, 4)] * 2)],
)
def test_groups_that_are_0_follow_from_the_width(fixed, expected):
    primary, secondary = fixed
    wiring = Wiring("interleaved", primary_groups=primary, secondary_groups=secondary)
    assert [wiring.partitions(width) for width in (32, 64)] == expected
    layer = wiring.conv(32, 64, 3, padding=1, rngs=nnx.Rngs(0))
    assert layer.secondary.groups == expected[1]
    assert (layer.primary.groups, layer.primary.padding) == (expected[1][0], 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(primary_groups=0), "got 0 and 0"),
        (dict(primary_groups=-1), "got -1 and 0"),
        (dict(primary_groups=5), "5 primary groups do not divide 16 input"),
        (dict(primary_groups=64), "64 primary groups do not divide 16 input"),
        (dict(primary_groups=0, secondary_groups=48), "48 secondary .* 16 output"),
        (
            dict(primary_groups=4, secondary_groups=8),
            "8 secondary .* the 4 .* of 4 pri",
        ),
    ],
)
def test_a_net_that_cannot_be_interleaved_is_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        abstract(tiny.config("cfmz_resnet", dict(kind="interleaved") | fields))


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("cfmz_resnet", "densenet")),
    ],
)
def test_every_pair_of_a_backbone_connects_all_channels(name):
    net = nets.create(tiny.config(name, "interleaved"), nnx.Rngs(0))
    pairs = [m for _, m in nnx.iter_modules(net) if isinstance(m, InterleavedConv)]
    assert len(pairs) > 2
    for layer in pairs:
        in_channels = layer.primary.kernel.shape[2] * layer.primary.groups
        assert (influence(layer, in_channels) != 0).all()


@pytest.mark.parametrize("name", nets.names())
def test_every_backbone_can_be_interleaved(name):
    net = abstract(tiny.config(name, "interleaved"))
    assert any(isinstance(m, InterleavedConv) for _, m in nnx.iter_modules(net))
