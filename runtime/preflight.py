"""Before the first step: what is refused, what is announced, what has been done."""

import math
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import flags, logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

import augment.check
import input_pipeline
import nets
from data_sources import cache
from nets import cost
from runtime.checkpoints import Checkpoints
from runtime.workdir import PATHS, changes, flatten, read_rows

POSITIVE = (
    "train.batch_size",
    "train.epochs",
    "train.steps_per_dispatch",
    "train.log_every_steps",
    "eval.batch_size",
    "eval.every_epochs",
    "checkpoint.keep",
)
NOT_NEGATIVE = (
    "seed",
    "net.graph_seed",
    "train.batch_norm_groups",
    "checkpoint.every_steps",
    "optimizer.learning_rate",
    "optimizer.min_learning_rate",
    "optimizer.drop_factor",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "optimizer.warmup_epochs",
)
SHARES = ("train.label_smoothing", "train.ema", "net.dropout")
CHOICES = {
    "train.dtype": ("float32", "bfloat16"),
    "train.last_batch": ("fill", "partial"),
}
FIELDS = "the net's are in the file of --config, all others in configs/common.py"


def parsed(argv: Sequence[str]) -> list[str]:
    """app.run's flags_parser: what is wrong in one line, where absl prints a page."""
    try:
        unused = flags.FLAGS(argv)[1:]
        flags.FLAGS.config.to_dict()  # a file that was not found is an error only here
    except Exception as error:
        sys.exit(f"error: {flag_error(error, argv)}")
    if unused:
        sys.exit(f"error: {unused[0]!r} belongs to no flag")
    return argv[:1]


def flag_error(error: Exception, argv: Sequence[str]) -> str:
    """What is wrong with the command line, in one line; raises what it cannot explain.

    config_flags quotes stack traces, and raises bare KeyErrors for unknown fields.
    """
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    root = causes[-1]
    if missing := re.search("No such file or directory: '(.*)'", str(root)):
        here = pathlib.Path(__file__).parents[1]
        files = sorted(
            x.name
            for x in here.glob("configs/*.py")
            if x.stem not in ("common", "data_sets")
        )
        return f"--config: no file {missing[1]}; configs/ has {', '.join(files)}"
    if re.search("indices must be|not a valid index|Attempting to look", str(root)):
        return f"a field is given whole and has no parts: {root}"
    if isinstance(root, KeyError):
        field = str(root.args[0])
        given = [x.partition("=")[0] for x in argv]
        given = [x for x in given if field in x.split(".")]
        if not given:
            raise error
        near = re.search(r'Did you mean "(\w+)"', " ".join(map(str, causes)))
        hint = f"did you mean {near[1]!r}?" if near else FIELDS
        return f"{given[0]}: there is no field {field!r}; {hint}"
    if missing := re.search("Flag (--.*) must have a value other than None", str(root)):
        return f"{missing[1]} is missing; {argv[0]} --help lists the flags"
    if isinstance(root, (OSError, AttributeError)):
        return f"--config: {root}"
    if not isinstance(error, (flags.Error, ValueError, TypeError)):
        raise error
    return str(root if "parsing config file" in str(error) else error)


def join_processes() -> None:
    """Makes this process one of several; before anything touches a device.

    Slurm, Open MPI, Kubernetes and TPU pods are recognised. Elsewhere the environment
    says JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, and on CPUs JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo.
    """
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    count, index = (int(os.environ[x]) if x in os.environ else None for x in names)
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: {error} Set JAX_COORDINATOR_ADDRESS=host:port, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID where no cluster manager does."
        ) from error
    if jax.process_index() != 0:
        logging.set_verbosity(logging.WARNING)  # process 0 tells it all


def use_compilation_cache(config: ConfigDict) -> None:
    """Keeps compiled programs in the user's cache directory and says where."""
    if not config.train.compilation_cache:
        return
    path = cache.directory() / "jax"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    logging.info("compiled programs are kept in %s", path)


def runs(
    config: ConfigDict, workdir: str | pathlib.Path
) -> Iterator[tuple[ConfigDict, pathlib.Path]]:
    """The runs of a configuration and their workdirs.

    One in the workdir itself, or config.seeds of them, with config.seed and the seeds
    after it, each in a folder of its own: workdir/seed0, ...
    """
    if not str(workdir):
        raise ValueError("--workdir is empty: where shall the run live?")
    if "://" in str(workdir):
        raise ValueError(
            f"--workdir={workdir}: runs live in folders; mount the bucket (gcsfuse)"
        )
    workdir = os.path.expanduser(workdir)
    if config.seeds < 1:
        raise ValueError(f"seeds={config.seeds} runs are none: choose at least 1")
    if config.seeds == 1:
        yield config, pathlib.Path(workdir)
        return
    for seed in range(config.seed, config.seed + config.seeds):
        run = config.copy_and_resolve_references()
        run.update(seed=seed, seeds=1)
        yield run, pathlib.Path(workdir) / f"seed{seed}"


def check_agreement(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Refuses processes of one run that have different flags or different workdirs."""
    if jax.process_count() == 1:
        return
    with Checkpoints(workdir) as checkpoints:
        last = max(checkpoints.steps(), default=-1)
    fields = {k: v for k, v in flatten(config).items() if k not in PATHS}
    digest = zlib.crc32(repr(sorted(fields.items())).encode()) >> 1  # an int32
    seen = multihost_utils.process_allgather(np.asarray([last, digest]))
    if len({*seen[:, 1].tolist()}) > 1:
        raise ValueError("the processes of a run need the same --config and fields")
    if len(steps := {*seen[:, 0].tolist()}) > 1:
        raise ValueError(
            f"{workdir} holds other checkpoints for one process than for another (last "
            f"steps {sorted(steps)}, -1 for none): --workdir must be one folder that "
            "all share"
        )


def check_evaluation(config: ConfigDict, examples: input_pipeline.Split) -> None:
    """Refuses, with a ValueError, impossible values and classes that do not fit."""
    fields = flatten(config)
    for field, value in fields.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{field} must be finite, got {value}")
    for field in POSITIVE:
        if fields[field] <= 0:
            raise ValueError(f"{field} must be positive, got {fields[field]}")
    for field in NOT_NEGATIVE:
        if fields[field] < 0:
            raise ValueError(f"{field} must not be negative, got {fields[field]}")
    for field, choices in CHOICES.items():
        if fields[field] not in choices:
            choices = " or ".join(choices)
            raise ValueError(f"{field} must be {choices}, got {fields[field]!r}")
    for field in SHARES:
        if not 0 <= fields.get(field, 0) < 1:
            raise ValueError(f"{field} must lie in [0, 1), got {fields[field]}")
    epochs = config.optimizer.drop_epochs
    if not all(isinstance(epoch, (int, float)) for epoch in epochs):
        raise ValueError(f"optimizer.drop_epochs must be numbers, got {epochs}")
    if config.seed >= 2**32:
        raise ValueError(f"seed must be less than 2**32, got {config.seed}")
    if config.net.num_classes != examples.num_classes:
        raise ValueError(
            f"the net has {config.net.num_classes} classes, data set "
            f"{config.data.name!r} has {examples.num_classes}: "
            f"set --config.net.num_classes={examples.num_classes}"
        )


def check(
    config: ConfigDict,
    examples: input_pipeline.Split,
    test_examples: input_pipeline.Split,
    mesh: Mesh,
) -> None:
    """Refuses, with a ValueError, values that no run can have."""
    check_evaluation(config, examples)
    if config.train.batch_size > len(examples.labels):
        raise ValueError(
            f"train.batch_size {config.train.batch_size} is larger than the "
            f"{len(examples.labels)} training images of {config.data.name}"
        )
    if config.train.batch_size % mesh.size:
        raise ValueError(
            f"train.batch_size {config.train.batch_size} does not divide among "
            f"{mesh.size} devices: choose a multiple of {mesh.size}"
        )
    groups = config.train.batch_norm_groups
    if groups and config.train.batch_size % groups:
        raise ValueError(
            f"train.batch_norm_groups {groups} does not divide a batch of "
            f"{config.train.batch_size}: change it, or train.batch_size"
        )
    if groups and math.gcd(groups, mesh.size) < min(groups, mesh.size):
        raise ValueError(
            f"train.batch_norm_groups {groups} cannot be made of {mesh.size} devices: "
            f"choose a divisor or a multiple of {mesh.size}; 1 is the whole batch, 0 "
            "each device alone"
        )
    for size in input_pipeline.batch_sizes(config, len(examples.labels))[1:]:
        if size % mesh.size:
            raise ValueError(
                f"train.last_batch='partial' leaves {size} of {len(examples.labels)} "
                f"images, which {mesh.size} devices cannot share: choose "
                "--config.train.last_batch=fill, or another train.batch_size"
            )
    if config.train.steps_per_dispatch > 1 and config.data.pipeline != "device":
        raise ValueError(
            f"train.steps_per_dispatch={config.train.steps_per_dispatch} needs "
            "--config.data.pipeline=device: other batches come one by one"
        )
    for size in input_pipeline.batch_sizes(config, len(examples.labels)):
        augment.check.check(config.augment, size // mesh.size)
    if test_examples.image_shape != examples.image_shape:
        raise ValueError(
            f"the test images of {config.data.name} are {test_examples.image_shape}, "
            f"those to train on {examples.image_shape}: bring them to one size, or set "
            "--config.data.crop=random_resized"
        )


def describe(config: ConfigDict, examples: input_pipeline.Split, mesh: Mesh) -> None:
    """Logs what is about to be trained."""
    shape = examples.image_shape
    net = nnx.eval_shape(lambda: nets.create(config.net, nnx.Rngs(0)))
    total = cost.total(cost.layers(net, (1, *shape)))
    logging.info(
        "net      %s %s  parameters %s existing / %s dense, %s multiply-adds per image",
        config.net.name,
        config.variant,
        f"{total.parameters:,}",
        f"{total.dense_parameters:,}",
        f"{total.macs:,}",
    )
    logging.info(
        "data     %s: %d images %s, %d classes, pipeline %s",
        config.data.name,
        len(examples.labels),
        "x".join(map(str, shape)),
        examples.num_classes,
        config.data.pipeline,
    )
    if config.data.recipe.name not in (re.split("[:/]", config.data.name)[0], ""):
        logging.warning(
            "flip, crop, border and schedule are those for %s unless you set them; a "
            "set that has a recipe is chosen by --config=FILE:%s,SET",
            config.data.recipe.name,
            config.variant,
        )
    if jax.default_backend() == "cpu" and config.train.steps_per_dispatch > 1:
        logging.warning(
            "train.steps_per_dispatch %d: on CPU a loop over steps has one thread, "
            "which was 10 times slower; 1 is the better choice here",
            config.train.steps_per_dispatch,
        )
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    logging.info(
        "devices  %d %s in %d processes, %s",
        mesh.size,
        "/".join(kinds),
        jax.process_count(),
        config.train.dtype,
    )


def is_complete(config: ConfigDict, workdir: pathlib.Path, total: int) -> bool:
    """Whether the workdir holds the whole of this run, to its step `total`."""
    with Checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
    if total not in steps or changes(config, workdir):
        return False
    rows = read_rows(workdir / "metrics.csv")
    return bool(rows) and rows[-1]["step"] == total
