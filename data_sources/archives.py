"""Files of arrays: the published archives of CIFAR and SVHN, and a user's .npz.

config.data.dir may hold an archive as downloaded, or unpacked.
"""

import gzip
import pathlib
import tarfile
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from data_sources import pickles
from data_sources.split import DataError, absent_labels, reading

MAX_CLASSES = 20_000  # of an .npz: evaluation counts in an array (classes, classes)
SAVEZ = (
    "write an .npz file with numpy.savez(file, x_train=..., y_train=..., x_test=..., "
    "y_test=...)"
)
SIGNATURES = {  # of files that are taken for an .npz
    b"\x93NUMPY": "a single array, as numpy.save writes it",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"MATLAB": "a MATLAB file",
}


class Archive(NamedTuple):
    """The layout of a CIFAR archive: names of archive and folder, files of each split.

    count: images in each file of a split.
    label: the key in a pickled batch, or the byte of a binary record.
    """

    file: str
    folder: str
    splits: dict[str, list[str]]
    count: dict[str, int]
    label: bytes | int


CIFAR: dict[str, list[Archive]] = {
    "cifar10": [
        Archive(
            "cifar-10-python.tar.gz",
            "cifar-10-batches-py",
            {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
            {"train": 10_000, "test": 10_000},
            b"labels",
        ),
        Archive(
            "cifar-10-binary.tar.gz",
            "cifar-10-batches-bin",
            {
                "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
                "test": ["test_batch.bin"],
            },
            {"train": 10_000, "test": 10_000},
            0,
        ),
    ],
    "cifar100": [
        Archive(
            "cifar-100-python.tar.gz",
            "cifar-100-python",
            {"train": ["train"], "test": ["test"]},
            {"train": 50_000, "test": 10_000},
            b"fine_labels",
        ),
        Archive(
            "cifar-100-binary.tar.gz",
            "cifar-100-binary",
            {"train": ["train.bin"], "test": ["test.bin"]},
            {"train": 50_000, "test": 10_000},
            1,  # after the coarse label
        ),
    ],
}
# In the order of the labels, as TFDS has them.
CLASS_NAMES = {
    name: tuple(names.split())
    for name, names in {
        "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
        "cifar100": """
            apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy
            bridge bus butterfly camel can castle caterpillar cattle chair chimpanzee
            clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
            flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
            leopard lion lizard lobster man maple_tree motorcycle mountain mouse
            mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
            plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea
            seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
            sunflower sweet_pepper table tank telephone television tiger tractor train
            trout tulip turtle wardrobe whale willow_tree wolf woman worm
        """,
    }.items()
}
SVHN = {
    "svhn_cropped": {"train": ["train"], "test": ["test"]},
    "svhn_cropped_extra": {"train": ["train", "extra"], "test": ["test"]},
}


def find(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """Returns the archive or folder of a set in `root`; for SVHN, `root`; else None."""
    for archive in CIFAR.get(name, []):
        for path in (root / archive.folder, root / archive.file):
            if path.exists():
                return path
    return root if name in SVHN and any(root.glob("*_32x32.mat")) else None


def file_names(name: str) -> list[str]:
    """Returns the names of files that `find` looks for, for error messages."""
    if name in SVHN:
        return [f"{part}_32x32.mat" for parts in SVHN[name].values() for part in parts]
    return [archive.file for archive in CIFAR.get(name, [])]


def load_images(path: pathlib.Path, data: ConfigDict, split: str):
    """Returns images (N, 32, 32, 3) uint8, labels (N,) and the classes."""
    logging.info("reading %s (%s) from %s", data.name, split, path)
    if data.name in SVHN:
        return _svhn(path, SVHN[data.name][split])
    choices = CIFAR[data.name]
    archive = next(x for x in choices if path.name in (x.folder, x.file))
    return *_cifar(path, archive, split), CLASS_NAMES[data.name]


def _cifar(path: pathlib.Path, archive: Archive, split: str):
    names = archive.splits[split]
    with reading(path):
        found = dict(_members(path, names))
    if missing := [name for name in names if name not in found]:
        raise DataError(
            f"{path} lacks {', '.join(missing)}: download or unpack it again"
        )
    images, labels = [], []
    for name in names:
        with reading(path / name):
            read = _binary if isinstance(archive.label, int) else _pickled
            rows, batch = read(found[name], archive.label)
            if rows.shape[1:] != (3072,) or len(rows) != len(batch):
                raise ValueError(
                    f"values of shape {rows.shape} for {len(batch)} labels, expected "
                    "3,072 for each"
                )
            if len(rows) != (count := archive.count[split]):
                raise ValueError(f"{len(rows)} images, expected {count}")
        images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(batch)
    images = np.ascontiguousarray(np.concatenate(images))
    return images, np.concatenate(labels)


def _members(path: pathlib.Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the named files in a folder or a tar archive."""
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                yield name, (path / name).read_bytes()
        return
    with gzip.open(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            name = pathlib.PurePosixPath(member.name).name
            if name in names and member.isfile():
                yield name, tar.extractfile(member).read()
        while file.read(1 << 20):  # to the end, where gzip compares its checksum
            pass


def _binary(content: bytes, label: int):
    size = label + 1 + 3072
    if len(content) % size or not content:
        raise ValueError(f"{len(content)} bytes are not records of {size}")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, label + 1 :], records[:, label].astype(np.int32)


def _pickled(content: bytes, label: bytes):
    batch = pickles.loads(content)
    rows, labels = np.asarray(batch[b"data"]), np.asarray(batch[label], np.int32)
    if rows.dtype != np.uint8:
        raise ValueError(f"pixels are {rows.dtype}, expected uint8")
    return rows, labels


def load_npz(path: pathlib.Path, data: ConfigDict, split: str):
    """Returns x_SPLIT, y_SPLIT and the classes of a file written by numpy.savez.

    The arrays are x_train, y_train, x_test and y_test; the last two suffice for the
    test split. x: uint8, (N, H, W), (N, H, W, 1) or (N, H, W, 3); grey images get three
    equal channels. y: integers from 0, (N,) or (N, 1). num_classes, optional: an
    integer; without it, every label up to the largest must occur in y_train.
    """
    required = ["x_train", "y_train", "x_test", "y_test"]
    if not path.is_file():
        here = pathlib.Path(data.name).absolute()
        remedy = (
            f"set --config.data.name={here}"
            if here.is_file()
            else "check --config.data.name and --config.data.dir"
        )
        raise DataError(f"no file {path.absolute()}: {remedy}")
    logging.info("reading %s (%s)", data.name, split)
    with reading(path):
        _check_signature(path)
        with np.load(path, allow_pickle=False) as file:
            needed = required[2:] if split == "test" else required
            missing = [name for name in needed if name not in file.files]
            names = {f"x_{split}", "y_train", "y_test", "num_classes"}
            arrays = {
                name: _array(path, file, name) for name in names & set(file.files)
            }
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
            f"{path}: {name} is an array of Python objects, as numpy makes it of "
            "images of several sizes. Save images of one size as uint8 (N, H, W, 3) "
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


def _svhn(root: pathlib.Path, parts: list[str]):
    """Format 2, "cropped digits"; the label 10 stands for the digit 0."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(
            f"the .mat files of SVHN require SciPy ({error}): pip install scipy"
        ) from error
    images, labels = [], []
    for part in parts:
        path = root / f"{part}_32x32.mat"
        if not path.is_file():
            raise DataError(f"{root} lacks {path.name}: download it to this directory")
        with reading(path):
            content = loadmat(path, variable_names=("X", "y"))
            rows, batch = content["X"], content["y"].reshape(-1).astype(np.int32)
            if rows.shape != (32, 32, 3, len(batch)) or rows.dtype != np.uint8:
                raise ValueError(
                    f"images are {rows.dtype} {rows.shape} for {len(batch)} labels"
                )
            if (wrong := batch[(batch < 1) | (batch > 10)]).size:
                raise ValueError(f"label {wrong[0]}, expected 1 to 10")
        images.append(rows.transpose(3, 0, 1, 2))
        labels.append(batch % 10)
    images = np.ascontiguousarray(np.concatenate(images))
    return images, np.concatenate(labels), range(10)
