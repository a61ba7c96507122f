import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metrics


def mean(logits, labels, mask=None):
    logits = jnp.asarray(logits, jnp.float32)
    return metrics.means(metrics.sums(logits, jnp.asarray(labels), mask), "test")


def test_loss_is_the_mean_negative_log_probability():
    logits = np.random.default_rng(0).normal(size=(7, 10)).astype(np.float32)
    labels = np.arange(7)
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = -np.log(probabilities[np.arange(7), labels]).mean()
    assert mean(logits, labels)["test_loss"] == pytest.approx(expected, rel=1e-6)


def test_accuracy_counts_the_class_that_argmax_names():
    logits = np.random.default_rng(1).integers(0, 3, size=(200, 10))  # many ties
    labels = np.random.default_rng(2).integers(0, 10, size=200)
    expected = (logits.argmax(1) == labels).mean()
    assert mean(logits, labels)["test_accuracy"] == pytest.approx(expected)


def test_top5_counts_the_five_largest():
    logits = np.random.default_rng(3).normal(size=(100, 10))
    labels = np.random.default_rng(4).integers(0, 10, size=100)
    expected = np.mean(
        [y in np.argsort(-x)[:5] for x, y in zip(logits, labels, strict=True)]
    )
    assert mean(logits, labels)["test_top5"] == pytest.approx(expected)


def test_equal_logits_are_no_knowledge():
    result = mean(np.zeros((10, 10)), np.arange(10))
    assert result["test_accuracy"] == pytest.approx(0.1)
    assert result["test_top5"] == pytest.approx(0.5)


def test_logits_that_are_not_numbers_are_wrong():
    result = mean(np.full((4, 10), np.nan), np.zeros(4, int))
    assert result["test_accuracy"] == result["test_top5"] == 0
    assert np.isnan(result["test_loss"])


def test_masked_examples_do_not_count_even_when_they_are_not_numbers():
    logits = np.random.default_rng(5).normal(size=(6, 10))
    alone = mean(logits, np.arange(6))
    padded = np.concatenate([logits, np.full((2, 10), np.nan)])
    mask = jnp.array([1.0] * 6 + [0.0] * 2)
    assert mean(padded, np.arange(8) % 10, mask) == alone


def test_sums_of_parts_are_the_sums_of_the_whole():
    logits = jnp.asarray(np.random.default_rng(6).normal(size=(9, 10)), jnp.float32)
    labels = jnp.arange(9)
    whole = metrics.sums(logits, labels)
    parts = [metrics.sums(logits[i : i + 4], labels[i : i + 4]) for i in (0, 4, 8)]
    added = metrics.zeros()
    for part in parts:
        added = jax.tree.map(jnp.add, added, part)
    for name in whole:
        assert added[name] == pytest.approx(float(whole[name]), rel=1e-6)
    assert whole["examples"] == 9
