"""Finds the run in a workdir and compares it with the run that resumes it."""

import dataclasses
import pathlib
import zlib

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import input_pipeline
from input_pipeline import DataSet, Facts, Split
from runtime.checkpoints import Checkpoints
from runtime.clock import Clock
from runtime.workdir import (
    CONFIG_JSON,
    PATHS,
    changes,
    evaluation_changes,
    flatten,
    load_config,
    load_facts,
    load_step_offset,
    read_rows,
)

# Fields that cannot change within a run.
FIXED = (
    *("optimizer.name", "optimizer.accumulate_steps", "optimizer.rate_in_velocity"),
    *("data.mean", "data.std"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The run stored in a workdir, with the settings that it last ran with."""

    workdir: pathlib.Path
    config: ConfigDict
    facts: Facts
    clock: Clock
    complete: bool  # the last step of its configuration is saved and evaluated

    def check(self, config: ConfigDict) -> None:
        """Raises ValueError if `config` changes one of the FIXED fields."""
        old, new = flatten(self.config), flatten(config)
        for field in FIXED:
            if old[field] != new[field]:
                raise ValueError(
                    f"{field} cannot change within a run: {self.workdir} was started "
                    f"with {old[field]}, not {new[field]}; use another --workdir "
                    f"(--config.init_from={self.workdir} starts from these weights)"
                )


def find(workdir: pathlib.Path) -> Run | None:
    """Returns the run in a workdir, or None if it has no checkpoint or config.json.

    Training resumes checkpoints without a config.json, but cannot compare settings.
    """
    with Checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
        evaluated = bool(steps) and bool(checkpoints.row(steps[-1]))
    if not steps or not (workdir / CONFIG_JSON).exists():
        return None
    config, facts = load_config(workdir), load_facts(workdir)
    clock = Clock.of(config, facts.num_train, load_step_offset(workdir))
    ended = steps[-1] == clock.total and evaluated
    rows = read_rows(workdir / "metrics.csv") if ended else []
    complete = bool(rows) and rows[-1]["step"] == clock.total
    return Run(workdir, config, facts, clock, complete)


def check_agreement(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Raises ValueError if the processes have different fields or workdirs."""
    if jax.process_count() == 1:
        return
    fields = {k: v for k, v in flatten(config).items() if k not in PATHS}
    digest = zlib.crc32(repr(sorted(fields.items())).encode()) >> 1  # an int32
    with Checkpoints(workdir) as checkpoints:
        last = max(checkpoints.steps(), default=-1)
    seen = multihost_utils.process_allgather(np.asarray([last, digest]))
    if len({*seen[:, 1].tolist()}) > 1:
        raise ValueError("all processes of a run need the same --config and fields")
    if len(steps := {*seen[:, 0].tolist()}) > 1:
        raise ValueError(
            f"the processes see different checkpoints in {workdir} (last steps "
            f"{sorted(steps)}, -1 for none): --workdir must be one shared directory"
        )


def load_data(
    data_set: DataSet, config: ConfigDict, old: Run | None
) -> tuple[Split, Split, Facts, list[str]]:
    """Loads both splits; returns them, their facts, and what has changed since `old`.

    If `old` is resumed, labels are numbered by its class names, and images are
    normalised as before.
    """
    train, test = input_pipeline.load_both(data_set)
    if old:
        names = old.facts.class_names, config.data.name
        train = input_pipeline.map_classes(train, *names)
        test = input_pipeline.map_classes(test, *names)
    facts = input_pipeline.facts(config.data, train, test)
    if not old:
        return train, test, facts, []
    changed = changes(config, old.workdir) + data_changes(old.facts, facts)
    facts = dataclasses.replace(facts, mean=old.facts.mean, std=old.facts.std)
    return train, test, facts, changed


def evaluation_warnings(
    config: ConfigDict, workdir: pathlib.Path, facts: Facts, test: Split
) -> list[str]:
    """Describes how an evaluation of `test` differs from those of the run."""
    changed = evaluation_changes(config, workdir)
    if test.image_shape != facts.image_shape:
        changed.append(
            f"evaluating images {test.image_shape}, the run was trained on "
            f"{facts.image_shape}"
        )
    elif facts.digests[1:] not in ((), (test.digest,)):
        changed.append("the test images or labels differ from those of the run")
    return changed


def data_changes(old: Facts, new: Facts) -> list[str]:
    """Describes how the data set of a run has changed, one line for each split."""
    if old.num_train != new.num_train:
        return [
            f"{new.num_train:,} training images (the run was started with "
            f"{old.num_train:,})"
        ]
    if old.image_shape != new.image_shape:
        return []  # another crop, which is a change of the configuration
    digests = zip(("training", "test"), old.digests, new.digests, strict=False)
    return [
        f"the {split} images or labels differ from those the run was started with"
        for split, before, after in digests
        if before != after
    ]


def check_end(
    config: ConfigDict,
    workdir: pathlib.Path,
    clock: Clock,
    step: int,
    changes: list[str],
) -> None:
    """Raises ValueError if a changed run cannot be resumed: it has no steps left."""
    remedy = (
        "increase --config.train.epochs to continue, or use another --workdir "
        f"(--config.init_from={workdir} starts from these weights)"
    )
    if step > clock.total:
        raise ValueError(
            f"{workdir} already holds step {step}, but this run ends at step "
            f"{clock.total} (train.epochs={config.train.epochs:g}): {remedy}"
        )
    if changes:
        raise ValueError(
            f"{workdir} already holds a complete run, up to epoch "
            f"{clock.epoch(step):g}, trained with different settings: "
            f"{'; '.join(changes)}: {remedy}"
        )
