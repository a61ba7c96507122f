"""Learning rate schedules, and SGD as each original defines it."""

from collections.abc import Mapping

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from runtime.clock import Clock


def schedule(config: ConfigDict, num_examples: int, offset: int = 0) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    config: the whole configuration; num_examples: the number of training images;
    offset: of the run's Clock.
    Raises ValueError if config.optimizer.schedule is unknown or does not fit into the
    steps of the run.
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
            f"optimizer.warmup_epochs={recipe.warmup_epochs:g} takes {warmup} of the "
            f"{total} steps of train.epochs={config.train.epochs:g}: it must be at "
            "least 0 and end before the run"
        )
    drops = [clock.step_of(epoch) for epoch in recipe.drop_epochs]
    rate = SCHEDULES[recipe.schedule](recipe, total, warmup, drops)
    if warmup:  # optax has it for cosine only
        plain = rate
        rate = lambda step: plain(step) * jnp.minimum(step / warmup, 1.0)
    return (lambda step: rate(step - offset)) if offset else rate


def _steps(recipe: Mapping, total: int, warmup: int, drops: list) -> optax.Schedule:
    """Multiplies the rate by `drop_factor` at each of `drop_epochs`.

    An epoch that is listed twice drops the rate twice. The rate does not fall below
    `min_learning_rate` (X-Nets' minlr).
    """
    epochs = tuple(recipe["drop_epochs"])
    if drops != sorted(drops) or len(set(drops)) < len(set(epochs)):
        raise ValueError(
            f"optimizer.drop_epochs={epochs} fall on the steps {drops}, which must "
            "increase: drop the rate less often, train longer, or repeat an epoch to "
            "drop twice"
        )
    rates = [
        max(
            recipe["learning_rate"] * recipe["drop_factor"] ** i,
            recipe["min_learning_rate"],
        )
        for i in range(len(drops) + 1)
    ]
    # A boundary is the first step of the next rate; it must fit into an int32.
    boundaries = [min(drop, total) for drop in drops]
    return optax.join_schedules([optax.constant_schedule(r) for r in rates], boundaries)


def _cosine(recipe: Mapping, total: int, warmup: int, drops: list) -> optax.Schedule:
    """Decays along half a cosine, from the end of the warm-up to `min_learning_rate`.

    SGDR (arXiv 1608.03983) without restarts.
    """
    rate, least = recipe["learning_rate"], recipe["min_learning_rate"]
    alpha = least / rate if rate else 0.0
    decay = optax.cosine_decay_schedule(rate, total - warmup, alpha)
    return lambda step: decay(jnp.maximum(step - warmup, 0))


def _one_cycle(recipe: Mapping, total: int, warmup: int, drops: list) -> optax.Schedule:
    """Smith's one cycle (arXiv 1708.07120), in three straight lines.

    The rate rises from rate / 25 to the rate at 30 % of the steps, falls back to rate /
    25 at 85 %, and to the larger of rate / 250,000 and `min_learning_rate` at the end.
    The momentum is constant.
    """
    if warmup:
        raise ValueError(
            "optimizer.schedule='one_cycle' includes a warm-up: set "
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
    """Returns SGD with momentum, and L2 decay of all parameters, as the originals do.

    Biases and batch norm decay too. The gradient g includes the decay.

    rate_in_velocity=False (torch, MXNet): v <- momentum v + g; p <- p - rate v, or
    p - rate (g + momentum v) with `nesterov`.
    rate_in_velocity=True (neon): v <- momentum v - rate g; p <- p + v. The forms are
    equal while the rate is constant; after a drop, neon's velocity still holds the old
    rate for some steps.
    """
    decay = optax.add_decayed_weights(weight_decay)
    velocity = optax.trace(momentum, nesterov)
    rate = optax.scale_by_learning_rate(learning_rate)
    if rate_in_velocity:
        return optax.chain(decay, rate, velocity)
    return optax.chain(decay, velocity, rate)


def create(config: Mapping, rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer of config.optimizer.

    Raises ValueError for options that cannot be combined.
    """
    if config["rate_in_velocity"] and config["nesterov"]:
        raise ValueError(
            "optimizer.rate_in_velocity and optimizer.nesterov cannot be combined: set "
            "one of them to False"
        )
    fields = ("momentum", "nesterov", "rate_in_velocity", "weight_decay")
    return sgd(rate, **{field: config[field] for field in fields})
