"""AutoAugment's policy for CIFAR-10 and RandAugment, on bytes, as Pillow computes them.

The operations follow Pillow: nearest neighbour in its 16.16 fixed point, integer
luminance, truncating blends. They return Pillow's bytes, except that a pixel may differ
by one grey level if Pillow's floats fall just short of a whole number (autocontrast and
a few factors of enhancements). Pixels that a geometric operation uncovers take the
mean colour, which is zero after normalisation, as in AutoAugment's CIFAR code (there, a
later operation may still see them as black).

All magnitudes are known before compilation: the step draws indices into a table of
operations. It computes every operation for every image, since a switch under vmap is a
selection.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# arXiv 1805.09501, appendix A: 25 pairs of (operation, probability, level of 10).
CIFAR10 = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
)
# arXiv 1909.13719, section 3: all equally likely.
RANDAUGMENT = (
    *("identity", "autocontrast", "equalize", "rotate", "solarize", "color"),
    *("posterize", "contrast", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y"),
)
MAX_MAGNITUDE = 30.0
# At full strength: degrees, fraction of the other axis, and 10 of 32 pixels.
_GEOMETRIC = {
    "rotate": 30.0,
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 10 / 32,
    "translate_y": 10 / 32,
}


def autoaugment(keys: jax.Array, images: jax.Array, mean: Sequence[float]) -> jax.Array:
    """Applies one of the 25 pairs of CIFAR10 to each image (b, H, W, 3) uint8.

    As in the authors' code, a level is a strength in tenths: of 30 degrees, of a shear
    by 0.3, of 10 of 32 pixels; enhancements are by 0.1 + 0.18 level, solarize starts at
    256 - 25.6 level, and posterize leaves 4 - 0.4 level bits (8 to 4 in the paper's
    table). Geometric operations have a random sign. keys: (b,); mean: the colour of
    uncovered pixels, 0..255.
    """
    size = images.shape[1:3]
    operations = [
        _operation(name, level / 10, sign, size, bits=4, factor=0.1 + 0.18 * level)
        for pair in CIFAR10
        for name, _, level in pair
        for sign in (-1, 1)
    ]
    probability = np.array([[p for _, p, _ in pair] for pair in CIFAR10], np.float32)

    def draw(key):
        which, whether, sign = jax.random.split(key, 3)
        pair = jax.random.randint(which, (), 0, 25)
        sign = jax.random.randint(sign, (2,), 0, 2)
        chosen = (2 * pair + np.arange(2)) * 2 + sign
        used = jax.random.uniform(whether, (2,)) < jnp.asarray(probability)[pair]
        return jnp.where(used, chosen, len(operations))

    chosen = jax.vmap(draw)(keys)
    return apply([*operations, ("identity", 0)], chosen, images, mean)


def randaugment(
    keys: jax.Array,
    images: jax.Array,
    mean: Sequence[float],
    number: int,
    magnitude: float,
) -> jax.Array:
    """Applies `number` random operations to each image (b, H, W, 3) uint8.

    magnitude: 0 to 30. With strength s = magnitude / 30: 30 s degrees, a shear by 0.3
    s, 10 s of 32 pixels, enhancements by 1 +- 0.9 s, solarize from 256 (1 - s), and
    posterize to 8 - 4 s bits, rounded up; all grow with the magnitude (in the authors'
    code not all do). Signs are random. keys: (b,); mean: the colour of uncovered
    pixels, 0..255.
    """
    size, strength = images.shape[1:3], magnitude / MAX_MAGNITUDE
    operations = [
        _operation(name, strength, sign, size, bits=8, factor=1 + 0.9 * sign * strength)
        for name in RANDAUGMENT
        for sign in (-1, 1)
    ]

    def draw(key):
        which, sign = jax.random.split(key)
        which = jax.random.randint(which, (number,), 0, len(RANDAUGMENT))
        return 2 * which + jax.random.randint(sign, which.shape, 0, 2)

    return apply(operations, jax.vmap(draw)(keys), images, mean)


def _operation(
    name: str,
    strength: float,
    sign: int,
    size: tuple[int, int],
    *,
    bits: int,
    factor: float,
) -> tuple[str, float]:
    """Returns an operation for `apply`: its name and magnitude.

    strength: 0 to 1; size: (H, W) of the images; bits: what posterize leaves at
    strength 0; factor: the magnitude of enhancements.
    """
    if name in _GEOMETRIC:
        full = sign * strength * _GEOMETRIC[name]
        if name.startswith("shear"):
            return name, full
        if name.startswith("translate"):
            full *= size[name == "translate_x"]
        return name, int(round(full, 6))  # whole degrees and pixels
    if name == "solarize":
        return name, 256 - int(256 * strength)
    if name == "posterize":
        return name, bits - int(4 * strength)
    return name, factor


def apply(
    operations: Sequence[tuple[str, float]],
    chosen: jax.Array,
    images: jax.Array,
    mean: Sequence[float],
) -> jax.Array:
    """Applies operations[chosen[i, j]] for j = 0, 1, ... to image i.

    operations: (name, magnitude), with Pillow's arguments: degrees, the coefficient of
    a shear, pixels, threshold, bits, or the factor of an enhancement; signs of
    geometric operations follow Pillow's AFFINE. chosen: (b, n) int. images: (b, H, W,
    3) uint8. mean: the colour of uncovered pixels, 0..255.
    """
    size = images.shape[1:3]
    branch = [_BRANCHES.index(OPERATIONS[name]) for name, _ in operations]
    matrix = [_matrix(*operation, size) for operation in operations]
    magnitude = [magnitude for _, magnitude in operations]
    branch, matrix = jnp.array(branch, jnp.int32), jnp.array(matrix, jnp.int32)
    magnitude = jnp.array(magnitude, jnp.float32)
    fill = jnp.rint(jnp.asarray(mean, jnp.float32)).astype(jnp.uint8)
    for i in chosen.T:
        images = _apply_one(images, branch[i], matrix[i], magnitude[i], fill)
    return images


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, None))
def _apply_one(image, branch, matrix, magnitude, fill):
    image = _affine(image, matrix, fill)  # the identity unless geometric
    return jax.lax.switch(branch, _BRANCHES, image, magnitude)


def _matrix(name: str, magnitude: float, size: tuple[int, int]) -> list[int]:
    """Returns Pillow's coefficients in units of 1/65536, from output to input pixels.

    (a, b, c, d, e, f): x' = ax + by + c, y' = dx + ey + f.
    """
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if name == "rotate":  # counterclockwise about the centre
        angle, (y, x) = -math.radians(magnitude), (size[0] / 2, size[1] / 2)
        a, b = round(math.cos(angle), 15), round(math.sin(angle), 15)
        d, e = -b, a
        c, f = x - a * x - b * y, y - d * x - e * y
    elif name in _GEOMETRIC:
        b, d = (magnitude * (name == f"shear_{axis}") for axis in "xy")
        c, f = (magnitude * (name == f"translate_{axis}") for axis in "xy")
    c, f = c + (a + b) / 2, f + (d + e) / 2  # between centres of pixels
    return [math.floor(v * 65536 + 0.5) for v in (a, b, c, d, e, f)]


def _affine(image, matrix, fill):
    height, width, _ = image.shape
    y, x = np.mgrid[:height, :width].astype(np.int32)
    columns = (matrix[0] * x + matrix[1] * y + matrix[2]) >> 16
    rows = (matrix[3] * x + matrix[4] * y + matrix[5]) >> 16
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    taken = image[rows, columns]  # indices outside are clamped
    return jnp.where(inside[..., None], taken, fill)


# The other operations: (image, magnitude) -> image, (H, W, 3) uint8.


def _autocontrast(image, magnitude):
    wide = image.astype(jnp.int32)
    low, high = wide.min(axis=(0, 1)), wide.max(axis=(0, 1))
    stretched = 255 * (wide - low) // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, wide).astype(jnp.uint8)


def _equalize(image, magnitude):
    pixels = image.reshape(-1, 3)
    channels = np.arange(3)
    counts = jnp.zeros((3, 256), jnp.int32).at[channels, pixels].add(1)
    of_brightest = counts[channels, pixels.max(axis=0)]
    step = ((len(pixels) - of_brightest) // 255)[:, None]
    below = jnp.cumsum(counts, axis=1) - counts
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    table = jnp.where(step > 0, table, np.arange(256)).astype(jnp.uint8)
    return table[channels, image]


def _posterize(image, magnitude):
    lost = 8 - magnitude.astype(jnp.int32)
    return (image.astype(jnp.int32) >> lost << lost).astype(jnp.uint8)


def _contrast(image, magnitude):
    grey = _luminance(image)
    mean = (2 * grey.sum() + grey.size) // (2 * grey.size)
    return _extrapolate(mean, image, magnitude)


def _sharpness(image, magnitude):
    wide = image.astype(jnp.int32)
    height, width, _ = image.shape
    around = sum(
        wide[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)
    )
    # Weights 1, and 5 in the centre, of 13, rounded. The border is not smoothed.
    smooth = (2 * (around + 4 * wide[1:-1, 1:-1]) + 13) // 26
    return _extrapolate(wide.at[1:-1, 1:-1].set(smooth), image, magnitude)


def _luminance(image):
    weighted = image.astype(jnp.int32) * np.array([19595, 38470, 7471], np.int32)
    return (weighted.sum(axis=-1, keepdims=True) + 0x8000) >> 16


def _extrapolate(plain, image, factor):
    """Extrapolates from `plain`, an image without the enhanced property."""
    blended = plain + factor * (image - plain).astype(jnp.float32)
    # Compilers may or may not round the product: that must not change whole numbers.
    return jnp.clip(blended + 2**-14, 0, 255).astype(jnp.uint8)


OPERATIONS = {
    **dict.fromkeys(("identity", *_GEOMETRIC), lambda image, _: image),
    "autocontrast": _autocontrast,
    "invert": lambda image, _: 255 - image,
    "equalize": _equalize,
    "solarize": lambda image, limit: jnp.where(image < limit, image, 255 - image),
    "posterize": _posterize,
    "contrast": _contrast,
    "color": lambda image, factor: _extrapolate(_luminance(image), image, factor),
    "brightness": lambda image, factor: _extrapolate(0, image, factor),
    "sharpness": _sharpness,
}
_BRANCHES = list(dict.fromkeys(OPERATIONS.values()))
