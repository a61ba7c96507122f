"""Training: the step is a pure function, the run can die at any moment and go on."""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

import augment
import evaluate
import input_pipeline
import metrics
import nets
import optimizers
from runtime import preflight
from runtime.checkpoints import Checkpoints
from runtime.clock import Clock
from runtime.devices import make_advance, make_mesh, place
from runtime.preemption import Preempted, sigterm
from runtime.reporting import Reporter, write_confusion
from runtime.workdir import (
    WorkdirError,
    changes,
    evaluation_changes,
    lock,
    read_rows,
    save_config,
)

# Numbers that random keys are folded with. A step's: its devices take 0, 1, ...
AUGMENTATION = 2**31 - 1
# A seed's: the layers of the net take 0, 1, ...
STEPS = 2**31 - 2
# Dispatches that wait while one is computed: they keep the devices busy, but a SIGTERM
# has to see them through, and their batches take memory.
AHEAD = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is; a checkpoint holds exactly this.

    ema: averages of params and stats, which are evaluated; empty without train.ema.
    totals: sums of metrics since the last row of metrics.csv.
    bad_step: the first step whose loss or new weights were not finite, or -1.
    """

    step: jax.Array
    params: dict
    stats: dict
    wiring: dict
    opt_state: optax.OptState
    ema: dict
    totals: dict
    bad_step: jax.Array

    def variables(self) -> dict:
        """What nets.Definition.apply takes."""
        return {"params": self.params, "stats": self.stats, "wiring": self.wiring}

    def evaluated(self) -> dict:
        """The variables that a test sees."""
        return self.variables() | self.ema


@dataclasses.dataclass(frozen=True)
class Program:
    """What stays fixed during a run, made once from the configuration."""

    definition: nets.Definition
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    normalization: dict
    augmentation: dict
    label_smoothing: float
    ema: float
    num_classes: int
    seed: int


def create_train_state(
    config: ConfigDict,
    facts: input_pipeline.Facts,
    rate: optax.Schedule | None = None,
) -> tuple[Program, TrainState]:
    """Returns the program of a configuration and its state before the first step.

    rate: None for the schedule of config.optimizer.
    """
    net = nets.create(config.net, nnx.Rngs(config.seed))
    nets.configure(net, batch_norm_groups=config.train.batch_norm_groups)
    definition, variables = nets.split(net)
    rate = rate or optimizers.schedule(config, facts.num_train)
    optimizer = optimizers.create(config.optimizer, rate)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        **variables,
        opt_state=jax.jit(optimizer.init)(variables["params"]),  # one compilation
        ema=_averaged(variables) if config.train.ema else {},
        totals=metrics.zeros(config.net.num_classes),
        bad_step=jnp.full((), -1, jnp.int32),
    )
    normalization = dict(
        mean=facts.mean,
        std=facts.std,
        dtype=jnp.dtype(config.train.dtype),
    )
    program = Program(
        definition=definition,
        optimizer=optimizer,
        rate=rate,
        normalization=normalization,
        augmentation=config.augment.to_dict(),
        label_smoothing=config.train.label_smoothing,
        ema=config.train.ema,
        num_classes=config.net.num_classes,
        seed=config.seed,
    )
    return program, state


def train_step(program: Program, state: TrainState, batch: dict) -> TrainState:
    """One step on this device's share of a batch: image (b, H, W, C) uint8, label (b,).

    Runs inside a shard_map over the mesh axis 'data'; the result is the same on all
    devices. Running statistics of devices that keep their own are averaged.
    """
    device = jax.lax.axis_index("data")
    keys = jax.random.fold_in(jax.random.key(program.seed), STEPS)
    step_key = jax.random.fold_in(keys, state.step)
    key = jax.random.fold_in(step_key, device)
    x, targets = augment.augment(
        batch["image"],
        batch["label"],
        options=program.augmentation,
        normalization=program.normalization,
        num_classes=program.num_classes,
        key=jax.random.fold_in(step_key, AUGMENTATION),
        first_row=device * len(batch["label"]),
    )

    def loss_fn(params):
        variables = state.variables() | {"params": params}
        logits, stats = program.definition.apply(variables, x, train=True, key=key)
        smoothing = program.label_smoothing
        sums = metrics.sums(logits, targets, label_smoothing=smoothing)
        return sums["loss"] / sums["examples"], (stats, sums)

    grads, (stats, sums) = jax.grad(loss_fn, has_aux=True)(state.params)
    # One call, so that XLA fuses it into one all-reduce.
    grads, stats, sums = jax.lax.pmean((grads, stats, sums), "data")
    sums = jax.tree.map(lambda x: x * jax.lax.axis_size("data"), sums)
    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if program.ema:
        # Young averages follow faster (TensorFlow's ExponentialMovingAverage).
        decay = jnp.minimum(program.ema, (1 + state.step) / (10 + state.step))
        new = _averaged({"params": params, "stats": stats})
        ema = optax.incremental_update(new, ema, 1 - decay)
    # An update can explode after a sound loss, and must not be saved as sound. Of the
    # totals, since the loop stops for theirs and would wait for a bad step for ever.
    totals = jax.tree.map(jnp.add, state.totals, sums)
    sound = jnp.isfinite(totals["loss"]) & jnp.isfinite(optax.global_norm(params))
    bad = (state.bad_step < 0) & ~sound
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        stats=stats,
        opt_state=opt_state,
        ema=ema,
        totals=totals,
        bad_step=jnp.where(bad, state.step, state.bad_step),
    )


def _averaged(variables: dict) -> dict:
    """What config.train.ema averages: copies, since the originals are donated."""
    return {k: jax.tree.map(jnp.copy, variables[k]) for k in ("params", "stats")}


def train_and_evaluate(config: ConfigDict, workdir: str | pathlib.Path) -> dict:
    """Trains to config.train.epochs, resuming what the workdir holds.

    Returns the last row of metrics.csv (`step`, `epoch`, `learning_rate`, `train_*`,
    `test_*`) and the best one's `step` and `test_*` as `best_*`. A complete run is
    not repeated. Raises ValueError (DataError and CheckpointError among them) for
    what cannot be run, FloatingPointError for what is no longer finite, and
    Preempted after SIGTERM.
    """
    workdir, mesh, started = pathlib.Path(workdir), make_mesh(), time.perf_counter()
    preflight.check_agreement(config, workdir)
    examples, test_examples = input_pipeline.load_both(config.data)
    preflight.check(config, examples, test_examples, mesh)
    clock = Clock.of(config, len(examples.labels))
    if preflight.is_complete(config, workdir, clock.total):
        logging.info("%s holds this run, complete", workdir)
        return summary(read_rows(workdir / "metrics.csv"))
    with (
        lock(workdir),
        Checkpoints(workdir, config.checkpoint.keep) as checkpoints,
    ):
        facts = input_pipeline.facts(config.data, examples)
        program, state = create_train_state(config, facts)
        preflight.describe(config, examples, mesh)
        state = place(state, mesh)
        state, step = _resume(config, workdir, checkpoints, state, clock.total)
        if step == clock.total:
            return summary(read_rows(workdir / "metrics.csv"))
        save_config(workdir, config, facts)
        reporter = Reporter(workdir, clock, step, config)
        step_fn = functools.partial(train_step, program)
        advance = make_advance(config, step_fn, mesh, examples, state, step)
        advance = _first_step_told(advance, started)
        test = evaluate.make_test(
            config, program.definition, program.normalization, mesh, test_examples
        )
        with contextlib.closing(reporter), sigterm() as terminated:
            saved, bad_step, in_flight = step, state.bad_step, collections.deque()
            while step < clock.total and not terminated():
                next_eval = clock.next_eval(step)
                stop = min(next_eval, clock.next_save(step))
                while step < stop and reporter.finite and not terminated():
                    count = clock.dispatch(step, stop)
                    state, totals, bad_step = advance(state, count)
                    step += count
                    reporter.trained(step, totals)
                    in_flight.append(bad_step)
                    if len(in_flight) > AHEAD:
                        jax.block_until_ready(in_flight.popleft())
                with reporter.pause():
                    _refuse(bad_step, checkpoints)
                    row = None
                    if step == next_eval:
                        row = _progress(program, clock, step, totals)
                        means, confusion = test(state.evaluated())
                        row |= means
                        names = test_examples.class_names
                        reporter.evaluated(row, confusion, names)
                        zeros = jax.tree.map(jnp.zeros_like, state.totals)
                        state = dataclasses.replace(state, totals=zeros)
                    # The row is on disk before the checkpoint that counts on it.
                    if step > saved:
                        checkpoints.save(step, state, row)
                        saved = step
            checkpoints.wait()
            if terminated():
                raise Preempted(
                    f"SIGTERM: saved up to step {saved} in {workdir}; the same command "
                    "goes on from there"
                )
        return summary(reporter.rows)


def _resume(
    config: ConfigDict,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    state: TrainState,
    total: int,
) -> tuple[TrainState, int]:
    """The state that the workdir holds, else the given one, and its step."""
    if not checkpoints.steps():
        return state, 0
    state, step = checkpoints.restore(state, "last")
    if step > total:
        raise ValueError(
            f"{workdir} holds step {step} already, this run ends at step {total} "
            f"(train.epochs={config.train.epochs:g}): use another --workdir"
        )
    for change in changes(config, workdir):
        logging.warning(change)
    logging.info("resuming %s from step %d", workdir, step)
    return state, step


def _first_step_told(advance: Callable, started: float) -> Callable:
    """`advance`, which waits for its first result and logs the time since `started`."""
    first = True

    def told(state, most):
        nonlocal first
        outcome = advance(state, most)
        if first:
            jax.block_until_ready(outcome)
            logging.info("first step after %.1f s", time.perf_counter() - started)
            first = False
        return outcome

    return told


def _progress(program: Program, clock: Clock, step: int, totals: dict) -> dict:
    """The training half of a row of metrics.csv."""
    rate = float(f"{program.rate(step - 1):.6g}")
    row = {"step": step, "epoch": clock.epoch(step), "learning_rate": rate}
    return row | metrics.means(totals, "train")


def evaluate_checkpoint(config: ConfigDict, workdir: str | pathlib.Path) -> dict:
    """Evaluates config.eval.checkpoint of a workdir: `step` and `test_*`."""
    mesh, workdir = make_mesh(), pathlib.Path(workdir)
    preflight.check_agreement(config, workdir)
    examples = input_pipeline.load(config.data, "test")
    preflight.check_evaluation(config, examples)
    no_rate = optax.constant_schedule(0.0)  # nothing is trained
    with Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        train_examples = input_pipeline.load(config.data, "train")
        facts = input_pipeline.facts(config.data, train_examples)
        program, state = create_train_state(config, facts, no_rate)
        state = place(state, mesh)
        state, step = checkpoints.restore(state, config.eval.checkpoint)
    for change in evaluation_changes(config, workdir):
        logging.warning(change)
    test = evaluate.make_test(
        config, program.definition, program.normalization, mesh, examples
    )
    means, confusion = test(state.evaluated())
    names = examples.class_names
    try:
        write_confusion(workdir, confusion, names, f"-{step}")
    except WorkdirError as error:  # somebody else's workdir, to be read only
        logging.warning(error)
    return {"step": step} | means


def summary(rows: list[dict]) -> dict:
    """The last row, and beside it the best: its step and its test metrics."""
    if not rows:
        raise ValueError(
            "all steps are done, but metrics.csv has lost its rows; "
            "--mode=eval evaluates the checkpoints"
        )
    best = max(rows, key=lambda row: row[metrics.SELECTION])
    kept = {k: v for k, v in best.items() if k == "step" or k.startswith("test_")}
    return rows[-1] | {f"best_{k}": v for k, v in kept.items()}


def _refuse(bad_step: jax.Array, checkpoints: Checkpoints) -> None:
    """Ends the run, before anything is saved, if a step was not sound."""
    if (bad := int(bad_step)) < 0:
        return
    checkpoints.wait()
    good = checkpoints.steps()
    raise FloatingPointError(
        f"the loss of step {bad}, or what it made of the weights, is not finite; "
        + (
            f"the last good checkpoint is step {good[-1]} in {checkpoints.directory}"
            if good
            else "there is no checkpoint yet"
        )
        + "; a lower --config.optimizer.learning_rate may help"
    )
