"""The error for a data set that is not found: what is there, and what to set."""

import itertools
import os
import pathlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from data_sources import archives, folders, npz, tfds
from data_sources.errors import DataError
from data_sources.options import base_name

FILES = {  # that are often given instead of an .npz
    ".npy": "a single array (.npy)",
    ".h5": "an HDF5 file",
    ".hdf5": "an HDF5 file",
    ".mat": "a MATLAB file",
    ".pkl": "a pickle",
    ".pt": "a PyTorch file",
    ".pth": "a PyTorch file",
    ".csv": "a table",
    ".zip": "an archive; unpack it",
}
MOST_FOLDERS = 100  # to search on a level


def not_found(data: ConfigDict, root: pathlib.Path) -> DataError:
    """Returns the error for a set that is not in `root` and may not be downloaded."""
    name, path = data.name, pathlib.Path(os.path.expanduser(data.name))
    places = [root / path, path] if name else []
    if near := next(filter(None, map(_set_near, places)), ""):
        return DataError(f"{name} is not a data set itself: set {near}")
    if name and not path.is_absolute() and (near := _root_near(root, name)):
        return DataError(f"{name} not found in {root.absolute()}: set {near}")
    kind = FILES.get(path.suffix.lower())
    found = any(x.is_file() for x in places)
    if kind or found:
        return DataError(
            f"{name} is {kind or 'a file'}{'' if found else ', and does not exist'}: "
            "--config.data.name takes an .npz file, a directory with "
            f"train/CLASS/*.jpg, or the name of a data set; {npz.SAVEZ}"
        )
    if there := next((x for x in places if os.path.isdir(x)), None):
        train, test = there / "train", there / "test"
        remedy = f"Images belong in {train}/CLASS and {test}/CLASS"
        if _subfolders(there):
            remedy = (
                f"If its folders are the classes, move them to {train}, and some "
                f"images of each class to {test}/CLASS"
            )
        return DataError(
            f"{there} has no folder train with a folder for each class: "
            f"{folders.contents(there)}. {remedy}"
        )
    if path.is_absolute():
        return DataError(f"no directory {path}: check --config.data.name")
    if nearest := tfds.nearest(root, base_name(name)):
        return DataError(
            f"unknown data set {base_name(name)!r}; nearest: "
            f"{', '.join(nearest)}. {root.absolute()} has no folder {name}/train/CLASS "
            "either"
        )
    files = ["a TFDS directory", f"{name}/train/CLASS/*.jpg"]
    expected = " or ".join([*files, *archives.file_names(name)])
    return DataError(
        f"{name} not found in {root.absolute()} (expected {expected}). Set "
        "--config.data.dir, pass --config.data.download=True to download it there, or "
        "use --config.data.name=digits, which needs no files"
    )


def _set_near(path: pathlib.Path) -> str:
    """Returns the settings for a data set that is, holds or contains `path`, or ""."""
    for place in (path, path.parent):
        for name in (*archives.CIFAR, *archives.SVHN):
            found = archives.find(place, name)
            if found and (place == path or found == path):
                return f"--config.data.dir={place.absolute()} --config.data.name={name}"
    if not os.path.isdir(path):
        return ""
    for place in (path, path.parent, path.parent.parent):
        if any(place.glob("[0-9]*/dataset_info.json")):
            directory, name = place.absolute().parent, place.name
            return f"--config.data.dir={directory} --config.data.name={name}"
    splits = {name for names in folders.SPLITS.values() for name in names}
    near = [x.parent for x in (path, path.parent) if x.name.lower() in splits]
    near += _below(path)
    classes = lambda x: map(_subfolders, folders.split_folders(x, "train"))
    found = [x for x in near if any(classes(x))]
    return " or ".join(f"--config.data.name={x.absolute()}" for x in found[:3])


def _root_near(root: pathlib.Path, name: str) -> str:
    """Returns the setting for a set outside of `root`, but close, or ""."""
    if folders.find(pathlib.Path(), name):
        return f"--config.data.name=./{name}"
    root = root.absolute()
    for place in (*root.parents[:2], *_below(root)):
        finders = tfds.find, archives.find, folders.find
        if any(find(place, name) for find in finders):
            return f"--config.data.dir={place}"
    return ""


def _below(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the directories one and two levels below a directory."""
    children = [path / name for name in _subfolders(path)]
    deeper = (x / name for x in children for name in _subfolders(x))
    return itertools.chain(children, itertools.islice(deeper, MOST_FOLDERS))


def _subfolders(path: pathlib.Path) -> list[str]:
    try:
        return folders.subfolders(path)[:MOST_FOLDERS]
    except OSError:  # missing, or not permitted
        return []
