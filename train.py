"""Training: a pure step, and a loop that can be killed at any moment and resumed."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
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
from runtime import checks, pretrained, resume
from runtime.checkpoints import Checkpoints
from runtime.clock import Clock
from runtime.devices import make_mesh, place
from runtime.dispatch import make_advance
from runtime.processes import Preempted, sigterm
from runtime.reporting import Reporter, log_run, summarize, write_confusion
from runtime.workdir import (
    WorkdirError,
    load_config,
    load_facts,
    lock,
    read_rows,
    runs,
    save_config,
    take_net,
)

# Constants for jax.random.fold_in. Devices fold 0, 1, ... into the key of a step, and
# layers fold 0, 1, ... into the key of a seed.
AUGMENTATION = 2**31 - 1  # into the key of a step
STEPS = 2**31 - 2  # into the key of a seed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The complete state of a run; a checkpoint holds exactly this.

    ema: moving averages of params and stats, used for evaluation; empty if train.ema=0.
    totals: sums of the training metrics since the last row of metrics.csv.
    bad_step: the first step with a loss or new weights that were not finite, or -1.
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
        """Returns the variables that nets.Definition.apply takes."""
        return {"params": self.params, "stats": self.stats, "wiring": self.wiring}

    def eval_variables(self) -> dict:
        """Returns the variables to evaluate: the moving averages, if there are any."""
        return self.variables() | self.ema

    def without_totals(self) -> "TrainState":
        """Returns the state after a row of metrics.csv, whose sums start anew."""
        zeros = jax.tree.map(jnp.zeros_like, self.totals)
        return dataclasses.replace(self, totals=zeros)


@dataclasses.dataclass(frozen=True)
class Program:
    """The fixed part of a run, derived once from its configuration."""

    config: ConfigDict
    definition: nets.Definition
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    normalization: dict


def create_train_state(
    config: ConfigDict, facts: input_pipeline.Facts
) -> tuple[Program, TrainState]:
    """Returns the program of a configuration and its state before the first step."""
    net = nets.create(config.net, nnx.Rngs(config.seed))
    nets.configure(net, batch_norm_groups=config.train.batch_norm_groups)
    definition, variables = nets.split(net)
    program = _create_program(config, facts, definition)
    init = jax.jit(program.optimizer.init)  # one compilation
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        **variables,
        opt_state=init(variables["params"]),
        ema=_averages(config, variables),
        totals=metrics.zeros(config.net.num_classes),
        bad_step=jnp.full((), -1, jnp.int32),
    )
    return program, state


def _create_program(
    config: ConfigDict,
    facts: input_pipeline.Facts,
    definition: nets.Definition,
    offset: int = 0,
) -> Program:
    """Returns the program of a run. offset: delays the schedule by so many steps."""
    rate = optimizers.schedule(config, facts.num_train, offset)
    optimizer = optimizers.create(config.optimizer, rate)
    normalization = _normalization(config, facts)
    return Program(config, definition, optimizer, rate, normalization)


def _averages(config: ConfigDict, variables: dict) -> dict:
    """Returns the initial moving averages, copied because the variables are donated."""
    kinds = ("params", "stats") if config.train.ema else ()
    return {kind: jax.tree.map(jnp.copy, variables[kind]) for kind in kinds}


def _normalization(config: ConfigDict, facts: input_pipeline.Facts) -> dict:
    dtype = jnp.dtype(config.train.dtype)
    return {"mean": facts.mean, "std": facts.std, "dtype": dtype}


def train_step(program: Program, state: TrainState, batch: dict) -> TrainState:
    """Takes one step on this device's share of a batch.

    batch: image (b, H, W, 3) uint8, cropped and flipped, and label (b,) int32. Runs
    inside a shard_map over the mesh axis 'data' and returns the same state on all
    devices; running statistics that differ between devices are averaged.
    """
    config, device = program.config, jax.lax.axis_index("data")
    keys = jax.random.fold_in(jax.random.key(config.seed), STEPS)
    step_key = jax.random.fold_in(keys, state.step)
    key = jax.random.fold_in(step_key, device)
    x, targets = augment.augment(
        batch["image"],
        batch["label"],
        options=config.augment,
        normalization=program.normalization,
        num_classes=config.net.num_classes,
        key=jax.random.fold_in(step_key, AUGMENTATION),
        first_row=device * len(batch["label"]),
    )

    def loss_fn(params):
        variables = state.variables() | {"params": params}
        logits, stats = program.definition.apply(variables, x, train=True, key=key)
        smoothing = config.train.label_smoothing
        sums = metrics.sums(logits, targets, label_smoothing=smoothing)
        return sums["loss"] / sums["examples"], (stats, sums)

    grads, (stats, sums) = jax.grad(loss_fn, has_aux=True)(state.params)
    # In one call, so that XLA fuses them into one all-reduce.
    grads, stats, sums = jax.lax.pmean((grads, stats, sums), "data")
    sums = jax.tree.map(lambda x: x * jax.lax.axis_size("data"), sums)
    updates, opt_state = program.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if config.train.ema:
        # Faster at the start, as in TensorFlow's ExponentialMovingAverage.
        decay = jnp.minimum(config.train.ema, (1 + state.step) / (10 + state.step))
        new = {"params": params, "stats": stats}
        ema = optax.incremental_update(new, ema, 1 - decay)
    # The weights are checked too, because an update can overflow after a finite loss.
    # Checks the accumulated loss, as reporter.finite does.
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


def train_and_evaluate(
    config: ConfigDict, workdir: str | os.PathLike
) -> dict | list[dict]:
    """Trains for config.train.epochs, resuming from the newest checkpoint in workdir.

    Returns the last row of metrics.csv (`step`, `epoch`, `learning_rate`, `train_*`,
    `test_*`), and `step` and `test_*` of the best row as `best_*`. Returns at once if
    the run is complete. With config.seeds > 1, trains a run for each seed in
    workdir/seed<seed> and returns a list of their results.

    Raises ValueError (DataError and CheckpointError are subclasses) if the
    configuration, the data or the workdir are invalid, FloatingPointError if the loss
    or the weights are not finite, and Preempted after SIGTERM.
    """
    checks.check_fields(config)
    if config.seeds != 1:
        return [train_and_evaluate(*run) for run in runs(config, workdir)]
    [(config, workdir)], mesh = runs(config, workdir), make_mesh()
    resume.check_agreement(config, workdir)
    net, data_set = checks.check_config(config, mesh)  # finds the data, reads none
    old = resume.find(workdir)
    if old:
        old.check(config)
    train_split, test_split, facts, changes = resume.load_data(data_set, config, old)
    checks.check_data(config, mesh, facts, test_split)
    clock = Clock.of(config, facts.num_train)
    if old and old.complete and not changes:
        logging.info("%s already holds this run, complete", workdir)
        return summarize(read_rows(workdir / "metrics.csv"))
    with lock(workdir), Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        program, state = create_train_state(config, facts)
        log_run(config, facts, net, mesh)
        state, step = place(state, mesh), 0
        if checkpoints.steps():
            state, step = checkpoints.restore(state, "last")
        if config.init_from and not step:
            new = pretrained.initialize(state.variables(), config.init_from)
            state = dataclasses.replace(state, **new, ema=_averages(config, new))
            state = place(state, mesh)
        if old:
            clock = clock.resume(old.clock, step)
            definition = program.definition
            program = _create_program(config, facts, definition, clock.offset)
        # A crash in the first evaluation leaves a checkpoint that awaits it.
        pending = clock.is_evaluated(step) and not checkpoints.row(step)
        if step >= clock.total and not pending:
            resume.check_end(config, workdir, clock, step, changes)
            return summarize(read_rows(workdir / "metrics.csv"))
        if step:
            for change in changes:
                logging.warning("resuming with %s", change)
            at = step, clock.epoch(step)
            logging.info("resuming %s from step %d (epoch %.2f)", workdir, *at)
        checkpoints.check_room(state)
        save_config(workdir, config, facts, clock.offset)
        reporter = Reporter(workdir, clock, step, config)
        step_fn = functools.partial(train_step, program)
        first = step - clock.offset  # the step, counted with the current batch size
        advance = make_advance(config, step_fn, mesh, train_split, facts, state, first)
        evaluator = evaluate.make_evaluator(
            config,
            program.definition,
            program.normalization,
            mesh,
            test_split,
            state.eval_variables(),
        )
        if step == 0:
            reporter.sheet(lambda: _augmented_images(program, train_split))

        def evaluated_row(step: int, state: TrainState, totals: dict) -> dict:
            if not reporter.rows:
                checkpoints.save(step, state)  # a failure below loses no step
            means, confusion = evaluator(state.eval_variables())
            rate = float(f"{program.rate(step - 1):.6g}")
            row = {"step": step, "epoch": clock.epoch(step), "learning_rate": rate}
            row |= metrics.means(totals, "train") | means
            # On disk before the checkpoint that refers to it.
            reporter.evaluated(row, confusion, facts.class_names)
            return row

        with contextlib.closing(reporter), sigterm() as stopped:
            for chunk in clock.chunks(step, evaluate_first=pending):
                state, totals, bad_step = advance(state, chunk.steps)
                reporter.trained(chunk.end, totals)
                stop = stopped() or not reporter.finite
                if chunk.evaluate or chunk.save or stop:
                    with reporter.pause():
                        checkpoints.check_finite(bad_step)
                        row = None
                        if chunk.evaluate:
                            row = evaluated_row(chunk.end, state, totals)
                            state = state.without_totals()
                        checkpoints.save(chunk.end, state, row)
                if stop:
                    break
            checkpoints.wait()
            if stopped():
                raise Preempted(
                    f"SIGTERM: saved step {checkpoints.steps()[-1]} in {workdir}; run "
                    "the same command to resume"
                )
        return summarize(reporter.rows)


def _augmented_images(
    program: Program, train_split: input_pipeline.Split
) -> np.ndarray:
    """Returns up to 64 images of the first batch, as trained on, (N, H, W, 3) uint8."""
    config, normalization = program.config, program.normalization
    mean, std = normalization["mean"], normalization["std"]
    batch = input_pipeline.preview(config, train_split, mean, count=64)
    x, _ = augment.augment(
        batch["image"],
        batch["label"],
        options=config.augment,
        normalization=normalization | {"dtype": jnp.float32},
        num_classes=config.net.num_classes,
        key=jax.random.key(config.seed),
        first_row=0,
    )
    return augment.denormalize(x, mean, std)


def evaluate_checkpoint(
    config: ConfigDict, workdir: str | os.PathLike
) -> dict | list[dict]:
    """Evaluates checkpoint config.eval.checkpoint of a workdir on the test images.

    Returns its `step` and `test_*`; with config.seeds > 1, a list of these dicts. The
    names end in config.eval.views unless it is 'center', such as `test_loss_flip`.
    Normalises images as in training.
    """
    checks.check_fields(config)
    if config.seeds != 1:
        return [evaluate_checkpoint(*run) for run in runs(config, workdir)]
    [(config, workdir)], mesh = runs(config, workdir), make_mesh()
    resume.check_agreement(config, workdir)
    facts, config = load_facts(workdir), take_net(config, workdir)
    _, data_set = checks.check_config(config, mesh, training=False)
    test, names = data_set.load("test"), facts.class_names
    test = input_pipeline.map_classes(test, names, config.data.name)
    definition, variables, step = _load(config, workdir, config.eval.checkpoint)
    variables = place(variables, mesh)
    for change in resume.evaluation_warnings(config, workdir, facts, test):
        logging.warning(change)
    normalization = _normalization(config, facts)
    evaluator = evaluate.make_evaluator(
        config, definition, normalization, mesh, test, variables, config.eval.views
    )
    means, confusion = evaluator(variables)
    views = {"center": ""}.get(config.eval.views, f"_{config.eval.views}")
    try:
        write_confusion(workdir, confusion, test.class_names, f"-{step}{views}")
    except WorkdirError as error:  # the result is printed even if it cannot be saved
        logging.warning(error)
    return {"step": step} | {f"{name}{views}": x for name, x in means.items()}


def restore(
    workdir: str | pathlib.Path, which: str | int = "best"
) -> tuple[nnx.Module, Callable[[np.ndarray], jax.Array]]:
    """Loads a trained net and its preprocessing; needs nothing but the workdir.

    which: 'best', 'last', or the step of a checkpoint. Returns the net in eval mode and
    preprocess(images): (N, H, W, 3) uint8 -> the input of the net, normalised as in
    training, so that net(preprocess(images)) are the logits that --mode=eval sees.
    Raises ValueError (CheckpointError is a subclass) if the workdir cannot be read.
    """
    workdir = pathlib.Path(os.path.expanduser(workdir))
    config, facts = load_config(workdir), load_facts(workdir)
    definition, variables, _ = _load(config, workdir, which)
    net = definition.merge(variables)
    net.eval()
    normalization = _normalization(config, facts)

    def preprocess(images: np.ndarray) -> jax.Array:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != facts.image_shape:
            height, width, channels = facts.image_shape
            raise ValueError(
                f"this net takes uint8 images (N, {height}, {width}, {channels}), got "
                f"{images.dtype} {images.shape}"
            )
        return augment.normalize(images, **normalization)

    return net, preprocess


def _load(
    config: ConfigDict, workdir: pathlib.Path, which: str | int
) -> tuple[nets.Definition, dict, int]:
    """Returns the net of a checkpoint, its variables for evaluation, and its step."""
    definition, variables = nets.split(nets.create(config.net, nnx.Rngs(config.seed)))
    template = variables | {"ema": _averages(config, variables)}
    with Checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        variables, step = checkpoints.restore(template, which, partial=True)
    averages = variables.pop("ema")
    return definition, variables | averages, step
