"""Image transformations, named as the papers call them; nothing here reads a file.

Random crop and flip exist twice, in JAX for images that live on the device and in
TensorFlow for tf.data. Both are told what to do by the same numbers, so they return the
same bits; neither draws anything itself. All that follows the flip (config.augment) is
JAX inside the train step, one implementation for every pipeline.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from augment import color, mixing, policies

BORDERS = ("zero", "mean", "dataset_mean", "white", "reflect")


def pad(
    images: np.ndarray, pad: int, border: str, mean: Sequence[float] = (0.0,)
) -> np.ndarray:
    """(N, H, W, C) uint8 -> (N, H + 2 pad, W + 2 pad, C) uint8.

    border: 'zero', black, before normalisation (specs: X-Nets); 'dataset_mean', what
    fb.resnet.torch's zeros after normalisation are, rounded (at most 0.5 of 255 off);
    'mean' (cfmz): the rows above and below repeat the rounded mean row of the image,
    then the columns left and right repeat the rounded mean column of the result, halves
    to even as in numpy; 'white'; 'reflect', without repeating the edge.
    mean: of the data set, per channel, 0..255. Raises ValueError for another border.
    """
    if border not in BORDERS:
        raise ValueError(f"unknown border {border!r}: choose from {', '.join(BORDERS)}")
    edges = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    if border == "reflect":
        return np.pad(images, edges, mode="reflect")
    n, height, width, channels = images.shape
    fill = {"dataset_mean": np.rint(mean), "white": 255}.get(border, 0)
    padded = np.empty((n, height + 2 * pad, width + 2 * pad, channels), np.uint8)
    padded[:] = fill
    padded[:, pad : pad + height, pad : pad + width] = images
    if border == "mean" and pad:
        # In pieces: the sums of a whole data set would not be small.
        for start in range(0, n, 1000):
            _fill_with_mean(padded[start : start + 1000], pad)
    return padded


def _fill_with_mean(padded: np.ndarray, pad: int) -> None:
    rows = padded[:, pad:-pad, pad:-pad]
    padded[:, :pad, pad:-pad] = padded[:, -pad:, pad:-pad] = _mean(rows, axis=1)
    columns = padded[:, :, pad:-pad]
    padded[:, :, :pad] = padded[:, :, -pad:] = _mean(columns, axis=2)


def _mean(images: np.ndarray, axis: int) -> np.ndarray:
    total = images.sum(axis=axis, keepdims=True, dtype=np.uint32)
    return np.rint(total / images.shape[axis]).astype(np.uint8)


def crop_and_flip(
    images: jax.Array,
    index: jax.Array,
    offset: jax.Array,
    flip: jax.Array,
    size: tuple[int, int],
) -> jax.Array:
    """Crops of chosen images, some of them mirrored; traceable, any dtype.

    images: (N, H, W, C); index: (B,) int; offset: (B, 2) int, row and column of the
    upper left corner; flip: (B,) bool; size: (h, w), static. Returns (B, h, w, C).
    """
    corners = jnp.stack([index, offset[:, 0], offset[:, 1]], axis=1)
    window = (1, *size, images.shape[-1])

    def crop(corner):
        start = (*corner, jnp.zeros((), corner.dtype))
        return jax.lax.dynamic_slice(images, start, window)[0]

    # One gather of whole windows; mapped one by one it is 16 times slower on a CPU.
    crops = jax.vmap(crop)(corners)
    return jnp.where(flip[:, None, None, None], crops[:, :, ::-1], crops)


def crop_and_flip_tf(images, index, offset, flip, size: tuple[int, int]):
    """crop_and_flip for tf.data: tensors in, (B, h, w, C) tensor out."""
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


def normalize(
    image: jax.Array, mean: Sequence[float], std: Sequence[float], dtype=jnp.float32
) -> jax.Array:
    """(..., C) bytes, or floats like them -> (image - mean) / std, as `dtype`.

    mean, std: per channel, on the scale 0..255. Computed in float32 at least, so that
    bfloat16 rounds once, at the end.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    mean, std = jnp.asarray(mean, wide), jnp.asarray(std, wide)
    return ((image.astype(wide) - mean) / std).astype(dtype)


# Independent random streams: to switch one augmentation on leaves the others as before.
_JIGSAW, _POLICY, _HLS, _JITTER, _LIGHTING, _CUTOUT = range(6)


def check(options: Mapping[str, Any], rows_per_device: int) -> None:
    """Raises ValueError for options of config.augment that cannot be carried out."""

    def refuse(reason):
        raise ValueError(f"config.augment: {reason}")

    for name, value in options.items():
        numbers = value if name == "hls" else [value]
        real = (isinstance(number, (int, float)) for number in numbers)
        if not all(real) or not all(0 <= number < np.inf for number in numbers):
            refuse(f"{name}={value} is not a number from 0 on")
    if len(options["hls"]) not in (0, 3):
        refuse(f"hls={tuple(options['hls'])} is not hue, lightness, saturation")
    if options["autoaugment"] and options["randaugment_ops"]:
        refuse("choose one of autoaugment and randaugment_ops")
    for name, largest in (
        ("randaugment_magnitude", policies.MAX_MAGNITUDE),
        ("cutmix_probability", 1),
        ("jitter", 1),  # beyond, colours turn into their opposites
    ):
        if options[name] > largest:
            refuse(f"{name}={options[name]} is more than {largest}")
    mixings = [name for name in mixing.NAMES if options[name]]
    if len(mixings) > 1:
        refuse(f"choose one of {', '.join(mixings)}")
    multiple = 4 if options["ricap"] else 2
    if mixings and rows_per_device % multiple:
        refuse(
            f"{mixings[0]} mixes images in groups of {multiple}, which do not divide "
            f"the {rows_per_device} images of a device: change train.batch_size, or, "
            "if it is the last batch, --config.train.last_batch=fill"
        )


def augmented(
    image: jax.Array,
    label: jax.Array,
    *,
    options: Mapping[str, Any],
    normalization: Mapping[str, Any],
    num_classes: int,
    key: jax.Array,
    first_row: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """What the net is trained on: normalised images and their targets; traceable.

    image: (b, H, W, 3) uint8, this device's share of a batch after crop and flip, whose
    first row is row first_row of the whole batch; label: (b,) int. options: of
    config.augment, which passed check; normalization: mean, std, dtype of normalize;
    key: the step's, the same on all devices. Returns (b, H, W, 3) and the labels, or
    the shares (b, num_classes) of all classes if images are mixed. What is drawn for an
    image depends on key and its row alone: devices do not matter, but for the
    rounding of jitter's mean grey.
    """
    image_key, batch_key = jax.random.split(key)
    rows, mean = first_row + jnp.arange(len(image)), normalization["mean"]

    def keys(stream):
        stream = jax.random.fold_in(image_key, stream)
        return jax.vmap(lambda row: jax.random.fold_in(stream, row))(rows)

    if options["jigsaw"]:
        image = jigsaw(keys(_JIGSAW), image)
    if options["autoaugment"]:
        image = policies.autoaugment(keys(_POLICY), image, mean)
    if operations := options["randaugment_ops"]:
        magnitude = options["randaugment_magnitude"]
        image = policies.randaugment(keys(_POLICY), image, mean, operations, magnitude)
    if limits := options["hls"]:
        image = color.hls(keys(_HLS), image, limits)
    if strength := options["jitter"]:
        image = color.jitter(keys(_JITTER), image.astype(jnp.float32), strength)
    if std := options["lighting"]:
        image = color.lighting(keys(_LIGHTING), image.astype(jnp.float32), std)
    x = normalize(image, **normalization)
    if size := options["cutout"]:
        x = cutout(keys(_CUTOUT), x, size)
    targets = jax.nn.one_hot(label, num_classes)
    if alpha := options["mixup"]:
        return mixing.mixup(batch_key, x, targets, alpha)
    if alpha := options["cutmix"]:
        probability = options["cutmix_probability"]
        return mixing.cutmix(batch_key, x, targets, alpha, probability)
    if beta := options["ricap"]:
        return mixing.ricap(batch_key, x, targets, beta)
    return x, label


def jigsaw(keys: jax.Array, image: jax.Array) -> jax.Array:
    """GUNN's cyclic shift towards lower indices; keys (b,), image (b, H, W, C).

    Two images of three are shifted, along the width or the height with equal
    probability, by 1 to all of its pixels: the last does nothing, so that with 32
    pixels 35.4 % of the images stay as they are.
    """
    height, width = image.shape[1:3]

    def shifted(key, image):
        kind_key, distance_key = jax.random.split(key)
        kind = jax.random.randint(kind_key, (), 0, 3)  # none, width, height
        sizes = jnp.array([1, width, height])
        distance = jax.random.randint(distance_key, (), 1, sizes[kind] + 1)
        rows = (jnp.arange(height) + distance * (kind == 2)) % height
        columns = (jnp.arange(width) + distance * (kind == 1)) % width
        return image[rows[:, None], columns]

    return jax.vmap(shifted)(keys, image)


def cutout(keys: jax.Array, x: jax.Array, size: int) -> jax.Array:
    """Cutout (arXiv 1708.04552): a square of zeros in each image, after normalisation.

    keys: (b,), x: (b, H, W, C). Its centre is any pixel; what lies outside the image is
    cut off. size: its side; an odd one is that of the original plus one, which halves
    it and rounds down.
    """
    height, width = x.shape[1:3]

    def cut(key, x):
        start = jax.random.randint(key, (2,), 0, np.array([height, width])) - size // 2
        row, column = np.arange(height) - start[0], np.arange(width) - start[1]
        rows, columns = ((i >= 0) & (i < size) for i in (row, column))
        return jnp.where((rows[:, None] & columns)[..., None], 0, x)

    return jax.vmap(cut)(keys, x)
