"""What is missing, damaged or misnamed among photographs is told at once."""

import pathlib

import numpy as np
import pytest
from mini_imagenet import COUNTS, make_config, pictures, write_folders, write_tfds
from PIL import Image

import data_sources
import input_pipeline
from input_pipeline import DataError


@pytest.fixture
def own(tmp_path):
    """A configuration with files that the test may damage."""
    write_folders(tmp_path, "tiny")
    return make_config(tmp_path)


def test_class_folders_must_agree(own):
    folder = pathlib.Path(own.data.dir, "tiny")
    (folder / "val" / "n02").rename(folder / "val" / "n09")
    with pytest.raises(DataError, match=r"only one of them has n02, n09"):
        input_pipeline.load(own.data, "train")
    (folder / "val" / "n09").rename(folder / "val" / "n02")
    (folder / "train" / "n03").rename(folder / "elsewhere")
    (folder / "train" / "n03").mkdir()
    with pytest.raises(DataError, match=r"train/n03 has no pictures"):
        input_pipeline.load(own.data, "train")
    (folder / "val").rename(folder / "held_out")
    with pytest.raises(DataError, match="lacks a folder test or val or validation"):
        input_pipeline.load(own.data, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pipeline="device"), "in memory: use tf.data"),
        (dict(crop="incepton"), "'incepton': choose from pad, inception"),
        (dict(on_error="ignore"), "'ignore': choose from raise, skip"),
        (dict(image_size=0), "image_size=0"),
        (dict(name="tinny"), "nearest: tiny"),
        (dict(crop="pad"), "several sizes need --config.data.crop=inception"),
        (dict(name="digits"), "digits"),
    ],
)
def test_impossible_values_are_refused_at_once(own, change, message):
    own.data.update(change)
    with pytest.raises(DataError, match=message):
        input_pipeline.load(own.data, "train")


def test_folders_of_one_size_are_loaded_into_memory(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 5, 4, 3), np.uint8)
    for split in ("train", "validation"):
        for i, image in enumerate(images):
            folder = tmp_path / "mine" / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    config = make_config(tmp_path, name="mine", crop="pad")
    for split in ("train", "test"):
        examples = input_pipeline.load(config.data, split)
        np.testing.assert_array_equal(examples.images, images[[0, 2, 4, 1, 3, 5]])
        np.testing.assert_array_equal(examples.labels, [0, 0, 0, 1, 1, 1])
        assert examples.image_shape == (5, 4, 3)
    np.testing.assert_allclose(examples.mean, images.mean((0, 1, 2)))
    (tmp_path / "mine" / "train" / "class0" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"class0/0\.png is damaged"):
        input_pipeline.load(config.data, "train")


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_damaged_records_are_told_at_once(tmp_path, file_format):
    directory = write_tfds(tmp_path, file_format)
    config = make_config(tmp_path)
    path = directory / f"tiny-train.{file_format}-00001-of-00003"
    content = path.read_bytes()
    for damaged in (b"", content[:-30], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{directory} is damaged or incomplete"):
            input_pipeline.load(config.data, "train")
    path.unlink()
    with pytest.raises(DataError, match=f"{directory} is damaged or incomplete"):
        input_pipeline.load(config.data, "train")


def test_damaged_headers_of_tfrecords_are_told(tmp_path):
    directory = write_tfds(tmp_path, "tfrecord")
    path = directory / "tiny-train.tfrecord-00000-of-00003"
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"record 0 of .* damaged header"):
        input_pipeline.load(make_config(tmp_path).data, "train")


def test_labels_out_of_range_are_refused(tmp_path):
    write_tfds(tmp_path, "array_record", classes=3)
    with pytest.raises(DataError, match=r"0\.\.3, not in 0\.\.2"):
        input_pipeline.load(make_config(tmp_path).data, "train")


def test_sets_without_a_test_split_are_tested_on_validation(tmp_path):
    made = pictures()
    made = {"train": made["train"], "validation": made["test"]}
    write_tfds(tmp_path, "array_record", encoded=made)
    examples = input_pipeline.load(make_config(tmp_path).data, "test")
    assert len(examples.labels) == COUNTS["test"]
    assert data_sources.WITHOUT_TEST == ("imagenet2012",)
