"""Photographs of any size, too many for memory: read, decoded and cropped as needed.

From TFDS's files of encoded images (array_record; tfrecord, whose records must first be
counted) or from folders, one per class. Threads decode a few batches ahead; a batch is
a function of what it is told to hold, not of them. No tf.data here: single operations
of TensorFlow run in the threads and release Python's lock, one after the other for each
image, so that a picture that cannot be decoded is an exception with a name.
"""

import collections
import concurrent.futures
import dataclasses
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

import data_sources
from data_sources import DataError, cache, crops, folders, tfrecords

IN_A_ROW = 100  # photographs that cannot be decoded: it must be something else


@dataclasses.dataclass(frozen=True)
class Photographs:
    """A split, encoded: labels (N,) int32 and how to read the N images.

    read: number -> encoded image; name: number -> what messages call it. mean, std: per
    channel, 0..255. crop, size, on_error: data.crop, .image_size, .on_error.
    class_names: by label.
    """

    labels: np.ndarray
    read: Callable[[int], bytes]
    name: Callable[[int], str]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: str
    size: int
    on_error: str
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3


class Rows(NamedTuple):
    """What a training batch is made of.

    index: (b,) int, of photographs; flip: (b,) bool; draws: (b, crops.DRAWS), 0..1.
    """

    index: np.ndarray
    flip: np.ndarray
    draws: np.ndarray


class Made(NamedTuple):
    """A row that is there: label, 1 or 0 for the mask, and what was not decodable."""

    label: int
    mask: float
    failures: list[str]


def load(data: ConfigDict, split: str) -> Photographs:
    """The photographs of config.data, 'train' or 'test', always in the same order.

    Of TFDS sets, all records are read once, for their labels, which are then kept in
    data.cache_dir; with tfrecord, so is where the records lie. Sets that
    data_sources.STATISTICS does not know are normalised as ImageNet is. Raises
    DataError for what is missing, damaged or misnamed.
    """
    if data.pipeline != "tf.data":
        raise DataError(
            f"data.crop={data.crop!r} reads photographs from files; "
            f"data.pipeline={data.pipeline!r} keeps a set in memory: use tf.data, or "
            "crop=pad for images of one size"
        )
    data_sources.refuse_on_error(data)
    if data.image_size < 8:
        raise DataError(f"data.image_size={data.image_size} must be 8 or more")
    root = data_sources.root_of(data)
    directory = data_sources.find(root, data.name)
    if directory is None and data_sources.in_memory_only(data):
        raise DataError(
            f"{data.name} is small images, kept in memory; data.crop={data.crop!r} "
            "reads photographs: set --config.data.crop=pad"
        )
    if directory is None and (folder := folders.find(root, data.name)):
        labels, *source = _of_folder(folder, split)
    else:
        directory = directory or data_sources.fetched(data)
        labels, *source = _of_records(data, directory, split)
    read, name, class_names = source
    labels = data_sources.checked(data.name, split, labels, len(class_names))
    imagenet = data_sources.STATISTICS["imagenet2012"]
    statistics = data_sources.normalization(data, lambda: imagenet)
    return Photographs(
        labels,
        read,
        name,
        len(class_names),
        *statistics,
        crop=data.crop,
        size=data.image_size,
        on_error=data.on_error,
        class_names=tuple(class_names),
    )


def _of_folder(folder: pathlib.Path, split: str):
    with data_sources.in_folders():
        paths, labels, classes = folders.read(folder, split)
    return labels, lambda i: paths[i].read_bytes(), lambda i: str(paths[i]), classes


def _of_records(data: ConfigDict, directory: pathlib.Path, split: str):
    import tensorflow_datasets as tfds

    builder, split, keys, features = data_sources.described(data, directory, split)
    image, label = features
    if image.shape[-1] not in (None, 1, 3) or image.np_dtype != np.uint8:
        raise DataError(
            f"{directory}: images are {image.np_dtype} {image.shape}, not uint8 with 1 "
            "or 3 channels"
        )
    parser = tfds.features.FeaturesDict(dict(zip(keys, features, strict=True)))
    encoded = {keys[0]: tfds.decode.SkipDecoding()}
    expected = builder.info.splits[split].num_examples
    with data_sources.reading(directory):
        paths = tfrecords.files(builder, split)
        stats = {path: path.stat() for path in paths}
    by_place = all(".tfrecord" in path.name for path in paths)

    def parse(record: bytes) -> dict:
        return parser.deserialize_example_np(record, decoders=encoded)

    def scan() -> dict[str, np.ndarray]:
        logging.info("reading and verifying %s, %s, once: labels", directory, split)
        label_of = lambda record: int(parse(record)[keys[1]])
        with data_sources.reading(directory):
            if not by_place:
                labels = _labels(tfrecords.source(builder, split), label_of, expected)
                return {"labels": labels, "places": np.empty((0, 3), np.int64)}
            places, labels = _places(paths), _labels_in_order(paths, label_of)
            if not len(places) == len(labels) == expected:
                raise ValueError(f"{len(labels)} {split} records, not {expected}")
        return {"labels": labels, "places": places}

    facts = [(x.name, y.st_size, y.st_mtime_ns) for x, y in stats.items()]
    digest = zlib.crc32(repr((image, label, facts)).encode())
    key = f"{builder.info.full_name.replace('/', '-')}-{split}-labels-{digest:08x}"
    kept = cache.kept(data.cache_dir, key, scan)
    if by_place:
        places = kept["places"]
        record = lambda i: tfrecords.read(paths[places[i][0]], *places[i][1:])
    else:
        record = tfrecords.source(builder, split).__getitem__
    return (
        kept["labels"],
        lambda i: parse(record(i))[keys[0]],
        lambda i: f"record {i} of the {split} split of {directory}",
        label.names,
    )


def _places(paths: list[pathlib.Path]) -> np.ndarray:
    """(N, 3) int64: file, start and length of each record of TFRecord files.

    This is what they lose against array_record, which knows: their headers are read one
    after the other.
    """
    logging.info(
        "counting the records of %d files: array_record needs no count", len(paths)
    )
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(tfrecords.index, paths))
    parts = [np.stack([np.full_like(x, i), x, y], 1) for i, (x, y) in enumerate(found)]
    return np.concatenate(parts)


def _labels_in_order(paths: list[pathlib.Path], label: Callable) -> np.ndarray:
    """(N,) int64 of TFRecord files; the checksum of every record is verified.

    By TensorFlow, which crops.py needs anyway, at 1.2 GB/s; in numpy it is 27 MB/s.
    """
    tf = tensorflow()

    def some(path):
        try:
            records = tf.data.TFRecordDataset([str(path)]).as_numpy_iterator()
            return [label(record) for record in records]
        except tf.errors.DataLossError as error:
            raise ValueError(f"{path}: {_reason(error)}") from error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.array([x for part in pool.map(some, paths) for x in part], np.int64)


def _labels(records: Sequence[bytes], label: Callable, count: int) -> np.ndarray:
    """(count,) int64, a few records at a time in each thread."""

    def some(start):
        numbers = list(range(start, min(start + 64, count)))
        return [label(record) for record in records.__getitems__(numbers)]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(some, range(0, count, 64))
        return np.array([x for part in parts for x in part], np.int64)


def train_batches(
    photographs: Photographs,
    tf: ModuleType,
    draw: Callable[[int], Rows],
    start_step: int,
    workers: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """image (b, H, W, 3) uint8 and label (b,) int32 of what draw(step) says, endlessly.

    With on_error='skip', a photograph that cannot be decoded is replaced by the next
    that can, in the order of the files; a pass tells its number at its end, and the
    last one when the iterator is closed.
    """
    total, done, failures = len(photographs.labels), 0, []

    def make(rows, image, i):
        reasons = []
        for number in range(rows.index[i], rows.index[i] + IN_A_ROW):
            number %= total
            cut = lambda x: crops.train(
                tf, x, photographs.crop, photographs.size, rows.draws[i]
            )
            if _decoded(photographs, number, cut, image[i], reasons):
                if rows.flip[i]:
                    image[i] = image[i, :, ::-1].copy()
                return Made(photographs.labels[number], 1, reasons)
        raise DataError(f"{IN_A_ROW} photographs in a row: {reasons[0]}")

    def batches():
        step = start_step
        while True:
            rows = draw(step)
            image = np.empty((len(rows.index), *photographs.image_shape), np.uint8)
            yield image, [(make, rows, image, i) for i in range(len(rows.index))]
            step += 1

    consequence = "were replaced by the ones after them"
    try:
        for image, made in _in_threads(batches(), workers):
            failures += [x for row in made for x in row.failures]
            done += len(made)
            if done >= total:
                done -= total
                _tell(failures, consequence)
            yield {"image": image, "label": np.array([x.label for x in made], np.int32)}
    finally:
        _tell(failures, consequence)


def evaluation_batches(
    photographs: Photographs,
    tf: ModuleType,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """One pass in order: image, label and mask (b,) float32, b the process's share.

    The last batch is filled up with zeros of mask 0; so is, with on_error='skip', what
    cannot be decoded, and the end of the pass tells its number.
    """
    share, total = -(-batch_size // process_count), len(photographs.labels)
    failures = []

    def make(image, i, number):
        reasons = []
        cut = lambda x: crops.test(tf, x, photographs.crop, photographs.size)
        present = _decoded(photographs, number, cut, image[i], reasons)
        return Made(photographs.labels[number], float(present), reasons)

    def batches():
        for batch_start in range(0, total, share * process_count):
            start = batch_start + process_index * share
            numbers = range(min(start, total), min(start + share, total))
            image = np.zeros((share, *photographs.image_shape), np.uint8)
            yield image, [(make, image, i, n) for i, n in enumerate(numbers)]

    for image, made in _in_threads(batches(), workers):
        failures += [x for row in made for x in row.failures]
        label, mask = np.zeros(share, np.int32), np.zeros(share, np.float32)
        label[: len(made)] = [x.label for x in made]
        mask[: len(made)] = [x.mask for x in made]
        yield {"image": image, "label": label, "mask": mask}
    _tell(failures, "are not counted")


def _decoded(
    photographs: Photographs,
    number: int,
    cut: Callable[[bytes], np.ndarray],
    out: np.ndarray,
    failures: list[str],
) -> bool:
    """Writes a photograph to `out`, or a failure to the list; raises it if wished."""
    try:
        out[:] = cut(photographs.read(number))
    except Exception as error:  # the decoders raise anything
        data_sources.refuse_limit(error)
        failure = f"{photographs.name(number)} cannot be decoded: {_reason(error)}"
        if photographs.on_error == "raise":
            raise DataError(
                f"{failure}. Restore it, or set --config.data.on_error=skip"
            ) from error
        failures.append(failure)
        return False
    return True


def _reason(error: Exception) -> str:
    """The first line of its message, without TensorFlow's {{node ...}} before it."""
    lines = re.sub(r"\{\{.*?\}\}\s*", "", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _tell(failures: list[str], consequence: str) -> None:
    if failures:
        different = sorted(set(failures))
        logging.warning(
            "%d photographs %s in this pass: %s",
            len(different),
            consequence,
            "; ".join(different[:3]) + ("; ..." if len(different) > 3 else ""),
        )
        failures.clear()


def _in_threads(
    batches: Iterator[tuple[np.ndarray, list[tuple]]], workers: int | None
) -> Iterator[tuple[np.ndarray, list]]:
    """(image, results) of (image, tasks) in order, a few batches ahead.

    A task is a function and its arguments. Ahead is the batch after the one that is
    wanted, and tasks enough to keep the threads busy: memory is bounded.
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


def tensorflow() -> ModuleType:
    """The module, kept off the accelerators, whose memory it would take for itself."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise DataError(
            f"data.pipeline='tf.data' needs TensorFlow ({error}); for sets in memory, "
            "not for photographs, --config.data.pipeline=device does without"
        ) from error
    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf
