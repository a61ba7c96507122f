"""TensorFlow, imported late, and the batches that tf.data makes of images in memory."""

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np

from data_sources.errors import DataError

STEPS_PER_BLOCK = 128


@functools.cache
def tensorflow() -> ModuleType:
    """Imports TensorFlow; hides the accelerators, whose memory it would fill.

    Raises DataError if it cannot be imported.
    """
    try:
        import tensorflow as tf
    except ImportError as error:
        raise DataError(
            f"TensorFlow cannot be imported ({error}). Photographs require it: install "
            "it. Images in memory do not: set --config.data.pipeline=device"
        ) from error
    for kind in ("GPU", "TPU"):
        # A notebook that has used TensorFlow before has chosen its devices.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], kind)
    return tf


def batches(
    padded: np.ndarray,
    labels: np.ndarray,
    size: tuple[int, int],
    draw: Callable,
    start_step: int,
    workers: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields image (b, h, w, 3) uint8 and label (b,) int32, endlessly.

    padded: (N, H, W, 3); size: (h, w) of the crops; draw: step -> input_pipeline.Plan.
    Feeds plans to tf.data in blocks of steps; nothing inside the dataset is Python,
    because a Python function there deadlocks the exit of a process that is still
    prefetching.
    """
    tf = tensorflow()

    arrays = operator.attrgetter("index", "offset", "flip")
    # Only the last batch of a pass is smaller, so one of two in a row is whole.
    whole = max((draw(start_step), draw(start_step + 1)), key=lambda x: len(x.index))
    # Captured by the function below: one copy, neither in the graph nor per block.
    padded, labels = tf.constant(padded), tf.constant(labels)
    with tf.device("CPU"):
        blocks = [np.stack([x] * STEPS_PER_BLOCK) for x in arrays(whole)]
        index, offset, flip = variables = [tf.Variable(x) for x in blocks]

    def filled(x):  # to one shape for all batches; the surplus is cut off again
        missing = len(whole.index) - len(x)
        return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x

    def batch(i):
        image = crop_and_flip(padded, index[i], offset[i], flip[i], size)
        return {"image": image, "label": tf.gather(labels, index[i])}

    steps = tf.data.Dataset.range(STEPS_PER_BLOCK)
    workers = workers or tf.data.AUTOTUNE
    block = steps.map(batch, num_parallel_calls=workers, deterministic=True).prefetch(4)
    for start in itertools.count(start_step, STEPS_PER_BLOCK):
        plans = [draw(start + i) for i in range(STEPS_PER_BLOCK)]
        for variable, *rows in zip(variables, *map(arrays, plans), strict=True):
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
