"""Augmentation inside the train step, after crop and flip (config.augment).

All of it is JAX, one implementation for every input pipeline. geometry.py and color.py
transform single images, policies.py applies random sequences of operations, mixing.py
mixes the images of a batch. This file defines their order.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from augment import color, mixing, policies
from augment.geometry import cutout, denormalize, jigsaw, normalize

__all__ = ["augment", "denormalize", "normalize"]

# Independent random streams: enabling one augmentation does not change the others.
_JIGSAW, _POLICY, _HLS, _JITTER, _LIGHTING, _CUTOUT = range(6)


def augment(
    image: jax.Array,
    label: jax.Array,
    *,
    options: Mapping[str, Any],
    normalization: Mapping[str, Any],
    num_classes: int,
    key: jax.Array,
    first_row: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the augmented, normalised images and their targets; traceable.

    Targets are the labels, or the shares (b, num_classes) of all classes if images are
    mixed. The draws for an image depend only on `key` and its row in the batch, so the
    result does not depend on the number of devices, except for the rounding of the
    mean grey in jitter.

    Args:
      image: (b, H, W, 3) uint8, this device's share of a batch after crop and flip.
      label: (b,) int.
      options: config.augment, validated by check.py.
      normalization: the mean, std and dtype of `normalize`.
      key: the key of the step, the same on all devices.
      first_row: the row of image[0] in the whole batch.
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
