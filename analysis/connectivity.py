"""Measures the connectivity of a net: of each layer, and of paths through all of it.

python -m analysis.connectivity configs/xdensenet.py:40-24-2,cifar10 \\
    [--config.net.graph_seed=1] [--graph_seeds=10] \\
    [--csv=graphs.csv] [--paths_csv=paths.csv] [--out=connectivity.png]

The first table measures the channel graph of every convolution and linear layer
(analysis/graphs.py). It shows the first two singular values: the second is 1 for a
disconnected graph and 0 for a complete one; the smaller it is, the better it mixes.

The second table compares the net with its twins of every other wiring: the number of
layers after which each channel sees each output channel of the stem, and the number of
paths from the stem to the last layer (analysis/paths.py defines both). An expander with
compress=N is compared with N groups and N primary groups, and each of these likewise;
a dense net with those of its config.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence

from runtime import processes

if __name__ == "__main__":
    processes.set_environment()  # before jax is imported

import numpy as np
from absl import app, flags
from ml_collections import config_flags

import nets
from analysis import graphs, summary, twins
from analysis.graphs import Measures, show_range
from configs.data_sets import DATA_SETS
from nets import cost
from runtime import command_line
from runtime.workdir import as_csv, write_text

HEADER = (
    *("layer", "kind", "in", "out", "edges", "density"),
    *("degree in", "degree out", "unused", "parts"),
    *("first", "second", "bound", "Ramanujan"),
)
WIDTHS = (
    *("36", "14", ">5", ">5", ">10", ">7"),
    *(">11", ">11", ">7", ">5", ">6", ">15", ">6", ">9"),
)


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
    # Dense layers of equal shape, and the same layer for all seeds, share one graph.
    measure_once = functools.cache(
        lambda shape, data: graphs.measure(np.frombuffer(data, bool).reshape(shape))
    )
    found = {}
    for seed in range(config.net.graph_seed, config.net.graph_seed + graph_seeds):
        nets.configure(net, graph_seed=seed)
        for path, (kind, graph) in graphs.of(net).items():
            _, measures = found.setdefault(path, (kind, []))
            measures.append(measure_once(graph.shape, graph.tobytes()))
    rank = lambda item: order.index(item[0].partition("[")[0])
    return dict(sorted(found.items(), key=rank))


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
        show_range(values["in_channels"]),
        show_range(values["out_channels"]),
        f"{seeds[0].edges:,}",
        f"{seeds[0].density:.4f}",
        show_range(values["min_in_degree"] + values["max_in_degree"]),
        show_range(values["min_out_degree"] + values["max_out_degree"]),
        f"{show_range(values['unused_inputs'])}/{show_range(values['unused_outputs'])}",
        show_range(values["components"]),
        f"{seeds[0].first:.4f}",
        spread,
        "" if bound is None else f"{bound:.4f}",
        f"{ramanujan}/{count}" if count > 1 else ("yes" if ramanujan else "no"),
    )


def main(_):
    config, seeds = flags.FLAGS.config, flags.FLAGS.graph_seeds
    try:
        if flags.FLAGS.out:
            twins.check_image(flags.FLAGS.out)
        found = layers(config, seeds)
        if flags.FLAGS.csv:
            rows = csv_rows(found, config.net.graph_seed)
            write_text(flags.FLAGS.csv, as_csv(rows))
        rows = (table_row(layer, *measures) for layer, measures in found.items())
        summary.show(HEADER, rows, WIDTHS)
        print()
        _compare(config, seeds)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _compare(config, seeds: int) -> None:
    compared = []
    for twin in twins.compare(config, seeds):  # the net itself comes first
        if isinstance(twin, str):
            print(twin, flush=True)
            continue
        if not compared:
            found = twin.paths[0]
            sources, channels = found.counts.shape
            print(
                f"paths from {sources} output channels of {found.source} to {channels} "
                f"input channels of {found.last}"
            )
            summary.print_row(twins.HEADER, twins.WIDTHS)
        compared.append(twin)
        summary.print_row(twins.row(twin), twins.WIDTHS)
    if flags.FLAGS.paths_csv:
        seed = config.net.graph_seed
        rows = [row for twin in compared for row in twins.csv_rows(twin, seed)]
        write_text(flags.FLAGS.paths_csv, as_csv(rows))
    if flags.FLAGS.out:
        name = f"{config.net.name} {config.variant}"
        twins.write_image(flags.FLAGS.out, name, compared)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; the first argument may be the value of --config."""
    if argv[1:] and not argv[1].startswith("-"):
        argv = [argv[0], f"--config={argv[1]}", *argv[2:]]
    return command_line.parse(argv)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/FAMILY.py[:VARIANT,DATA]")
    flags.DEFINE_integer("graph_seeds", 1, "number of graph seeds", lower_bound=1)
    flags.DEFINE_string("csv", None, "file for one row per layer and graph seed")
    flags.DEFINE_string("paths_csv", None, "file for paths by wiring, seed and layer")
    flags.DEFINE_string("out", None, "image of reach by depth and singular values")
    app.run(main, flags_parser=parse)
