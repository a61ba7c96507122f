"""Reads weight files of other frameworks as arrays by name; executes nothing in them.

    weights = containers.read("model_best.pth.tar")

The first bytes of a file identify its format. The readers require no framework, and no
more memory than a small multiple of the file. neon and Torch7 do not name tensors, so a
name is a position in the module tree, such as "7.3.1.2.4.weight".
"""

import os
import pathlib

from convert.containers import mxnet, neon, npz, safetensors, torch, torch7
from convert.containers.cursor import ContainerError
from convert.containers.weights import Normalization, Weights

__all__ = ["ContainerError", "Normalization", "Weights", "read"]

# The first reader whose `matches` accepts the content reads it. torch precedes npz
# (both are zip archives) and neon (both are pickles). safetensors files begin with a
# length, whose bytes can look like the beginning of any other format.
READERS = {
    "safetensors": safetensors,
    "torch": torch,
    "npz": npz,
    "MXNet": mxnet,
    "Torch7": torch7,
    "neon": neon,
}


MAX_NAME = 500  # characters of a tensor's name, which error messages quote


def read(path: str | os.PathLike) -> Weights:
    """Reads a weight file; raises ContainerError for any file that it cannot read."""
    path = pathlib.Path(os.path.expanduser(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ContainerError(f"{path} cannot be read: {error.strerror}") from error
    for name, reader in READERS.items():
        if not reader.matches(content):
            continue
        try:
            weights = reader.read(content)
        except Exception as error:  # a damaged file can raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ContainerError(
                f"{path} looks like a {name} file but cannot be read: {reason:.200}; "
                "if it may be incomplete or damaged, get a new copy"
            ) from error
        if not weights.tensors:
            raise ContainerError(f"{path}, a {name} file, holds no weights")
        if not all(x.isprintable() and len(x) < MAX_NAME for x in weights.tensors):
            raise ContainerError(
                f"{path} has tensor names that cannot be printed or have {MAX_NAME} "
                "characters or more"
            )
        names = (x if x.isprintable() else ascii(x) for x in weights.skipped)
        skipped = [name[:MAX_NAME] for name in names]
        return weights._replace(skipped=skipped, container=name)
    raise ContainerError(
        f"{path} is not a weight file of a known format: expected one of "
        f"{', '.join(READERS)} (docs/weights.md)"
    )
