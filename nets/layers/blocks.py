"""Expander convolutions over a graph between blocks of channels, as a lowering.

Gathers the input blocks of each output block and multiplies them in one grouped
convolution (1x1: a batched matrix product), so arithmetic falls with the density of the
graph. If the input blocks draw, the order is reversed: one product per input block,
then a sum over the graph. Both orders copy a map once per block connection. The copy
is density * channels / block times as large, where channels are those of the other
side.
"""

import jax
import jax.numpy as jnp

from nets.layers.lowerings import convolution


def block_convolution(
    x: jax.Array,
    values: jax.Array,
    edges: jax.Array,
    *,
    out_channels: int,
    block: int,
    side: str,
    stride: int = 1,
    padding: int = 0,
) -> jax.Array:
    """Convolves x (N, H, W, in) over a graph whose edges form whole blocks.

    values: (kh, kw, E), the weights of the `edges` (E,), which are sorted flat indices
      input * out_channels + output.
    side: 'input' or 'output', whose blocks have equally many partners.
    Returns (N, H', W', out_channels) in the dtype of x. Sums over blocks, in the
    gradient too, are at least float32.
    """
    inputs, outputs = x.shape[-1] // block, out_channels // block
    kernels, rows, columns = _split(values, edges, inputs, outputs, block)
    count, window = len(rows), values.shape[:2]
    pointwise = window == (1, 1)
    options = dict(stride=stride, padding=padding)
    options |= dict(lowering="einsum" if pointwise else "auto")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if side == "output":
        order = jnp.argsort(columns, stable=True)
        x = x.reshape(*x.shape[:-1], inputs, block).astype(wide)
        x = x[..., rows[order], :].astype(values.dtype)
        x = x.reshape(*x.shape[:-2], count * block)
        kernel = kernels[:, :, order].reshape(*window, outputs, -1, block)
        kernel = kernel.swapaxes(2, 3).reshape(*window, -1, out_channels)
        return convolution(x, kernel, groups=outputs, **options)
    kernel = kernels.swapaxes(2, 3).reshape(*window, block, count * block)
    y = convolution(x, kernel, groups=inputs, **options)
    y = y.reshape(*y.shape[:-1], count, block).astype(wide)
    total = jnp.zeros((*y.shape[:-2], outputs, block), wide)
    total = total.at[..., columns, :].add(y)
    return total.reshape(*y.shape[:-2], out_channels).astype(x.dtype)


def _split(values, edges, inputs: int, outputs: int, block: int):
    """Returns the kernels (kh, kw, B, block, block) of the B edges between blocks.

    Also returns the input blocks (B,), ascending, and the output blocks (B,).
    """
    i, o = jnp.divmod(edges, outputs * block)
    corner = (i % block == 0) & (o % block == 0)
    (first,) = jnp.nonzero(corner, size=edges.size // block**2)
    rows, columns = i[first] // block, o[first] // block
    # The edges of an input channel are contiguous, those of a block edge are not.
    stride = (block * jnp.bincount(rows, length=inputs))[rows]
    within = jnp.arange(block)
    index = first[:, None] + stride[:, None] * within
    index = index[:, :, None] + within
    return values.at[..., index].get(unique_indices=True), rows, columns
