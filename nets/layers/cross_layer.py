"""Cross-layer depthwise convolution: how a DelugeNet reads all layers of its block.

DelugeNets (arXiv 1611.05552; facts in the published code). The original normalises
every map anew for each of its readers, with the convolution's weight as the gain and
its bias as the shift of that normalisation. In training all readers of a map see the
same statistics, so here a map is normalised once, when it is born.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class Source(NamedTuple):
    """An output of a block's layer (N, H, W, C): as it is, and normalised.

    The normalisation has neither gain nor shift: those are the reader's.
    """

    raw: jax.Array
    normalised: jax.Array | None = None


class CrossLayer(nnx.Module):
    """Sources (N, H, W, C) -> sum over sources i of scale[i] normalised_i + bias[i].

    `scale` and `bias` are (sources, C), the oldest source first; the original has
    (C, sources), the newest first. A channel never meets another one, and a pixel no
    other pixel. It starts as the plain average. In front of a batch normalisation, as
    all are, the bias is dead and so is the length of scale[:, c]; both are kept,
    because they are parameters of the published nets.
    """

    def __init__(self, channels: int, num_sources: int):
        if num_sources < 2:
            raise ValueError(
                f"a cross-layer convolution over {num_sources} sources of {channels} "
                "channels: it takes at least 2 sources"
            )
        shape = (num_sources, channels)
        # Not `kernel`: published counts of multiply-accumulates leave it out.
        self.scale = nnx.Param(jnp.full(shape, 1 / num_sources, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(shape))

    def __call__(self, sources: Sequence[Source]) -> jax.Array:
        # A sum of products: to stack the sources, or to loop over a buffer for them,
        # takes 1.5 to 2.6 times the memory (benchmarks/cross_layer.py).
        mixed = self.bias[...].sum(0)
        for scale, source in zip(self.scale[...], sources, strict=True):
            mixed = mixed + scale * source.normalised
        return _computed_once(mixed.astype(sources[0].raw.dtype))


@jax.custom_vjp
def _computed_once(x: jax.Array) -> jax.Array:
    """x, whose value and whose gradient XLA:CPU then computes once and keeps.

    Left alone it computes a reader's gradient anew for each of its sources, in loops
    that read up to 199 arrays: DelugeNet-146's step takes 2.6 times as long. It
    drops lax.optimization_barrier, but does not look behind a loop.
    """
    return _copied_by_a_loop(x) if jax.default_backend() == "cpu" else x


def _copied_by_a_loop(x: jax.Array) -> jax.Array:
    flat = x.reshape(-1)
    # Two turns, as one would be inlined. Of an odd size the middle is in both.
    half = -(-flat.size // 2)

    def copy(i, copied):
        part = lax.dynamic_slice_in_dim(flat, i * half, half)
        return lax.dynamic_update_slice_in_dim(copied, part, i * half, 0)

    return lax.fori_loop(0, 2, copy, jnp.empty_like(flat)).reshape(x.shape)


_computed_once.defvjp(
    lambda x: (_computed_once(x), None), lambda _, gradient: (_computed_once(gradient),)
)
