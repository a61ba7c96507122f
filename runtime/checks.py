"""Refuses runs that cannot work: one table of fields, before the data and after it."""

import difflib
import math
from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

import input_pipeline
from augment.check import check as check_augment
from nets import cost
from runtime.workdir import flatten


def positive(value: float) -> str:
    return "" if value > 0 else "must be positive"


def not_negative(value: float) -> str:
    return "" if value >= 0 else "must not be negative"


def share(value: float) -> str:
    return "" if 0 <= value < 1 else "must be in [0, 1)"


def at_most(most: int) -> Callable[[int], str]:
    return lambda value: "" if value <= most else f"must be at most {most:,}"


def seed(value: int) -> str:
    return "" if 0 <= value < 2**32 else "must be at least 0 and less than 2**32"


def numbers(value: tuple) -> str:
    real = all(isinstance(x, (int, float)) for x in value)
    return "" if real else "must contain only numbers"


def one_of(*choices: str) -> Callable[[str], str]:
    def rule(value):
        if value in choices:
            return ""
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"must be one of {', '.join(choices)}{hint}"

    return rule


# The rule of each field: returns what is wrong with a value, or "". All floats must be
# finite. The other fields of the net are checked by building it, those of the data and
# of the augmentation by input_pipeline.check and augment.check.
RULES: dict[str, Callable[[Any], str]] = {
    "seed": seed,
    "seeds": positive,
    "net.graph_seed": seed,
    "net.depth": at_most(10_000),
    "net.dropout": share,
    "train.batch_size": positive,
    "train.batch_norm_groups": not_negative,
    "train.dtype": one_of("float32", "bfloat16"),
    "train.ema": share,
    "train.epochs": positive,
    "train.label_smoothing": share,
    "train.last_batch": one_of("fill", "partial"),
    "train.log_every_steps": positive,
    "train.steps_per_dispatch": positive,
    "optimizer.schedule": one_of("steps", "cosine", "one_cycle"),
    "optimizer.drop_epochs": numbers,
    "optimizer.drop_factor": not_negative,
    "optimizer.learning_rate": not_negative,
    "optimizer.min_learning_rate": not_negative,
    "optimizer.momentum": not_negative,
    "optimizer.warmup_epochs": not_negative,
    "optimizer.weight_decay": not_negative,
    "eval.batch_size": positive,
    "eval.every_epochs": positive,
    "checkpoint.every_steps": not_negative,
    "checkpoint.keep": positive,
}


def check_config(
    config: ConfigDict, mesh: Mesh, *, training: bool = True
) -> nnx.Module:
    """Checks everything that needs no data, and returns the abstract net.

    training: whether conflicts that affect training only are errors too. Raises
    ValueError that lists all problems.
    """
    problems = [*_field_problems(config)]
    net = None
    try:
        input_pipeline.check(config.data)
    except ValueError as error:
        problems.append(str(error))
    try:
        if not any(problem.startswith("net.") for problem in problems):
            net = cost.build(config.net)
    except ValueError as error:
        problems.append(str(error))
    if training and not problems:  # conflicts between valid fields
        problems += _conflicts(config, mesh)
    _refuse(problems)
    return net


def check_data(
    config: ConfigDict,
    mesh: Mesh,
    facts: input_pipeline.Facts,
    test: input_pipeline.Split,
) -> None:
    """Checks a configuration for training against its data.

    Raises ValueError that lists all problems.
    """
    problems = [*_class_problems(config, facts.class_names)]
    if config.train.batch_size > facts.num_train:
        problems.append(
            f"train.batch_size={config.train.batch_size} is larger than the "
            f"{facts.num_train} training images of {config.data.name}"
        )
    for size in [] if problems else input_pipeline.batch_sizes(config, facts.num_train):
        if size % mesh.size:
            problems.append(
                f"train.last_batch='partial' leaves {size} of {facts.num_train} "
                f"images, which {mesh.size} devices cannot share: set "
                "--config.train.last_batch=fill, or another train.batch_size"
            )
            continue
        try:
            check_augment(config.augment, size // mesh.size)
        except ValueError as error:
            problems.append(str(error))
    if test.image_shape != facts.image_shape:
        problems.append(
            f"the test images of {config.data.name} are {test.image_shape}, the "
            f"training images {facts.image_shape}: resize them to one size, or set "
            "--config.data.crop=random_resized"
        )
    _refuse(problems)


def check_test_data(config: ConfigDict, test: input_pipeline.Split) -> None:
    """Checks a configuration for evaluation against the test split."""
    _refuse([*_class_problems(config, test.class_names)])


def _field_problems(config: ConfigDict) -> Iterator[str]:
    for field, value in flatten(config).items():
        if problem := _problem(field, value):
            yield f"{field} {problem}, got {value!r}"


def _problem(field: str, value: Any) -> str:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            return "must be finite"
        # Far beyond any net, but small enough to fail before time and memory do.
        count = isinstance(number, int) and field not in RULES
        if field.startswith("net.") and count and abs(number) > 1_000_000:
            return "must be at most 1,000,000"
    rule = RULES.get(field)
    return rule(value) if rule else ""


def _conflicts(config: ConfigDict, mesh: Mesh) -> Iterator[str]:
    batch_size, groups = config.train.batch_size, config.train.batch_norm_groups
    if batch_size % mesh.size:
        yield (
            f"train.batch_size={batch_size} does not divide among {mesh.size} devices: "
            f"use a multiple of {mesh.size}"
        )
    if groups and batch_size % groups:
        yield (
            f"train.batch_norm_groups={groups} does not divide train.batch_size="
            f"{batch_size}: change one of them"
        )
    if groups and math.gcd(groups, mesh.size) < min(groups, mesh.size):
        yield (
            f"train.batch_norm_groups={groups} cannot be spread over {mesh.size} "
            f"devices: use a divisor or a multiple of {mesh.size}, 1 for the whole "
            "batch, or 0 for each device alone"
        )
    steps = config.train.steps_per_dispatch
    if steps > 1 and config.data.pipeline != "device":
        yield (
            f"train.steps_per_dispatch={steps} requires --config.data.pipeline=device: "
            "the other pipelines deliver one batch at a time"
        )
    if config.optimizer.rate_in_velocity and config.optimizer.nesterov:
        yield (
            "optimizer.rate_in_velocity and optimizer.nesterov exclude each other (no "
            "original has both): set --config.optimizer.nesterov=False"
        )


def _class_problems(config: ConfigDict, class_names: tuple) -> Iterator[str]:
    if config.net.num_classes != len(class_names):
        yield (
            f"the net has {config.net.num_classes} classes, data set "
            f"{config.data.name!r} has {len(class_names)}: "
            f"set --config.net.num_classes={len(class_names)}"
        )


def _refuse(problems: list[str]) -> None:
    if len(problems) > 1:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{len(problems)} problems:{lines}")
    if problems:
        raise ValueError(problems[0])
