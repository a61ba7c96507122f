"""What a recipe may ask of the step: smaller batches, averages, augmentation."""

import contextlib

import jax
import numpy as np
import pytest
from stepping import SLOWLY, Compilations, Steps, configured, save_images

import input_pipeline
import train
from devices import make_mesh
from reporting import read_rows


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("data") / "small.npz", 8)


@pytest.mark.parametrize("pipeline", ["device", "tf.data"])
def test_a_pass_may_end_with_a_smaller_batch(npz, tmp_path, pipeline):
    """100 images in batches of 16: seven steps a pass, the last of 4 images."""
    config = configured(npz, data__pipeline=pipeline, train__last_batch="partial")
    config.train.steps_per_dispatch = 3 if pipeline == "device" else 1
    with pytest.raises(ValueError, match="leaves 4 of 100 images, which 8 devices"):
        train.train_and_evaluate(config, tmp_path)
    with one_device(), Compilations() as compilations:
        result = train.train_and_evaluate(config, tmp_path)
    assert (result["step"], result["epoch"]) == (14, 2.0)
    # The other program is compiled in a thread of its own, whose log is not seen.
    assert compilations.names.count("steps" if pipeline == "device" else "step") == 1
    sizes, seen = [], []
    for step in range(14):
        plan = input_pipeline.plan(config, 100, step)
        sizes.append(len(plan.index))
        seen += list(plan.index)
    assert sizes == 2 * ([16] * 6 + [4])
    assert sorted(seen[:100]) == sorted(seen[100:]) == list(range(100))


@contextlib.contextmanager
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
        yield


def test_smaller_batches_are_the_same_on_both_paths(npz, tmp_path):
    rows = {}
    for pipeline in ("device", "tf.data"):
        config = configured(npz, data__pipeline=pipeline, train__last_batch="partial")
        with one_device():
            train.train_and_evaluate(config, tmp_path / pipeline)
        rows[pipeline] = read_rows(tmp_path / pipeline / "metrics.csv")
    assert rows["device"] == rows["tf.data"]


def test_averaged_weights_are_those_of_the_formula(npz):
    steps = Steps(configured(npz, train__ema=0.5), 1)
    kernel = lambda tree: np.asarray(jax.tree.leaves(tree["params"])[0])
    average = kernel(steps.state.ema)
    for step in range(4):
        steps.loss()
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * kernel(steps.state.variables())
        np.testing.assert_allclose(kernel(steps.state.ema), average, rtol=1e-5)
    tested = steps.state.evaluated()
    assert kernel(tested) is not kernel(steps.state.variables())
    np.testing.assert_array_equal(kernel(tested), kernel(steps.state.ema))
    assert not np.allclose(kernel(tested), kernel(steps.state.variables()), rtol=1e-4)


def test_augmentation_does_not_depend_on_the_devices(npz):
    fields = dict(augment__cutout=4, augment__mixup=1.0, augment__randaugment_ops=1)
    one, eight = (Steps(configured(npz, **fields, **SLOWLY), n) for n in (1, 8))
    losses = one.losses(2)
    np.testing.assert_allclose(losses, eight.losses(2), rtol=1e-4)
    assert not np.allclose(losses, Steps(configured(npz, **SLOWLY), 1).losses(2))
