"""States for checkpoints_test.py, and a process whose saves are killed midway."""

import dataclasses
import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metrics
from runtime.checkpoints import Checkpoints

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    params: dict
    momentum: tuple
    wiring: dict


def make_state(seed=0, channels=16):
    """A dataclass with nested dicts, namedtuples, four dtypes and scalars."""
    random = np.random.default_rng(seed)
    kernel = random.normal(size=(3, 3, 4, channels)).astype(np.float32)
    head = random.normal(size=(channels, 10)).astype(jnp.bfloat16)
    params = {"blocks.0.conv": {"kernel": kernel}, "head": {"kernel": head}}
    momentum = optax.sgd(0.1, momentum=0.9).init(params)
    wiring = {"connections": random.integers(0, 99, (4, 7), np.int32)}
    wiring["frozen"] = np.array(seed % 2 == 0)
    state = State(np.int32(seed), params, momentum, wiring)
    return jax.tree.map(jnp.asarray, state)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def assert_same(got, wanted):
    """Asserts equal structure, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_until_killed(workdir, suffix, number):
    """Saves, replaces and deletes checkpoints; prints the steps that are on disk.

    Kills this process before its file system operation `number`, counting those
    while a directory named *suffix exists.
    """
    directory, count = pathlib.Path(workdir) / "checkpoints", 0

    def kill(event, arguments):
        nonlocal count
        if event in FILE_EVENTS and directory.is_dir():
            count += any(name.endswith(suffix) for name in os.listdir(directory))
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    with Checkpoints(workdir) as saved:
        last = saved.restore(make_state())[1] if saved.steps() else 0
        sys.addaudithook(kill)
        for step in range(last + 1, last + 5):
            for _ in range(2):  # the second save replaces the first
                saved.save(step, make_state(step), {metrics.BEST_METRIC: np.sin(step)})
            print(step, flush=True)  # the first is on disk


def main(workdir):
    """Reads 'suffix number' lines, and prints the exit code of each process killed.

    Forks, to import jax only once; no device may be used before.
    """
    for line in sys.stdin:
        suffix, number = line.split()
        child = os.fork()
        if not child:
            save_until_killed(workdir, suffix, int(number))
            os._exit(0)
        print("exit", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
