"""Recomputation in the backward pass, which trades time for memory.

`config.net.remat` selects the maps that a training step keeps for the gradients:

none: all maps that automatic differentiation needs.
norm: outputs of convolutions. Normalisation, activation, pooling and concatenation are
  computed again.
block: outputs of blocks. Their convolutions are computed again, too. A block is a layer
  of a dense block, of DelugeNet or of GUNN, a residual unit, or, in nets without units,
  a convolution with its normalisation.

The default is `none`. On two CPU cores no other level is faster, and the memory of the
compiled program does not shrink either (benchmarks/results/remat-*). They are meant for
accelerators, where they have not been measured.

Layers and nets name these maps by jax.ad_checkpoint.checkpoint_name. The output of a
residual unit that ends in a ReLU is named by its BatchNorm, whose backward pass reads
it. Every level keeps batch statistics: computing them again would take a second
exchange between devices.
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
