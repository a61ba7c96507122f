"""The augmentations of a batch, their strengths and their random streams."""

import jax
import numpy as np
import pytest

import augment
from configs import common


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


OPTIONS = common.base().augment.to_dict()
NORMALIZATION = dict(mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7))
COLOUR = dict(hls=(36.0, 50.0, 50.0), jitter=0.4, lighting=0.1)
DEVICES = 2
SLOW = pytest.mark.slow


def run(images, labels, key, first_row=0, **options):
    return augment.augment(
        images,
        labels,
        options=OPTIONS | options,
        normalization=NORMALIZATION,
        num_classes=10,
        key=key,
        first_row=first_row,
    )


def test_without_augmentation_images_are_only_normalised():
    images, labels = random_images(4, 8, 8, 3), np.arange(4)
    x, targets = run(images, labels, jax.random.key(0))
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
        pytest.param(dict(jigsaw=True, ricap=0.3), marks=SLOW, id="jigsaw"),
    ],
)
def test_the_number_of_devices_does_not_matter(options):
    images, labels, key = random_images(8, 16, 16, 3), np.arange(8), jax.random.key(5)

    def share(images, labels):
        first_row = jax.lax.axis_index("data") * len(images)
        return run(images, labels, key, first_row, **options)

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


@SLOW
def test_strengths_follow_the_configuration():
    images, labels, key = random_images(4, 16, 16, 3), np.arange(4), jax.random.key(3)
    plain = augment.normalize(images, **NORMALIZATION)

    def change(**options):
        step = jax.jit(lambda images: run(images, labels, key, **options)[0])
        return np.abs(step(images) - plain)

    for weak, strong in (
        (dict(jitter=0.01), dict(jitter=0.4)),
        (dict(lighting=0.01), dict(lighting=0.4)),
        (dict(hls=(1.0, 1.0, 1.0)), dict(hls=(36.0, 50.0, 50.0))),
    ):
        assert 0 < 5 * change(**weak).mean() < change(**strong).mean()
    assert change(cutmix=1.0, cutmix_probability=0.0).max() == 0
    assert change(cutmix=1.0, cutmix_probability=1.0).max() > 0


def test_each_image_of_each_step_is_changed_differently():
    images = np.repeat(random_images(1, 16, 16, 3), 6, axis=0)
    options = dict(jigsaw=True, cutout=8) | COLOUR
    step = jax.jit(lambda key: run(images, images, key, **options)[0])
    one, again, other = (step(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    distinct = {np.asarray(x).tobytes() for x in (*one, *other)}
    assert len(distinct) == 12


def test_enabling_an_augmentation_does_not_change_the_others():
    images, labels, key = random_images(4, 16, 16, 3), np.arange(4), jax.random.key(2)
    step = jax.jit(
        lambda key: [
            run(images, labels, key, jigsaw=True, cutout=size)[0] for size in (0, 6)
        ]
    )
    without, x = step(key)
    uncut = np.asarray(x != 0)
    assert (~uncut).all(axis=-1).any(axis=(1, 2)).all()
    np.testing.assert_array_equal(x[uncut], without[uncut])
