"""Training: the step is a pure function, the run can die at any moment and go on."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

import augment
import evaluate
import input_pipeline
import metrics
import nets
import optimizers
import preflight
from checkpoints import Checkpoints, save_config
from nets.layers.norm import BatchNorm
from optimizers import Clock
from preemption import Preempted, sigterm
from reporting import Reporter, read_rows

REPLICATED, SHARDED = evaluate.REPLICATED, evaluate.SHARDED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is; a checkpoint holds exactly this.

    totals: sums of metrics since the last row of metrics.csv.
    bad_step: the first step whose loss was not finite, -1 while there is none.
    """

    step: jax.Array
    params: dict
    stats: dict
    wiring: dict
    opt_state: optax.OptState
    totals: dict
    bad_step: jax.Array

    def variables(self) -> dict:
        """What nets.Definition.apply takes."""
        return {"params": self.params, "stats": self.stats, "wiring": self.wiring}


@dataclasses.dataclass(frozen=True)
class Program:
    """What stays fixed during a run, made once from the configuration."""

    definition: nets.Definition
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    normalization: dict
    seed: int


def create_train_state(
    config: ConfigDict, examples: input_pipeline.Examples
) -> tuple[Program, TrainState]:
    """The program of a configuration and its state before the first step."""
    net = nets.create(config.net, nnx.Rngs(config.seed))
    for _, module in nnx.iter_modules(net):
        if isinstance(module, BatchNorm):
            module.axis_name = "data" if config.train.sync_batch_norm else None
            module.group_size = config.train.batch_norm_group
    definition, variables = nets.split(net)
    rate = optimizers.schedule(
        config.optimizer, len(examples.labels), config.train.batch_size
    )
    optimizer = optimizers.create(config.optimizer, rate)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        **variables,
        opt_state=jax.jit(optimizer.init)(variables["params"]),  # one compilation
        totals=metrics.zeros(),
        bad_step=jnp.full((), -1, jnp.int32),
    )
    normalization = dict(
        mean=tuple(config.data.mean) or examples.mean,
        std=tuple(config.data.std) or examples.std,
        dtype=jnp.dtype(config.train.dtype),
    )
    return Program(definition, optimizer, rate, normalization, config.seed), state


def train_step(program: Program, state: TrainState, batch: dict) -> TrainState:
    """One step on this device's share of a batch: image (b, H, W, C) uint8, label (b,).

    Runs inside a shard_map over the mesh axis 'data'; the result is the same on all
    devices. Running statistics of devices that keep their own are averaged.
    """
    key = jax.random.fold_in(jax.random.key(program.seed), state.step)
    key = jax.random.fold_in(key, jax.lax.axis_index("data"))

    def loss_fn(params):
        x = augment.normalize(batch["image"], **program.normalization)
        variables = state.variables() | {"params": params}
        logits, stats = program.definition.apply(variables, x, train=True, key=key)
        sums = metrics.sums(logits, batch["label"])
        return sums["loss"] / sums["examples"], (stats, sums)

    grads, (stats, sums) = jax.grad(loss_fn, has_aux=True)(state.params)
    # One call, so that XLA fuses it into one all-reduce.
    grads, stats, sums = jax.lax.pmean((grads, stats, sums), "data")
    sums = jax.tree.map(lambda x: x * jax.lax.axis_size("data"), sums)
    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
    bad = (state.bad_step < 0) & ~jnp.isfinite(sums["loss"])
    return dataclasses.replace(
        state,
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        stats=stats,
        opt_state=opt_state,
        totals=jax.tree.map(jnp.add, state.totals, sums),
        bad_step=jnp.where(bad, state.step, state.bad_step),
    )


def make_train_step(program: Program, mesh: Mesh) -> Callable:
    """The compiled (state, batch) -> (state, totals, bad_step); `state` is donated.

    Totals and bad_step come back twice because those inside the state are donated
    to the next step, while the reporter fetches its copy during that step.
    """

    def step(state, batch):
        state = train_step(program, state, batch)
        return state, state.totals, state.bad_step

    return _compiled(step, mesh, (REPLICATED, SHARDED))


def make_device_steps(program: Program, mesh: Mesh) -> Callable:
    """The compiled (state, data, plans, count) -> (state, totals, bad_step).

    data: padded images and labels, whole on every device; plans: K of them stacked
    (K, B, ...), of which the first `count` are carried out in one dispatch.
    """

    def steps(state, data, plans, count):
        def body(i, state):
            plan = jax.tree.map(lambda x: x[i], plans)
            return train_step(program, state, input_pipeline.apply_plan(*data, plan))

        # A loop of one step would only keep XLA:CPU from using its threads.
        if len(plans.index) == 1:
            state = body(0, state)
        else:
            state = jax.lax.fori_loop(0, count, body, state)
        return state, state.totals, state.bad_step

    plans = PartitionSpec(None, "data")
    return _compiled(steps, mesh, (REPLICATED, REPLICATED, plans, REPLICATED))


def _compiled(step: Callable, mesh: Mesh, in_specs: tuple) -> Callable:
    # check_vma: the custom gradients of the lowerings do not carry its annotations.
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=in_specs, out_specs=REPLICATED, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=0)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """These devices, or all of all processes, on one axis, 'data'."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,)
    )


def train_and_evaluate(config: ConfigDict, workdir: str | pathlib.Path) -> dict:
    """Trains to config.train.epochs, resuming what the workdir holds.

    Returns the last row of metrics.csv (`step`, `epoch`, `learning_rate`, `train_*`,
    `test_*`) and the best one's `step` and `test_*` as `best_*`. A complete run is
    not repeated. Raises ValueError (DataError and CheckpointError among them) for
    what cannot be run, FloatingPointError for a loss that is not finite, and
    Preempted after SIGTERM.
    """
    workdir, mesh, started = pathlib.Path(workdir), make_mesh(), time.perf_counter()
    examples = input_pipeline.load(config.data, "train")
    test_examples = input_pipeline.load(config.data, "test")
    preflight.check(config, examples, mesh)
    clock = Clock.of(config, len(examples.labels))
    with Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        if preflight.is_complete(config, workdir, checkpoints, clock.total):
            logging.info("%s holds this run, complete", workdir)
            return summary(read_rows(workdir / "metrics.csv"))
        program, state = create_train_state(config, examples)
        preflight.describe(config, examples, mesh)
        state = jax.device_put(state, NamedSharding(mesh, REPLICATED))
        state, step = _resume(config, workdir, checkpoints, state)
        save_config(workdir, config)
        reporter = Reporter(workdir, clock, step, config.train.tensorboard)
        advance = make_advance(config, program, mesh, examples, state, step)
        advance = _first_step_told(advance, started)
        test = make_test(config, program, mesh, test_examples)
        with contextlib.closing(reporter), sigterm() as terminated:
            saved, bad_step = step, state.bad_step
            while step < clock.total:
                next_eval = clock.next_eval(step)
                stop = min(next_eval, clock.next_save(step))
                while step < stop and reporter.finite and not terminated():
                    state, totals, bad_step = advance(state, stop - step)
                    step += min(clock.steps_per_dispatch, stop - step)
                    reporter.trained(step, totals)
                _refuse(bad_step, checkpoints)
                row = None
                if step == next_eval:
                    row = _progress(program, clock, step, totals)
                    row |= test(state.variables())
                    reporter.evaluated(row)
                    zeros = jax.tree.map(jnp.zeros_like, state.totals)
                    state = dataclasses.replace(state, totals=zeros)
                # The row is on disk before the checkpoint that counts on it.
                if step > saved:
                    checkpoints.save(step, state, row)
                    saved = step
                if terminated() and step < clock.total:
                    _preempted(checkpoints, workdir, saved)
        return summary(reporter.rows)


def _resume(
    config: ConfigDict, workdir: pathlib.Path, checkpoints: Checkpoints, state
) -> tuple[TrainState, int]:
    """The state that the workdir holds, else the given one, and its step."""
    if not checkpoints.steps():
        return state, 0
    state, step = checkpoints.restore(state, "last")
    for change in preflight.changes(config, workdir):
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


def _preempted(checkpoints: Checkpoints, workdir: pathlib.Path, saved: int) -> None:
    checkpoints.wait()
    raise Preempted(
        f"SIGTERM: saved up to step {saved} in {workdir}; the same command goes on "
        "from there"
    )


def evaluate_checkpoint(config: ConfigDict, workdir: str | pathlib.Path) -> dict:
    """Evaluates config.eval.checkpoint of a workdir: `step` and `test_*`."""
    mesh = make_mesh()
    examples = input_pipeline.load(config.data, "train")
    test_examples = input_pipeline.load(config.data, "test")
    preflight.check(config, examples, mesh)
    with Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        program, state = create_train_state(config, examples)
        state = jax.device_put(state, NamedSharding(mesh, REPLICATED))
        state, step = checkpoints.restore(state, config.eval.checkpoint)
    return {"step": step} | make_test(config, program, mesh, test_examples)(
        state.variables()
    )


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


def make_test(
    config: ConfigDict, program: Program, mesh: Mesh, examples: input_pipeline.Examples
) -> Callable:
    """variables -> `test_*` over all examples; compiled with its first call."""
    step = evaluate.make_eval_step(program.definition, mesh, program.normalization)

    def test(variables: dict) -> dict:
        batches = test_batches(config, mesh, examples)
        return evaluate.evaluate(step, variables, batches, mesh)

    return test


def test_batches(
    config: ConfigDict, mesh: Mesh, examples: input_pipeline.Examples
) -> Iterator[dict]:
    """One pass over the test images; batches are rounded up to the device count."""
    config = config.copy_and_resolve_references()
    config.eval.batch_size = evaluate.padded_batch_size(
        config.eval.batch_size, mesh.size
    )
    return input_pipeline.batches(config, "test", examples=examples)


def make_advance(
    config: ConfigDict,
    program: Program,
    mesh: Mesh,
    examples: input_pipeline.Examples,
    state: TrainState,
    step: int,
) -> Callable:
    """(state, most) -> (state, totals, bad_step): one dispatch of at most `most` steps.

    The batches start at `step`. While the step compiles, another thread imports
    TensorFlow, if the pipeline needs it, and prepares the first batch.
    """
    batch_size = config.train.batch_size

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    if config.data.pipeline == "device":
        most_steps = config.train.steps_per_dispatch
        padded = input_pipeline.pad(config.data, examples)
        data = jax.device_put(
            (padded, examples.labels), NamedSharding(mesh, REPLICATED)
        )
        plans = input_pipeline.plans(config, len(examples.labels), step)
        steps = make_device_steps(program, mesh)

        def advance(state, most):
            count = min(most_steps, most)
            chunk = [next(plans) for _ in range(count)]
            chunk += chunk[-1:] * (most_steps - count)  # one shape, one program
            stacked = jax.tree.map(lambda *x: np.stack(x), *chunk)
            sharding = NamedSharding(mesh, PartitionSpec(None, "data"))
            return steps(state, data, jax.device_put(stacked, sharding), count)

        return advance

    with concurrent.futures.ThreadPoolExecutor(1) as thread:

        def start():
            batches = input_pipeline.batches(config, "train", step, examples=examples)
            return itertools.chain([next(batches)], batches)

        started = thread.submit(start)
        shape = examples.images.shape[1:]
        batch = {
            "image": array((batch_size, *shape), jnp.uint8, SHARDED),
            "label": array((batch_size,), jnp.int32, SHARDED),
        }
        train_step = make_train_step(program, mesh).lower(state, batch).compile()
        batches = started.result()
    return lambda state, most: train_step(state, evaluate.shard(next(batches), mesh))


def _refuse(bad_step: jax.Array, checkpoints: Checkpoints) -> None:
    """Ends the run, before anything is saved, if a loss was not finite."""
    if (bad := int(bad_step)) < 0:
        return
    checkpoints.wait()
    good = checkpoints.steps()
    raise FloatingPointError(
        f"the loss of step {bad} is not finite; "
        + (
            f"the last good checkpoint is step {good[-1]} in {checkpoints.directory}"
            if good
            else "there is no checkpoint yet"
        )
        + "; a lower --config.optimizer.learning_rate may help"
    )
