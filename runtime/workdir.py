"""The files of a workdir other than its checkpoints: config.json, tables, the lock."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from flax import traverse_util
from ml_collections import ConfigDict

import input_pipeline

CONFIG_JSON = "config.json"
FORMAT = 2  # of config.json
# Fields that a config.json of this format may lack, because they were added later, and
# the values with which its run was trained.
ADDED = {
    "optimizer.name": "sgd",
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.epsilon": 1e-8,
    "optimizer.decay_on": "auto",
    "optimizer.clip_norm": 0.0,
    "optimizer.accumulate_steps": 1,
    "net.remat": "none",
    "net.wiring.block": 1,
}
# The same for fields that only one net has.
ADDED_TO_NETS = {"delugenet": {"net.cross_layer": True}}
# Keys of config.json that are not fields of the configuration.
_OWN_KEYS = ("format", "data_set", "step_offset")
PATHS = ("data.dir", "data.cache_dir")  # may differ from machine to machine
# Fields that do not affect evaluation, which has its own crop and no dropout, and takes
# the net and its graphs from the run.
TRAINING_ONLY = (
    *(*PATHS, "data.download", "data.pipeline", "data.flip", "data.pad"),
    *("data.border", "net.lowering", "net.remat", "net.dropout", "net.graph_seed"),
    *("data.mean", "data.std"),  # the normalisation is in config.json
)


class WorkdirError(ValueError):
    """A file of a workdir is missing, damaged, in use or cannot be written."""


def runs(
    config: ConfigDict, workdir: str | os.PathLike
) -> Iterator[tuple[ConfigDict, pathlib.Path]]:
    """Yields (config, workdir) for each seed of a configuration.

    One run in the workdir itself, or config.seeds runs with seeds config.seed,
    config.seed + 1, ... in workdir/seed<seed>. Raises ValueError if the workdir or
    the number of seeds is invalid.
    """
    workdir = resolve(workdir)
    if config.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {config.seeds}")
    if config.seeds == 1:
        yield config, workdir
        return
    for seed in range(config.seed, config.seed + config.seeds):
        run = config.copy_and_resolve_references()
        run.update(seed=seed, seeds=1)
        yield run, workdir / f"seed{seed}"


def resolve(workdir: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a workdir; raises ValueError if it cannot be one."""
    if not str(workdir):
        raise ValueError("--workdir must not be empty")
    if "://" in str(workdir):
        raise ValueError(
            f"--workdir={workdir} is a URL, not a directory: mount the bucket "
            "(e.g. with gcsfuse) and give its path"
        )
    return pathlib.Path(os.path.expanduser(workdir))


def save_config(
    workdir: str | os.PathLike,
    config: ConfigDict,
    facts: input_pipeline.Facts,
    step_offset: int = 0,
) -> None:
    """Writes config.json: fields, facts about the data set, and the Clock's offset."""
    own = {"data_set": dataclasses.asdict(facts), "step_offset": step_offset}
    own["format"] = FORMAT
    write_json(pathlib.Path(workdir) / CONFIG_JSON, config.to_dict() | own)


def load_config(path: str | os.PathLike) -> ConfigDict:
    """Loads the configuration in a workdir or a config.json; lists become tuples."""
    fields = _read_json(path)
    config = ConfigDict({k: v for k, v in fields.items() if k not in _OWN_KEYS})
    flat = flatten(config)
    added = ADDED | ADDED_TO_NETS.get(flat.get("net.name"), {})
    return ConfigDict(traverse_util.unflatten_dict(added | flat, sep="."))


def load_facts(workdir: str | os.PathLike) -> input_pipeline.Facts:
    """Loads the facts about the data set of a run from config.json."""
    return input_pipeline.Facts(**_read_json(workdir)["data_set"])


def load_step_offset(workdir: str | os.PathLike) -> int:
    """Loads the offset of a run's Clock from config.json."""
    return _read_json(workdir)["step_offset"]


def _read_json(path: str | os.PathLike) -> dict[str, Any]:
    path = pathlib.Path(path)
    path = path if path.is_file() else path / CONFIG_JSON
    try:
        fields = _to_tuples(json.loads(path.read_text()))
        written = fields.get("format", 1)
        age = "an older" if written < FORMAT else "a newer"
        if written == FORMAT:
            input_pipeline.Facts(**fields["data_set"])
            int(fields["step_offset"])
    except FileNotFoundError as error:
        raise WorkdirError(f"{path} does not exist; is --workdir correct?") from error
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise WorkdirError(
            f"{path} cannot be read ({error}): restore it from a copy, or delete it "
            "and repeat the training command"
        ) from error
    if written != FORMAT:
        raise WorkdirError(
            f"{path} was written by {age} version of Wirings (format {written}, this "
            f"is format {FORMAT}): use that version, or another --workdir"
        )
    return fields


def _to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_tuples(item) for key, item in value.items()}
    return tuple(map(_to_tuples, value)) if isinstance(value, list) else value


def changes(config: ConfigDict, workdir: str | os.PathLike) -> list[str]:
    """Describes each field that differs from the workdir's config.json, if any."""
    return [
        f"{field}={new} (the run was started with {old})"
        for field, old, new in _compare(config, workdir)
        if field not in PATHS
    ]


def evaluation_changes(config: ConfigDict, workdir: str | os.PathLike) -> list[str]:
    """Describes the changes that affect evaluation."""
    return [
        f"evaluating with {field}={new} (the run was trained with {old})"
        for field, old, new in _compare(config, workdir)
        if field.startswith(("data.", "train.dtype")) and field not in TRAINING_ONLY
    ]


def take_net(config: ConfigDict, workdir: str | os.PathLike) -> ConfigDict:
    """Returns the configuration with the net of a run; warns of fields it changes."""
    run, fields = load_config(workdir), config.to_dict()
    ignored = [
        f"{field}={old} (not {new})"
        for field, old, new in _compare(config, workdir)
        if field.startswith(("net.", "train.ema")) and field not in TRAINING_ONLY
    ]
    if ignored:
        logging.warning("evaluating the net of the run: %s", ", ".join(ignored))
    lowering = {"lowering": config.net.get("lowering", "auto")}
    fields["net"] = run.net.to_dict() | lowering
    fields["train"]["ema"] = run.train.ema
    return ConfigDict(fields)


def _compare(config, workdir) -> Iterator[tuple[str, Any, Any]]:
    if not (pathlib.Path(workdir) / CONFIG_JSON).exists():
        return
    old, new = flatten(load_config(workdir)), flatten(config)
    for field in sorted(old.keys() | new.keys()):
        if old.get(field) != new.get(field):
            yield field, old.get(field), new.get(field)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns {'train.batch_size': 64, ...}."""
    return traverse_util.flatten_dict(config.to_dict(), sep=".")


@contextlib.contextmanager
def lock(workdir: pathlib.Path) -> Iterator[None]:
    """Locks a workdir while a run writes to it; WorkdirError if another run holds it.

    Two runs would delete each other's checkpoints. The operating system releases the
    lock when the process ends, even by SIGKILL. File systems without locks get a
    warning, Windows nothing.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    if jax.process_index() != 0:  # only process 0 writes
        yield
        return
    path = workdir / ".lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise WorkdirError(
            f"{workdir} cannot be written ({error.strerror}): use another --workdir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its previous holder may have removed the file since it was opened.
            if not os.fstat(file.fileno()).st_nlink:
                raise BlockingIOError
        except BlockingIOError as error:
            raise WorkdirError(
                f"another process is training in {workdir}: wait until it ends, or use "
                "another --workdir"
            ) from error
        except OSError as error:  # some network file systems
            logging.warning("%s cannot be locked: %s", path, error)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a refused run leaves no trace
                workdir.rmdir()


def read_rows(path: pathlib.Path) -> list[dict[str, float]]:
    """Reads the rows of a metrics.csv, steps as int; none if the file is missing."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        rows = [{k: float(v) for k, v in row.items()} for row in rows]
        return [row | {"step": int(row["step"])} for row in rows]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise WorkdirError(f"{path} is damaged; delete it: {error!r}") from error


def as_csv(rows: list[dict[str, Any]]) -> str:
    """Formats rows, which all have the keys of the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON, indented and with sorted keys, as write_text does."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file on process 0. A kill leaves either the old content or the new."""
    if jax.process_index() != 0:
        return
    path = pathlib.Path(path)
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # otherwise the rename may reach the disk first
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise WorkdirError(f"{path} cannot be written: {error}") from error
