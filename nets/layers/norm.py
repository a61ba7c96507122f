"""Batch normalisation with every convention that differs between the origins."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class BatchNorm(nnx.Module):
    """Normalises each channel (last axis) over all other axes.

    eps: inside the square root.
    keep: share of the old running value kept per step (torch momentum 0.1 = 0.9).
    running_var: torch and cuDNN put the unbiased batch variance (n/(n-1)) into the
      running average, neon, MXNet's CPU operator and Flax the biased one. The
      normalisation itself always uses the biased one.
    initial_var: running variance before the first step (neon and MXNet: 0).
    affine: whether it has a gain (scale) and a shift (bias) per channel.

    Whose statistics (set by the trainer, not by a net): those of each of `groups`
    equal runs of images ("ghost" groups, for originals that trained on so many GPUs).
    The batch is all that the devices of the mesh axis `axis_name` have; without the
    name it is what this device has. Of groups and devices one divides the other.
    Statistics are at least float32; the output has the dtype of the input.
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
        # A dtype, as a weakly typed array would have the train step compiled twice.
        self.var = nnx.BatchStat(jnp.full(channels, initial_var, float))
        self.eps, self.keep, self.running_var = eps, keep, running_var
        self.axis_name: str | None = None
        self.groups = 1
        self.use_running_average = False  # flipped by net.train() and net.eval()

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            x, shape = self._split_into_groups(x), x.shape
            mean, var = self._batch_statistics(x)
        scale = jax.lax.rsqrt(var + self.eps)
        if self.scale is not None:
            scale = self.scale[...] * scale
        shift = -mean * scale
        if self.bias is not None:
            shift = self.bias[...] + shift
        y = (x * scale + shift).astype(x.dtype)
        return y if self.use_running_average else y.reshape(shape)

    def _split_into_groups(self, x: jax.Array) -> jax.Array:
        """(N, ..., C) -> (groups, N/groups, ..., C), of the images of this device.

        A smaller last batch that cannot have as many equal groups has the next number
        that it can have.
        """
        images = x.shape[0]
        groups = min(images, max(1, self.groups // self._devices()))
        while images % groups:
            groups += 1
        return x.reshape(groups, images // groups, *x.shape[1:])

    def _batch_statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and biased variance (groups, 1, ..., C); updates the running ones.

        One pass over x, 2.5 times faster than two (docs/speed.md). The running mean
        serves as the shift that keeps E[x^2] - E[x]^2 from cancelling. In float64,
        which is there for parity and not for speed, the batch mean does.
        """
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        axes = tuple(range(1, x.ndim - 1))
        reference = self.mean[...]
        if dtype == jnp.float64:
            reference = jnp.mean(x, axes, keepdims=True)
            reference = self._over_devices(reference)
        reference = jax.lax.stop_gradient(reference)
        centred = x.astype(dtype) - reference
        moments = jnp.stack(
            [
                jnp.mean(centred, axes, keepdims=True),
                jnp.mean(jnp.square(centred), axes, keepdims=True),
            ]
        )
        offset, square = self._over_devices(moments)
        mean = offset + reference
        var = jnp.maximum(square - jnp.square(offset), 0.0)
        count = x[0].size // x.shape[-1] * max(1, self._devices() // self.groups)
        self._update_running(mean, var, count)
        return mean, var

    def _devices(self) -> int:
        return jax.lax.axis_size(self.axis_name) if self.axis_name else 1

    def _over_devices(self, x: jax.Array) -> jax.Array:
        """The mean over the devices that have the images of a group together."""
        share = self._devices() // self.groups
        if share <= 1:
            return x
        together = np.arange(self._devices()).reshape(self.groups, share).tolist()
        return jax.lax.pmean(x, self.axis_name, axis_index_groups=together)

    def _update_running(self, mean: jax.Array, var: jax.Array, count: int) -> None:
        if self.running_var == "unbiased":
            # One value per channel has no unbiased variance; torch refuses it.
            var = var * (count / max(count - 1, 1))
        for running, batch in ((self.mean, mean), (self.var, var)):
            # With several groups (or devices) the average of theirs is kept.
            batch = batch.reshape(-1, batch.shape[-1]).mean(0)
            value = self.keep * running[...] + (1 - self.keep) * batch
            # Not `running[...] = value`, which searches all that was traced so far:
            # tracing ResNet-101 took 5.5 s of CPU time instead of 0.5 s.
            running.set_value(value.astype(running[...].dtype))


def torch_batch_norm(channels: int, scale: str, rngs: nnx.Rngs) -> BatchNorm:
    """BatchNorm whose initial scales are "ones", or "uniform": drawn from U(0, 1).

    Torch 0.3 drew them, in every net that did not set them itself.
    """
    if scale not in ("ones", "uniform"):
        raise ValueError(f"unknown norm_scale {scale!r}: choose from ones, uniform")
    norm = BatchNorm(channels)
    if scale == "uniform":
        norm.scale.set_value(jax.random.uniform(rngs.params(), (channels,)))
    return norm
