"""Random changes of colour in JAX: one draw per image, from a key per image.

jitter and lighting are fb.resnet.torch's ColorJitter and Lighting, which DelugeNets,
GUNN and ResNets trained with on ImageNet; hls is MXNet's, which IGCNets trained with.
The first two are linear in the image, so that the scale 0..255 gives what the original
computes on 0..1; they do not clip, as it does not.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

GRAY = (0.299, 0.587, 0.114)
# Principal components of ImageNet's colours on 0..1: eigenvalues, rows of R, G, B.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
HUES = 180  # of OpenCV in 8 bits: two degrees each


def jitter(keys: jax.Array, image: jax.Array, strength: float) -> jax.Array:
    """Brightness, contrast and saturation, in a random order for each image.

    keys: (b,); image: (b, H, W, 3) float, 0..255. Each of the three blends the image
    with black, its mean grey or its grey version: alpha x + (1 - alpha) other, alpha
    uniform in 1 +- strength. The result may leave 0..255.
    """
    return jax.vmap(blend)(image, *jax.vmap(lambda k: draw_jitter(k, strength))(keys))


def draw_jitter(key: jax.Array, strength: float) -> tuple[jax.Array, jax.Array]:
    """order (3,): a permutation of brightness 0, contrast 1, saturation 2; alpha (3,).

    alpha[i] belongs to the i-th of them, wherever it comes in the order.
    """
    first, second = jax.random.split(key)
    low, high = 1 - strength, 1 + strength
    return (
        jax.random.permutation(first, 3),
        jax.random.uniform(second, (3,), minval=low, maxval=high),
    )


def blend(image: jax.Array, order: jax.Array, alpha: jax.Array) -> jax.Array:
    """One image (H, W, 3) after the three changes of draw_jitter."""
    weights = jnp.asarray(GRAY, image.dtype)
    for kind in order:
        gray = (image * weights).sum(-1, keepdims=True)
        other = jnp.where(kind == 0, 0, jnp.where(kind == 1, gray.mean(), gray))
        a = alpha[kind].astype(image.dtype)
        image = a * image + (1 - a) * other
    return image


def lighting(keys: jax.Array, image: jax.Array, std: float) -> jax.Array:
    """Adds one colour to each image, along the principal axes of ImageNet's colours.

    keys: (b,); image: (b, H, W, 3) float, 0..255. The amounts along the three axes are
    normal with standard deviation std, times the eigenvalues.
    """
    amount = std * jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    axes = jnp.asarray(EIGENVECTORS) * jnp.asarray(EIGENVALUES)
    # Three products: a dot would be rounded to bfloat16 on some accelerators.
    color = 255 * (amount[:, None, :] * axes).sum(-1)
    return image + color[:, None, None, :].astype(image.dtype)


def hls(keys: jax.Array, image: jax.Array, limits: Sequence[float]) -> jax.Array:
    """Shifts hue, lightness and saturation of each image by one draw, clipped.

    keys: (b,); image: (b, H, W, 3) uint8, and so the result. limits: the largest shift
    of hue (0..180), lightness and saturation (0..255); each is uniform between -limit
    and limit and truncated to an integer. Hue is clipped, it does not wrap, and both
    conversions round to 8 bits, as MXNet's on OpenCV do. Raises ValueError for limits
    that are not three.
    """
    if len(limits) != 3:
        raise ValueError(f"hls={tuple(limits)}: give hue, lightness and saturation")

    def draw(key):
        return jax.random.uniform(key, (3,), minval=-1.0) * jnp.asarray(limits, float)

    shift = jnp.trunc(jax.vmap(draw)(keys))
    return jax.vmap(shift_hls)(image, shift)


def shift_hls(image: jax.Array, shift: jax.Array) -> jax.Array:
    """One image (H, W, 3) uint8 with whole numbers (3,) added in 8-bit HLS."""
    highest = jnp.asarray((HUES, 255, 255), jnp.float32)
    return from_hls(jnp.clip(to_hls(image) + shift, 0, highest))


def to_hls(image: jax.Array) -> jax.Array:
    """(..., 3) uint8 RGB -> float32 whole numbers: H 0..180, L and S 0..255.

    The definition that OpenCV gives for RGB2HLS in 8 bits; a hue may round to 180. Half
    of all lightnesses are halves, so the order of its float32 operations matters.
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
    """(..., 3) whole numbers of to_hls -> uint8 RGB, rounded; hue 180 is hue 0."""
    scaled = values / jnp.asarray((HUES / 6, 255, 255))
    hue, lightness, saturation = jnp.moveaxis(scaled, -1, 0)
    spread = saturation * jnp.minimum(lightness, 1 - lightness)

    def channel(ahead):
        # Full for two of the six sixths of the hue, up and down within one each.
        position = (hue + ahead) % 6
        height = jnp.clip(jnp.minimum(position - 1, 5 - position), 0, 1)
        return lightness + spread * (2 * height - 1)

    rgb = jnp.stack([channel(3), channel(1), channel(5)], -1)  # centred at 0, 2, 4
    return jnp.clip(jnp.rint(rgb * 255), 0, 255).astype(jnp.uint8)
