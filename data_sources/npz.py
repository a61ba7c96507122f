"""A user's file of arrays, written by numpy.savez."""

import pathlib
import zipfile

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from data_sources.errors import DataError, absent_labels, reading

MAX_CLASSES = 20_000  # of an .npz: evaluation counts in an array (classes, classes)
SAVEZ = (
    "write an .npz file with numpy.savez(file, x_train=..., y_train=..., x_test=..., "
    "y_test=...)"
)
SIGNATURES = {  # of files that are often mistaken for an .npz
    b"\x93NUMPY": "a single array, as numpy.save writes it",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"MATLAB": "a MATLAB file",
}


def load_images(path: pathlib.Path, data: ConfigDict, split: str):
    """Returns x_SPLIT, y_SPLIT and the classes of a file.

    The arrays are x_train, y_train, x_test and y_test; the last two suffice for the
    test split. x: uint8, (N, H, W), (N, H, W, 1) or (N, H, W, 3); grey images get three
    equal channels. y: integers from 0, (N,) or (N, 1). num_classes, optional: an
    integer; without it, every label up to the largest must occur in y_train.
    """
    required = ["x_train", "y_train", "x_test", "y_test"]
    if not path.is_file():
        here = pathlib.Path(data.name).absolute()
        remedy = "check --config.data.name and --config.data.dir"
        if here.is_file():
            remedy = f"set --config.data.name={here}"
        raise DataError(f"no file {path.absolute()}: {remedy}")
    logging.info("reading %s (%s)", data.name, split)
    with reading(path):
        _check_signature(path)
        with np.load(path, allow_pickle=False) as file:
            needed = required[2:] if split == "test" else required
            missing = [name for name in needed if name not in file.files]
            names = {f"x_{split}", "y_train", "y_test", "num_classes"} & {*file.files}
            arrays = {name: _array(path, file, name) for name in names}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("it holds files that are not arrays")
    if missing:
        raise DataError(
            f"{path} lacks the arrays {', '.join(missing)}; required: "
            f"{', '.join(required)}"
        )
    images = arrays[f"x_{split}"]
    grey = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 1)
    colour = images.ndim == 4 and images.shape[-1] == 3
    if images.dtype != np.uint8 or not (grey or colour) or 0 in images.shape[1:]:
        raise DataError(
            f"{path}: x_{split} is {images.dtype} {images.shape}, expected uint8 "
            "(N, H, W), (N, H, W, 1) or (N, H, W, 3)"
        )
    for name in {"y_train", "y_test"} & set(arrays):
        array, n = arrays[name], arrays[name].size
        if array.dtype.kind not in "iu" or array.shape not in ((n,), (n, 1)):
            raise DataError(
                f"{path}: {name} is {array.dtype} {array.shape}, expected integers "
                "(N,), the classes numbered from 0 (one-hot rows: y.argmax(axis=1))"
            )
    labels = arrays[f"y_{split}"].reshape(-1)
    if len(labels) != len(images):
        raise DataError(f"{path}: {len(images)} {split} images, {len(labels)} labels")
    if grey:
        images = np.repeat(images.reshape(*images.shape[:3], 1), 3, axis=-1)
    return images, labels, range(_num_classes(path, arrays))


def _check_signature(path: pathlib.Path) -> None:
    """Raises DataError for a file of another kind, ValueError for an unknown one."""
    with open(path, "rb") as file:
        start = file.read(8)
    for signature, kind in SIGNATURES.items():
        if start.startswith(signature):
            raise DataError(f"{path} is {kind}: {SAVEZ}")
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not a zip file, as numpy.savez writes it")


def _array(path: pathlib.Path, file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        return file[name]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise DataError(
            f"{path}: {name} is an array of Python objects, which numpy makes if the "
            "images differ in size. Save images of one size as uint8 (N, H, W, 3) "
            "and labels as integers (N,); images of several sizes are read from "
            "NAME/{train,test}/CLASS/*.png"
        ) from error


def _num_classes(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> int:
    if (array := arrays.get("num_classes")) is not None:
        if array.shape or array.dtype.kind not in "iu":
            raise DataError(
                f"{path}: num_classes is {array.dtype} {array.shape}, expected one "
                "integer"
            )
        if not 0 < (classes := int(array)) <= MAX_CLASSES:
            raise DataError(
                f"{path}: num_classes must lie in 1..{MAX_CLASSES:,}, got {classes}"
            )
        return classes
    test = arrays["y_test"]
    train = arrays.get("y_train", test)
    labels = np.concatenate([train.reshape(-1), test.reshape(-1)])
    classes = int(labels.max(initial=0)) + 1
    if not train.size or labels.min() < 0:
        return classes  # refused by check_labels
    if absent := absent_labels(labels, classes):
        if absent == "0":
            raise DataError(
                f"{path}: the labels start at 1, no image has the label 0: subtract 1 "
                "from y_train and y_test"
            )
        count = len(np.unique(labels))
        raise DataError(
            f"{path}: the labels go up to {classes - 1}, but no image has the label "
            f"{absent}: number the {count} classes 0..{count - 1} (for example by "
            "numpy.unique(y, return_inverse=True)[1], of y_train and y_test together)"
        )
    if absent := absent_labels(train, classes):
        raise DataError(
            f"{path}: no training image has the label {absent}, only test images do: "
            f"add training images, or, if this is right, an array num_classes={classes}"
        )
    return classes
