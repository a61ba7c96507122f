"""Batch normalisation, with an option for each difference between the originals."""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nets.layers.cpu import calls

Activation = Literal["relu", "relu6"] | None
ACTIVATIONS = {None: lambda y: y, "relu": nnx.relu, "relu6": nnx.relu6}
LIMITS = {"relu": math.inf, "relu6": 6.0}  # an activation passes values from 0 to here


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
    are at least float32; the output has the dtype of the input. In training, and with a
    shortcut, there is no forward-mode derivative (jax.jvp).
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

    def __call__(
        self,
        x: jax.Array | Sequence[Measured],
        activation: Activation = None,
        shortcut: jax.Array | None = None,
    ) -> jax.Array:
        """Normalises x (N, ..., C), or measured maps, which it concatenates.

        activation: applied to the result. The backward pass recomputes its derivative
          from x instead of storing a mask.
        shortcut: a map to add before the activation, which must then be "relu". The sum
          is the output of a residual unit, which nets/remat.py knows as a "block".
        """
        maps = x if isinstance(x, Sequence) else [self.measure(x)]
        scale, shift = self.coefficients(maps)
        maps = [each.x for each in maps]
        if shortcut is not None:
            if activation != "relu":
                raise ValueError(f'a shortcut requires "relu", got {activation!r}')
            return _add_relu(_concatenate(maps), shortcut, scale, shift)
        if not self.use_running_average:
            return _normalise(maps, scale, shift, activation)
        # In evaluation, scale and shift are (C,).
        x = _concatenate(maps)
        return ACTIVATIONS[activation](x * scale + shift).astype(x.dtype)

    def coefficients(self, maps: Sequence[Measured]) -> tuple[jax.Array, jax.Array]:
        """Returns the scale and shift that normalise concatenated measured maps.

        Both are (groups, 1, ..., C), or (C,) in evaluation. In training, also updates
        the running averages.
        """
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean, var = _concatenate([each.statistics for each in maps])
            self._update_running(mean, var, maps[0].x.shape)
        gain, bias = (None if p is None else p[...] for p in (self.scale, self.bias))
        return _coefficients(mean, var, gain, bias, self.eps)

    def measure(self, x: jax.Array) -> Measured:
        """Returns x with its batch statistics, for this and other norms that read it.

        x: the last channels of this norm's input, or all of them.
        """
        if self.use_running_average:
            return Measured(x)
        reference = self.mean[...][-x.shape[-1] :]
        statistics = _measure(x, reference, self._sharing)
        return Measured(x, checkpoint_name(statistics, "statistics"))

    @property
    def _sharing(self) -> "Sharing":
        return Sharing(self.groups, self.axis_name)

    def _update_running(self, mean: jax.Array, var: jax.Array, shape: tuple) -> None:
        """shape: (N, ..., C), of the map on this device."""
        if self.running_var == "unbiased":
            devices = self._sharing.devices_per_group()
            count = math.prod(shape[:-1]) // len(mean) * devices
            # A single value has no unbiased variance; torch raises an error.
            var = var * (count / max(count - 1, 1))
        for running, batch in ((self.mean, mean), (self.var, var)):
            # `running[...] = value` searches everything traced so far: it made tracing
            # ResNet-101 take 5.5 s of CPU time instead of 0.5 s.
            running.set_value(_next_average(running[...], batch, self.keep))


class Sharing(NamedTuple):
    """Which images share statistics; see BatchNorm."""

    groups: int
    axis_name: str | None

    def devices(self) -> int:
        return jax.lax.axis_size(self.axis_name) if self.axis_name else 1

    def devices_per_group(self) -> int:
        return max(1, self.devices() // self.groups)

    def groups_per_device(self, images: int) -> int:
        """Returns into how many groups this device splits its images.

        If that number does not divide a smaller last batch, returns the next larger one
        that does.
        """
        groups = min(images, max(1, self.groups // self.devices()))
        while images % groups:
            groups += 1
        return groups

    def over_devices(self, x: jax.Array) -> jax.Array:
        """Averages over the devices that share the images of a group."""
        share = self.devices_per_group()
        if share == 1:
            return x
        together = np.arange(self.devices()).reshape(self.groups, share).tolist()
        return jax.lax.pmean(x, self.axis_name, axis_index_groups=together)


# Within jax.jit, layers of equal shapes are traced once, which takes a third of the
# time for the train step of ResNet-110. nets/layers/lowerings.py does so, too.


@functools.partial(jax.jit, static_argnames="sharing")
def _measure(x: jax.Array, reference: jax.Array, sharing: Sharing) -> jax.Array:
    """Returns the batch statistics (2, groups, 1, ..., C) of x (N, ..., C).

    Both moments are sums, so that x is read once. Shifting x by a reference (C,), the
    running mean, limits the cancellation in E[x^2] - E[x]^2. In float64, which serves
    parity rather than speed, the batch mean is the reference.
    """
    groups = sharing.groups_per_device(x.shape[0])
    if x.dtype == jnp.float64:
        reference = jnp.mean(_group(x, groups), range(1, x.ndim), keepdims=True)
        reference = sharing.over_devices(reference)
    size = (groups, *[1] * (x.ndim - 1), x.shape[-1])
    reference = jax.lax.stop_gradient(jnp.broadcast_to(reference, size))
    pixels = math.prod(x.shape[:-1]) // groups
    means = _sum_moments(x, reference) / pixels
    offset, square = sharing.over_devices(means)
    var = jnp.maximum(square - jnp.square(offset), 0.0)
    return jnp.stack([offset + reference, var])


@functools.partial(jax.jit, static_argnames="keep")
def _next_average(running: jax.Array, batch: jax.Array, keep: float) -> jax.Array:
    """Returns the next running average (C,) from statistics (groups, 1, ..., C)."""
    # Several groups (or devices) contribute their average.
    batch = batch.reshape(-1, batch.shape[-1]).mean(0)
    return (keep * running + (1 - keep) * batch).astype(running.dtype)


@functools.partial(jax.jit, static_argnames="eps")
def _coefficients(mean, var, gain, bias, eps: float) -> tuple[jax.Array, jax.Array]:
    """Returns the scale and shift that normalise and apply gain and bias, if any."""
    scale = jax.lax.rsqrt(var + eps)
    scale = scale if gain is None else gain * scale
    shift = -mean * scale
    return scale, shift if bias is None else bias + shift


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


def _through_activation(activation: Activation, maps, scale, shift, dy) -> jax.Array:
    """Returns the gradient of the activation's argument scale * x + shift.

    maps: (N, ..., C), whose concatenation is x. dy: (groups, N / groups, ..., C), the
    gradient of the activation's result. The C++ kernel may round the argument
    differently, which matters only within a rounding error of a limit.
    """
    if activation is None:
        return dy
    y = _group(_concatenate(maps), len(dy)) * scale + shift
    passed = y > 0
    if LIMITS[activation] < math.inf:
        passed &= y < LIMITS[activation]
    return jnp.where(passed, dy, 0)


def _moments_in_cpp(x, reference):
    flat, reference = (_flatten(each, len(reference)) for each in (x, reference))
    return _unflatten(calls.map_moments(flat, reference[:, 0]), x.ndim)


@calls.use_kernel(_moments_in_cpp)
def _sum_moments(x: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns the sums of x - reference and of its square over the pixels of a group.

    x: (N, ..., C). reference: (groups, 1, ..., C).
    """
    centred = _group(x, len(reference)).astype(reference.dtype) - reference
    return _sum(centred, jnp.square(centred))


@functools.cache
def _sum_gradients(activation: Activation):
    """Returns (maps, scale, shift, dy) -> the gradients of shift and scale.

    maps, dy: see `_through_activation`.
    """

    def in_cpp(maps, scale, shift, dy):
        flatten = functools.partial(_flatten, groups=len(dy))
        maps, coefficients, limit = list(map(flatten, maps)), None, math.inf
        if activation is not None:
            coefficients = jnp.stack([flatten(each)[:, 0] for each in (scale, shift)])
            limit = LIMITS[activation]
        sums = calls.gradient_moments(maps, flatten(dy), coefficients, limit)
        return _unflatten(sums, dy.ndim - 1)

    @calls.use_kernel(in_cpp)
    def compute(maps, scale, shift, dy):
        dy = _through_activation(activation, maps, scale, shift, dy)
        return _sum(dy, dy * _group(_concatenate(maps), len(dy)))

    return compute


@functools.partial(jax.jit, static_argnames="activation")
def _normalise(maps, scale, shift, activation: Activation) -> jax.Array:
    return _scale_and_shift(maps, scale, shift, activation)


# Normalising each map before the concatenation gave X-DenseNet-121-2 1.4 times as many
# operations, which took 2.4 times as long to compile. The backward pass keeps only the
# maps; without the C++ kernel, it concatenates them again.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scale_and_shift(
    maps: Sequence[jax.Array],
    scale: jax.Array,
    shift: jax.Array,
    activation: Activation,
) -> jax.Array:
    """Returns activation(scale * x + shift) in the dtype of x.

    maps: (N, ..., C), whose concatenation is x. scale, shift: (groups, 1, ..., C).
    """
    x = _concatenate(maps)
    y = ACTIVATIONS[activation](_group(x, len(scale)) * scale + shift)
    return y.astype(x.dtype).reshape(x.shape)


def _forward(maps, scale, shift, activation):
    y = _scale_and_shift(maps, scale, shift, activation)
    return y, (maps, scale, shift)


def _gradients(activation, residuals, dy):
    maps, scale, _ = residuals
    grouped = _group(dy, len(scale)).astype(scale.dtype)
    dshift, dscale = _sum_gradients(activation)(*residuals, grouped)
    dx = _through_activation(activation, *residuals, grouped) * scale
    dx = dx.astype(dy.dtype).reshape(dy.shape)
    ends = np.cumsum([x.shape[-1] for x in maps])[:-1]
    return jnp.split(dx, ends, axis=-1), dscale, dshift


_scale_and_shift.defvjp(_forward, _gradients)


def _residual_sum_in_cpp(x, shortcut, scale, shift):
    flatten = functools.partial(_flatten, groups=len(scale))
    maps, scale, shift = [flatten(x), flatten(shortcut)], flatten(scale), flatten(shift)
    weights = jnp.concatenate([scale, jnp.ones_like(scale)], axis=1)
    return calls.weighted_sum(maps, weights, shift[:, 0], relu=True).reshape(x.shape)


@calls.use_kernel(_residual_sum_in_cpp)
def _compute_residual_sum(x, shortcut, scale, shift):
    y = (_group(x, len(scale)) * scale + shift).astype(x.dtype)
    return nnx.relu(y.reshape(x.shape) + shortcut)


@jax.custom_vjp
def _residual_sum(x, shortcut, scale, shift):
    return _forward_residual_sum(x, shortcut, scale, shift)[0]


def _forward_residual_sum(x, shortcut, scale, shift):
    y = checkpoint_name(_compute_residual_sum(x, shortcut, scale, shift), "block")
    return y, (x, scale, shift, y)


def _residual_sum_gradients(residuals, dy):
    x, scale, shift, y = residuals
    dy = jnp.where(y > 0, dy, 0)  # the next convolution keeps y anyway
    (dx,), dscale, dshift = _gradients(None, ([x], scale, shift), dy)
    return dx, dy, dscale, dshift


_residual_sum.defvjp(_forward_residual_sum, _residual_sum_gradients)


@jax.jit
def _add_relu(x, shortcut, scale, shift) -> jax.Array:
    """Returns ReLU(scale * x + shift + shortcut) in the dtype of x.

    scale, shift: (groups, 1, ..., C), or (C,) in evaluation.
    The C++ kernel saves more than its own time: XLA:CPU fuses such a sum with those of
    the later units of its stage, each of which computes it again.
    """
    if scale.ndim == 1:
        scale, shift = (each.reshape(*[1] * x.ndim, -1) for each in (scale, shift))
    return _residual_sum(x, shortcut, scale, shift)


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
