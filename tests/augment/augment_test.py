"""Borders, crops and what follows them in the step, each against a restatement."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import augment
from configs import common


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


OPTIONS = common.base().augment
NORMALIZATION = dict(mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7))
COLOUR = dict(hls=(36.0, 50.0, 50.0), jitter=0.4, lighting=0.1)
ALL_OF_AN_IMAGE = dict(jigsaw=True, randaugment_ops=2, cutout=8) | COLOUR
DEVICES = 2
SLOW = pytest.mark.slow  # they compile for 10 s


def augmented(images, labels, key, first_row=0, **options):
    return augment.augmented(
        images,
        labels,
        options=OPTIONS.to_dict() | options,
        normalization=NORMALIZATION,
        num_classes=10,
        key=key,
        first_row=first_row,
    )


def test_nothing_chosen_is_normalisation_alone():
    images, labels = random_images(4, 8, 8, 3), np.arange(4)
    x, targets = augmented(images, labels, jax.random.key(0))
    np.testing.assert_array_equal(x, augment.normalize(images, **NORMALIZATION))
    assert targets is labels


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(cutout=8, mixup=1.0) | COLOUR, marks=SLOW, id="colour"),
        pytest.param(
            dict(autoaugment=True, cutmix=1.0, cutmix_probability=1.0),
            marks=SLOW,
            id="autoaugment",
        ),
        pytest.param(dict(jigsaw=True, ricap=0.3), id="jigsaw"),
    ],
)
def test_the_number_of_devices_does_not_matter(options):
    images, labels, key = random_images(8, 16, 16, 3), np.arange(8), jax.random.key(5)

    def share(images, labels):
        first_row = jax.lax.axis_index("data") * len(images)
        return augmented(images, labels, key, first_row, **options)

    results = []
    for count in (1, DEVICES):
        mesh = jax.make_mesh(
            (count,),
            ("data",),
            devices=jax.devices()[:count],
            axis_types=(jax.sharding.AxisType.Auto,),
        )
        spec = jax.sharding.PartitionSpec("data")
        step = jax.shard_map(
            share, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        results.append(jax.jit(step)(images, labels))
    (x, targets), (x_of_two, targets_of_two) = results
    # The mean grey of jitter is a sum, whose order the compiler chooses.
    np.testing.assert_allclose(x, x_of_two, atol=1e-6 if "jitter" in options else 0)
    np.testing.assert_array_equal(targets, targets_of_two)
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
    assert (x != augment.normalize(images, **NORMALIZATION)).any(axis=(1, 2, 3)).all()


def test_strengths_are_those_of_the_configuration():
    images, labels, key = random_images(4, 16, 16, 3), np.arange(4), jax.random.key(3)
    plain = augment.normalize(images, **NORMALIZATION)

    def change(**options):
        step = jax.jit(lambda images: augmented(images, labels, key, **options)[0])
        return np.abs(step(images) - plain)

    for weak, strong in (
        (dict(jitter=0.01), dict(jitter=0.4)),
        (dict(lighting=0.01), dict(lighting=0.4)),
        (dict(hls=(1.0, 1.0, 1.0)), dict(hls=(36.0, 50.0, 50.0))),
    ):
        assert 0 < 5 * change(**weak).mean() < change(**strong).mean()
    assert change(cutmix=1.0, cutmix_probability=0.0).max() == 0
    assert change(cutmix=1.0, cutmix_probability=1.0).max() > 0


def test_images_of_a_batch_are_changed_each_in_its_own_way_and_anew_every_step():
    images = np.repeat(random_images(1, 16, 16, 3), 6, axis=0)
    options = dict(jigsaw=True, cutout=8) | COLOUR
    step = jax.jit(lambda key: augmented(images, images, key, **options)[0])
    one, again, other = (step(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    distinct = {np.asarray(x).tobytes() for x in (*one, *other)}
    assert len(distinct) == 12


def test_one_augmentation_more_leaves_the_others_as_they_were():
    images, labels, key = random_images(4, 16, 16, 3), np.arange(4), jax.random.key(2)
    step = jax.jit(
        lambda key: [
            augmented(images, labels, key, jigsaw=True, cutout=size)[0]
            for size in (0, 6)
        ]
    )
    without, x = step(key)
    kept = np.asarray(x != 0)
    assert (~kept).all(axis=-1).any(axis=(1, 2)).all()
    np.testing.assert_array_equal(x[kept], without[kept])


def positions(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x], axis=-1)


def test_jigsaw_shifts_two_of_three_images_along_one_axis():
    number, size = 6000, 32
    keys = jax.random.split(jax.random.key(0), number)
    images = np.broadcast_to(positions(size, size), (number, size, size, 2))
    result = np.asarray(jax.jit(augment.jigsaw)(keys, images))
    shift = result[:, 0, 0]  # what moved to the upper left corner
    assert (result == (images + shift[:, None, None]) % size).all()
    unshifted, rows, columns = (
        (shift == 0).all(axis=1),
        shift[:, 0] > 0,
        shift[:, 1] > 0,
    )
    assert not (rows & columns).any()
    # The specification's 35.4 % = 1/3 + 2/3 / 32; a standard deviation is 0.6 %.
    assert abs(unshifted.mean() - (1 / 3 + 2 / 3 / 32)) < 0.02
    assert abs(rows.mean() - 31 / 96) < 0.02
    counts = np.bincount(shift[columns, 1], minlength=size)[1:]
    mean = number / 96
    assert counts.min() > mean - 4.5 * np.sqrt(mean)
    assert counts.max() < mean + 4.5 * np.sqrt(mean)


def test_jigsaw_shifts_by_up_to_the_axis_own_length():
    keys = jax.random.split(jax.random.key(0), 300)
    images = np.broadcast_to(positions(4, 7), (300, 4, 7, 2))
    shift = np.asarray(jax.jit(augment.jigsaw)(keys, images))[:, 0, 0]
    assert {*shift[:, 0]} == {*range(4)}
    assert {*shift[:, 1]} == {*range(7)}


@pytest.mark.parametrize("size", [4, 5])
def test_cutout_zeroes_a_square_with_its_centre_anywhere(size):
    number, height, width = 3000, 9, 12
    keys = jax.random.split(jax.random.key(0), number)
    images = np.ones((number, height, width, 3), np.float32)
    cut = np.asarray(jax.jit(augment.cutout, static_argnums=2)(keys, images, size))
    assert {*np.unique(cut)} == {0, 1}
    rows = (cut == 0).all(axis=-1).any(axis=2)
    columns = (cut == 0).all(axis=-1).any(axis=1)
    np.testing.assert_array_equal(cut[..., 0] == 0, rows[:, :, None] & columns[:, None])
    for line, length in ((rows, height), (columns, width)):
        # The centres 0..length - 1, equally likely, each with the interval it leaves.
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


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(mixup=1.0, ricap=0.3), "one of mixup, ricap"),
        (dict(autoaugment=True, randaugment_ops=2), "one of autoaugment"),
        (dict(cutout=-1), "cutout=-1 is not a number from 0 on"),
        (dict(hls=(36.0, -1.0, 50.0)), "hls=.* is not a number"),
        (dict(mixup=float("nan")), "mixup=nan is not a number"),
        (dict(jitter=1.5), "jitter=1.5 is more than 1"),
        (dict(hls=(36.0,)), "hue, lightness, saturation"),
        (dict(randaugment_magnitude=31.0), "31.0 is more than 30"),
        (dict(cutmix_probability=1.5), "1.5 is more than 1"),
        (dict(mixup=1.0), "groups of 2, .* the 7 images .*last_batch=fill"),
        (dict(ricap=0.3), "groups of 4, .* the 7 images"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        augment.check(OPTIONS.to_dict() | options, 7)


def test_what_can_be_carried_out_is_not_refused():
    augment.check(OPTIONS, 7)  # nothing is mixed
    augment.check(OPTIONS.to_dict() | ALL_OF_AN_IMAGE | dict(ricap=0.3), 8)
