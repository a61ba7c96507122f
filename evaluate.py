"""Evaluation: every example exactly once, for any batch size and number of devices."""

import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

import augment
import input_pipeline
import metrics
import nets
from runtime.devices import REPLICATED, SHARDED, place, shard


def make_evaluator(
    config: ConfigDict,
    definition: nets.Definition,
    normalization: Mapping,
    mesh: Mesh,
    split: input_pipeline.Split,
    variables: dict,
) -> Callable[[dict], tuple[dict[str, float], np.ndarray]]:
    """Returns the evaluator of a split: variables -> (means, confusion matrix).

    See `evaluate`. Runs an empty batch with the given variables, so that the program
    is compiled and a batch that does not fit raises MemoryError now, before training.
    """
    eval_step = make_eval_step(definition, mesh, normalization)
    batch_size = min(config.eval.batch_size, len(split))
    batch_size = padded_batch_size(batch_size, mesh.size)
    _try_batch(eval_step, variables, batch_size, split, mesh, config.net.num_classes)

    def evaluator(variables):
        batches = input_pipeline.batches(
            config, "test", examples=split, batch_size=batch_size
        )
        return evaluate(eval_step, variables, batches, mesh, config.net.num_classes)

    return evaluator


def _try_batch(eval_step, variables, batch_size, split, mesh, num_classes) -> None:
    count = batch_size // jax.process_count()
    batch = {
        "image": np.zeros((count, *split.image_shape), np.uint8),
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


def make_eval_step(
    definition: nets.Definition, mesh: Mesh, normalization: Mapping
) -> Callable:
    """Returns a jitted (variables, totals, batch) -> totals; batches come from shard().

    normalization: mean, std and dtype of augment.normalize.
    """

    def eval_step(variables, totals, batch):
        x = augment.normalize(batch["image"], **normalization)
        logits, _ = definition.apply(variables, x)
        sums = metrics.sums(logits, batch["label"], batch["mask"], confusion=True)
        return jax.tree.map(jnp.add, totals, jax.lax.psum(sums, "data"))

    return jax.jit(
        jax.shard_map(
            eval_step,
            mesh=mesh,
            in_specs=(REPLICATED, REPLICATED, SHARDED),
            out_specs=REPLICATED,
            check_vma=False,
        ),
        donate_argnums=1,
    )


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
