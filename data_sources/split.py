"""Splits in memory.

A split is InMemory, or OnDisk (photographs.py). Both have len(split), labels (N,)
int32, class_names (one for each class), image_shape, digest, take(), verify(),
train_batches() and test_batches().
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_sources import borders, tf


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
        labels = zlib.crc32(np.ascontiguousarray(self.labels))
        return zlib.crc32(np.ascontiguousarray(some), labels)

    def take(self, index: np.ndarray) -> "InMemory":
        """Returns the split of the chosen examples."""
        return dataclasses.replace(
            self, images=self.images[index], labels=self.labels[index]
        )

    def verify(self, *_) -> None:
        """Does nothing, because the images have been decoded."""

    def padded(
        self, pad: int, border: str, mean: Sequence[float] = (0.0,)
    ) -> np.ndarray:
        """Returns the images with a border: (N, H + 2 pad, W + 2 pad, 3) uint8."""
        return borders.pad_images(self.images, pad, border, mean)

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

        draw: step -> input_pipeline.Plan. border, mean: of borders.pad_images.
        """
        tf.tensorflow()  # if it is missing, fails here and not with the first batch
        padded = self.padded(draw(start_step).pad, border, mean)
        size = self.image_shape[:2]
        return tf.batches(padded, self.labels, size, draw, start_step, workers)

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
        arrays = {"image": self.images, "label": self.labels, "mask": ones}
        for batch_start in range(0, len(self), count * process_count):
            start = batch_start + process_index * count
            yield {name: rows(array, start) for name, array in arrays.items()}


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
