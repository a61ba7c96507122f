"""The channel graph of each layer of a net, and its measures.

A layer is a bipartite graph between its input and output channels. The singular values
are those of D1^-1/2 A D2^-1/2, where A (in, out) is the biadjacency matrix and D1, D2
hold the degrees. The first is 1. The second is 1 for a disconnected graph and 0 for a
complete one; the smaller it is, the better the graph mixes.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
from flax import nnx

from nets import connectivity
from nets.layers.conv import Conv, Linear
from nets.layers.expander import Expander
from nets.layers.interleaved import SecondaryConv

# Above this many channels on the smaller side, Lanczos is faster than a full SVD.
SVD_CHANNELS = 1024
ROUNDING = 1e-9  # a singular value may exceed the bound by this


@dataclasses.dataclass(frozen=True)
class Measures:
    """Measures of a bipartite graph between input and output channels.

    density: edges / (in_channels * out_channels).
    unused_inputs, unused_outputs: channels without an edge. Each of them is also one of
      the connected `components`.
    first, second: the largest singular values of the normalised biadjacency matrix.
    bound: `ramanujan_bound` of the degrees, or None if the graph is not biregular.
    is_ramanujan: whether the graph is biregular and connected, and second <= bound.
    """

    in_channels: int
    out_channels: int
    edges: int
    density: float
    min_in_degree: int
    max_in_degree: int
    min_out_degree: int
    max_out_degree: int
    unused_inputs: int
    unused_outputs: int
    components: int
    first: float
    second: float
    bound: float | None
    is_ramanujan: bool


def measure(graph: np.ndarray) -> Measures:
    """Returns the measures of a graph, a boolean (in, out) matrix."""
    edges, inputs, outputs = int(graph.sum()), graph.sum(1), graph.sum(0)
    unused = int((inputs == 0).sum()), int((outputs == 0).sum())
    components = _count_components(graph)
    # Every component with an edge contributes exactly one singular value of 1.
    second = 1.0 if components - sum(unused) > 1 else _second_singular_value(graph)
    biregular = bool(np.ptp(inputs) == np.ptp(outputs) == 0 < edges)
    bound = ramanujan_bound(int(inputs[0]), int(outputs[0])) if biregular else None
    return Measures(
        *graph.shape,
        edges=edges,
        density=edges / graph.size,
        min_in_degree=int(inputs.min()),
        max_in_degree=int(inputs.max()),
        min_out_degree=int(outputs.min()),
        max_out_degree=int(outputs.max()),
        unused_inputs=unused[0],
        unused_outputs=unused[1],
        components=components,
        first=1.0 if edges else 0.0,
        second=second,
        bound=bound,
        is_ramanujan=biregular and components == 1 and second <= bound + ROUNDING,
    )


def ramanujan_bound(d1: float, d2: float) -> float:
    """Returns (sqrt(d1 - 1) + sqrt(d2 - 1)) / sqrt(d1 d2).

    For all d1, d2 >= 3 there are infinitely many (d1, d2)-biregular graphs whose second
    singular value does not exceed it (Marcus, Spielman and Srivastava, Interlacing
    families I, 2015, arXiv 1304.4132). As the graphs grow, no family stays below it by
    a fixed margin (Feng and Li 1996); a small or dense graph may.
    """
    return (math.sqrt(d1 - 1) + math.sqrt(d2 - 1)) / math.sqrt(d1 * d2)


def of(net: nnx.Module) -> dict[str, tuple[str, np.ndarray]]:
    """Returns path -> (kind, boolean (in, out) matrix) of each layer of a net.

    The net may be abstract, apart from the edges of its expanders. The units of a
    Gradual layer share one graph, except for expanders: "units.conv1[3]" is that of
    unit 3. The two halves of an interleaved pair are separate layers.
    """
    found = {}
    for path, module in nnx.iter_modules(net):
        path, kind = ".".join(map(str, path)), type(module).__name__
        if isinstance(module, Expander):
            edges = np.asarray(module.edges[...])
            ends = module.in_channels, module.out_channels
            for i, unit in enumerate(np.atleast_2d(edges)):
                name = path if edges.ndim == 1 else f"{path}[{i}]"
                found[name] = kind, connectivity.to_matrix(unit, *ends)
        elif isinstance(module, (Conv, Linear)):
            groups = getattr(module, "groups", 1)
            inputs, outputs = module.kernel.shape[-2:]
            inputs *= groups
            edges = connectivity.connect_groups(inputs, outputs, groups)
            found[path] = kind, connectivity.to_matrix(edges, inputs, outputs)
        elif isinstance(module, SecondaryConv):
            found[path] = kind, _secondary(module)
    return found


def _secondary(module: SecondaryConv) -> np.ndarray:
    primary, secondary = module.groups
    channels = module.kernel.shape[-1]
    # Input (l, g, c) and output (k, g) are connected: see interleaved.mix.
    inputs = np.arange(channels).reshape(primary, secondary, -1)
    groups = np.empty(channels, int)
    groups[inputs] = np.arange(secondary)[:, None]
    return groups[:, None] == np.arange(channels) % secondary


def _count_components(graph: np.ndarray) -> int:
    matrix = scipy.sparse.csr_array(graph)
    matrix = scipy.sparse.block_array([[None, matrix], [matrix.T, None]])
    return int(scipy.sparse.csgraph.connected_components(matrix, False)[0])


def singular_values(graph: np.ndarray) -> np.ndarray:
    """Returns all singular values of a graph, a boolean (in, out) matrix."""
    return np.linalg.svd(_normalise(graph), compute_uv=False)


def _normalise(graph: np.ndarray) -> np.ndarray:
    degrees = graph.sum(1, keepdims=True), graph.sum(0)
    scales = [np.maximum(x, 1) ** -0.5 for x in degrees]
    return scales[0] * graph * scales[1]


def _second_singular_value(graph: np.ndarray) -> float:
    """Returns the second singular value of a graph with one component, or no edge."""
    if graph.all() or not graph.any() or min(graph.shape) == 1:
        return 0.0  # the rank is at most 1
    if min(graph.shape) <= SVD_CHANNELS:
        return float(singular_values(graph)[1])
    start = np.random.default_rng(0).normal(size=min(graph.shape))
    matrix = scipy.sparse.csr_array(_normalise(graph))
    options = dict(k=2, v0=start, return_singular_vectors=False)
    return float(scipy.sparse.linalg.svds(matrix, **options).min())


def show_range(values: Sequence[int], to: str = "..") -> str:
    """Formats the extremes of some values, such as "3..5"."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}{to}{high}"
