"""Geometric transformations against restatements in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from augment import geometry


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_crop_and_flip_takes_the_given_window_and_mirrors_it():
    rng = np.random.default_rng(1)
    images = random_images(6, 9, 11, 3)
    index = rng.integers(0, 6, 50).astype(np.int32)
    offset = rng.integers(0, (6, 7), (50, 2)).astype(np.int32)
    offset[:2] = (0, 0), (5, 6)  # both far corners
    flip = rng.random(50) < 0.5
    crop_and_flip = jax.jit(geometry.crop_and_flip, static_argnums=4)
    result = np.asarray(crop_and_flip(images, index, offset, flip, (4, 5)))
    for crop, i, (y, x), mirrored in zip(result, index, offset, flip, strict=True):
        expected = images[i, y : y + 4, x : x + 5]
        np.testing.assert_array_equal(crop, expected[:, ::-1] if mirrored else expected)
    assert result.dtype == np.uint8


def test_normalize_is_per_channel_on_the_scale_0_to_255():
    image = np.array([[[0, 128, 255], [255, 0, 1]]], np.uint8)
    result = geometry.normalize(image, (10.0, 128.0, 255.0), (2.0, 4.0, 8.0))
    np.testing.assert_array_equal(
        result, np.float32([[[-5, 0, 0], [122.5, -32, -31.75]]])
    )


def test_normalize_rounds_to_bfloat16_only_at_the_end():
    image = np.arange(256, dtype=np.uint8).reshape(1, 256, 1)
    mean, std = (125.3,), (63.0,)
    result = geometry.normalize(image, mean, std, jnp.bfloat16)
    exact = (image.astype(np.float64) - mean[0]) / std[0]
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(result, np.float64), exact, rtol=2.0**-8, atol=1e-6
    )


def positions(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x], axis=-1)


def test_jigsaw_shifts_two_of_three_images_along_one_axis():
    number, size = 6000, 32
    keys = jax.random.split(jax.random.key(0), number)
    images = np.broadcast_to(positions(size, size), (number, size, size, 2))
    result = np.asarray(jax.jit(geometry.jigsaw)(keys, images))
    shift = result[:, 0, 0]  # the pixel that moved to the upper left corner
    assert (result == (images + shift[:, None, None]) % size).all()
    unshifted, rows, columns = (
        (shift == 0).all(axis=1),
        shift[:, 0] > 0,
        shift[:, 1] > 0,
    )
    assert not (rows & columns).any()
    # GUNN's 35.4 % = 1/3 + 2/3 / 32; the standard deviation is 0.6 %.
    assert abs(unshifted.mean() - (1 / 3 + 2 / 3 / 32)) < 0.02
    assert abs(rows.mean() - 31 / 96) < 0.02
    counts = np.bincount(shift[columns, 1], minlength=size)[1:]
    mean = number / 96
    assert counts.min() > mean - 4.5 * np.sqrt(mean)
    assert counts.max() < mean + 4.5 * np.sqrt(mean)


def test_jigsaw_shifts_by_up_to_the_length_of_the_axis():
    keys = jax.random.split(jax.random.key(0), 300)
    images = np.broadcast_to(positions(4, 7), (300, 4, 7, 2))
    shift = np.asarray(jax.jit(geometry.jigsaw)(keys, images))[:, 0, 0]
    assert {*shift[:, 0]} == {*range(4)}
    assert {*shift[:, 1]} == {*range(7)}


@pytest.mark.parametrize("size", [4, 5])
def test_cutout_zeroes_a_square_with_its_centre_anywhere(size):
    number, height, width = 3000, 9, 12
    keys = jax.random.split(jax.random.key(0), number)
    images = np.ones((number, height, width, 3), np.float32)
    cut = np.asarray(jax.jit(geometry.cutout, static_argnums=2)(keys, images, size))
    assert {*np.unique(cut)} == {0, 1}
    rows = (cut == 0).all(axis=-1).any(axis=2)
    columns = (cut == 0).all(axis=-1).any(axis=1)
    np.testing.assert_array_equal(cut[..., 0] == 0, rows[:, :, None] & columns[:, None])
    for line, length in ((rows, height), (columns, width)):
        # The intervals around the equally likely centres 0..length - 1.
        spans = [
            tuple(
                max(c - size // 2, 0) <= i < c - size // 2 + size for i in range(length)
            )
            for c in range(length)
        ]
        found = [tuple(map(bool, x)) for x in line]
        for span in set(spans):
            share = spans.count(span) / length
            assert abs(found.count(span) / number - share) < 4.5 * np.sqrt(
                share * (1 - share) / number
            )
        assert {*found} == {*spans}
