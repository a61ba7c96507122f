"""Every operation against Pillow, and policies against all that they could do."""

import itertools
import zlib

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_digits

from augment import policies

MEAN = (125.3, 123.0, 113.9)
FILL = (125, 123, 114)


def affine(*matrix):
    return lambda image: image.transform(
        image.size, Image.AFFINE, matrix, fillcolor=FILL
    )


# As one calls Pillow: name -> magnitude -> image -> image.
PILLOW = {
    "identity": lambda m: lambda image: image,
    "rotate": lambda m: lambda image: image.rotate(m, fillcolor=FILL),
    "shear_x": lambda m: affine(1, m, 0, 0, 1, 0),
    "shear_y": lambda m: affine(1, 0, 0, m, 1, 0),
    "translate_x": lambda m: affine(1, 0, m, 0, 1, 0),
    "translate_y": lambda m: affine(1, 0, 0, 0, 1, m),
    "autocontrast": lambda m: ImageOps.autocontrast,
    "invert": lambda m: ImageOps.invert,
    "equalize": lambda m: ImageOps.equalize,
    "solarize": lambda m: lambda image: ImageOps.solarize(image, m),
    "posterize": lambda m: lambda image: ImageOps.posterize(image, m),
    "contrast": lambda m: lambda image: ImageEnhance.Contrast(image).enhance(m),
    "color": lambda m: lambda image: ImageEnhance.Color(image).enhance(m),
    "brightness": lambda m: lambda image: ImageEnhance.Brightness(image).enhance(m),
    "sharpness": lambda m: lambda image: ImageEnhance.Sharpness(image).enhance(m),
}
ENHANCEMENTS = ("contrast", "color", "brightness", "sharpness")
# Their floats may fall just short of a whole number.
INEXACT = ("autocontrast", *ENHANCEMENTS)
MAGNITUDES = {
    "rotate": (7, -30, 0),
    "shear_x": (0.3, -0.09),
    "shear_y": (0.24, -0.3),
    "translate_x": (9, -3),
    "translate_y": (7, -10),
    "solarize": (256, 128, 0),
    "posterize": (8, 5, 2),
} | dict.fromkeys(ENHANCEMENTS, (0.1, 0.64, 1.0, 1.9))


def tinted_digits():
    """40 real digits, 32x32, each with two random colours, and special cases."""
    rng = np.random.default_rng(0)
    digits = load_digits().images[:40].repeat(4, axis=1).repeat(4, axis=2)[..., None]
    dark, light = rng.uniform(0, 256, (2, 40, 1, 1, 3))
    tinted = dark + (light - dark) * digits / 16 + rng.normal(0, 8, (40, 32, 32, 3))
    noise = rng.integers(0, 256, (5, 32, 32, 3))
    flat = np.full((1, 32, 32, 3), 77)
    return np.concatenate([tinted, noise, flat]).clip(0, 255).astype(np.uint8)


def small_photographs(shared):
    files = sorted((shared / "data" / "imagenet_sample").glob("*/*"))[:46]
    return np.stack(
        [Image.open(file).convert("RGB").resize((32, 32)) for file in files]
    )


@pytest.fixture(scope="module", params=["digits", "photographs"])
def images(request):
    if request.param == "digits":
        return tinted_digits()
    return small_photographs(request.getfixturevalue("shared"))


@pytest.mark.parametrize("name", policies.OPERATIONS)
def test_operations_are_pillows(name, images):
    for magnitude in MAGNITUDES.get(name, (0,)):
        ours = np.asarray(policies.operate(name, images, magnitude, MEAN))
        change = PILLOW[name](magnitude)
        theirs = np.stack([change(Image.fromarray(image)) for image in images])
        difference = np.abs(ours.astype(int) - theirs)
        assert difference.max() <= (name in INEXACT), magnitude
        assert (difference > 0).mean() < 0.01


def test_operations_are_pillows_where_the_sides_differ(images):
    images = images[:, :20]
    for name, magnitude in (("rotate", 20), ("shear_x", 0.3), ("translate_y", 8)):
        ours = policies.operate(name, images, magnitude, MEAN)
        change = PILLOW[name](magnitude)
        theirs = np.stack([change(Image.fromarray(image)) for image in images])
        np.testing.assert_array_equal(ours, theirs)


def levels(name, level):
    """Pillow's arguments, equally likely, for a level of AutoAugment's CIFAR code."""
    if name in ("rotate", "translate_x", "translate_y"):
        degrees_or_pixels = 3 * level if name == "rotate" else level
        return degrees_or_pixels, -degrees_or_pixels
    if name in ("shear_x", "shear_y"):
        return 0.03 * level, -0.03 * level
    if name == "solarize":
        return (256 - int(25.6 * level),)
    if name == "posterize":
        return (4 - int(0.4 * level),)
    return (0.1 + 0.18 * level,)


def randaugment_levels(name, magnitude):
    strength = magnitude / 30
    if name == "rotate":
        degrees = int(30 * strength)
        return degrees, -degrees
    if name in ("translate_x", "translate_y"):
        return int(10 * strength), -int(10 * strength)
    if name in ("shear_x", "shear_y"):
        return 0.3 * strength, -0.3 * strength
    if name == "solarize":
        return (256 - int(256 * strength),)
    if name == "posterize":
        return (8 - int(4 * strength),)
    return 1 + 0.9 * strength, 1 - 0.9 * strength


def outcomes(steps, image):
    """bytes -> probability. steps: for each, alternatives of (probability, change)."""
    found = {}
    for chosen in itertools.product(*steps):
        result, probability = Image.fromarray(image), 1.0
        for p, change in chosen:
            probability *= p
            result = change(result)
        key = np.asarray(result).tobytes()
        found[key] = found.get(key, 0) + probability
    return found


def compare(results, expected):
    """Nothing but what is expected, as often as expected (chi square)."""
    assert sum(expected.values()) == pytest.approx(1)
    counts = dict.fromkeys(expected, 0)
    for result in results:
        assert result.tobytes() in counts
        counts[result.tobytes()] += 1
    mean = {key: len(results) * p for key, p in expected.items()}
    often = [key for key in expected if mean[key] >= 5]
    chi_square = sum((counts[key] - mean[key]) ** 2 / mean[key] for key in often)
    assert len(often) > 20
    assert chi_square < len(often) + 4 * np.sqrt(2 * len(often))


def draws(policy, image, number, *options):
    keys = jax.random.split(jax.random.key(3), number)
    repeated = np.broadcast_to(image, (number, *image.shape))
    apply = jax.jit(lambda keys, images: policy(keys, images, MEAN, *options))
    return np.asarray(apply(keys, repeated))


def exact(name, magnitude):
    """Pillow's; ours where they may differ by a level, which others would amplify."""
    if name not in INEXACT:
        return PILLOW[name](magnitude)

    def change(image):
        ours = policies.operate(name, np.asarray(image)[None], magnitude)
        return Image.fromarray(np.asarray(ours[0]))

    return change


@pytest.fixture(scope="module")
def image():
    return tinted_digits()[3] // 2 + 40  # autocontrast has something to do


@pytest.mark.slow
def test_autoaugment_does_the_25_pairs_as_often_as_published(image):
    expected = {}
    for pair in policies.CIFAR10:
        steps = []
        for name, probability, level in pair:
            magnitudes = levels(name, level)
            share = probability / len(magnitudes)
            steps.append([(1 - probability, PILLOW["identity"](0))])
            steps[-1] += [(share, exact(name, m)) for m in magnitudes]
        for key, probability in outcomes(steps, image).items():
            expected[key] = expected.get(key, 0) + probability / 25
    compare(draws(policies.autoaugment, image, 4000), expected)


def test_randaugment_draws_each_operation_equally_often(image):
    magnitude = 20.0
    one = []
    for name in policies.RANDAUGMENT:
        magnitudes = randaugment_levels(name, magnitude)
        share = 1 / 14 / len(magnitudes)
        one += [(share, exact(name, m)) for m in magnitudes]
    results = draws(policies.randaugment, image, 4000, 2, magnitude)
    compare(results, outcomes([one, one], image))


def test_randaugment_without_magnitude_only_stretches_the_greys(image):
    greys = [exact(name, 0) for name in ("identity", "autocontrast", "equalize")]
    expected = {
        np.asarray(change(Image.fromarray(image))).tobytes() for change in greys
    }
    results = draws(policies.randaugment, image, 200, 1, 0.0)
    assert {result.tobytes() for result in results} == expected
    assert len(expected) == 3


def test_the_policy_is_the_published_one_in_numbers():
    assert len(policies.CIFAR10) == 25
    names = [name for pair in policies.CIFAR10 for name, *_ in pair]
    # Counted in the paper's table.
    assert names.count("equalize") == 9
    assert names.count("translate_y") == 5
    # All of it, as it was when compared with the table.
    assert zlib.crc32(repr(policies.CIFAR10).encode()) == 4019036970
    geometry = {f"{kind}_{axis}" for kind in ("shear", "translate") for axis in "xy"}
    others = {"identity", "autocontrast", "equalize", "rotate", "solarize", "color"}
    others |= {"posterize", "contrast", "brightness", "sharpness"}
    assert sorted(policies.RANDAUGMENT) == sorted(geometry | others)
