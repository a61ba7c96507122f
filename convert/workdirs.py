"""Writes converted weights as the workdir of a run that has taken no steps."""

import dataclasses
import hashlib
import pathlib
import shutil

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import nets
import train
from configs.data_sets import DATA_SETS
from convert.containers import Weights
from convert.identify import Match, Unidentified
from data_sources import archives
from input_pipeline import Facts, in_memory
from runtime.checkpoints import Checkpoints
from runtime.workdir import CONFIG_JSON, WorkdirError, lock, save_config, write_json


def save(
    workdir: pathlib.Path, path: pathlib.Path, weights: Weights, match: Match
) -> None:
    """Writes the checkpoint, config.json and origin.json of a weight file.

    path: the weight file. Writes no metrics.csv or best.json, because nothing has been
    evaluated. Raises WorkdirError or CheckpointError, and leaves nothing behind, if the
    workdir already holds a run or cannot be written.
    """
    facts = data_facts(match.config, weights)
    with lock(workdir):
        if (workdir / CONFIG_JSON).exists() or (workdir / "checkpoints").exists():
            raise WorkdirError(f"{workdir} already holds a run: use another --workdir")
        state, before = _state(match, facts), set(workdir.iterdir())
        try:
            with Checkpoints(workdir, match.config.checkpoint.keep) as checkpoints:
                checkpoints.save(0, state)
            origin = {
                "file": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "container": weights.container,
                "config": match.name,
                "tensors": len(weights.tensors),
                "skipped": weights.skipped,
            }
            write_json(workdir / "origin.json", origin)
            save_config(workdir, match.config, facts)
        except BaseException:  # also Ctrl-C
            for entry in set(workdir.iterdir()) - before:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            raise


def data_facts(config: ConfigDict, weights: Weights) -> Facts:
    """Returns the facts about the data set of a configuration, without reading it."""
    data = config.data
    if data.name not in DATA_SETS:
        raise Unidentified(
            f"data set {data.name!r} is unknown: choose a --config for one of "
            f"{', '.join(DATA_SETS)}"
        )
    known = DATA_SETS[data.name]
    ours = (data.recipe.mean, data.recipe.std) if data.recipe.name == data.name else ()
    usual = weights.normalization or ours or (known.mean, known.std)
    mean, std = tuple(data.mean or usual[0]), tuple(data.std or usual[1])
    if not (mean and std):
        raise Unidentified(
            f"{data.name} has no published normalisation: set --config.data.mean and "
            "--config.data.std"
        )
    size = known.image_size if in_memory(data) else data.image_size
    digits = tuple(map(str, range(10)))
    names = archives.CLASS_NAMES | dict.fromkeys(("digits", *archives.SVHN), digits)
    unknown = ("",) * config.net.num_classes
    class_names = names.get(data.name, unknown)
    return Facts(
        class_names=class_names if len(class_names) == len(unknown) else unknown,
        image_shape=(size, size, 3),
        mean=mean[::-1] if weights.container == "neon" else mean,  # convert/cfmz.py
        std=std,
        num_train=known.num_train,
    )


def _state(match: Match, facts: Facts) -> train.TrainState:
    """Returns the state before the first step, with the variables of the net."""
    _, state = train.create_train_state(match.config, facts)
    _, variables = nets.split(match.net)
    variables = jax.tree.map(jnp.asarray, variables)
    averages = {kind: variables[kind] for kind in state.ema}
    return dataclasses.replace(state, **variables, ema=averages)
