"""The clock of a run: converts epochs to steps, and cuts a run into dispatches."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict


def steps_per_epoch(num_examples: int, batch_size: int, partial: bool = False) -> float:
    """Returns the number of batches per epoch.

    By default, batches continue across epoch boundaries without a gap, and the result
    is a fraction: 50,000 images in batches of 128 make 70,313 steps in cfmz's 180
    epochs. With `partial`, each epoch ends with a smaller batch, and the result is a
    whole number: 64,124 steps in fb.resnet.torch's 164 epochs.
    """
    steps = num_examples / batch_size
    return math.ceil(steps) if partial else steps


def step_of_epoch(epoch: float, steps_per_epoch: float) -> int:
    """Returns the first step whose first image belongs to `epoch` (from 0) or later."""
    return math.ceil(epoch * steps_per_epoch - 1e-6)  # tolerates rounding errors


class Chunk(NamedTuple):
    """The steps of one dispatch, and what follows the last of them."""

    steps: int
    end: int  # steps of the run that are done after this chunk
    evaluate: bool
    save: bool


@dataclasses.dataclass(frozen=True)
class Clock:
    """Converts between the steps and the epochs of a run, and schedules its dispatches.

    steps_per_epoch is a whole number if each epoch ends with a smaller batch.
    offset: steps taken so far minus the steps that the same number of epochs takes with
      the current batch size and data; 0 unless these changed when the run was resumed.
    """

    config: ConfigDict
    steps_per_epoch: float
    smaller_last: bool
    total: int
    offset: int = 0

    @classmethod
    def of(cls, config: ConfigDict, num_examples: int, offset: int = 0) -> "Clock":
        """Returns the clock of a run on `num_examples` training images.

        Raises ValueError if the run has no steps, or more than an int32 can count.
        """
        batch_size = config.train.batch_size
        partial = config.train.last_batch == "partial"
        per_epoch = steps_per_epoch(num_examples, batch_size, partial)
        if config.train.epochs * per_epoch >= 2**31:
            raise ValueError(
                f"train.epochs={config.train.epochs} is 2**31 steps or more"
            )
        if (total := step_of_epoch(config.train.epochs, per_epoch)) < 1:
            raise ValueError(
                f"train.epochs={config.train.epochs} is less than one step"
            )
        smaller_last = partial and num_examples % batch_size > 0
        return cls(config, per_epoch, smaller_last, total + offset, offset)

    def resume(self, old: "Clock", step: int) -> "Clock":
        """Returns this clock, shifted so that `step` keeps the epoch of `old`."""
        offset = old.offset
        if self.steps_per_epoch != old.steps_per_epoch:
            offset = step - self.step_of(old.epoch(step))
        return dataclasses.replace(self, offset=offset, total=self.total + offset)

    def epoch(self, step: int) -> float:
        return (step - self.offset) / self.steps_per_epoch

    def step_of(self, epoch: float) -> int:
        return step_of_epoch(epoch, self.steps_per_epoch) + self.offset

    def chunks(self, step: int, *, evaluate_first: bool = False) -> Iterator[Chunk]:
        """Yields the rest of the run after `step` steps, one dispatch at a time.

        evaluate_first: begins with the evaluation after `step`, a chunk without steps.
        Chunks end at evaluations and checkpoints, whose steps do not depend on where
        the run was resumed. Every evaluation is saved; the last step is evaluated.
        """
        if evaluate_first:
            yield Chunk(0, step, evaluate=True, save=True)
        while step < self.total:
            next_eval, next_save = self._next_eval(step), self._next_save(step)
            steps = self._dispatch(step, min(next_eval, next_save))
            step += steps
            evaluate = step == next_eval
            yield Chunk(steps, step, evaluate, save=evaluate or step == next_save)

    def is_evaluated(self, step: int) -> bool:
        """Returns whether an evaluation follows the first `step` steps."""
        return 0 < step <= self.total and self._next_eval(step - 1) == step

    def _dispatch(self, step: int, stop: int) -> int:
        """Returns how many steps one dispatch runs: a smaller batch goes alone."""
        most = min(self.config.train.steps_per_dispatch, stop - step)
        if not self.smaller_last:
            return most
        done = (step - self.offset) % self.steps_per_epoch
        whole = self.steps_per_epoch - 1 - done
        return min(most, whole or 1)

    def _next_eval(self, step: int) -> int:
        """Returns the first step after `step` that ends an evaluation interval."""
        every = self.config.eval.every_epochs
        interval = int(self.epoch(step) / every)
        while (stop := self.step_of(interval * every)) <= step:
            interval += 1
        return min(stop, self.total)

    def _next_save(self, step: int) -> int:
        """Returns the first step after `step` that ends a checkpoint interval."""
        every = self.config.checkpoint.every_steps or self.total
        return min((step // every + 1) * every, self.total)
