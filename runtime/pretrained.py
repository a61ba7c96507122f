"""Loads the weights that a run starts from: config.init_from."""

import os
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
from absl import logging

from runtime.checkpoints import Checkpoints, by_path
from runtime.workdir import CONFIG_JSON


def initialize(variables: dict, source: str) -> dict:
    """Returns the variables of a net with those of another run.

    variables: params, stats and wiring, as nets.split returns them. source: as in
    load_weights. A layer with an array of another shape, such as a classifier for other
    classes, is not changed and its name is logged. Raises ValueError if the layers of
    the two nets are not the same, or if most parameters have other shapes.
    """
    weights, ours = load_weights(source), by_path(variables)
    if different := sorted(weights.keys() ^ ours.keys()):
        path = different[0]
        has = "has no" if path in ours else "also has"
        raise ValueError(
            f"init_from={source} does not hold this config's net: {len(different)} "
            f"arrays differ; it {has} {path}. Set the fields of its config.net"
        )
    fresh = {_layer(x) for x in ours if ours[x].shape != weights[x].shape}
    params = [path for path in ours if path.startswith("params/")]
    sizes = {path: ours[path].size for path in params}
    if 2 * sum(sizes[x] for x in params if _layer(x) in fresh) > sum(sizes.values()):
        path = next(x for x in ours if ours[x].shape != weights[x].shape)
        raise ValueError(
            f"init_from={source} does not hold this config's net: most parameters "
            f"have other shapes; {path} has {weights[path].shape}, here "
            f"{ours[path].shape}. Set the fields of its config.net"
        )
    if fresh:
        names = ", ".join(sorted(fresh))
        logging.info("these layers start fresh, as their shapes differ: %s", names)
    leaves = [ours[x] if _layer(x) in fresh else weights[x] for x in ours]
    return jax.tree.unflatten(jax.tree.structure(variables), leaves)


def _layer(path: str) -> str:
    """Returns 'blocks/0/conv1' for 'params/blocks/0/conv1/kernel'."""
    return path.partition("/")[2].rpartition("/")[0]


def load_weights(source: str) -> dict[str, np.ndarray]:
    """Loads the weights of a run by path: 'params/...', 'stats/...' and 'wiring/...'.

    source: WORKDIR for its best checkpoint, WORKDIR@last or WORKDIR@STEP; or an
    original's weight file, which `python -m convert` must recognise. Takes the weights
    that the run evaluates: the moving averages, if it has any. Raises ValueError
    (CheckpointError is a subclass) if there are none.
    """
    folder, which = os.path.expanduser(source), "best"
    if "@" in folder and not os.path.exists(folder):
        folder, _, which = folder.rpartition("@")
    if os.path.isfile(folder):
        with tempfile.TemporaryDirectory() as scratch:
            return load_weights(_convert(folder, os.path.join(scratch, "run")))
    if not os.path.isfile(os.path.join(folder, CONFIG_JSON)):
        raise ValueError(
            f"init_from={source}: {folder} is neither a weight file nor the workdir of "
            f"a run: it has no {CONFIG_JSON}"
        )
    with Checkpoints(pathlib.Path(folder)) as checkpoints:
        arrays, step = checkpoints.load(which, ("params", "stats", "wiring", "ema"))
    logging.info("initial weights from step %d in %s", step, folder)
    averages = {x: arrays.pop(x) for x in [*arrays] if x.startswith("ema/")}
    return arrays | {x.removeprefix("ema/"): averages[x] for x in averages}


def _convert(file: str, workdir: str) -> str:
    """Converts a weight file to a workdir, in a process of its own.

    convert imports train, which imports this module.
    """
    logging.info("converting %s", file)
    command = [sys.executable, "-m", "convert", os.path.abspath(file)]
    result = subprocess.run(
        [*command, f"--workdir={workdir}"],
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},  # leaves the accelerator to the run
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        reason = (result.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(f"init_from={file}: {reason.removeprefix('error: ')}")
    return workdir
