"""Arrays that are slow to make, kept in the user's cache directory."""

import os
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np
from absl import logging


def directory(cache_dir: str = "") -> pathlib.Path:
    """cache_dir, or wirings in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(os.path.expanduser(cache_dir or f"{home}/wirings"))


def kept(
    cache_dir: str, key: str, build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """build(), kept as KEY.npz in directory(cache_dir); its checksums are verified.

    A damaged entry is built again; a directory that cannot be written is a warning.
    """
    folder = directory(cache_dir)
    path = folder / f"{key}.npz"
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        pass
    except Exception as error:  # a flipped bit of a zip file can raise anything
        logging.warning("%s is damaged (%s): reading the data again", path, error)
    arrays = build()
    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            temporary = file.name
            np.savez(file, **arrays)
        os.replace(temporary, path)  # another process may be reading or writing it
    except OSError as error:
        logging.warning("what was read is not kept in %s: %s", folder, error)
        if temporary:
            pathlib.Path(temporary).unlink(missing_ok=True)
    return arrays
