"""A user's .npz: what is read, and errors for everything else given to data.name."""

import io
import zipfile

import numpy as np
import pytest
from absl import logging

import input_pipeline
from configs import common
from data_sources import DataError
from tests.support.tfds_writer import pixels, save_npz


@pytest.fixture
def data(tmp_path):
    data = common.base().data
    data.dir = str(tmp_path)
    return data


@pytest.mark.parametrize("absolute", [True, False])
def test_npz_returns_its_arrays(data, tmp_path, absolute):
    path = save_npz(tmp_path, y_train=(np.arange(9) % 4)[:, None].astype(np.uint8))
    data.name = str(path) if absolute else path.name
    examples = input_pipeline.load(data, "train")
    np.testing.assert_array_equal(examples.images, pixels("train", 9))
    np.testing.assert_array_equal(examples.labels, np.arange(9) % 4)
    assert (examples.labels.dtype, len(examples.class_names)) == (np.int32, 4)
    assert len(input_pipeline.load(data, "test").labels) == 4


@pytest.mark.parametrize("shape", [(9, 8, 6), (9, 8, 6, 1)])
def test_npz_may_be_grey_and_have_more_classes_than_labels(
    data, tmp_path, monkeypatch, shape
):
    grey = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    path = save_npz(tmp_path, x_train=grey, num_classes=11)
    data.name = str(path.rename(path.with_suffix(".NPZ")))
    logged = []
    monkeypatch.setattr(logging, "warning", lambda text, *x: logged.append(text % x))
    examples = input_pipeline.load(data, "train")
    assert logged == [
        f"{data.name}: no training image has the label 4..10, of 11 classes"
    ]
    assert examples.class_names == tuple(map(str, range(11)))
    for channel in range(3):
        np.testing.assert_array_equal(
            examples.images[..., channel], grey.reshape(9, 8, 6)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x_train=np.zeros((9, 8, 6, 3), np.float32)), "x_train is float32"),
        (dict(x_train=np.zeros((9, 3, 8, 6), np.uint8)), "expected uint8"),
        (dict(x_train=np.zeros((9, 48), np.uint8)), "expected uint8"),
        (dict(x_train=np.zeros((8, 8, 6, 3), np.uint8)), "8 train images, 9 labels"),
        (dict(y_train=np.zeros(9)), "y_train is float64"),
        (dict(y_test=np.zeros((4, 10), np.int64)), "y_test is int64"),
        (dict(y_train=np.arange(9) - 1), r"-1\.\.7"),
        (dict(num_classes=3), r"0\.\.3, but 3 classes"),
        (
            dict(num_classes=np.array("ten")),
            "num_classes is <U3 .*, expected one integer",
        ),
        (dict(x_train=np.uint8(3)), r"uint8 \(\), expected uint8"),
        (dict(y_train=np.int64(3)), r"y_train is int64 \(\)"),
        (dict(x_train=np.zeros((9, 0, 6, 3), np.uint8)), "expected uint8"),
        (dict(y_train=np.arange(9) % 4 + 1, num_classes=4), "subtract 1 from all"),
        (
            dict(y_train=np.arange(9) % 4 + 1, y_test=np.arange(4) + 1),
            "the labels start at 1, .* subtract 1 from y_train and y_test",
        ),
        (
            dict(y_train=np.arange(9) % 3 * 10, y_test=np.array([0, 10, 20, 0])),
            r"20, but no image has the label 1\.\.9, 11\.\.19: .* 3 classes 0\.\.2",
        ),
        (dict(y_test=np.array([0, 1, 2, 2**40])), r"no image has the label 4\.\.109"),
        (
            dict(y_test=np.array([0, 1, 4, 3])),
            "no training image has the label 4, .* add training .* num_classes=5",
        ),
        (dict(x_test=None), "lacks the arrays x_test"),
        (dict(x_train=np.zeros((0, 8, 6, 3), np.uint8), y_train=np.arange(0)), "empty"),
    ],
)
def test_npz_that_does_not_fit_is_rejected(data, tmp_path, change, message):
    data.name = str(save_npz(tmp_path, **change))
    with pytest.raises(DataError, match=message):
        input_pipeline.load(data, "train")


def test_npz_in_a_folder_named_like_a_data_set_has_its_own_statistics(data, tmp_path):
    (tmp_path / "cifar10").mkdir()
    save_npz(tmp_path / "cifar10")
    data.name = "cifar10/mine.npz"
    mean = pixels("train", 9).astype(np.float64).mean((0, 1, 2))
    data.recipe.update(name="cifar10", mean=(1.0,) * 3, std=(1.0,) * 3)
    facts = input_pipeline.facts(data, input_pipeline.load(data, "train"))
    np.testing.assert_allclose(facts.mean, mean)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_npz_may_use_the_largest_label_of_its_type(data, tmp_path, dtype):
    labels = np.full(9, np.iinfo(dtype).max)
    data.name = str(save_npz(tmp_path, y_train=labels.astype(dtype), num_classes=256))
    np.testing.assert_array_equal(input_pipeline.load(data, "train").labels, labels)
    path = save_npz(
        tmp_path,
        x_train=pixels("train", 300),
        y_train=(np.arange(300) % (1 + labels[0])).astype(dtype),
    )
    data.name = str(path)
    assert input_pipeline.load(data, "train").class_names[-1] == str(labels[0])


def test_a_missing_npz_is_named(data, tmp_path, monkeypatch):
    data.name = str(tmp_path / "mine.npz")
    with pytest.raises(DataError, match=f"no file {data.name}: check"):
        input_pipeline.load(data, "train")
    path = save_npz(tmp_path)
    monkeypatch.chdir(tmp_path)
    data.update(name="mine.npz", dir="/nowhere")
    with pytest.raises(DataError, match=f"/nowhere/mine.npz: set .*data.name={path}"):
        input_pipeline.load(data, "train")


def zipped(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


NAMES = "x_train", "y_train", "x_test", "y_test"
OBJECTS = np.array([{}] * 9, object)  # numpy pickles them
UNUSABLE = {
    "no arrays": lambda path: np.savez(path),
    "zero bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "cut in the middle": lambda path: path.write_bytes(path.read_bytes()[:300]),
    "another signature": lambda path: path.write_bytes(b"text" + path.read_bytes()[4:]),
    "one array": lambda path: path.write_bytes(npy(np.zeros(3))),
    "pickled images": lambda path: save_npz(path.parent, x_train=OBJECTS),
    "pickled labels": lambda path: save_npz(path.parent, y_train=OBJECTS),
    "pickled number": lambda path: save_npz(path.parent, num_classes=np.array({}, "O")),
    "other files": lambda path: zipped(path, **dict.fromkeys(NAMES, b"text")),
    "fields": lambda path: save_npz(path.parent, y_train=np.zeros(9, [("a", "i4")])),
    "a directory": lambda path: path.unlink() or path.mkdir(),
}


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("spoil", UNUSABLE.values(), ids=UNUSABLE)
def test_an_unusable_npz_is_one_error_that_names_it(data, tmp_path, spoil):
    path = save_npz(tmp_path)
    spoil(path)
    data.name = str(path)
    with pytest.raises(DataError, match=str(path)):
        input_pipeline.load(data, "train")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (npy(np.zeros(3)), "a single array, as numpy.save writes it"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x1f\x8b\x08", "a gzip archive"),
    ],
)
def test_files_of_other_kinds_are_not_called_damaged(data, tmp_path, content, kind):
    data.name = str(tmp_path / "mine.npz")
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(DataError, match=f"mine.npz is {kind}: write an .npz file"):
        input_pipeline.load(data, "train")


@pytest.mark.parametrize("name", ["x_train", "y_train", "y_test"])
def test_object_arrays_are_named(data, tmp_path, name):
    objects = np.array([None, *map(np.zeros, range(8))], object)
    data.name = str(save_npz(tmp_path, **{name: objects}))
    with pytest.raises(DataError, match=f"npz: {name} is an array of Python objects"):
        input_pipeline.load(data, "train")


def test_the_test_split_of_an_npz_needs_no_training_arrays(data, tmp_path):
    data.name = str(save_npz(tmp_path, x_train=None, y_train=None))
    examples = input_pipeline.load(data, "test")
    np.testing.assert_array_equal(examples.labels, range(4))
    with pytest.raises(DataError, match="lacks the arrays x_train, y_train; required"):
        input_pipeline.load(data, "train")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.npy", r"mine\.npy is a single array .* does not exist: .*numpy\.savez"),
        (
            "there.h5",
            r"there\.h5 is an HDF5 file: .*write an \.npz file with",
        ),
        ("notes.txt", r"notes\.txt is a file: .* takes an \.npz file, a directory"),
        ("empty", "empty has no folder train .* it holds nothing"),
        ("x" * 300, "File name too long"),
        ("x" * 300 + ".npz", "File name too long|no file"),
        ("a\0b", "unknown data set"),
    ],
)
@pytest.mark.parametrize("crop", ["pad", "inception"])
def test_an_unusable_name_is_one_error(
    data, tmp_path, monkeypatch, name, message, crop
):
    for file in ("notes.txt", "there.h5"):
        (tmp_path / file).write_text("hello")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    data.update(name=name, crop=crop)
    with pytest.raises(DataError, match=message if crop == "pad" else "."):
        input_pipeline.load(data, "train")
    for absolute in (tmp_path / "notes.txt", tmp_path / "empty"):
        data.name = str(absolute)
        with pytest.raises(DataError, match=str(absolute)):
            input_pipeline.load(data, "train")


def test_a_file_that_cannot_be_opened_is_one_error(data, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    data.name = str(save_npz(tmp_path))
    monkeypatch.setattr(np, "load", refuse)  # a test may run as root
    with pytest.raises(DataError, match=r"mine\.npz .*Permission denied"):
        input_pipeline.load(data, "train")
