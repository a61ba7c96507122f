"""Validates a run before and after its data are loaded, from tables of fields."""

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
from runtime.clock import Clock
from runtime.profile import profile_range
from runtime.workdir import flatten

# Fields that only some nets have. nets.create checks the other fields of a net.
NET_TYPES = {"net.depth": int, "net.dropout": float}
# The types of the defaults in configs/common.py, which a test compares. All floats must
# be finite.
_FIELDS = {
    bool: "augment.autoaugment augment.jigsaw data.download data.flip "
    "optimizer.nesterov optimizer.rate_in_velocity train.compilation_cache "
    "train.tensorboard",
    int: "augment.cutout augment.randaugment_ops checkpoint.every_steps "
    "checkpoint.keep data.image_size data.pad eval.batch_size net.graph_seed "
    "net.num_classes net.wiring.block net.wiring.compress net.wiring.groups "
    "net.wiring.primary_groups net.wiring.secondary_groups optimizer.accumulate_steps "
    "seed seeds train.batch_norm_groups train.batch_size train.log_every_steps "
    "train.steps_per_dispatch",
    float: "augment.cutmix augment.cutmix_probability augment.jitter augment.lighting "
    "augment.mixup augment.randaugment_magnitude augment.ricap eval.every_epochs "
    "optimizer.beta1 optimizer.beta2 optimizer.clip_norm optimizer.drop_factor "
    "optimizer.epsilon optimizer.learning_rate optimizer.min_learning_rate "
    "optimizer.momentum optimizer.warmup_epochs optimizer.weight_decay train.ema "
    "train.epochs train.label_smoothing",
    str: "data.border data.cache_dir data.crop data.dir data.name data.on_error "
    "data.pipeline data.recipe.name eval.checkpoint eval.views init_from net.lowering "
    "net.name net.remat net.wiring.kind net.wiring.sampling optimizer.decay_on "
    "optimizer.name optimizer.schedule recipe train.dtype train.last_batch variant",
    tuple: "augment.hls data.mean data.photograph_mean data.photograph_std "
    "data.recipe.mean data.recipe.std data.std optimizer.drop_epochs "
    "train.profile_steps",
}
TYPES = {x: kind for kind, fields in _FIELDS.items() for x in fields.split()}
TYPES |= NET_TYPES


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


def epochs(value: tuple) -> str:
    if not all(isinstance(x, (int, float)) for x in value):
        return "must contain only numbers"
    if list(value) != sorted(value) or min(value, default=0) < 0:
        return "must be epochs from 0 on that do not decrease"
    return ""


def one_of(*choices: str) -> Callable[[str], str]:
    def rule(value):
        if value in choices:
            return ""
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"must be one of {', '.join(choices)}{hint}"

    return rule


# field -> a function that returns what is wrong with a value, or "". Further rules are
# in nets.create, input_pipeline.find and augment.check.
RULES = {
    "seed": seed,
    "seeds": positive,
    "net.graph_seed": seed,
    "net.depth": at_most(10_000),
    "net.dropout": share,
    "net.wiring.kind": one_of("dense", "expander", "grouped", "interleaved"),
    "train.batch_size": positive,
    "train.last_batch": one_of("fill", "partial"),
    "train.label_smoothing": share,
    "train.ema": share,
    "train.epochs": positive,
    "train.steps_per_dispatch": positive,
    "train.dtype": one_of("float32", "bfloat16"),
    "train.batch_norm_groups": not_negative,
    "train.log_every_steps": positive,
    "optimizer.name": one_of("sgd", "adamw"),
    "optimizer.learning_rate": not_negative,
    "optimizer.schedule": one_of("steps", "cosine", "one_cycle"),
    "optimizer.warmup_epochs": not_negative,
    "optimizer.drop_epochs": epochs,
    "optimizer.drop_factor": not_negative,
    "optimizer.min_learning_rate": not_negative,
    "optimizer.momentum": not_negative,
    "optimizer.beta1": share,
    "optimizer.beta2": share,
    "optimizer.epsilon": positive,
    "optimizer.weight_decay": not_negative,
    "optimizer.decay_on": one_of("auto", "all", "kernels"),
    "optimizer.clip_norm": not_negative,
    "optimizer.accumulate_steps": positive,
    "eval.batch_size": positive,
    "eval.every_epochs": positive,
    "eval.views": one_of("center", "flip", "tencrop"),
    "checkpoint.keep": positive,
    "checkpoint.every_steps": not_negative,
}


class Need(NamedTuple):
    """A condition under which a field has an effect."""

    holds: Callable[[ConfigDict], bool]
    remedy: str


def value_of(field: str, *values: str) -> Need:
    def holds(config):
        value = flatten(config)[field]
        return value in values or bool(_problem(field, value))  # reported by itself

    return Need(holds, f"--config.{field}={' or '.join(values)}")


def switched_on(field: str) -> Need:
    return Need(lambda config: bool(flatten(config)[field]), f"--config.{field}")


EXPANDER = value_of("net.wiring.kind", "expander")
RANDOM_GRAPH = Need(
    lambda config: EXPANDER.holds(config) and config.net.wiring.sampling != "ramanujan",
    "--config.net.wiring.kind=expander and a random net.wiring.sampling",
)
INTERLEAVED = value_of("net.wiring.kind", "interleaved")
SGD, ADAMW = value_of("optimizer.name", "sgd"), value_of("optimizer.name", "adamw")
VELOCITY = Need(
    lambda config: SGD.holds(config) and config.optimizer.momentum,
    "--config.optimizer.name=sgd and optimizer.momentum",
)
PHOTOGRAPHS = Need(
    lambda config: not input_pipeline.in_memory(config.data),
    "photographs: --config.data.crop=random_resized, or any crop except pad",
)
NEEDS = {
    "net.graph_seed": RANDOM_GRAPH,
    "net.wiring.compress": EXPANDER,
    "net.wiring.sampling": EXPANDER,
    "net.wiring.block": EXPANDER,
    "net.wiring.groups": value_of("net.wiring.kind", "grouped"),
    "net.wiring.primary_groups": INTERLEAVED,
    "net.wiring.secondary_groups": INTERLEAVED,
    "data.pad": value_of("data.crop", "pad"),
    "data.border": Need(
        lambda config: input_pipeline.in_memory(config.data) and config.data.pad > 0,
        "--config.data.crop=pad and a positive data.pad",
    ),
    "data.image_size": PHOTOGRAPHS,
    "data.photograph_mean": PHOTOGRAPHS,
    "data.photograph_std": PHOTOGRAPHS,
    "augment.randaugment_magnitude": switched_on("augment.randaugment_ops"),
    "augment.cutmix_probability": switched_on("augment.cutmix"),
    "optimizer.warmup_epochs": value_of("optimizer.schedule", "steps", "cosine"),
    "optimizer.drop_epochs": value_of("optimizer.schedule", "steps"),
    "optimizer.drop_factor": Need(
        lambda config: (
            config.optimizer.schedule == "steps" and config.optimizer.drop_epochs
        ),
        "--config.optimizer.schedule=steps and optimizer.drop_epochs",
    ),
    "optimizer.momentum": SGD,
    "optimizer.nesterov": VELOCITY,
    "optimizer.rate_in_velocity": VELOCITY,
    "optimizer.beta1": ADAMW,
    "optimizer.beta2": ADAMW,
    "optimizer.epsilon": ADAMW,
    "optimizer.decay_on": switched_on("optimizer.weight_decay"),
}


def check_effects(config: ConfigDict, changed: Collection[str]) -> None:
    """Raises ValueError for each field of `changed` that has no effect.

    changed: the fields that the user has set. Those of a recipe may lose their effect.
    0, False and () count as unset.
    """
    values = flatten(config)
    _refuse(
        [
            f"{field}={values[field]!r} has no effect: it requires "
            f"{NEEDS[field].remedy}"
            for field in changed
            if values[field] and not has_effect(config, field)
        ]
    )


def has_effect(config: ConfigDict, field: str) -> bool:
    """Returns whether the condition of a field in NEEDS holds, if it has one."""
    return field not in NEEDS or bool(NEEDS[field].holds(config))


def check_fields(config: ConfigDict) -> None:
    """Raises ValueError for unknown and missing fields, and values of another type."""
    _refuse([*_schema_problems(config)])


def check_values(config: ConfigDict) -> None:
    """Checks fields, values and the net, but not the data set.

    Raises ValueError that lists all problems.
    """
    check_fields(config)
    problems = [*_value_problems(config)]
    _run(problems, input_pipeline.check, config.data)
    _run(problems, check_augment, config.augment)
    _build_net(problems, config)
    _refuse(problems)


def check_config(
    config: ConfigDict, mesh: Mesh, *, training: bool = True
) -> tuple[nnx.Module, input_pipeline.DataSet]:
    """Checks everything that needs no data.

    Returns the abstract net, and the data set that was found.

    training: whether conflicts that affect training only are errors too. Raises
    ValueError that lists all problems.
    """
    check_fields(config)
    problems = [*_value_problems(config)]
    data_set = _run(problems, input_pipeline.find, config.data)
    net = _build_net(problems, config)
    _run(problems, check_augment, config.augment)
    _run(problems, profile_range, config)
    if config.eval.views == "tencrop" and input_pipeline.in_memory(config.data):
        problems.append(
            "eval.views='tencrop' requires crops that are smaller than the image, but "
            "data.crop='pad' evaluates whole images: set --config.eval.views=flip"
        )
    if training:
        problems += [*_conflicts(config, mesh), *_schedule_problems(config)]
    _refuse(problems)
    return net, data_set


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
        _run(problems, check_augment, config.augment, size // mesh.size)
    if test.image_shape != facts.image_shape:
        problems.append(
            f"the test images of {config.data.name} are {test.image_shape}, the "
            f"training images {facts.image_shape}: resize them to one size, or set "
            "--config.data.crop=random_resized"
        )
    clock = _run(problems, Clock.of, config, facts.num_train)
    _run(problems, profile_range, config, clock and clock.total)
    _refuse(problems)


def _schema_problems(config: ConfigDict) -> Iterator[str]:
    values = flatten(config)
    for field, value in values.items():
        kind = TYPES.get(field)
        if kind and not _is_a(kind, value):
            yield (
                f"{field} must be of type {kind.__name__}, got {value!r} of type "
                f"{type(value).__name__}"
            )
        elif not kind and not field.startswith("net."):  # nets.create knows those
            yield f"there is no field {field}{hint(field, TYPES)}"
    if missing := sorted(TYPES.keys() - NET_TYPES.keys() - values.keys()):
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
    kind = f" ({TYPES[near[0]].__name__})" if near[0] in TYPES else ""
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
    rule = RULES.get(field)
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            return "must be finite"
        # Far beyond any net, but small enough to fail before time and memory do.
        count = isinstance(number, int) and not rule
        if field.startswith("net.") and count and abs(number) > 1_000_000:
            return "must be at most 1,000,000"
    return rule(value) if rule else ""


def _conflicts(config: ConfigDict, mesh: Mesh) -> Iterator[str]:
    batch_size, groups = config.train.batch_size, config.train.batch_norm_groups
    if batch_size % mesh.size:
        yield (
            f"train.batch_size={batch_size} does not divide among {mesh.size} devices: "
            f"use a multiple of {mesh.size}"
        )
    if groups > 0 and batch_size % groups:
        yield (
            f"train.batch_norm_groups={groups} does not divide train.batch_size="
            f"{batch_size}: change one of them"
        )
    if groups > 0 and math.gcd(groups, mesh.size) < min(groups, mesh.size):
        yield (
            f"train.batch_norm_groups={groups} cannot be spread over {mesh.size} "
            f"devices: use a divisor or a multiple of {mesh.size}, 1 for the whole "
            "batch, or 0 for each device alone"
        )
    steps = config.train.steps_per_dispatch
    on_device = config.data.pipeline in ("auto", "device")
    if steps > 1 and not (on_device and input_pipeline.in_memory(config.data)):
        yield (
            f"train.steps_per_dispatch={steps} requires --config.data.pipeline=device: "
            "the other pipelines deliver one batch at a time"
        )


def _schedule_problems(config: ConfigDict) -> Iterator[str]:
    """Yields what optimizers.schedule cannot follow, whatever the data set."""
    recipe, epochs = config.optimizer, config.train.epochs
    if recipe.schedule == "one_cycle" and recipe.warmup_epochs:
        yield (
            "optimizer.schedule='one_cycle' includes a warm-up: set "
            "--config.optimizer.warmup_epochs=0.0"
        )
    elif 0 < epochs <= recipe.warmup_epochs < math.inf:
        yield (
            f"optimizer.warmup_epochs={recipe.warmup_epochs:g} must end before "
            f"train.epochs={epochs:g}"
        )
    if recipe.name == "sgd" and recipe.rate_in_velocity and recipe.nesterov:
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


def _build_net(problems: list[str], config: ConfigDict) -> nnx.Module | None:
    """Returns the abstract net, or None if its fields have problems."""
    if any(problem.startswith("net.") for problem in problems):
        return None
    return _run(problems, cost.build, config.net)


def _run(problems: list[str], check: Callable, *arguments) -> Any:
    """Returns the result of a check, or adds its ValueError to the problems."""
    try:
        return check(*arguments)
    except ValueError as error:
        problems.append(str(error))
        return None


def _refuse(problems: list[str]) -> None:
    if len(problems) > 1:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{len(problems)} problems:{lines}")
    if problems:
        raise ValueError(problems[0])
