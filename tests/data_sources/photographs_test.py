"""Batches of photographs do not depend on the format, the start or the threads."""

import csv
import dataclasses
import itertools
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import logging

import input_pipeline
import train
from configs import cfmz
from data_sources import crops
from input_pipeline import DataError
from tests.support.mini_imagenet import (
    CLASSES,
    encoded_images,
    make_config,
    write_folders,
    write_tfds,
)

FORMATS = ("folders", "array_record", "tfrecord")


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The same photographs in three formats."""
    root = tmp_path_factory.mktemp("photographs")
    write_folders(root / "folders", "tiny")
    for file_format in ("array_record", "tfrecord"):
        write_tfds(root / file_format, file_format)
    return root


@pytest.fixture
def config(written):
    return make_config(written / "folders")


@pytest.fixture
def own(tmp_path):
    """A configuration and files that the test may damage."""
    write_folders(tmp_path, "tiny")
    return make_config(tmp_path)


@pytest.fixture
def warnings(monkeypatch):
    texts = []
    monkeypatch.setattr(logging, "warning", lambda text, *x: texts.append(text % x))
    return texts


def take(config, count, start_step=0, **keywords):
    batches = input_pipeline.batches(config, "train", start_step, **keywords)
    return list(itertools.islice(batches, count))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])
            assert batch[key].dtype == other[key].dtype


def by_hand(config, steps):
    """Applies plans one image at a time."""
    files = encoded_images()["train"]
    for step in steps:
        plan = input_pipeline.plan(config, len(files), step)
        options = config.data.crop, config.data.image_size
        images = [
            crops.random_crop(files[i][0], *options, x)
            for i, x in zip(plan.index, plan.draws, strict=True)
        ]
        images = [
            x[:, ::-1] if flip else x for x, flip in zip(images, plan.flip, strict=True)
        ]
        labels = np.array([files[i][1] for i in plan.index], np.int32)
        yield {"image": np.stack(images), "label": labels}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("crop", crops.CROPS)
def test_batches_equal_the_plan_applied_by_hand(written, file_format, crop):
    config = make_config(written / file_format, crop=crop)
    assert_same(take(config, 3), by_hand(config, range(3)))


def test_a_later_start_gives_the_same_batches(config):
    from_start = take(config, 6)
    for start in (1, 4):
        assert_same(take(config, 6 - start, start), from_start[start:])
    far = 10**9  # costs no more than step 0
    assert_same(take(config, 1, far), by_hand(config, [far]))


def test_a_partial_last_batch_has_the_remaining_images(config):
    config.train.batch_size, config.train.last_batch = 64, "partial"
    batches = take(config, 5)
    assert [len(x["label"]) for x in batches] == [64, 64, 64, 8, 64]
    assert_same(batches, by_hand(config, range(5)))


def test_the_number_of_threads_changes_nothing(config):
    examples = input_pipeline.load(config.data, "train")
    draw = lambda step: input_pipeline.plan(config, 200, step)
    for workers in (1, 7):
        batches = examples.train_batches(draw, 0, workers=workers)
        assert_same(itertools.islice(batches, 4), by_hand(config, range(4)))


def test_processes_share_a_batch_in_order(config):
    whole = take(config, 3)
    parts = [take(config, 3, process_index=p, process_count=4) for p in range(4)]
    for batch, *shares in zip(whole, *parts, strict=True):
        for key in batch:
            joined = np.concatenate([share[key] for share in shares])
            np.testing.assert_array_equal(batch[key], joined)


@pytest.mark.parametrize("batch_size", [1, 16, 41, 64])
@pytest.mark.parametrize("processes", [1, 3])
def test_every_test_photograph_comes_once_and_in_order(config, batch_size, processes):
    config.eval.batch_size = batch_size
    parts = [
        input_pipeline.batches(config, "test", process_index=p, process_count=processes)
        for p in range(processes)
    ]
    files, seen = encoded_images()["test"], 0
    for shares in zip(*parts, strict=True):
        for batch in shares:
            assert batch["image"].shape == (-(-batch_size // processes), 32, 32, 3)
            present = batch["mask"] == 1
            assert not batch["image"][~present].any()
            for image, label in zip(
                batch["image"][present], batch["label"][present], strict=True
            ):
                content, expected = files[seen]
                cropped = crops.center_crop(content, "inception", 32)
                np.testing.assert_array_equal(image, cropped)
                assert label == expected
                seen += 1
    assert seen == len(files)


def test_only_a_few_batches_are_prepared(config):
    examples, drawn = input_pipeline.load(config.data, "train"), []

    def draw(step):
        drawn.append(step)
        return input_pipeline.plan(config, 200, step)

    batches = examples.train_batches(draw, 0, workers=2)
    for count in range(1, 40):
        next(batches)
        assert len(drawn) <= count + 3
    batches.close()
    assert drawn == list(range(len(drawn)))


def test_sizes_classes_and_normalisation(config):
    train_set, test_set = (
        input_pipeline.load(config.data, split) for split in ("train", "test")
    )
    assert (len(train_set.labels), len(test_set.labels)) == (200, 41)
    assert train_set.labels.dtype == np.int32
    assert train_set.image_shape == (32, 32, 3)
    facts = input_pipeline.facts(config.data, train_set)
    assert facts.class_names == CLASSES
    assert (facts.num_train, facts.image_shape) == (200, (32, 32, 3))
    np.testing.assert_allclose(np.array(facts.mean) / 255, (0.485, 0.456, 0.406))
    np.testing.assert_allclose(np.array(facts.std) / 255, (0.229, 0.224, 0.225))


def test_take_keeps_images_labels_and_names_together(config):
    examples = input_pipeline.load(config.data, "train")
    chosen = np.array([150, 3, 77])
    taken = examples.take(chosen)
    assert len(taken) == 3
    np.testing.assert_array_equal(taken.labels, examples.labels[chosen])
    for i, number in enumerate(chosen):
        assert taken.read(i) == examples.read(number)
        assert taken.name(i) == examples.name(number)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_records_are_scanned_once(written, file_format, monkeypatch, tmp_path):
    config, scans = make_config(written / file_format), []

    def info(text, *arguments):
        scans.extend([text % arguments] * text.startswith("reading and verifying"))

    monkeypatch.setattr(logging, "info", info)
    config.data.cache_dir = str(tmp_path)
    first = input_pipeline.load(config.data, "train")
    again = input_pipeline.load(config.data, "train")
    assert len(scans) == 1
    assert "tiny (train, 200 images)" in scans[0]
    np.testing.assert_array_equal(first.labels, again.labels)
    assert [first.read(i) for i in (0, 77, 199)] == [
        again.read(i) for i in (0, 77, 199)
    ]


def damage(own, split="train", number=3):
    path = sorted(pathlib.Path(own.data.dir, "tiny", split, CLASSES[1]).iterdir())
    path = path[number]
    path.write_bytes(path.read_bytes()[:200])
    return path


def test_a_damaged_photograph_is_named(own):
    path = damage(own)
    own.train.batch_size = 200
    with pytest.raises(DataError, match=rf"{path} cannot be decoded.*on_error=skip"):
        take(own, 1)
    path = damage(own, "val")
    with pytest.raises(DataError, match=f"{path} cannot be decoded"):
        list(input_pipeline.batches(own, "test"))


def test_damaged_test_photographs_are_found_before_training(own, monkeypatch):
    logged = []
    monkeypatch.setattr(logging, "info", lambda text, *x: logged.append(text % x))
    verified = lambda: sum("decoding 41 test photographs once" in x for x in logged)
    files = [damage(own, "val", number=i) for i in range(4)]
    files[1].unlink()
    files[1].symlink_to("/nowhere/missing.jpg")
    damage(own, "train")  # decoding all training images would take too long
    with pytest.raises(DataError) as error:
        input_pipeline.load_both(input_pipeline.find(own.data))
    text = str(error.value)
    assert text.startswith("4 of 41 test images: ")
    assert [str(x) in text for x in files] == [True, True, True, False]
    assert "Restore it, or set --config.data.on_error=skip" in text
    assert verified() == 1
    own.data.on_error = "skip"
    input_pipeline.load_both(input_pipeline.find(own.data))
    assert verified() == 1

    for path in files:
        path.unlink()
    own.data.on_error = "raise"
    for _ in range(2):
        input_pipeline.load_both(input_pipeline.find(own.data))
    assert sum("decoding 37 test photographs once" in x for x in logged) == 1
    damage(own, "val", number=5)  # the version of the files changes
    with pytest.raises(DataError, match="1 of 37 test images"):
        input_pipeline.load_both(input_pipeline.find(own.data))


@pytest.mark.parametrize("file_format", FORMATS)
def test_processes_verify_their_share_of_the_photographs(
    written, file_format, tmp_path
):
    examples = input_pipeline.load(make_config(written / file_format).data, "test")
    read, seen = examples.read, []
    examples = dataclasses.replace(examples, read=lambda i: seen.append(i) or read(i))
    for process in range(3):
        for _ in range(2):  # the second time, they are in the cache
            examples.verify(str(tmp_path), process, 3)
    assert sorted(seen) == list(range(41))


def test_errors_of_tensorflow_are_shortened(own):
    path = pathlib.Path(own.data.dir, "tiny", "train", CLASSES[1], "0051.JPEG")
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\xc4")  # of the Huffman tables
    content[start + 5 : start + 20] = b"\xff" * 15
    path.write_bytes(content)
    own.train.batch_size = 200
    with pytest.raises(DataError, match=rf"{path} cannot be decoded: \w[^{{}}]+$"):
        take(own, 1)


def test_damaged_training_photographs_are_logged_once_a_pass(own, warnings):
    own.data.on_error, own.train.batch_size = "skip", 40
    files = [damage(own, number=i) for i in (3, 9)]
    examples = input_pipeline.load(own.data, "train")
    files[1].unlink()  # missing although listed
    assert len(take(own, 10, examples=examples)) == 10
    assert len(warnings) == 2  # two passes
    for text in warnings:
        assert "in this pass, replaced by the next in order: 2 (" in text
        assert all(str(path) in text for path in files)


def test_closing_the_batches_logs_the_damaged_photographs_so_far(own, warnings):
    own.data.on_error = "skip"
    examples = input_pipeline.load(own.data, "train")
    path = pathlib.Path(examples.name(input_pipeline.plan(own, 200, 0).index[0]))
    path.write_bytes(path.read_bytes()[:200])
    batches = input_pipeline.batches(own, "train", examples=examples)
    next(batches)
    assert not warnings
    batches.close()
    assert len(warnings) == 1
    assert "in this pass, replaced by the next in order: 1 (" in warnings[0]
    assert str(path) in warnings[0]


def test_a_replacement_is_the_next_photograph_that_can_be_decoded(own, warnings):
    own.data.on_error, own.train.batch_size = "skip", 40
    examples = input_pipeline.load(own.data, "train")
    whole = take(own, 5, examples=examples)
    broken = [names(examples).index(str(damage(own, number=i))) for i in (3, 4)]
    for step, (batch, before) in enumerate(
        zip(take(own, 5, examples=examples), whole, strict=True)
    ):
        rows = input_pipeline.plan(own, 200, step)
        hit = np.isin(rows.index, broken)
        np.testing.assert_array_equal(batch["image"][~hit], before["image"][~hit])
        for i in np.flatnonzero(hit):
            content = examples.read(max(broken) + 1)
            expected = crops.random_crop(content, "inception", 32, rows.draws[i])
            expected = expected[:, ::-1] if rows.flip[i] else expected
            np.testing.assert_array_equal(batch["image"][i], expected)
            assert batch["label"][i] == examples.labels[max(broken) + 1]


def names(examples):
    return [examples.name(i) for i in range(len(examples.labels))]


def test_damaged_test_photographs_are_masked_and_logged(own, warnings):
    own.data.on_error = "skip"
    before = list(input_pipeline.batches(own, "test"))
    path = damage(own, "val", number=0)
    examples = input_pipeline.load(own.data, "test")
    number = names(examples).index(str(path))
    after = list(input_pipeline.batches(own, "test"))
    for key in ("image", "mask"):
        old, new = (np.concatenate([x[key] for x in y]) for y in (before, after))
        assert not new[number].any()
        np.testing.assert_array_equal(
            np.delete(new, number, 0), np.delete(old, number, 0)
        )
    assert len(warnings) == 1
    assert "in this pass, not evaluated: 1 (" in warnings[0]


def test_only_damaged_photographs_are_an_error(own):
    own.data.on_error = "skip"
    for path in pathlib.Path(own.data.dir, "tiny", "train").rglob("*.*"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="100 images in a row"):
        take(own, 1)


STOPS_IN_THE_MIDDLE = """
import sys
import input_pipeline
from configs import common

config = common.base()
config.data.update(name="tiny", dir=sys.argv[1], crop="inception", image_size=64)
batches = input_pipeline.batches(config, "train")
for _ in range(5):
    next(batches)
"""


@pytest.mark.slow
def test_a_process_ends_while_threads_decode(config):
    root = pathlib.Path(__file__).parents[2]
    for _ in range(3):
        process = subprocess.run(
            [sys.executable, "-c", STOPS_IN_THE_MIDDLE, config.data.dir],
            cwd=root,
            check=True,
            timeout=120,
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_a_net_learns_the_classes_of_the_folders(config, tmp_path):
    trained = cfmz.get_config("20,cifar10")
    trained.data.update(config.data)
    trained.data.flip = False  # a mirrored wave belongs to another class
    trained.data.image_size = 16
    trained.net.update(depth=8, num_classes=4)
    trained.train.update(batch_size=24, epochs=8.0, tensorboard=False)
    trained.optimizer.update(learning_rate=0.05, drop_epochs=(6.0,))
    trained.eval.update(batch_size=24, every_epochs=4.0)
    result = train.train_and_evaluate(trained, tmp_path / "run")
    assert result["test_accuracy"] > 0.6  # chance: 0.25
    table = csv.DictReader((tmp_path / "run" / "per_class.csv").open())
    assert [row["class"] for row in table] == sorted(CLASSES)
