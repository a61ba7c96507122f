"""Interleaved group convolutions (IGCNets, arXiv 1707.02725).

A pair of grouped convolutions whose groups cross, so that every output depends on every
input. The primary one convolves L partitions of adjacent channels separately. The
secondary one is 1x1, and each of its groups reads channels of all L partitions. Nothing
lies between them: the pair is one linear map and counts as one layer of depth.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nets.layers.conv import GroupedConv, he_fan_in
from nets.layers.cpu import calls
from nets.layers.lowerings import Shape, convolution

# On a CPU, wider layers use `mix`, and layers of two groups that are narrower than
# MIN_CPP_CHANNELS use `mix_as_matrix` (measured in docs/speed.md).
MAX_CHANNELS = 256
MIN_CPP_CHANNELS = 64


def permute(x: jax.Array, branches: int) -> jax.Array:
    """Interleaves the channels of x (..., C): transposes (branches, C / branches).

    `permute(y, C // branches)` is the inverse.
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
    """Computes the secondary convolution as the original does, with both permutations.

    x (N, H, W, C) is the primary's output; kernel (1, 1, C / secondary_groups, C).
    """
    x = permute(x, primary_groups)
    y = convolution(x, kernel, groups=secondary_groups, lowering=lowering)
    return permute(y, secondary_groups)


def mix(
    x: jax.Array, kernel: jax.Array, primary_groups: int, secondary_groups: int
) -> jax.Array:
    """Computes `mix_literally` as one product per group, without permutations.

    Channel (l, g, c) of the primary's output, c < r, meets row (c, l) of group g, whose
    k-th output is channel (k, g). r = 1 if the permutations are mutually inverse.
    """
    kernel = _axes(kernel, primary_groups, secondary_groups)
    # With three axes (N, H, W) of pixels, XLA:CPU takes up to six times as long.
    channels = x.reshape(-1, primary_groups, secondary_groups, kernel.shape[0])
    return jnp.einsum("plgc,clgk->pkg", channels, kernel).reshape(x.shape)


def mix_as_matrix(
    x: jax.Array, kernel: jax.Array, primary_groups: int, secondary_groups: int
) -> jax.Array:
    """Computes `mix_literally` as one product with a block-sparse (C, C) matrix."""
    size = x.shape[-1]
    kernel = _axes(kernel, primary_groups, secondary_groups).transpose(1, 2, 0, 3)
    # (l, g, c, k) -> (l, g, c, k, g'), zero unless g = g'
    same_group = jnp.eye(secondary_groups, dtype=kernel.dtype)[:, None, None]
    matrix = kernel[..., None] * same_group
    return convolution(x, matrix.reshape(1, 1, size, size))


def mix_in_cpp(
    x: jax.Array, kernel: jax.Array, primary_groups: int, secondary_groups: int
) -> jax.Array:
    """Computes `mix_literally` over the connected pairs of channels, in C++."""
    size = x.shape[-1]
    values = _axes(kernel, primary_groups, secondary_groups).transpose(1, 2, 0, 3)
    # Input (l, g, c) is connected to the outputs (k, g) for all k.
    inputs = np.arange(size).reshape(values.shape[:3])[..., None]
    group = np.arange(secondary_groups)[:, None, None]
    edges = inputs * size + np.arange(values.shape[3]) * secondary_groups + group
    matrix = jax.ShapeDtypeStruct((1, 1, size, size), values.dtype)
    return calls.sparse_convolution(
        x,
        values.reshape(1, 1, -1),
        jnp.asarray(edges.reshape(-1), jnp.int32),
        Shape.of(x, matrix, stride=1, padding=0, groups=1),
    )


def _axes(kernel: jax.Array, primary_groups: int, secondary_groups: int) -> jax.Array:
    """(1, 1, q, C) -> (c, l, g, k): a group has q inputs (l, c) and q outputs k."""
    return kernel.reshape(-1, primary_groups, secondary_groups, kernel.shape[2])


class SecondaryConv(nnx.Module):
    """1x1 convolution of (N, H, W, C), whose groups cross the primary groups.

    The lowering "auto" avoids the permutations: with at most 256 channels on a CPU it
    is `mix_in_cpp` or `mix_as_matrix`, otherwise `mix`. A named lowering computes the
    grouped convolution of `mix_literally`.
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

    @property
    def absent_weights(self) -> int:
        """Negative: the dense twin of a pair is its primary, with one group."""
        return -math.prod(self.kernel.shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        if self.lowering != "auto":
            y = mix_literally(x, kernel, *self.groups, self.lowering)
        else:
            y = self._choose_mix(x)(x, kernel, *self.groups)
        return checkpoint_name(y, "convolution")

    def _choose_mix(self, x: jax.Array) -> Callable:
        """Returns the fastest form for maps like x."""
        channels = x.shape[-1]
        if jax.default_backend() != "cpu" or channels > MAX_CHANNELS:
            return mix
        sparse = self.groups[1] > 2  # at most a third of the pairs are connected
        in_cpp = (sparse or channels >= MIN_CPP_CHANNELS) and calls.usable(x)
        return mix_in_cpp if in_cpp else mix_as_matrix


class InterleavedConv(nnx.Module):
    """The pair (N, H, W, in) -> (N, H', W', out); the primary has stride and padding.

    Canonical if primary_groups * secondary_groups = out: each secondary group then
    reads one channel of each partition. Both kernels start from N(0, 2 / fan-in of the
    group), as in the original: the pair doubles the variance once too often, and batch
    normalisation compensates.
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
        _check_groups(in_channels, out_channels, primary_groups, secondary_groups)
        self.primary = GroupedConv(
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


def _check_groups(in_channels, out_channels, primary, secondary) -> None:
    # Wiring computes 0 groups if the other number exceeds the channels; report that.
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
            "an interleaved pair needs at least 1 primary and 1 secondary group, got "
            f"{primary} and {secondary}"
        )
    if out_channels // primary % secondary:
        raise ValueError(
            f"{secondary} secondary groups do not divide the {out_channels // primary} "
            f"output channels of each of {primary} primary groups, so some outputs "
            "would not depend on all inputs"
        )
