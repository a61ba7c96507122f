"""Batches of a split; a training batch is a function of (seed, step), nothing else.

One plan per step, drawn in numpy, defines the batch. Three pipelines carry it out:
  device   images in the memory of the accelerator, in JAX, without TensorFlow; in
           training, as a part of the train step (runtime/dispatch.py)
  tf.data  images in memory, on the host; the same bits
  threads  photographs on disk, on the host
Test batches are slices of the split in its order, on the host, with every pipeline.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

import data_sources
from augment import geometry
from data_sources import (
    BORDERS,
    DataError,
    DataSet,
    InMemory,
    OnDisk,
    crops,
    in_memory,
    is_of_recipe,
)
from data_sources.cache import directory as cache_directory

__all__ = ["DataError", "DataSet", "cache_directory", "in_memory", "is_of_recipe"]

Split = InMemory | OnDisk
IN_MEMORY, ON_DISK = ("device", "tf.data"), ("threads",)  # the defaults first
PIPELINES = ("auto", *IN_MEMORY, *ON_DISK)  # of data.pipeline
CHOICES = {
    "pipeline": PIPELINES,
    "border": BORDERS,
    "crop": ("pad", *crops.CROPS),
    "on_error": ("raise", "skip"),
}
_ORDER, _CROP_AND_FLIP, _CROPS = 0, 1, 2  # independent random streams of a seed


def load(data: ConfigDict, split: str) -> Split:
    """Loads a split ('train' or 'test') of config.data, always in the same order.

    Raises DataError for impossible values and for data that is missing or damaged.
    """
    return find(data).load(split)


def load_both(data_set: DataSet) -> tuple[Split, Split]:
    """Loads the training and the test split, and finds damaged test images.

    Photographs are decoded for this in threads (2 ms each), once, because the result is
    cached; not with on_error='skip'.
    """
    train, test = data_set.load("train"), data_set.load("test")
    cache_dir = data_set.data.cache_dir
    test.verify(cache_dir, jax.process_index(), jax.process_count())
    return train, test


def map_classes(split: Split, class_names: tuple[str, ...], name: str) -> Split:
    """Returns a split whose labels are numbers of these classes, matched by name.

    name: of the data set, for messages. Raises DataError if the names differ. If those
    of the run are unknown, the order decides.
    """
    unknown = len(split.class_names) == len(class_names) and not any(class_names)
    if split.class_names == class_names or unknown:
        return split
    names = sorted(set(class_names))
    if sorted(split.class_names) != names or len(names) != len(class_names):
        different = sorted({*split.class_names} ^ {*class_names}) or ["a name twice"]
        raise DataError(
            f"the classes of {name} are {_listed(split.class_names)}; those of the run "
            f"are {_listed(class_names)}; only one of them has {_listed(different)}: "
            "use the data set that the run was trained on, or another --workdir"
        )
    logging.info("the classes of %s are in another order: mapped by name", name)
    numbers = np.array([class_names.index(x) for x in split.class_names], np.int32)
    labels = numbers[split.labels]
    return dataclasses.replace(split, labels=labels, class_names=class_names)


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names):,})" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def find(data: ConfigDict) -> DataSet:
    """Finds the data set of config.data, without reading any images.

    Raises DataError if there is none, or if values are impossible.
    """
    check(data)
    pipeline(data)
    return data_sources.find(data)


def check(data: ConfigDict) -> None:
    """Raises DataError that names each impossible value of config.data."""
    problems = [
        f"unknown data.{field} {data[field]!r}: choose from {', '.join(choices)}"
        for field, choices in CHOICES.items()
        if data[field] not in choices
    ]
    if data.pad < 0:
        problems.append(f"data.pad must not be negative, got {data.pad}")
    if data.image_size < 8:
        problems.append(f"data.image_size must be at least 8, got {data.image_size}")
    values = {f"recipe.{x}": data.recipe[x] for x in ("mean", "std")}
    values |= {x: value for x, value in data.items() if x.endswith(("mean", "std"))}
    problems += [
        f"data.{field} {problem}"
        for field, value in values.items()
        if value and (problem := _problem(f"data.{field}", tuple(value)))
    ]
    if problems:
        raise DataError("; ".join(problems))


def _problem(field: str, value: tuple) -> str:
    """Returns what is wrong with a mean or std that is not empty, or ""."""
    numbers = all(isinstance(x, (int, float)) for x in value)
    std = field.endswith("std")
    if not numbers or len(value) != 3 or (std and min(value) <= 0):
        kind = "3 positive numbers" if std else "3 numbers"
        return f"must be {kind}, one per channel, or (), got {value}"
    # A mean of zeros and a std of ones change nothing, on any scale.
    if min(value) >= 0 and max(value) <= 1 and not {*value} <= {0, 1}:
        scaled = ",".join(f"{255 * x:g}" for x in value)
        return (
            f"is on the scale 0..1, got {value}, but images are on the scale 0..255: "
            f"set --config.{field}=({scaled})"
        )
    return ""


def pipeline(data: ConfigDict) -> str:
    """Returns data.pipeline, one of PIPELINES but 'auto', which it resolves.

    Raises DataError if it cannot read the images.
    """
    choices = IN_MEMORY if in_memory(data) else ON_DISK
    if data.pipeline == "auto":
        return choices[0]
    if data.pipeline in choices:
        return data.pipeline
    images = "images in memory" if in_memory(data) else "photographs on disk"
    raise DataError(
        f"data.pipeline={data.pipeline!r} cannot read {images} (data.crop="
        f"{data.crop!r}): choose {' or '.join(choices)}, or auto"
    )


@dataclasses.dataclass(frozen=True)
class Facts:
    """The properties of a data set that a trained net depends on.

    class_names: empty texts if they are unknown, as those of converted weights may be.
    mean, std: per channel, on the scale 0..255. digests: of the training and the test
    split, if known.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_train: int
    digests: tuple[int, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def facts(data: ConfigDict, train_split: Split, *others: Split) -> Facts:
    """Returns the facts about a data set, and the digests of all given splits.

    The normalisation is data.mean and data.std, else the recipe's for its own data set,
    else ImageNet's for photographs and the exact statistics of images in memory.
    """
    mean, std = tuple(data.mean), tuple(data.std)
    if not (mean and std):
        if data.recipe.mean and is_of_recipe(data):
            known = tuple(data.recipe.mean), tuple(data.recipe.std)
        elif in_memory(data):
            known = data_sources.statistics(train_split.images)
        else:
            known = tuple(data.photograph_mean), tuple(data.photograph_std)
        mean, std = mean or known[0], std or known[1]
    return Facts(
        train_split.class_names,
        train_split.image_shape,
        mean,
        std,
        len(train_split),
        tuple(split.digest for split in (train_split, *others)),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The random choices that define one training batch; a pytree.

    index: (B,) int32, example indices; flip: (B,) bool.
    Images in memory: offset (B, 2) int32, row and column of the crop in the padded
    image, 0..2 pad; pad: width of the border, static.
    Photographs: draws (B, crops.DRAWS), uniform in 0..1, which choose the crop.
    """

    index: np.ndarray
    offset: np.ndarray | None
    flip: np.ndarray
    draws: np.ndarray | None
    pad: int = dataclasses.field(metadata={"static": True})


def plan(config: ConfigDict, num_examples: int, step: int) -> Plan:
    """Draws the batch of a step, counted from 0, over all processes.

    Examples are a full permutation per epoch. train.last_batch 'fill': end to end, as
    in cfmz, so a batch may straddle two epochs; 'partial': the last batch of an epoch
    is smaller. Raises DataError for a batch larger than the data set.
    """
    data, batch_size = config.data, config.train.batch_size
    if not 0 < batch_size <= num_examples:
        raise DataError(
            f"train.batch_size must lie in 1..{num_examples}, the number of training "
            f"images of {data.name}, got {batch_size}"
        )
    if config.train.last_batch == "partial":
        epoch, step_in_epoch = divmod(step, -(-num_examples // batch_size))
        start = step_in_epoch * batch_size
    else:
        epoch, start = divmod(step * batch_size, num_examples)
    index = _permutation(config.seed, num_examples, epoch)[start : start + batch_size]
    missing = batch_size - len(index)
    if missing and config.train.last_batch == "fill":
        following = _permutation(config.seed, num_examples, epoch + 1)
        index = np.concatenate([index, following[:missing]])
    random = _random(config.seed, _CROP_AND_FLIP, step)
    flip = (random.random(len(index)) < 0.5) & data.flip
    if in_memory(data):
        shape = len(index), 2
        offset = random.integers(0, 2 * data.pad + 1, shape, dtype=np.int32)
        return Plan(index, offset, flip, None, data.pad)
    draws = _random(config.seed, _CROPS, step).random((len(index), crops.DRAWS))
    return Plan(index, None, flip, draws, 0)


def plans(config: ConfigDict, num_examples: int, start_step: int = 0) -> Iterator[Plan]:
    """Yields the plans of start_step, start_step + 1, ..., endlessly."""
    return (plan(config, num_examples, step) for step in itertools.count(start_step))


def batch_sizes(config: ConfigDict, num_examples: int) -> list[int]:
    """Returns the sizes of training batches, the smaller last one of a pass last."""
    rest = num_examples % config.train.batch_size
    partial = config.train.last_batch == "partial" and rest
    return [config.train.batch_size] + ([rest] if partial else [])


@functools.lru_cache(maxsize=4)  # threads may be at the end and the start of an epoch
def _permutation(seed: int, num_examples: int, epoch: int) -> np.ndarray:
    order = _random(seed, _ORDER, epoch).permutation(num_examples).astype(np.int32)
    order.setflags(write=False)
    return order


def _random(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, stream, number]))


def share(whole: Plan, process_index: int, process_count: int) -> Plan:
    """Returns the rows [p b, (p + 1) b) of process p, b = B / process_count."""
    size, remainder = divmod(len(whole.index), process_count)
    if remainder:
        raise DataError(
            f"a batch of {len(whole.index)} does not divide among {process_count} "
            "processes: change train.batch_size, or set train.last_batch=fill"
        )
    rows = slice(process_index * size, (process_index + 1) * size)
    return jax.tree.map(lambda x: x[rows], whole)


def apply_plan(padded_images, labels, plan: Plan) -> dict[str, jax.Array]:
    """Carries out a plan in JAX: image (B, H, W, C) uint8 and label (B,). Traceable.

    padded_images: (N, H + 2 pad, W + 2 pad, C), of `pad`.
    """
    _, height, width, _ = padded_images.shape
    image = geometry.crop_and_flip(
        padded_images,
        plan.index,
        plan.offset,
        plan.flip,
        size=(height - 2 * plan.pad, width - 2 * plan.pad),
    )
    return {"image": image, "label": labels[plan.index]}


def batches(
    config: ConfigDict,
    split: str,
    start_step: int = 0,
    *,
    examples: Split | None = None,
    batch_size: int | None = None,
    mean: Sequence[float] | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's rows of each batch: image (b, H, W, 3) uint8, label (b,).

    'train': from start_step on, endlessly. 'test': one pass in fixed order, with mask
    (b,) float32; the last batch is padded with zeros, whose mask is 0.

    examples: the split, if it is already loaded. batch_size: of 'test', over all
    processes, instead of eval.batch_size; rounded up to a multiple of the processes.
    mean: of the training images, for data.border='dataset_mean'; None: facts().mean.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if examples is None:
        examples = load(config.data, split)
    if split == "test":
        batch_size = config.eval.batch_size if batch_size is None else batch_size
        if batch_size < 1:
            raise DataError(f"eval.batch_size must be positive, got {batch_size}")
        return examples.test_batches(batch_size, index, count)

    def draw(step):
        return share(plan(config, len(examples), step), index, count)

    draw(start_step)  # raises errors now, not with the first batch
    border = config.data.border
    if mean is None:
        mean = facts(config.data, examples).mean if border == "dataset_mean" else (0.0,)
    if pipeline(config.data) == "device":
        padded = examples.padded(config.data.pad, border, mean)
        return _device_batches(padded, examples.labels, draw, start_step)
    return examples.train_batches(draw, start_step, border=border, mean=mean)


def preview(
    config: ConfigDict, examples: Split, mean: Sequence[float], count: int
) -> dict[str, np.ndarray]:
    """Returns the first `count` rows of the first training batch, without tf.data."""
    rows = plan(config, len(examples), 0)
    count = min(count, len(rows.index))
    count = count - count % 4 or count  # some augmentations mix groups of four
    rows = jax.tree.map(lambda x: x[:count], rows)
    if pipeline(config.data) == "threads":
        return next(examples.train_batches(lambda _: rows, 0))
    chosen = examples.take(rows.index)
    rows = dataclasses.replace(rows, index=np.arange(len(chosen)))
    padded = chosen.padded(config.data.pad, config.data.border, mean)
    return apply_plan(padded, chosen.labels, rows)


def _device_batches(padded, labels, draw, start_step):
    padded, labels = jax.device_put((padded, labels))
    apply = jax.jit(apply_plan)
    for step in itertools.count(start_step):
        yield jax.device_get(apply(padded, labels, draw(step)))
