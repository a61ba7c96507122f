"""A batch is a function of (seed, step): the same bits in each pipeline."""

import dataclasses
import itertools
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import input_pipeline
from configs import common
from data_sources import BORDERS, DataError, InMemory, tensorflow
from input_pipeline import IN_MEMORY


def make_config(batch_size=4, **data):
    config = common.base()
    config.train.batch_size, config.data.pad = batch_size, 2
    config.data.update(data)
    return config


def make_examples(count=10, size=(6, 5)):
    """Returns noise, so that no two crops are equal; the label is the index."""
    images = np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)
    labels = np.arange(count, dtype=np.int32)
    return InMemory(images, labels, tuple(map(str, range(count))))


def take(config, examples, count, start_step=0, **keywords):
    batches = input_pipeline.batches(
        config, "train", start_step, examples=examples, **keywords
    )
    return list(itertools.islice(batches, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])
            assert batch[key].dtype == other[key].dtype


def by_hand(config, examples, steps):
    """Applies plans one image at a time."""
    data = config.data
    mean = input_pipeline.facts(data, examples).mean
    padded = examples.padded(data.pad, data.border, mean)
    height, width = examples.images.shape[1:3]
    for step in steps:
        plan = input_pipeline.plan(config, len(examples.labels), step)
        images = []
        for i, (y, x), mirrored in zip(plan.index, plan.offset, plan.flip, strict=True):
            crop = padded[i, y : y + height, x : x + width]
            images.append(crop[:, ::-1] if mirrored else crop)
        yield {"image": np.stack(images), "label": examples.labels[plan.index]}


def test_labels_follow_the_names_of_their_classes():
    """Labels follow class names even if the folders are in another order."""
    examples = make_examples(3)
    names = ("2", "0", "1")
    mapped = input_pipeline.map_classes(examples, names, "flowers")
    assert mapped.class_names == names
    assert [names[i] for i in mapped.labels] == ["0", "1", "2"]
    assert mapped.labels.dtype == np.int32
    assert input_pipeline.map_classes(mapped, names, "flowers") is mapped


def test_unknown_names_leave_the_labels():
    examples = make_examples(3)
    assert input_pipeline.map_classes(examples, ("",) * 3, "flowers") is examples
    with pytest.raises(DataError, match="flowers are 0, 1, 2"):
        input_pipeline.map_classes(examples, ("",) * 4, "flowers")


@pytest.mark.parametrize(
    "names", [("0", "1"), ("0", "1", "cow"), ("0", "1", "2", "3"), ("0", "1", "1", "2")]
)
def test_other_classes_are_rejected_with_both_lists(names):
    message = f"flowers are 0, 1, 2; those of the run are {', '.join(names)}"
    with pytest.raises(DataError, match=message):
        input_pipeline.map_classes(make_examples(3), names, "flowers")


def test_digests_distinguish_splits():
    examples = make_examples()
    other_images = dataclasses.replace(examples, images=examples.images ^ 1)
    other_labels = dataclasses.replace(examples, labels=examples.labels[::-1])
    splits = (examples, make_examples(), other_images, other_labels)
    assert [x.digest == examples.digest for x in splits] == [True, True, False, False]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 10])
def test_the_stream_is_one_permutation_per_epoch_end_to_end(batch_size):
    config, steps = make_config(batch_size), 40 // batch_size
    plans = [input_pipeline.plan(config, 10, step) for step in range(steps)]
    epochs = np.concatenate([plan.index for plan in plans]).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs), [range(10)] * 4)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_that_straddles_two_epochs_takes_the_rest_of_one_and_starts_the_next():
    straddling = input_pipeline.plan(make_config(4), 10, 2).index
    whole = [input_pipeline.plan(make_config(10), 10, epoch).index for epoch in (0, 1)]
    np.testing.assert_array_equal(straddling, [*whole[0][8:], *whole[1][:2]])


def test_a_plan_is_a_function_of_seed_and_step():
    config = make_config(8)
    drawn = list(itertools.islice(input_pipeline.plans(config, 10, 7), 3))
    for step, plan in enumerate(drawn, 7):
        again = input_pipeline.plan(config, 10, step)
        jax.tree.map(np.testing.assert_array_equal, plan, again)
    assert (drawn[0].offset != drawn[1].offset).any()
    assert (drawn[0].flip != drawn[1].flip).any()
    config.seed = 1
    other = input_pipeline.plan(config, 10, 7)
    assert (other.index != drawn[0].index).any()
    assert (other.offset != drawn[0].offset).any()


def test_crops_are_uniform_and_half_of_the_images_flipped():
    config = make_config(1000, pad=4)
    plans = [input_pipeline.plan(config, 1000, step) for step in range(20)]
    offsets = np.concatenate([plan.offset for plan in plans])
    for axis in range(2):
        share = np.bincount(offsets[:, axis], minlength=9) / 20_000
        np.testing.assert_allclose(share, 1 / 9, atol=0.01)  # 4.5 sigma
    assert abs(np.corrcoef(offsets.T)[0, 1]) < 0.03
    assert abs(np.mean([plan.flip for plan in plans]) - 0.5) < 0.016


def test_disabled_augmentations_do_not_change_the_image():
    config, examples = (
        make_config(pad=0, flip=False, pipeline="device"),
        make_examples(),
    )
    for batch in take(config, examples, 5):
        np.testing.assert_array_equal(batch["image"], examples.images[batch["label"]])


@pytest.mark.parametrize("pipeline", IN_MEMORY)
@pytest.mark.parametrize("border", BORDERS)
def test_each_pipeline_follows_the_plan(monkeypatch, pipeline, border):
    monkeypatch.setattr("data_sources.tf.STEPS_PER_BLOCK", 3)
    config, examples = make_config(pipeline=pipeline, border=border), make_examples()
    assert_same(take(config, examples, 8), by_hand(config, examples, range(8)))


@pytest.mark.parametrize("pipeline", IN_MEMORY)
def test_a_later_start_gives_the_same_batches(monkeypatch, pipeline):
    monkeypatch.setattr("data_sources.tf.STEPS_PER_BLOCK", 3)
    config, examples = make_config(pipeline=pipeline), make_examples()
    from_start = take(config, examples, 9)
    for start in (1, 3, 7):  # inside and between the blocks; batch 2 straddles epochs
        assert_same(take(config, examples, 9 - start, start), from_start[start:])
    far = 10**9  # costs no more than step 0
    assert_same(take(config, examples, 1, far), by_hand(config, examples, [far]))


def test_the_number_of_workers_changes_nothing():
    config, examples = make_config(), make_examples()
    draw = lambda step: input_pipeline.plan(config, 10, step)
    for workers in (1, 5):
        batches = examples.train_batches(draw, 0, workers=workers)
        batches = itertools.islice(batches, 50)
        assert_same(batches, by_hand(config, examples, range(50)))


@pytest.mark.parametrize("pipeline", IN_MEMORY)
def test_processes_share_a_batch_in_order(pipeline):
    config, examples = make_config(6, pipeline=pipeline), make_examples()
    whole = take(config, examples, 4)
    parts = [
        take(config, examples, 4, process_index=p, process_count=3) for p in range(3)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        for key in batch:
            assert len(shares[0][key]) == 2
            joined = np.concatenate([share[key] for share in shares])
            np.testing.assert_array_equal(batch[key], joined)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_test_example_comes_once_and_in_order(batch_size, processes):
    config, examples = make_config(), make_examples()
    config.eval.batch_size = batch_size
    parts = [
        input_pipeline.batches(
            config, "test", examples=examples, process_index=p, process_count=processes
        )
        for p in range(processes)
    ]
    seen = []
    for shares in zip(*parts, strict=True):  # each process has as many batches
        for batch in shares:
            present = batch["mask"] == 1
            assert batch["mask"].dtype == np.float32
            assert len(present) == -(-batch_size // processes)
            assert not batch["mask"][~present].any()
            assert not batch["image"][~present].any()
            seen += list(batch["label"][present])
            np.testing.assert_array_equal(
                batch["image"][present], examples.images[batch["label"][present]]
            )
    assert seen == list(range(10))


def test_a_plan_is_a_pytree_that_stacks_and_traces():
    config, examples = make_config(), make_examples()
    padded = examples.padded(2, "zero")
    plans = [input_pipeline.plan(config, 10, step) for step in range(3)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *plans)

    @jax.jit
    def second(images, labels, plans):
        plan = jax.tree.map(lambda x: x[1], plans)
        return input_pipeline.apply_plan(images, labels, plan)

    batch = second(padded, examples.labels, stacked)
    assert_same([jax.device_get(batch)], by_hand(config, examples, [1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data.pipeline": "tfdata"},
            "'tfdata': choose from auto, device, tf.data, threads",
        ),
        ({"data.border": "wide"}, "'wide': choose from zero, mean"),
        ({"data.pad": -1}, r"data\.pad must not be negative, got -1"),
        ({"train.batch_size": 1438}, r"batch_size must lie in 1\.\.1437, .* got 1438"),
        ({"train.batch_size": 0}, "batch_size must lie in .* got 0"),
    ],
)
def test_impossible_values_are_rejected_at_once(change, message):
    config = make_config(name="digits", pipeline="device")
    config.update_from_flattened_dict(change)
    with pytest.raises(DataError, match=message):
        input_pipeline.batches(config, "train")


def test_check_names_every_impossible_value_and_reads_nothing(tmp_path):
    data = make_config(name="mine.npz", dir=str(tmp_path)).data
    (tmp_path / "mine.npz").touch()
    input_pipeline.find(data)  # found, but not read
    data.update(name="other.npz", border="wide", pad=-1, mean=(1.0,), std=(0.0,) * 3)
    with pytest.raises(DataError) as error:
        input_pipeline.find(data)
    for field in ("data.border", "data.pad", "data.mean", "data.std"):
        assert field in str(error.value)
    data.update(name="nowhere", border="zero", pad=0, mean=(), std=())
    with pytest.raises(DataError, match="unknown data set 'nowhere'"):
        input_pipeline.find(data)


@pytest.mark.parametrize("field", ["mean", "photograph_mean", "recipe.mean"])
def test_normalisation_on_the_scale_0_to_1_is_rejected_with_the_right_values(field):
    config = make_config(name="digits")
    imagenet = {f"data.{field}": (0.485, 0.456, 0.406)}
    imagenet[f"data.{field.replace('mean', 'std')}"] = (0.229, 0.224, 0.225)
    config.update_from_flattened_dict(imagenet)
    with pytest.raises(DataError) as error:
        input_pipeline.find(config.data)
    for field, scaled in zip(
        imagenet, ("(123.675,116.28,103.53)", "(58.395,57.12,57.375)"), strict=True
    ):
        assert f"--config.{field}={scaled}" in str(error.value)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # none
        ((104.0, 117.0, 123.0), (1.0, 1.0, 1.0)),  # Caffe's
        ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
        ((0.5, 3.0, 0.5), (0.5, 3.0, 0.5)),
    ],
)
def test_other_normalisations_are_accepted(mean, std):
    input_pipeline.find(make_config(name="digits", mean=mean, std=std).data)


def test_batches_that_do_not_divide_are_rejected_with_both_numbers():
    config = make_config(9, pipeline="device")
    with pytest.raises(DataError, match=r"batch of 9 .* 2 processes"):
        input_pipeline.batches(
            config, "train", examples=make_examples(), process_index=0, process_count=2
        )
    config.eval.batch_size = 0
    with pytest.raises(DataError, match=r"eval\.batch_size must be positive, got 0"):
        input_pipeline.batches(config, "test", examples=make_examples())


def test_an_unknown_split_is_rejected():
    with pytest.raises(DataError, match="'validation': choose train or test"):
        input_pipeline.load(make_config(name="digits").data, "validation")


def test_without_tensorflow_the_other_pipeline_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    tensorflow.cache_clear()
    config = make_config(pipeline="tf.data")
    with pytest.raises(DataError, match="pipeline=device"):
        input_pipeline.batches(config, "train", examples=make_examples())


STOPS_IN_THE_MIDDLE = """
import input_pipeline
from configs import common

config = common.base()
config.data.name = "digits"
batches = input_pipeline.batches(config, "train")
for _ in range(30):
    next(batches)
"""


@pytest.mark.slow
def test_a_process_ends_while_tensorflow_prefetches():
    root = pathlib.Path(__file__).parents[1]
    for _ in range(3):  # a Python function in tf.data hung one exit in three
        subprocess.run(
            [sys.executable, "-c", STOPS_IN_THE_MIDDLE],
            cwd=root,
            check=True,
            timeout=120,
            capture_output=True,
        )
