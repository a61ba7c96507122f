"""A user's arrays: what is read, and what is refused with its reason."""

import numpy as np
import pytest

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
def test_npz_gives_its_arrays(data, tmp_path, absolute):
    path = save_npz(tmp_path, y_train=(np.arange(9) % 4)[:, None].astype(np.uint8))
    data.name = str(path) if absolute else path.name
    examples = input_pipeline.load(data, "train")
    np.testing.assert_array_equal(examples.images, pixels("train", 9))
    np.testing.assert_array_equal(examples.labels, np.arange(9) % 4)
    assert (examples.labels.dtype, len(examples.class_names)) == (np.int32, 4)
    assert len(input_pipeline.load(data, "test").labels) == 4


@pytest.mark.parametrize("shape", [(9, 8, 6), (9, 8, 6, 1)])
def test_npz_may_be_grey_and_have_more_classes_than_labels(data, tmp_path, shape):
    grey = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    data.name = str(save_npz(tmp_path, x_train=grey, num_classes=11))
    examples = input_pipeline.load(data, "train")
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
        (dict(y_test=np.array([0, 1, 2, 13])), r"label 13 exceeds .*\(13\)"),
        (dict(x_test=None), "lacks the arrays x_test"),
        (dict(x_train=np.array([{}] * 9, object)), "damaged"),  # a pickle: not opened
        (dict(x_train=np.zeros((0, 8, 6, 3), np.uint8), y_train=np.arange(0)), "empty"),
    ],
)
def test_npz_that_does_not_fit_is_refused(data, tmp_path, change, message):
    data.name = str(save_npz(tmp_path, **change))
    with pytest.raises(DataError, match=message):
        input_pipeline.load(data, "train")


def test_npz_in_a_folder_called_like_a_set_has_its_own_statistics(data, tmp_path):
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


def test_npz_missing_or_damaged_is_named(data, tmp_path):
    path = save_npz(tmp_path)
    content = path.read_bytes()
    data.name = str(path)
    for damaged in (b"", content[:-50], b"text" + content[4:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{path} is damaged"):
            input_pipeline.load(data, "train")
    path.unlink()
    with pytest.raises(DataError, match=f"no file {path}"):
        input_pipeline.load(data, "train")
