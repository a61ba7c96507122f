"""The content of a weight file."""

import json
import math
from typing import NamedTuple

import numpy as np

from convert.containers.cursor import ContainerError

KEY = "normalization"  # in the metadata of a file that we have written


class Normalization(NamedTuple):
    """Mean and standard deviation per channel, on the scale 0..255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Weights(NamedTuple):
    """The tensors of a file, in order, with the framework's names and layouts.

    skipped: names of other content. container: the format of the file. normalization:
    of the images, if the file states it.
    """

    tensors: dict[str, np.ndarray]
    skipped: list[str]
    container: str = ""
    normalization: Normalization | None = None


def to_metadata(normalization: Normalization) -> dict[str, str]:
    """Returns the metadata of a file, texts by name; floats are exact."""
    return {KEY: json.dumps(normalization._asdict())}


def from_metadata(metadata: dict[str, str]) -> Normalization | None:
    """Returns the normalisation that a file states, or None; refuses a wrong one."""
    if KEY not in metadata:
        return None
    stated = json.loads(metadata[KEY])
    mean, std = tuple(stated["mean"]), tuple(stated["std"])
    valid = len(mean) == len(std) == 3 and min(std) > 0
    if not valid or not all(map(math.isfinite, mean + std)):
        raise ContainerError(f"its normalisation is impossible: {metadata[KEY]:.100}")
    return Normalization(mean, std)
