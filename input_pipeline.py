"""Examples to batches; a training batch is a function of (seed, step), nothing else.

One plan per step, drawn in numpy, says what the batch is made of. Images in memory have
two paths that return the same bits: tf.data on the host, or JAX inside the train step,
with the images on the accelerator (pipeline='device', without TensorFlow). Photographs
stay in their files, which threads of the host read (photographs.py).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict

import augment
import data_sources
from data_sources import DataError, Examples, crops, photographs
from data_sources.photographs import Photographs, tensorflow

PIPELINES = ("tf.data", "device")
CROPS = ("pad", *crops.CROPS)
Split = Examples | Photographs  # in memory, or in their files
STEPS_PER_BLOCK = 128
_ORDER, _AUGMENTATION, _CROPS = 0, 1, 2  # independent random streams of a seed


def load(data: ConfigDict, split: str) -> Split:
    """The examples of config.data, 'train' or 'test': see data_sources.load.

    Unless data.crop is 'pad', they stay in their files: see photographs.load. Raises
    DataError also for an augmentation that does not exist.
    """
    for field, choices in (
        ("pipeline", PIPELINES),
        ("border", augment.BORDERS),
        ("crop", CROPS),
    ):
        if data[field] not in choices:
            choices = ", ".join(choices)
            raise DataError(
                f"unknown data.{field} {data[field]!r}: choose from {choices}"
            )
    if data.pad < 0:
        raise DataError(f"data.pad={data.pad} must not be negative")
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r}: choose train or test")
    source = data_sources if data.crop == "pad" else photographs
    return source.load(data, split)


def load_both(data: ConfigDict) -> tuple[Split, Split]:
    """load() for 'train' and 'test', with the mean and std of the former for both."""
    train = load(data, "train")
    data = data.copy_and_resolve_references()
    data.mean, data.std = train.mean, train.std
    return train, load(data, "test")


@dataclasses.dataclass(frozen=True)
class Facts:
    """The properties of a data set that a trained net depends on.

    mean, std: per channel, on the scale 0..255.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_train: int

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def facts(data: ConfigDict, train_split: Split) -> Facts:
    """Returns the facts about a data set whose training images are `train_split`."""
    return Facts(
        train_split.class_names or tuple(map(str, range(train_split.num_classes))),
        train_split.image_shape,
        train_split.mean,
        train_split.std,
        len(train_split.labels),
    )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "offset", "flip"],
    meta_fields=["pad"],
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training batch is made of; a pytree of three arrays.

    index: (B,) int32, which examples; offset: (B, 2) int32, row and column of the crop
    in the padded image, 0..2 pad; flip: (B,) bool; pad: static, the border's width.
    """

    index: np.ndarray
    offset: np.ndarray
    flip: np.ndarray
    pad: int


def plan(config: ConfigDict, num_examples: int, step: int) -> Plan:
    """The batch of a step, counted from 0, over all processes.

    The stream of examples is one full permutation per epoch. train.last_batch 'fill':
    end to end, as in cfmz, so that a batch may straddle two epochs; 'partial': the last
    batch of an epoch has what is left. Raises DataError for a batch that is larger than
    the data set.
    """
    data, batch_size = config.data, config.train.batch_size
    if not 0 < batch_size <= num_examples:
        raise DataError(
            f"train.batch_size={batch_size} must lie between 1 and the {num_examples} "
            f"training images of {data.name}"
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
    random = _random(config.seed, _AUGMENTATION, step)
    flip = random.random(len(index)) < 0.5
    offset = random.integers(0, 2 * data.pad + 1, (len(index), 2), dtype=np.int32)
    return Plan(index, offset, flip & data.flip, data.pad)


def batch_sizes(config: ConfigDict, num_examples: int) -> list[int]:
    """Those that occur in training: train.batch_size, and what 'partial' leaves."""
    rest = num_examples % config.train.batch_size
    partial = config.train.last_batch == "partial" and rest
    return [config.train.batch_size] + ([rest] if partial else [])


def plans(config: ConfigDict, num_examples: int, start_step: int = 0) -> Iterator[Plan]:
    """The plans of start_step, start_step + 1, ... without end."""
    return (plan(config, num_examples, step) for step in itertools.count(start_step))


@functools.lru_cache(maxsize=4)  # threads may be at the end and the start of an epoch
def _permutation(seed: int, num_examples: int, epoch: int) -> np.ndarray:
    order = _random(seed, _ORDER, epoch).permutation(num_examples).astype(np.int32)
    order.setflags(write=False)
    return order


def _random(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([seed, stream, number]))


def share(whole: Plan, process_index: int, process_count: int) -> Plan:
    """The rows [p b, (p + 1) b) that process p carries out, b = B / process_count."""
    size, remainder = divmod(len(whole.index), process_count)
    if remainder:
        raise DataError(
            f"a batch of {len(whole.index)} must be a multiple of the {process_count} "
            "processes: change train.batch_size, or set train.last_batch=fill"
        )
    rows = slice(process_index * size, (process_index + 1) * size)
    return jax.tree.map(lambda x: x[rows], whole)


def apply_plan(padded_images, labels, plan: Plan) -> dict[str, jax.Array]:
    """Traceable: image (B, H, W, C) uint8 and label (B,) of images from augment.pad."""
    image = augment.crop_and_flip(
        padded_images,
        plan.index,
        plan.offset,
        plan.flip,
        size=_size(padded_images, plan.pad),
    )
    return {"image": image, "label": labels[plan.index]}


def _size(padded_images, pad: int) -> tuple[int, int]:
    _, height, width, _ = padded_images.shape
    return height - 2 * pad, width - 2 * pad


def batches(
    config: ConfigDict,
    split: str,
    start_step: int = 0,
    *,
    examples: Split | None = None,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of each batch: image (b, H, W, 3) uint8, label (b,) int32.

    'train': from start_step on, without end. 'test': one pass in fixed order with mask
    (b,) float32; the last batch is filled up with zeros of mask 0; eval.batch_size is
    rounded up to a multiple of the processes. examples: the split, if loaded already.
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if examples is None:
        examples = load(config.data, split)
    if split == "test":
        if config.eval.batch_size < 1:
            raise DataError(f"eval.batch_size={config.eval.batch_size} is not positive")
        if isinstance(examples, Photographs):
            return photographs.evaluation_batches(
                examples, tensorflow(), config.eval.batch_size, index, count
            )
        return _test_batches(examples, config.eval.batch_size, index, count)
    data, num_examples = config.data, len(examples.labels)

    def draw(step):
        return share(plan(config, num_examples, step), index, count)

    draw(start_step)  # errors come here, and not with the first batch
    if isinstance(examples, Photographs):
        rows = functools.partial(_rows, config, num_examples, index, count)
        return photographs.train_batches(examples, tensorflow(), rows, start_step)
    padded = pad(data, examples)
    if data.pipeline == "device":
        return _device_batches(padded, examples.labels, draw, start_step)
    return _tf_batches(tensorflow(), padded, examples.labels, draw, start_step)


def _rows(
    config: ConfigDict, num_examples: int, index: int, count: int, step: int
) -> photographs.Rows:
    """A process's share of a plan, and the numbers that decide the crops."""
    whole = plan(config, num_examples, step)
    part = share(whole, index, count)
    draws = _random(config.seed, _CROPS, step).random((len(whole.index), crops.DRAWS))
    start = index * len(part.index)
    draws = draws[start : start + len(part.index)]
    return photographs.Rows(part.index, part.flip, draws)


def pad(data: ConfigDict, examples: Examples) -> np.ndarray:
    """The training images with the border that random crops are taken from."""
    return augment.pad(examples.images, data.pad, data.border, examples.mean)


def _test_batches(
    examples: Examples, batch_size: int, process_index: int, process_count: int
) -> Iterator[dict[str, np.ndarray]]:
    count = -(-batch_size // process_count)
    total = len(examples.labels)

    def rows(array, start):
        part = array[start : start + count]
        filled = np.zeros((count, *array.shape[1:]), array.dtype)
        filled[: len(part)] = part
        return filled

    ones = np.ones(total, np.float32)
    for batch_start in range(0, total, count * process_count):
        start = batch_start + process_index * count
        yield {
            "image": rows(examples.images, start),
            "label": rows(examples.labels, start),
            "mask": rows(ones, start),
        }


def _device_batches(padded, labels, draw, start_step):
    padded, labels = jax.device_put((padded, labels))
    apply = jax.jit(apply_plan)
    for step in itertools.count(start_step):
        yield jax.device_get(apply(padded, labels, draw(step)))


def _tf_batches(
    tf,
    padded: np.ndarray,
    labels: np.ndarray,
    draw: Callable[[int], Plan],
    start_step: int,
    workers: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Plans go in as blocks of steps; nothing inside the dataset calls Python.

    A Python function there deadlocks the exit of a process that is still prefetching.
    """
    # Of two successive batches one is whole.
    whole = max((draw(start_step), draw(start_step + 1)), key=lambda x: len(x.index))
    size = _size(padded, whole.pad)
    # Captured by the function below: one copy, neither in the graph nor per block.
    padded, labels = tf.constant(padded), tf.constant(labels)
    with tf.device("CPU"):
        index, offset, flip = (
            tf.Variable(np.stack([x] * STEPS_PER_BLOCK)) for x in jax.tree.leaves(whole)
        )

    def filled(x):  # one shape for all; what is too much is cut off again
        missing = len(whole.index) - len(x)
        return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x

    def carry_out(i):
        image = augment.crop_and_flip_tf(padded, index[i], offset[i], flip[i], size)
        return {"image": image, "label": tf.gather(labels, index[i])}

    steps = tf.data.Dataset.range(STEPS_PER_BLOCK)
    workers = workers or tf.data.AUTOTUNE
    block = steps.map(
        carry_out, num_parallel_calls=workers, deterministic=True
    ).prefetch(4)
    for start in itertools.count(start_step, STEPS_PER_BLOCK):
        drawn = [draw(start + i) for i in range(STEPS_PER_BLOCK)]
        for variable, *rows in zip(
            (index, offset, flip), *map(jax.tree.leaves, drawn), strict=True
        ):
            variable.assign(np.stack([filled(x) for x in rows]))
        for drawn_plan, batch in zip(drawn, block.as_numpy_iterator(), strict=True):
            yield {k: v[: len(drawn_plan.index)] for k, v in batch.items()}
