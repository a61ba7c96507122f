"""Data sets prepared by TensorFlow Datasets, read without TensorFlow where possible.

Importing TensorFlow takes longer than decoding 50,000 small images with Pillow (11 s
against 4 s on 2 cores), and the pixels are the same. Decoded images are cached.
"""

import concurrent.futures
import difflib
import io
import os
import pathlib
import re
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from data_sources import archives, cache, decoding, tfrecords
from data_sources.errors import DataError, check_memory, reading
from data_sources.options import base_name
from data_sources.photographs import first_line
from data_sources.tf import tensorflow

# The splits to test on, the first that exists. Labels of a 'test' split may be secret:
# ImageNet's are, and its files are often deleted; of other sets the first label is -1.
HELD_OUT = ("test", "validation", "val")
WITHOUT_TEST = ("imagenet2012",)
# Our names of sets that TFDS names differently, and the splits to train on.
JOINED = {"svhn_cropped_extra": ("svhn_cropped", "train+extra")}
KNOWN = ("digits", *archives.CIFAR, "imagenet2012", *archives.SVHN)
CONNECT_SECONDS = 10.0


class Stored(NamedTuple):
    """A split as TFDS describes it.

    split: its name in TFDS, or several names joined by +. image, label: the features.
    count: number of examples. parse: serialized example -> encoded image, label.
    """

    directory: pathlib.Path
    builder: Any
    split: str
    image: Any
    label: Any
    count: int
    parse: Callable[[bytes], tuple[bytes, int]]

    @property
    def name(self) -> str:
        return f"{self.builder.info.full_name.replace('/', '-')}-{self.split}"

    def check_count(self, found: int) -> None:
        """Raises ValueError unless the files hold as many records as TFDS states."""
        if found != self.count:
            raise ValueError(f"{found} {self.split} records, expected {self.count}")


def find(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """Returns the newest version of root/NAME[/CONFIG][:VERSION], or None."""
    if not re.fullmatch(r"\w[\w./-]*(:[\d.]+)?", name):
        return None  # not a name, and perhaps a pattern for glob
    name, _, version = _name_in_tfds(name).partition(":")
    files = list(root.glob(f"{name}/{version or '*'}/dataset_info.json"))
    files = files or list(root.glob(f"{name}/*/{version or '*'}/dataset_info.json"))
    found = [x.parent for x in files if re.fullmatch(r"\d+\.\d+\.\d+", x.parent.name)]
    configs = sorted({x.parent.relative_to(root).as_posix() for x in found})
    if len(configs) > 1:
        raise DataError(
            f"{name} has several configurations: set --config.data.name to "
            f"{' or '.join(configs)}"
        )
    return max(found, key=lambda x: tuple(map(int, x.name.split("."))), default=None)


def nearest(root: pathlib.Path, name: str) -> list[str]:
    """Returns names similar to an unknown one, and nothing for a known one."""
    names = {*KNOWN, *(os.listdir(root) if root.is_dir() else [])}
    if name not in names:  # imported only for unknown names: it takes seconds
        import tensorflow_datasets as tfds

        names.update(tfds.list_builders(with_community_datasets=False))
    if name in names:
        return []
    return difflib.get_close_matches(name, names, n=3) or sorted(KNOWN)


def download(data: ConfigDict, root: pathlib.Path) -> pathlib.Path:
    """Downloads and prepares a set with TFDS, which imports TensorFlow for it."""
    import tensorflow_datasets as tfds

    if names := nearest(root, base_name(data.name)):
        raise DataError(
            f"unknown data set {base_name(data.name)!r}; nearest: {', '.join(names)}"
        )
    logging.info("downloading %s to %s", data.name, root)
    try:
        builder = tfds.builder(_name_in_tfds(data.name), data_dir=root)
        for url in {urllib.parse.urlsplit(url)[:2] for url in builder.url_infos}:
            _connect("{}://{}/".format(*url))
        builder.download_and_prepare()
    except Exception as error:  # TFDS raises anything
        raise DataError(
            f"{data.name} could not be downloaded to {root.absolute()}: {error}. Set "
            "--config.data.dir to an existing copy, or use --config.data.name=digits"
        ) from error
    return find(root, data.name)


def _connect(url: str) -> None:
    """Raises OSError unless the server answers; TFDS would retry for 205 s."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer, too
    except OSError as error:
        raise OSError(f"no connection to {url}: {error}") from error


def _name_in_tfds(name: str) -> str:
    base = base_name(name)
    return JOINED.get(base, (base,))[0] + name[len(base) :]


def describe(directory: pathlib.Path, name: str, split: str) -> Stored:
    """Describes 'train' or 'test' of a directory that TFDS wrote.

    Raises DataError unless every example is an image with one class.
    """
    import tensorflow_datasets as tfds

    with reading(directory):
        builder = tfds.builder_from_directory(directory)
        features, splits = dict(builder.info.features.items()), builder.info.splits
        keys = builder.info.supervised_keys or ("image", "label")
    pair = [features.get(key) if isinstance(key, str) else None for key in keys]
    if [*map(type, pair)] != [tfds.features.Image, tfds.features.ClassLabel]:
        raise DataError(
            f"{directory} does not hold images with one class each, but {features}"
        )
    train = JOINED.get(base_name(name), ("", "train"))[1]
    names = HELD_OUT if split == "test" else (train,)
    if split == "test" and builder.name in WITHOUT_TEST:
        names = names[1:]
    stored = [name for name in names if {*name.split("+")} <= {*splits}]
    if not stored:
        raise DataError(
            f"{directory} has no {names[0]} split, only {', '.join(splits)}. Divide it "
            "into folders NAME/{train,test}/CLASS or, for small images of one size, "
            "write an .npz with x_train, y_train, x_test, y_test"
        )
    parser = tfds.features.FeaturesDict(dict(zip(keys, pair, strict=True)))
    # Pillow returns the pixels of TensorFlow's accurate decoder, bit for bit. TFDS
    # decodes with a fast DCT, which darkens red and blue by a grey level.
    encoded = {keys[0]: tfds.decode.SkipDecoding()}

    def parse(record):
        example = parser.deserialize_example_np(record, decoders=encoded)
        return example[keys[0]], int(example[keys[1]])

    with reading(directory):
        while stored[1:] and parse(tfrecords.first(builder, stored[0]))[1] == -1:
            del stored[0]  # its labels are secret
        count = splits[stored[0]].num_examples
    return Stored(directory, builder, stored[0], *pair, count, parse)


def load_images(directory: pathlib.Path, data: ConfigDict, split: str):
    """Returns images (N, H, W, 3) uint8, labels (N,) and class names.

    All images must have one size; grey ones get three equal channels. They come from
    the cache if the files have not changed.
    """
    stored = describe(directory, data.name, split)
    shape, dtype = stored.image.shape, stored.image.np_dtype
    if None in shape or shape[-1] not in (1, 3) or dtype != np.uint8:
        raise DataError(
            f"{directory}: images are {dtype} {shape}, expected uint8, one size, 1 or "
            "3 channels; photographs of any size require --config.data.crop=inception"
        )
    check_memory(stored.count, (*shape[:2], 3))
    with reading(directory):
        paths = tfrecords.files(stored.builder, stored.split)
        files = {path.name: path.read_bytes() for path in paths}
    digest = zlib.crc32(repr((stored.image, stored.label, list(files))).encode())
    for content in files.values():
        digest = zlib.crc32(content, digest)

    def build():
        logging.info(
            "reading %s (%s, %s images) from %s",
            *(data.name, split, f"{stored.count:,}", directory),
        )
        with reading(directory):
            if all(".tfrecord" in name for name in files):
                records = [
                    x for item in files.items() for x in tfrecords.records(*item)
                ]
            else:
                source = tfrecords.source(stored.builder, stored.split)
                records = source.__getitems__(range(stored.count))
            stored.check_count(len(records))
            images, labels = _decode(records, stored, data.on_error == "skip")
            return {"images": images, "labels": labels}

    key = f"{stored.name}-{digest:08x}-{data.on_error}"
    arrays = cache.load_or_build(data.cache_dir, key, build)
    if lost := stored.count - len(arrays["labels"]):
        logging.warning("skipped %d damaged images of %s, %s", lost, directory, split)
    return arrays["images"], arrays["labels"], stored.label.names


def _decode(records: Sequence[bytes], stored: Stored, skip: bool):
    """Decodes serialized examples to images (N, H, W, 3) uint8 and labels (N,) int64.

    Raises ValueError for damaged images, or skips them.
    """
    height, width, _ = stored.image.shape
    images = np.empty((len(records), height, width, 3), np.uint8)
    labels, good = np.empty(len(records), np.int64), np.ones(len(records), bool)

    def decode(start):
        for i in range(start, min(start + 500, len(records))):
            try:
                content, labels[i] = stored.parse(records[i])
                image = Image.open(io.BytesIO(content))
                if image.size != (width, height):
                    raise ValueError(f"size {image.size}, expected {(width, height)}")
                images[i] = decoding.rgb(image, as_stored=True)
            except Exception as error:  # Pillow raises anything on damaged files
                if not skip:
                    remedy = "--config.data.on_error=skip skips damaged images"
                    raise ValueError(f"image {i}: {error} ({remedy})") from error
                good[i] = False

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, range(0, len(records), 500)))
    return (images, labels) if good.all() else (images[good], labels[good])


def open_images(directory: pathlib.Path, data: ConfigDict, split: str):
    """Returns functions as data_sources.Source says, labels (N,) and class names.

    All records are read once, for their labels, which are then cached; so are the
    positions of TFRecord's records.
    """
    stored = describe(directory, data.name, split)
    builder, image = stored.builder, stored.image
    if image.shape[-1] not in (None, 1, 3) or image.np_dtype != np.uint8:
        raise DataError(
            f"{directory}: images are {image.np_dtype} {image.shape}, expected uint8 "
            "with 1 or 3 channels"
        )
    with reading(directory):
        paths = tfrecords.files(builder, stored.split)
        stats = {path: path.stat() for path in paths}
    sequential = all(".tfrecord" in path.name for path in paths)

    def scan() -> dict[str, np.ndarray]:
        logging.info(
            "reading and verifying %s (%s, %s images) in %s, once, for the labels",
            *(data.name, split, f"{stored.count:,}", directory),
        )
        label = lambda record: stored.parse(record)[1]
        with reading(directory):
            if not sequential:
                source = tfrecords.source(builder, stored.split)
                numbers = range(stored.count)
                parts = [numbers[i : i + 64] for i in numbers[::64]]  # a few at a time
                labels = _labels(parts, lambda x: source.__getitems__(list(x)), label)
                return {"labels": labels, "places": np.empty((0, 3), np.int64)}
            places, labels = _places(paths), _labels(paths, _verified, label)
            stored.check_count(len(places))
            stored.check_count(len(labels))
        return {"labels": labels, "places": places}

    facts = [(x.name, y.st_size, y.st_mtime_ns) for x, y in stats.items()]
    digest = zlib.crc32(repr((stored.image, stored.label, facts)).encode())
    key = f"{stored.name}-labels-{digest:08x}"
    scanned = cache.load_or_build(data.cache_dir, key, scan)
    if sequential:
        places = scanned["places"]
        record = lambda i: tfrecords.read(paths[places[i][0]], *places[i][1:])
    else:
        record = tfrecords.source(builder, stored.split).__getitem__
    return (
        lambda i: stored.parse(record(i))[0],
        lambda i: f"record {i} of the {stored.split} split of {directory}",
        lambda: f"{stored.name}-{digest:08x}",
        *(scanned["labels"], stored.label.names),
    )


def _places(paths: list[pathlib.Path]) -> np.ndarray:
    """Returns (N, 3) int64: file, start and length of each record.

    TFRecord has no index, so headers are read sequentially; array_record needs no scan.
    """
    logging.info("indexing %d TFRecord files; array_record needs no scan", len(paths))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(tfrecords.index, paths))
    parts = [np.stack([np.full_like(x, i), x, y], 1) for i, (x, y) in enumerate(found)]
    return np.concatenate(parts)


def _verified(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the records of a TFRecord file and verifies every checksum.

    By TensorFlow, which photographs need anyway, at 1.2 GB/s; numpy reads 27 MB/s.
    """
    tf = tensorflow()
    try:
        yield from tf.data.TFRecordDataset([str(path)]).as_numpy_iterator()
    except tf.errors.DataLossError as error:
        raise ValueError(f"{path}: {first_line(error)}") from error


def _labels(parts: Sequence, read: Callable, label: Callable) -> np.ndarray:
    """Returns the labels (N,) int64 of the records of all parts, read in threads."""

    def some(part):
        return [label(record) for record in read(part)]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.array([x for part in pool.map(some, parts) for x in part], np.int64)
