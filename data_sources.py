"""Where images come from: every source -> uint8 arrays in memory, decoded only once.

By config.data.name: 'digits' (inside scikit-learn), a set whose files lie in
config.data.dir (TFDS's tfrecord or array_record, or the authors' own: archives.py), or
the path of an .npz. Nothing here imports
TensorFlow: with small images its import alone takes longer than decoding 50,000 of them
with Pillow (11 s against 4 s on 2 cores), and the result is the same to the bit.
"""

import concurrent.futures
import contextlib
import dataclasses
import difflib
import io
import os
import pathlib
import re
import tempfile
import threading
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

import archives
import tfrecords

# Mean and standard deviation per channel, 0..255. cifar*: X-Nets' constants, which are
# those of the official images; digits: of its training split.
STATISTICS = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "digits": ((77.9,) * 3, (82.6,) * 3),
}
PROBE_SECONDS = 10.0
WAYS_OUT = "--config.data.dir=... (where it lies), --config.data.name=digits (no files)"


class DataError(ValueError):
    """Data that is missing, damaged or does not fit; the message names the way out."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """A split in memory: images (N, H, W, 3) uint8, labels (N,) int32.

    mean, std: per channel on the scale 0..255, as augment.normalize takes them.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(data: ConfigDict, split: str) -> Examples:
    """The examples of config.data, 'train' or 'test', always in the same order.

    mean and std are those of data, else of STATISTICS, else of the training images.
    May run in a thread. Raises DataError for what is missing, damaged or misnamed; uses
    the network only if data.download is set.
    """
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r}: choose train or test")
    images, labels, num_classes = _read(data, split)
    mean, std = tuple(data.mean), tuple(data.std)
    if not (mean and std):
        known = STATISTICS.get(data.name.partition(":")[0])
        if known is None:
            known = statistics(images if split == "train" else _read(data, "train")[0])
        mean, std = mean or known[0], std or known[1]
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise DataError(
            f"data.mean={mean}, data.std={std}: 3 numbers each, std positive"
        )
    return Examples(images, labels, num_classes, mean, std)


def statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation per channel of (N, H, W, C) uint8."""
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 1000):
        for channel, count in enumerate(counts):
            pixels = images[start : start + 1000, ..., channel]
            count += np.bincount(pixels.ravel(), minlength=256)
    weights, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256)
    mean = weights @ values
    variance = (weights * (values - mean[:, None]) ** 2).sum(axis=1)
    return tuple(map(float, mean)), tuple(map(float, np.sqrt(variance)))


def _read(data: ConfigDict, split: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Images, labels and number of classes, checked for what would fail much later."""
    npz = data.name.endswith(".npz")
    source = _npz if npz else {"digits": _digits}.get(data.name, _tfds)
    images, labels, num_classes = source(data, split)
    if not len(images):
        raise DataError(f"{data.name}: the {split} split is empty")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"{data.name}: {split} labels lie in {low}..{high}, not in "
            f"0..{num_classes - 1} as {num_classes} classes need"
        )
    return images, labels.astype(np.int32), num_classes


@contextlib.contextmanager
def _reading(path: pathlib.Path):
    """Whatever a reader raises becomes a DataError that names the path."""
    try:
        yield
    except Exception as error:  # zip files, TFDS, Pillow, array_record raise anything
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} is damaged or incomplete: {reason}. Restore it, or use {WAYS_OUT}"
        ) from error


def _digits(data: ConfigDict, split: str):
    """1,797 real handwritten digits, 8x8 in 17 grey levels, inside scikit-learn.

    Bilinear to 32x32, the three channels equal, grey 0..16 stretched to 0..255. Every
    fifth one, from the first, is a test image: 1,437 train, 360 test.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    test = np.arange(len(digits.target)) % 5 == 0
    chosen = test if split == "test" else ~test
    small = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    large = [Image.fromarray(x).resize((32, 32), Image.BILINEAR) for x in small]
    return np.repeat(np.stack(large)[..., None], 3, axis=-1), digits.target[chosen], 10


def _npz(data: ConfigDict, split: str):
    """x_train, y_train, x_test, y_test of a file; data.dir is where its path starts.

    x: uint8, (N, H, W), (N, H, W, 1) or (N, H, W, 3); y: integers from 0, (N,) or
    (N, 1). An optional num_classes; without it the largest label of both splits + 1.
    """
    path = pathlib.Path(data.dir).expanduser() / pathlib.Path(data.name).expanduser()
    if not path.is_file():
        raise DataError(f"no file {path.absolute()} (--config.data.name, .dir)")
    with _reading(path), np.load(path) as file:  # numpy refuses pickles by default
        missing = {"x_train", "y_train", "x_test", "y_test"} - set(file.files)
        names = {f"x_{split}", "y_train", "y_test", "num_classes"} & set(file.files)
        arrays = {name: file[name] for name in names}
    if missing:
        raise DataError(f"{path} lacks the arrays {', '.join(sorted(missing))}")
    images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    if len(labels) != len(images):
        raise DataError(f"{path}: {len(images)} {split} images, {len(labels)} labels")
    grey = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 1)
    if images.dtype != np.uint8 or not (grey or images.shape[3:] == (3,)):
        raise DataError(
            f"{path}: x_{split} is {images.dtype} {images.shape}, not uint8 (N, H, W), "
            "(N, H, W, 1) or (N, H, W, 3)"
        )
    for name in ("y_train", "y_test"):
        array = arrays[name]
        if array.dtype.kind not in "iu" or array.shape not in (
            (n := array.size,),
            (n, 1),
        ):
            raise DataError(
                f"{path}: {name} is {array.dtype} {array.shape}, not integers (N,)"
            )
    if grey:
        images = np.repeat(images.reshape(*images.shape[:3], 1), 3, axis=-1)
    largest = max(arrays[y].max(initial=0) for y in ("y_train", "y_test"))
    with _reading(path):
        num_classes = int(arrays.get("num_classes", largest + 1))
    return images, labels.reshape(-1), num_classes


def _tfds(data: ConfigDict, split: str):
    """A TFDS set of constant image size; grey images get three equal channels."""
    root = pathlib.Path(
        data.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    ).expanduser()
    directory = _find(root, data.name)
    if directory is None and (archive := archives.find(root, data.name)):
        with _reading(root):
            return archive(split)
    if directory is None:
        _refuse_unknown(root, data.name)
        if not data.download:
            files = " or ".join(["a TFDS folder", *archives.known(data.name)])
            raise DataError(
                f"{data.name} is not in {root.absolute()} ({files}). Ways out: "
                f"{WAYS_OUT}, --config.data.download=True (fetches it there)"
            )
        _download(root, data.name)
        directory = _find(root, data.name)
    return _prepared(directory, split, data.cache_dir)


def _find(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """The newest version below root/NAME[/CONFIG][:VERSION], None without one."""
    if not re.fullmatch(r"\w[\w./-]*(:[\d.]+)?", name):
        return None  # no pattern or path of another place for glob
    name, _, version = name.partition(":")
    files = list(root.glob(f"{name}/{version or '*'}/dataset_info.json"))
    files = files or list(root.glob(f"{name}/*/{version or '*'}/dataset_info.json"))
    found = [x.parent for x in files if re.fullmatch(r"\d+\.\d+\.\d+", x.parent.name)]
    configs = sorted({x.parent.relative_to(root).as_posix() for x in found})
    if len(configs) > 1:
        raise DataError(f"{name} has several forms: choose {' or '.join(configs)}")
    return max(found, key=lambda x: tuple(map(int, x.name.split("."))), default=None)


def _refuse_unknown(root: pathlib.Path, name: str) -> None:
    import tensorflow_datasets as tfds

    name = re.split("[:/]", name)[0]
    here = {x.name for x in root.iterdir()} if root.is_dir() else set()
    known = {
        "digits",
        *archives.SVHN,
        *here,
        *tfds.list_builders(with_community_datasets=False),
    }
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3) or sorted(STATISTICS)
        nearest = ", ".join(nearest)
        raise DataError(
            f"no data set is called {name!r}; nearest: {nearest}, or an .npz"
        )


def _prepared(directory: pathlib.Path, split: str, cache_dir: str):
    """A split of files that TFDS wrote, from the cache if they have not changed."""
    import tensorflow_datasets as tfds

    with _reading(directory):
        builder = tfds.builder_from_directory(directory)
        features, splits = dict(builder.info.features.items()), builder.info.splits
        keys = builder.info.supervised_keys or ("image", "label")
    if split not in splits:
        raise DataError(f"{directory} has no {split} split, only {', '.join(splits)}")
    pair = [features.get(key) if isinstance(key, str) else None for key in keys]
    if [*map(type, pair)] != [tfds.features.Image, tfds.features.ClassLabel]:
        raise DataError(f"{directory} holds no images with one class each: {features}")
    image, label = pair
    shape, dtype = image.shape, image.np_dtype
    if None in shape or shape[-1] not in (1, 3) or dtype != np.uint8:
        raise DataError(
            f"{directory}: images are {dtype} {shape}, not uint8, of one size, with 1 "
            "or 3 channels"
        )
    with _reading(directory):
        paths = [pathlib.Path(path) for path in splits[split].filepaths]
        files = {path.name: path.read_bytes() for path in paths}
    digest = zlib.crc32(repr((image, label, list(files))).encode())
    for content in files.values():
        digest = zlib.crc32(content, digest)

    def decode():
        with _reading(directory):
            expected = splits[split].num_examples
            if all(".tfrecord" in name for name in files):
                records = [
                    x for item in files.items() for x in tfrecords.records(*item)
                ]
            else:
                raw = tfds.decode.DeserializeMethod.RAW_BYTES
                source = builder.as_data_source(split, deserialize_method=raw)
                records = source.__getitems__(range(expected))
            if len(records) != expected:
                raise ValueError(f"{len(records)} {split} records, not {expected}")
            return _decode(records, *keys, image, label)

    key = f"{builder.info.full_name.replace('/', '-')}-{split}-{digest:08x}"
    return *_cached(cache_dir, key, decode), label.num_classes


def _decode(records: list[bytes], image_key, label_key, image, label):
    """Serialized examples -> images (N, H, W, 3) uint8, labels (N,) int64."""
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({image_key: image, label_key: label})
    # Pillow and an accurate TensorFlow agree to the bit; TensorFlow's default is the
    # fast DCT, which darkens red and blue by a grey level.
    skip = {image_key: tfds.decode.SkipDecoding()}
    height, width, _ = image.shape
    images = np.empty((len(records), height, width, 3), np.uint8)
    labels = np.empty(len(records), np.int64)

    def decode(start):
        for i in range(start, min(start + 500, len(records))):
            example = features.deserialize_example_np(records[i], decoders=skip)
            picture = Image.open(io.BytesIO(example[image_key]))
            if picture.size != (width, height):
                raise ValueError(f"image {i} is {picture.size}, not {(width, height)}")
            images[i] = picture.convert("RGB")
            labels[i] = example[label_key]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, range(0, len(records), 500)))
    return images, labels


def _cached(cache_dir: str, key: str, build: Callable) -> tuple[np.ndarray, np.ndarray]:
    """build() -> images, labels, kept as an .npz, whose checksums are verified on load.

    A damaged entry is built again; a directory that cannot be written is a warning.
    """
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = pathlib.Path(cache_dir or pathlib.Path(home, "wirings")).expanduser()
    path = directory / f"{key}.npz"
    try:
        with np.load(path) as file:
            return file["images"], file["labels"]
    except FileNotFoundError:
        pass
    except Exception as error:  # a flipped bit of a zip file can raise anything
        logging.warning("%s is damaged (%s): decoding again", path, error)
    images, labels = build()
    temporary = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
            temporary = file.name
            np.savez(file, images=images, labels=labels)
        os.replace(temporary, path)  # another process may be reading or writing it
    except OSError as error:
        logging.warning("decoded images are not kept in %s: %s", directory, error)
        if temporary:
            pathlib.Path(temporary).unlink(missing_ok=True)
    return images, labels


def _download(root: pathlib.Path, name: str) -> None:
    """Lets TFDS fetch a set and write its files, for which it imports TensorFlow."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(name, data_dir=root)
        _probe({urllib.parse.urlsplit(url)[:2] for url in builder.url_infos})
        builder.download_and_prepare()
    except Exception as error:
        reason = f"{name} could not be fetched to {root.absolute()}: {error}"
        raise DataError(f"{reason}. Ways out: {WAYS_OUT}") from error


def _probe(servers: set[tuple[str, str]]) -> None:
    """Raises OSError unless all (scheme, host) answer; TFDS would retry for 205 s."""
    problem = [f"no answer within {PROBE_SECONDS:.0f} s"]

    def ask():
        try:
            for scheme, host in servers:
                request = urllib.request.Request(f"{scheme}://{host}/", method="HEAD")
                with contextlib.suppress(urllib.error.HTTPError):  # it is there
                    urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            problem.clear()
        except Exception as error:
            problem[:] = [f"{host}: {error}"]

    # In a thread, because name resolution knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    if problem:
        raise OSError(f"no connection ({problem[0]})")
