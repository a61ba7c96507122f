"""Files of arrays: CIFAR's archives and SVHN's .mat as published, a user's .npz.

Where config.data.dir holds no prepared TFDS set of the name, it may hold one of the
former, as downloaded or unpacked. A pickle can run any code when it is read, and an
array of pointers is as bad, so CIFAR's are read by an unpickler that makes arrays of
integers from bytes and nothing else.
"""

import gzip
import io
import pathlib
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class ArchiveError(ValueError):
    """An archive that is damaged, incomplete or not what it is called."""


class Archive(NamedTuple):
    """Where a CIFAR set lies: archive and folder names, files of each split.

    count: images that each file of a split has. label: key of a pickled batch, or the
    byte of a binary record.
    """

    file: str
    folder: str
    splits: dict[str, list[str]]
    count: dict[str, int]
    label: bytes | int
    num_classes: int


CIFAR: dict[str, list[Archive]] = {
    "cifar10": [
        Archive(
            "cifar-10-python.tar.gz",
            "cifar-10-batches-py",
            {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
            {"train": 10_000, "test": 10_000},
            b"labels",
            10,
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
            10,
        ),
    ],
    "cifar100": [
        Archive(
            "cifar-100-python.tar.gz",
            "cifar-100-python",
            {"train": ["train"], "test": ["test"]},
            {"train": 50_000, "test": 10_000},
            b"fine_labels",
            100,
        ),
        Archive(
            "cifar-100-binary.tar.gz",
            "cifar-100-binary",
            {"train": ["train.bin"], "test": ["test.bin"]},
            {"train": 50_000, "test": 10_000},
            1,  # after the coarse label
            100,
        ),
    ],
}
SVHN = {
    "svhn_cropped": {"train": ["train"], "test": ["test"]},
    "svhn_cropped_extra": {"train": ["train", "extra"], "test": ["test"]},
}


def find(root: pathlib.Path, name: str) -> Callable | None:
    """split -> (images (N, 32, 32, 3) uint8, labels (N,), classes); None: not here."""
    for archive in CIFAR.get(name, []):
        for place in (root / archive.folder, root / archive.file):
            if place.exists():
                return lambda split: _cifar(place, archive, split)
    if name in SVHN and any(root.glob("*_32x32.mat")):
        return lambda split: _svhn(root, SVHN[name][split])
    return None


def known(name: str) -> list[str]:
    """File names that `find` looks for, for error messages."""
    if name in SVHN:
        return [f"{part}_32x32.mat" for parts in SVHN[name].values() for part in parts]
    return [archive.file for archive in CIFAR.get(name, [])]


def _cifar(place: pathlib.Path, archive: Archive, split: str):
    names = archive.splits[split]
    found = dict(_members(place, names))
    if missing := [name for name in names if name not in found]:
        raise ArchiveError(f"{place} lacks {', '.join(missing)}")
    images, labels = [], []
    for name in names:
        read = _binary if isinstance(archive.label, int) else _pickled
        try:
            rows, batch = read(found[name], archive.label)
        except ArchiveError as error:
            raise ArchiveError(f"{place}, {name}: {error}") from error
        if rows.shape[1:] != (3072,) or len(rows) != len(batch):
            raise ArchiveError(
                f"{place}, {name}: {rows.shape} values for {len(batch)} labels, not "
                "3,072 a label"
            )
        if len(rows) != (count := archive.count[split]):
            raise ArchiveError(f"{place}, {name}: {len(rows)} images, not {count}")
        images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(batch)
    images = np.ascontiguousarray(np.concatenate(images))
    return images, np.concatenate(labels), archive.num_classes


def _members(place: pathlib.Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the wanted files of a folder or of a tar archive."""
    if place.is_dir():
        for name in names:
            if (place / name).is_file():
                yield name, (place / name).read_bytes()
        return
    try:
        with gzip.open(place) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = pathlib.PurePosixPath(member.name).name
                if name in names and member.isfile():
                    yield name, tar.extractfile(member).read()
            while file.read(1 << 20):  # tar stops before gzip's checksum is compared
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, OSError, zlib.error) as error:
        raise ArchiveError(f"{place} is damaged or incomplete: {error}") from error


def _binary(content: bytes, label: int):
    size = label + 1 + 3072
    if len(content) % size or not content:
        raise ArchiveError(f"{len(content)} bytes are not records of {size}")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return records[:, label + 1 :], records[:, label].astype(np.int32)


def _pickled(content: bytes, label: bytes):
    keys = (b"data", label)
    try:
        batch = _IntegersOnly(io.BytesIO(content), encoding="bytes").load()
        rows, labels = (getattr(batch[key], "array", batch[key]) for key in keys)
        rows, labels = np.asarray(rows), np.asarray(labels, np.int32)
    except ArchiveError:
        raise
    except Exception as error:  # damaged pickles raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ArchiveError(f"damaged or no CIFAR batch: {reason}") from error
    if rows.dtype != np.uint8:
        raise ArchiveError(f"pixels are {rows.dtype}, not uint8")
    return rows, labels


class _Type:
    """Takes the place of numpy.dtype in a pickle."""

    def __init__(self, name, *_):
        name = name.decode() if isinstance(name, bytes) else name
        if name not in ("u1", "i4", "i8"):
            raise ArchiveError(f"its pickle asks for numbers of type {name!r}: refused")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Takes the place of numpy.ndarray in a pickle."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        _, shape, kind, fortran, content = state
        array = np.frombuffer(content, kind.dtype)
        self.array = array.reshape(shape, order="F" if fortran else "C")


def _encode(text, encoding):
    """How Python 3 pickles bytes for Python 2."""
    if encoding != "latin1":
        raise ArchiveError(f"its pickle asks for text in {encoding!r}: refused")
    return text.encode("latin1")


CLASSES_LIMIT = 20_000  # of an .npz: an evaluation counts in (classes, classes)

_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): None,  # an argument of the former
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
}


class _IntegersOnly(pickle.Unpickler):
    """Builds what arrays of integers are pickled as; refuses every other name."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _STAND_INS:
            raise ArchiveError(f"its pickle asks for {module}.{name}: refused")
        return _STAND_INS[module, name]


def npz(path: pathlib.Path, split: str):
    """The arrays x_train, y_train, x_test and y_test of a file of numpy.savez.

    x: uint8, (N, H, W), (N, H, W, 1) or (N, H, W, 3); y: integers from 0, (N,) or
    (N, 1). An optional num_classes; without it the largest label of both splits + 1.
    Grey images get three equal channels.
    """
    if not path.is_file():
        raise ArchiveError(f"no file {path.absolute()} (--config.data.name, .dir)")
    try:
        with np.load(path) as file:  # numpy refuses pickles by default
            missing = {"x_train", "y_train", "x_test", "y_test"} - set(file.files)
            names = {f"x_{split}", "y_train", "y_test", "num_classes"}
            arrays = {name: file[name] for name in names & set(file.files)}
    except Exception as error:  # zip files raise anything
        reason = str(error) or type(error).__name__
        raise ArchiveError(f"{path} is damaged or no .npz: {reason}") from error
    if missing:
        raise ArchiveError(f"{path} lacks the arrays {', '.join(sorted(missing))}")
    images = arrays[f"x_{split}"]
    grey = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 1)
    colour = images.ndim == 4 and images.shape[-1] == 3
    if images.dtype != np.uint8 or not (grey or colour) or 0 in images.shape[1:]:
        raise ArchiveError(
            f"{path}: x_{split} is {images.dtype} {images.shape}, not uint8 (N, H, W), "
            "(N, H, W, 1) or (N, H, W, 3)"
        )
    for name in ("y_train", "y_test"):
        array, n = arrays[name], arrays[name].size
        if array.dtype.kind not in "iu" or array.shape not in ((n,), (n, 1)):
            raise ArchiveError(
                f"{path}: {name} is {array.dtype} {array.shape}, not integers (N,)"
            )
    labels = arrays[f"y_{split}"].reshape(-1)
    if len(labels) != len(images):
        raise ArchiveError(
            f"{path}: {len(images)} {split} images, {len(labels)} labels"
        )
    if grey:
        images = np.repeat(images.reshape(*images.shape[:3], 1), 3, axis=-1)
    if "num_classes" in arrays:
        if arrays["num_classes"].shape or arrays["num_classes"].dtype.kind not in "iu":
            raise ArchiveError(f"{path}: num_classes is not one integer")
        if not 0 < (classes := int(arrays["num_classes"])) <= CLASSES_LIMIT:
            raise ArchiveError(
                f"{path}: num_classes is {classes}, not one of 1 to {CLASSES_LIMIT:,}"
            )
        return images, labels, classes
    both = arrays["y_train"].size + arrays["y_test"].size
    largest = max(int(arrays[y].max(initial=0)) for y in ("y_train", "y_test"))
    if largest >= both:
        raise ArchiveError(
            f"{path}: a label is {largest}, more than there are images ({both}): an "
            "array num_classes must say how many classes there are"
        )
    return images, labels, largest + 1


def _svhn(root: pathlib.Path, parts: list[str]):
    """Format 1 or 2 "cropped digits"; the label 10 is the digit 0."""
    from scipy.io import loadmat

    images, labels = [], []
    for part in parts:
        path = root / f"{part}_32x32.mat"
        if not path.is_file():
            raise ArchiveError(f"{root} lacks {path.name}")
        try:
            content = loadmat(path, variable_names=("X", "y"))
            rows, batch = content["X"], content["y"].reshape(-1).astype(np.int32)
        except Exception as error:  # scipy raises anything on damaged files
            reason = f"{type(error).__name__}: {error}"
            raise ArchiveError(f"{path} is damaged or incomplete: {reason}") from error
        if rows.shape != (32, 32, 3, len(batch)) or rows.dtype != np.uint8:
            raise ArchiveError(
                f"{path}: images are {rows.dtype} {rows.shape} for {len(batch)} labels"
            )
        if (wrong := batch[(batch < 1) | (batch > 10)]).size:
            raise ArchiveError(f"{path}: label {wrong[0]} is not one of 1 to 10")
        images.append(rows.transpose(3, 0, 1, 2))
        labels.append(batch % 10)
    return np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels), 10
