"""Expander layers: convolutions and linear layers over a fixed sparse graph.

Deep Expander Networks (arXiv 1711.08757; facts from the published code). For sampling
rules see nets/connectivity.py. Only existing connections are stored, so parameters,
optimizer state and checkpoints are as small as the sparse layer. The forward pass
scatters them into a dense kernel, which is never slower than masking and 15x faster on
CPU than gathering the inputs of each output, with two exceptions. On CPU, C++ kernels
(layers/cpu) convolve over a graph of few edges, in time proportional to them. On
accelerators, layers/blocks.py computes graphs between blocks of channels.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from nets import connectivity
from nets.layers.blocks import block_convolution
from nets.layers.cpu import calls
from nets.layers.lowerings import Shape, convolution

# On CPU, `auto` computes with edges instead of a dense kernel if at most this share of
# the pairs is connected (docs/speed.md).
SPARSE_DENSITY = 1 / 2


class Connectivity(nnx.Variable):
    """A connection pattern: saved and loaded, never trained."""


class Expander(nnx.Module):
    """Base class: holds the graph and scatters values into a dense kernel.

    `edges` (E,) int32 are sorted flat indices input * out_channels + output. They are
    zeros until `draw` is called (by nets.configure), because a graph is a function of
    the seed and the layer's path, and a layer does not know its path. `lowering` may
    also be "blocks" (layers/blocks.py), which replaces `auto` on accelerators if
    `block` is more than 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        degree: int,
        sampling: str,
        block: int,
    ):
        for side, channels in (("input", in_channels), ("output", out_channels)):
            if channels < 1:
                raise ValueError(
                    f"an expander layer needs at least 1 {side} channel, got {channels}"
                )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.degree, self.sampling, self.block = degree, sampling, block
        self.num_edges = connectivity.num_edges(
            in_channels, out_channels, degree, sampling, block
        )
        self.side = connectivity.sampled_side(in_channels, out_channels, sampling)
        self.edges = Connectivity(jnp.zeros(self.num_edges, jnp.int32))
        self.lowering = "auto"

    def draw(self, rng: np.random.Generator) -> None:
        """Draws the graph, or independent graphs for the units of a Gradual layer."""
        ends, sampling = (self.in_channels, self.out_channels), self.sampling
        graphs = [
            connectivity.draw_expander(*ends, self.degree, sampling, rng, self.block)
            for _ in range(math.prod(self.edges.shape[:-1]))
        ]
        self.connect(np.reshape(graphs, self.edges.shape))

    def connect(self, edges: np.ndarray) -> None:
        """Replaces the graph. `edges` (E,) must have the same length.

        With blocks, they must also form whole blocks and give each block of the sampled
        side equally many partners.
        """
        if edges.shape != self.edges.shape:
            raise ValueError(f"expected {self.num_edges} edges, got {edges.shape}")
        if self.block > 1:
            for graph in edges.reshape(-1, self.num_edges):
                self._check_blocks(graph)
        self.edges.set_value(jnp.asarray(edges))  # not [...] =: see norm.py

    def _check_blocks(self, edges: np.ndarray) -> None:
        graph = connectivity.to_matrix(edges, self.in_channels, self.out_channels)
        inputs, outputs = (size // self.block for size in graph.shape)
        blocks = graph.reshape(inputs, self.block, outputs, self.block)
        partners = graph.sum(1 if self.side == "input" else 0)
        whole = (blocks.all((1, 3)) == blocks.any((1, 3))).all()
        if not whole or (partners != self.degree).any():
            raise ValueError(
                f"expected a graph between whole blocks of {self.block} channels, with "
                f"{self.degree // self.block} partners for each {self.side} block"
            )

    @property
    def absent_weights(self) -> int:
        """Number of weights that only the dense twin has (nets/cost.py)."""
        absent = self.in_channels * self.out_channels - self.num_edges
        return absent * math.prod(self.kernel.shape[:-1])

    def dense(self, values: jax.Array) -> jax.Array:
        """Scatters values (..., E) into zeros (..., in, out)."""
        size = self.in_channels * self.out_channels
        flat = jnp.zeros((*values.shape[:-1], size), values.dtype)
        flat = flat.at[..., self.edges[...]].set(
            values, unique_indices=True, indices_are_sorted=True
        )
        return flat.reshape(*values.shape[:-1], self.in_channels, self.out_channels)

    @property
    def uses_blocks(self) -> bool:
        """Whether to compute by block instead of scattering into a dense kernel."""
        if self.block == 1:
            return False
        if self.lowering == "auto":
            return jax.default_backend() != "cpu"
        return self.lowering == "blocks"

    def in_blocks(self, x: jax.Array, values: jax.Array, **geometry) -> jax.Array:
        """Convolves x (N, H, W, in) with values (kh, kw, E) by block."""
        options = dict(out_channels=self.out_channels, block=self.block, side=self.side)
        edges = self.edges[...]
        return block_convolution(x, values, edges, **options, **geometry)


class ExpanderConv(Expander):
    """Square convolution without bias over the connected channel pairs.

    All taps of the kernel share one graph. Initial values are N(0, 2 / (out k k)) with
    the *dense* fan-out, as in the original: signals start smaller than in the dense
    twin, and batch normalisation compensates. No published net uses `dilation`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        degree: int,
        sampling: str,
        block: int = 1,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_channels, out_channels, degree, sampling, block)
        shape = (kernel_size, kernel_size, self.num_edges)
        std = math.sqrt(2 / (out_channels * kernel_size**2))
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape))
        self.stride, self.padding, self.dilation = stride, padding, dilation

    def __call__(self, x: jax.Array) -> jax.Array:
        values = self.kernel[...].astype(x.dtype)
        if self.dilation > 1:  # zeros between the taps suit every lowering
            between = (0, 0, self.dilation - 1)
            zero = jnp.zeros((), values.dtype)
            values = lax.pad(values, zero, (between, between, (0, 0, 0)))
        geometry = dict(stride=self.stride, padding=self.padding)
        if self._in_cpp(x):
            y = self._sparse(x, values)
        elif self.uses_blocks:
            y = self.in_blocks(x, values, **geometry)
        else:
            kernel = self.dense(values)
            y = convolution(x, kernel, lowering=self.lowering, **geometry)
        return checkpoint_name(y, "convolution")

    def _in_cpp(self, x: jax.Array) -> bool:
        """Returns whether to compute with the edges, in C++."""
        pairs, window = self.in_channels * self.out_channels, self.kernel.shape[0]
        few = self.num_edges <= SPARSE_DENSITY * pairs
        chosen = self.lowering == "cpp" or (self.lowering == "auto" and few)
        exists = self.stride == 1 or window == 1
        exists &= self.dilation == 1 and self.padding < window
        return chosen and exists and calls.usable(x)

    def _sparse(self, x: jax.Array, values: jax.Array) -> jax.Array:
        x = x[:, :: self.stride, :: self.stride]
        kernel = jax.ShapeDtypeStruct(
            (*values.shape[:2], self.in_channels, self.out_channels), values.dtype
        )
        shape = Shape.of(x, kernel, stride=1, padding=self.padding, groups=1)
        return calls.sparse_convolution(x, values, self.edges[...], shape)


class ExpanderLinear(Expander):
    """Linear layer without bias over the connected pairs: x (N, in) -> (N, out).

    Initial values are N(0, 2 / in), with the dense fan-in as in the original.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        degree: int,
        sampling: str,
        block: int = 1,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, out_features, degree, sampling, block)
        std = math.sqrt(2 / in_features)
        values = std * jax.random.normal(rngs.params(), (self.num_edges,))
        self.kernel = nnx.Param(values)

    def __call__(self, x: jax.Array) -> jax.Array:
        values = self.kernel[...].astype(x.dtype)
        if self.uses_blocks:
            return self.in_blocks(x[:, None, None], values[None, None])[:, 0, 0]
        return x @ self.dense(values)
