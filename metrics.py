"""Losses and accuracies, and their exact aggregation: sums over examples, then means.

No other module knows the name of a metric.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

BEST_METRIC = "test_accuracy"  # selects the best checkpoint


def cross_entropy(
    logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0
) -> jax.Array:
    """Returns the softmax cross-entropy (N,) of logits (N, classes).

    targets: classes (N,) int, or shares (N, classes) that add up to 1.
    label_smoothing: share that is spread equally over all classes (Szegedy et al. 2016,
      section 7).
    """
    if targets.ndim == 1 and not label_smoothing:
        # optax's form for classes adds the largest logit back, which costs precision.
        log_probabilities = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_probabilities, targets[:, None], 1)[:, 0]
    if targets.ndim == 1:
        targets = jax.nn.one_hot(targets, logits.shape[1], dtype=logits.dtype)
    targets = optax.smooth_labels(targets, label_smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def sums(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array | None = None,
    *,
    label_smoothing: float = 0.0,
    confusion: bool = False,
) -> dict[str, jax.Array]:
    """Returns sums over the examples whose mask is 1, and their number as `examples`.

    targets: as in cross_entropy; the class with the largest share counts as correct.
    confusion: whether to add counts (classes, classes) by true and predicted class.
    top5 requires more than 5 classes.
    """
    labels = targets if targets.ndim == 1 else jnp.argmax(targets, 1)
    mask = jnp.ones(labels.shape, logits.dtype) if mask is None else mask
    # Ties go to the lower class, as in argmax; a NaN ranks behind everything.
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
    # `where` instead of a product: padded examples may be NaN.
    total = {k: jnp.sum(jnp.where(mask > 0, v, 0)) for k, v in per_example.items()}
    if confusion:
        true = (label == classes) & (mask[:, None] > 0)
        predicted = jnp.argmax(logits, 1)[:, None] == classes
        total["confusion"] = true.astype(float).T @ predicted.astype(float)
    return total


def zeros(num_classes: int, *, confusion: bool = False) -> dict[str, jax.Array]:
    """Returns the sums over no examples."""
    example = jnp.zeros((1, num_classes)), jnp.zeros(1, int)
    shapes = jax.eval_shape(functools.partial(sums, confusion=confusion), *example)
    return {name: jnp.zeros(shape.shape) for name, shape in shapes.items()}


def means(totals: dict[str, jax.Array], prefix: str) -> dict[str, float]:
    """Returns the means over all examples, by name with the prefix.

    totals: sums, on any device. Raises ValueError if no example could be read.
    """
    totals = {k: float(v) for k, v in jax.device_get(totals).items()}
    examples = totals.pop("examples")
    if not examples:
        raise ValueError(f"no {prefix} example could be read (data.on_error=skip)")
    return {f"{prefix}_{k}": v / examples for k, v in totals.items()}


def best(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the row with the highest BEST_METRIC; ties go to the first."""
    return max(rows, key=lambda row: row[BEST_METRIC])
