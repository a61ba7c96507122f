"""Borders, crops and normalisation, each against a plain restatement."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import augment


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def mean_border_by_hand(image, pad):
    """The rule of cfmz in exact arithmetic, one pixel after the other."""

    def mean(values):
        return round(
            fractions.Fraction(sum(map(int, values)), len(values))
        )  # half even

    height, width, channels = image.shape
    result = np.zeros((height + 2 * pad, width + 2 * pad, channels), np.uint8)
    result[pad : pad + height, pad : pad + width] = image
    outside_rows = [*range(pad), *range(pad + height, height + 2 * pad)]
    for channel in range(channels):
        for x in range(width):
            result[outside_rows, pad + x, channel] = mean(image[:, x, channel])
        for y in range(height + 2 * pad):
            inner = mean(result[y, pad : pad + width, channel])
            result[y, :pad, channel] = result[y, pad + width :, channel] = inner
    return result


def test_mean_border_is_that_of_cfmz(shared):
    with np.load(shared / "golden" / "cfmz" / "cfmz_pad40.npz") as golden:
        images, padded = (
            golden[name].transpose(0, 2, 3, 1) for name in ("input", "padded")
        )
    np.testing.assert_array_equal(augment.pad(images, 4, "mean"), padded)


@pytest.mark.parametrize("shape", [(6, 8, 3), (5, 4, 1), (2, 2, 3)])
def test_mean_border_is_rows_then_columns_in_bytes(shape):
    images = random_images(30, *shape)  # 2 x 2: every other mean is a tie
    for image, padded in zip(images, augment.pad(images, 3, "mean"), strict=True):
        np.testing.assert_array_equal(padded, mean_border_by_hand(image, 3))


def test_mean_border_does_not_depend_on_the_other_images():
    images = random_images(1203, 4, 4, 3)  # more than one of the parts inside
    padded = augment.pad(images, 2, "mean")
    np.testing.assert_array_equal(padded[1001:], augment.pad(images[1001:], 2, "mean"))


def test_zero_border_is_black_around_the_unchanged_image():
    images = random_images(5, 6, 8, 3)
    padded = augment.pad(images, 2, "zero")
    np.testing.assert_array_equal(padded[:, 2:-2, 2:-2], images)
    assert padded.sum(dtype=np.int64) == images.sum(dtype=np.int64)


@pytest.mark.parametrize(
    ("border", "expected"),
    [("dataset_mean", (125, 123, 114)), ("white", (255, 255, 255))],
)
def test_border_of_one_colour_is_around_the_unchanged_image(border, expected):
    images = random_images(2, 5, 6, 3)
    padded = augment.pad(images, 2, border, mean=(125.3, 123.0, 113.9))
    np.testing.assert_array_equal(padded[:, 2:-2, 2:-2], images)
    inside = np.zeros(padded.shape[:3], bool)
    inside[:, 2:-2, 2:-2] = True
    assert (padded[~inside] == expected).all()


def test_reflected_border_mirrors_about_the_edge_pixels():
    images = random_images(2, 5, 6, 3)
    padded = augment.pad(images, 2, "reflect")
    np.testing.assert_array_equal(padded[:, 0, 2:-2], images[:, 2])
    np.testing.assert_array_equal(padded[:, 2:-2, -1], images[:, :, -3])


@pytest.mark.parametrize("border", augment.BORDERS)
def test_no_padding_changes_nothing(border):
    images = random_images(3, 5, 5, 3)
    np.testing.assert_array_equal(augment.pad(images, 0, border), images)


def test_unknown_border_is_answered_with_the_choices():
    with pytest.raises(ValueError, match=r"'wide'.*zero, mean"):
        augment.pad(random_images(1, 4, 4, 3), 1, "wide")


def in_tensorflow(images, *rest):
    tf = pytest.importorskip("tensorflow")
    return augment.crop_and_flip_tf(
        tf.constant(images), *map(tf.constant, rest), (4, 5)
    )


def in_jax(*arguments):
    return jax.jit(augment.crop_and_flip, static_argnums=4)(*arguments, (4, 5))


@pytest.mark.parametrize("crop_and_flip", [in_jax, in_tensorflow])
def test_crop_and_flip_take_the_named_window_and_mirror_it(crop_and_flip):
    rng = np.random.default_rng(1)
    images = random_images(6, 9, 11, 3)
    index = rng.integers(0, 6, 50).astype(np.int32)
    offset = rng.integers(0, (6, 7), (50, 2)).astype(np.int32)
    offset[:2] = (0, 0), (5, 6)  # both far corners
    flip = rng.random(50) < 0.5
    result = np.asarray(crop_and_flip(images, index, offset, flip))
    for crop, i, (y, x), mirrored in zip(result, index, offset, flip, strict=True):
        expected = images[i, y : y + 4, x : x + 5]
        np.testing.assert_array_equal(crop, expected[:, ::-1] if mirrored else expected)
    assert result.dtype == np.uint8


def test_normalize_is_per_channel_on_the_scale_of_bytes():
    image = np.array([[[0, 128, 255], [255, 0, 1]]], np.uint8)
    result = augment.normalize(image, (10.0, 128.0, 255.0), (2.0, 4.0, 8.0))
    np.testing.assert_array_equal(
        result, np.float32([[[-5, 0, 0], [122.5, -32, -31.75]]])
    )


def test_normalize_rounds_to_bfloat16_only_at_the_end():
    image = np.arange(256, dtype=np.uint8).reshape(1, 256, 1)
    mean, std = (125.3,), (63.0,)
    result = augment.normalize(image, mean, std, jnp.bfloat16)
    exact = (image.astype(np.float64) - mean[0]) / std[0]
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(result, np.float64), exact, rtol=2.0**-8, atol=1e-6
    )
