"""Draws the connections of one layer under each wiring.

python -m analysis.wiring --out=wiring.png
python -m analysis.wiring --wirings interleaved gradual cross_layer --out=wiring.png
"""

import argparse
import functools
import sys
from collections.abc import Sequence

import numpy as np
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from analysis import graphs
from nets import connectivity
from nets.layers.interleaved import InterleavedConv

INPUT_COLOUR, OUTPUT_COLOUR, EDGE_COLOUR = "#33658a", "#f26419", "#8d99ae"
TITLES = {
    "dense": "dense",
    "grouped": "grouped",
    "per_output": "expander, each output draws {degree}",
    "per_input": "expander, each input draws {degree}",
    "block": "expander, blocks of 2",
    "ramanujan": "Ramanujan expander",
}
SOURCES = 4  # earlier layers in the picture of a cross-layer connection


def draw(axes: Axes, edges: np.ndarray, shape: tuple[int, int], title: str) -> None:
    """Draws inputs above, outputs below and a line for each of the edges (E,)."""
    graph = connectivity.to_matrix(edges, *shape)
    spread = graphs.show_range(graph.sum(0), " to ")
    count = f"{graph.sum()} of {graph.size} connections, {spread} per output"
    _connect(axes, graph, 1, 0)
    _place(axes, shape[0], 1, "inputs", INPUT_COLOUR)
    _place(axes, shape[1], 0, "outputs", OUTPUT_COLOUR)
    _finish(axes, f"{title}\n{count}")


def _connect(axes: Axes, graph: np.ndarray, top: float, bottom: float, **style):
    """Draws the edges of a boolean (in, out) matrix from one height to another."""
    i, o = np.nonzero(graph)
    x = [np.linspace(0, 1, channels) for channels in graph.shape]
    starts = np.stack([x[0][i], np.full(len(i), top)], 1)
    ends = np.stack([x[1][o], np.full(len(o), bottom)], 1)
    style = dict(colors=EDGE_COLOUR, linewidths=0.6) | style
    axes.add_collection(LineCollection(np.stack([starts, ends], 1), **style))


def _place(axes: Axes, channels: int, y: float, name: str, colours) -> None:
    """Draws a row of channels and its name."""
    x, y_all = np.linspace(0, 1, channels), np.full(channels, y)
    axes.scatter(x, y_all, s=28, c=colours, zorder=2)
    colour = colours if isinstance(colours, str) else "black"
    axes.text(-0.04, y, name, color=colour, fontsize=10, ha="right", va="center")


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlim(-0.2, 1.05)  # room for the names of the rows
    axes.set_ylim(-0.15, 1.15)
    axes.axis("off")


def _equal(shape: tuple[int, int], wiring: str) -> int:
    inputs, outputs = shape
    if inputs != outputs:
        raise ValueError(
            f"{wiring} keep the number of channels, got {inputs} -> {outputs}: choose "
            "equal --in_channels and --out_channels"
        )
    return inputs


def draw_graph(
    axes: Axes, shape: tuple[int, int], degree: int, seed: int, wiring: str
) -> None:
    """Draws a layer of one graph, one of TITLES."""
    if wiring in ("dense", "grouped"):
        groups = 1 if wiring == "dense" else shape[0] // degree
        edges = connectivity.connect_groups(*shape, groups)
    else:
        sampling, block = ("per_output", 2) if wiring == "block" else (wiring, 1)
        rng = connectivity.make_layer_rng(seed, sampling)
        edges = connectivity.draw_expander(*shape, degree, sampling, rng, block)
    draw(axes, edges, shape, TITLES[wiring].format(degree=degree))


def draw_interleaved(axes: Axes, shape: tuple[int, int], degree: int, seed: int):
    """Draws an interleaved pair whose primary groups have `degree` inputs each."""
    groups = shape[0] // degree
    sizes = dict(primary_groups=groups, secondary_groups=shape[1] // groups)
    pair = nnx.eval_shape(lambda: InterleavedConv(*shape, 1, **sizes, rngs=nnx.Rngs(0)))
    primary, secondary = (graph for _, graph in graphs.of(pair).values())
    _connect(axes, primary, 1, 0.5)
    _connect(axes, secondary, 0.5, 0)
    _place(axes, shape[0], 1, "inputs", INPUT_COLOUR)
    _place(axes, shape[1], 0.5, "between", EDGE_COLOUR)
    _place(axes, shape[1], 0, "outputs", OUTPUT_COLOUR)
    count = f"{primary.sum()} + {secondary.sum()} connections"
    spread = graphs.show_range((primary.astype(int) @ secondary).ravel(), " to ")
    paths = f"{spread} path{'' if spread == '1' else 's'}"
    _finish(axes, f"interleaved\n{count}, {paths} from each input to each output")


def draw_gradual(axes: Axes, shape: tuple[int, int], degree: int, seed: int) -> None:
    """Draws the updates of segments of `degree` channels, one after another."""
    channels = _equal(shape, "gradual updates")
    steps = channels // degree
    heights = np.linspace(1, 0, steps + 1)
    segment = np.arange(channels) // degree
    for step in range(steps):
        ends = heights[step], heights[step + 1]
        updated = segment == step
        _connect(axes, np.broadcast_to(updated, (channels, channels)), *ends)
        _connect(axes, np.diag(~updated), *ends, linestyles=":")
    for step, y in enumerate(heights):
        colours = np.where(segment < step, OUTPUT_COLOUR, INPUT_COLOUR)
        name = f"update {step}" if step else "inputs"
        _place(axes, channels, y, name, colours)
    _finish(axes, f"gradual updates of {steps} segments\neach reads those before it")


def draw_cross_layer(axes: Axes, shape: tuple[int, int], degree: int, seed: int):
    """Draws the connections from earlier layers to the input of the next layer."""
    channels = _equal(shape, "cross-layer connections")
    heights = np.linspace(1, 0, SOURCES + 1)
    x = np.linspace(0, 1, channels)
    t = np.linspace(0, 1, 30)
    for y in heights[:-1]:
        bend = 0.5 * (y - heights[-2]) / channels  # so that none hides another
        curve = 4 * bend * t * (1 - t)
        lines = [np.stack([centre + curve, y * (1 - t)], 1) for centre in x]
        lines = LineCollection(lines, colors=EDGE_COLOUR, linewidths=0.8)
        axes.add_collection(lines)
        number = round((1 - y) * SOURCES) + 1
        _place(axes, channels, y, f"layer {number}", INPUT_COLOUR)
    _place(axes, channels, 0, "next input", OUTPUT_COLOUR)
    count = f"{SOURCES} x {channels} connections, no channel meets another"
    _finish(axes, f"cross-layer, {SOURCES} earlier layers\n{count}")


WIRINGS = {name: functools.partial(draw_graph, wiring=name) for name in TITLES} | {
    "interleaved": draw_interleaved,
    "gradual": draw_gradual,
    "cross_layer": draw_cross_layer,
}
USUAL = ("dense", "grouped", "per_output", "per_input")


def figure(
    in_channels: int,
    out_channels: int,
    degree: int,
    seed: int,
    wirings: Sequence[str] = USUAL,
) -> Figure:
    """Draws one layer under some of WIRINGS, in two columns.

    degree: connections of each channel in sparse graphs; channels of a group.
    Raises ValueError if a wiring does not exist for these sizes.
    """
    columns = min(2, len(wirings))
    rows = -(-len(wirings) // columns)
    canvas = Figure(figsize=(5 * columns, 2.5 * rows), layout="constrained")
    for number, wiring in enumerate(wirings, start=1):
        axes = canvas.add_subplot(rows, columns, number)
        WIRINGS[wiring](axes, (in_channels, out_channels), degree, seed)
    return canvas


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wirings", nargs="+", choices=WIRINGS, default=USUAL)
    parser.add_argument("--in_channels", type=int, default=16)
    parser.add_argument("--out_channels", type=int, default=16)
    parser.add_argument("--degree", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="wiring.png", help="image to write")
    options = vars(parser.parse_args())
    out = options.pop("out")
    for name, least in (("in_channels", 1), ("out_channels", 1), ("seed", 0)):
        if options[name] < least:
            parser.error(f"--{name} must be at least {least}, got {options[name]}")
    channels, degree = options["in_channels"], options["degree"]
    if degree < 1 or channels % degree:
        parser.error(f"--degree must divide --in_channels={channels}, got {degree}")
    try:
        figure(**options).savefig(out, dpi=120)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
