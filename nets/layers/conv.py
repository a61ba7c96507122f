"""Dense and grouped convolutions, linear layers, and the originals' initialisers."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nets.layers.lowerings import convolution

# Normal with variance 2 / fan (He et al. 2015). The originals differ in the fan.
he_fan_in = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # neon
he_fan_out = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # torch
# Torch's default for the weights of a linear layer: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
torch_uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_default(fan_in: int):
    """Returns the initialiser U(-1/sqrt(fan_in), 1/sqrt(fan_in)), torch's default.

    The fan of a convolution is in * k * k; torch 0.3 did not divide it by the groups.
    """
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv(nnx.Module):
    """Cross-correlation of (N, H, W, in) with a (k, k, in / groups, out) kernel.

    Pads `padding` zeros on every side, as all originals do. Computes in the dtype of
    the input, to which the kernel is cast.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = False,
        init=he_fan_out,
        bias_init=None,
        rngs: nnx.Rngs,
    ):
        for side, channels in (("input", in_channels), ("output", out_channels)):
            if channels < 1:
                raise ValueError(
                    f"a convolution needs at least 1 {side} channel, got {channels}"
                )
            if groups < 1 or channels % groups:
                raise ValueError(
                    f"{groups} groups do not divide {channels} {side} channels"
                )
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.bias = _bias(out_channels, bias_init, rngs) if bias else None
        self.stride, self.padding, self.groups = stride, padding, groups
        self.lowering = "auto"

    def __call__(self, x: jax.Array) -> jax.Array:
        y = convolution(
            x,
            self.kernel[...].astype(x.dtype),
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            lowering=self.lowering,
        )
        y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
        return checkpoint_name(y, "convolution")


class GroupedConv(Conv):
    """A Conv that has groups because of its wiring, so its dense twin has one group.

    The depthwise convolutions of a backbone are plain Convs: their twin has them too.
    """

    @property
    def absent_weights(self) -> int:
        """Number of weights that only the dense twin has (nets/cost.py)."""
        return math.prod(self.kernel.shape) * (self.groups - 1)


class Linear(nnx.Module):
    """Linear layer: x (N, in) -> (N, out), with an (in, out) kernel."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        init=torch_uniform,
        bias_init=None,
        rngs: nnx.Rngs,
    ):
        if out_features < 1:
            raise ValueError(
                f"a linear layer needs at least 1 output, got {out_features}"
            )
        shape = (in_features, out_features)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.bias = _bias(out_features, bias_init, rngs) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _bias(size: int, init, rngs: nnx.Rngs) -> nnx.Param:
    """Returns zeros, which consume no rng key, if no initialiser is given."""
    if init is None:
        return nnx.Param(jnp.zeros(size))
    return nnx.Param(init(rngs.params(), (size,), jnp.float32))
