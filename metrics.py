"""Losses and accuracies, and their exact aggregation: sums over examples, then means.

Nothing else in the project knows the name of a metric.
"""

import functools

import jax
import jax.numpy as jnp

SELECTION = "test_accuracy"  # what makes a checkpoint the best


def cross_entropy(
    logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Softmax cross-entropy (N,) of logits (N, classes).

    targets: classes (N,) int, or shares (N, classes) that add to 1. label_smoothing:
    the share that all classes get alike (Szegedy et al. 2016, section 7).
    """
    log_probabilities = jax.nn.log_softmax(logits)
    if targets.ndim == 1:
        own = jnp.take_along_axis(log_probabilities, targets[:, None], 1)[:, 0]
    else:
        own = jnp.sum(targets * log_probabilities, 1)
    if not label_smoothing:
        return -own
    alike = jnp.mean(log_probabilities, 1)
    return -(1 - label_smoothing) * own - label_smoothing * alike


def sums(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    *,
    label_smoothing: float = 0.0,
    confusion: bool = False,
) -> dict[str, jax.Array]:
    """Sums over the examples whose mask is 1, and their number as `examples`.

    targets as in cross_entropy; of shares, the class with the largest is the right
    answer; top5 needs more than 5 classes. confusion: also the (classes, classes)
    counts of (true, predicted).
    """
    labels = targets if targets.ndim == 1 else jnp.argmax(targets, 1)
    mask = jnp.ones(labels.shape, logits.dtype) if mask is None else mask
    # Ties go to the lower class, as argmax has it; a NaN is beaten by everything.
    label, classes = labels[:, None], jnp.arange(logits.shape[-1])
    own = jnp.take_along_axis(logits, label, 1)
    behind = (logits < own) | ((logits == own) & (classes >= label))
    rank = jnp.sum(~behind, 1)
    per_example = {
        "loss": cross_entropy(logits, targets, label_smoothing),
        "accuracy": rank < 1,
        "examples": jnp.ones_like(mask),
    }
    if logits.shape[-1] > 5:
        per_example["top5"] = rank < 5
    # `where`, so that a padded example cannot spoil the sum even with a NaN.
    total = {k: jnp.sum(jnp.where(mask > 0, v, 0)) for k, v in per_example.items()}
    if confusion:
        true = (label == classes) & (mask[:, None] > 0)
        predicted = jnp.argmax(logits, 1)[:, None] == classes
        total["confusion"] = true.astype(float).T @ predicted.astype(float)
    return total


def zeros(num_classes: int, *, confusion: bool = False) -> dict[str, jax.Array]:
    """What `sums` adds up to before the first example."""
    example = jnp.zeros((1, num_classes)), jnp.zeros(1, int)
    shapes = jax.eval_shape(functools.partial(sums, confusion=confusion), *example)
    return {name: jnp.zeros(shape.shape) for name, shape in shapes.items()}


def means(totals: dict[str, jax.Array], prefix: str) -> dict[str, float]:
    """Sums on any device -> means over all examples, named with the prefix.

    Raises ValueError where there were none: none that could be read.
    """
    totals = {k: float(v) for k, v in jax.device_get(totals).items()}
    examples = totals.pop("examples")
    if not examples:
        raise ValueError(f"no {prefix} example could be read (data.on_error=skip)")
    return {f"{prefix}_{k}": v / examples for k, v in totals.items()}
