"""The error for a data set that is not found says what is there and what to set."""

import os

import pytest
from PIL import Image

import input_pipeline
from configs import common
from data_sources import DataError


@pytest.fixture
def data(tmp_path, monkeypatch):
    """config.data of a set in tmp_path/a/b/sets, with an empty current directory."""
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            folder = tmp_path / "a/b/sets/insects" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(folder / "0.png")
    (tmp_path / "a/b/sets/cifar-10-batches-py").mkdir()
    version = tmp_path / "a/b/sets/cifar100/3.0.2"
    version.mkdir(parents=True)
    (version / "dataset_info.json").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    data = common.base().data
    data.dir = str(tmp_path / "a/b/sets")
    return data


def error(data):
    with pytest.raises(DataError) as error:
        input_pipeline.find(data)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("insects", "insects"),
        ("insects", "insects/train"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar100"),
        ("cifar100", "cifar100/3.0.2"),
        ("insects", ".."),
        ("cifar10", "../.."),
    ],
)
def test_a_data_dir_too_deep_or_too_shallow_ends_in_the_right_one(data, name, inside):
    sets, data.name = data.dir, name
    data.dir = os.path.normpath(f"{sets}/{inside}")
    assert error(data).endswith(
        f"not found in {data.dir}: set --config.data.dir={sets}"
    )
    data.dir = sets
    input_pipeline.find(data)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("{}/insects/train", "--config.data.name={}/insects"),
        ("{}/insects/train/ant", "--config.data.name={}/insects"),
        ("{}", "--config.data.dir={} --config.data.name=cifar10"),
        ("{}/cifar-10-batches-py", "--config.data.dir={} --config.data.name=cifar10"),
        ("{}/cifar100", "--config.data.dir={} --config.data.name=cifar100"),
        ("{}/cifar100/3.0.2", "--config.data.dir={} --config.data.name=cifar100"),
    ],
)
def test_a_path_that_is_no_set_itself_names_the_set(data, name, expected):
    sets = data.dir
    data.update(name=name.format(sets), dir="/nowhere")
    assert error(data).endswith(
        f"is not a data set itself: set {expected.format(sets)}"
    )


def test_sets_below_a_path_are_named(data, tmp_path):
    (tmp_path / "a/b/sets/cifar-10-batches-py").rmdir()
    for folder in ("a/b/sets", "a/b"):
        data.name = str(tmp_path / folder)
        assert error(data).endswith(f"set --config.data.name={data.dir}/insects")


def test_a_set_in_the_current_directory_is_named(data, monkeypatch):
    monkeypatch.chdir(data.dir)
    data.update(name="insects", dir="/nowhere")
    assert error(data).endswith("set --config.data.name=./insects")


def test_a_directory_without_splits_is_described(data, tmp_path):
    sets = tmp_path / "a/b/sets"
    (sets / "insects/test").rename(tmp_path / "elsewhere")
    flowers = tmp_path / "flowers"
    (sets / "insects/train").rename(flowers)
    (flowers / "readme.txt").touch()
    data.name = str(flowers)
    text = error(data)
    assert "the 2 folders ant, bee and 1 other files (.txt)" in text
    assert f"move them to {flowers}/train" in text
    data.name = str(flowers / "ant")
    assert "it holds 1 images. Images belong in " in error(data)
    data.name = str(tmp_path / "empty")
    assert "it holds nothing. Images belong in " in error(data)
    data.name = str(tmp_path / "nowhere")
    assert error(data) == f"no directory {data.name}: check --config.data.name"
