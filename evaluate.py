"""Evaluation: every example exactly once, on any batch size and device count."""

import math
from collections.abc import Callable, Iterator, Mapping

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


def make_eval_step(
    definition: nets.Definition, mesh: Mesh, normalization: Mapping
) -> Callable:
    """A compiled (variables, totals, batch) -> totals; batches as shard() makes them.

    `normalization`: mean, std and dtype of augment.normalize.
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
    batches: Iterator[dict],
    mesh: Mesh,
    num_classes: int,
) -> tuple[dict[str, float], np.ndarray]:
    """One pass: means over its examples, and the confusion matrix.

    The means are named test_loss, test_accuracy, ...; the matrix counts examples for
    each (true class, predicted class).
    """
    totals = place(metrics.zeros(num_classes, confusion=True), mesh)
    for batch in batches:  # nothing is fetched before the end
        totals = eval_step(variables, totals, shard(batch, mesh))
    confusion = np.rint(jax.device_get(totals.pop("confusion"))).astype(np.int64)
    return metrics.means(totals, "test"), confusion


def make_test(
    config: ConfigDict,
    definition: nets.Definition,
    normalization: Mapping,
    mesh: Mesh,
    examples: input_pipeline.Split,
) -> Callable:
    """variables -> evaluate() over all examples; compiled with its first call."""
    eval_step = make_eval_step(definition, mesh, normalization)
    classes = config.net.num_classes
    return lambda variables: evaluate(
        eval_step, variables, test_batches(config, mesh, examples), mesh, classes
    )


def test_batches(
    config: ConfigDict, mesh: Mesh, examples: input_pipeline.Split
) -> Iterator[dict]:
    """One pass over the test images; batches are rounded up to the device count."""
    size = padded_batch_size(config.eval.batch_size, mesh.size)
    return input_pipeline.batches(config, "test", examples=examples, batch_size=size)


def padded_batch_size(batch_size: int, num_devices: int) -> int:
    """The next multiple of the device count; the masks cover what is added."""
    return math.ceil(batch_size / num_devices) * num_devices
