"""Finds the reader of a layer, optimizer or trajectory file by its contents."""

import json
import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import optax

import optimizers
from tests.support import (
    golden_cfmz,
    golden_delugenets,
    golden_gunn,
    golden_igcnets,
    golden_resnet,
    golden_xnets,
)
from tests.support.golden_checks import Comparison, updater

# Modules with a function reader(facts) -> function that compares the file, or None.
FAMILIES = [
    golden_cfmz,
    golden_delugenets,
    golden_gunn,
    golden_igcnets,
    golden_resnet,
    golden_xnets,
]


def is_golden(path: pathlib.Path, facts) -> bool:
    """Returns whether to compare a file: not a table of counts or a json's arrays."""
    if path.suffix == ".npz":
        return path.name.startswith("optimizer_")
    return isinstance(facts, dict) and (
        path.with_suffix(".npz").exists()
        or "steps" in facts
        or golden_igcnets.permutations is golden_igcnets.reader(facts)
    )


def reader(path: pathlib.Path) -> Callable[[pathlib.Path], Comparison] | None:
    """Returns the function that compares a file, or None if none knows its form."""
    if path.suffix == ".npz":
        return optimizer_rule
    facts = json.loads(path.read_text())
    return next(filter(None, (family.reader(facts) for family in FAMILIES)), None)


def optimizer_rule(path: pathlib.Path) -> Comparison:
    """Nesterov SGD with weight decay on bare arrays, at a rate that changes."""
    arrays, comparison = np.load(path), Comparison()
    rates = jnp.asarray(arrays["lrs"])
    optimizer = optimizers.sgd(
        lambda step: rates[step],
        momentum=float(arrays["momentum"]),
        nesterov=True,
        weight_decay=float(arrays["weight_decay"]),
    )
    weights = jnp.asarray(arrays["w0"])
    state, history, update = optimizer.init(weights), [], updater(optimizer)
    for gradient in arrays["grads"]:
        weights, state, _ = update(weights, state, jnp.asarray(gradient))
        history.append(weights)
    comparison.add("weights", history, arrays["weights_after_each_step"])
    (velocity,) = optax.tree.get_all_with_path(state, "trace")
    comparison.add("velocity", velocity[1], arrays["final_momentum_buffer"])
    return comparison
