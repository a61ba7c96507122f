"""Borders, and the crop of tf.data, each against a restatement."""

import fractions

import numpy as np
import pytest

from data_sources import borders
from data_sources import tf as tf_batches


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def mean_border_by_hand(image, pad):
    """Computes cfmz's border in exact arithmetic, pixel by pixel."""

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


def test_mean_border_equals_that_of_cfmz(shared):
    with np.load(shared / "golden" / "cfmz" / "cfmz_pad40.npz") as golden:
        images, padded = (
            golden[name].transpose(0, 2, 3, 1) for name in ("input", "padded")
        )
    np.testing.assert_array_equal(borders.pad_images(images, 4, "mean"), padded)


@pytest.mark.parametrize("shape", [(6, 8, 3), (5, 4, 1), (2, 2, 3)])
def test_mean_border_is_rows_then_columns_in_bytes(shape):
    images = random_images(30, *shape)  # 2 x 2: every other mean is a tie
    for image, padded in zip(
        images, borders.pad_images(images, 3, "mean"), strict=True
    ):
        np.testing.assert_array_equal(padded, mean_border_by_hand(image, 3))


def test_mean_border_does_not_depend_on_the_other_images():
    images = random_images(1203, 4, 4, 3)  # more than the pieces inside
    padded = borders.pad_images(images, 2, "mean")
    np.testing.assert_array_equal(
        padded[1001:], borders.pad_images(images[1001:], 2, "mean")
    )


def test_zero_border_is_black_around_the_unchanged_image():
    images = random_images(5, 6, 8, 3)
    padded = borders.pad_images(images, 2, "zero")
    np.testing.assert_array_equal(padded[:, 2:-2, 2:-2], images)
    assert padded.sum(dtype=np.int64) == images.sum(dtype=np.int64)


@pytest.mark.parametrize(
    ("border", "expected"),
    [("dataset_mean", (125, 123, 114)), ("white", (255, 255, 255))],
)
def test_uniform_border_is_around_the_unchanged_image(border, expected):
    images = random_images(2, 5, 6, 3)
    padded = borders.pad_images(images, 2, border, mean=(125.3, 123.0, 113.9))
    np.testing.assert_array_equal(padded[:, 2:-2, 2:-2], images)
    inside = np.zeros(padded.shape[:3], bool)
    inside[:, 2:-2, 2:-2] = True
    assert (padded[~inside] == expected).all()


def test_reflected_border_mirrors_about_the_edge_pixels():
    images = random_images(2, 5, 6, 3)
    padded = borders.pad_images(images, 2, "reflect")
    np.testing.assert_array_equal(padded[:, 0, 2:-2], images[:, 2])
    np.testing.assert_array_equal(padded[:, 2:-2, -1], images[:, :, -3])


@pytest.mark.parametrize("border", borders.BORDERS)
def test_no_padding_changes_nothing(border):
    images = random_images(3, 5, 5, 3)
    np.testing.assert_array_equal(borders.pad_images(images, 0, border), images)


def test_unknown_border_is_rejected_with_the_choices():
    with pytest.raises(ValueError, match=r"'wide'.*zero, mean"):
        borders.pad_images(random_images(1, 4, 4, 3), 1, "wide")


def test_crop_and_flip_takes_the_given_window_and_mirrors_it():
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(1)
    images = random_images(6, 9, 11, 3)
    index = rng.integers(0, 6, 50).astype(np.int32)
    offset = rng.integers(0, (6, 7), (50, 2)).astype(np.int32)
    offset[:2] = (0, 0), (5, 6)  # both far corners
    flip = rng.random(50) < 0.5
    tensors = map(tf.constant, (images, index, offset, flip))
    result = np.asarray(tf_batches.crop_and_flip(*tensors, (4, 5)))
    for crop, i, (y, x), mirrored in zip(result, index, offset, flip, strict=True):
        expected = images[i, y : y + 4, x : x + 5]
        np.testing.assert_array_equal(crop, expected[:, ::-1] if mirrored else expected)
    assert result.dtype == np.uint8
