"""The error of data sets, and the checks that all sources share."""

import contextlib
import errno
import itertools
import math
import os
from collections.abc import Sequence

import numpy as np


class DataError(ValueError):
    """Data that is missing, damaged or does not fit; the message names the remedy."""


@contextlib.contextmanager
def reading(path: os.PathLike | str):
    """Turns every exception of a reader into a DataError that names the path."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # zip files, TFDS, Pillow, array_record raise anything
        check_open_files(error)
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} is damaged or incomplete: {reason}. Restore it, set "
            "--config.data.dir to another copy, or use --config.data.name=digits, "
            "which needs no files"
        ) from error


def check_open_files(error: Exception) -> None:
    """Raises DataError if the cause is the limit on open files, not the data."""
    reason = os.strerror(errno.EMFILE)
    if reason in str(error):  # array_record's exception has no errno
        raise DataError(
            f"{reason}: raise the limit with `ulimit -n`, or write fewer shards"
        ) from error


def check_labels(
    name: str, split: str, labels: np.ndarray, class_names: Sequence
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns int32 labels and text class names; DataError if labels do not fit."""
    num_classes = len(class_names)
    if not len(labels):
        raise DataError(f"{name}: the {split} split is empty")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        from_1 = (low, high) == (1, num_classes)
        remedy = ": subtract 1 from all labels" if from_1 else ""
        raise DataError(
            f"{name}: {split} labels lie in {low}..{high}, but {num_classes} classes "
            f"are numbered 0..{num_classes - 1}{remedy}"
        )
    return labels.astype(np.int32), tuple(map(str, class_names))


def absent_labels(labels: np.ndarray, num_classes: int) -> str:
    """Returns the labels in 0..num_classes - 1 that never occur, e.g. '0, 3..9'."""
    edges = [-1, *np.unique(labels).tolist(), num_classes]
    absent = [(a + 1, b - 1) for a, b in itertools.pairwise(edges) if b - a > 1]
    return some([str(a) if a == b else f"{a}..{b}" for a, b in absent])


def some(items: Sequence, most: int = 5, separator: str = ", ") -> str:
    """Joins up to `most` items; an ellipsis stands for the others."""
    rest = ["..."] * (len(items) > most)
    return separator.join(map(str, [*items[:most], *rest]))


def check_memory(count: int, shape: Sequence[int]) -> None:
    """Raises DataError if `count` images of `shape` (H, W, 3) do not fit in memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (needed := count * math.prod(shape)) > memory:
        raise DataError(
            f"{count} images of {shape[1]}x{shape[0]} take {needed / 1e9:.0f} GB, this "
            f"machine has {memory / 1e9:.0f} GB: set --config.data.crop=inception to "
            "read them from disk as they are needed"
        )
