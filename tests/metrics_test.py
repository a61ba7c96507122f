import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metrics

LOGITS = jnp.asarray(
    [
        [0.1, 0.9, 0.3, 0.2, 0.0, -1.0],
        [2.0, 2.0, 1.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [6.0, 5.0, 4.0, 3.0, 2.0, 1.0],
    ]
)


def correct(labels, name, logits=LOGITS):
    """Returns 1 for each example that counts in metric `name`, else 0."""
    mask = np.eye(len(labels), dtype=np.float32)
    one = lambda m: metrics.sums(logits, jnp.asarray(labels), jnp.asarray(m))[name]
    return [int(one(row)) for row in mask]


def test_accuracy_equals_argmax_with_ties_to_the_lower_class():
    assert np.argmax(LOGITS, -1).tolist() == [1, 0, 0, 0]
    assert correct([1, 0, 0, 0], "accuracy") == [1, 1, 1, 1]
    assert correct([0, 1, 1, 1], "accuracy") == [0, 0, 0, 0]


def test_top5_counts_the_five_best():
    assert correct([5, 5, 4, 4], "top5") == [0, 0, 1, 1]
    assert correct([4, 4, 5, 5], "top5") == [1, 1, 0, 0]


def test_five_classes_have_no_top5():
    sums = metrics.sums(LOGITS[:, :5], jnp.zeros(4, int))
    assert sums.keys() == metrics.zeros(5).keys() == {"loss", "accuracy", "examples"}


def test_means_without_examples_are_rejected():
    with pytest.raises(ValueError, match=r"no test example .*on_error=skip"):
        metrics.means(metrics.zeros(10), "test")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_is_never_right_and_infinities_compare(bad):
    logits = jnp.full((1, 6), bad)
    ties = int(not np.isnan(bad))
    assert correct([0], "accuracy", logits) == [ties]
    assert correct([5], "top5", logits) == [0]
    one = LOGITS[:1].at[0, 1].set(bad)
    assert correct([1], "accuracy", one) == [int(bad == np.inf)]


def test_loss_equals_the_cross_entropy():
    labels = np.array([1, 1, 3, 5])
    exp = np.exp(np.asarray(LOGITS, np.float64))
    wanted = -np.log((exp / exp.sum(-1, keepdims=True))[np.arange(4), labels])
    loss = metrics.cross_entropy(LOGITS, jnp.asarray(labels))
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    huge = metrics.cross_entropy(LOGITS * 1e30, jnp.asarray(labels))
    assert np.isfinite(huge).all()


def test_sums_of_parts_are_the_sums_of_the_whole():
    """For any batch sizes; a mean of means would depend on them."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(23, 10)).astype(np.float32)
    labels = random.integers(0, 10, 23)
    whole = metrics.means(metrics.sums(jnp.asarray(logits), jnp.asarray(labels)), "x")
    totals = metrics.zeros(10)
    for start in range(0, 23, 5):
        rows = slice(start, start + 5)
        part = metrics.sums(jnp.asarray(logits[rows]), jnp.asarray(labels[rows]))
        totals = jax.tree.map(jnp.add, totals, part)
    assert totals["examples"] == 23
    parts = metrics.means(totals, "x")
    assert parts.keys() == {"x_loss", "x_accuracy", "x_top5"}
    assert parts["x_accuracy"] == whole["x_accuracy"]
    assert parts["x_loss"] == pytest.approx(whole["x_loss"], rel=1e-6)


def test_masked_examples_do_not_count_even_if_they_are_nan():
    labels = jnp.asarray([1, 0, 0, 0])
    spoiled = LOGITS.at[2:].set(jnp.nan)
    sums = metrics.sums(spoiled, labels, jnp.asarray([1.0, 1.0, 0.0, 0.0]))
    assert sums == metrics.sums(LOGITS[:2], labels[:2])


def test_the_best_is_chosen_by_an_existing_metric():
    assert metrics.BEST_METRIC in metrics.means(
        metrics.sums(LOGITS, jnp.zeros(4, int)), "test"
    )


def test_smoothing_equals_its_shares_of_classes():
    """Smoothing by s is the target (1 - s) onehot + s / classes."""
    labels, classes = jnp.asarray([1, 0, 3, 2]), LOGITS.shape[-1]
    onehot = jax.nn.one_hot(labels, classes)
    plain = metrics.cross_entropy(LOGITS, labels)
    np.testing.assert_allclose(plain, metrics.cross_entropy(LOGITS, onehot), rtol=1e-6)
    smoothed = metrics.cross_entropy(LOGITS, labels, 0.3)
    shares = 0.7 * onehot + 0.3 / classes
    np.testing.assert_allclose(
        smoothed, metrics.cross_entropy(LOGITS, shares), rtol=1e-6
    )
    assert not np.allclose(plain, smoothed)
    sums = metrics.sums(LOGITS, shares)
    assert float(sums["accuracy"]) == float(metrics.sums(LOGITS, labels)["accuracy"])


def test_confusion_counts_unmasked_examples():
    labels, mask = jnp.asarray([1, 5, 0, 3]), jnp.asarray([1.0, 1.0, 0.0, 1.0])
    counts = metrics.sums(LOGITS, labels, mask, confusion=True)["confusion"]
    wanted = np.zeros((6, 6))
    wanted[1, 1] = wanted[5, 0] = wanted[3, 0] = 1
    np.testing.assert_array_equal(counts, wanted)
