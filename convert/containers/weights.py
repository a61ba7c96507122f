"""What a weight file holds."""

from typing import NamedTuple

import numpy as np


class Weights(NamedTuple):
    """The tensors of a file, in their order, with the framework's names and layouts.

    skipped: what else the file holds. container: its kind.
    """

    tensors: dict[str, np.ndarray]
    skipped: list[str]
    container: str = ""
