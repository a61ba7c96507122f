"""Interleaved group convolution (arXiv 1707.02725): two grouped convolutions whose
groups cross, so that every output sees every input.

The primary one convolves L partitions of neighbouring channels apart. The secondary
one is 1x1, and each of its groups takes channels from all L partitions. Nothing lies
between the two: the pair is one linear map, counted as one layer of depth.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from nets.layers.conv import Conv, he_fan_in
from nets.layers.lowerings import convolution

# Forward and backward of 64 maps of 32x32 on two cores, ms, matrix / group by group /
# literally: 48 channels in 2 groups 10 / 20 / 220, in 24 groups 9 / 61 / 3076. With 512
# channels in 32 groups (16 maps) the matrix loses: 334 / 138.
MATRIX_CHANNELS = 256


def permute(x: jax.Array, branches: int) -> jax.Array:
    """(..., C): channels as (branches, C / branches), transposed, flat again.

    connectivity.permutation has the indices. `permute(x, C // branches)` undoes it.
    """
    channels = x.reshape(*x.shape[:-1], branches, -1)
    return channels.swapaxes(-1, -2).reshape(x.shape)


def mix_literally(
    x: jax.Array,
    kernel: jax.Array,
    primary_groups: int,
    secondary_groups: int,
    lowering: str = "native",
) -> jax.Array:
    """The secondary convolution as the original computes it: both permutations made.

    x (N, H, W, C), the primary's output; kernel (1, 1, C / secondary_groups, C).
    """
    x = permute(x, primary_groups)
    y = convolution(x, kernel, groups=secondary_groups, lowering=lowering)
    return permute(y, secondary_groups)


def mix(
    x: jax.Array, kernel: jax.Array, primary_groups: int, secondary_groups: int
) -> jax.Array:
    """What `mix_literally` returns, as one product per group: nothing is permuted.

    Channel (l, g, c) of the primary's output, c < r, meets row (c, l) of group g, whose
    k-th output is channel (k, g). r = 1 where the permutations undo each other.
    """
    kernel = _axes(kernel, primary_groups, secondary_groups)
    # All pixels on one axis: over (N, H, W) XLA:CPU takes up to six times as long.
    channels = x.reshape(-1, primary_groups, secondary_groups, kernel.shape[0])
    return jnp.einsum("plgc,clgk->pkg", channels, kernel).reshape(x.shape)


def mix_as_matrix(
    x: jax.Array, kernel: jax.Array, primary_groups: int, secondary_groups: int
) -> jax.Array:
    """The same as one product, with a (C, C) matrix that is zero between groups."""
    size = x.shape[-1]
    kernel = _axes(kernel, primary_groups, secondary_groups).transpose(1, 2, 0, 3)
    # (l, g, c, k) -> (l, g, c, k, g'), zero where g and g' differ
    same_group = jnp.eye(secondary_groups, dtype=kernel.dtype)[:, None, None]
    matrix = kernel[..., None] * same_group
    return convolution(x, matrix.reshape(1, 1, size, size))


def _axes(kernel: jax.Array, primary_groups: int, secondary_groups: int) -> jax.Array:
    """(1, 1, q, C) -> (r, L, groups, q); q inputs and as many outputs a group."""
    return kernel.reshape(-1, primary_groups, secondary_groups, kernel.shape[2])


class SecondaryConv(nnx.Module):
    """1x1 in groups that cross the primary ones; (N, H, W, C) -> the same shape.

    With lowering "auto" without permutations: as one matrix on CPU, if it is small, or
    group by group. A named lowering computes the grouped convolution between the two
    permutations.
    """

    def __init__(
        self,
        channels: int,
        *,
        primary_groups: int,
        secondary_groups: int,
        rngs: nnx.Rngs,
    ):
        shape = (1, 1, channels // secondary_groups, channels)
        self.kernel = nnx.Param(he_fan_in(rngs.params(), shape, jnp.float32))
        self.groups = (primary_groups, secondary_groups)
        self.lowering = "auto"

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        if self.lowering != "auto":
            return mix_literally(x, kernel, *self.groups, self.lowering)
        small = x.shape[-1] <= MATRIX_CHANNELS and jax.default_backend() == "cpu"
        return (mix_as_matrix if small else mix)(x, kernel, *self.groups)


class InterleavedConv(nnx.Module):
    """The pair (N, H, W, in) -> (N, H', W', out); stride and padding of the primary.

    Canonical where primary_groups * secondary_groups = out: each secondary group then
    has one channel of each partition. Both initialisers are those of the original,
    N(0, 2 / fan-in of the group): the pair doubles the variance more than it needs
    to, and batch normalisation makes up for it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        primary_groups: int,
        secondary_groups: int,
        stride: int = 1,
        padding: int = 0,
        rngs: nnx.Rngs,
    ):
        _refuse_clash(in_channels, out_channels, primary_groups, secondary_groups)
        self.primary = Conv(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            groups=primary_groups,
            init=he_fan_in,
            rngs=rngs,
        )
        groups = dict(primary_groups=primary_groups, secondary_groups=secondary_groups)
        self.secondary = SecondaryConv(out_channels, **groups, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.secondary(self.primary(x))


def _refuse_clash(in_channels, out_channels, primary, secondary) -> None:
    # Zero groups follow from more groups than channels, on the other side (Wiring).
    for name, groups, side, channels in (
        ("primary", primary, "input", in_channels),
        ("primary", primary, "output", out_channels),
        ("secondary", secondary, "output", out_channels),
    ):
        if groups and channels % groups:
            raise ValueError(
                f"{groups} {name} groups do not divide {channels} {side} channels"
            )
    if primary < 1 or secondary < 1:
        raise ValueError(
            "an interleaved pair needs at least one group on both sides, got "
            f"{primary} primary and {secondary} secondary ones"
        )
    if out_channels // primary % secondary:
        raise ValueError(
            f"{secondary} secondary groups do not divide the {out_channels // primary} "
            f"output channels of each of {primary} primary groups, so some outputs "
            "would miss some inputs"
        )
