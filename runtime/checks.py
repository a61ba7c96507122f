"""Validates a run before and after its data are loaded, from one table of fields."""

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

import input_pipeline
from augment.check import check as check_augment
from nets import cost
from runtime.profile import profile_range
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


def anything(value: Any) -> str:
    return ""


class Need(NamedTuple):
    """A condition under which a field has an effect."""

    holds: Callable[[ConfigDict], bool]
    remedy: str


def value_of(field: str, *values: str) -> Need:
    remedy = f"--config.{field}={' or '.join(values)}"
    return Need(lambda config: flatten(config)[field] in values, remedy)


def switched_on(field: str) -> Need:
    return Need(lambda config: bool(flatten(config)[field]), f"--config.{field}")


class Field(NamedTuple):
    """A field of the configuration.

    type: the type of its values. rule: returns what is wrong with a value, or "".
    needs: the condition under which the field has an effect (None: always).
    """

    type: type
    rule: Callable[[Any], str] = anything
    needs: Need | None = None


EXPANDER = value_of("net.wiring.kind", "expander")
INTERLEAVED = value_of("net.wiring.kind", "interleaved")
PADDED = value_of("data.crop", "pad")
BORDER = Need(
    lambda config: config.data.crop == "pad" and config.data.pad > 0,
    "--config.data.crop=pad and a positive data.pad",
)
PHOTOGRAPHS = Need(
    lambda config: config.data.crop != "pad",
    "photographs: --config.data.crop=random_resized, or any crop except pad",
)
DROPS = Need(
    lambda config: (
        config.optimizer.schedule == "steps" and config.optimizer.drop_epochs
    ),
    "--config.optimizer.schedule=steps and optimizer.drop_epochs",
)

# Every field of configs/common.py; a test compares the two. All floats must be finite.
# input_pipeline.check and augment.check have further rules for data and augment.
FIELDS = {
    "seed": Field(int, seed),
    "seeds": Field(int, positive),
    "init_from": Field(str),
    "variant": Field(str),
    "recipe": Field(str),
    "net.name": Field(str),
    "net.num_classes": Field(int),
    "net.graph_seed": Field(int, seed, EXPANDER),
    "net.lowering": Field(str),
    "net.wiring.kind": Field(str),
    "net.wiring.compress": Field(int, needs=EXPANDER),
    "net.wiring.sampling": Field(str, needs=EXPANDER),
    "net.wiring.groups": Field(int, needs=value_of("net.wiring.kind", "grouped")),
    "net.wiring.primary_groups": Field(int, needs=INTERLEAVED),
    "net.wiring.secondary_groups": Field(int, needs=INTERLEAVED),
    "data.name": Field(str),
    "data.dir": Field(str),
    "data.download": Field(bool),
    "data.cache_dir": Field(str),
    "data.pipeline": Field(str),
    "data.crop": Field(str),
    "data.pad": Field(int, needs=PADDED),
    "data.border": Field(str, needs=BORDER),
    "data.image_size": Field(int, needs=PHOTOGRAPHS),
    "data.on_error": Field(str),
    "data.flip": Field(bool),
    "data.mean": Field(tuple),
    "data.std": Field(tuple),
    "data.recipe.name": Field(str),
    "data.recipe.mean": Field(tuple),
    "data.recipe.std": Field(tuple),
    "data.photograph_mean": Field(tuple, needs=PHOTOGRAPHS),
    "data.photograph_std": Field(tuple, needs=PHOTOGRAPHS),
    "augment.jigsaw": Field(bool),
    "augment.jitter": Field(float),
    "augment.lighting": Field(float),
    "augment.hls": Field(tuple),
    "augment.autoaugment": Field(bool),
    "augment.randaugment_ops": Field(int),
    "augment.randaugment_magnitude": Field(
        float, needs=switched_on("augment.randaugment_ops")
    ),
    "augment.cutout": Field(int),
    "augment.mixup": Field(float),
    "augment.cutmix": Field(float),
    "augment.cutmix_probability": Field(float, needs=switched_on("augment.cutmix")),
    "augment.ricap": Field(float),
    "train.batch_size": Field(int, positive),
    "train.last_batch": Field(str, one_of("fill", "partial")),
    "train.label_smoothing": Field(float, share),
    "train.ema": Field(float, share),
    "train.epochs": Field(float, positive),
    "train.steps_per_dispatch": Field(int, positive),  # see _conflicts
    "train.dtype": Field(str, one_of("float32", "bfloat16")),
    "train.batch_norm_groups": Field(int, not_negative),
    "train.log_every_steps": Field(int, positive),
    "train.tensorboard": Field(bool),
    "train.profile_steps": Field(tuple),
    "train.compilation_cache": Field(bool),
    "optimizer.learning_rate": Field(float, not_negative),
    "optimizer.schedule": Field(str, one_of("steps", "cosine", "one_cycle")),
    "optimizer.warmup_epochs": Field(
        float, not_negative, value_of("optimizer.schedule", "steps", "cosine")
    ),
    "optimizer.drop_epochs": Field(
        tuple, numbers, value_of("optimizer.schedule", "steps")
    ),
    "optimizer.drop_factor": Field(float, not_negative, DROPS),
    "optimizer.min_learning_rate": Field(float, not_negative),
    "optimizer.momentum": Field(float, not_negative),
    "optimizer.nesterov": Field(bool, needs=switched_on("optimizer.momentum")),
    "optimizer.rate_in_velocity": Field(bool, needs=switched_on("optimizer.momentum")),
    "optimizer.weight_decay": Field(float, not_negative),
    "eval.batch_size": Field(int, positive),
    "eval.every_epochs": Field(float, positive),
    "eval.checkpoint": Field(str),
    "eval.views": Field(str, one_of("center", "flip", "tencrop")),
    "checkpoint.keep": Field(int, positive),
    "checkpoint.every_steps": Field(int, not_negative),
}
# Fields that some nets have; nets.create checks the others.
NET_FIELDS = {
    "net.depth": Field(int, at_most(10_000)),
    "net.dropout": Field(float, share),
}


def check_effects(config: ConfigDict, changed: Collection[str]) -> None:
    """Raises ValueError for each field of `changed` that has no effect.

    changed: the fields that the user has set. Those of a recipe may lose their effect.
    0, False and () count as unset.
    """
    values = flatten(config)
    needs = {x: FIELDS[x].needs for x in changed if x in FIELDS and values[x]}
    _refuse(
        [
            f"{field}={values[field]!r} has no effect: it requires {need.remedy}"
            for field, need in needs.items()
            if need and not need.holds(config)
        ]
    )


def check_fields(config: ConfigDict) -> None:
    """Raises ValueError for unknown and missing fields, and values of another type."""
    _refuse([*_schema_problems(config)])


def check_config(
    config: ConfigDict, mesh: Mesh, *, training: bool = True
) -> nnx.Module:
    """Checks everything that needs no data, and returns the abstract net.

    training: whether conflicts that affect training only are errors too. Raises
    ValueError that lists all problems.
    """
    check_fields(config)
    problems = [*_value_problems(config)]
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
    try:
        check_augment(config.augment)
    except ValueError as error:
        problems.append(str(error))
    try:
        profile_range(config)
    except ValueError as error:
        problems.append(str(error))
    if config.eval.views == "tencrop" and config.data.crop == "pad":
        problems.append(
            "eval.views='tencrop' requires crops that are smaller than the image, but "
            "data.crop='pad' evaluates whole images: set --config.eval.views=flip"
        )
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


def _schema_problems(config: ConfigDict) -> Iterator[str]:
    values = flatten(config)
    for field, value in values.items():
        known = (FIELDS | NET_FIELDS).get(field)
        if known and not _is_a(known.type, value):
            yield (
                f"{field} must be of type {known.type.__name__}, got {value!r} of type "
                f"{type(value).__name__}"
            )
        elif not known and not field.startswith("net."):  # nets.create knows those
            yield f"there is no field {field}{hint(field, FIELDS)}"
    if missing := sorted(FIELDS.keys() - values.keys()):
        yield (
            f"fields are missing: {', '.join(missing)}; begin with get_config() of a "
            "file in configs/"
        )


def hint(field: str, known: Iterable[str], prefix: str = "") -> str:
    """Suggests the field of the same name, else one with a similar name."""
    section, _, name = field.rpartition(".")
    split = [(x, *x.rpartition(".")[::2]) for x in known]
    same = [x for x, _, leaf in split if leaf == name]
    siblings = {leaf: x for x, above, leaf in split if above == section}
    if same:
        near = difflib.get_close_matches(field, same, 1, 0.0)
    elif siblings:  # a common section makes any two names similar
        near = difflib.get_close_matches(name, siblings, 1)
        near = [siblings[leaf] for leaf in near]
    else:
        near = difflib.get_close_matches(field, [x for x, *_ in split], 1)
    if not near:
        return (
            "; configs/common.py lists all fields, configs/FAMILY.py those of the net"
        )
    kind = f" ({FIELDS[near[0]].type.__name__})" if near[0] in FIELDS else ""
    return f"; did you mean {prefix}{near[0]}{kind}?"


def _is_a(kind: type, value: Any) -> bool:
    if isinstance(value, bool) or kind is bool:
        return kind is type(value)
    return isinstance(value, (int, float) if kind is float else kind)


def _value_problems(config: ConfigDict) -> Iterator[str]:
    for field, value in flatten(config).items():
        if problem := _problem(field, value):
            yield f"{field} {problem}, got {value!r}"


def _problem(field: str, value: Any) -> str:
    known = (FIELDS | NET_FIELDS).get(field)
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            return "must be finite"
        # Far beyond any net, but small enough to fail before time and memory do.
        count = isinstance(number, int) and (not known or known.rule is anything)
        if field.startswith("net.") and count and abs(number) > 1_000_000:
            return "must be at most 1,000,000"
    return known.rule(value) if known else ""


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
