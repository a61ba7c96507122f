"""Image directories with one folder per class: NAME/{train,test}/CLASS/*.jpg."""

import os
import pathlib
import re

import numpy as np
from PIL import Image

SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}
SUFFIXES = (".jpg", ".jpeg", ".png")  # in capitals, too


class FolderError(ValueError):
    """A directory that is not what it should be; the message says how."""


def find(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """root/NAME, if it has a folder 'train'; None if not."""
    plain = re.fullmatch(r"\w[\w./-]*", name) and ".." not in name
    return root / name if plain and (root / name / "train").is_dir() else None


def read(
    directory: pathlib.Path, split: str
) -> tuple[list[pathlib.Path], np.ndarray, list[str]]:
    """The files of a split, in order, the class of each, (N,) int32, and their names.

    Classes are numbered as the names of their folders are sorted. Raises FolderError if
    a folder is missing or empty, or if the other split has other classes.
    """
    places = {name: _place(directory, name) for name in SPLITS}
    classes = {name: _classes(place) for name, place in places.items()}
    if differing := sorted(set(classes["train"]) ^ set(classes["test"])):
        listed = ", ".join(differing[:5])
        raise FolderError(
            f"{places['train']} has {len(classes['train'])} classes, {places['test']} "
            f"{len(classes['test'])}: only one of them has {listed}"
        )
    paths, labels = [], []
    for label, name in enumerate(classes[split]):
        found = _files(places[split] / name)
        if not found:
            raise FolderError(
                f"{places[split] / name} has no pictures ({', '.join(SUFFIXES)})"
            )
        paths += found
        labels += [label] * len(found)
    return paths, np.array(labels, np.int32), classes[split]


def decode(paths: list[pathlib.Path]) -> np.ndarray:
    """(N, H, W, 3) uint8 of pictures of one size.

    Raises FolderError with the name of the file that has another size or is damaged.
    """
    images = None
    for i, path in enumerate(paths):
        try:
            pixels = np.asarray(Image.open(path).convert("RGB"))
        except Exception as error:  # Pillow raises anything on damaged files
            raise FolderError(f"{path} is damaged or no picture: {error}") from error
        if images is None:
            images = np.empty((len(paths), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            sizes = [
                "x".join(map(str, x[:2])) for x in (images.shape[1:], pixels.shape)
            ]
            raise FolderError(
                f"{path} is {sizes[1]}, the first picture {sizes[0]}: photographs of "
                "several sizes need --config.data.crop=inception"
            )
        images[i] = pixels
    return images


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


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    with os.scandir(folder) as entries:
        names = sorted(
            x.name
            for x in entries
            if x.name.lower().endswith(SUFFIXES) and not x.name.startswith(".")
        )
    return [folder / name for name in names]
