"""Random changes of colour in JAX, drawn for each image from its own key.

`jitter` and `lighting` are fb.resnet.torch's ColorJitter and Lighting, used by
DelugeNets, GUNN and ResNets on ImageNet; `hls` is MXNet's, used by IGCNets. The first
two are linear in the image, so they can run on the scale 0..255 instead of the
original's 0..1; like the original, they do not clip.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

GRAY = (0.299, 0.587, 0.114)
# Principal components of ImageNet's colours on the scale 0..1; a row per channel.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
HUES = 180  # OpenCV's 8-bit hues are two degrees each


def jitter(keys: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, contrast and saturation, in a random order for each image.

    keys: (b,); image: (b, H, W, 3) float, 0..255. Each change blends the image with
    black, its mean grey or its grey version: alpha x + (1 - alpha) other, with alpha
    uniform in 1 +- strength. The result may leave 0..255.
    """
    return jax.vmap(blend)(image, *jax.vmap(lambda k: draw_jitter(k, strength))(keys))


def draw_jitter(key: jax.Array, strength: float) -> tuple[jax.Array, jax.Array]:
    """Draws an order (3,) of the changes and their alphas (3,).

    The changes are brightness 0, contrast 1 and saturation 2. alpha is indexed by
    change, not by position in the order.
    """
    first, second = jax.random.split(key)
    alpha = jax.random.uniform(second, (3,), minval=1 - strength, maxval=1 + strength)
    return jax.random.permutation(first, 3), alpha


def blend(image: jax.Array, order: jax.Array, alpha: jax.Array) -> jax.Array:
    """Applies the three changes that draw_jitter drew to one image (H, W, 3)."""
    weights = jnp.asarray(GRAY, image.dtype)
    for kind in order:
        gray = (image * weights).sum(-1, keepdims=True)
        other = jnp.where(kind == 0, 0, jnp.where(kind == 1, gray.mean(), gray))
        a = alpha[kind].astype(image.dtype)
        image = a * image + (1 - a) * other
    return image


def lighting(keys: jax.Array, image: jax.Array, std: float) -> jax.Array:
    """Adds a random colour to each image, along the axes of ImageNet's colours.

    keys: (b,); image: (b, H, W, 3) float, 0..255. The amount along each axis is normal
    with standard deviation `std` times the eigenvalue.
    """
    amount = std * jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    axes = jnp.asarray(EIGENVECTORS) * jnp.asarray(EIGENVALUES)
    # Not a dot product, which some accelerators round to bfloat16.
    color = 255 * (amount[:, None, :] * axes).sum(-1)
    return image + color[:, None, None, :].astype(image.dtype)


def hls(keys: jax.Array, image: jax.Array, limits: Sequence[float]) -> jax.Array:
    """Shifts hue, lightness and saturation of each image; returns uint8.

    keys: (b,); image: (b, H, W, 3) uint8. limits: the largest shifts of hue (0..180),
    lightness and saturation (0..255). Each shift is uniform between -limit and limit,
    truncated to an integer. As in MXNet on OpenCV, hue is clipped instead of wrapped,
    and both conversions round to 8 bits.
    """

    def draw(key):
        return jax.random.uniform(key, (3,), minval=-1.0) * jnp.asarray(limits, float)

    shift = jnp.trunc(jax.vmap(draw)(keys))
    return jax.vmap(shift_hls)(image, shift)


def shift_hls(image: jax.Array, shift: jax.Array) -> jax.Array:
    """Shifts one image (H, W, 3) uint8 in 8-bit HLS by whole numbers `shift` (3,)."""
    highest = jnp.asarray((HUES, 255, 255), jnp.float32)
    return from_hls(jnp.clip(to_hls(image) + shift, 0, highest))


def to_hls(image: jax.Array) -> jax.Array:
    """Converts RGB (..., 3) uint8 to whole float32 numbers H 0..180, L and S 0..255.

    Follows OpenCV's definition of RGB2HLS in 8 bits, where a hue may round to 180. Half
    of all lightnesses lie midway between two integers, so the order of the float32
    operations matters.
    """
    r, g, b = jnp.moveaxis(image.astype(jnp.float32) * jnp.float32(1 / 255), -1, 0)
    largest = jnp.maximum(jnp.maximum(r, g), b)
    smallest = jnp.minimum(jnp.minimum(r, g), b)
    total, range_ = largest + smallest, largest - smallest
    gray = range_ == 0
    safe = jnp.where(gray, 1, range_)
    saturation = range_ / jnp.where(gray, 1, jnp.where(total < 1, total, 2 - total))
    hue = jnp.where(
        largest == r,
        60 * (g - b) / safe,
        jnp.where(largest == g, 60 * (b - r) / safe + 120, 60 * (r - g) / safe + 240),
    )
    hue = jnp.where(hue < 0, hue + 360, hue)
    parts = (hue * (HUES / 360), total * 0.5 * 255, saturation * 255)
    return jnp.rint(jnp.stack(parts, -1))


def from_hls(values: jax.Array) -> jax.Array:
    """Inverts to_hls: converts (..., 3) to uint8 RGB; hue 180 is hue 0."""
    scaled = values / jnp.asarray((HUES / 6, 255, 255))
    hue, lightness, saturation = jnp.moveaxis(scaled, -1, 0)
    spread = saturation * jnp.minimum(lightness, 1 - lightness)

    def channel(ahead):
        # Over the hue circle: a rise and a fall of a sixth each, two sixths at the top.
        position = (hue + ahead) % 6
        height = jnp.clip(jnp.minimum(position - 1, 5 - position), 0, 1)
        return lightness + spread * (2 * height - 1)

    rgb = jnp.stack([channel(3), channel(1), channel(5)], -1)  # centred at 0, 2, 4
    return jnp.clip(jnp.rint(rgb * 255), 0, 255).astype(jnp.uint8)
