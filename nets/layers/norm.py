"""Batch normalisation, with an option for each difference between the originals."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nets.layers.cpu import calls


class Measured(NamedTuple):
    """A map (N, ..., C) with its batch statistics.

    statistics: the mean and the biased variance, (2, groups, 1, ..., C). None in
      evaluation, which uses running averages.
    """

    x: jax.Array
    statistics: jax.Array | None = None


class BatchNorm(nnx.Module):
    """Normalises each channel (last axis) over all other axes.

    eps: inside the square root.
    keep: weight of the old running value in each step (1 - torch's momentum).
    running_var: the variance that enters the running average. "unbiased": times
      n / (n - 1), as in torch and cuDNN; "biased": as in neon, MXNet on CPU and Flax.
      The normalisation itself always uses the biased variance.
    initial_var: running variance before the first step (neon and MXNet: 0).
    affine: whether to apply a gain (scale) and a shift (bias) per channel.

    nets.configure sets how statistics are shared. `groups` splits the batch into equal
    runs of images with separate statistics ("ghost" batch norm, for originals trained
    on that many GPUs). Statistics cover all devices of `axis_name`, or only this device
    if None. One of the numbers of groups and devices must divide the other. Statistics
    are at least float32; the output has the dtype of the input. In training there is no
    forward-mode derivative (jax.jvp).
    """

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        keep: float = 0.9,
        running_var: Literal["biased", "unbiased"] = "unbiased",
        initial_var: float = 1.0,
        affine: bool = True,
    ):
        self.scale = nnx.Param(jnp.ones(channels)) if affine else None
        self.bias = nnx.Param(jnp.zeros(channels)) if affine else None
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        # With a dtype, since a weakly typed array makes the train step compile twice.
        self.var = nnx.BatchStat(jnp.full(channels, initial_var, float))
        self.eps, self.keep, self.running_var = eps, keep, running_var
        self.axis_name: str | None = None
        self.groups = 1
        self.use_running_average = False  # set by net.train() and net.eval()

    def __call__(self, x: jax.Array | Sequence[Measured]) -> jax.Array:
        """Normalises x (N, ..., C), or measured maps, which it concatenates."""
        maps = x if isinstance(x, Sequence) else [self.measure(x)]
        scale, shift = self.coefficients(maps)
        maps = [each.x for each in maps]
        if not self.use_running_average:
            return _scale_and_shift(maps, scale, shift)
        # In evaluation, scale and shift are (C,).
        x = _concatenate(maps)
        return (x * scale + shift).astype(x.dtype)

    def coefficients(self, maps: Sequence[Measured]) -> tuple[jax.Array, jax.Array]:
        """Returns the scale and shift that normalise concatenated measured maps.

        Both are (groups, 1, ..., C), or (C,) in evaluation. In training, also updates
        the running averages.
        """
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = _concatenate([each.statistics for each in maps])
            self._update_running(mean, var, maps[0].x)
        scale = jax.lax.rsqrt(var + self.eps)
        if self.scale is not None:
            scale = self.scale[...] * scale
        shift = -mean * scale
        if self.bias is not None:
            shift = self.bias[...] + shift
        return scale, shift

    def measure(self, x: jax.Array) -> Measured:
        """Returns x with its batch statistics, for this and other norms that read it.

        x: the last channels of this norm's input, or all of them.
        Both moments are sums, so that x is read once. Shifting x by the running mean
        limits the cancellation in E[x^2] - E[x]^2. In float64, which serves parity
        rather than speed, the batch mean is the shift.
        """
        if self.use_running_average:
            return Measured(x)
        grouped = self._split_into_groups(x)
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        axes = tuple(range(1, grouped.ndim - 1))
        reference = self.mean[...][-x.shape[-1] :]
        if dtype == jnp.float64:
            reference = jnp.mean(grouped, axes, keepdims=True)
            reference = self._over_devices(reference)
        reference = jax.lax.stop_gradient(reference)
        pixels = math.prod(grouped.shape[1:-1])
        means = _sum_moments(grouped, reference) / pixels
        offset, square = self._over_devices(means)
        var = jnp.maximum(square - jnp.square(offset), 0.0)
        statistics = jnp.stack([offset + reference, var])
        return Measured(x, checkpoint_name(statistics, "statistics"))

    def _split_into_groups(self, x: jax.Array) -> jax.Array:
        """Reshapes this device's (N, ..., C) to (groups, N / groups, ..., C).

        If a smaller last batch is not divisible, uses the next larger number of groups
        that divides it.
        """
        images = x.shape[0]
        groups = min(images, max(1, self.groups // self._devices()))
        while images % groups:
            groups += 1
        return _group(x, groups)

    def _devices(self) -> int:
        return jax.lax.axis_size(self.axis_name) if self.axis_name else 1

    def _over_devices(self, x: jax.Array) -> jax.Array:
        """Averages over the devices that share the images of a group."""
        share = self._devices() // self.groups
        if share <= 1:
            return x
        together = np.arange(self._devices()).reshape(self.groups, share).tolist()
        return jax.lax.pmean(x, self.axis_name, axis_index_groups=together)

    def _update_running(self, mean: jax.Array, var: jax.Array, x: jax.Array) -> None:
        if self.running_var == "unbiased":
            images = (
                x.shape[0] // mean.shape[0] * max(1, self._devices() // self.groups)
            )
            count = images * math.prod(x.shape[1:-1])
            # A single value has no unbiased variance; torch raises an error.
            var = var * (count / max(count - 1, 1))
        for running, batch in ((self.mean, mean), (self.var, var)):
            # Several groups (or devices) contribute their average.
            batch = batch.reshape(-1, batch.shape[-1]).mean(0)
            value = self.keep * running[...] + (1 - self.keep) * batch
            # `running[...] = value` searches everything traced so far: it made tracing
            # ResNet-101 take 5.5 s of CPU time instead of 0.5 s.
            running.set_value(value.astype(running[...].dtype))


# In the functions below, sums over pixels have the shape (2, groups, 1, ..., C).


def _sum(*maps: jax.Array) -> jax.Array:
    """Sums each map (groups, N, ..., C) over its pixels and stacks the results."""
    axes = tuple(range(1, maps[0].ndim - 1))
    return jnp.stack([jnp.sum(x, axes, keepdims=True) for x in maps])


def _concatenate(maps: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(maps, axis=-1)


def _group(x: jax.Array, groups: int) -> jax.Array:
    """Reshapes (N, ..., C) to (groups, N / groups, ..., C)."""
    return x.reshape(groups, -1, *x.shape[1:])


def _flatten(x: jax.Array, groups: int) -> jax.Array:
    """Reshapes x to (groups, pixels, C)."""
    return x.reshape(groups, -1, x.shape[-1])


def _unflatten(sums: jax.Array, dimensions: int) -> jax.Array:
    """Reshapes (2, groups, C) to (2, groups, 1, ..., C) with 1 + `dimensions` axes."""
    return sums.reshape(*sums.shape[:2], *[1] * (dimensions - 1), sums.shape[-1])


def _moments_in_cpp(x, reference):
    sums = calls.map_moments(_flatten(x, len(x)), reference.reshape(-1))
    return _unflatten(sums, x.ndim - 1)


@calls.use_kernel(_moments_in_cpp)
def _sum_moments(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns the sums of x - reference and of its square. x: (groups, N, ..., C)."""
    centred = x.astype(reference.dtype) - reference
    return _sum(centred, jnp.square(centred))


def _gradients_in_cpp(maps, dy):
    maps = [_flatten(x, len(dy)) for x in maps]
    return _unflatten(calls.gradient_moments(maps, _flatten(dy, len(dy))), dy.ndim - 1)


@calls.use_kernel(_gradients_in_cpp)
def _sum_gradients(maps: Sequence[jax.Array], dy: jax.Array) -> jax.Array:
    """Returns the sums of dy and of dy * x: the gradients of shift and scale.

    maps: (N, ..., C), whose concatenation is x. dy: (groups, N / groups, ..., C).
    """
    return _sum(dy, dy * _group(_concatenate(maps), len(dy)))


# Normalising each map before the concatenation gave X-DenseNet-121-2 1.4 times as many
# operations, which took 2.4 times as long to compile. The backward pass keeps only the
# maps; without the C++ kernel, it concatenates them again.


@jax.custom_vjp
def _scale_and_shift(
    maps: Sequence[jax.Array], scale: jax.Array, shift: jax.Array
) -> jax.Array:
    """Returns scale * x + shift in the dtype of x, the concatenated maps (N, ..., C).

    scale, shift: (groups, 1, ..., C).
    """
    x = _concatenate(maps)
    y = _group(x, len(scale)) * scale + shift
    return y.astype(x.dtype).reshape(x.shape)


def _gradients(residuals, dy):
    maps, scale = residuals
    grouped = _group(dy, len(scale)).astype(scale.dtype)
    dshift, dscale = _sum_gradients(maps, grouped)
    dx = (grouped * scale).astype(dy.dtype).reshape(dy.shape)
    ends = np.cumsum([x.shape[-1] for x in maps])[:-1]
    return jnp.split(dx, ends, axis=-1), dscale, dshift


_scale_and_shift.defvjp(
    lambda maps, scale, shift: (_scale_and_shift(maps, scale, shift), (maps, scale)),
    _gradients,
)


def torch_batch_norm(channels: int, scale: str, rngs: nnx.Rngs) -> BatchNorm:
    """Returns a BatchNorm with initial scales "ones", or "uniform" from U(0, 1).

    Torch 0.3 drew them from U(0, 1) unless a net initialised them itself.
    """
    if scale not in ("ones", "uniform"):
        raise ValueError(f"unknown norm_scale {scale!r}: choose from ones, uniform")
    norm = BatchNorm(channels)
    if scale == "uniform":
        norm.scale.set_value(jax.random.uniform(rngs.params(), (channels,)))
    return norm
