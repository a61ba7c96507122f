"""Class folders as people have them: nothing is skipped in silence."""

import numpy as np
import pytest
from absl import logging
from PIL import Image

import input_pipeline
from configs import common
from data_sources import DataError

CLASSES = ("ant", "bee")


def write(root, *splits, classes=CLASSES):
    """Writes two 4x4 images of each class to each split folder."""
    for split in splits:
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def data(tmp_path):
    data = common.base().data
    data.name, data.dir = "insects", str(tmp_path)
    return data


@pytest.fixture
def logged(monkeypatch):
    texts = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logging, level, lambda text, *x: texts.append(text % x))
    return texts


@pytest.fixture
def root(tmp_path):
    return tmp_path / "insects"


def test_images_in_sub_folders_belong_to_their_class(data, root, logged):
    ants = write(root, "train", "test") / "train" / "ant"
    (ants / "more" / "deep").mkdir(parents=True)
    (ants / "1.png").rename(ants / "more" / "1.PNG")
    Image.new("RGB", (4, 4), (9, 0, 0)).save(ants / "more" / "deep" / "2.png")
    (ants / "more" / "circle").symlink_to(ants)
    examples = input_pipeline.load(data, "train")
    np.testing.assert_array_equal(examples.labels, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(examples.images[:3, 0, 0, 0], [0, 1, 9])
    assert f"2 images lie in sub-folders of their class, such as {ants}/more" in (
        "".join(logged)
    )


def test_images_outside_of_class_folders_are_logged(data, root, logged):
    train = write(root, "train", "test") / "train"
    (train / "ant" / "0.png").rename(train / "0.png")
    assert len(input_pipeline.load(data, "train")) == 3
    assert f"{train}: skipped 1 images outside of class folders" in logged


@pytest.mark.parametrize(
    "name", ["@eaDir", "__MACOSX", ".ipynb_checkpoints", "lost+found"]
)
def test_system_folders_are_ignored(data, root, logged, name):
    write(root, "train", "test")
    for folder in (root, root / "train", root / "train" / "ant"):
        (folder / name).mkdir()
        Image.new("RGB", (4, 4)).save(folder / name / "0.png")
    examples = input_pipeline.load(data, "train")
    assert examples.class_names == CLASSES
    np.testing.assert_array_equal(examples.labels, [0, 0, 1, 1])
    assert logged == [f"reading insects (train, 4 images) from {root}/train"]


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("training", "validation"), ("Training", "VAL")],
)
def test_split_folders_have_several_names_in_any_case(data, root, train, test):
    write(root, train, test)
    for split in ("train", "test"):
        assert len(input_pipeline.load(data, split)) == 4


@pytest.mark.parametrize("inside", ["", "unknown"])
def test_a_test_folder_without_labels_is_passed_over_for_val(
    data, root, logged, inside
):
    write(root, "train", "val")
    (root / "test" / inside).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(root / "test" / inside / "0.png")
    examples = input_pipeline.load(data, "test")
    np.testing.assert_array_equal(examples.labels, [0, 0, 1, 1])
    assert logged[0] == f"{root}/test has no labels: testing on {root}/val"
    assert logged[1].endswith(f"(test, 4 images) from {root}/val")
    assert len(input_pipeline.load(data, "train")) == 4


def test_a_labelled_test_folder_comes_before_val(data, root, logged):
    write(root, "train", "val", "test")
    input_pipeline.load(data, "test")
    assert logged == [f"reading insects (test, 4 images) from {root}/test"]


def test_a_test_folder_without_labels_alone_is_rejected(data, root):
    write(root, "train")
    (root / "test").mkdir()
    Image.new("RGB", (4, 4)).save(root / "test" / "0.png")
    for split in ("train", "test"):
        with pytest.raises(
            DataError, match=r"test has no folders, one for each .*: it holds 1 images"
        ):
            input_pipeline.load(data, split)


def test_errors_name_what_is_there(data, root):
    write(root, "train", "Train_2")
    with pytest.raises(
        DataError, match=rf"no folder test or .* 2 folders Train_2, train\. .*{root}/te"
    ):
        input_pipeline.load(data, "train")
    write(root, "test", classes=["all"])
    for split in ("train", "Train_2"):
        (root / split).rename(root / f"old {split}")
    write(root, "train/all")
    with pytest.raises(DataError, match=r"only the class all.*move those in all \(ant"):
        input_pipeline.load(data, "train")


def test_the_log_names_which_of_two_equally_named_sets_is_read(
    data, tmp_path, monkeypatch, logged
):
    data.name = "sets/insects"
    first, second = tmp_path / data.name, tmp_path / "here" / data.name
    write(first, "train", "test")
    write(second, "train", "test")
    monkeypatch.chdir(tmp_path / "here")
    for split in ("train", "test"):
        input_pipeline.load(data, split)
    assert f"sets/insects is read from {first}, not from sets/insects" in logged
    assert len(logged) == 3
    monkeypatch.chdir(tmp_path)  # both are the same
    logged.clear()
    input_pipeline.load(data, "test")
    assert len(logged) == 1


def test_a_folder_called_digits_does_not_hide_behind_the_embedded_ones(
    data, tmp_path, monkeypatch, logged
):
    root = write(tmp_path / "digits", "train", "test")
    data.name = "digits"
    with pytest.raises(
        DataError, match=f"set --config.data.name={root} to read the folder, or another"
    ):
        input_pipeline.find(data)
    data.name = str(root)
    assert len(input_pipeline.load(data, "train")) == 4
    data.update(name="digits", dir=str(root))
    assert len(input_pipeline.load(data, "train")) == 1437
    assert not any("not from" in text for text in logged)
    monkeypatch.chdir(tmp_path)
    assert len(input_pipeline.load(data, "test")) == 360
    assert logged[-1].endswith(f"digits.npz, not from {root}")
