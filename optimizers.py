"""The clock of a run, schedules, and SGD as each original defines it."""

import dataclasses
import math
from collections.abc import Mapping

import optax
from ml_collections import ConfigDict


def step_of_epoch(epoch: float, num_examples: int, batch_size: int) -> int:
    """The first step whose first image belongs to `epoch` (from 0) or a later one.

    Batches run through the passes without a gap, so an epoch is num_examples /
    batch_size steps, not a whole number: 50,000 images in batches of 128 make 70,313
    steps in 180 epochs, as cfmz has.
    """
    return math.ceil(epoch * num_examples / batch_size - 1e-6)


@dataclasses.dataclass(frozen=True)
class Clock:
    """A run's steps, counted in images, epochs and dispatches."""

    num_examples: int
    batch_size: int
    total: int
    steps_per_dispatch: int
    log_every: int
    eval_every_epochs: float
    save_every: int

    @classmethod
    def of(cls, config: ConfigDict, num_examples: int) -> "Clock":
        batch_size, epochs = config.train.batch_size, config.train.epochs
        on_device = config.data.pipeline == "device"
        return cls(
            num_examples=num_examples,
            batch_size=batch_size,
            total=step_of_epoch(epochs, num_examples, batch_size),
            steps_per_dispatch=config.train.steps_per_dispatch if on_device else 1,
            log_every=config.train.log_every_steps,
            eval_every_epochs=config.eval.every_epochs,
            save_every=config.checkpoint.every_steps,
        )

    def epoch(self, step: int) -> float:
        return step * self.batch_size / self.num_examples

    def next_eval(self, step: int) -> int:
        """The first step after `step` that ends an evaluation interval, or the last."""
        every = self.eval_every_epochs
        interval = int(self.epoch(step) / every)
        while (stop := self._step(interval * every)) <= step:
            interval += 1
        return min(stop, self.total)

    def next_save(self, step: int) -> int:
        every = self.save_every or self.total
        return min((step // every + 1) * every, self.total)

    def _step(self, epoch: float) -> int:
        return step_of_epoch(epoch, self.num_examples, self.batch_size)


def schedule(config: Mapping, num_examples: int, batch_size: int) -> optax.Schedule:
    """step -> learning rate: multiplied by `drop_factor` at each of `drop_epochs`.

    Never below `min_learning_rate` (X-Nets' minlr).
    """
    drops = [
        step_of_epoch(epoch, num_examples, batch_size)
        for epoch in config["drop_epochs"]
    ]
    rates = [
        max(
            config["learning_rate"] * config["drop_factor"] ** i,
            config["min_learning_rate"],
        )
        for i in range(len(drops) + 1)
    ]
    if drops != sorted(drops) or len(set(drops)) < len(drops):
        raise ValueError(
            f"optimizer.drop_epochs {tuple(config['drop_epochs'])} fall on the steps "
            f"{drops}: they must increase; drop them less often or train longer"
        )
    # join_schedules takes the next rate AT the boundary step.
    return optax.join_schedules([optax.constant_schedule(r) for r in rates], drops)


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
