"""Splits of photographs: too large for memory, read, decoded and cropped when needed.

Threads work a few batches ahead; a batch is a function of its plan, not of them. There
is no tf.data here: the threads call single TensorFlow operations, which release
Python's lock, so that an image that cannot be decoded is an exception with a name.
"""

import collections
import concurrent.futures
import dataclasses
import io
import itertools
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging

from data_sources import cache, crops, decoding
from data_sources.errors import DataError, check_open_files, some

MAX_FAILURES_IN_A_ROW = 100  # more than that is not a damaged image


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

        def decode(content):
            decoding.decode(content, decoding.open_image(io.BytesIO(content)))

        def build():
            logging.info(
                "decoding %s test photographs once, to find damaged ones before "
                "training",
                f"{len(numbers):,}",
            )
            pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "verify")
            try:
                found = pool.map(lambda number: self._failure(number, decode), numbers)
                failures = [x for x in found if x]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            if failures:
                reasons, (remedy, *_) = zip(*failures, strict=True)
                raise DataError(
                    f"{len(reasons)} of {len(numbers)} test images: "
                    f"{some(reasons, 3, '; ')}. {remedy}"
                )
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
        total, done, failures = len(self), 0, []

        def make(plan, i, out):
            options = self.crop, self.size, plan.draws[i], self.as_stored
            crop = lambda content: crops.random_crop(content, *options)
            reasons = []
            for number in range(plan.index[i], plan.index[i] + MAX_FAILURES_IN_A_ROW):
                reason = self._decode(number % total, crop, out)
                if not reason:
                    if plan.flip[i]:
                        out[:] = out[:, ::-1].copy()
                    return self.labels[number % total], reasons
                reasons.append(reason)
            raise DataError(
                f"{MAX_FAILURES_IN_A_ROW} images in a row cannot be decoded; the first "
                f"error: {reasons[0]}"
            )

        def batches():
            for step in itertools.count(start_step):
                plan = draw(step)
                image = np.empty((len(plan.index), *self.image_shape), np.uint8)
                yield image, [(make, plan, i, out) for i, out in enumerate(image)]

        consequence = "replaced by the next in order"
        try:
            for image, rows in _in_threads(batches(), workers or os.cpu_count()):
                labels, reasons = zip(*rows, strict=True)
                failures += itertools.chain(*reasons)
                done += len(rows)
                if done >= total:
                    done -= total
                    _log(failures, consequence)
                yield {"image": image, "label": np.array(labels, np.int32)}
        finally:
            _log(failures, consequence)

    def test_batches(
        self, batch_size: int, process_index: int = 0, process_count: int = 1
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's share of one pass, in order, with mask (b,) float32.

        With ten_crops, image is (b, 10, H, W, 3), else (b, H, W, 3). The last batch is
        padded with zeros, whose mask is 0. With on_error='skip', an image that cannot
        be decoded is zeros with mask 0, too; their number is logged at the end.
        """
        share, total, failures = -(-batch_size // process_count), len(self), []
        views = (10,) if self.ten_crops else ()
        cut = crops.ten_crops if self.ten_crops else crops.center_crop
        crop = lambda content: cut(content, self.crop, self.size, self.as_stored)

        def make(number, out):
            return self.labels[number], self._decode(number, crop, out)

        def batches():
            for batch_start in range(0, total, share * process_count):
                start = batch_start + process_index * share
                numbers = range(start, min(start + share, total))
                image = np.zeros((share, *views, *self.image_shape), np.uint8)
                yield image, [(make, *x) for x in zip(numbers, image, strict=False)]

        for image, rows in _in_threads(batches(), os.cpu_count()):
            label, mask = np.zeros(share, np.int32), np.zeros(share, np.float32)
            label[: len(rows)] = [x for x, _ in rows]
            mask[: len(rows)] = [not reason for _, reason in rows]
            failures += [reason for _, reason in rows if reason]
            yield {"image": image, "label": label, "mask": mask}
        _log(failures, "not evaluated")

    def _decode(self, number: int, crop: Callable, out: np.ndarray) -> str:
        """Decodes into `out`. On failure, raises or (with 'skip') returns why."""
        failure = self._failure(number, lambda content: np.copyto(out, crop(content)))
        if failure and self.on_error == "raise":
            raise DataError(". ".join(failure))
        return failure[0] if failure else ""

    def _failure(self, number: int, use: Callable) -> tuple[str, str] | None:
        """Calls use(encoded image). On failure, returns the reason and the remedy."""
        try:
            use(self.read(number))
        except Exception as error:  # the decoders raise anything
            check_open_files(error)
            return undecodable(self.name(number), error)
        return None


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
    batches: Iterator[tuple[np.ndarray, list[tuple]]], workers: int
) -> Iterator[tuple[np.ndarray, list]]:
    """Carries out (image, tasks) in threads and yields (image, results) in order.

    A task is a function and its arguments. The threads work one batch ahead, and
    further only while fewer than 4 tasks for each thread wait: memory is bounded.
    """
    pool = concurrent.futures.ThreadPoolExecutor(workers, "photographs")
    queue = collections.deque()

    def take():
        image, futures = queue[0]
        results = [future.result() for future in futures]
        queue.popleft()
        return image, results

    try:
        for image, tasks in batches:
            queue.append((image, [pool.submit(*task) for task in tasks]))
            waiting = sum(len(futures) for _, futures in list(queue)[1:])
            if len(queue) > 2 and waiting >= 4 * workers:
                yield take()
        while queue:
            yield take()
    finally:
        # At the interpreter's exit, cancel_futures=True would fail here.
        for _, futures in queue:
            for future in futures:
                future.cancel()
        pool.shutdown(wait=False)
