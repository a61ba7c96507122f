"""Splits of photographs: too large for memory, read, decoded and cropped when needed.

Threads work a few batches ahead; a batch is a function of its plan, not of them. There
is no tf.data here: the threads call single TensorFlow operations, which release
Python's lock, so that an image that cannot be decoded is an exception with a name.
"""

import collections
import concurrent.futures
import dataclasses
import io
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from data_sources import cache, crops, decoding
from data_sources.errors import DataError, check_open_files, some
from data_sources.tf import tensorflow

MAX_FAILURES_IN_A_ROW = 100  # more than that is not a damaged image


class Decoded(NamedTuple):
    """A row of a batch. mask: 1, or 0 for a skipped test image; failures: messages."""

    label: int
    mask: float
    failures: list[str]


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """A split of encoded images: labels (N,) int32 and how to read the N images.

    read: number -> encoded image; name: number -> its name in messages. version:
    returns a name for the N images that changes with their files. crop, size,
    on_error: config.data.crop, .image_size, .on_error. as_stored: of decoding.
    ten_crops: whether test batches hold the ten crops of each image.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    read: Callable[[int], bytes]
    name: Callable[[int], str]
    version: Callable[[], str]
    crop: str
    size: int
    on_error: str
    as_stored: bool
    ten_crops: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3

    @property
    def digest(self) -> int:
        """The CRC-32 of the labels."""
        return zlib.crc32(np.ascontiguousarray(self.labels))

    def take(self, index: np.ndarray) -> "OnDisk":
        """Returns the split of the chosen examples."""
        return dataclasses.replace(
            self,
            labels=self.labels[index],
            read=lambda i: self.read(index[i]),
            name=lambda i: self.name(index[i]),
            version=lambda: f"{self.version()}-{zlib.crc32(index):08x}",
        )

    def verify(
        self, cache_dir: str, process_index: int = 0, process_count: int = 1
    ) -> None:
        """Decodes this process's share of the images, once for each version of them.

        Raises DataError that counts the images that cannot be decoded and names some;
        does nothing with on_error='skip'.
        """
        if self.on_error == "skip":
            return
        numbers = range(process_index, len(self), process_count)

        def build():
            logging.info(
                "decoding %s test photographs once, to find damaged ones before "
                "training",
                f"{len(numbers):,}",
            )
            _verify(self, numbers)
            return {"verified": np.array(numbers)}

        share = f"{process_index}-of-{process_count}"
        cache.load_or_build(cache_dir, f"{self.version()}-verified-{share}", build)

    def train_batches(
        self,
        draw: Callable,
        start_step: int,
        *,
        border: str = "",
        mean: Sequence[float] = (),
        workers: int | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields image (b, H, W, 3) uint8 and label (b,) int32, endlessly.

        draw: step -> input_pipeline.Plan. With on_error='skip', an image that cannot be
        decoded is replaced by the next one that can, in the order of the split; their
        number is logged at the end of each pass, and when the iterator is closed.
        border, mean: unused; they are for images in memory.
        """
        del border, mean
        tensorflow()  # if it is missing, fails here and not with the first batch
        return _train_batches(self, draw, start_step, workers)

    def test_batches(
        self,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        workers: int | None = None,
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's share of one pass, in order, with mask (b,) float32.

        With ten_crops, image is (b, 10, H, W, 3), else (b, H, W, 3). The last batch is
        padded with zeros, whose mask is 0. With on_error='skip', an image that cannot
        be decoded is zeros with mask 0, too; their number is logged at the end.
        """
        tensorflow()
        return _test_batches(self, batch_size, process_index, process_count, workers)


def _verify(photographs: OnDisk, numbers: Sequence[int]) -> None:
    tensorflow()

    def check(number):
        try:
            content = photographs.read(number)
            decoding.decode(content, decoding.open_image(io.BytesIO(content)))
        except Exception as error:  # the decoders raise anything
            check_open_files(error)
            return undecodable(photographs.name(number), error)
        return None

    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "verify")
    try:
        failures = [x for x in pool.map(check, numbers) if x]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        reasons, (remedy, *_) = zip(*failures, strict=True)
        raise DataError(
            f"{len(reasons)} of {len(numbers)} test images: "
            f"{some(reasons, 3, '; ')}. {remedy}"
        )


def _train_batches(photographs, draw, start_step, workers):
    total, done, failures = len(photographs), 0, []

    def make(plan, image, i):
        crop = lambda content: crops.random_crop(
            content,
            photographs.crop,
            photographs.size,
            plan.draws[i],
            photographs.as_stored,
        )
        reasons = []
        for number in range(plan.index[i], plan.index[i] + MAX_FAILURES_IN_A_ROW):
            number %= total
            if _decode(photographs, number, crop, image[i], reasons):
                if plan.flip[i]:
                    image[i] = image[i, :, ::-1].copy()
                return Decoded(photographs.labels[number], 1, reasons)
        raise DataError(
            f"{MAX_FAILURES_IN_A_ROW} images in a row cannot be decoded; the first "
            f"error: {reasons[0]}"
        )

    def batches():
        step = start_step
        while True:
            plan = draw(step)
            image = np.empty((len(plan.index), *photographs.image_shape), np.uint8)
            yield image, [(make, plan, image, i) for i in range(len(plan.index))]
            step += 1

    consequence = "replaced by the next in order"
    try:
        for image, rows in _in_threads(batches(), workers):
            failures += [x for row in rows for x in row.failures]
            done += len(rows)
            if done >= total:
                done -= total
                _log(failures, consequence)
            yield {"image": image, "label": np.array([x.label for x in rows], np.int32)}
    finally:
        _log(failures, consequence)


def _test_batches(photographs, batch_size, process_index, process_count, workers):
    share, total = -(-batch_size // process_count), len(photographs)
    failures = []

    def make(image, i, number):
        make_crop = crops.ten_crops if photographs.ten_crops else crops.center_crop
        crop = lambda content: make_crop(
            content, photographs.crop, photographs.size, photographs.as_stored
        )
        reasons = []
        present = _decode(photographs, number, crop, image[i], reasons)
        return Decoded(photographs.labels[number], float(present), reasons)

    def batches():
        for batch_start in range(0, total, share * process_count):
            start = batch_start + process_index * share
            numbers = range(min(start, total), min(start + share, total))
            views = (10,) if photographs.ten_crops else ()
            image = np.zeros((share, *views, *photographs.image_shape), np.uint8)
            yield image, [(make, image, i, n) for i, n in enumerate(numbers)]

    for image, rows in _in_threads(batches(), workers):
        failures += [x for row in rows for x in row.failures]
        label, mask = np.zeros(share, np.int32), np.zeros(share, np.float32)
        label[: len(rows)] = [x.label for x in rows]
        mask[: len(rows)] = [x.mask for x in rows]
        yield {"image": image, "label": label, "mask": mask}
    _log(failures, "not evaluated")


def _decode(
    photographs: OnDisk,
    number: int,
    crop: Callable[[bytes], np.ndarray],
    out: np.ndarray,
    failures: list[str],
) -> bool:
    """Decodes into `out`; on failure raises, or records it if on_error is 'skip'."""
    try:
        out[:] = crop(photographs.read(number))
    except Exception as error:  # the decoders raise anything
        check_open_files(error)
        failure, remedy = undecodable(photographs.name(number), error)
        if photographs.on_error == "raise":
            raise DataError(f"{failure}. {remedy}") from error
        failures.append(failure)
        return False
    return True


def undecodable(name: str | os.PathLike, error: Exception) -> tuple[str, str]:
    """Returns why an image cannot be decoded, and the remedy."""
    skip = "--config.data.on_error=skip"
    if isinstance(error, DataError):  # an intact image of an unsupported kind
        return f"{name} {error}", f"{skip} skips such images"
    reason = f"{name} cannot be decoded: {first_line(error)}"
    return reason, f"Restore it, or set {skip}"


def first_line(error: Exception) -> str:
    """Returns the first line of a message without TensorFlow's {{node ...}}."""
    lines = re.sub(r"\{\{.*?\}\}\s*", "", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _log(failures: list[str], consequence: str) -> None:
    if failures:
        different = sorted(set(failures))
        logging.warning(
            "damaged images in this pass, %s: %d (%s)",
            *(consequence, len(different), some(different, 3, "; ")),
        )
        failures.clear()


def _in_threads(
    batches: Iterator[tuple[np.ndarray, list[tuple]]], workers: int | None
) -> Iterator[tuple[np.ndarray, list]]:
    """Carries out (image, tasks) in threads and yields (image, results) in order.

    A task is a function and its arguments. The threads work one batch ahead, and
    further only while fewer than 4 tasks for each thread wait: memory is bounded.
    """
    workers = workers or os.cpu_count()
    pool = concurrent.futures.ThreadPoolExecutor(workers, "photographs")
    queue = collections.deque()
    try:
        for image, tasks in batches:
            queue.append((image, [pool.submit(*task) for task in tasks]))
            waiting = sum(len(futures) for _, futures in list(queue)[1:])
            if len(queue) > 2 and waiting >= 4 * workers:
                image, futures = queue.popleft()
                yield image, [future.result() for future in futures]
        while queue:
            image, futures = queue.popleft()
            yield image, [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
