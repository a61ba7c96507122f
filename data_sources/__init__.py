"""Finds data sets, and loads their splits into memory or opens them on disk.

config.data.name is 'digits' (embedded), the path of an .npz file, or a set in
config.data.dir: prepared by TFDS, an archive as its authors published it, or a folder
with one subfolder per class, which may lie elsewhere. The first that exists is read.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict

from data_sources import archives, digits, folders, missing, npz, tfds
from data_sources.borders import BORDERS
from data_sources.errors import DataError, absent_labels, check_labels
from data_sources.options import in_memory, is_of_recipe
from data_sources.photographs import OnDisk
from data_sources.split import InMemory, statistics
from data_sources.tf import tensorflow

__all__ = [
    "BORDERS",
    "DataError",
    "DataSet",
    "InMemory",
    "OnDisk",
    "find",
    "in_memory",
    "is_of_recipe",
    "statistics",
    "tensorflow",
]


class Source(NamedTuple):
    """How a kind of data set is read; all take its path, config.data and a split.

    load: returns images (N, H, W, 3), labels (N,) and class names.
    open: returns i -> encoded image i, i -> its name, () -> a name for the version of
      the files, labels and class names. None if the images are small.
    """

    load: Callable
    open: Callable | None = None


SOURCES = {
    "digits": Source(digits.load_images),
    "npz": Source(npz.load_images),
    "tfds": Source(tfds.load_images, tfds.open_images),
    "archive": Source(archives.load_images),
    "folders": Source(folders.load_images, folders.open_images),
}


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set that has been found, but not read.

    data: config.data. found: None if the set must be downloaded. others: further sets
    of the same name.
    """

    data: ConfigDict
    source: Source
    found: pathlib.Path | None
    others: list[pathlib.Path]

    @functools.cached_property
    def path(self) -> pathlib.Path:
        """The path of the set, which is downloaded if it is missing."""
        return self.found or tfds.download(self.data, _root(self.data))

    def load(self, split: str) -> InMemory | OnDisk:
        """Loads a split ('train' or 'test'), always in the same order.

        Into memory, or the images stay on disk: options.in_memory. May run in a thread.
        Uses the network only if data.download is set. Raises DataError if the data is
        missing, damaged or misnamed.
        """
        data = self.data
        if split not in ("train", "test"):
            raise DataError(f"unknown split {split!r}: choose train or test")
        if self.others and split == "test":  # each run loads it, once
            places = data.name, self.path, " or ".join(map(str, self.others))
            logging.info("%s is read from %s, not from %s", *places)
        if not in_memory(data):
            tensorflow()  # if it is missing, fails here and not with the first batch
        read = self.source.load if in_memory(data) else self.source.open
        with _accessing(data):
            *access, labels, names = read(self.path, data, split)
        labels, names = check_labels(data.name, split, labels, names)
        absent = absent_labels(labels, len(names))
        if split == "train" and absent:
            logging.warning(
                "%s: no training image has the label %s, of %d classes",
                *(data.name, absent, len(names)),
            )
        if in_memory(data):
            return InMemory(*access, labels, names)
        stored = self.source is SOURCES["tfds"] or is_of_recipe(data)
        options = data.crop, data.image_size, data.on_error, stored
        return OnDisk(labels, names, *access, *options)


def find(data: ConfigDict) -> DataSet:
    """Finds the data set of config.data, without reading images.

    Raises DataError if there is none, or if it cannot be read with data.crop.
    """
    with _accessing(data):
        [(kind, path), *others] = _find(data)
    source = SOURCES[kind]
    if not in_memory(data) and not source.open:
        raise DataError(
            f"data.crop={data.crop!r} reads photographs, but {data.name} holds small "
            "images, which are read into memory: set --config.data.crop=pad"
        )
    return DataSet(data, source, path, [path for _, path in others])


def _find(data: ConfigDict) -> list[tuple[str, pathlib.Path | None]]:
    """Returns the kind and path of each set that data.name may mean, by preference."""
    root, name = _root(data), data.name
    if name == "digits":
        if others := folders.find(root, name):
            raise DataError(
                f"digits is the name of the embedded digits and of the folder "
                f"{others[0]}: set --config.data.name={others[0].absolute()} to read "
                "the folder, or another --config.data.dir to read the digits"
            )
        others = folders.find(pathlib.Path.cwd(), name)
        return [("digits", digits.FILE), *(("folders", path) for path in others)]
    if name.lower().endswith(".npz"):
        folder = pathlib.Path(os.path.expanduser(data.dir))
        return [("npz", folder / os.path.expanduser(name))]
    found = [("tfds", tfds.find(root, name)), ("archive", archives.find(root, name))]
    found += [("folders", path) for path in folders.find(root, name)]
    found = [(kind, path) for kind, path in found if path]
    if not found and not data.download:
        raise missing.not_found(data, root)
    return found or [("tfds", None)]


def _root(data: ConfigDict) -> pathlib.Path:
    root = data.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(os.path.expanduser(root))


@contextlib.contextmanager
def _accessing(data: ConfigDict):
    """Turns missing permissions, unusable names and the like into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot read {data.name}: {error}") from error
