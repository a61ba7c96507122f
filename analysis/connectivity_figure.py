"""Draws reach by depth and singular values, one column of panels for each wiring."""

import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BINS = np.linspace(0, 1.0001, 41)


class Panel(NamedTuple):
    """What a figure shows of one wiring.

    reach: share of the channels of each layer that see a source channel, (source
      channels, layers).
    values: the singular values of one layer; bound: that of its mean degrees.
    """

    title: str
    reach: np.ndarray
    values: np.ndarray
    bound: float


def check(path: str | os.PathLike) -> None:
    """Raises ValueError if the suffix of a path is not that of an image format."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if pathlib.Path(path).suffix[1:] not in formats:
        raise ValueError(
            f"--out={path} does not end in a known image format: choose from "
            f"{', '.join(f'.{name}' for name in sorted(formats))}"
        )


def draw(name: str, layer: str, panels: Sequence[Panel]):
    """Returns a matplotlib figure: heat maps above, histograms below.

    name: of the net. layer: the path of the layer with these singular values.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(3.2 * len(panels), 6.2), layout="constrained")
    figure.suptitle(name)
    axes = figure.subplots(2, len(panels), sharey="row", squeeze=False)
    # Later layers see everything, or as much as these.
    depth = panels[0].reach.shape[1]
    shown = min(depth, max(_first_constant(panel.reach) for panel in panels) + 3)
    for (heat, histogram), panel in zip(axes.T, panels, strict=True):
        image = heat.imshow(
            panel.reach[:, :shown],
            aspect="auto",
            interpolation="nearest",
            extent=(0.5, shown + 0.5, len(panel.reach) - 0.5, -0.5),
            vmin=0,
            vmax=1,
        )
        heat.set_title(panel.title, fontsize=10)
        heat.set_xlabel(f"layer, {shown} of {depth}")
        heat.xaxis.set_major_locator(MaxNLocator(integer=True))
        counts, _ = np.histogram(panel.values, BINS)
        histogram.stairs(counts, BINS, fill=True, color="#33658a")
        histogram.axvline(panel.bound, color="#f26419", ls="--", label="bound")
        histogram.set(xlim=(-0.03, 1.03), yscale="symlog", xlabel="singular value")
    axes[0, 0].set_ylabel("output channel of the stem")
    axes[0, 0].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1, 0].set_ylabel(f"singular values of\n{layer}")
    axes[1, 0].legend()
    colours = figure.colorbar(image, ax=axes[0, :].tolist(), pad=0.01)
    colours.set_label("share of the layer's\nchannels that see it")
    return figure


def _first_constant(reach: np.ndarray) -> int:
    """Returns the number of the first layer from which on the columns are equal."""
    different = np.flatnonzero((reach != reach[:, -1:]).any(0))
    return int(different[-1]) + 2 if len(different) else 1


def write(path: str | os.PathLike, *drawn) -> None:
    """Writes an image of `draw`. A kill leaves either the old file or the new."""
    path = pathlib.Path(path)
    draft = path.with_name(f".{path.name}.draft")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(*drawn).savefig(draft, format=path.suffix[1:], dpi=120)
    draft.replace(path)
