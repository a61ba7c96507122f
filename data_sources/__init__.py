"""Where images come from: every source -> uint8 arrays in memory.

By config.data.name: 'digits' (inside scikit-learn), a set whose files lie in
config.data.dir (TFDS's tfrecord or array_record, the authors' own: archives.py, or
pictures in class folders: folders.py), or the path of an .npz. What is too large for
memory or of many sizes is read by photographs.py. Nothing here imports TensorFlow: its
import alone takes longer than decoding 50,000 small images with Pillow (11 s against
4 s on 2 cores), and the result is the same to the bit. TFDS's are then kept decoded.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import io
import os
import pathlib
import re
import zlib
from collections.abc import Callable

import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from data_sources import archives, cache, crops, downloads, folders, tfrecords

# Mean and standard deviation per channel, 0..255. cifar*: X-Nets' constants, which are
# those of the official images; digits: of its training split.
STATISTICS = {
    "cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    "cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "digits": ((77.9,) * 3, (82.6,) * 3),
    # fb.resnet.torch's, and torchvision's: 0.485, 0.456, 0.406 of 0..1.
    "imagenet2012": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
# Which split is 'test', where several are; the labels of ImageNet's own are secret, and
# many have deleted it. Of other sets, the first label tells.
HELD_OUT = ("test", "validation", "val")
WITHOUT_TEST = ("imagenet2012",)
# Ours that TFDS has under another name, and what they train on there.
JOINED = {"svhn_cropped_extra": ("svhn_cropped", "train+extra")}
ON_ERROR = ("raise", "skip")
WAYS_OUT = "--config.data.dir=... (where it lies), --config.data.name=digits (no files)"


class DataError(ValueError):
    """Data that is missing, damaged or does not fit; the message names the way out."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """A split in memory: images (N, H, W, 3) uint8, labels (N,) int32.

    mean, std: per channel on the scale 0..255, as augment.normalize takes them.
    class_names: by label, where they are known.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]


def load(data: ConfigDict, split: str) -> Examples:
    """The examples of config.data, 'train' or 'test', always in the same order.

    mean and std are those of data, else of STATISTICS, else of the training images.
    May run in a thread. Raises DataError for what is missing, damaged or misnamed; uses
    the network only if data.download is set.
    """
    refuse_on_error(data)
    images, labels, names = _read(data, split)

    def of_training_images():
        return statistics(images if split == "train" else _read(data, "train")[0])

    mean, std = normalization(data, of_training_images)
    return Examples(images, labels, len(names), mean, std, names)


def refuse_on_error(data: ConfigDict) -> None:
    if data.on_error not in ON_ERROR:
        choices = ", ".join(ON_ERROR)
        raise DataError(f"data.on_error={data.on_error!r}: choose from {choices}")


def normalization(data: ConfigDict, otherwise: Callable) -> tuple[tuple, tuple]:
    """Mean and standard deviation: those of data, else of STATISTICS, else otherwise().

    Raises DataError for what nothing can be normalised with.
    """
    mean, std = tuple(data.mean), tuple(data.std)
    if not (mean and std):
        npz = data.name.endswith(".npz")  # in a folder of whatever name
        known = (not npz and STATISTICS.get(_base(data.name))) or otherwise()
        mean, std = mean or known[0], std or known[1]
    numbers = all(isinstance(x, (int, float)) for x in (*mean, *std))
    if not numbers or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise DataError(
            f"data.mean={mean}, data.std={std}: 3 numbers each, std positive"
        )
    return mean, std


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


def _read(data: ConfigDict, split: str) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Images, labels and class names, checked for what would fail much later."""
    npz = data.name.endswith(".npz")
    source = _npz if npz else {"digits": _digits}.get(data.name, _tfds)
    images, labels, classes = source(data, split)  # their names, or how many
    names = tuple(map(str, range(classes) if isinstance(classes, int) else classes))
    return images, checked(data.name, split, labels, len(names)), names


def in_memory_only(data: ConfigDict) -> bool:
    """Whether a set that TFDS has not prepared is one of small images."""
    arrays = data.name == "digits" or data.name.endswith(".npz")
    return arrays or archives.find(root_of(data), data.name) is not None


def checked(name: str, split: str, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The labels as int32; raises DataError if there are none, or one out of range."""
    if not len(labels):
        raise DataError(f"{name}: the {split} split is empty")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"{name}: {split} labels lie in {low}..{high}, not in "
            f"0..{num_classes - 1} as {num_classes} classes need"
        )
    return labels.astype(np.int32)


@contextlib.contextmanager
def reading(path: pathlib.Path):
    """Whatever a reader raises becomes a DataError that names the path."""
    try:
        yield
    except Exception as error:  # zip files, TFDS, Pillow, array_record raise anything
        refuse_limit(error)
        reason = str(error) or type(error).__name__
        raise DataError(
            f"{path} is damaged or incomplete: {reason}. Restore it, or use {WAYS_OUT}"
        ) from error


def refuse_limit(error: Exception) -> None:
    """Raises DataError if too many files are open: then nothing is damaged."""
    reason = os.strerror(errno.EMFILE)
    if reason in str(error):  # of whatever class: array_record's has no number
        raise DataError(
            f"{reason}: raise the limit with `ulimit -n`, or write fewer shards"
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
    home = pathlib.Path(os.path.expanduser(data.dir))
    try:
        return archives.npz(home / os.path.expanduser(data.name), split)
    except archives.ArchiveError as error:
        raise DataError(str(error)) from error


def _tfds(data: ConfigDict, split: str):
    """Files below data.dir, all of one size; grey images get three equal channels."""
    root = root_of(data)
    directory = find(root, data.name)
    if directory is None and (archive := archives.find(root, data.name)):
        with reading(root):
            return archive(split)
    if directory is None and (folder := folders.find(root, data.name)):
        with in_folders():
            paths, labels, classes = folders.read(folder, split)
            images, kept = folders.decode(paths, data.on_error)
            return images, labels[kept], classes
    return _prepared(data, directory or fetched(data), split)


def root_of(data: ConfigDict) -> pathlib.Path:
    root = data.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(os.path.expanduser(root))


@contextlib.contextmanager
def in_folders():
    """FolderErrors become DataErrors; they name their way out themselves."""
    try:
        yield
    except folders.FolderError as error:
        raise DataError(str(error)) from error


def fetched(data: ConfigDict) -> pathlib.Path:
    """The directory of a set that is not there: downloaded, if data.download is set.

    Raises DataError if it does not, and for names that TFDS does not know.
    """
    root = root_of(data)
    if pathlib.Path(os.path.expanduser(data.name)).is_absolute():
        raise DataError(
            f"{data.name}: no {data.name.rstrip('/')}/train/CLASS/*.jpg. A TFDS set is "
            "named without its place: --config.data.dir says that"
        )
    base = _base(data.name)
    if nearest := downloads.nearest(root, base, (*STATISTICS, *archives.SVHN)):
        raise DataError(
            f"no data set is called {base!r}; nearest: {', '.join(nearest)}, or an "
            f".npz; {root.absolute()} has no folder {data.name}/train/CLASS either"
        )
    if not data.download:
        wanted = ["a TFDS folder", f"{data.name}/train/CLASS/*.jpg"]
        files = " or ".join([*wanted, *archives.known(data.name)])
        raise DataError(
            f"{data.name} is not in {root.absolute()} ({files}). Ways out: "
            f"{WAYS_OUT}, --config.data.download=True (fetches it there)"
        )
    try:
        downloads.fetch(root, _in_tfds(data.name))
    except Exception as error:
        reason = f"{data.name} could not be fetched to {root.absolute()}: {error}"
        raise DataError(f"{reason}. Ways out: {WAYS_OUT}") from error
    return find(root, data.name)


def _base(name: str) -> str:
    return re.split("[:/]", name)[0]


def _in_tfds(name: str) -> str:
    """TFDS's name of a set; its configuration and version stay behind it."""
    base = _base(name)
    return JOINED.get(base, (base,))[0] + name[len(base) :]


def find(root: pathlib.Path, name: str) -> pathlib.Path | None:
    """The newest version below root/NAME[/CONFIG][:VERSION], None without one."""
    if not re.fullmatch(r"\w[\w./-]*(:[\d.]+)?", name):
        return None  # no pattern or path of another place for glob
    name, _, version = _in_tfds(name).partition(":")
    files = list(root.glob(f"{name}/{version or '*'}/dataset_info.json"))
    files = files or list(root.glob(f"{name}/*/{version or '*'}/dataset_info.json"))
    found = [x.parent for x in files if re.fullmatch(r"\d+\.\d+\.\d+", x.parent.name)]
    configs = sorted({x.parent.relative_to(root).as_posix() for x in found})
    if len(configs) > 1:
        raise DataError(f"{name} has several forms: choose {' or '.join(configs)}")
    return max(found, key=lambda x: tuple(map(int, x.name.split("."))), default=None)


def described(data: ConfigDict, directory: pathlib.Path, split: str):
    """What TFDS says of a set: builder, splits, keys and features.

    splits: its name of 'train' or 'test', or two and a +; keys: of image and label in
    an example; features: those two. Raises DataError unless each image has one class.
    """
    import tensorflow_datasets as tfds

    with reading(directory):
        builder = tfds.builder_from_directory(directory)
        features, splits = dict(builder.info.features.items()), builder.info.splits
        keys = builder.info.supervised_keys or ("image", "label")
    pair = [features.get(key) if isinstance(key, str) else None for key in keys]
    if [*map(type, pair)] != [tfds.features.Image, tfds.features.ClassLabel]:
        raise DataError(f"{directory} holds no images with one class each: {features}")
    joined = JOINED.get(_base(data.name), ("", "train"))[1]
    names = HELD_OUT if split == "test" else (joined,)
    names = names[1:] if split == "test" and builder.name in WITHOUT_TEST else names
    stored = [name for name in names if {*name.split("+")} <= {*splits}]
    if not stored:
        raise DataError(
            f"{directory} has no {names[0]} split, only {', '.join(splits)}. Divide it "
            "yourself: into folders NAME/{train,test}/CLASS, or, small images of one "
            "size, an .npz with x_train, y_train, x_test, y_test"
        )
    with reading(directory):
        feature = {keys[1]: pair[1]}
        while stored[1:] and tfrecords.first(builder, stored[0], feature) == -1:
            del stored[0]  # nobody is told its labels
    return builder, stored[0], keys, pair


def _prepared(data: ConfigDict, directory: pathlib.Path, split: str):
    """A split of files that TFDS wrote, from the cache if they have not changed."""
    builder, split, keys, (image, label) = described(data, directory, split)
    shape, dtype = image.shape, image.np_dtype
    if None in shape or shape[-1] not in (1, 3) or dtype != np.uint8:
        raise DataError(
            f"{directory}: images are {dtype} {shape}, not uint8, of one size, with 1 "
            "or 3 channels; photographs of any size need --config.data.crop=inception"
        )
    with in_folders():
        count = builder.info.splits[split].num_examples
        folders.refuse_too_large(count, (*shape[:2], 3))  # grey becomes colour
    with reading(directory):
        paths = tfrecords.files(builder, split)
        files = {path.name: path.read_bytes() for path in paths}
    digest = zlib.crc32(repr((image, label, list(files))).encode())
    for content in files.values():
        digest = zlib.crc32(content, digest)

    def decode():
        with reading(directory):
            expected = builder.info.splits[split].num_examples
            if all(".tfrecord" in name for name in files):
                records = [
                    x for item in files.items() for x in tfrecords.records(*item)
                ]
            else:
                records = tfrecords.source(builder, split).__getitems__(range(expected))
            if len(records) != expected:
                raise ValueError(f"{len(records)} {split} records, not {expected}")
            skip = data.on_error == "skip"
            images, labels = _decode(records, *keys, image, label, skip)
            return {"images": images, "labels": labels}

    key = f"{builder.info.full_name.replace('/', '-')}-{split}-{digest:08x}"
    arrays = cache.kept(data.cache_dir, f"{key}-{data.on_error}", decode)
    lost = builder.info.splits[split].num_examples - len(arrays["labels"])
    if lost:
        logging.warning("%d damaged images of %s, %s left out", lost, directory, split)
    return arrays["images"], arrays["labels"], label.names


def _decode(records: list[bytes], image_key, label_key, image, label, skip: bool):
    """Serialized examples -> images (N, H, W, 3) uint8, labels (N,) int64.

    Raises ValueError for those that cannot be decoded, or skips them.
    """
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict({image_key: image, label_key: label})
    # Pillow and an accurate TensorFlow agree to the bit; TensorFlow's default is the
    # fast DCT, which darkens red and blue by a grey level.
    as_stored = {image_key: tfds.decode.SkipDecoding()}
    height, width, _ = image.shape
    images = np.empty((len(records), height, width, 3), np.uint8)
    labels, good = np.empty(len(records), np.int64), np.ones(len(records), bool)

    def decode_one(i):
        example = features.deserialize_example_np(records[i], decoders=as_stored)
        picture = Image.open(io.BytesIO(example[image_key]))
        if picture.size != (width, height):
            raise ValueError(f"it is {picture.size}, not {(width, height)}")
        images[i], labels[i] = crops.rgb(picture), example[label_key]

    def decode(start):
        for i in range(start, min(start + 500, len(records))):
            try:
                decode_one(i)
            except Exception as error:  # Pillow raises anything on damaged files
                if not skip:
                    remedy = "--config.data.on_error=skip leaves such images out"
                    raise ValueError(f"image {i}: {error} ({remedy})") from error
                good[i] = False

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(decode, range(0, len(records), 500)))
    return (images, labels) if good.all() else (images[good], labels[good])
