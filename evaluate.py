"""Evaluation: every example exactly once, for any batch size and number of devices."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

import augment
import input_pipeline
import metrics
import nets
from runtime.devices import REPLICATED, SHARDED, on_mesh, place, shard

# Of config.eval.views: how many views of an image are averaged.
VIEWS = {"center": 1, "flip": 2, "tencrop": 10}


def make_evaluator(
    config: ConfigDict,
    definition: nets.Definition,
    normalization: Mapping,
    mesh: Mesh,
    split: input_pipeline.Split,
    variables: dict,
    views: str = "center",
) -> Callable[[dict], tuple[dict[str, float], np.ndarray]]:
    """Returns the evaluator of a split: variables -> (means, confusion matrix).

    See `evaluate`. views: one of VIEWS; eval.batch_size counts the views of all images.
    Runs an empty batch with the given variables, so that the program is compiled and a
    batch that does not fit raises MemoryError now, before training.
    """
    eval_step = make_eval_step(definition, mesh, normalization, views)
    image_shape, num_classes = split.image_shape, config.net.num_classes
    if views == "tencrop":
        split = dataclasses.replace(split, ten_crops=True)
        image_shape = (VIEWS[views], *image_shape)
    batch_size = min(math.ceil(config.eval.batch_size / VIEWS[views]), len(split))
    batch_size = padded_batch_size(batch_size, mesh.size)
    logging.info("compiling the evaluation step")
    count = batch_size // jax.process_count()
    batch = {
        "image": np.zeros((count, *image_shape), np.uint8),
        "label": np.zeros(count, np.int32),
        "mask": np.zeros(count, np.float32),
    }
    try:
        totals = place(metrics.zeros(num_classes, confusion=True), mesh)
        jax.block_until_ready(eval_step(variables, totals, shard(batch, mesh)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"a test batch of {batch_size} images does not fit: choose a smaller "
            "--config.eval.batch_size"
        ) from error

    def evaluator(variables):
        batches = input_pipeline.batches(
            config, "test", examples=split, batch_size=batch_size
        )
        return evaluate(eval_step, variables, batches, mesh, num_classes)

    return evaluator


def make_eval_step(
    definition: nets.Definition,
    mesh: Mesh,
    normalization: Mapping,
    views: str = "center",
) -> Callable:
    """Returns a jitted (variables, totals, batch) -> totals; batches come from shard().

    normalization: mean, std and dtype of augment.normalize. views: one of VIEWS; the
    logits of the views of an image are averaged, as in fb.resnet.torch.
    """

    def eval_step(variables, totals, batch):
        image = batch["image"]
        if views == "flip":
            image = jnp.stack([image, image[:, :, ::-1]], axis=1)
        x = augment.normalize(image.reshape(-1, *image.shape[-3:]), **normalization)
        logits, _ = definition.apply(variables, x)
        logits = logits.reshape(-1, VIEWS[views], logits.shape[-1]).mean(axis=1)
        sums = metrics.sums(logits, batch["label"], batch["mask"], confusion=True)
        return jax.tree.map(jnp.add, totals, jax.lax.psum(sums, "data"))

    return on_mesh(eval_step, mesh, (REPLICATED, REPLICATED, SHARDED), donate=1)


def evaluate(
    eval_step: Callable,
    variables: dict,
    batches: Iterable[dict],
    mesh: Mesh,
    num_classes: int,
) -> tuple[dict[str, float], np.ndarray]:
    """Runs one pass and returns the means over its examples and the confusion matrix.

    The means are named test_loss, test_accuracy, ...; the matrix (classes, classes)
    int64 counts the examples of each true class (row) and predicted class (column).
    """
    totals = place(metrics.zeros(num_classes, confusion=True), mesh)
    for batch in batches:  # nothing is fetched before the end
        totals = eval_step(variables, totals, shard(batch, mesh))
    confusion = np.rint(jax.device_get(totals.pop("confusion"))).astype(np.int64)
    return metrics.means(totals, "test"), confusion


def padded_batch_size(batch_size: int, num_devices: int) -> int:
    """Rounds up to a multiple of the device count; masks cover the added rows."""
    return math.ceil(batch_size / num_devices) * num_devices
