"""The clock of a run, schedules, and SGD as each original defines it."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def steps_per_epoch(num_examples: int, batch_size: int, partial: bool = False) -> float:
    """Batches of a pass; with `partial` it ends with a smaller one, a whole number.

    Without, batches run through the passes and leave no gap: 50,000 images in batches
    of 128 make 70,313 steps in 180 epochs, as cfmz has; with it, 64,124 in the 164 of
    fb.resnet.torch.
    """
    steps = num_examples / batch_size
    return math.ceil(steps) if partial else steps


def step_of_epoch(epoch: float, steps_per_epoch: float) -> int:
    """The first step whose first image belongs to `epoch` (from 0) or a later one."""
    return math.ceil(epoch * steps_per_epoch - 1e-6)  # but for rounding errors


@dataclasses.dataclass(frozen=True)
class Clock:
    """A run's steps, counted in images, epochs and dispatches."""

    steps_per_epoch: float  # a whole number where a pass ends with a smaller batch
    smaller_last: bool
    batch_size: int
    total: int
    steps_per_dispatch: int
    log_every: int
    eval_every_epochs: float
    save_every: int

    @classmethod
    def of(cls, config: ConfigDict, num_examples: int) -> "Clock":
        batch_size = config.train.batch_size
        partial = config.train.last_batch == "partial"
        per_epoch = steps_per_epoch(num_examples, batch_size, partial)
        on_device = config.data.pipeline == "device"
        if config.train.epochs * per_epoch >= 2**31:
            raise ValueError(
                f"train.epochs={config.train.epochs} makes 2**31 steps or more"
            )
        if (total := step_of_epoch(config.train.epochs, per_epoch)) < 1:
            raise ValueError(f"train.epochs={config.train.epochs} is not one step")
        return cls(
            steps_per_epoch=per_epoch,
            smaller_last=partial and num_examples % batch_size > 0,
            batch_size=batch_size,
            total=total,
            steps_per_dispatch=config.train.steps_per_dispatch if on_device else 1,
            log_every=config.train.log_every_steps,
            eval_every_epochs=config.eval.every_epochs,
            save_every=config.checkpoint.every_steps,
        )

    def epoch(self, step: int) -> float:
        return step / self.steps_per_epoch

    def step_of(self, epoch: float) -> int:
        return step_of_epoch(epoch, self.steps_per_epoch)

    def dispatch(self, step: int, stop: int) -> int:
        """How many steps are carried out together: a smaller batch goes alone."""
        most = min(self.steps_per_dispatch, stop - step)
        if not self.smaller_last:
            return most
        whole = self.steps_per_epoch - 1 - step % self.steps_per_epoch
        return min(most, whole or 1)

    def next_eval(self, step: int) -> int:
        """The first step after `step` that ends an evaluation interval, or the last."""
        every = self.eval_every_epochs
        interval = int(self.epoch(step) / every)
        while (stop := self.step_of(interval * every)) <= step:
            interval += 1
        return min(stop, self.total)

    def next_save(self, step: int) -> int:
        every = self.save_every or self.total
        return min((step // every + 1) * every, self.total)


def schedule(config: ConfigDict, num_examples: int) -> optax.Schedule:
    """step -> learning rate, of a whole configuration and its number of images.

    Raises ValueError for an unknown config.optimizer.schedule, and for one that does
    not fit into the steps of the run.
    """
    recipe = config.optimizer
    if recipe.schedule not in SCHEDULES:
        raise ValueError(
            f"unknown optimizer.schedule {recipe.schedule!r}: choose from "
            + ", ".join(SCHEDULES)
        )

    clock = Clock.of(config, num_examples)
    total, warmup = clock.total, clock.step_of(recipe.warmup_epochs)
    if not 0 <= warmup < max(total, 1):
        raise ValueError(
            f"optimizer.warmup_epochs {recipe.warmup_epochs:g} takes {warmup} of the "
            f"{total} steps of train.epochs {config.train.epochs:g}: it must be at "
            "least 0 and end before the run"
        )
    drops = [clock.step_of(epoch) for epoch in recipe.drop_epochs]
    rate = SCHEDULES[recipe.schedule](recipe, total, warmup, drops)
    if warmup == 0:
        return rate
    return lambda step: rate(step) * jnp.minimum(step / warmup, 1.0)


def _steps(recipe: Mapping, total: int, warmup: int, drops: list) -> optax.Schedule:
    """The rate is multiplied by `drop_factor` at each of `drop_epochs`.

    An epoch that stands there twice drops the rate twice. Never below
    `min_learning_rate` (X-Nets' minlr).
    """
    epochs = tuple(recipe["drop_epochs"])
    if drops != sorted(drops) or len(set(drops)) < len(set(epochs)):
        raise ValueError(
            f"optimizer.drop_epochs {epochs} fall on the steps {drops}: they must "
            "increase (or be equal, to drop twice); drop them less often or train "
            "longer"
        )
    rates = [
        max(
            recipe["learning_rate"] * recipe["drop_factor"] ** i,
            recipe["min_learning_rate"],
        )
        for i in range(len(drops) + 1)
    ]
    # join_schedules takes the next rate AT the boundary step, an int32.
    boundaries = [min(drop, total) for drop in drops]
    return optax.join_schedules([optax.constant_schedule(r) for r in rates], boundaries)


def _cosine(recipe: Mapping, total: int, warmup: int, drops: list) -> optax.Schedule:
    """Half a cosine from the end of the warm-up to `min_learning_rate` at the end.

    SGDR (arXiv 1608.03983) without restarts.
    """
    rate, least = recipe["learning_rate"], recipe["min_learning_rate"]
    alpha = least / rate if rate else 0.0
    decay = optax.cosine_decay_schedule(rate, total - warmup, alpha)
    return lambda step: decay(jnp.maximum(step - warmup, 0))


def _one_cycle(recipe: Mapping, total: int, warmup: int, drops: list) -> optax.Schedule:
    """Smith's one cycle (arXiv 1708.07120), in three straight lines.

    From rate / 25 up to the rate at 30 % of the steps, back down to rate / 25 at 85 %,
    and to rate / 250,000, or `min_learning_rate`, at the end. The momentum stays.
    """
    if warmup:
        raise ValueError(
            "optimizer.schedule='one_cycle' has its own warm-up: set "
            "optimizer.warmup_epochs to 0"
        )
    cycle = optax.linear_onecycle_schedule(total, recipe["learning_rate"])
    return lambda step: jnp.maximum(cycle(step), recipe["min_learning_rate"])


SCHEDULES = {"steps": _steps, "cosine": _cosine, "one_cycle": _one_cycle}


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float,
    nesterov: bool = False,
    rate_in_velocity: bool = False,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """SGD with momentum and L2 decay on every parameter, batch norm's and biases' too.

    rate_in_velocity=False (torch, MXNet): v <- momentum v + g; p <- p - rate v (or
    p - rate (g + momentum v) with `nesterov`), g including the decay.
    rate_in_velocity=True (neon): v <- momentum v - rate g; p <- p + v, so that after a
    drop of the rate the old velocity lives on for some steps. Equal at constant rate.
    """
    decay = optax.add_decayed_weights(weight_decay)
    velocity = optax.trace(momentum, nesterov)
    rate = optax.scale_by_learning_rate(learning_rate)
    if rate_in_velocity:
        return optax.chain(decay, rate, velocity)
    return optax.chain(decay, velocity, rate)


def create(config: Mapping, rate: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of a configuration's `optimizer` section."""
    if config["rate_in_velocity"] and config["nesterov"]:
        raise ValueError(
            "optimizer.rate_in_velocity with optimizer.nesterov: no original has both, "
            "set one of them to False"
        )
    fields = ("momentum", "nesterov", "rate_in_velocity", "weight_decay")
    return sgd(rate, **{field: config[field] for field in fields})
