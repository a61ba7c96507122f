"""Saves and restores the state of a run. The one file that knows orbax.

A checkpoint is a directory `workdir/checkpoints/<step>` with two orbax items: `arrays`,
a flat {path: array}, and `table`, our own JSON with the dtype, shape and CRC-32 of each
array. Orbax silently restores flipped bits and casts dtypes.

Retention is ours: orbax's LatestN and BestN count damaged checkpoints, lose the best to
a NaN, refuse to replace a step, and a kill during a deletion leaves half a checkpoint.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

import metrics

# Orbax logs some 30 lines per save, and each error that it also raises.
_ORBAX = os.path.dirname(ocp.__file__)
logging.get_absl_logger().addFilter(lambda log: not log.pathname.startswith(_ORBAX))

_TABLE_FILE = "table.json"
# Suffixes of `<step>`: orbax is writing it; a new save will replace it, and it remains
# readable until that save is committed; it is being deleted.
WRITING, REPLACED, DELETED = ".orbax-checkpoint-tmp", ".replaced", ".deleted"


class CheckpointError(ValueError):
    """A checkpoint is missing, unreadable, cannot be written or does not fit."""


class _DamageError(Exception):
    """A checkpoint cannot be read back as it was written; another one may be fine."""


class Checkpoints:
    """The checkpoints of a workdir: retains the last `keep` and the best.

    The best has the highest metrics.BEST_METRIC among checkpoints saved with a row;
    ties go to the earliest. If none has a row, the last is the best. Every process of a
    run creates an instance and makes the same calls; the arrays are replicated, and
    process 0 writes. Only save() changes files.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2):
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        self._keep = keep
        self._damaged: set[int] = set()  # found by restore(); do not count as retained
        self._pending: int | None = None  # the step being written in the background
        self._orbax = _create_checkpointer()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self.wait()
        except CheckpointError as failed:
            if error is None:
                raise
            logging.error("%s", failed)  # must not replace the first error
        finally:
            self._orbax.close()

    def steps(self) -> list[int]:
        """Returns the committed steps, ascending, including damaged ones."""
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        found = (re.fullmatch(rf"(\d+)(?:{REPLACED})?", name) for name in names)
        return sorted({int(match[1]) for match in found if match})

    def row(self, step: int) -> dict[str, float]:
        """Returns the metrics of a step; empty if it has none or is unreadable."""
        with contextlib.suppress(_DamageError):
            return self._table(step)["row"]
        return {}

    def check_room(self, state: Any) -> None:
        """Raises CheckpointError if there is no room for a checkpoint of `state`."""
        if jax.process_index() != 0:
            return
        try:
            self._check_disk(sum(x.nbytes for x in jax.tree.leaves(state)))
        except OSError as error:
            raise CheckpointError(
                f"no checkpoint can be written to {self.directory}: {error}"
            ) from error

    def check_finite(self, bad_step: jax.Array) -> None:
        """Raises FloatingPointError if a bad_step was recorded; call before save()."""
        if (bad := int(bad_step)) < 0:
            return
        self.wait()
        last = "there is no checkpoint yet"
        if good := self.steps():
            last = f"the last good checkpoint is step {good[-1]} in {self.directory}"
        raise FloatingPointError(
            f"the loss of step {bad}, or the weights after it, are not finite; {last}; "
            "try a lower --config.optimizer.learning_rate, or "
            "--config.optimizer.clip_norm=1.0"
        )

    def save(self, step: int, state: Any, row: dict[str, float] | None = None) -> None:
        """Copies `state`, a pytree of arrays, and writes it in the background.

        `row` holds the metrics of this step, if it was evaluated. The arrays may be
        donated as soon as this returns. An existing checkpoint at `step` is replaced
        once the new one is committed. Raises CheckpointError, also if the previous
        write has failed in the background.
        """
        self.wait()
        # Digests and files come from one private copy. On CPU np.asarray is a view,
        # and jax does not reuse a donated buffer while a view exists.
        arrays = _host_copy(state)
        table = {
            "step": int(step),
            "row": {name: float(value) for name, value in (row or {}).items()},
            "arrays": {path: _digest(array) for path, array in arrays.items()},
        }
        items = ocp.args.Composite(
            arrays=ocp.args.PyTreeSave(arrays),
            table=ocp.args.JsonSave({"table": table, "crc32": _seal(table)}),
        )
        try:
            if jax.process_index() == 0:
                self._make_room(step, sum(array.nbytes for array in arrays.values()))
            self._pending = step
            self._orbax.save(self.directory / str(step), args=items)
        except Exception as error:
            raise self._abandon_write(step, error) from error

    def wait(self) -> None:
        """Waits for the background write; raises CheckpointError if it failed."""
        if self._pending is None:
            return
        try:
            self._orbax.wait_until_finished()
        except Exception as error:
            raise self._abandon_write(self._pending, error) from error
        self._damaged.discard(self._pending)
        self._pending = None
        if jax.process_index() == 0:
            self._prune()
        # Afterwards, all processes see the same directories.
        multihost_utils.sync_global_devices("checkpoints: pruned")

    def restore(
        self, template: Any, which: str | int = "last", *, partial: bool = False
    ) -> tuple[Any, int]:
        """Restores the 'last', the 'best' or a numbered checkpoint: (state, step).

        `template` is a pytree of arrays or jax.ShapeDtypeStruct that gives the
        structure, the dtypes and shapes, and the sharding (default: the default device;
        numpy stays numpy). With `partial`, it may omit arrays of the checkpoint, which
        are not read. Logs damaged checkpoints and restores the previous one (for 'best'
        the next best) instead. Raises CheckpointError if none is readable, or if a
        readable one does not fit the template.
        """
        wanted = by_path(template)

        def select(stored, path):
            if partial:
                stored = {name: stored[name] for name in stored if name in wanted}
            _check_fit(stored, wanted, path)
            return stored

        arrays, step = self._read_first(which, select)
        leaves = [_place(arrays[path], leaf) for path, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(template), leaves), step

    def load(
        self, which: str | int, kinds: Collection[str]
    ) -> tuple[dict[str, np.ndarray], int]:
        """Returns the arrays of `kinds`, such as "params", by path, and their step."""

        def select(stored, _):
            return {x: stored[x] for x in stored if x.partition("/")[0] in kinds}

        return self._read_first(which, select)

    def _read_first(
        self, which: str | int, select: Callable[[dict, pathlib.Path], dict]
    ) -> tuple[dict[str, np.ndarray], int]:
        """Returns the arrays and the step of the first undamaged candidate.

        select: maps the table and the path of a checkpoint to the entries to read.
        """
        self.wait()
        reasons = ""
        for step in self._candidates(which):
            path = self._path(step)
            try:
                stored = _agree(functools.partial(self._table, step))["arrays"]
                return self._read(path, select(stored, path)), step
            except _DamageError as damage:
                logging.warning("checkpoint %s is damaged: %s", path, damage)
                reasons += f"\n  {step}: {damage}"
                self._damaged.add(step)
        raise CheckpointError(
            f"no readable checkpoint in {self.directory}; damaged:{reasons}\n"
            "Nothing was deleted. Restore the files from a copy, or use another "
            "--workdir."
        )

    def _candidates(self, which: str | int) -> list[int]:
        """Returns the steps to try, in order. Raises CheckpointError if none exist."""
        steps = self.steps()
        orders = {"last": steps[::-1], "best": self._rank_steps() or steps[::-1]}
        orders = {name: order for name, order in orders.items() if order}
        orders |= {str(step): [step] for step in steps}
        if str(which) not in orders:
            raise CheckpointError(
                f"no checkpoint {which!r} in {self.directory}; available: "
                f"{', '.join(orders) or 'none'}"
            )
        return orders[str(which)]

    def _read(self, path: pathlib.Path, stored: dict) -> dict[str, np.ndarray]:
        """Reads arrays of a checkpoint and verifies their digests."""
        as_numpy = dict.fromkeys(stored, ocp.RestoreArgs(restore_type=np.ndarray))
        restore = ocp.args.PyTreeRestore(
            dict.fromkeys(stored, 0), restore_args=as_numpy, partial_restore=True
        )
        items = ocp.args.Composite(arrays=restore)

        def read():
            try:
                arrays = self._orbax.restore(path, args=items)["arrays"]
                wrong = [p for p in stored if _digest(arrays[p]) != stored[p]]
            except Exception as error:
                raise _DamageError(_summarize(error)) from error
            if wrong:
                raise _DamageError(f"{len(wrong)} digests differ, first {wrong[0]}")
            return arrays

        return _agree(read)

    def _table(self, step: int) -> dict[str, Any]:
        """Reads the table without orbax, which would wait for the other processes."""
        try:
            text = (self._path(step) / "table" / _TABLE_FILE).read_bytes()
            table, seal = (json.loads(text)[key] for key in ("table", "crc32"))
            if seal != _seal(table) or step != table["step"]:
                raise ValueError("the digest differs")
        except Exception as error:
            raise _DamageError(f"{_TABLE_FILE}: {_summarize(error)}") from error
        return table

    def _rank_steps(self) -> list[int]:
        """Returns the steps with the metric, best first and earliest first if equal."""
        scores = {}
        for step in self.steps():
            score = self.row(step).get(metrics.BEST_METRIC, math.nan)
            if math.isfinite(score) and step not in self._damaged:
                scores[step] = score
        return sorted(scores, key=lambda step: (-scores[step], step))

    def _path(self, step: int) -> pathlib.Path:
        path = self.directory / str(step)
        replaced = self.directory / f"{step}{REPLACED}"
        return replaced if replaced.is_dir() and not path.is_dir() else path

    def _make_room(self, step: int, bytes_wanted: int) -> None:
        """Prepares a write: cleans up, checks the disk, moves an equal step aside."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._clean_up()
        self._check_disk(bytes_wanted)
        path = self.directory / str(step)
        if path.exists():
            path.rename(self.directory / f"{step}{REPLACED}")

    def _check_disk(self, bytes_wanted: int) -> None:
        # Orbax would notice a full disk late, with a traceback for each array.
        exists = self.directory.is_dir()
        folder = self.directory if exists else self.directory.parent
        bytes_free = shutil.disk_usage(folder).free
        if bytes_free < bytes_wanted:
            raise OSError(
                f"disk full: {bytes_wanted:,} bytes needed, {bytes_free:,} free"
            )

    def _clean_up(self) -> None:
        """Completes operations that a kill or an error interrupted."""
        for name in os.listdir(self.directory):
            entry, original = self.directory / name, name.removesuffix(REPLACED)
            if name != original and not (self.directory / original).exists():
                entry.rename(self.directory / original)
            elif name != original or WRITING in name or name.endswith(DELETED):
                shutil.rmtree(entry, ignore_errors=True)  # tried again next time

    def _prune(self) -> None:
        """Deletes the checkpoints that are neither among the last nor the best."""
        good = [step for step in self.steps() if step not in self._damaged]
        retained = {*good[-self._keep :], *self._rank_steps()[:1]}
        for step in self.steps():
            # A damaged checkpoint stays until the run has passed its step.
            if step not in retained and step < good[-1]:
                # The rename is atomic; a deletion can be killed halfway.
                self._path(step).rename(self.directory / f"{step}{DELETED}")
        self._clean_up()

    def _abandon_write(self, step: int, error: Exception) -> CheckpointError:
        """Cleans up after a failed write and returns the error to raise."""
        self._pending = None
        # The old checkpointer would raise further errors of this write later, even from
        # restore(), where they would look like a damaged checkpoint.
        self._orbax = _create_checkpointer()
        if jax.process_index() == 0 and self.directory.is_dir():
            self._clean_up()
        good = [known for known in self.steps() if known not in self._damaged]
        return CheckpointError(
            f"checkpoint {self.directory / str(step)} could not be written: "
            f"{_summarize(error)}; still good: {', '.join(map(str, good)) or 'none'}"
        )


def by_path(tree: Any) -> dict[str, Any]:
    """Returns {'params/block.0/kernel': array}, in the order of the tree's leaves."""
    flat = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in flat:
            raise CheckpointError(f"two leaves of the state have the path {name}")
        flat[name] = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return flat


def _host_copy(tree: Any) -> dict[str, np.ndarray]:
    flat = by_path(tree)
    for path, leaf in flat.items():
        number = jax.dtypes.issubdtype(leaf.dtype, np.number) or leaf.dtype == bool
        if not number or not leaf.size:  # orbax refuses empty arrays
            raise CheckpointError(
                f"{path} is {_describe(leaf)}: only non-empty arrays of numbers can be "
                "saved; save jax.random.key_data of a key"
            )
    host = jax.device_get(flat)  # starts all transfers before it waits for the first
    return {path: np.array(leaf, order="C") for path, leaf in host.items()}


def _describe(array: Any) -> str:
    """Returns dtype and shape as in the table and in messages: float32[3,3,16,64]."""
    return f"{array.dtype}{list(array.shape)}".replace(" ", "")


def _digest(array: np.ndarray) -> list:
    """Returns the array's entry in the table: its form and the CRC-32 of its bytes."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return [_describe(array), zlib.crc32(flat.view(np.uint8))]


def _seal(table: dict[str, Any]) -> int:
    """Returns the CRC-32 of the table, so that flipped bits in metrics are noticed."""
    return zlib.crc32(json.dumps(table, sort_keys=True).encode())


def _place(array: np.ndarray, leaf: Any) -> Any:
    """Puts `array` where `leaf` of the template is."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return array
    if leaf.sharding is None or not getattr(leaf, "committed", True):
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, leaf.sharding, array.__getitem__)


def _check_fit(
    stored: dict[str, list], wanted: dict[str, Any], path: pathlib.Path
) -> None:
    """Raises CheckpointError with the first differences between the two tables."""
    ours = {name: _describe(leaf) for name, leaf in wanted.items()}
    theirs = {name: form for name, (form, _) in stored.items()}
    differing = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if not differing:
        return
    # Shared arrays come first: a missing block may fill a hundred lines.
    differing.sort(key=lambda name: name not in ours or name not in theirs)
    first = "".join(
        f"\n  {name}: {theirs.get(name, 'absent')}, here {ours.get(name, 'absent')}"
        for name in differing[:8]
    )
    raise CheckpointError(
        f"checkpoint {path} does not fit this config: {len(differing)} arrays differ, "
        f"first:{first}\nIt was written with {path.parents[1] / 'config.json'}: use "
        "that config, or another --workdir."
    )


def _agree(read: Callable[[], Any]) -> Any:
    """Returns read(); raises _DamageError on all processes if any of them does."""
    result = damage = None
    try:
        result = read()
    except _DamageError as error:
        damage = error
    if multihost_utils.process_allgather(np.asarray(damage is not None)).any():
        raise damage or _DamageError("another process could not read it")
    return result


def _summarize(error: Exception) -> str:
    """Returns cause, type and shortened text: orbax's messages can hold whole trees."""
    text = " ".join(str(error).split())
    code = re.search(r"os_error_code='(\d+)'", text)  # tensorstore: at the very end
    cause = f"{os.strerror(int(code[1]))}: " if code else ""
    text = text if len(text) <= 160 else f"{text[:160]}..."
    return f"{cause}{type(error).__name__}: {text}"


def _create_checkpointer() -> ocp.AsyncCheckpointer:
    table = ocp.JsonCheckpointHandler(filename=_TABLE_FILE)
    handlers = {"arrays": ocp.PyTreeCheckpointHandler(), "table": table}
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))
