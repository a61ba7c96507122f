"""Compares the paths through a net with those through its twins of other wirings.

The figure shows reach by depth and singular values, in one column for each wiring.
"""

import dataclasses
import decimal
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from flax import nnx

import nets
from analysis import graphs, paths
from configs.data_sets import DATA_SETS
from nets import cost
from nets.layers.expander import Expander
from nets.layers.wiring import KINDS

HEADER = (
    *("wiring", "parameters", "MACs", "all seen after", "without a path"),
    *("fewest paths", "mean", "most"),
)
WIDTHS = ("24", ">11", ">9", ">18", ">14", ">12", ">12", ">12")
BINS = np.linspace(0, 1.0001, 41)  # of singular values


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
        price = cost.total(cost.layers(net, (1, size, size, 3)))
        is_random = any(isinstance(x, Expander) for _, x in nnx.iter_modules(net))
        counted, first = [], None
        for seed in range(graph_seeds if is_random else 1):
            nets.configure(net, graph_seed=section["graph_seed"] + seed)
            first = first or graphs.of(net)
            counted.append(paths.count(net, size))
        yield Twin(wiring, price, _join(first), counted)


def _join(found: dict[str, tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    joined = {}
    for path, (_, graph) in found.items():
        if path.endswith(".secondary"):
            path = path.removesuffix(".secondary")
            graph = found[f"{path}.primary"][1].astype(int) @ graph > 0
        joined.setdefault(path.partition("[")[0], graph)
    return {path: x for path, x in joined.items() if not path.endswith(".primary")}


def row(twin: Twin) -> tuple[str, ...]:
    """Returns the cells of one wiring; means and extremes span all graph seeds."""
    counts = [found.counts for found in twin.paths]
    depths = [found.depth for found in twin.paths]
    reached = [depth for depth in depths if depth]
    after = "never"
    if reached:
        after = f"{graphs.show_range(reached)} of {len(twin.paths[0].layers)}"
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
            row = dict(wiring=twin.wiring, graph_seed=seed, layer=path, depth=depth)
            row["sources"], row["channels"] = count.reach.shape
            row |= dict(reach=float(count.reach.mean()), smallest=count.smallest)
            row |= dict(total=count.total, largest=count.largest)
            rows.append(row)
    return rows


def check_image(path: str) -> None:
    """Raises ValueError unless the suffix of a path names an image format."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if pathlib.Path(path).suffix[1:] not in formats:
        raise ValueError(
            f"--out={path} does not end in a known image format: choose from "
            f"{', '.join(f'.{name}' for name in sorted(formats))}"
        )


def draw(name: str, twins: Sequence[Twin]):
    """Returns a matplotlib figure: heat maps above, histograms below.

    name: of the net. The histograms show the singular values of one layer, with the
    bound for its mean degrees. It is the largest layer that at least one wiring does
    not connect completely.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(3.2 * len(twins), 6.2), layout="constrained")
    figure.suptitle(name)
    axes = figure.subplots(2, len(twins), sharey="row", squeeze=False)
    layer = _choose_layer([twin.graphs for twin in twins])
    # (source channels, layers): share of a layer's channels that see a source channel.
    shares = [
        np.stack([x.reach.mean(1) for x in twin.paths[0].layers.values()], axis=1)
        for twin in twins
    ]
    # Later layers see everything, or as much as these.
    sources, depth = shares[0].shape
    shown = min(depth, max(map(_first_constant, shares)) + 3)
    style = dict(aspect="auto", interpolation="nearest", vmin=0, vmax=1)
    style["extent"] = (0.5, shown + 0.5, sources - 0.5, -0.5)
    for (heat, histogram), twin, reach in zip(axes.T, twins, shares, strict=True):
        image = heat.imshow(reach[:, :shown], **style)
        after = twin.paths[0].depth
        seen = f"after layer {after}, all see all" if after else "some never see some"
        price = f"{twin.price.parameters:,} parameters"
        heat.set_title(f"{twin.wiring}\n{price}\n{seen}", fontsize=10)
        heat.set_xlabel(f"layer, {shown} of {depth}")
        heat.xaxis.set_major_locator(MaxNLocator(integer=True))
        graph = twin.graphs[layer]
        counts, _ = np.histogram(graphs.singular_values(graph), BINS)
        bound = graphs.ramanujan_bound(*(max(1, graph.sum() / n) for n in graph.shape))
        histogram.stairs(counts, BINS, fill=True, color="#33658a")
        histogram.axvline(bound, color="#f26419", ls="--", label="bound")
        histogram.set(xlim=(-0.03, 1.03), yscale="symlog", xlabel="singular value")
    axes[0, 0].set_ylabel("output channel of the stem")
    axes[0, 0].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1, 0].set_ylabel(f"singular values of\n{layer}")
    axes[1, 0].legend()
    colours = figure.colorbar(image, ax=axes[0, :].tolist(), pad=0.01)
    colours.set_label("share of the layer's\nchannels that see it")
    return figure


def _choose_layer(found: Sequence[dict[str, np.ndarray]]) -> str:
    size = lambda path: min(found[0][path].shape)
    layers = [path for path in found[0] if size(path) <= graphs.SVD_CHANNELS]
    sparse = [path for path in layers if not all(x[path].all() for x in found)]
    return max(sparse or layers, key=size)


def _first_constant(reach: np.ndarray) -> int:
    """Returns the number of the first layer of the final run of equal columns."""
    different = np.flatnonzero((reach != reach[:, -1:]).any(0))
    return int(different[-1]) + 2 if len(different) else 1


def write_image(path: str, name: str, twins: Sequence[Twin]) -> None:
    """Writes the figure of `draw`. A killed run leaves the old file or the new one."""
    path = pathlib.Path(path)
    draft = path.with_name(f".{path.name}.draft")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(name, twins).savefig(draft, format=path.suffix[1:], dpi=120)
    draft.replace(path)
