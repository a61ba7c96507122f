"""Finds the run in a workdir and compares it with the run that resumes it."""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from input_pipeline import Facts
from runtime.checkpoints import Checkpoints
from runtime.clock import Clock
from runtime.workdir import (
    CONFIG_JSON,
    changes,
    load_config,
    load_facts,
    load_step_offset,
    read_rows,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """The run stored in a workdir, with the settings that it last ran with.

    last_step: its newest checkpoint; evaluated: whether that one was evaluated.
    """

    workdir: pathlib.Path
    config: ConfigDict
    facts: Facts
    clock: Clock
    last_step: int
    evaluated: bool

    @property
    def complete(self) -> bool:
        """Whether the last step of its configuration is saved and evaluated."""
        rows, total = read_rows(self.workdir / "metrics.csv"), self.clock.total
        ended = self.last_step == total and self.evaluated
        return ended and bool(rows) and rows[-1]["step"] == total

    def describe_changes(self, config: ConfigDict, facts: Facts) -> list[str]:
        """Describes each changed field and each changed split, one line each."""
        return changes(config, self.workdir) + data_changes(self.facts, facts)

    def keep_normalization(self, config: ConfigDict, facts: Facts) -> Facts:
        """Returns the facts with the normalisation of this run.

        Raises ValueError if `config` sets another one.
        """
        for field in ("mean", "std"):
            old, new = self.config.data[field], config.data[field]
            if old != new:
                raise ValueError(
                    f"data.{field} cannot change within a run: {self.workdir} was "
                    f"started with {old}, not {new}; use another --workdir"
                )
        return dataclasses.replace(facts, mean=self.facts.mean, std=self.facts.std)


def find(workdir: pathlib.Path) -> Run | None:
    """Returns the run in a workdir, or None if it has no checkpoint.

    Also returns None if config.json is missing; the checkpoints are then resumed
    without a comparison.
    """
    with Checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
        evaluated = bool(steps) and bool(checkpoints.row(steps[-1]))
    if not steps or not (workdir / CONFIG_JSON).exists():
        return None
    config, facts = load_config(workdir), load_facts(workdir)
    clock, offset = Clock.of(config, facts.num_train), load_step_offset(workdir)
    clock = dataclasses.replace(clock, offset=offset, total=clock.total + offset)
    return Run(workdir, config, facts, clock, steps[-1], evaluated)


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
