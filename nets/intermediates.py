"""Captures the feature maps inside a net."""

import difflib
import functools
from collections.abc import Collection

import jax
from flax import nnx


def capture(
    net: nnx.Module, x: jax.Array, names: Collection[str]
) -> dict[str, jax.Array]:
    """Returns the outputs of some modules of a net for its input x (N, H, W, 3).

    names: paths of modules, such as "stem" or "blocks.0.2.conv1"; `python -m
    analysis.summary CONFIG` prints those of the layers. The net keeps its mode (train
    or eval) and its statistics, since a copy of it runs. Raises ValueError if a name is
    not the path of a module that the net calls.
    """
    graphdef, state = nnx.split(net)
    found = _capture(graphdef, state, x, tuple(names))
    return {name: found[name] for name in names}  # jit returns dicts sorted


@functools.partial(jax.jit, static_argnums=(0, 3))
def _capture(graphdef, state, x, names):
    found = outputs(nnx.merge(graphdef, state, copy=True), x)
    if unknown := [name for name in names if name not in found]:
        nearest = [
            match
            for name in unknown
            for match in difflib.get_close_matches(name, found, n=2)
        ]
        hint = f"; did you mean {', '.join(dict.fromkeys(nearest))}?" if nearest else ""
        raise ValueError(
            f"the net has no outputs of {', '.join(unknown)}: choose paths of modules "
            f"that it calls, outside of the loops of Gradual layers{hint}"
        )
    return {name: found[name][-1] for name in names}


def outputs(net: nnx.Module, x: jax.Array) -> dict[str, list[jax.Array]]:
    """Runs a net and returns the outputs of the calls of each module, by path.

    Calls inside the loop of a Gradual layer are not captured.
    """
    run = nnx.capture(net, nnx.Intermediate, method_outputs=nnx.Intermediate)
    return {
        ".".join(map(str, path[:-1])): list(variable.get_value())
        for path, variable in nnx.to_flat_state(run(x)[1])
        if path[-1] == "__call__"
    }
