"""Compares the paths through a net with those through its twins of other wirings."""

import dataclasses
import decimal
from collections.abc import Iterator, Sequence

import numpy as np
from flax import nnx

import nets
from analysis import connectivity_figure, graphs, paths
from configs.data_sets import DATA_SETS
from nets import cost
from nets.layers.expander import Expander
from nets.layers.wiring import KINDS

HEADER = (
    *("wiring", "parameters", "MACs", "all seen after", "without a path"),
    *("fewest paths", "mean", "most"),
)
WIDTHS = ("24", ">11", ">9", ">18", ">14", ">12", ">12", ">12")


@dataclasses.dataclass(frozen=True)
class Twin:
    """A net under one kind of wiring.

    wiring: such as "grouped, 2 groups".
    graphs: path -> matrix of each layer, for the first graph seed. An interleaved pair
      is one layer. Of the units of a Gradual layer, the first.
    paths: for each graph seed; a single one if no layer is random.
    """

    wiring: str
    price: cost.Cost
    graphs: dict[str, np.ndarray]
    paths: list[paths.Paths]


def sections(net_config) -> dict[str, dict]:
    """Returns wiring, such as "dense" -> `net` section for each kind, given kind first.

    Twins are sparse by the same number as the given net: `compress` of an expander, the
    `groups` or `primary_groups` of the others.
    """
    given = net_config.wiring
    share = given.compress if given.kind == "expander" else given.groups
    if given.kind == "interleaved" and given.primary_groups:
        share = given.primary_groups
    fields = {
        "dense": {},
        "expander": dict(compress=share),
        "grouped": dict(groups=share),
        "interleaved": dict(primary_groups=share, secondary_groups=0),
    }
    found = {}
    for kind in sorted(KINDS, key=lambda kind: kind != given.kind):
        section = net_config.to_dict()
        if kind != given.kind:
            section["wiring"] |= dict(kind=kind) | fields[kind]
        found[_describe(section["wiring"])] = section
    return found


def _describe(wiring: dict) -> str:
    groups = wiring["primary_groups"] or "L", wiring["secondary_groups"] or "M"
    blocks = f", blocks of {wiring['block']}" if wiring["block"] > 1 else ""
    return {
        "dense": "dense",
        "expander": f"expander, compress {wiring['compress']}{blocks}",
        "grouped": f"grouped, {wiring['groups']} groups",
        "interleaved": "interleaved, {} x {}".format(*groups),
    }[wiring["kind"]]


def compare(config, graph_seeds: int = 1) -> Iterator[Twin | str]:
    """Yields a configuration's net, then its twins of the other kinds of wiring.

    A twin that cannot be built yields a line that says why.
    """
    size = DATA_SETS[config.data.name].image_size
    for number, (wiring, section) in enumerate(sections(config.net).items()):
        try:
            net = cost.build(section)
        except ValueError as error:
            if not number:
                raise
            yield f"{wiring}: {error}"
            continue
        yield _count_paths(net, wiring, section["graph_seed"], graph_seeds, size)


def _count_paths(net, wiring: str, graph_seed: int, graph_seeds: int, size) -> Twin:
    price = cost.total(cost.layers(net, (1, size, size, 3)))
    first, counted = None, []
    is_random = any(isinstance(module, Expander) for _, module in nnx.iter_modules(net))
    for seed in range(graph_seed, graph_seed + (graph_seeds if is_random else 1)):
        nets.configure(net, graph_seed=seed)
        first = first or {x: graph for x, (_, graph) in graphs.of(net).items()}
        counted.append(paths.count(net, size))
    return Twin(wiring, price, _join(first), counted)


def _join(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    joined = {}
    for path, graph in found.items():
        if path.endswith(".secondary"):
            path = path.removesuffix(".secondary")
            graph = found[f"{path}.primary"].astype(int) @ graph > 0
        joined.setdefault(path.partition("[")[0], graph)
    return {path: x for path, x in joined.items() if not path.endswith(".primary")}


def row(twin: Twin) -> tuple[str, ...]:
    """Returns the cells of one wiring; means and extremes span all graph seeds."""
    counts = [found.counts for found in twin.paths]
    depths = [found.depth for found in twin.paths]
    reached = [depth for depth in depths if depth]
    after = (
        f"{graphs.show_range(reached)} of {len(twin.paths[0].layers)}"
        if reached
        else "never"
    )
    if len(depths) > 1:
        after += f" ({len(reached)}/{len(depths)})"
    pairs = sum(x.size for x in counts)
    return (
        twin.wiring,
        f"{twin.price.parameters:,}",
        f"{twin.price.macs / 1e6:,.1f}M",
        after,
        f"{100 * sum((x == 0).sum() for x in counts) / pairs:.1f} %",
        _short(min(x.min() for x in counts)),
        _short(sum(x.sum() for x in counts), pairs),
        _short(max(x.max() for x in counts)),
    )


def _short(number: int, over: int = 1) -> str:
    """Formats number / over, of which the table shows at most nine exact digits."""
    value = decimal.Decimal(number) / over
    if value >= 10**9:
        return f"{value:.3e}"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def csv_rows(twin: Twin, graph_seed: int) -> list[dict]:
    """Returns one row per graph seed and layer; the counts are exact.

    The row of the last layer counts the paths to the channels that it reads.
    """
    rows = []
    for seed, found in enumerate(twin.paths, graph_seed):
        layers = found.layers | {found.last: paths.summarize(found.counts)}
        for depth, (path, count) in enumerate(layers.items(), 1):
            rows.append(
                dict(wiring=twin.wiring, graph_seed=seed, layer=path, depth=depth)
                | dict(sources=len(count.reach), channels=count.reach.shape[1])
                | dict(reach=float(count.reach.mean()), smallest=count.smallest)
                | dict(total=count.total, largest=count.largest)
            )
    return rows


def panels(twins: Sequence[Twin]) -> tuple[str, list[connectivity_figure.Panel]]:
    """Returns the layer whose singular values a figure shows, and its panels.

    The layer is the largest of those that are not complete under every wiring.
    """
    size = lambda path: min(twins[0].graphs[path].shape)
    layers = [path for path in twins[0].graphs if size(path) <= graphs.SVD_CHANNELS]
    sparse = [
        path for path in layers if not all(twin.graphs[path].all() for twin in twins)
    ]
    layer = max(sparse or layers, key=size)
    found = []
    for twin in twins:
        graph = twin.graphs[layer]
        degrees = [max(1, graph.sum() / channels) for channels in graph.shape]
        depth = twin.paths[0].depth
        seen = f"after layer {depth}, all see all" if depth else "some never see some"
        reach = [count.reach.mean(1) for count in twin.paths[0].layers.values()]
        found.append(
            connectivity_figure.Panel(
                title=f"{twin.wiring}\n{twin.price.parameters:,} parameters\n{seen}",
                reach=np.stack(reach, axis=1),
                values=graphs.singular_values(graph),
                bound=graphs.ramanujan_bound(*degrees),
            )
        )
    return layer, found
