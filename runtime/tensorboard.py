"""TensorBoard events of a run, and the forms of images and configs that it shows."""

import concurrent.futures
import math
import pathlib

import numpy as np
from absl import logging
from ml_collections import ConfigDict

import input_pipeline
from runtime.workdir import flatten


class TensorBoard:
    """Writes TensorBoard events in a thread, which first imports TensorFlow and CLU.

    The import may take longer than compiling the train step. CLU's LoggingWriter is not
    used, since Reporter writes the log. A run must not fail because events cannot be
    written.
    """

    def __init__(self, workdir: pathlib.Path):
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._writer = None
        self._thread.submit(self._open, workdir)

    def write(self, kind: str, *arguments) -> None:
        """Calls a write_... method of clu.metric_writers: 'scalars', 'images', ...

        Arguments that are functions are replaced by their results, in the thread.
        """
        self._thread.submit(self._call, f"write_{kind}", *arguments)

    def close(self) -> None:
        """Writes what is queued and ends the thread."""
        self._thread.submit(self._call, "close")
        self._thread.shutdown()

    def _open(self, workdir: pathlib.Path) -> None:
        try:
            input_pipeline.tensorflow()  # keeps it off the accelerators
            from clu import metric_writers

            self._writer = metric_writers.SummaryWriter(str(workdir))
        except Exception as error:
            cause = error.__cause__ or error
            logging.info("no TensorBoard events (%s); see metrics.csv", cause)

    def _call(self, method: str, *arguments) -> None:
        if self._writer is None:
            return
        try:
            arguments = [x() if callable(x) else x for x in arguments]
            getattr(self._writer, method)(*arguments)
        except Exception as error:
            logging.warning("no more TensorBoard events are written: %s", error)
            self._writer = None


def draw_confusion(confusion: np.ndarray) -> np.ndarray:
    """Draws (classes, classes, 1) uint8; black: all examples of the true class."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    return np.rint(255 * (1 - share)).astype(np.uint8)[..., None]


def tile(images: np.ndarray) -> np.ndarray:
    """Arranges images (N, H, W, 3) in a square grid, padded with black."""
    count, height, width, channels = images.shape
    side = math.ceil(math.sqrt(count))
    grid = np.zeros((side * side, height, width, channels), images.dtype)
    grid[:count] = images
    grid = grid.reshape(side, side, height, width, channels).swapaxes(1, 2)
    return grid.reshape(side * height, side * width, channels)


def to_hparams(config: ConfigDict) -> dict[str, bool | int | float | str]:
    """Returns the flat configuration; TensorBoard accepts no tuples."""
    fields, kinds = flatten(config), (bool, int, float, str)
    return {k: v if isinstance(v, kinds) else str(v) for k, v in fields.items()}
