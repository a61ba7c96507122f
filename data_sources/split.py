"""Splits in memory, and what every source of images shares: errors, checks, batches.

A split is InMemory, or OnDisk (photographs.py). Both have len(split), labels (N,)
int32, class_names (one for each class), image_shape, take(), train_batches() and
test_batches().
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import numpy as np
from ml_collections import ConfigDict

BORDERS = ("zero", "mean", "dataset_mean", "white", "reflect")
STEPS_PER_BLOCK = 128


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


def is_of_recipe(data: ConfigDict) -> bool:
    """Returns whether data.name is the data set that the recipe is made for."""
    name = re.split("[:/]", data.name)[0]
    npz = data.name.lower().endswith(".npz")  # perhaps in a folder called like the set
    return data.recipe.name == name != "" and not npz


def check_labels(
    name: str, split: str, labels: np.ndarray, num_classes: int
) -> np.ndarray:
    """Returns the labels as int32; raises DataError if one is out of range."""
    if not len(labels):
        raise DataError(f"{name}: the {split} split is empty")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        remedy = (
            ": subtract 1 from all labels" if (low, high) == (1, num_classes) else ""
        )
        raise DataError(
            f"{name}: {split} labels lie in {low}..{high}, but {num_classes} classes "
            f"are numbered 0..{num_classes - 1}{remedy}"
        )
    return labels.astype(np.int32)


def absent_labels(labels: np.ndarray, num_classes: int) -> str:
    """Returns the labels in 0..num_classes - 1 that never occur, e.g. '0, 3..9'."""
    edges = [-1, *np.unique(labels).tolist(), num_classes]
    absent = [(a + 1, b - 1) for a, b in itertools.pairwise(edges) if b - a > 1]
    texts = [str(a) if a == b else f"{a}..{b}" for a, b in absent]
    return ", ".join(texts[:5] + ["..."] * (len(texts) > 5))


def check_memory(count: int, shape: Sequence[int]) -> None:
    """Raises DataError if `count` images of `shape` (H, W, 3) do not fit in memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (needed := count * math.prod(shape)) > memory:
        raise DataError(
            f"{count} images of {shape[1]}x{shape[0]} take {needed / 1e9:.0f} GB, this "
            f"machine has {memory / 1e9:.0f} GB: set --config.data.crop=inception to "
            "read them from disk as they are needed"
        )


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A split in memory: images (N, H, W, 3) uint8, labels (N,) int32."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    @property
    def digest(self) -> int:
        """The CRC-32 of the labels and of up to 10,000 images."""
        some = self.images[:: len(self) // 10_000 + 1]
        return zlib.crc32(
            np.ascontiguousarray(some), zlib.crc32(np.ascontiguousarray(self.labels))
        )

    def take(self, index: np.ndarray) -> "InMemory":
        """Returns the split of the chosen examples."""
        return dataclasses.replace(
            self, images=self.images[index], labels=self.labels[index]
        )

    def padded(
        self, pad: int, border: str, mean: Sequence[float] = (0.0,)
    ) -> np.ndarray:
        """Returns the images with a border: (N, H + 2 pad, W + 2 pad, 3) uint8."""
        return pad_images(self.images, pad, border, mean)

    def train_batches(
        self,
        draw: Callable,
        start_step: int,
        *,
        border: str = "zero",
        mean: Sequence[float] = (0.0,),
        workers: int | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields image (b, H, W, 3) uint8 and label (b,) int32, endlessly, by tf.data.

        draw: step -> input_pipeline.Plan. border, mean: of pad_images.
        """
        return _tf_batches(tensorflow(), self, draw, start_step, border, mean, workers)

    def test_batches(
        self, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's share of one pass, in order, with mask (b,) float32.

        The last batch is padded with zeros, whose mask is 0.
        """
        count = -(-batch_size // process_count)

        def rows(array, start):
            part = array[start : start + count]
            filled = np.zeros((count, *array.shape[1:]), array.dtype)
            filled[: len(part)] = part
            return filled

        ones = np.ones(len(self), np.float32)
        for batch_start in range(0, len(self), count * process_count):
            start = batch_start + process_index * count
            yield {
                "image": rows(self.images, start),
                "label": rows(self.labels, start),
                "mask": rows(ones, start),
            }


def statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the exact mean and standard deviation per channel; (N, H, W, C) uint8."""
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 1000):
        for channel, count in enumerate(counts):
            pixels = images[start : start + 1000, ..., channel]
            count += np.bincount(pixels.ravel(), minlength=256)
    weights, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256)
    mean = weights @ values
    variance = (weights * (values - mean[:, None]) ** 2).sum(axis=1)
    return tuple(map(float, mean)), tuple(map(float, np.sqrt(variance)))


def pad_images(
    images: np.ndarray, pad: int, border: str, mean: Sequence[float] = (0.0,)
) -> np.ndarray:
    """Pads (N, H, W, C) uint8 by `pad` pixels on each side, for random crops.

    border:
      zero          black, before normalisation (X-Nets).
      dataset_mean  `mean`, per channel, 0..255, rounded: fb.resnet.torch's zeros after
                    normalisation (at most 0.5 of 255 off).
      mean          cfmz: the rows above and below repeat the rounded mean row of the
                    image, then the columns left and right repeat the rounded mean
                    column of the result; halves round to even, as in numpy.
      white
      reflect       without repeating the edge.

    Raises ValueError for an unknown border.
    """
    if border not in BORDERS:
        raise ValueError(f"unknown border {border!r}: choose from {', '.join(BORDERS)}")
    edges = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    if border == "reflect":
        return np.pad(images, edges, mode="reflect")
    n, height, width, channels = images.shape
    fill = {"dataset_mean": np.rint(mean), "white": 255}.get(border, 0)
    padded = np.empty((n, height + 2 * pad, width + 2 * pad, channels), np.uint8)
    padded[:] = fill
    padded[:, pad : pad + height, pad : pad + width] = images
    if border == "mean" and pad:
        # In pieces, because the sums of a whole data set need much memory.
        for start in range(0, n, 1000):
            _fill_with_mean(padded[start : start + 1000], pad)
    return padded


def _fill_with_mean(padded: np.ndarray, pad: int) -> None:
    rows = padded[:, pad:-pad, pad:-pad]
    padded[:, :pad, pad:-pad] = padded[:, -pad:, pad:-pad] = _mean(rows, axis=1)
    columns = padded[:, :, pad:-pad]
    padded[:, :, :pad] = padded[:, :, -pad:] = _mean(columns, axis=2)


def _mean(images: np.ndarray, axis: int) -> np.ndarray:
    total = images.sum(axis=axis, keepdims=True, dtype=np.uint32)
    return np.rint(total / images.shape[axis]).astype(np.uint8)


def _tf_batches(
    tf: ModuleType,
    examples: InMemory,
    draw: Callable,
    start_step: int,
    border: str,
    mean: Sequence[float],
    workers: int | None,
) -> Iterator[dict[str, np.ndarray]]:
    """Feeds plans to tf.data in blocks of steps; nothing inside the dataset is Python.

    A Python function there deadlocks the exit of a process that is still prefetching.
    """

    def arrays(plan):
        return plan.index, plan.offset, plan.flip

    # Only the last batch of a pass is smaller, so one of two in a row is whole.
    whole = max((draw(start_step), draw(start_step + 1)), key=lambda x: len(x.index))
    # Captured by the function below: one copy, neither in the graph nor per block.
    padded = tf.constant(examples.padded(whole.pad, border, mean))
    labels = tf.constant(examples.labels)
    with tf.device("CPU"):
        index, offset, flip = (
            tf.Variable(np.stack([x] * STEPS_PER_BLOCK)) for x in arrays(whole)
        )

    def filled(x):  # to one shape for all batches; the surplus is cut off again
        missing = len(whole.index) - len(x)
        return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x

    def batch(i):
        size = examples.image_shape[:2]
        image = crop_and_flip(padded, index[i], offset[i], flip[i], size)
        return {"image": image, "label": tf.gather(labels, index[i])}

    steps = tf.data.Dataset.range(STEPS_PER_BLOCK)
    workers = workers or tf.data.AUTOTUNE
    block = steps.map(batch, num_parallel_calls=workers, deterministic=True).prefetch(4)
    for start in itertools.count(start_step, STEPS_PER_BLOCK):
        plans = [draw(start + i) for i in range(STEPS_PER_BLOCK)]
        for variable, *rows in zip(
            (index, offset, flip), *map(arrays, plans), strict=True
        ):
            variable.assign(np.stack([filled(x) for x in rows]))
        for plan, made in zip(plans, block.as_numpy_iterator(), strict=True):
            yield {k: v[: len(plan.index)] for k, v in made.items()}


def crop_and_flip(images, index, offset, flip, size: tuple[int, int]):
    """Crops and mirrors chosen images: augment.geometry's, bit for bit, for tf.data.

    images: tensor (N, H, W, C); index: (B,); offset: (B, 2), row and column of the
    upper left corner; flip: (B,) bool; size: (h, w). Returns a tensor (B, h, w, C).
    """
    import tensorflow as tf

    (height, width), (_, full_height, full_width, channels) = size, images.shape
    index, offset = tf.cast(index, tf.int64), tf.cast(offset, tf.int64)
    rows = offset[:, :1] + tf.range(height, dtype=tf.int64)
    columns = tf.range(width, dtype=tf.int64)
    columns = offset[:, 1:] + tf.where(flip[:, None], columns[::-1], columns)
    rows = index[:, None] * full_height + rows
    # One gather of pixels is the fastest of five ways tried (160,000 images/s).
    pixels = rows[:, :, None] * full_width + columns[:, None, :]
    return tf.gather(tf.reshape(images, (-1, channels)), pixels)


@functools.cache
def tensorflow() -> ModuleType:
    """Imports TensorFlow; hides the accelerators, whose memory it would fill.

    Raises DataError if it cannot be imported.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise DataError(
            f"TensorFlow cannot be imported ({error}). For images in memory, set "
            "--config.data.pipeline=device, which does not need it; photographs do"
        ) from error
    for kind in ("GPU", "TPU"):
        # A notebook that has used TensorFlow before has chosen its devices.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], kind)
    return tf
