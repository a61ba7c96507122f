"""Image directories with one folder per class: NAME/{train,test}/CLASS/*.jpg."""

import collections
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import logging
from PIL import Image

from data_sources import crops

SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
SUFFIXES = (".jpg", ".jpeg", ".png")  # in capitals, too


class FolderError(ValueError):
    """A directory that is not what it should be; the message says how."""


def find(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """root/NAME, or NAME if that is a path with a /, where a folder 'train' is."""
    path = pathlib.Path(os.path.expanduser(name))
    places = [] if ".." in path.parts else [root / path]
    if os.path.dirname(name):
        places.append(path)
    found = (x for x in places if path.name and (x / "train").is_dir())
    return next(found, None)


def read(
    directory: pathlib.Path, split: str
) -> tuple[list[pathlib.Path], np.ndarray, list[str]]:
    """The files of a split, in order, the class of each, (N,) int32, and their names.

    Classes are numbered as the names of their folders are sorted. Raises FolderError if
    a folder is missing or empty, if there is but one class, or if the other split has
    other classes. What is not read for its suffix is told.
    """
    places = {name: _place(directory, name) for name in SPLITS}
    classes = {name: _classes(place) for name, place in places.items()}
    if differing := sorted(set(classes["train"]) ^ set(classes["test"])):
        listed = ", ".join(differing[:5])
        raise FolderError(
            f"{places['train']} has {len(classes['train'])} classes, {places['test']} "
            f"{len(classes['test'])}: only one of them has {listed}"
        )
    if len(classes[split]) < 2:
        raise FolderError(
            f"{places[split]} has the class {classes[split][0]} alone, and nothing to "
            "tell it from: there must be a folder for each of two classes or more"
        )
    paths, labels, left_out = [], [], collections.Counter()
    for label, name in enumerate(classes[split]):
        found, others = _files(places[split] / name)
        if not found:
            raise FolderError(
                f"{places[split] / name} has no pictures ({', '.join(SUFFIXES)})"
            )
        paths += found
        labels += [label] * len(found)
        left_out.update(others)
    if left_out:
        listed = ", ".join(f"{n} {suffix}" for suffix, n in left_out.most_common())
        logging.warning(
            "%s: %d files are left out, for their suffixes (%s); read are %s",
            places[split],
            left_out.total(),
            listed,
            ", ".join(SUFFIXES),
        )
    return paths, np.array(labels, np.int32), classes[split]


def decode(
    paths: list[pathlib.Path], on_error: str = "raise"
) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W, 3) uint8 of pictures of one size, and which of the files they are.

    Raises FolderError with the name of the file that has another size or is damaged;
    with on_error 'skip' the damaged ones are left out, and told.
    """
    images, kept, failures = None, [], []
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as picture:
                pixels = crops.rgb(picture)
        except Exception as error:  # Pillow raises anything on damaged files
            failure = f"{path} is damaged or no picture: {error}"
            if on_error != "skip":
                remedy = "Restore it, or set --config.data.on_error=skip"
                raise FolderError(f"{failure}. {remedy}") from error
            failures.append(failure)
            continue
        if images is None:
            refuse_too_large(len(paths), pixels.shape)
            images = np.empty((len(paths), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            sizes = [
                "x".join(map(str, x[:2])) for x in (images.shape[1:], pixels.shape)
            ]
            raise FolderError(
                f"{path} is {sizes[1]}, the first picture {sizes[0]}: photographs of "
                "several sizes need --config.data.crop=inception"
            )
        images[len(kept)] = pixels
        kept.append(i)
    if not kept:
        raise FolderError(f"none of {len(paths)} pictures is left: {failures[0]}")
    if failures:
        logging.warning(
            "%d pictures are left out: %s", len(failures), "; ".join(failures[:3])
        )
    return images[: len(kept)], np.array(kept)


def refuse_too_large(count: int, shape: Sequence[int]) -> None:
    """Raises FolderError if so many pictures (H, W, 3) exceed the machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (needed := count * math.prod(shape)) > memory:
        raise FolderError(
            f"{count} pictures of {shape[1]}x{shape[0]} take "
            f"{needed / 1e9:.0f} GB of {memory / 1e9:.0f} GB of memory: "
            "--config.data.crop=inception reads them as they are needed"
        )


def _place(directory: pathlib.Path, split: str) -> pathlib.Path:
    for name in SPLITS[split]:
        if (directory / name).is_dir():
            return directory / name
    raise FolderError(f"{directory} lacks a folder {' or '.join(SPLITS[split])}")


def _classes(place: pathlib.Path) -> list[str]:
    with os.scandir(place) as entries:
        names = sorted(
            x.name for x in entries if x.is_dir() and not x.name.startswith(".")
        )
    if not names:
        raise FolderError(f"{place} has no folders: there must be one for each class")
    return names


def _files(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """The pictures of a folder, sorted, and the suffixes of its other files."""
    with os.scandir(folder) as entries:
        names = sorted(x.name for x in entries if not x.name.startswith("."))
    found = [x for x in names if x.lower().endswith(SUFFIXES)]
    others = [
        pathlib.Path(x).suffix.lower() or "without" for x in set(names) - {*found}
    ]
    return [folder / name for name in found], others
