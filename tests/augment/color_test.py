"""Colour changes against restatements of their originals in NumPy."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from augment import color

KEYS = jax.random.split(jax.random.key(0), 64)


def noise(count=64, size=(6, 5)):
    return np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)


def jittered(image, order, alpha):
    """Computes fb.resnet.torch's ColorJitter on one image, in float64."""
    image = image.astype(np.float64)
    for kind in order:
        gray = image @ np.array([0.299, 0.587, 0.114])
        other = {0: 0.0, 1: gray.mean(), 2: gray[..., None]}[int(kind)]
        image = alpha[kind] * image + (1 - alpha[kind]) * other
    return image


def test_jitter_equals_the_original_and_does_not_clip():
    image = noise()
    ours = np.asarray(color.jitter(KEYS, jnp.asarray(image, jnp.float32), 0.4))
    orders, alphas = jax.vmap(lambda key: color.draw_jitter(key, 0.4))(KEYS)
    orders, alphas = np.asarray(orders), np.asarray(alphas)
    for i in range(len(image)):
        expected = jittered(image[i], orders[i], alphas[i])
        np.testing.assert_allclose(ours[i], expected, atol=1e-3)
    assert ours.max() > 255
    assert ours.min() < 0


def test_jitter_draws_each_order_equally_often_and_uniform_strengths():
    keys = jax.random.split(jax.random.key(1), 6000)
    orders, alphas = jax.vmap(lambda key: color.draw_jitter(key, 0.4))(keys)
    _, counts = np.unique(np.asarray(orders), axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.abs(counts - 1000).max() < 130  # 4.5 sigma
    for alpha in np.asarray(alphas).T:
        quartiles = np.quantile(alpha, [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(quartiles, [0.6, 0.8, 1, 1.2, 1.4], atol=0.03)
    assert np.abs(np.corrcoef(np.asarray(alphas).T) - np.eye(3)).max() < 0.06


@pytest.mark.parametrize("kind", range(3))
def test_each_jitter_preserves_its_invariant(kind):
    image = noise(1)[0].astype(np.float32)
    others = [i for i in range(3) if i != kind]
    alpha = jnp.ones(3).at[kind].set(0.7)
    ours = np.asarray(
        color.blend(jnp.asarray(image), jnp.array([kind, *others]), alpha)
    )
    gray, new = (x @ np.array(color.GRAY) for x in (image, ours))
    if kind == 0:  # brightness: everything in proportion
        np.testing.assert_allclose(ours, 0.7 * image, rtol=1e-5)
    if kind == 1:  # contrast: the mean stays, distances shrink
        np.testing.assert_allclose(new.mean(), gray.mean(), rtol=1e-5)
        np.testing.assert_allclose(new.std(), 0.7 * gray.std(), rtol=1e-5)
    if kind == 2:  # saturation: the grey image stays
        np.testing.assert_allclose(new, gray, rtol=1e-5)
        assert np.ptp(ours, axis=-1).max() < np.ptp(image, axis=-1).max()


def test_lighting_adds_one_colour_with_the_published_covariance():
    keys = jax.random.split(jax.random.key(2), 20_000)
    added = np.asarray(color.lighting(keys, jnp.zeros((20_000, 2, 1, 3)), 0.1))
    np.testing.assert_array_equal(added[:, 0], added[:, 1])  # the same for all pixels
    # fb.resnet.torch's numbers: a row for each channel, a column for each axis.
    vectors = [-0.5675, 0.7192, 0.4009, -0.5808, -0.0045, -0.8140]
    vectors = np.reshape([*vectors, -0.5836, -0.6948, 0.4203], (3, 3))
    axes = vectors * [0.2175, 0.0188, 0.0045]
    expected = (25.5**2) * axes @ axes.T
    measured = np.cov(added[:, 0, 0].T)
    np.testing.assert_allclose(measured, expected, atol=0.03 * expected.max())
    np.testing.assert_allclose(added.mean((0, 1, 2)), 0, atol=0.1)
    # The first axis is the brightness: all channels go the same way.
    assert np.corrcoef(added[:, 0, 0].T).min() > 0.8


def hls_by_definition(image, shift):
    """Computes 8-bit HLS from OpenCV's documentation, pixel by pixel, in float32."""
    result = np.empty_like(image)
    one = np.float32(1)
    for pixel in np.ndindex(image.shape[:-1]):
        r, g, b = image[pixel].astype(np.float32) * (one / 255)
        high, low = max(r, g, b), min(r, g, b)
        h, l, s = np.float32(0), (high + low) * (one / 2), np.float32(0)  # noqa: E741
        if high > low:
            s = (high - low) / ((high + low) if l < 0.5 else (2 - high - low))
            if high == r:
                h = 60 * (g - b) / (high - low)
            elif high == g:
                h = 60 * (b - r) / (high - low) + 120
            else:
                h = 60 * (r - g) / (high - low) + 240
        h = h + 360 if h < 0 else h
        whole = np.rint(np.array([h / 2, l * 255, s * 255]))
        h, l, s = np.clip(whole + shift, 0, (180, 255, 255))  # noqa: E741
        rgb = colorsys.hls_to_rgb(h / 180, l / 255, s / 255)
        result[pixel] = np.rint(np.array(rgb) * 255)
    return result


@pytest.mark.parametrize(
    "shift", [(0, 0, 0), (36, -50, 50), (-36, 50, -50), (17, 3, -8)]
)
def test_hls_follows_its_definition(shift):
    image = noise(8)
    image[0, 0, :3] = ((0, 0, 0), (255, 255, 255), (7, 7, 7))
    shift_all = jax.jit(jax.vmap(color.shift_hls, (0, None)))
    ours = np.asarray(shift_all(image, jnp.array(shift, float)))
    expected = hls_by_definition(image, shift)
    difference = np.abs(ours.astype(int) - expected)
    # A half may round to the other side, and one step of HLS is up to three of RGB.
    assert (difference > 0).mean() < 0.01
    assert difference.max() <= 3


def test_hue_is_clipped_and_does_not_wrap():
    magenta = np.array([[[255, 0, 128]]], np.uint8)  # hue 165 of 180
    shifted = np.asarray(color.shift_hls(magenta, jnp.array([36.0, 0, 0])))
    np.testing.assert_array_equal(shifted, [[[255, 1, 1]]])  # 180: red, not orange
    red = np.array([[[255, 0, 0]]], np.uint8)
    shifted = np.asarray(color.shift_hls(red, jnp.array([-36.0, 0, 0])))
    np.testing.assert_array_equal(shifted, [[[255, 1, 1]]])  # 8 bits: not quite red


def test_hls_draws_whole_numbers_once_per_image():
    flat = np.full((2000, 2, 2, 3), 128, np.uint8)
    keys = jax.random.split(jax.random.key(3), 2000)
    ours = np.asarray(color.hls(keys, jnp.asarray(flat), (0, 50, 0)))
    assert ours.dtype == np.uint8
    assert (ours == ours[:, :1, :1, :1]).all()  # grey stays grey, and pixels equal
    change = ours[:, 0, 0, 0].astype(int) - 128
    values, counts = np.unique(change, return_counts=True)
    # Truncation makes zero twice as likely as other values, and never gives the limit.
    assert (values.min(), values.max()) == (-49, 49)
    assert abs(counts[values == 0][0] - 40) < 30
    np.testing.assert_array_equal(
        color.hls(keys[:9], noise(9), (0.9, 0.9, 0.9)),
        color.hls(keys[:9], noise(9), (0, 0, 0)),
    )
