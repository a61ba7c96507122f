"""The content of a weight file."""

from typing import NamedTuple

import numpy as np


class Weights(NamedTuple):
    """The tensors of a file, in order, with the framework's names and layouts.

    skipped: names of other content. container: the format of the file.
    """

    tensors: dict[str, np.ndarray]
    skipped: list[str]
    container: str = ""
