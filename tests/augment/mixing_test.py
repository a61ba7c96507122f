"""Mixed pixels and targets, and their distributions; pixels hold their coordinates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from augment import mixing

HEIGHT, WIDTH, CLASSES = 12, 16, 10
DRAWS = 1500


def coordinates(rows):
    """Returns one-hot targets and images of (batch row, y, x) for each pixel."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    images = [np.stack([np.full_like(y, r), y, x], axis=-1) for r in range(rows)]
    return np.float32(images), np.eye(rows, CLASSES, dtype=np.float32)


@functools.partial(jax.jit, static_argnums=0)
def mixed_for(mix, keys, x, targets, *options):
    return jax.vmap(lambda key: mix(key, x, targets, *options))(keys)


def many(mix, *options):
    """Mixes a batch DRAWS times: x (DRAWS, 4, H, W, 3), targets (DRAWS, 4, 10)."""
    keys = jax.random.split(jax.random.key(1), DRAWS)
    mixed = mixed_for(mix, keys, *coordinates(4), *options)
    return [np.asarray(part) for part in mixed]


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_blends_with_one_beta_share_per_batch(alpha):
    mixed, targets = many(mixing.mixup, alpha)
    share = targets[:, 0, 0]
    images, _ = coordinates(4)
    for row in range(4):
        lam = share[:, None, None, None]
        expected = lam * images[row] + (1 - lam) * images[row ^ 1]
        np.testing.assert_allclose(mixed[:, row], expected, atol=1e-5)
        np.testing.assert_allclose(targets[:, row, row], share, atol=1e-6)
        np.testing.assert_allclose(targets[:, row, row ^ 1], 1 - share, atol=1e-6)
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1)).
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(share.mean() - 0.5) < 4 * np.sqrt(variance / DRAWS)
    assert share.var() == pytest.approx(variance, rel=0.15)


def shares_as_published(alpha, rng):
    """Draws the partner's share of the pixels by the paper's formulas."""
    for _ in range(20_000):
        side = np.sqrt(1 - rng.beta(alpha, alpha))
        area = 1
        for size in (HEIGHT, WIDTH):
            length, centre = int(size * side), rng.integers(size)
            ends = np.clip([centre - length // 2, centre + length // 2], 0, size)
            area *= ends[1] - ends[0]
        yield area / (HEIGHT * WIDTH)


def test_cutmix_pastes_one_box_and_labels_count_its_pixels():
    mixed, targets = many(mixing.cutmix, 1.0, 1.0)
    images, _ = coordinates(4)
    for row in range(4):
        foreign = mixed[:, row, :, :, 0] == (row ^ 1)
        expected = np.where(foreign[..., None], images[row ^ 1], images[row])
        np.testing.assert_array_equal(mixed[:, row], expected)
        np.testing.assert_array_equal(foreign, mixed[:, 0, :, :, 0] == 1)  # one box
        share = foreign.mean(axis=(1, 2))
        np.testing.assert_allclose(targets[:, row, row ^ 1], share, atol=1e-6)
        np.testing.assert_allclose(targets[:, row, row], 1 - share, atol=1e-6)
    # A box: pixels in a foreign row and a foreign column are foreign.
    rows, columns = foreign.any(axis=2), foreign.any(axis=1)
    np.testing.assert_array_equal(rows[:, :, None] & columns[:, None], foreign)
    for line in (rows, columns):
        assert (np.abs(np.diff(line, axis=1)).sum(axis=1) <= 2).all()  # connected
    published = np.array([*shares_as_published(1.0, np.random.default_rng(0))])
    quantiles = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(
        np.quantile(share, quantiles), np.quantile(published, quantiles), atol=0.04
    )


def test_cutmix_cuts_with_the_given_probability():
    mixed, targets = many(mixing.cutmix, 5.0, 0.3)  # alpha=5: boxes are rarely empty
    cut = targets[:, 0, 0] < 1
    assert abs(cut.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / DRAWS)
    images, _ = coordinates(4)
    np.testing.assert_array_equal(
        mixed[~cut], np.broadcast_to(images, mixed[~cut].shape)
    )


def test_ricap_patches_four_crops_and_labels_count_their_pixels():
    mixed, targets = many(mixing.ricap, 0.8)
    np.testing.assert_allclose(targets.sum(axis=-1), 1, atol=1e-6)
    row = 2
    partner, y, x = np.moveaxis(mixed[:, row], -1, 0).astype(int)
    place = partner ^ row  # 0 to 3: upper left, upper right, lower left, lower right
    for k in range(4):
        share = (place == k).mean(axis=(1, 2))
        np.testing.assert_allclose(targets[:, row, row ^ k], share, atol=1e-6)
    for one in place:
        below, right = one[:, 0] // 2, one[0] % 2
        assert (np.diff(below) >= 0).all()
        assert (np.diff(right) >= 0).all()
        np.testing.assert_array_equal(one, 2 * below[:, None] + right)
    # Crops: neighbours in the patch are neighbours in the image.
    down, across = place[:, 1:] == place[:, :-1], place[:, :, 1:] == place[:, :, :-1]
    assert (np.diff(y, axis=1)[down] == 1).all()
    assert (np.diff(x, axis=2)[across] == 1).all()
    # The boundary is at a Beta share of the side, rounded to a pixel.
    height = (place[:, :, 0] < 2).sum(axis=1) / HEIGHT
    assert abs(height.mean() - 0.5) < 0.04
    assert height.var() == pytest.approx(1 / (4 * 2.6), rel=0.15)


def test_ricap_takes_crops_anywhere_in_their_images():
    mixed, _ = many(mixing.ricap, 5.0)
    upper_left = mixed[:, 0, 0, 0]  # of the first image itself
    height = (mixed[:, 0, :, 0, 0] < 2).sum(axis=1)
    free = HEIGHT - height  # positions 0..free
    relative = (upper_left[:, 1] + 0.5) / (free + 1)  # uniform in 0..1
    assert (upper_left[:, 1] <= free).all()
    assert abs(relative.mean() - 0.5) < 4 / np.sqrt(12 * DRAWS)
    lower_right = mixed[:, 0, -1, -1]
    assert (lower_right[:, 0] == 3).all()
    correlation = np.corrcoef(upper_left[:, 1], lower_right[:, 1])[0, 1]
    # A common position would make the two ends differ by a constant.
    assert abs(correlation) < 0.5


@pytest.mark.parametrize(
    ("mix", "options"),
    [(mixing.mixup, (1.0,)), (mixing.cutmix, (1.0, 0.5)), (mixing.ricap, (0.3,))],
)
def test_mixing_preserves_the_dtype(mix, options):
    x, targets = coordinates(4)
    mixed, targets = jax.eval_shape(
        lambda key, x: mix(key, x, targets, *options),
        jax.random.key(0),
        x.astype(jnp.bfloat16),
    )
    assert mixed.dtype == jnp.bfloat16
    assert targets.dtype == jnp.float32
