"""The states of checkpoints_test.py, and a process for it to kill in mid-save."""

import dataclasses
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metrics
from runtime.checkpoints import Checkpoints


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    params: dict
    momentum: tuple
    wiring: dict


def make_state(seed=0, channels=16):
    """One of each: dataclass, dict of dicts, namedtuples, four dtypes, scalars."""
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
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_for_ever(workdir):
    """Prints the steps that are on disk: a save waits for the one before it."""
    with Checkpoints(workdir) as saved:
        last = saved.restore(make_state())[1] if saved.steps() else 0
        for step in itertools.count(last + 1):
            for _ in range(1 + step % 2):  # the second save replaces the first
                saved.save(step, make_state(step), {metrics.SELECTION: np.sin(step)})
            print(step - 1 + step % 2, flush=True)


if __name__ == "__main__":
    save_for_ever(sys.argv[1])
