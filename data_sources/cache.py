"""Arrays that are slow to build, stored in the user's cache directory."""

import os
import pathlib
import tempfile
from collections.abc import Callable

import numpy as np
from absl import logging


def directory(cache_dir: str = "") -> pathlib.Path:
    """Returns cache_dir, or `wirings` in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(os.path.expanduser(cache_dir or f"{home}/wirings"))


def load_or_build(
    cache_dir: str, key: str, build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Loads KEY.npz from directory(cache_dir); if that fails, stores build() there.

    The checksums of the file are verified, and a damaged one is built again. If the
    directory cannot be written, logs a warning.
    """
    folder = directory(cache_dir)
    path = folder / f"{key}.npz"
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        pass
    except Exception as error:  # a flipped bit in a zip file can raise anything
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
        logging.warning("cannot cache the data in %s: %s", folder, error)
        if temporary:
            pathlib.Path(temporary).unlink(missing_ok=True)
    return arrays
