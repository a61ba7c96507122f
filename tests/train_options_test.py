"""Options of the train step: smaller last batches, averaged weights, augmentation."""

import contextlib
import itertools

import jax
import numpy as np
import pytest

import augment
import input_pipeline
import metrics
import train
from runtime.checkpoints import Checkpoints
from runtime.devices import make_mesh, place, shard
from runtime.workdir import read_rows
from tests.support.stepping import SLOWLY, Compilations, Steps, configured, save_images


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("data") / "small.npz", 8)


@pytest.mark.slow
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


@pytest.mark.slow
def test_smaller_batches_are_the_same_on_both_paths(npz, tmp_path):
    """The last bits of the losses may differ: XLA compiles two programs."""
    rows = {}
    for pipeline in ("device", "tf.data"):
        config = configured(npz, data__pipeline=pipeline, train__last_batch="partial")
        with one_device():
            train.train_and_evaluate(config, tmp_path / pipeline)
        rows[pipeline] = read_rows(tmp_path / pipeline / "metrics.csv")
    for device, host in zip(rows["device"], rows["tf.data"], strict=True):
        assert device == pytest.approx(host, rel=1e-5)


@pytest.mark.slow
def test_averaged_weights_follow_the_formula(npz):
    steps = Steps(configured(npz, train__ema=0.5), 1)
    # Weights and running statistics alike, on the first of each.
    first = lambda tree, kind: np.asarray(jax.tree.leaves(tree[kind])[0])
    average = {kind: first(steps.state.ema, kind) for kind in ("params", "stats")}
    for step in range(4):
        steps.loss()
        decay = min(0.5, (1 + step) / (10 + step))
        for kind, old in average.items():
            new = first(steps.state.variables(), kind)
            average[kind] = decay * old + (1 - decay) * new
            found = first(steps.state.ema, kind)
            np.testing.assert_allclose(found, average[kind], rtol=1e-4, atol=1e-6)
    evaluated, latest = steps.state.eval_variables(), steps.state.variables()
    for kind in average:
        np.testing.assert_array_equal(
            first(evaluated, kind), first(steps.state.ema, kind)
        )
        assert not np.allclose(first(evaluated, kind), first(latest, kind), rtol=1e-4)


@pytest.mark.slow
def test_evaluation_uses_averaged_weights(npz, tmp_path):
    rows = {}
    for ema in (0.0, 0.999):
        config = configured(npz, train__ema=ema, eval__checkpoint="last")
        rows[ema] = train.train_and_evaluate(config, tmp_path / str(ema))
        again = train.evaluate_checkpoint(config, tmp_path / str(ema))
        assert again["test_loss"] == rows[ema]["test_loss"]
    # The last bits may differ: XLA compiles two programs.
    expected = pytest.approx(rows[0.999]["train_loss"], rel=1e-5)
    assert rows[0.0]["train_loss"] == expected
    assert rows[0.0]["test_loss"] != rows[0.999]["test_loss"]


@pytest.mark.slow
def test_every_step_augments_anew(npz):
    still = dict(optimizer__learning_rate=0.0, optimizer__weight_decay=0.0)
    for cutout in (0, 4):
        steps = Steps(configured(npz, augment__cutout=cutout, **still), 1)
        steps.batches = itertools.repeat(next(steps.batches))
        first, second = steps.losses(2)
        assert (abs(first - second) > 1e-3) == bool(cutout)


@pytest.mark.slow
def test_the_loss_is_smoothed_as_configured(npz):
    fields = dict(train__label_smoothing=0.3, train__batch_norm_groups=0)
    steps = Steps(configured(npz, **fields), 1)
    batch = next(steps.batches)
    x = augment.normalize(batch["image"], **steps.program.normalization)
    apply, variables = steps.program.definition.apply, steps.state.variables()
    key = jax.random.key(0)
    logits, _ = jax.jit(lambda v, x: apply(v, x, train=True, key=key))(variables, x)
    wanted = metrics.cross_entropy(logits, batch["label"], 0.3).mean()
    steps.batches = iter([batch])
    np.testing.assert_allclose(steps.loss(), wanted, rtol=1e-5)


@pytest.mark.slow
def test_augmentation_does_not_depend_on_the_devices(npz):
    fields = dict(augment__cutout=4, augment__mixup=1.0, augment__randaugment_ops=1)
    one, eight = (Steps(configured(npz, **fields, **SLOWLY), n) for n in (1, 8))
    losses = one.losses(2)
    np.testing.assert_allclose(losses, eight.losses(2), rtol=1e-4)
    assert not np.allclose(losses, Steps(configured(npz, **SLOWLY), 1).losses(2))


@pytest.mark.slow
def test_accumulated_batches_are_the_groups_of_one_batch(npz):
    """Each batch normalises with its own statistics, so two make two groups."""
    whole = Steps(configured(npz, train__batch_norm_groups=2, **SLOWLY), 1)
    fields = dict(train__batch_size=8, optimizer__accumulate_steps=2)
    halves = Steps(configured(npz, **fields, **SLOWLY), 1)
    start = jax.device_get(halves.state)
    batch = next(whole.batches)
    both = whole.compiled(whole.state, shard(batch, whole.mesh))[0]
    params, means = [], []
    for half in (slice(8), slice(8, 16)):
        part = {name: array[half] for name, array in batch.items()}
        halves.state = halves.compiled(halves.state, shard(part, halves.mesh))[0]
        params.append(jax.device_get(halves.state.params))
        means.append(jax.device_get(halves.state.stats))
    equal = lambda a, b, rtol: jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol, atol=1e-7), a, b
    )
    equal(params[0], start.params, 0)
    equal(params[1], jax.device_get(both.params), 1e-5)
    assert not np.allclose(*(x["classifier"]["kernel"] for x in params), rtol=1e-5)
    # Running statistics move with every batch, not with every update.
    for before, after in zip((start.stats, means[0]), means, strict=True):
        first = [jax.tree.leaves(x)[0] for x in (before, after)]
        assert not np.allclose(*first, rtol=1e-3)


@pytest.mark.slow
def test_a_run_resumes_within_an_accumulation(npz, tmp_path):
    fields = dict(name="adamw", clip_norm=1.0, accumulate_steps=3)
    fields = {f"optimizer__{name}": value for name, value in fields.items()}
    config = configured(npz, "cfmz_resnet", **fields)
    steps = Steps(config, 1)
    with Checkpoints(tmp_path) as checkpoints:
        steps.losses(4)  # an update, and the first of the next three batches
        checkpoints.save(4, steps.state)
        losses, wanted = steps.losses(3), jax.device_get(steps.state)
        _, fresh = train.create_train_state(
            config,
            input_pipeline.facts(
                config.data, input_pipeline.load(config.data, "train")
            ),
        )
        steps.state, _ = checkpoints.restore(place(fresh, steps.mesh))
    steps.batches = input_pipeline.batches(config, "train", 4)
    steps.seen = float(steps.state.totals["loss"])
    assert steps.losses(3) == losses
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(steps.state), wanted)
