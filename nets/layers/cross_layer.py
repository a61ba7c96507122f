"""Cross-layer depthwise convolution: combines all earlier layers of a block.

DelugeNets (arXiv 1611.05552; facts from the published code). The original normalises
each source anew for every reader; the convolution's weight and bias are the gain and
shift of that normalisation. In training, all readers of a source use the same
statistics, so here they are computed once per source. Normalisation and convolution
together are one weighted sum of the raw sources: no normalised map is computed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from nets.layers.cpu import calls
from nets.layers.norm import BatchNorm


class Source(NamedTuple):
    """The output `raw` (N, H, W, C) of a layer, which its readers normalise.

    scale, shift: (groups, C); the normalised map is scale * raw + shift.
    copies: number of sources of a reader -> its own copy of `raw`, from `_lend`.
    """

    raw: jax.Array
    scale: jax.Array | None = None
    shift: jax.Array | None = None
    copies: dict[int, jax.Array] | None = None


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
        # scale (s raw + t) + bias = (scale s) raw + (scale t + bias)
        scales, shifts = (
            jnp.stack(each, axis=1)
            for each in zip(*((s.scale, s.shift) for s in sources), strict=True)
        )
        weights = self.scale[...] * scales
        shift = (self.scale[...] * shifts + self.bias[...]).sum(1)
        x = sources[0].raw
        maps = [source.copies[len(sources)] for source in sources]
        mixed = _read(maps, weights, shift)
        return mixed if calls.usable_in_float32(x) else _compute_once(mixed)


def make_source(
    x: jax.Array, norm: BatchNorm, index: int, gains: Sequence[Sequence[jax.Array]]
) -> Source:
    """Measures the output x of a layer for all readers that have a source `index`.

    gains: the rows of each reader's `scale`, from `unstack_scales`.
    """
    gains = [rows for rows in gains if len(rows) > index]
    scale, shift = (
        each.reshape(-1, x.shape[-1]) for each in norm.coefficients([norm.measure(x)])
    )
    weights = jnp.stack([rows[index] for rows in gains]) * scale[:, None]
    copies = dict(zip(map(len, gains), _lend(x, weights), strict=True))
    return Source(x, scale, shift, copies)


def unstack_scales(readers: Sequence[CrossLayer]) -> list[Sequence[jax.Array]]:
    """Returns the rows of each reader's `scale`, once for all its sources.

    Indexing `scale` for each pair of source and reader gave the train step of
    DelugeNet-146 a tenth more operations.
    """
    return [jnp.unstack(reader.scale[...]) for reader in readers]


# A reader adds up weighted sources. The gradients of the products are computed for each
# source, not for each reader: one pass over the gradients of all readers of a source
# yields the gradients of the source and of its weights. `_read` therefore computes
# products and sum, but differentiates only the sum: it passes its output gradient on as
# that of each product, and zeros for the weights. `_lend`, which returns copies of the
# source without using the weights, differentiates the products.


@jax.custom_vjp
def _lend(x: jax.Array, weights: jax.Array) -> list[jax.Array]:
    """Returns a copy of x (N, ..., C) for each of the weights (groups, readers, C)."""
    return [x] * weights.shape[1]


@jax.custom_vjp
def _read(maps: Sequence[jax.Array], weights: jax.Array, shift: jax.Array) -> jax.Array:
    """Adds a shift (groups, C) and copies of sources, each times its weights.

    maps: (N, ..., C) from `_lend`. weights: (groups, maps, C), equal to those that
    `_lend` was given. Groups are equal runs of images.
    """
    return _weighted_sum(maps, weights, shift)


def _read_gradients(residuals, dy):
    weights, shift = residuals
    dshift = dy.reshape(len(shift), -1, shift.shape[-1]).sum(1, dtype=shift.dtype)
    return [dy] * weights.shape[1], jnp.zeros_like(weights), dshift


_lend.defvjp(
    lambda x, weights: ([x] * weights.shape[1], (x, weights)),
    lambda residuals, dys: _products_gradients(*residuals, dys),
)
_read.defvjp(lambda *args: (_weighted_sum(*args), args[1:]), _read_gradients)


def _sum_in_cpp(maps, weights, shift):
    y = calls.weighted_sum(_flatten(maps, weights), weights, shift)
    return y.reshape(maps[0].shape)


@calls.use_kernel(_sum_in_cpp)
def _weighted_sum(maps, weights, shift):
    # Stacking the maps, or looping over a buffer of them, takes 1.5 to 2.6 times the
    # memory of a sum of products (benchmarks/results/cross_layer-*.csv).
    # Added in the original's order, because a few steps of training amplify rounding
    # errors 10,000 times.
    pairs = list(zip(_unstack(weights), _flatten(maps, weights), strict=True))
    y = sum(weight * x for weight, x in reversed(pairs)) + shift[:, None]
    return y.astype(maps[0].dtype).reshape(maps[0].shape)


def _gradients_in_cpp(x, weights, dys):
    flat, *dys = _flatten([x, *dys], weights)
    dx, dweights = calls.weights_gradients(flat, weights, dys)
    return dx.reshape(x.shape), dweights


@calls.use_kernel(_gradients_in_cpp)
def _products_gradients(x, weights, dys):
    """Returns the gradients of x and weights. dys: those of the products."""
    flat, *dys = _flatten([x, *dys], weights)
    dx = sum(w * dy for w, dy in zip(_unstack(weights), dys, strict=True))
    dweights = jnp.stack([(flat * dy.astype(dx.dtype)).sum(1) for dy in dys], axis=1)
    return dx.astype(x.dtype).reshape(x.shape), dweights.astype(weights.dtype)


def _unstack(weights: jax.Array) -> Sequence[jax.Array]:
    """Returns the weights (groups, 1, C) of each map, of weights (groups, maps, C)."""
    return jnp.unstack(weights[:, :, None], axis=1)


def _flatten(maps: Sequence[jax.Array], weights: jax.Array) -> list[jax.Array]:
    """Reshapes maps (N, ..., C) to (groups, pixels, C)."""
    return [x.reshape(len(weights), -1, x.shape[-1]) for x in maps]


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
