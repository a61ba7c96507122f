"""Image folders with one folder per class: NAME/{train,test}/CLASS/*.jpg.

Images in sub-folders of a class belong to it.
"""

import collections
import contextlib
import os
import pathlib
import zlib

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from data_sources import decoding
from data_sources.errors import DataError, check_memory, some
from data_sources.options import is_of_recipe
from data_sources.photographs import undecodable

# The names of their folders, in any case; the first that exists.
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "valid", "validation"),
}
EXTENSIONS = (".jpg", ".jpeg", ".png")  # in any case
# Folders of operating systems and storage devices, besides hidden ones.
SYSTEM = (
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
)


def find(root: pathlib.Path, name: str) -> list[pathlib.Path]:
    """Returns root/NAME and, if it is a path, NAME itself: those with a split."""
    path = pathlib.Path(os.path.expanduser(name))
    candidates = [] if ".." in path.parts else [root / path]
    if os.path.dirname(name):
        candidates.append(path)
    has_split = lambda x: any(split_folders(x, split) for split in SPLITS)
    found = [x for x in candidates if path.name and has_split(x)]
    return found[: 1 if len(found) > 1 and os.path.samefile(*found) else 2]


def load_images(directory: pathlib.Path, data: ConfigDict, split: str):
    """Decodes images of equal size.

    Returns images (N, H, W, 3) uint8, labels (N,) and the class names. With
    on_error='skip', damaged files are skipped and logged. Raises DataError that names a
    file which is damaged or has another size.
    """
    paths, labels, class_names = _list(directory, data.name, split)
    images, good, failures = None, [], []
    for i, path in enumerate(paths):
        try:
            with decoding.open_image(path) as image:
                pixels = decoding.rgb(image, is_of_recipe(data))
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
        logging.warning("skipped %d images: %s", len(failures), some(failures, 3, "; "))
    return images[: len(good)], labels[good], class_names


def open_images(directory: pathlib.Path, data: ConfigDict, split: str):
    """Returns functions as data_sources.Source says, labels (N,) and class names."""
    paths, labels, class_names = _list(directory, data.name, split)

    def version():
        facts = []
        for path in paths:
            with contextlib.suppress(OSError):  # a broken link
                stat = path.stat()
                facts.append((str(path), stat.st_size, stat.st_mtime_ns))
        return f"folders-{len(paths)}-{zlib.crc32(repr(facts).encode()):08x}"

    read, name = lambda i: paths[i].read_bytes(), lambda i: str(paths[i])
    return read, name, version, labels, class_names


def _list(
    directory: pathlib.Path, set_name: str, split: str
) -> tuple[list[pathlib.Path], np.ndarray, list[str]]:
    """Returns the files of a split in order, their labels (N,) int32, the class names.

    Classes are numbered in the sorted order of their folders' names. Raises DataError
    if a folder is missing or empty, if there is only one class, or if the classes of
    both splits differ. The test folder suffices to evaluate: a run knows the classes
    that it has learned. Logs the files that are skipped.
    """
    folders = _choose(directory, split)
    classes = {name: subfolders(folder) for name, folder in folders.items()}
    if empty := [folders[name] for name in folders if not classes[name]]:
        raise DataError(
            f"{empty[0]} has no folders, one for each class is required: "
            f"{contents(empty[0])}"
        )
    if differing := sorted({*classes[split]} ^ {*classes["test"]}):
        raise DataError(
            f"{folders['train']} has {len(classes['train'])} classes, "
            f"{folders['test']} {len(classes['test'])}; only one of them has "
            f"{some(differing)}"
        )
    folder, names = folders[split], classes[split]
    if len(names) < 2:
        inner = subfolders(folder / names[0])
        raise DataError(
            f"{folder} has only the class {names[0]}: at least 2 class folders are "
            "required"
            + (f"; move those in {names[0]} ({some(inner)})" if inner else "")
        )
    paths, labels, skipped, deeper = [], [], collections.Counter(), []
    for label, name in enumerate(names):
        found, extensions = _files(folder / name)
        if not found:
            listed = contents(folder / name)
            raise DataError(
                f"{folder / name} has no images ({', '.join(EXTENSIONS)}): {listed}"
            )
        paths += found
        labels += [label] * len(found)
        deeper += [x for x in found if x.parent != folder / name]
        skipped.update(extensions)
    logging.info(
        "reading %s (%s, %s images) from %s",
        *(set_name, split, f"{len(paths):,}", folder),
    )
    if deeper:
        logging.warning(
            "%s: %d images lie in sub-folders of their class, such as %s",
            *(folder, len(deeper), deeper[0].parent),
        )
    if loose := sum(x.lower().endswith(EXTENSIONS) for x in _file_names(folder)):
        logging.warning("%s: skipped %d images outside of class folders", folder, loose)
    if skipped:
        listed = ", ".join(f"{n} {extension}" for extension, n in skipped.most_common())
        logging.warning(
            "%s: skipped %d files with unsupported extensions (%s); supported: %s",
            *(folder, skipped.total(), listed, ", ".join(EXTENSIONS)),
        )
    return paths, np.array(labels, np.int32), names


def _choose(directory: pathlib.Path, split: str) -> dict[str, pathlib.Path]:
    """Returns the folders that a split requires: for 'train', of both splits.

    A test folder without labels, which has no class of the training images, is passed
    over if there is another.
    """
    train = split_folders(directory, "train")[:1]
    classes = {name for folder in train for name in subfolders(folder)}
    tests = split_folders(directory, "test")
    fits = lambda x: classes & {*subfolders(x)} if classes else len(subfolders(x)) > 1
    test = [x for x in tests if fits(x)][:1] or tests[:1]
    found = {"train": train, "test": test} if split == "train" else {"test": test}
    for name, folders in found.items():
        if not folders:
            raise DataError(
                f"{directory} has no folder {' or '.join(SPLITS[name])}: "
                f"{contents(directory)}. Rename a folder, or move some images of each "
                f"class to {directory / name}/CLASS"
            )
    if split == "test" and test != tests[:1]:
        logging.warning("%s has no labels: testing on %s", tests[0], test[0])
    return {name: folder for name, [folder] in found.items()}


def split_folders(directory: pathlib.Path, split: str) -> list[pathlib.Path]:
    """Returns the folders of a split that exist, the preferred one first."""
    found = subfolders(directory) if os.path.isdir(directory) else []
    by_rank = {name: i for i, name in enumerate(SPLITS[split])}
    found = [x for x in found if x.lower() in by_rank]
    # On Linux, Train and train may both exist.
    found.sort(key=lambda x: (by_rank[x.lower()], x not in by_rank))
    return [directory / name for name in found]


def subfolders(folder: pathlib.Path) -> list[str]:
    """Returns the sorted names of the folders in a folder, without system folders."""
    with os.scandir(folder) as entries:
        return sorted(x.name for x in entries if x.is_dir() and not _ignored(x.name))


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM


def _file_names(folder: pathlib.Path) -> list[str]:
    with os.scandir(folder) as entries:
        return [x.name for x in entries if not x.is_dir() and not _ignored(x.name)]


def contents(folder: pathlib.Path) -> str:
    """Describes what a folder holds, for error messages."""
    parts, names = [], _file_names(folder)
    if inner := subfolders(folder):
        several = f"the {len(inner)} folders {some(inner)}"
        parts.append(several if inner[1:] else inner[0])
    images = sum(name.lower().endswith(EXTENSIONS) for name in names)
    if images:
        parts.append(f"{images} images")
    if others := len(names) - images:
        endings = sorted({pathlib.Path(x).suffix or x for x in names} - {*EXTENSIONS})
        parts.append(f"{others} other files ({some(endings)})")
    return f"it holds {' and '.join(parts) or 'nothing'}"


def _files(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """Returns the images in a folder and below, and its other files' extensions."""
    found, others, seen = [], [], set()

    def refuse(error):
        raise error

    for here, inner, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(here)) in seen:  # a circle of links
            inner.clear()
            continue
        seen.add(real)
        inner[:] = [x for x in inner if not _ignored(x)]
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not _ignored(name):
                found.append(os.path.join(here, name))
            elif not _ignored(name):
                others.append(pathlib.Path(name).suffix.lower() or "none")
    return [pathlib.Path(x) for x in sorted(found)], others
