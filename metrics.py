"""Losses and accuracies, and their exact aggregation: sums over examples, then means.

Nothing else in the project knows the name of a metric.
"""

import jax
import jax.numpy as jnp

SELECTION = "test_accuracy"  # what makes a checkpoint the best


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """logits (N, classes), labels (N,) int -> softmax cross-entropy (N,)."""
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probabilities, labels[:, None], 1)[:, 0]


def sums(
    logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Sums over the examples whose mask is 1, and their number as `examples`."""
    mask = jnp.ones(labels.shape, logits.dtype) if mask is None else mask
    # Ties go to the lower class, as argmax has it; a NaN is beaten by everything.
    label, classes = labels[:, None], jnp.arange(logits.shape[-1])
    own = jnp.take_along_axis(logits, label, 1)
    behind = (logits < own) | ((logits == own) & (classes >= label))
    rank = jnp.sum(~behind, 1)
    per_example = {
        "loss": cross_entropy(logits, labels),
        "accuracy": rank < 1,
        "top5": rank < 5,
        "examples": jnp.ones_like(mask),
    }
    # `where`, so that a padded example cannot spoil the sum even with a NaN.
    return {k: jnp.sum(jnp.where(mask > 0, v, 0)) for k, v in per_example.items()}


def zeros() -> dict[str, jax.Array]:
    """What `sums` adds up to before the first example."""
    return {k: jnp.zeros(()) for k in ("loss", "accuracy", "top5", "examples")}


def means(totals: dict[str, jax.Array], prefix: str) -> dict[str, float]:
    """Sums on any device -> means over all examples, named with the prefix."""
    totals = {k: float(v) for k, v in jax.device_get(totals).items()}
    examples = totals.pop("examples")
    return {f"{prefix}_{k}": v / examples for k, v in totals.items()}
