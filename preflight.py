"""Before the first step: what is refused, what is announced, what has been done."""

import os
import pathlib

import jax
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

import input_pipeline
import nets
from checkpoints import Checkpoints, load_config
from nets import cost
from reporting import read_rows


def use_compilation_cache(config: ConfigDict) -> None:
    """Keeps compiled programs in the user's cache directory and says where."""
    if not config.train.compilation_cache:
        return
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    path = pathlib.Path(cache) / "wirings" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    logging.info("compiled programs are kept in %s", path)


def check(config: ConfigDict, examples: input_pipeline.Examples, mesh: Mesh) -> None:
    """Refuses, with a ValueError, values that no run can have."""
    for section, field in (
        ("train", "batch_size"),
        ("train", "epochs"),
        ("train", "steps_per_dispatch"),
        ("train", "log_every_steps"),
        ("eval", "batch_size"),
        ("eval", "every_epochs"),
    ):
        if config[section][field] <= 0:
            raise ValueError(
                f"{section}.{field} must be positive, got {config[section][field]}"
            )
    if config.train.dtype not in ("float32", "bfloat16"):
        raise ValueError(
            f"train.dtype must be float32 or bfloat16, got {config.train.dtype!r}"
        )
    if config.train.batch_size % mesh.size:
        raise ValueError(
            f"train.batch_size {config.train.batch_size} does not divide among "
            f"{mesh.size} devices: choose a multiple of {mesh.size}"
        )
    if config.net.num_classes != examples.num_classes:
        raise ValueError(
            f"the net has {config.net.num_classes} classes, data set "
            f"{config.data.name!r} has {examples.num_classes}: "
            f"set --config.net.num_classes={examples.num_classes}"
        )


def describe(config: ConfigDict, examples: input_pipeline.Examples, mesh: Mesh) -> None:
    """Logs what is about to be trained."""
    shape = examples.images.shape[1:]
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
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    logging.info(
        "devices  %d %s in %d processes, %s",
        mesh.size,
        "/".join(kinds),
        jax.process_count(),
        config.train.dtype,
    )


def is_complete(
    config: ConfigDict, workdir: pathlib.Path, checkpoints: Checkpoints, total: int
) -> bool:
    if total not in checkpoints.steps() or _flat(load_config(workdir)) != _flat(config):
        return False
    rows = read_rows(workdir / "metrics.csv")
    return bool(rows) and rows[-1]["step"] == total


def warn_of_changes(config: ConfigDict, workdir: pathlib.Path) -> None:
    """A changed configuration may resume, but never unnoticed."""
    old, new = _flat(load_config(workdir)), _flat(config)
    for field in sorted(old.keys() | new.keys()):
        if old.get(field) != new.get(field):
            logging.warning(
                "this run was started with %s = %s, it goes on with %s",
                field,
                old.get(field),
                new.get(field),
            )


def _flat(config: ConfigDict, prefix: str = "") -> dict:
    fields = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict)
        fields |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return fields
