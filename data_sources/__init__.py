"""What lies on disk -> a split, in memory or on disk.

config.data.name is 'digits' (embedded), the path of an .npz file, or a set in
config.data.dir: prepared by TFDS, an archive as its authors published it, or a folder
with one subfolder per class, which may lie elsewhere. The first that exists is read.
"""

import contextlib
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict

from data_sources import archives, digits, folders, missing, tfds
from data_sources.crops import CROPS
from data_sources.photographs import OnDisk
from data_sources.split import (
    BORDERS,
    DataError,
    InMemory,
    absent_labels,
    check_labels,
    is_of_recipe,
    statistics,
    tensorflow,
)

__all__ = [
    "BORDERS",
    "CROPS",
    "DataError",
    "InMemory",
    "OnDisk",
    "find",
    "is_of_recipe",
    "load",
    "statistics",
    "tensorflow",
]


class Source(NamedTuple):
    """How a kind of data set is read; all take its path, config.data and a split.

    load: returns images (N, H, W, 3), labels (N,) and class names.
    open: returns labels, class names, functions of i: encoded image i, its name, and a
      function () that names the version of the files; None if the images are small.
    """

    load: Callable
    open: Callable | None = None


SOURCES = {
    "digits": Source(digits.load_images),
    "npz": Source(archives.load_npz),
    "tfds": Source(tfds.load_images, tfds.open_images),
    "archive": Source(archives.load_images),
    "folders": Source(folders.load_images, folders.open_images),
}


def find(
    data: ConfigDict,
) -> tuple[Source, pathlib.Path | None, list[pathlib.Path]]:
    """Returns the source of config.data, its path, and others that have its name.

    The path is None if the set must be downloaded. Raises DataError if there is none,
    or if it cannot be read with data.crop.
    """
    with _accessing(data):
        [(kind, path), *others] = _find(data)
    source = SOURCES[kind]
    if data.crop != "pad" and not source.open:
        raise DataError(
            f"data.crop={data.crop!r} reads photographs, but {data.name} holds small "
            "images, which are read into memory: set --config.data.crop=pad"
        )
    return source, path, [path for _, path in others]


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


def load(data: ConfigDict, split: str) -> InMemory | OnDisk:
    """Loads a split ('train' or 'test') of config.data, in a fixed order.

    Into memory if data.crop is 'pad'; otherwise the images stay on disk. May run in a
    thread. Uses the network only if data.download is set. Raises DataError if the data
    is missing, damaged or misnamed.
    """
    source, path, others = find(data)
    if others and split == "test":  # each run loads it, once
        listed = " or ".join(map(str, others))
        logging.info("%s is read from %s, not from %s", data.name, path, listed)
    if path is None:
        path = tfds.download(data, _root(data))
    with _accessing(data):
        if data.crop == "pad":
            images, labels, names = source.load(path, data, split)
        else:
            labels, names, read, name, version = source.open(path, data, split)
    names = tuple(map(str, names))
    labels = check_labels(data.name, split, labels, len(names))
    if split == "train" and (absent := absent_labels(labels, len(names))):
        logging.warning(
            "%s: no training image has the label %s, of %d classes",
            *(data.name, absent, len(names)),
        )
    if data.crop == "pad":
        return InMemory(images, labels, names)
    options = data.crop, data.image_size, data.on_error
    as_stored = source is SOURCES["tfds"] or is_of_recipe(data)
    return OnDisk(labels, names, read, name, *options, as_stored, version)
