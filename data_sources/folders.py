"""Image folders with one subfolder per class: NAME/{train,test}/CLASS/*.jpg."""

import collections
import os
import pathlib

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from data_sources import crops
from data_sources.photographs import undecodable
from data_sources.split import DataError, check_memory, is_of_recipe

SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
EXTENSIONS = (".jpg", ".jpeg", ".png")  # in any case


def find(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """Returns root/NAME, or NAME itself if it is a path, if it has a split's folder."""
    path = pathlib.Path(os.path.expanduser(name))
    candidates = [] if ".." in path.parts else [root / path]
    if os.path.dirname(name):
        candidates.append(path)
    splits = [name for names in SPLITS.values() for name in names]
    found = (x for x in candidates if any((x / name).is_dir() for name in splits))
    return next(found, None) if path.name else None


def load_images(directory: pathlib.Path, data: ConfigDict, split: str):
    """Decodes images of equal size.

    Returns images (N, H, W, 3) uint8, labels (N,) and the class names. With
    on_error='skip', damaged files are skipped and logged. Raises DataError that names a
    file which is damaged or has another size.
    """
    paths, labels, class_names = _list(directory, split)
    logging.info(
        "reading %s (%s, %s images) from %s",
        *(data.name, split, f"{len(paths):,}", directory),
    )
    images, good, failures = None, [], []
    for i, path in enumerate(paths):
        try:
            with crops.open_image(path) as image:
                pixels = crops.rgb(image, is_of_recipe(data))
        except Exception as error:  # Pillow raises anything on damaged files
            failure, remedy = undecodable(path, error)
            if data.on_error != "skip":
                raise DataError(f"{failure}. {remedy}") from error
            failures.append(failure)
            continue
        if images is None:
            check_memory(len(paths), pixels.shape)
            images = np.empty((len(paths), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            (height, width), (other, wide) = images.shape[1:3], pixels.shape[:2]
            raise DataError(
                f"{path} is {other}x{wide}, the first image {height}x{width}: images "
                "of several sizes require --config.data.crop=inception"
            )
        images[len(good)] = pixels
        good.append(i)
    if not good:
        raise DataError(
            f"none of {len(paths)} images can be read; the first error: {failures[0]}"
        )
    if failures:
        logging.warning("skipped %d images: %s", len(failures), "; ".join(failures[:3]))
    return images[: len(good)], labels[good], class_names


def open_images(directory: pathlib.Path, data: ConfigDict, split: str):
    """Returns labels (N,), class names, functions of i: encoded image i, its name."""
    del data
    paths, labels, class_names = _list(directory, split)
    return labels, class_names, lambda i: paths[i].read_bytes(), lambda i: str(paths[i])


def _list(
    directory: pathlib.Path, split: str
) -> tuple[list[pathlib.Path], np.ndarray, list[str]]:
    """Returns the files of a split in order, their labels (N,) int32, the class names.

    Classes are numbered in the sorted order of their folders' names. Raises DataError
    if a folder is missing or empty, if there is only one class, or if the classes of
    both splits differ. Logs the files skipped because of their extension.
    """
    # The test images suffice to evaluate: a run knows the classes that it has learned.
    needed = SPLITS if split == "train" else (split,)
    folders = {name: _split_folder(directory, name) for name in needed}
    classes = {name: _class_names(folder) for name, folder in folders.items()}
    if differing := sorted(set(classes[split]) ^ set(classes["test"])):
        listed = ", ".join(differing[:5])
        raise DataError(
            f"{folders['train']} has {len(classes['train'])} classes, "
            f"{folders['test']} {len(classes['test'])}; only one of them has {listed}"
        )
    if len(classes[split]) < 2:
        raise DataError(
            f"{folders[split]} has only the class {classes[split][0]}: at least 2 "
            "class folders are required"
        )
    paths, labels, skipped = [], [], collections.Counter()
    for label, name in enumerate(classes[split]):
        found, others = _files(folders[split] / name)
        if not found:
            raise DataError(
                f"{folders[split] / name} has no images ({', '.join(EXTENSIONS)})"
            )
        paths += found
        labels += [label] * len(found)
        skipped.update(others)
    if skipped:
        listed = ", ".join(f"{n} {extension}" for extension, n in skipped.most_common())
        logging.warning(
            "%s: skipped %d files with unsupported extensions (%s); supported: %s",
            *(folders[split], skipped.total(), listed, ", ".join(EXTENSIONS)),
        )
    return paths, np.array(labels, np.int32), classes[split]


def _split_folder(directory: pathlib.Path, split: str) -> pathlib.Path:
    for name in SPLITS[split]:
        if (directory / name).is_dir():
            return directory / name
    raise DataError(f"{directory} has no folder {' or '.join(SPLITS[split])}")


def _class_names(folder: pathlib.Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = sorted(
            x.name for x in entries if x.is_dir() and not x.name.startswith(".")
        )
    if not names:
        raise DataError(
            f"{folder} has no class folders: one for each class is required"
        )
    return names


def _files(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """Returns the images of a folder, sorted, and the extensions of its other files."""
    with os.scandir(folder) as entries:
        names = sorted(x.name for x in entries if not x.name.startswith("."))
    found = [x for x in names if x.lower().endswith(EXTENSIONS)]
    others = [pathlib.Path(x).suffix.lower() or "none" for x in set(names) - {*found}]
    return [folder / name for name in found], others
