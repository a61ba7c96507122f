"""Each test example counts exactly once, whatever the batch size and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import evaluate
import input_pipeline
import nets
import train
from configs import common

COUNT = 37  # shares no factor with any batch size below
STATISTICS = ((100.0, 110.0, 120.0), (50.0, 60.0, 70.0))


class Linear(nnx.Module):
    """The smallest classifier: one that numpy can repeat."""

    def __init__(self, kernel):
        self.kernel = nnx.Param(kernel)

    def __call__(self, x):
        return x.reshape(len(x), -1) @ self.kernel[...]


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 4, 4, 3), np.uint8)
    labels = rng.integers(0, 10, COUNT).astype(np.int32)
    return input_pipeline.Examples(images, labels, 10, *STATISTICS)


@pytest.fixture(scope="module")
def kernel():
    return np.random.default_rng(1).normal(size=(48, 10)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(examples, kernel):
    mean, std = (np.array(x) for x in STATISTICS)
    logits = ((examples.images - mean) / std).reshape(COUNT, -1) @ kernel
    own = logits[np.arange(COUNT), examples.labels]
    losses = np.log(np.exp(logits).sum(1)) - own
    accuracy = (logits.argmax(1) == examples.labels).mean()
    return {"test_loss": losses.mean(), "test_accuracy": accuracy}


def result(examples, kernel, batch_size, num_devices):
    config = common.base()
    config.eval.batch_size = batch_size
    mesh = train.make_mesh(jax.devices()[:num_devices])
    definition, variables = nets.split(Linear(jnp.asarray(kernel)))
    mean, std = STATISTICS
    normalization = {"mean": mean, "std": std, "dtype": jnp.float32}
    step = evaluate.make_eval_step(definition, mesh, normalization)
    batches = list(train.test_batches(config, mesh, examples))
    assert sum(batch["mask"].sum() for batch in batches) == COUNT
    return evaluate.evaluate(step, variables, iter(batches), mesh)


@pytest.mark.parametrize("num_devices", [1, 2, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 36, 37, 250])
def test_means_are_those_of_numpy(examples, kernel, expected, batch_size, num_devices):
    found = result(examples, kernel, batch_size, num_devices)
    assert found["test_accuracy"] == pytest.approx(expected["test_accuracy"], abs=1e-7)
    assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-5)


def test_padded_rows_cannot_spoil_the_sums(kernel):
    definition, variables = nets.split(Linear(jnp.asarray(kernel)))
    mesh = train.make_mesh(jax.devices()[:1])
    normalization = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "dtype": jnp.float32}
    step = evaluate.make_eval_step(definition, mesh, normalization)

    def batch(padding):
        image = np.ones((4, 4, 4, 3), np.float32)
        image[2:] = padding
        mask = np.array([1, 1, 0, 0], np.float32)
        return {"image": image, "label": np.zeros(4, np.int32), "mask": mask}

    clean, spoilt = (
        evaluate.evaluate(step, variables, iter([batch(value)]), mesh)
        for value in (0.0, np.nan)
    )
    assert clean == spoilt


def test_batch_sizes_are_rounded_up_to_the_devices():
    sizes = [evaluate.padded_batch_size(size, 8) for size in (1, 8, 9, 250)]
    assert sizes == [8, 8, 16, 256]
