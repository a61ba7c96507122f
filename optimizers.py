"""Learning rate schedules, SGD as each original defines it, and AdamW."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from runtime.clock import Clock


def schedule(config: ConfigDict, num_examples: int, offset: int = 0) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    config: has passed runtime.checks.check_config; offset: of the run's Clock. Raises
    ValueError if the schedule is unknown or does not fit into the steps of the run.
    """
    recipe, clock = config.optimizer, Clock.of(config, num_examples)
    if recipe.accumulate_steps > clock.total:
        raise ValueError(
            f"optimizer.accumulate_steps={recipe.accumulate_steps} is more than the "
            f"{clock.total} steps of train.epochs={config.train.epochs:g}: the weights "
            "would never be updated"
        )
    total, warmup = clock.total, clock.step_of(recipe.warmup_epochs)
    if not 0 <= warmup < total:
        raise ValueError(
            f"optimizer.warmup_epochs={recipe.warmup_epochs:g} takes {warmup} of the "
            f"{total} steps of train.epochs={config.train.epochs:g}: it must be at "
            "least 0 and end before the run"
        )
    drops = [clock.step_of(epoch) for epoch in recipe.drop_epochs]
    make = _look_up(SCHEDULES, "schedule", recipe.schedule)
    rate = make(recipe, total, warmup, drops)
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
    decay_mask: Callable | None = None,
) -> optax.GradientTransformation:
    """Returns SGD with momentum and L2 decay, as the originals define it.

    The gradient g includes the decay. decay_mask(params) is a tree of booleans that
    selects the decaying parameters; None: all, including biases and batch norm.

    rate_in_velocity=False (torch, MXNet): v <- momentum v + g; p <- p - rate v, or
    p - rate (g + momentum v) with `nesterov`.
    rate_in_velocity=True (neon): v <- momentum v - rate g; p <- p + v. The forms are
    equal while the rate is constant; after a drop, neon's velocity still holds the old
    rate for some steps.
    """
    decay = optax.add_decayed_weights(weight_decay, decay_mask)
    velocity = optax.trace(momentum, nesterov)
    rate = optax.scale_by_learning_rate(learning_rate)
    if rate_in_velocity:
        return optax.chain(decay, rate, velocity)
    return optax.chain(decay, velocity, rate)


def kernels(params: dict) -> dict:
    """Returns a tree of booleans: True for kernels.

    False for biases, batch norm and DelugeNet's cross-layer weights, whose norm has no
    effect.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )


def create(config: Mapping, rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns the optimizer of config.optimizer.

    rate: the learning rate as a function of the step. With accumulate_steps > 1, an
    update has the rate of the last of its steps, and the steps before it return zeros.
    Raises ValueError for an unknown name.
    """
    every = config["accumulate_steps"]
    # The optimizer within MultiSteps counts updates.
    of_update = rate if every == 1 else lambda n: rate(every * n + every - 1)
    optimizer = _look_up(OPTIMIZERS, "name", config["name"])(config, of_update)
    if config["clip_norm"]:
        optimizer = _clip(optimizer, config["clip_norm"])
    if every > 1:
        return optax.MultiSteps(optimizer, every).gradient_transformation()
    return optimizer


def _clip(
    optimizer: optax.GradientTransformation, norm: float
) -> optax.GradientTransformation:
    """Clips gradients before an optimizer; the state is that of the optimizer.

    optax.chain would nest the state, so that a run could not resume with clipping
    switched on or off.
    """
    clip = optax.clip_by_global_norm(norm)

    def update(grads, state, params=None):
        grads, _ = clip.update(grads, optax.EmptyState())
        return optimizer.update(grads, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def _look_up(table: Mapping[str, Callable], field: str, name: str) -> Callable:
    if name not in table:
        choices = ", ".join(table)
        raise ValueError(f"unknown optimizer.{field} {name!r}: choose from {choices}")
    return table[name]


def _sgd(recipe: Mapping, rate: optax.Schedule) -> optax.GradientTransformation:
    fields = ("momentum", "nesterov", "rate_in_velocity", "weight_decay")
    mask = kernels if recipe["decay_on"] == "kernels" else None
    return sgd(rate, decay_mask=mask, **{field: recipe[field] for field in fields})


def _adamw(recipe: Mapping, rate: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW (arXiv 1711.05101): p <- p - rate (Adam's update + decay p)."""
    return optax.adamw(
        rate,
        b1=recipe["beta1"],
        b2=recipe["beta2"],
        eps=recipe["epsilon"],
        weight_decay=recipe["weight_decay"],
        mask=None if recipe["decay_on"] == "all" else kernels,
    )


OPTIMIZERS = {"sgd": _sgd, "adamw": _adamw}
