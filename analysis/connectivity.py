"""Measures the channel graph of every convolution and linear layer of a net.

python -m analysis.connectivity configs/xdensenet.py:40-24-2,cifar10 \\
    [--config.net.graph_seed=1] [--graph_seeds=10] [--csv=graphs.csv]

A layer is a bipartite graph between its input and output channels. The singular values
are those of D1^-1/2 A D2^-1/2, where A (in, out) is the biadjacency matrix and D1, D2
hold the degrees. The first is 1. The second is 1 for a disconnected graph and 0 for a
complete one; the smaller it is, the better the graph mixes.
"""

import collections
import dataclasses
import functools
import math
import sys
from collections.abc import Sequence

from runtime import processes

if __name__ == "__main__":
    processes.set_environment()  # before jax is imported

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg
from absl import app, flags
from flax import nnx
from ml_collections import config_flags

import nets
from configs.data_sets import DATA_SETS
from nets import connectivity, cost
from nets.layers.conv import Conv, Linear
from nets.layers.expander import Expander
from nets.layers.interleaved import SecondaryConv
from runtime import command_line
from runtime.workdir import as_csv, write_text

# Above this many channels on the smaller side, Lanczos is faster than a full SVD.
SVD_CHANNELS = 1024
ROUNDING = 1e-9  # a singular value may exceed the bound by this
HEADER = (
    *("layer", "kind", "in", "out", "edges", "density"),
    *("degree in", "degree out", "unused", "parts"),
    *("first", "second", "bound", "Ramanujan"),
)
WIDTHS = (
    *("36", "14", ">5", ">5", ">10", ">7"),
    *(">11", ">11", ">7", ">5", ">6", ">15", ">6", ">9"),
)


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
    matrix = scipy.sparse.csr_array(graph, dtype=float)
    inputs, outputs = graph.sum(1), graph.sum(0)
    unused = int((inputs == 0).sum()), int((outputs == 0).sum())
    components = _count_components(matrix)
    first, second = 0.0, 0.0
    if matrix.nnz:
        # Every component with an edge contributes exactly one singular value of 1.
        first = 1.0
        connected = components - sum(unused) == 1
        second = _second_singular_value(matrix) if connected else 1.0
    biregular = bool(np.ptp(inputs) == np.ptp(outputs) == 0 < matrix.nnz)
    bound = ramanujan_bound(int(inputs[0]), int(outputs[0])) if biregular else None
    return Measures(
        *graph.shape,
        edges=matrix.nnz,
        density=matrix.nnz / graph.size,
        min_in_degree=int(inputs.min()),
        max_in_degree=int(inputs.max()),
        min_out_degree=int(outputs.min()),
        max_out_degree=int(outputs.max()),
        unused_inputs=unused[0],
        unused_outputs=unused[1],
        components=components,
        first=first,
        second=second,
        bound=bound,
        is_ramanujan=biregular and components == 1 and second <= bound + ROUNDING,
    )


def ramanujan_bound(d1: int, d2: int) -> float:
    """Returns (sqrt(d1 - 1) + sqrt(d2 - 1)) / sqrt(d1 d2).

    For all d1, d2 >= 3 there are infinitely many (d1, d2)-biregular graphs whose second
    singular value does not exceed it (Marcus, Spielman and Srivastava, Interlacing
    families I, 2015, arXiv 1304.4132). As the graphs grow, no
    family stays below it by a fixed margin (Feng and Li 1996); a small or dense graph
    may.
    """
    return (math.sqrt(d1 - 1) + math.sqrt(d2 - 1)) / math.sqrt(d1 * d2)


def graphs(net: nnx.Module) -> dict[str, tuple[str, np.ndarray]]:
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
            if edges.ndim == 1:
                found[path] = kind, connectivity.to_matrix(edges, *ends)
            else:
                for i, unit in enumerate(edges):
                    graph = connectivity.to_matrix(unit, *ends)
                    found[f"{path}[{i}]"] = kind, graph
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


def layers(config, graph_seeds: int = 1) -> dict[str, tuple[str, list[Measures]]]:
    """Returns path -> (kind, measures for each graph seed), in execution order.

    Seeds are config.net.graph_seed and its successors. Raises ValueError for a net that
    cannot be built and for a data set without a known image size.
    """
    if config.data.name not in DATA_SETS:
        raise ValueError(
            f"the image size of data set {config.data.name!r} is unknown: choose "
            f"--config.data.name from {', '.join(sorted(DATA_SETS))}"
        )
    size = DATA_SETS[config.data.name].image_size
    net = cost.build(config.net)
    order = [layer.path for layer in cost.layers(net, (1, size, size, 3))]
    rank = {path: i for i, path in enumerate(order)}
    # Dense layers of equal shape, and the same layer for all seeds, share one graph.
    measure_once = functools.cache(
        lambda shape, content: measure(np.frombuffer(content, bool).reshape(shape))
    )
    found = collections.defaultdict(list)
    kinds = {}
    for seed in range(config.net.graph_seed, config.net.graph_seed + graph_seeds):
        nets.configure(net, graph_seed=seed)
        for path, (kind, graph) in graphs(net).items():
            kinds[path] = kind
            found[path].append(measure_once(graph.shape, graph.tobytes()))
    ordered = sorted(found, key=lambda path: rank[path.partition("[")[0]])
    return {path: (kinds[path], found[path]) for path in ordered}


def csv_rows(found: dict[str, tuple[str, list[Measures]]], graph_seed: int) -> list:
    """Returns one row per layer and graph seed, from the result of `layers`."""
    return [
        dict(layer=path, kind=kind, graph_seed=graph_seed + i)
        | dataclasses.asdict(measures)
        for path, (kind, seeds) in found.items()
        for i, measures in enumerate(seeds)
    ]


def table_row(path: str, kind: str, seeds: Sequence[Measures]) -> tuple[str, ...]:
    """Returns the cells of one layer.

    Ranges span all seeds. With several seeds that differ, the second singular value is
    the mean and standard deviation.
    """
    values = {
        field.name: [getattr(measures, field.name) for measures in seeds]
        for field in dataclasses.fields(Measures)
    }
    second, bounds = values["second"], set(values["bound"])
    spread = f"{np.mean(second):.4f}"
    if len(set(second)) > 1:
        spread += f" +- {np.std(second, ddof=1):.4f}"
    (bound,) = bounds if len(bounds) == 1 else (None,)
    ramanujan, count = sum(values["is_ramanujan"]), len(seeds)
    return (
        path,
        kind,
        _range(values["in_channels"]),
        _range(values["out_channels"]),
        f"{seeds[0].edges:,}",
        f"{seeds[0].density:.4f}",
        _range(values["min_in_degree"] + values["max_in_degree"]),
        _range(values["min_out_degree"] + values["max_out_degree"]),
        f"{_range(values['unused_inputs'])}/{_range(values['unused_outputs'])}",
        _range(values["components"]),
        f"{seeds[0].first:.4f}",
        spread,
        "" if bound is None else f"{bound:.4f}",
        f"{ramanujan}/{count}" if count > 1 else ("yes" if ramanujan else "no"),
    )


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}..{high}"


def _count_components(matrix: scipy.sparse.csr_array) -> int:
    graph = scipy.sparse.block_array([[None, matrix], [matrix.T, None]])
    return int(scipy.sparse.csgraph.connected_components(graph, False)[0])


def _second_singular_value(matrix: scipy.sparse.csr_array) -> float:
    if matrix.nnz == math.prod(matrix.shape) or min(matrix.shape) == 1:
        return 0.0  # complete, or of rank 1
    scales = []
    for axis in (1, 0):
        degrees = matrix.sum(axis)
        scales.append(scipy.sparse.diags_array(np.maximum(degrees, 1) ** -0.5))
    normalised = scales[0] @ matrix @ scales[1]
    if min(matrix.shape) <= SVD_CHANNELS:
        return float(np.linalg.svd(normalised.toarray(), compute_uv=False)[1])
    start = np.random.default_rng(0).normal(size=min(matrix.shape))
    return float(
        scipy.sparse.linalg.svds(
            normalised, k=2, v0=start, return_singular_vectors=False
        ).min()
    )


def main(_):
    config, path = flags.FLAGS.config, flags.FLAGS.csv
    try:
        found = layers(config, flags.FLAGS.graph_seeds)
        if path:
            write_text(path, as_csv(csv_rows(found, config.net.graph_seed)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    rows = (table_row(layer, *measures) for layer, measures in found.items())
    for row in (HEADER, *rows):
        cells = (f"{x:{width}}" for x, width in zip(row, WIDTHS, strict=True))
        print("  ".join(cells).rstrip())


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; the first argument may be the value of --config."""
    if argv[1:] and not argv[1].startswith("-"):
        argv = [argv[0], f"--config={argv[1]}", *argv[2:]]
    return command_line.parse(argv)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/FAMILY.py[:VARIANT,DATA]")
    flags.DEFINE_integer("graph_seeds", 1, "number of graph seeds", lower_bound=1)
    flags.DEFINE_string("csv", None, "file for one row per layer and graph seed")
    app.run(main, flags_parser=parse)
