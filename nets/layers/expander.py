"""Expander layers: a random sparse graph between channels, fixed before training.

Deep Expander Networks (arXiv 1711.08757; facts in the published code). Two sampling
rules, see nets/connectivity.py. Only the connections that exist are stored, so
parameter counts, optimizer state and checkpoints hold nothing else. To compute, the
values are laid into a dense kernel: never slower than masking one, and fifteen
times faster on CPU than gathering inputs per output.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nets import connectivity
from nets.layers.lowerings import convolution


class Connectivity(nnx.Variable):
    """A connection pattern: data that is saved and loaded, never trained."""


class Expander(nnx.Module):
    """What both expander layers share: the graph and the laying out of values.

    `edges` (E,) int32 are flat indices input * out_channels + output, sorted. They
    are zeros until `draw` is called (nets.create does), because a graph is a
    function of (seed, layer path) and a layer does not know its path.
    """

    def __init__(self, in_channels: int, out_channels: int, degree: int, sampling: str):
        for side, channels in (("input", in_channels), ("output", out_channels)):
            if channels < 1:
                raise ValueError(f"an expander with {channels} {side} channels")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.degree, self.sampling = degree, sampling
        self.num_edges = connectivity.num_edges(
            in_channels, out_channels, degree, sampling
        )
        self.edges = Connectivity(jnp.zeros(self.num_edges, jnp.int32))

    def draw(self, rng: np.random.Generator) -> None:
        """A graph of its own for each of stacked layers (nets/layers/gradual.py)."""
        ends, sampling = (self.in_channels, self.out_channels), self.sampling
        graphs = [
            connectivity.expander(*ends, self.degree, sampling, rng)
            for _ in range(math.prod(self.edges.shape[:-1]))
        ]
        self.connect(np.reshape(graphs, self.edges.shape))

    def connect(self, edges: np.ndarray) -> None:
        """Takes another graph with as many edges (E,), such as an imported one."""
        if edges.shape != self.edges.shape:
            raise ValueError(f"{self.num_edges} edges expected, got {edges.shape}")
        self.edges.set_value(jnp.asarray(edges))  # not [...] =: see norm.py

    @property
    def absent_weights(self) -> int:
        """Weights that the dense twin has and this layer does not (nets/cost.py)."""
        absent = self.in_channels * self.out_channels - self.num_edges
        return absent * math.prod(self.kernel.shape[:-1])

    def dense(self, values: jax.Array) -> jax.Array:
        """values (..., E) -> (..., in, out), zero where no connection exists."""
        size = self.in_channels * self.out_channels
        flat = jnp.zeros((*values.shape[:-1], size), values.dtype)
        flat = flat.at[..., self.edges[...]].set(
            values, unique_indices=True, indices_are_sorted=True
        )
        return flat.reshape(*values.shape[:-1], self.in_channels, self.out_channels)


class ExpanderConv(Expander):
    """Square convolution without bias over the existing channel pairs.

    Every pair carries a full (k, k) patch: the graph repeats over the taps. Initial
    values are N(0, 2/(out k k)), the *dense* fan-out, as in the original: signals
    start smaller than in the dense twin and batch normalisation makes up for it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        degree: int,
        sampling: str,
        stride: int = 1,
        padding: int = 0,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_channels, out_channels, degree, sampling)
        shape = (kernel_size, kernel_size, self.num_edges)
        std = math.sqrt(2 / (out_channels * kernel_size**2))
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape))
        self.stride, self.padding, self.lowering = stride, padding, "auto"

    def __call__(self, x: jax.Array) -> jax.Array:
        return convolution(
            x,
            self.dense(self.kernel[...].astype(x.dtype)),
            stride=self.stride,
            padding=self.padding,
            lowering=self.lowering,
        )


class ExpanderLinear(Expander):
    """Linear layer without bias over the existing pairs; x (N, in) -> (N, out).

    Initial values are N(0, 2/in), the dense fan-in.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        degree: int,
        sampling: str,
        rngs: nnx.Rngs,
    ):
        super().__init__(in_features, out_features, degree, sampling)
        std = math.sqrt(2 / in_features)
        values = std * jax.random.normal(rngs.params(), (self.num_edges,))
        self.kernel = nnx.Param(values)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.dense(self.kernel[...].astype(x.dtype))
