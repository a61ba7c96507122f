"""Operations against Pillow, and policies against all their possible outcomes."""

import collections
import itertools

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from augment import policies
from data_sources import digits

MEAN = (125.3, 123.0, 113.9)
FILL = (125, 123, 114)


def affine(*matrix):
    return lambda image: image.transform(
        image.size, Image.AFFINE, matrix, fillcolor=FILL
    )


# Pillow's calls: name -> magnitude -> image -> image.
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
# Pillow's floats may fall just short of a whole number.
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
    """Returns 40 digits in two random colours, five noise images and a flat one."""
    rng = np.random.default_rng(0)
    with np.load(digits.FILE) as file:
        small = file["images"][:40]
    large = small.repeat(4, axis=1).repeat(4, axis=2)[..., None]
    dark, light = rng.uniform(0, 256, (2, 40, 1, 1, 3))
    tinted = dark + (light - dark) * large / 16 + rng.normal(0, 8, (40, 32, 32, 3))
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


def operate(name, images, magnitude, mean=MEAN):
    """Applies one operation to all images."""
    chosen = np.zeros((len(images), 1), int)
    return np.asarray(policies.apply([(name, magnitude)], chosen, images, mean))


@pytest.mark.parametrize("name", policies.OPERATIONS)
def test_operations_equal_pillows(name, images):
    for magnitude in MAGNITUDES.get(name, (0,)):
        ours = operate(name, images, magnitude)
        change = PILLOW[name](magnitude)
        theirs = np.stack([change(Image.fromarray(image)) for image in images])
        difference = np.abs(ours.astype(int) - theirs)
        assert difference.max() <= (name in INEXACT), magnitude
        assert (difference > 0).mean() < 0.01


def test_operations_equal_pillows_on_images_that_are_not_square(images):
    images = images[:, :20]
    for name, magnitude in (("rotate", 20), ("shear_x", 0.3), ("translate_y", 8)):
        ours = operate(name, images, magnitude)
        change = PILLOW[name](magnitude)
        theirs = np.stack([change(Image.fromarray(image)) for image in images])
        np.testing.assert_array_equal(ours, theirs)


def levels(name, level):
    """Returns Pillow's equally likely arguments for a level of AutoAugment's code."""
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
    """Returns bytes -> probability; steps: alternatives (probability, change)."""
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
    """Asserts that only expected results occur, as often as expected (chi square)."""
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
    """Applies Pillow's operation, or ours where a second one would amplify errors."""
    if name not in INEXACT:
        return PILLOW[name](magnitude)

    def change(image):
        ours = operate(name, np.asarray(image)[None], magnitude)
        return Image.fromarray(ours[0])

    return change


@pytest.fixture(scope="module")
def image():
    return tinted_digits()[3] // 2 + 40  # autocontrast has something to do


@pytest.mark.slow
def test_autoaugment_applies_the_25_pairs_as_often_as_published(image):
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


@pytest.mark.slow
def test_randaugment_draws_each_operation_equally_often(image):
    magnitude = 20.0
    one = []
    for name in policies.RANDAUGMENT:
        magnitudes = randaugment_levels(name, magnitude)
        share = 1 / 14 / len(magnitudes)
        one += [(share, exact(name, m)) for m in magnitudes]
    results = draws(policies.randaugment, image, 4000, 2, magnitude)
    compare(results, outcomes([one, one], image))


def test_randaugment_of_magnitude_0_only_stretches_the_greys(image):
    greys = [exact(name, 0) for name in ("identity", "autocontrast", "equalize")]
    expected = {
        np.asarray(change(Image.fromarray(image))).tobytes() for change in greys
    }
    results = draws(policies.randaugment, image, 200, 1, 0.0)
    assert {result.tobytes() for result in results} == expected
    assert len(expected) == 3


def test_the_policy_has_the_published_pairs():
    operations = [operation for pair in policies.CIFAR10 for operation in pair]
    assert len(policies.CIFAR10) == 25
    # Counted in the paper's table (appendix A).
    assert collections.Counter(name for name, *_ in operations) == {
        "equalize": 9,
        "autocontrast": 7,
        "color": 5,
        "sharpness": 5,
        "translate_y": 5,
        "brightness": 4,
        "solarize": 4,
        "invert": 3,
        "contrast": 2,
        "shear_y": 2,
        "translate_x": 2,
        "posterize": 1,
        "rotate": 1,
    }
    assert all(p in np.arange(10) / 10 for _, p, _ in operations)
    assert all(level in range(10) for *_, level in operations)
    # Section 4.1: invert is almost never applied, and the best policies are colours.
    assert max(p for name, p, _ in operations if name == "invert") == 0.1


def test_randaugment_has_the_published_operations():
    geometry = {f"{kind}_{axis}" for kind in ("shear", "translate") for axis in "xy"}
    others = {"identity", "autocontrast", "equalize", "rotate", "solarize", "color"}
    others |= {"posterize", "contrast", "brightness", "sharpness"}
    assert sorted(policies.RANDAUGMENT) == sorted(geometry | others)
