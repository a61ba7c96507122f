"""Draws the connections of one layer under each wiring.

python -m analysis.wiring --out=wiring.png
"""

import argparse
import sys

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from nets import connectivity

INPUT_COLOUR, OUTPUT_COLOUR, EDGE_COLOUR = "#33658a", "#f26419", "#8d99ae"


def draw(axes: Axes, edges: np.ndarray, shape: tuple[int, int], title: str):
    """Draws inputs above, outputs below and a line for each of the edges (E,)."""
    x = [np.linspace(0, 1, channels) for channels in shape]
    i, o = np.divmod(edges, shape[1])
    ends = np.stack([np.stack([x[0][i], 1 + 0 * i], 1), np.stack([x[1][o], 0 * o], 1)])
    lines = LineCollection(ends.swapaxes(0, 1), colors=EDGE_COLOUR, linewidths=0.6)
    axes.add_collection(lines)
    for y, side, colour, row in (
        (1, x[0], INPUT_COLOUR, "inputs"),
        (0, x[1], OUTPUT_COLOUR, "outputs"),
    ):
        axes.scatter(side, np.full(len(side), y), s=28, color=colour, zorder=2)
        axes.text(-0.04, y, row, color=colour, fontsize=10, ha="right", va="center")
    degrees = np.bincount(o, minlength=shape[1])
    spread = " to ".join(map(str, sorted({degrees.min(), degrees.max()})))
    count = f"{len(edges)} of {shape[0] * shape[1]} connections, {spread} per output"
    axes.set_title(f"{title}\n{count}", fontsize=10)
    axes.set_xlim(-0.2, 1.05)  # room for the names of the rows
    axes.set_ylim(-0.15, 1.15)
    axes.axis("off")


def figure(in_channels: int, out_channels: int, degree: int, seed: int) -> Figure:
    """Draws dense, grouped and both expander rules for one layer, at equal degree."""
    shape = (in_channels, out_channels)
    graphs = {
        "dense": np.arange(in_channels * out_channels),
        "grouped": connectivity.connect_groups(*shape, groups=in_channels // degree),
    }
    for sampling in ("per_output", "per_input"):
        rng = connectivity.make_layer_rng(seed, sampling)
        side = sampling.removeprefix("per_")
        graphs[f"expander, each {side} draws {degree}"] = connectivity.draw_expander(
            *shape, degree, sampling, rng
        )
    canvas = Figure(figsize=(10, 5), layout="constrained")
    axes = canvas.subplots(2, 2)
    for axis, (title, edges) in zip(axes.flat, graphs.items(), strict=True):
        draw(axis, edges, shape, title)
    return canvas


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
