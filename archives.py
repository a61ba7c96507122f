"""Data sets as their authors publish them: CIFAR's archives, SVHN's .mat files.

Where config.data.dir holds no prepared TFDS set of the name, it may hold one of these,
as downloaded or unpacked. A pickle can run any code when it is read, so CIFAR's are
read by an unpickler that knows numpy arrays and nothing else.
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
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        rows, labels = np.asarray(batch[b"data"]), np.asarray(batch[label], np.int32)
    except ArchiveError:
        raise
    except Exception as error:  # damaged pickles raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ArchiveError(f"damaged or no CIFAR batch: {reason}") from error
    if rows.dtype != np.uint8:
        raise ArchiveError(f"pixels are {rows.dtype}, not uint8")
    return rows, labels


class _ArraysOnly(pickle.Unpickler):
    """Builds what numpy arrays are pickled as; refuses every other name."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),  # how Python 3 pickles bytes for Python 2
        }
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise ArchiveError(f"its pickle asks for {module}.{name}: refused")
        return super().find_class(module, name)


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
