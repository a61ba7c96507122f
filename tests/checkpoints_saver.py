"""A process for checkpoints_test.py to kill: it saves step after step, for ever."""

import itertools
import sys

import numpy as np

import metrics
from checkpoints import Checkpoints


def state_at(step):
    """Arrays that only this step can have written; 1.3 MB in 60 arrays."""
    random = np.random.default_rng(step)
    layers = {f"block.{i}": random.normal(size=(60, 90)) for i in range(58)}
    return {"params": layers, "step": np.int32(step), "seen": np.int64(step) << 33}


def row_at(step):
    return {metrics.SELECTION: 0.5 + 0.4 * np.sin(step)}


def main(workdir):
    with Checkpoints(workdir) as checkpoints:
        last = checkpoints.restore(state_at(0))[1] if checkpoints.steps() else 0
        for step in itertools.count(last + 1):
            checkpoints.save(step, state_at(step), row_at(step))
            if step % 3 == 0:  # replaces the one above
                checkpoints.save(step, state_at(step), row_at(step))
            # A save waits for the one before it, so that one is on disk now.
            print(step if step % 3 == 0 else step - 1, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
