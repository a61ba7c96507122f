"""Writes the TensorBoard events of a run, and prepares the images that they show."""

import concurrent.futures
import io
import math
import os
import pathlib
import socket
import time
from collections.abc import Mapping

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from runtime.workdir import flatten


class TensorBoard:
    """Writes TensorBoard events in a thread, which also makes and encodes the images.

    A run must not fail because events cannot be written.
    """

    def __init__(self, workdir: pathlib.Path):
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._writer = None
        self._thread.submit(self._open, workdir)

    def write(self, kind: str, *arguments) -> None:
        """Calls a write_... method of EventWriter: 'scalars', 'images' or 'hparams'.

        Arguments that are functions are replaced by their results, in the thread.
        """
        self._thread.submit(self._call, f"write_{kind}", *arguments)

    def close(self) -> None:
        """Writes what is queued and ends the thread."""
        self._thread.shutdown()

    def _open(self, workdir: pathlib.Path) -> None:
        try:
            self._writer = EventWriter(workdir)
        except Exception as error:
            logging.info("no TensorBoard events (%s); see metrics.csv", error)

    def _call(self, method: str, *arguments) -> None:
        if self._writer is None:
            return
        try:
            arguments = [x() if callable(x) else x for x in arguments]
            getattr(self._writer, method)(*arguments)
        except Exception as error:
            logging.warning("no more TensorBoard events are written: %s", error)
            self._writer = None


class EventWriter:
    """Writes an event file; has the methods of clu.metric_writers that a run calls.

    In TensorBoard, the files look like those of clu.metric_writers.SummaryWriter, which
    we do not use because it imports TensorFlow: seconds of CPU time.
    """

    def __init__(self, workdir: str | os.PathLike):
        # TensorBoard reads the files of a run in the order of their names.
        name = f"{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._path = pathlib.Path(workdir) / f"events.out.tfevents.{name}"
        self._write(file_version="brain.Event:2")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = [{"tag": k, "simple_value": v} for k, v in scalars.items()]
        self._write(step=step, summary={"value": values})

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """images: (H, W, 3) or (H, W, 1) uint8 by name."""
        values = [{"tag": k, "image": _encode(v)} for k, v in images.items()]
        self._write(step=step, summary={"value": values})

    def write_hparams(self, hparams: Mapping[str, bool | int | float | str]) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        self._write(summary=hparams_pb(hparams))

    def _write(self, **fields) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        event = Event(wall_time=time.time(), **fields)
        with open(self._path, "ab") as file:
            RecordWriter(file).write(event.SerializeToString())


def _encode(image: np.ndarray) -> dict:
    """Returns the fields of TensorBoard's Summary.Image."""
    height, width, channels = image.shape
    png = io.BytesIO()
    Image.fromarray(image if channels == 3 else image[..., 0]).save(png, "png")
    encoded = {"encoded_image_string": png.getvalue()}
    return {"height": height, "width": width, "colorspace": channels} | encoded


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
