"""The published archives of CIFAR and SVHN, as downloaded or unpacked."""

import gzip
import pathlib
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from data_sources import pickles
from data_sources.errors import DataError, reading


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


def _archives(name: str, folders: list[str], splits: dict, count: int, labels: list):
    """Returns the pickled archive and the binary one, whose files end in .bin."""
    binary = {split: [f"{x}.bin" for x in files] for split, files in splits.items()}
    files = f"{name}-python.tar.gz", f"{name}-binary.tar.gz"
    count = {"train": count, "test": 10_000}
    rows = zip(files, folders, (splits, binary), labels, strict=True)
    return [Archive(file, folder, x, count, y) for file, folder, x, y in rows]


CIFAR: dict[str, list[Archive]] = {
    "cifar10": _archives(
        "cifar-10",
        ["cifar-10-batches-py", "cifar-10-batches-bin"],
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        10_000,
        [b"labels", 0],
    ),
    "cifar100": _archives(
        "cifar-100",
        ["cifar-100-python", "cifar-100-binary"],
        {"train": ["train"], "test": ["test"]},
        50_000,
        [b"fine_labels", 1],  # in a record, the coarse label comes first
    ),
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
        parts, classes = _svhn(path, SVHN[data.name][split]), range(10)
    else:
        choices, classes = CIFAR[data.name], CLASS_NAMES[data.name]
        archive = next(x for x in choices if path.name in (x.folder, x.file))
        parts = _cifar(path, archive, split)
    images, labels = map(np.concatenate, zip(*parts, strict=True))
    return np.ascontiguousarray(images), labels, classes


def _cifar(path: pathlib.Path, archive: Archive, split: str) -> Iterator:
    """Yields images and labels of each file."""
    names = archive.splits[split]
    with reading(path):
        found = dict(_members(path, names))
    if missing := [name for name in names if name not in found]:
        raise DataError(
            f"{path} lacks {', '.join(missing)}: download or unpack it again"
        )
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
        yield rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), batch


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


def _svhn(root: pathlib.Path, parts: list[str]) -> Iterator:
    """Yields images and labels of each file of cropped digits; label 10 is digit 0."""
    from scipy.io import loadmat  # slow to import

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
        yield rows.transpose(3, 0, 1, 2), batch % 10
