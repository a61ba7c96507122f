"""Validates a run before and after its data are loaded, from tables of fields."""

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

import input_pipeline
from augment.check import check as check_augment
from nets import cost
from runtime.clock import Clock
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


def _by_field(table: dict) -> dict:
    return {x: key for key, fields in table.items() for x in fields.split()}


TYPES = _by_field(_FIELDS) | NET_TYPES


def positive(value: float) -> str:
    return "" if value > 0 else "must be positive"


def not_negative(value: float) -> str:
    return "" if value >= 0 else "must not be negative"


def share(value: float) -> str:
    return "" if 0 <= value < 1 else "must be in [0, 1)"


def depth(value: int) -> str:
    return "" if value <= 10_000 else "must be at most 10,000"


def seed(value: int) -> str:
    return "" if 0 <= value < 2**32 else "must be at least 0 and less than 2**32"


def epochs(value: tuple) -> str:
    if not all(isinstance(x, (int, float)) for x in value):
        return "must contain only numbers"
    if list(value) != sorted(value) or min(value, default=0) < 0:
        return "must be epochs from 0 on that do not decrease"
    return ""


def profile(value: tuple) -> str:
    whole = all(isinstance(step, int) for step in value)
    if not value or (len(value) == 2 and whole and 0 < value[0] < value[1]):
        return ""
    return "must be (first, last) with 0 < first < last, such as (20, 30)"


# Functions that return what is wrong with a value, or "". Further rules are in
# nets.create, input_pipeline.find and augment.check.
RULES = _by_field(
    {
        seed: "seed net.graph_seed",
        depth: "net.depth",
        epochs: "optimizer.drop_epochs",
        profile: "train.profile_steps",
        positive: "checkpoint.keep eval.batch_size eval.every_epochs "
        "optimizer.accumulate_steps optimizer.epsilon seeds train.batch_size "
        "train.epochs train.log_every_steps train.steps_per_dispatch",
        not_negative: "checkpoint.every_steps optimizer.clip_norm "
        "optimizer.drop_factor optimizer.learning_rate optimizer.min_learning_rate "
        "optimizer.momentum optimizer.warmup_epochs optimizer.weight_decay "
        "train.batch_norm_groups",
        share: "net.dropout optimizer.beta1 optimizer.beta2 train.ema "
        "train.label_smoothing",
    }
)
CHOICES = {
    "net.wiring.kind": ("dense", "expander", "grouped", "interleaved"),
    "net.wiring.sampling": ("smaller_side", "per_output", "per_input", "ramanujan"),
    "train.last_batch": ("fill", "partial"),
    "train.dtype": ("float32", "bfloat16"),
    "optimizer.name": ("sgd", "adamw"),
    "optimizer.schedule": ("steps", "cosine", "one_cycle"),
    "optimizer.decay_on": ("auto", "all", "kernels"),
    "eval.views": ("center", "flip", "tencrop"),
}

EXPANDER = {"net.wiring.kind": ("expander",)}
RANDOM = {"net.wiring.sampling": ("smaller_side", "per_output", "per_input")}
INTERLEAVED = {"net.wiring.kind": ("interleaved",)}
SGD, ADAMW = {"optimizer.name": ("sgd",)}, {"optimizer.name": ("adamw",)}
STEPS = {"optimizer.schedule": ("steps",)}
IN_MEMORY = {"data.crop": ("pad",)}
PHOTOGRAPHS = {"data.crop": input_pipeline.CHOICES["crop"][1:]}
# The other fields, and their values, that a field requires to have an effect. () stands
# for every value except 0, False and ().
NEEDS = {
    "net.graph_seed": EXPANDER | RANDOM,
    "net.wiring.compress": EXPANDER,
    "net.wiring.sampling": EXPANDER,
    "net.wiring.block": EXPANDER,
    "net.wiring.groups": {"net.wiring.kind": ("grouped",)},
    "net.wiring.primary_groups": INTERLEAVED,
    "net.wiring.secondary_groups": INTERLEAVED,
    "data.pad": IN_MEMORY,
    "data.border": IN_MEMORY | {"data.pad": ()},
    "data.image_size": PHOTOGRAPHS,
    "data.photograph_mean": PHOTOGRAPHS,
    "data.photograph_std": PHOTOGRAPHS,
    "augment.randaugment_magnitude": {"augment.randaugment_ops": ()},
    "augment.cutmix_probability": {"augment.cutmix": ()},
    "optimizer.warmup_epochs": {"optimizer.schedule": ("steps", "cosine")},
    "optimizer.drop_epochs": STEPS,
    "optimizer.drop_factor": STEPS | {"optimizer.drop_epochs": ()},
    "optimizer.momentum": SGD,
    "optimizer.nesterov": SGD | {"optimizer.momentum": ()},
    "optimizer.rate_in_velocity": SGD | {"optimizer.momentum": ()},
    "optimizer.beta1": ADAMW,
    "optimizer.beta2": ADAMW,
    "optimizer.epsilon": ADAMW,
    "optimizer.decay_on": {"optimizer.weight_decay": ()},
}


def check_effects(config: ConfigDict, changed: Collection[str]) -> None:
    """Raises ValueError for each field of `changed` that has no effect.

    changed: the fields that the user has set. Those of a recipe may lose their effect.
    0, False and () count as unset.
    """
    values, problems = flatten(config), []
    for field in changed:
        if values[field] and not has_effect(config, field):
            flags = [
                f"--config.{x}" + (f"={' or '.join(wanted)}" if wanted else "")
                for x, wanted in NEEDS[field].items()
            ]
            problems.append(
                f"{field}={values[field]!r} has no effect: it requires "
                f"{' and '.join(flags)}"
            )
    _refuse(problems)


def has_effect(config: ConfigDict, field: str) -> bool:
    """Returns whether all that a field requires is set.

    An invalid value counts as set, because it is reported as an error of its own.
    """
    values = flatten(config)
    choices = CHOICES | {"data.crop": input_pipeline.CHOICES["crop"]}
    return all(
        values[x] in wanted or values[x] not in choices[x] if wanted else values[x]
        for x, wanted in NEEDS.get(field, {}).items()
    )


def check_fields(config: ConfigDict) -> None:
    """Raises ValueError for unknown and missing fields, and values of another type."""
    values, problems = flatten(config), []
    for field, value in values.items():
        kind = TYPES.get(field)
        if kind and not _is_a(kind, value):
            problems.append(
                f"{field} must be of type {kind.__name__}, got {value!r} of type "
                f"{type(value).__name__}"
            )
        elif not kind and not field.startswith("net."):  # nets.create knows those
            problems.append(f"there is no field {field}{hint(field, TYPES)}")
    if missing := sorted(TYPES.keys() - NET_TYPES.keys() - values.keys()):
        problems.append(
            f"fields are missing: {', '.join(missing)}; begin with get_config() of a "
            "file in configs/"
        )
    _refuse(problems)


def check_values(config: ConfigDict) -> None:
    """Checks fields, values and the net; raises ValueError that lists all problems."""
    problems, *_ = _check_sections(config, input_pipeline.check)
    _refuse(problems)


def check_config(
    config: ConfigDict, mesh: Mesh, *, training: bool = True
) -> tuple[nnx.Module, input_pipeline.DataSet]:
    """Checks everything that needs no data; returns the abstract net and the data set.

    training: whether conflicts that affect training only are errors too. Raises
    ValueError that lists all problems.
    """
    problems, net, data_set = _check_sections(config, input_pipeline.find)
    if config.eval.views == "tencrop" and input_pipeline.in_memory(config.data):
        problems.append(
            "eval.views='tencrop' requires crops that are smaller than the image, but "
            "data.crop='pad' evaluates whole images: set --config.eval.views=flip"
        )
    if training:
        problems += _conflicts(config, mesh)
    _refuse(problems)
    return net, data_set


def check_data(
    config: ConfigDict,
    mesh: Mesh,
    facts: input_pipeline.Facts,
    test: input_pipeline.Split,
) -> None:
    """Checks a configuration against its data; raises ValueError like check_config."""
    problems, classes = [], len(facts.class_names)
    if config.net.num_classes != classes:
        problems.append(
            f"the net has {config.net.num_classes} classes, data set "
            f"{config.data.name!r} has {classes}: set "
            f"--config.net.num_classes={classes}"
        )
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
        else:
            _run(problems, check_augment, config.augment, size // mesh.size)
    if test.image_shape != facts.image_shape:
        problems.append(
            f"the test images of {config.data.name} are {test.image_shape}, the "
            f"training images {facts.image_shape}: resize them to one size, or set "
            "--config.data.crop=random_resized"
        )
    clock = _run(problems, Clock.of, config, facts.num_train)
    steps = config.train.profile_steps
    if clock and steps and steps[1] > clock.total:
        problems.append(
            f"train.profile_steps={steps} must end by the last step of the run, "
            f"{clock.total}"
        )
    _refuse(problems)


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


def _check_sections(config: ConfigDict, check_data: Callable) -> tuple:
    """Returns the problems, the abstract net and the result of check_data."""
    check_fields(config)
    problems = [
        f"{field} {problem}, got {value!r}"
        for field, value in flatten(config).items()
        if (problem := _problem(field, value))
    ]
    data = _run(problems, check_data, config.data)
    wrong = any(problem.startswith("net.") for problem in problems)
    net = None if wrong else _run(problems, cost.build, config.net)
    _run(problems, check_augment, config.augment)
    return problems, net, data


def _problem(field: str, value: Any) -> str:
    rule = RULES.get(field)
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            return "must be finite"
        # Far larger than in any net; rejected before it exhausts time or memory.
        count = isinstance(number, int) and not rule
        if field.startswith("net.") and count and abs(number) > 1_000_000:
            return "must be at most 1,000,000"
    if value not in (choices := CHOICES.get(field, (value,))):
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"must be one of {', '.join(choices)}{hint}"
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
