"""Dense and grouped convolution, linear layer, and each origin's initialiser."""

import jax
import jax.numpy as jnp
from flax import nnx

from nets.layers.lowerings import convolution

# Normal with variance 2/fan: He et al. 2015. The fan is where the origins differ.
he_fan_in = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # neon
he_fan_out = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # torch
# Torch's default linear weight: U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
torch_uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(nnx.Module):
    """Cross-correlation of (N, H, W, in) with a (k, k, in/groups, out) kernel.

    Padding is explicit, symmetric and of zeros, as in every original. The kernel is
    cast to the dtype of the input, so the input decides the precision.
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
        init=he_fan_out,
        rngs: nnx.Rngs,
    ):
        for side, channels in (("input", in_channels), ("output", out_channels)):
            if channels < 1:
                raise ValueError(f"a convolution with {channels} {side} channels")
            if groups < 1 or channels % groups:
                raise ValueError(
                    f"{groups} groups do not divide {channels} {side} channels"
                )
        shape = (kernel_size, kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.stride, self.padding, self.groups = stride, padding, groups
        self.lowering = "auto"

    def __call__(self, x: jax.Array) -> jax.Array:
        return convolution(
            x,
            self.kernel[...].astype(x.dtype),
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            lowering=self.lowering,
        )


class Linear(nnx.Module):
    """x (N, in) -> (N, out), the kernel stored as (in, out)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        init=torch_uniform,
        rngs: nnx.Rngs,
    ):
        shape = (in_features, out_features)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
