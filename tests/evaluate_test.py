"""Every test example counts once, for any batch size and number of devices."""

import io
import itertools

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import evaluate
import input_pipeline
import nets
from configs import xdensenet
from data_sources import InMemory, OnDisk, crops
from runtime.devices import make_mesh

COUNT, CLASSES = 37, 10
NORMALIZATION = dict(mean=(120.0,) * 3, std=(60.0,) * 3, dtype=np.dtype("float32"))


@pytest.fixture(scope="module")
def examples():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (COUNT, 8, 8, 3), np.uint8)
    labels = random.integers(0, CLASSES, COUNT).astype(np.int32)
    return InMemory(images, labels, tuple(map(str, range(CLASSES))))


@pytest.fixture(scope="module")
def net():
    config = xdensenet.get_config("22-8-2,digits").net
    config.update(depth=10, growth=4)
    return nets.split(nets.create(config, nnx.Rngs(0)))


@pytest.fixture(scope="module")
def wanted(net, examples):
    """Computes the metrics from all logits at once, in numpy float64."""
    definition, variables = net
    x = (examples.images.astype(np.float32) - 120) / 60
    logits = np.asarray(jax.jit(definition.apply)(variables, x)[0], np.float64)
    own = logits[np.arange(COUNT), examples.labels]
    loss = np.log(np.exp(logits).sum(-1)) - own
    above = (logits > own[:, None]).sum(-1)
    accuracy, top5 = (above < 1).mean(), (above < 5).mean()
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    np.add.at(confusion, (examples.labels, logits.argmax(-1)), 1)
    means = dict(test_loss=loss.mean(), test_accuracy=accuracy, test_top5=top5)
    return means, confusion


def evaluated(net, examples, batch_size, devices, spoil=False):
    definition, variables = net
    mesh = make_mesh(jax.devices()[:devices])
    config = xdensenet.get_config("22-8-2,digits")
    size = evaluate.padded_batch_size(batch_size, mesh.size)
    batches = input_pipeline.batches(config, "test", examples=examples, batch_size=size)
    if spoil:
        batches = map(spoiled, batches)
    counted = []

    def count(step):
        def counting(variables, totals, batch):
            counted.append(int(batch["mask"].sum()))
            return step(variables, totals, batch)

        return counting

    eval_step = evaluate.make_eval_step(definition, mesh, NORMALIZATION)
    means, confusion = evaluate.evaluate(
        count(eval_step), variables, batches, mesh, CLASSES
    )
    assert sum(counted) == COUNT
    return means, confusion


def expected_means(net, views, labels):
    """Returns the means for the averaged logits of views (N, views, H, W, 3)."""
    definition, variables = net
    x = (views.reshape(-1, *views.shape[2:]).astype(np.float32) - 120) / 60
    logits = np.asarray(jax.jit(definition.apply)(variables, x)[0], np.float64)
    logits = logits.reshape(*views.shape[:2], -1).mean(1)
    own = logits[np.arange(len(labels)), labels]
    loss = np.log(np.exp(logits).sum(-1)) - own
    return loss.mean(), (logits.argmax(-1) == labels).mean()


def test_the_logits_of_an_image_and_its_mirror_image_are_averaged(net, examples):
    images = examples.images
    views = np.stack([images, images[:, :, ::-1]], axis=1)
    config, mesh = xdensenet.get_config("22-8-2,digits"), make_mesh(jax.devices()[:2])
    config.eval.batch_size = 16
    definition, variables = net
    evaluator = evaluate.make_evaluator(
        config, definition, NORMALIZATION, mesh, examples, variables, "flip"
    )
    means, confusion = evaluator(variables)
    loss, accuracy = expected_means(net, views, examples.labels)
    assert means["test_loss"] == pytest.approx(loss, rel=1e-6)
    assert means["test_accuracy"] == pytest.approx(accuracy, abs=1e-7)
    assert confusion.sum() == COUNT


def test_the_logits_of_ten_crops_are_averaged(net, examples):
    def png(i):
        file = io.BytesIO()
        large = np.random.default_rng(i).integers(0, 256, (13, 17, 3), np.uint8)
        Image.fromarray(large).save(file, "PNG")
        return file.getvalue()

    options = dict(crop="random_resized", size=8)
    access = examples.labels, examples.class_names, png, str, str
    split = OnDisk(*access, **options, on_error="raise", as_stored=False)
    views = np.stack([crops.ten_crops(png(i), **options) for i in range(COUNT)])
    config, mesh = xdensenet.get_config("22-8-2,digits"), make_mesh(jax.devices()[:2])
    definition, variables = net
    evaluator = evaluate.make_evaluator(
        config, definition, NORMALIZATION, mesh, split, variables, "tencrop"
    )
    means, confusion = evaluator(variables)
    loss, accuracy = expected_means(net, views, examples.labels)
    assert means["test_loss"] == pytest.approx(loss, rel=1e-6)
    assert means["test_accuracy"] == pytest.approx(accuracy, abs=1e-7)
    assert confusion.sum() == COUNT


def spoiled(batch):
    """Masked rows hold NaN images and labels without a class."""
    absent = batch["mask"] == 0
    image = np.where(absent[:, None, None, None], np.nan, batch["image"])
    label = np.where(absent, 99, batch["label"])
    return batch | {"image": image.astype(np.float32), "label": label}


FAST = [(1, 1), (7, 8), (16, 2), (37, 1), (250, 8)]  # batch size, devices


@pytest.mark.parametrize(
    ("batch_size", "devices"),
    [
        pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow)
        for pair in itertools.product([1, 7, 16, 37, 250], [1, 2, 8])
    ],
)
def test_each_example_counts_once(net, examples, wanted, batch_size, devices):
    wanted, confusion = wanted
    got, counts = evaluated(net, examples, batch_size, devices)
    np.testing.assert_array_equal(counts, confusion)
    assert got.keys() == wanted.keys()
    assert got["test_accuracy"] == pytest.approx(wanted["test_accuracy"], abs=1e-7)
    assert got["test_top5"] == pytest.approx(wanted["test_top5"], abs=1e-7)
    assert got["test_loss"] == pytest.approx(wanted["test_loss"], rel=1e-6)


def test_padding_of_the_last_batch_has_no_effect(net, examples, wanted):
    got = evaluated(net, examples, 16, 8, spoil=True)
    clean = evaluated(net, examples, 16, 8)
    assert got[0] == clean[0]
    np.testing.assert_array_equal(got[1], clean[1])


def test_batches_are_rounded_up_to_the_devices():
    sizes = [(1, 8, 8), (8, 8, 8), (9, 8, 16), (250, 8, 256), (250, 1, 250)]
    for given, devices, wanted in sizes:
        assert evaluate.padded_batch_size(given, devices) == wanted


def test_a_batch_that_does_not_fit_is_noticed_in_advance(net, examples, monkeypatch):
    def make_eval_step(*_):
        def eval_step(variables, totals, batch):
            shapes.append(batch["image"].shape)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1 TB")

        return eval_step

    shapes = []
    monkeypatch.setattr(evaluate, "make_eval_step", make_eval_step)
    config = xdensenet.get_config("22-8-2,digits")
    config.eval.batch_size = 10**12  # never more than the examples
    mesh = make_mesh(jax.devices()[:2])
    with pytest.raises(MemoryError, match=r"of 38 images .* --config.eval.batch_size"):
        evaluate.make_evaluator(config, net[0], NORMALIZATION, mesh, examples, net[1])
    assert shapes == [(38, 8, 8, 3)]
