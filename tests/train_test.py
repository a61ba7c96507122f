"""The step on one device and on many, and the loop around it."""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data_sources
import evaluate
import input_pipeline
import nets
import train
from runtime.checkpoints import Checkpoints
from runtime.devices import make_mesh, place
from runtime.dispatch import MAX_IN_FLIGHT, make_device_steps
from runtime.workdir import load_facts, read_rows, save_config
from tests.support import compiling, launch, tiny
from tests.support.stepping import (
    BATCH,
    SLOWLY,
    Compilations,
    Steps,
    configured,
    save_images,
)

# Compiling a step of every net takes long: only one of them is fast.
EVERY_NET = [
    name if name == "densenet" else pytest.param(name, marks=pytest.mark.slow)
    for name in nets.names()
]
# DelugeNet's cross-layer convolutions and GUNN's norms of many units have code of their
# own for groups.
PER_DEVICE = ["delugenet", "densenet", "gunn"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("data") / "small.npz", 8)


@pytest.fixture(scope="module", params=EVERY_NET)
def run(request, npz, tmp_path_factory):
    """Returns a function (devices, groups) -> (Steps after training, their losses).

    All tests of a net share its runs, because most of their time is compilation.
    """
    name, images = request.param, npz
    # All other nets need larger images.
    if name not in ("cfmz_resnet", "densenet", "resnet"):
        path = tmp_path_factory.mktemp("data") / "larger.npz"
        images = save_images(path, tiny.image_size(name))

    @functools.cache
    def trained(devices, groups=1):
        # With seed 0, one of AlexNet's ReLUs gets an input that is zero up to rounding:
        # its derivative is 0 or 1.
        fields = dict(seed=1, train__batch_norm_groups=groups, **SLOWLY)
        steps = Steps(configured(images, name, **fields), devices)
        # More steps, or groups of only four images, amplify rounding errors.
        return steps, steps.losses(4 if groups == 1 else 2)

    return trained


def assert_close(trees, rtol):
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        # Structural zeros (in GUNN, some shifts) are rounding noise here.
        atol = max(rtol * np.abs(b).max(), 1e-4)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def test_eight_devices_equal_one(run):
    (one, losses), (eight, others) = run(1), run(8)
    np.testing.assert_allclose(losses, others, rtol=1e-4)
    assert_close((one.state.variables(), eight.state.variables()), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("run", PER_DEVICE, indirect=True)
def test_statistics_per_device_are_those_of_groups(run):
    """Statistics per device equal those of as many groups on one device.

    For other nets, nets/nets_test.py only shows that devices exchange no statistics.
    """
    (alone, losses), (groups, others), (_, together) = run(4, 0), run(1, 4), run(1)
    np.testing.assert_allclose(losses, others, rtol=1e-4)
    assert_close((alone.state.variables(), groups.state.variables()), rtol=1e-3)
    assert not np.allclose(losses, together[:2], rtol=1e-3)


def test_synchronised_statistics_cost_two_sums_a_layer(run):
    steps, _ = run(8)
    layers = len(jax.tree.leaves(steps.state.stats)) // 2
    # The backward pass of GUNN computes the units again.
    sums = 3 if steps.program.config.net.name == "gunn" else 2
    assert compiling.collectives(steps.compiled).keys() == {"all-reduce"}
    assert compiling.collectives(steps.compiled)["all-reduce"] <= sums * layers + 3


@pytest.mark.slow
def test_groups_over_several_devices_exchange_nothing_but_sums(npz):
    fields = dict(train__batch_norm_groups=4)
    one, eight = (Steps(configured(npz, **fields, **SLOWLY), n) for n in (1, 8))
    np.testing.assert_allclose(one.losses(), eight.losses(), rtol=1e-4)
    assert compiling.collectives(eight.compiled).keys() == {"all-reduce"}


def test_plans_are_applied_where_the_images_are(npz):
    config = configured(npz, train__steps_per_dispatch=3, train__batch_norm_groups=0)
    examples = input_pipeline.load(config.data, "train")
    mesh = make_mesh()
    facts = input_pipeline.facts(config.data, examples)
    program, state = train.create_train_state(config, facts)
    plan = input_pipeline.plan(config, 100, 0)
    plans = jax.tree.map(lambda x: np.stack([x] * 3), plan)
    data = np.zeros((100, 10, 10, 3), np.uint8), examples.labels
    train_step = functools.partial(train.train_step, program)
    steps = make_device_steps(train_step, mesh)
    compiled = steps.lower(state, data, plans, 3).compile(
        compiler_options=compiling.options()
    )
    assert compiling.collectives(compiled).keys() == {"all-reduce"}
    assert compiling.collectives(compiled)["all-reduce"] <= 3


def test_state_is_donated(npz):
    steps = Steps(configured(npz), 8)
    before = steps.state
    steps.loss()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(steps.state))


@pytest.mark.slow
def test_bfloat16_keeps_float32_parameters(npz):
    single = Steps(configured(npz), 1)
    half = Steps(configured(npz, train__dtype="bfloat16"), 1)
    losses = half.losses()
    np.testing.assert_allclose(losses, single.losses(), rtol=0.1)
    assert "bf16" in half.compiled.as_text()
    kinds = {leaf.dtype for leaf in jax.tree.leaves(half.state)}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.slow
def test_dropout_is_a_function_of_seed_and_step(npz):
    """With constant weights and one batch, losses differ by dropout alone."""
    still = dict(optimizer__learning_rate=0.0, optimizer__weight_decay=0.0)
    steps = Steps(configured(npz, net__dropout=0.5, **still), 1)
    start, batch = jax.device_get(steps.state), next(steps.batches)

    def losses():
        steps.state, steps.seen = place(start, steps.mesh), 0.0
        steps.batches = itertools.repeat(batch)
        return steps.losses(2)

    first, second = losses()
    assert losses() == [first, second]
    assert abs(first - second) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_differs_between_devices(npz, rate):
    """Equal draws on two devices with equal images would double the loss of one."""
    options = dict(net__dropout=rate, train__batch_norm_groups=0)
    one = Steps(configured(npz, train__batch_size=BATCH // 2, **options), 1)
    two = Steps(configured(npz, **options), 2)
    batch = next(one.batches)
    one.batches = iter([batch])
    two.batches = iter([{k: np.concatenate([v, v]) for k, v in batch.items()}])
    assert np.isclose(two.loss(), 2 * one.loss(), rtol=1e-4) == (rate == 0)


@pytest.fixture
def compilations():
    with Compilations() as entered:
        yield entered


@pytest.mark.parametrize(
    "pipeline", ["device", pytest.param("tf.data", marks=pytest.mark.slow)]
)
def test_nothing_is_compiled_again(npz, tmp_path, monkeypatch, compilations, pipeline):
    """Not after an evaluation, not for the short dispatch before one."""
    per_dispatch = 4 if pipeline == "device" else 1
    config = configured(npz, data__pipeline=pipeline, train__epochs=3.0)
    config.train.steps_per_dispatch = per_dispatch
    marks = []
    evaluated = train.Reporter.evaluated

    def mark(reporter, *arguments):
        marks.append(len(compilations.names))
        evaluated(reporter, *arguments)

    monkeypatch.setattr(train.Reporter, "evaluated", mark)
    train.train_and_evaluate(config, tmp_path)
    names = compilations.names
    step = "steps" if pipeline == "device" else "step"
    assert (names.count(step), names.count("eval_step")) == (1, 1)
    assert len(marks) == 3
    assert names[marks[1] :] == []


class Lazy:
    """A number on a device that records when the host fetches it."""

    def __init__(self, value, events):
        self.value, self.events = value, events

    def __array__(self, dtype=None, copy=None):
        self.events.append("fetch")
        return np.asarray(self.value, dtype)

    def __int__(self):
        return int(np.asarray(self))


def test_the_host_waits_for_no_step(npz, tmp_path, monkeypatch):
    """Totals are fetched late and seldom: only for the lines of the log."""
    events, dispatched, lags = [], [], []
    make_advance, wait = train.make_advance, jax.block_until_ready

    def watched(*arguments):
        advance = make_advance(*arguments)

        def watched_advance(*state):
            events.append("step")
            state, totals, bad_step = advance(*state)
            dispatched.append(bad_step)
            lazy = {name: Lazy(value, events) for name, value in totals.items()}
            return state, lazy, Lazy(bad_step, events)

        return watched_advance

    def waiting(x):
        lags.extend(i for i, step in enumerate(reversed(dispatched), 1) if step is x)
        return wait(x)

    monkeypatch.setattr(jax, "block_until_ready", waiting)
    monkeypatch.setattr(train, "make_advance", watched)
    config = configured(npz, train__epochs=4.0, train__log_every_steps=10)
    config.eval.every_epochs = 4.0
    train.train_and_evaluate(config, tmp_path)
    assert events.count("step") == 25
    # The first totals begin the first interval. Those of steps 10 and 20 are fetched
    # while 11 and 21 run. The end may fetch anything.
    fetches = [number for number, event in numbered(events) if event == "fetch"]
    assert {n for n in fetches if 0 < n < 25} == {1, 11, 21}
    assert lags == [MAX_IN_FLIGHT] * (25 - MAX_IN_FLIGHT)


def numbered(events):
    """Pairs each event with the number of steps before it."""
    counts = itertools.accumulate(event == "step" for event in events)
    return zip(counts, events, strict=True)


@pytest.mark.parametrize(("jump", "epoch"), [(13, 2.0), (15, 2.4)])
@pytest.mark.slow
def test_a_non_finite_loss_stops_the_run(npz, tmp_path, jump, epoch):
    """Nor is it saved: step 15 has a sound loss and makes the weights of step 16."""
    config = configured(npz, train__epochs=100.0, checkpoint__every_steps=4)
    config.optimizer.update(drop_epochs=(epoch,), drop_factor=1e30)
    config.eval.every_epochs = 100.0
    with pytest.raises(FloatingPointError) as error:
        train.train_and_evaluate(config, tmp_path)
    said = re.match(r"the loss of step (\d+), or .* is step (\d+) in", str(error.value))
    bad, good = map(int, said.groups())
    assert (bad, good) == (jump, 12)
    with train.Checkpoints(tmp_path) as saved:
        assert max(saved.steps()) == 12
    # The same command ends the same way, and names the same steps.
    with pytest.raises(FloatingPointError, match=f"of step {bad}, .* step 12 in"):
        train.train_and_evaluate(config, tmp_path)


def test_a_non_finite_loss_is_noticed_within_a_long_epoch(npz, tmp_path, monkeypatch):
    steps = []
    make_advance = train.make_advance

    def counting(*arguments):
        advance = make_advance(*arguments)
        return lambda *state: steps.append(1) or advance(*state)

    monkeypatch.setattr(train, "make_advance", counting)
    config = configured(npz, optimizer__learning_rate=1e30, train__epochs=100.0)
    config.eval.every_epochs = 100.0
    with pytest.raises(FloatingPointError, match="there is no checkpoint yet"):
        train.train_and_evaluate(config, tmp_path)
    assert len(steps) < 10


def test_evaluations_and_checkpoints_are_not_training_time(npz, tmp_path, monkeypatch):
    seconds = [0.0]

    def slow(function):
        def call(*arguments):
            seconds[0] += 1000
            return function(*arguments)

        return call

    now = functools.partial(seconds.__getitem__, 0)
    monkeypatch.setattr(train, "Reporter", functools.partial(train.Reporter, now=now))
    monkeypatch.setattr(train.evaluate, "evaluate", slow(train.evaluate.evaluate))
    monkeypatch.setattr(train.Checkpoints, "save", slow(train.Checkpoints.save))
    train.train_and_evaluate(configured(npz), tmp_path)
    assert seconds[0] == 5000  # two evaluations, three checkpoints
    rows = read_rows(tmp_path / "speed.csv")
    assert [row["seconds"] for row in rows] == [0, 0]


def test_device_pipeline_equals_host(npz, tmp_path):
    """Batches are equal to the bit, but XLA may round two programs differently."""
    rows = {}
    for pipeline in ("device", "tf.data"):
        config = configured(npz, data__pipeline=pipeline)
        train.train_and_evaluate(config, tmp_path / pipeline)
        rows[pipeline] = read_rows(tmp_path / pipeline / "metrics.csv")
    for device, host in zip(rows["device"], rows["tf.data"], strict=True):
        assert device == pytest.approx(host, rel=1e-5)


def stop_at_once(monkeypatch):
    """As if SIGTERM had come before the first step."""
    monkeypatch.setattr(train, "sigterm", lambda: contextlib.nullcontext(lambda: True))


@pytest.mark.slow
def test_a_stop_before_the_first_step_loses_nothing(npz, tmp_path, monkeypatch):
    config = configured(npz, train__epochs=1.0)
    train.train_and_evaluate(config, tmp_path)
    config.train.epochs = 2.0
    with monkeypatch.context() as patch:
        stop_at_once(patch)
        with pytest.raises(train.Preempted, match="saved step 8 in"):
            train.train_and_evaluate(config, tmp_path)
        with pytest.raises(train.Preempted, match="saved step 1 in"):
            train.train_and_evaluate(config, tmp_path / "other")
    best = configured(npz, eval__checkpoint="best")
    assert train.evaluate_checkpoint(best, tmp_path)["step"] == 7  # 8 has no row
    whole = configured(npz, train__epochs=2.0)
    wanted = train.train_and_evaluate(whole, tmp_path / "whole")
    assert train.train_and_evaluate(config, tmp_path) == wanted


@pytest.mark.slow
def test_sigterm_after_the_last_step_is_not_lost(npz, tmp_path, monkeypatch):
    """The next of several seeds must not begin."""
    config = configured(npz, train__epochs=1.0)

    def late():
        return (tmp_path / "metrics.csv").exists()

    with monkeypatch.context() as patch:
        patch.setattr(train, "sigterm", lambda: contextlib.nullcontext(late))
        with pytest.raises(train.Preempted, match="saved step 7 in"):
            train.train_and_evaluate(config, tmp_path)
    assert train.train_and_evaluate(config, tmp_path)["step"] == 7


@pytest.mark.slow
def test_a_run_in_a_thread_of_a_notebook(npz, tmp_path):
    config = configured(npz, train__epochs=0.5)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        result = thread.submit(train.train_and_evaluate, config, str(tmp_path)).result()
    assert result["step"] == 4
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 4
    again = train.train_and_evaluate(config, tmp_path)
    assert again == result
    assert train.evaluate_checkpoint(config, tmp_path).items() <= result.items()


@pytest.mark.slow
def test_an_evaluation_warns_of_changes_and_survives_a_full_disk(
    npz, tmp_path, monkeypatch
):
    said, config = [], configured(npz, train__epochs=0.5)
    result = train.train_and_evaluate(config, tmp_path)

    def refuse(*_):
        raise train.WorkdirError("per_class-4.csv cannot be written")

    monkeypatch.setattr(train, "write_confusion", refuse)
    monkeypatch.setattr(train.logging, "warning", lambda text: said.append(str(text)))
    config.data.update(on_error="skip", cache_dir=str(tmp_path))
    config.optimizer.learning_rate = 2.0
    assert train.evaluate_checkpoint(config, tmp_path)["step"] == result["step"]
    assert [text.split()[:6] for text in said] == [
        ["evaluating", "with", "data.on_error=skip", "(the", "run", "was"],
        ["per_class-4.csv", "cannot", "be", "written"],
    ]


def test_a_small_net_learns(npz, tmp_path):
    result = train.train_and_evaluate(configured(npz, train__epochs=6.0), tmp_path)
    assert result["test_accuracy"] > 0.9
    assert result["best_test_accuracy"] >= result["test_accuracy"]


@pytest.mark.slow
def test_a_notebook_equals_the_command_line(tmp_path, monkeypatch):
    """Several seeds in one process, ~, and paths relative to the current directory."""
    save_images(tmp_path / "small.npz", 8)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(home))
    config = configured("small.npz", "cfmz_resnet", train__epochs=0.4, seed=3)
    config.seeds = 2
    results = train.train_and_evaluate(config, "~/run")
    assert [result["step"] for result in results] == [3, 3]
    assert results[0]["train_loss"] != results[1]["train_loss"]
    assert sorted(path.name for path in home.iterdir()) == ["run"]
    assert sorted(path.name for path in (home / "run").iterdir()) == ["seed3", "seed4"]
    assert (config.seed, config.seeds) == (3, 2)


@pytest.mark.slow
def test_a_crash_in_the_first_evaluation_loses_no_step(npz, tmp_path, monkeypatch):
    def crash(*_):
        raise RuntimeError("crash")

    config = configured(npz, "cfmz_resnet", train__epochs=1.0)
    wanted = train.train_and_evaluate(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", crash)
        with pytest.raises(RuntimeError, match="crash"):
            train.train_and_evaluate(config, tmp_path / "run")
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.steps() == [7]
        assert checkpoints.row(7) == {}
    assert train.train_and_evaluate(config, tmp_path / "run") == wanted
    assert len(read_rows(tmp_path / "run" / "metrics.csv")) == 1
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.row(7) == read_rows(tmp_path / "run" / "metrics.csv")[0]


def test_a_run_looks_for_its_data_set_once(npz, tmp_path, monkeypatch):
    """Even though it loads two splits: on a network file system, a look takes time."""
    looked, find = [], data_sources.find
    spy = lambda data: looked.append(data.name) or find(data)
    monkeypatch.setattr(data_sources, "find", spy)
    with pytest.raises(ValueError, match="batch_size=1000 is larger than"):
        train.train_and_evaluate(configured(npz, train__batch_size=1000), tmp_path)
    assert looked == [str(npz)]


def test_other_views_have_other_names(npz, tmp_path):
    config = configured(npz, "cfmz_resnet", eval__views="flip")
    splits = input_pipeline.load_both(input_pipeline.find(config.data))
    facts = input_pipeline.facts(config.data, *splits)
    with Checkpoints(tmp_path) as checkpoints:
        _, state = train.create_train_state(config, facts)
        checkpoints.save(7, state, {"test_accuracy": 0.5})
    save_config(tmp_path, config, facts)
    result = train.evaluate_checkpoint(config, tmp_path)
    assert result.keys() == {"step", "test_accuracy_flip", "test_loss_flip"}
    assert (tmp_path / "confusion-7_flip.csv").exists()


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another(npz, tmp_path):
    """The net that is trained has other classes and would have other graphs."""
    source, data = tmp_path / "source", dict(np.load(npz))
    config = configured(npz, "cfmz_resnet", seed=1)
    splits = input_pipeline.load_both(input_pipeline.find(config.data))
    facts = input_pipeline.facts(config.data, *splits)
    with Checkpoints(source) as checkpoints:
        _, state = train.create_train_state(config, facts)
        checkpoints.save(7, state, {"test_accuracy": 0.5})
    save_config(source, config, facts)
    for name in ("y_train", "y_test"):
        data[name] = np.arange(len(data[name])) % 3
    np.savez(tmp_path / "three.npz", **data)
    fields = dict(net__num_classes=3, net__graph_seed=5, init_from=str(source))
    fields |= dict(train__epochs=0.1, optimizer__learning_rate=0.0)
    config = configured(tmp_path / "three.npz", "cfmz_resnet", **fields)
    train.train_and_evaluate(config, tmp_path / "run")
    before, after = launch.arrays(source), launch.arrays(tmp_path / "run")
    variables = [k for k in before if k.startswith(("params/", "wiring/"))]
    fresh = [k for k in variables if not np.array_equal(before[k], after[k])]
    assert {k.split("/")[1] for k in fresh} == {"classifier", "classifier_norm"}
    assert any(k.startswith("wiring/") for k in variables)
    assert load_facts(tmp_path / "run").class_names == ("0", "1", "2")
