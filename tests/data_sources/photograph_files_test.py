"""Missing, damaged or misnamed photographs: errors that name them."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from absl import logging
from PIL import Image

import input_pipeline
from input_pipeline import DataError
from tests.support.mini_imagenet import make_config, write_folders, write_tfds
from tests.support.tfds_writer import pixels, png, write_set


@pytest.fixture
def own(tmp_path):
    """A configuration and files that the test may damage."""
    write_folders(tmp_path, "tiny")
    return make_config(tmp_path)


def test_the_test_folder_alone_can_be_read(own):
    """Like --mode=eval: with an empty class folder for training, or none."""
    folder = pathlib.Path(own.data.dir, "tiny")
    wanted = input_pipeline.load(own.data, "test")
    (folder / "train").rename(folder / "elsewhere")
    empty = folder / "train" / "n01"
    empty.mkdir(parents=True)
    for remove in (empty.rmdir, empty.parent.rmdir, lambda: None):
        alone = input_pipeline.load(own.data, "test")
        assert alone.class_names == wanted.class_names
        np.testing.assert_array_equal(alone.labels, wanted.labels)
        remove()
    with pytest.raises(DataError, match="has no folder train"):
        input_pipeline.load(own.data, "train")


@pytest.fixture
def warnings(monkeypatch):
    texts = []
    monkeypatch.setattr(logging, "warning", lambda text, *x: texts.append(text % x))
    return texts


def test_class_folders_must_agree(own):
    folder = pathlib.Path(own.data.dir, "tiny")
    (folder / "val" / "n02").rename(folder / "val" / "n09")
    with pytest.raises(DataError, match=r"only one of them has n02, n09"):
        input_pipeline.load(own.data, "train")
    (folder / "val" / "n09").rename(folder / "val" / "n02")
    (folder / "train" / "n03").rename(folder / "elsewhere")
    (folder / "train" / "n03").mkdir()
    with pytest.raises(DataError, match=r"train/n03 has no images"):
        input_pipeline.load(own.data, "train")
    (folder / "val").rename(folder / "held_out")
    with pytest.raises(DataError, match="has no folder test or testing or val or"):
        input_pipeline.load(own.data, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(pipeline="device"), "'device' cannot read photographs .* choose threads"),
        (dict(pipeline="tf.data"), "'tf.data' cannot read photographs .* threads"),
        (
            dict(crop="pad", pipeline="threads"),
            "cannot read images in memory .* tf.data",
        ),
        (dict(crop="incepton"), "'incepton': choose from pad, inception"),
        (dict(on_error="ignore"), "'ignore': choose from raise, skip"),
        (dict(image_size=0), "image_size must be at least 8, got 0"),
        (dict(name="tinny"), "nearest: tiny"),
        (dict(crop="pad", on_error="ignore"), "'ignore': choose from raise, skip"),
        (dict(crop="pad"), "several sizes require --config.data.crop=inception"),
        (dict(name="digits"), "digits holds small .*: set --config.data.crop=pad"),
        (dict(name="my.npz"), "my.npz holds small .*: set --config.data.crop=pad"),
    ],
)
def test_impossible_values_are_rejected_at_once(own, change, message):
    own.data.update(change)
    with pytest.raises(DataError, match=message):
        input_pipeline.load(own.data, "train")


@pytest.fixture
def small(tmp_path):
    """Three images of each of two classes in each split, all of one size."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 5, 4, 3), np.uint8)
    for split in ("train", "valid"):
        for i, image in enumerate(images):
            folder = tmp_path / "my flowers" / split / f"class{i % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    config = make_config(tmp_path, name="my flowers", crop="pad")
    return config, images[[0, 2, 4, 1, 3, 5]], tmp_path / "my flowers" / "train"


@pytest.mark.parametrize("absolute", [True, False])
def test_folders_of_one_size_are_loaded_into_memory(small, absolute):
    config, images, train = small
    if absolute:
        config.data.update(name=str(train.parent), dir="/nowhere")
    for split in ("train", "test"):
        examples = input_pipeline.load(config.data, split)
        np.testing.assert_array_equal(examples.images, images)
        np.testing.assert_array_equal(examples.labels, [0, 0, 0, 1, 1, 1])
        assert examples.image_shape == (5, 4, 3)
        assert examples.class_names == ("class0", "class1")
    facts = input_pipeline.facts(config.data, examples)
    np.testing.assert_allclose(facts.mean, images.mean((0, 1, 2)))
    config.data.update(crop="inception", image_size=8)
    photographs = input_pipeline.load(config.data, "test")
    assert len(photographs.labels) == 6
    assert photographs.class_names == examples.class_names


@pytest.mark.parametrize(
    "name", ["./my flowers", "../my flowers", "other/../my flowers"]
)
def test_folders_may_be_relative_to_the_current_one(small, monkeypatch, name):
    config, images, train = small
    (train.parents[1] / "other").mkdir()
    monkeypatch.chdir(train.parents[1] / ("other" if name[:2] == ".." else ""))
    config.data.update(name=name, dir="/nowhere")
    loaded = input_pipeline.load(config.data, "train")
    np.testing.assert_array_equal(loaded.images, images)


def test_damaged_images_of_one_size_are_named_or_skipped(small, warnings):
    config, images, train = small
    (train / "class0" / "0.png").write_bytes(b"")
    (train / "class1" / "3.png").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"class0/0\.png cannot be decoded.*on_error=skip"
    ):
        input_pipeline.load(config.data, "train")
    config.data.on_error = "skip"
    examples = input_pipeline.load(config.data, "train")
    np.testing.assert_array_equal(examples.images, images[[1, 2, 3, 5]])
    np.testing.assert_array_equal(examples.labels, [0, 0, 1, 1])
    assert len(warnings) == 1
    assert warnings[0].startswith("skipped 2 images")
    for path in train.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of 6 images can be read; the first"):
        input_pipeline.load(config.data, "train")


def test_images_that_exceed_the_memory_are_rejected(small, monkeypatch):
    sizes = {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 359}  # one byte less than they need
    monkeypatch.setattr(os, "sysconf", sizes.get)
    with pytest.raises(DataError, match=r"6 images of 4x5 .*crop=inception"):
        input_pipeline.load(small[0].data, "train")
    sizes["SC_PAGE_SIZE"] += 1
    assert len(input_pipeline.load(small[0].data, "train").labels) == 6


@pytest.mark.parametrize("crop", ["pad", "inception"])
def test_images_of_an_unsupported_kind_are_not_called_damaged(small, warnings, crop):
    config, _, train = small
    config.data.update(crop=crop, image_size=8)
    image = Image.fromarray(np.full((5, 4), 300, np.float32))
    image.save(train / "class0" / "0.png", "tiff")  # Pillow recognises the content
    config.train.batch_size = 6
    with pytest.raises(
        DataError,
        match=r"class0/0\.png has 32 bits .*8 bits\. --config.data.on_error=skip skips",
    ):
        next(input_pipeline.batches(config, "train"))
    config.data.on_error, config.train.batch_size = "skip", 5
    next(input_pipeline.batches(config, "train"))


def sideways(path):
    """Writes a 4x4 image, white above and black below, stored on its side."""
    upright = np.zeros((4, 4, 3), np.uint8)
    upright[:2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright).copy()).save(path, "png", exif=exif)


@pytest.mark.parametrize("crop", ["pad", "scale_aspect"])
@pytest.mark.parametrize("recipe", ["", "another", "turned"])
def test_only_the_data_set_of_a_recipe_is_decoded_as_stored(tmp_path, crop, recipe):
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "turned" / split / name
            folder.mkdir(parents=True)
            sideways(folder / "0.png")
    config = make_config(tmp_path, name="turned", crop=crop, image_size=8)
    config.data.recipe.name = recipe
    image = next(input_pipeline.batches(config, "test"))["image"][0, ..., 0]
    last = (
        np.index_exp[-2:, 2:-2],
        np.index_exp[2:-2, -2:],
    )
    if crop == "pad":
        last = np.index_exp[-1], np.index_exp[:, -1]
    dark = [image[rows].max() == 0 for rows in last]
    assert dark == ([False, True] if recipe == "turned" else [True, False])


def test_files_with_other_extensions_are_skipped_and_logged(small, warnings):
    config, images, train = small
    for name in ("a.webp", "b.webp", "c.TIF", "notes", ".hidden.gif"):
        (train / "class1" / name).touch()
    assert len(input_pipeline.load(config.data, "train").labels) == len(images)
    assert len(warnings) == 1
    assert f"{train}: skipped 4 files" in warnings[0]
    assert "2 .webp, 1 .tif, 1 none" in warnings[0].replace(
        "1 none, 1 .tif", "1 .tif, 1 none"
    )


def test_a_single_class_is_rejected(small):
    config, _, train = small
    for split in ("train", "valid"):
        (train.parent / split / "class1").rename(train.parent / f"{split} elsewhere")
    with pytest.raises(DataError, match="train has only the class class0"):
        input_pipeline.load(config.data, "train")


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_damaged_records_are_found_at_once(tmp_path, file_format):
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


def test_damaged_headers_of_tfrecords_are_found(tmp_path):
    directory = write_tfds(tmp_path, "tfrecord")
    path = directory / "tiny-train.tfrecord-00000-of-00003"
    content = bytearray(path.read_bytes())
    content[8] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"record 0 of .* damaged header"):
        input_pipeline.load(make_config(tmp_path).data, "train")


def test_labels_out_of_range_are_rejected(tmp_path):
    write_tfds(tmp_path, "array_record", classes=3)
    with pytest.raises(DataError, match=r"0\.\.3, but 3 classes"):
        input_pipeline.load(make_config(tmp_path).data, "train")


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_flipped_bits_of_records_are_never_cropped(tmp_path, file_format):
    directory = write_tfds(tmp_path, file_format)
    path = directory / f"tiny-train.{file_format}-00001-of-00003"
    content, rng = path.read_bytes(), np.random.default_rng(0)
    start = content.index(b"JFIF")  # after the header of the file
    for position in rng.integers(start, content.rindex(b"\xff\xd9"), 20):
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=f"{directory} is damaged or incomplete"):
            input_pipeline.load(make_config(tmp_path).data, "train")


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
@pytest.mark.parametrize("crop", ["pad", "inception"])
def test_sets_with_secret_test_labels_are_tested_on_validation(
    tmp_path, file_format, crop
):
    encoded = {
        split: [(png(x), i % 3 if split != "test" else -1) for i, x in enumerate(y)]
        for split, y in ((s, pixels(s, n)) for s, n in COUNTS_OF_SPLITS.items())
    }
    write_set(tmp_path, file_format, shards=2, encoded=encoded)
    config = make_config(tmp_path, crop=crop, image_size=8)
    for split, count in (("train", 9), ("test", 5)):
        labels = input_pipeline.load(config.data, split).labels
        np.testing.assert_array_equal(labels, np.arange(count) % 3)


COUNTS_OF_SPLITS = {"train": 9, "validation": 5, "test": 3}


def test_imagenet_without_its_secret_test_split_is_complete(tmp_path):
    encoded = {s: [(png(x), 0) for x in pixels(s, 4)] for s in COUNTS_OF_SPLITS}
    directory = write_set(
        tmp_path, "array_record", set_name="imagenet2012", encoded=encoded
    )
    for path in directory.glob("*-test*"):
        path.unlink()
    config = make_config(tmp_path, name="imagenet2012")
    assert len(input_pipeline.load(config.data, "test").labels) == 4


def test_sets_without_any_held_out_split_name_the_remedy(tmp_path):
    write_set(tmp_path, "tfrecord", encoded={"train": [(png(pixels("x", 1)[0]), 0)]})
    with pytest.raises(DataError, match=r"only train. Divide it.*\.npz with x_train"):
        input_pipeline.load(make_config(tmp_path, crop="pad").data, "test")


WITH_FEW_OPEN_FILES = """
import os, resource, sys
import numpy as np
import data_sources, input_pipeline
from configs import common

config = common.base()
config.train.batch_size = config.eval.batch_size = 100
config.data.update(name="tiny", dir=sys.argv[1], crop="inception", image_size=8)
config.data.cache_dir = os.path.join(sys.argv[1], "cache")
data_sources.tensorflow()
opened = len(os.listdir("/dev/fd"))
soft, hard = opened + 20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft if "hard" in sys.argv else hard))
for split in ("train", "test"):
    if split == "train":
        next(input_pipeline.batches(config, split))
    else:
        list(input_pipeline.batches(config, split))
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("hard", [False, True])
def test_the_limit_on_open_files_is_raised(tmp_path, hard):
    write_tfds(tmp_path, "array_record", shards=40)
    result = subprocess.run(
        [sys.executable, "-c", WITH_FEW_OPEN_FILES, str(tmp_path), "hard" * hard],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if hard:
        assert "Too many open files: raise the limit with `ulimit -n`" in result.stderr
        assert "damaged" not in result.stderr.splitlines()[-1]
    else:
        assert result.stdout == "done\n", result.stderr
