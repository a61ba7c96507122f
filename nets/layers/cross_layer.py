"""Cross-layer depthwise convolution: combines all earlier layers of a block.

DelugeNets (arXiv 1611.05552; facts from the published code). The original normalises
each source anew for every reader; the convolution's weight and bias are the gain and
shift of that normalisation. In training, all readers of a source use the same
statistics, so here the layer that computes a source normalises it once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


class Source(NamedTuple):
    """The output (N, H, W, C) of a layer, and the same normalised.

    The reader applies gain and shift.
    """

    raw: jax.Array
    normalised: jax.Array | None = None


class CrossLayer(nnx.Module):
    """Computes the sum over sources i of scale[i] * normalised_i + bias[i].

    `scale` and `bias` are (sources, C), the oldest source first; the original stores
    (C, sources), the newest first. Channels and pixels do not mix. Initially it is the
    plain average. A batch normalisation follows every cross-layer convolution, so the
    bias and the norm of scale[:, c] have no effect; they exist because the published
    nets have them.
    """

    def __init__(self, channels: int, num_sources: int):
        if num_sources < 2:
            raise ValueError(
                "a cross-layer convolution needs at least 2 sources, got "
                f"{num_sources} of {channels} channels"
            )
        shape = (num_sources, channels)
        # Not `kernel`: published multiply-adds do not include it (nets/cost.py).
        self.scale = nnx.Param(jnp.full(shape, 1 / num_sources, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(shape))

    def __call__(self, sources: Sequence[Source]) -> jax.Array:
        # Stacking the sources, or looping over a buffer of them, takes 1.5 to 2.6 times
        # the memory of a sum of products (benchmarks/results/cross_layer-*.csv).
        mixed = self.bias[...].sum(0)
        for scale, source in zip(self.scale[...], sources, strict=True):
            mixed = mixed + scale * source.normalised
        return _compute_once(mixed.astype(sources[0].raw.dtype))


@jax.custom_vjp
def _compute_once(x: jax.Array) -> jax.Array:
    """Returns x and stops XLA:CPU from recomputing it or its gradient.

    Otherwise XLA:CPU recomputes a reader's gradient for each of its sources, in loops
    that read up to 199 arrays, and a step of DelugeNet-146 takes 2.6 times as long. It
    removes lax.optimization_barrier, but does not fuse across a loop.
    """
    return _copy_by_loop(x) if jax.default_backend() == "cpu" else x


def _copy_by_loop(x: jax.Array) -> jax.Array:
    flat = x.reshape(-1)
    # Two iterations, since XLA inlines one. If the size is odd, the halves overlap.
    half = -(-flat.size // 2)

    def copy(i, copied):
        part = lax.dynamic_slice_in_dim(flat, i * half, half)
        return lax.dynamic_update_slice_in_dim(copied, part, i * half, 0)

    return lax.fori_loop(0, 2, copy, jnp.empty_like(flat)).reshape(x.shape)


_compute_once.defvjp(
    lambda x: (_compute_once(x), None), lambda _, gradient: (_compute_once(gradient),)
)
