"""Profiles of a few steps (config.train.profile_steps)."""

import pathlib

import jax
from absl import logging
from ml_collections import ConfigDict


def profile_range(
    config: ConfigDict, total: int | None = None
) -> tuple[int, int] | None:
    """Returns the (first, last) profiled step, or None without a profile.

    total: the last step of the run, if known. Raises ValueError for an impossible
    range.
    """
    steps = config.train.profile_steps
    if not steps:
        return None
    valid = len(steps) == 2 and all(isinstance(step, int) for step in steps)
    if not valid or not 0 < steps[0] < steps[1]:
        raise ValueError(
            f"train.profile_steps={steps} must be (first, last) with 0 < first < last, "
            "such as (20, 30)"
        )
    if total is not None and steps[1] > total:
        raise ValueError(
            f"train.profile_steps={steps} must end by the last step of the run, {total}"
        )
    return steps


class Profile:
    """Traces config.train.profile_steps, for TensorBoard and Perfetto.

    Starts and stops at the first dispatches that end at these steps or later.
    """

    def __init__(self, workdir: pathlib.Path, config: ConfigDict, step: int):
        steps = profile_range(config)
        self._range = steps if steps and step < steps[1] else None
        self._folder, self._running = workdir / "profile", False

    def advance(self, step: int, totals: dict) -> None:
        """Starts or stops the trace after the dispatch that ends at `step`."""
        if self._range is None or step < self._range[0]:
            return
        if not self._running:
            jax.block_until_ready(totals)  # earlier steps are not part of the trace
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step >= self._range[1]:
            jax.block_until_ready(totals)
            self.stop()

    def stop(self) -> None:
        """Writes the trace if one is running."""
        if self._running:
            jax.profiler.stop_trace()
            logging.info("profile written to %s", self._folder)
        self._range, self._running = None, False
