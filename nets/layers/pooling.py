"""Pooling with explicit windows."""

import jax
import jax.numpy as jnp
from flax import nnx


def average_pool(x: jax.Array, size: int) -> jax.Array:
    """Non-overlapping size x size windows of (N, H, W, C); a remainder is dropped."""
    n, h, w, c = x.shape
    h, w = h // size, w // size
    x = x[:, : h * size, : w * size].reshape(n, h, size, w, size, c)
    return x.mean((2, 4))


def max_pool(x: jax.Array, size: int, *, stride: int, padding: int = 0) -> jax.Array:
    """size x size windows of (N, H, W, C). Padding never wins; a rest is dropped."""
    edges = ((padding, padding), (padding, padding))
    return nnx.max_pool(x, (size, size), strides=(stride, stride), padding=edges)


def global_average_pool(x: jax.Array) -> jax.Array:
    """(N, H, W, C) -> (N, C) in at least float32, so that the head is exact too."""
    return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
