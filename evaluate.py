"""Evaluation: every example exactly once, on any batch size and device count."""

import math
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import augment
import metrics
import nets

REPLICATED, SHARDED = PartitionSpec(), PartitionSpec("data")


def make_eval_step(
    definition: nets.Definition, mesh: Mesh, normalization: Mapping
) -> Callable:
    """A compiled (variables, totals, batch) -> totals; batches as shard() makes them.

    `normalization`: mean, std and dtype of augment.normalize.
    """

    def eval_step(variables, totals, batch):
        x = augment.normalize(batch["image"], **normalization)
        logits, _ = definition.apply(variables, x)
        sums = metrics.sums(logits, batch["label"], batch["mask"])
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
    eval_step: Callable, variables: dict, batches: Iterator[dict], mesh: Mesh
) -> dict[str, float]:
    """Means over the examples of one pass, named test_loss, test_accuracy, ..."""
    totals = jax.device_put(metrics.zeros(), NamedSharding(mesh, REPLICATED))
    for batch in batches:  # nothing is fetched before the end
        totals = eval_step(variables, totals, shard(batch, mesh))
    return metrics.means(totals, "test")


def shard(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays split over the data axis."""
    sharding = NamedSharding(mesh, SHARDED)
    return {
        k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()
    }


def padded_batch_size(batch_size: int, num_devices: int) -> int:
    """The next multiple of the device count; the masks cover what is added."""
    return math.ceil(batch_size / num_devices) * num_devices
