"""AutoAugment's policy for CIFAR-10 and RandAugment, on bytes, as Pillow computes them.

The operations are Pillow's: nearest neighbour in its 16.16 fixed point, integer
luminance, blends that truncate. Where Pillow's floats fall just short of a whole number
(autocontrast, a few factors of enhancements) it is one grey level darker; otherwise the
bytes are equal (tests/policies_test.py). What a geometric operation uncovers takes the
mean colour, zero after normalisation, as in AutoAugment's CIFAR code (there one that
follows may still see black below it).

Every magnitude is known before compilation, so their arguments are tables in NumPy and
the step only looks rows up. All operations are computed for every image, since a switch
under vmap is a selection.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

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
# arXiv 1909.13719, section 3: each equally likely.
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


class Operations(NamedTuple):
    """Arrays with the same leading axes: which operation, and its argument.

    code: index into _BRANCHES; matrix: (..., 6) int32, of the geometric ones, from
    output to input pixels in units of 1/65536; amount: float32, of all others.
    """

    code: np.ndarray
    matrix: np.ndarray
    amount: np.ndarray


def autoaugment(keys: jax.Array, images: jax.Array, mean: Sequence[float]) -> jax.Array:
    """One of the 25 pairs of CIFAR10 for each image; (b,) keys, (b, H, W, 3) uint8.

    A level is the share of a tenth, as in the authors' code: of 30 degrees, of a shear
    by 0.3, of 10 pixels of 32; enhancements by 0.1 + 0.18 level; solarize from 256 -
    25.6 level on; posterize to 4 - 0.4 level bits (where the paper's table has 8 to 4).
    The geometric ones go either way. mean: colour of what is uncovered, 0..255.
    """
    size = images.shape[1:3]
    table = _table(
        [
            (name, _level(name, level, sign, size))
            for pair in CIFAR10
            for name, _, level in pair
            for sign in (-1, 1)
        ],
        (25, 2, 2),
        size,
    )
    probability = np.array([[p for _, p, _ in pair] for pair in CIFAR10], np.float32)

    def draw(key):
        which, whether, sign = jax.random.split(key, 3)
        pair = jax.random.randint(which, (), 0, 25)
        sign = jax.random.randint(sign, (2,), 0, 2)
        drawn = _rows(table, (pair, np.arange(2), sign))
        used = jax.random.uniform(whether, (2,)) < jnp.asarray(probability)[pair]
        return drawn._replace(code=jnp.where(used, drawn.code, _IDENTITY))

    return _carry_out(jax.vmap(draw)(keys), images, mean)


def randaugment(
    keys: jax.Array,
    images: jax.Array,
    mean: Sequence[float],
    operations: int,
    magnitude: float,
) -> jax.Array:
    """`operations` of RANDAUGMENT for each image; (b,) keys, (b, H, W, 3) uint8.

    magnitude: from 0 to 30, full strength s = 1: 30 degrees, a shear by 0.3, 10
    pixels of 32, enhancements by 1 +- 0.9 s, solarize from 256 (1 - s) on, posterize
    to 8 - 4 s bits, rounded down, all growing with the magnitude (in the authors' code
    not all do). Signs are random. mean: colour of what is uncovered, 0..255.
    """
    size = images.shape[1:3]
    strength = magnitude / MAX_MAGNITUDE
    table = _table(
        [
            (name, _strength(name, strength, sign, size))
            for name in RANDAUGMENT
            for sign in (-1, 1)
        ],
        (len(RANDAUGMENT), 2),
        size,
    )

    def draw(key):
        which, sign = jax.random.split(key)
        which = jax.random.randint(which, (operations,), 0, len(RANDAUGMENT))
        return _rows(table, (which, jax.random.randint(sign, which.shape, 0, 2)))

    return _carry_out(jax.vmap(draw)(keys), images, mean)


def operate(
    name: str, images: jax.Array, magnitude: float, mean: Sequence[float] = (0, 0, 0)
) -> jax.Array:
    """One operation on all of (b, H, W, 3) uint8, with Pillow's arguments.

    magnitude: degrees, the coefficient of a shear, pixels, threshold, bits, or the
    factor of an enhancement; the sign of geometric ones as in Pillow's AFFINE.
    """
    images = jnp.asarray(images)
    row = _table([(name, magnitude)], (1,), images.shape[1:3])
    row = Operations(*(jnp.repeat(x[None], len(images), 0) for x in row))
    return _carry_out(row, images, mean)


def _level(name: str, level: int, sign: int, size: tuple[int, int]) -> float:
    if name in _GEOMETRIC:
        return _geometric(name, level / 10, sign, size)
    if name == "solarize":
        return 256 - int(25.6 * level)
    if name == "posterize":
        return 4 - int(0.4 * level)
    return 0.1 + 0.18 * level


def _strength(name: str, strength: float, sign: int, size: tuple[int, int]) -> float:
    if name in _GEOMETRIC:
        return _geometric(name, strength, sign, size)
    if name == "solarize":
        return 256 - int(256 * strength)
    if name == "posterize":
        return 8 - int(4 * strength)
    return 1 + sign * 0.9 * strength


def _geometric(name: str, share: float, sign: int, size: tuple[int, int]) -> float:
    full = sign * share * _GEOMETRIC[name]
    if name in ("translate_x", "translate_y"):
        full *= size[name == "translate_x"]
    if name.startswith("shear"):
        return full
    return math.trunc(round(full, 6))  # whole degrees and pixels


def _table(entries, shape: tuple[int, ...], size: tuple[int, int]) -> Operations:
    """entries: (name, magnitude) each; shape: leading axes; size: of the images."""
    code = np.array([_BRANCHES.index(OPERATIONS[x]) for x, _ in entries], np.int32)
    matrix = np.array([_matrix(*entry, size) for entry in entries], np.int32)
    amount = np.array([magnitude for _, magnitude in entries], np.float32)
    return Operations(
        code.reshape(shape), matrix.reshape(*shape, 6), amount.reshape(shape)
    )


def _rows(table: Operations, index) -> Operations:
    return Operations(*(jnp.asarray(x)[index] for x in table))


def _matrix(name: str, magnitude: float, size: tuple[int, int]) -> list[int]:
    """Pillow's coefficients (a, b, c, d, e, f): x' = ax + by + c, y' = dx + ey + f."""
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if name == "rotate":  # counterclockwise about the centre
        angle, (y, x) = -math.radians(magnitude), (size[0] / 2, size[1] / 2)
        a, b = round(math.cos(angle), 15), round(math.sin(angle), 15)
        d, e = -b, a
        c, f = x - a * x - b * y, y - d * x - e * y
    elif name in _GEOMETRIC:
        b, d = (magnitude * (name == f"shear_{axis}") for axis in "xy")
        c, f = (magnitude * (name == f"translate_{axis}") for axis in "xy")
    c, f = c + (a + b) / 2, f + (d + e) / 2  # from centre to centre of pixels
    return [math.floor(v * 65536 + 0.5) for v in (a, b, c, d, e, f)]


@jax.jit
def _carry_out(drawn: Operations, images: jax.Array, mean) -> jax.Array:
    """drawn: (b, n) operations, one after the other."""
    fill = jnp.rint(jnp.asarray(mean, jnp.float32)).astype(jnp.uint8)

    def one(image, code, matrix, amount):
        return jax.lax.switch(code, _BRANCHES, image, matrix, amount, fill)

    for i in range(drawn.code.shape[1]):
        images = jax.vmap(one)(images, *(x[:, i] for x in drawn))
    return images


# The operations, all (image, matrix, amount, fill) -> image, (H, W, 3) uint8.


def _identity(image, matrix, amount, fill):
    return image


def _affine(image, matrix, amount, fill):
    height, width, _ = image.shape
    y, x = np.mgrid[:height, :width].astype(np.int32)
    columns = (matrix[0] * x + matrix[1] * y + matrix[2]) >> 16
    rows = (matrix[3] * x + matrix[4] * y + matrix[5]) >> 16
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    taken = image[rows, columns]  # indices outside are clamped
    return jnp.where(inside[..., None], taken, fill)


def _autocontrast(image, matrix, amount, fill):
    wide = image.astype(jnp.int32)
    low, high = wide.min(axis=(0, 1)), wide.max(axis=(0, 1))
    stretched = 255 * (wide - low) // jnp.maximum(high - low, 1)
    return jnp.where(high > low, stretched, wide).astype(jnp.uint8)


def _invert(image, matrix, amount, fill):
    return 255 - image


def _equalize(image, matrix, amount, fill):
    pixels = image.reshape(-1, 3)
    channels = np.arange(3)
    counts = jnp.zeros((3, 256), jnp.int32).at[channels, pixels].add(1)
    of_brightest = counts[channels, pixels.max(axis=0)]
    step = ((len(pixels) - of_brightest) // 255)[:, None]
    below = jnp.cumsum(counts, axis=1) - counts
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    table = jnp.where(step > 0, table, np.arange(256)).astype(jnp.uint8)
    return table[channels, image]


def _solarize(image, matrix, amount, fill):
    return jnp.where(image < amount, image, 255 - image)


def _posterize(image, matrix, amount, fill):
    lost = 8 - amount.astype(jnp.int32)
    return (image.astype(jnp.int32) >> lost << lost).astype(jnp.uint8)


def _contrast(image, matrix, amount, fill):
    grey = _luminance(image)
    mean = (2 * grey.sum() + grey.size) // (2 * grey.size)
    return _enhanced(mean, image, amount)


def _color(image, matrix, amount, fill):
    return _enhanced(_luminance(image)[..., None], image, amount)


def _brightness(image, matrix, amount, fill):
    return _enhanced(0, image, amount)


def _sharpness(image, matrix, amount, fill):
    wide = image.astype(jnp.int32)
    height, width, _ = image.shape
    around = sum(
        wide[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)
    )
    # Weights 1, 5 in the centre, of 13; rounded. The border is not smoothed.
    smooth = (2 * (around + 4 * wide[1:-1, 1:-1]) + 13) // 26
    return _enhanced(wide.at[1:-1, 1:-1].set(smooth), image, amount)


def _luminance(image):
    weighted = image.astype(jnp.int32) * np.array([19595, 38470, 7471], np.int32)
    return (weighted.sum(axis=-1) + 0x8000) >> 16


def _enhanced(plain, image, factor):
    """plain, of which the image has all that is to be enhanced taken away, to image."""
    blended = plain + factor * (image - plain).astype(jnp.float32)
    # Compilers may or may not round the product; whole numbers must not depend on it.
    return jnp.clip(blended + 2**-14, 0, 255).astype(jnp.uint8)


OPERATIONS = {
    "identity": _identity,
    **dict.fromkeys(_GEOMETRIC, _affine),
    "autocontrast": _autocontrast,
    "invert": _invert,
    "equalize": _equalize,
    "solarize": _solarize,
    "posterize": _posterize,
    "contrast": _contrast,
    "color": _color,
    "brightness": _brightness,
    "sharpness": _sharpness,
}
_BRANCHES = list(dict.fromkeys(OPERATIONS.values()))
_IDENTITY = _BRANCHES.index(_identity)
