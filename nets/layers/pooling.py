"""Average and max pooling."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx


def average_pool(x: jax.Array, size: int) -> jax.Array:
    """Averages disjoint size x size windows of (N, H, W, C); drops a remainder."""
    _check_size(x, size)
    n, h, w, c = x.shape
    h, w = h // size, w // size
    x = x[:, : h * size, : w * size].reshape(n, h, size, w, size, c)
    return x.mean((2, 4))


def max_pool(x: jax.Array, size: int, *, stride: int, padding: int = 0) -> jax.Array:
    """Takes the maxima of size x size windows of (N, H, W, C); drops a remainder.

    Padding is never the maximum. Among equal values, the first receives the gradient.
    """
    _check_size(x, size, padding)
    by = max_of_slices if jax.default_backend() == "cpu" else max_of_windows
    return by(x, size, stride, padding)


def max_of_windows(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
    """Computes `max_pool` by XLA's window operation."""
    edges = ((padding, padding), (padding, padding))
    return nnx.max_pool(x, (size, size), strides=(stride, stride), padding=edges)


def max_of_slices(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
    """Computes `max_pool` from strided slices, first within rows, then across them.

    On CPU the gradient of `max_of_windows` takes 10 times as long for 2x2 windows (43
    instead of 4.4 ms for 64 maps of 32x32x64), 6 times for overlapping 3x3 windows.
    One slice per pixel of a 3x3 window would keep eight more maps for the gradient
    (ResNet-18: 336 instead of 219 MiB).
    """
    edges = (padding, padding, 0)
    x = jax.lax.pad(
        x, jnp.array(-jnp.inf, x.dtype), ((0, 0, 0), edges, edges, (0, 0, 0))
    )
    # Columns before rows, so that the first of equal values in row-major order receives
    # the gradient, as in `max_of_windows`.
    for axis in (2, 1):
        length = x.shape[axis] - size + 1
        slices = [
            jax.lax.slice_in_dim(x, i, i + length, stride, axis) for i in range(size)
        ]
        x = functools.reduce(_larger, slices)
    return x


def _larger(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the maximum; of equal values, x receives the gradient."""
    return jnp.where((y > x) | jnp.isnan(y), y, x)


def global_average_pool(x: jax.Array) -> jax.Array:
    """Averages (N, H, W, C) to (N, C) in at least float32, for an exact classifier."""
    return x.mean((1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


def _check_size(x: jax.Array, size: int, padding: int = 0) -> None:
    # Otherwise the output is empty, and its mean nan.
    if min(x.shape[1:3]) + 2 * padding < size:
        raise ValueError(
            f"a map of {x.shape[1:3]} with padding {padding} is smaller than a "
            f"{size}x{size} pooling window: the images are too small for this net"
        )
