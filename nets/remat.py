"""Recomputation in the backward pass, which trades time for memory.

`config.net.remat` states which maps a training step keeps for the gradients:

none: all that automatic differentiation asks for.
norm: outputs of convolutions. Normalisation, activation, pooling and concatenation are
  computed again.
block: outputs of blocks. Their convolutions are computed again, too. A block is a layer
  of a dense block, DelugeNet's or GUNN's layer, a residual unit, or a convolution with
  its normalisation in the nets without units.

Layers and nets name these maps by jax.ad_checkpoint.checkpoint_name. Batch statistics
are kept at every level, so devices do not exchange them twice.
"""

from collections.abc import Callable

import jax

LEVELS = {
    "none": None,
    "norm": ("convolution", "statistics"),
    "block": ("block", "statistics"),
}


def check(level: str) -> None:
    """Raises ValueError unless `level` is one of LEVELS."""
    if level not in LEVELS:
        raise ValueError(f"unknown remat {level!r}: choose from {', '.join(LEVELS)}")


def recompute(forward: Callable, level: str) -> Callable:
    """Returns a function equal to `forward` that keeps the maps of `level`."""
    names = LEVELS[level]
    if names is None:
        return forward
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(forward, policy=policy)
