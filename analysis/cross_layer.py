"""Draws what each layer of a trained DelugeNet reads from the earlier ones.

python -m analysis.cross_layer WORKDIR --out=cross_layer.png
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

import train
from nets.delugenet import DelugeNet
from nets.layers.cross_layer import CrossLayer


def relative_weights(cross: CrossLayer) -> np.ndarray:
    """Returns the mean weight of each source (sources,), relative to the plain average.

    The share of a source in a channel is its |scale| divided by the sum over sources,
    because a batch normalisation removes the norm. The shares are averaged over
    channels and multiplied by the number of sources: untrained, all are 1.
    """
    scale = np.abs(np.asarray(cross.scale[...], np.float64))
    total = scale.sum(0)
    used = total > 0
    if not used.any():
        raise ValueError("all weights of a cross-layer convolution are zero")
    return len(scale) * (scale[:, used] / total[used]).mean(1)


def weights(net: DelugeNet) -> list[np.ndarray]:
    """Returns (readers, sources) of each block, with NaN for later sources.

    Readers are the layers of the block and, last, what follows it. Sources are the
    opening of the block and the outputs of its layers.
    Raises ValueError if the net has no cross-layer connections.
    """
    blocks = getattr(net, "blocks", ())
    if not isinstance(net, DelugeNet) or any(block.norms is None for block in blocks):
        raise ValueError(
            f"a {type(net).__name__} without cross-layer connections has no such "
            "weights; choose a run of configs/delugenets.py"
        )
    following = [block.opening.cross for block in blocks[1:]] + [net.cross]
    found = []
    for block, after in zip(blocks, following, strict=True):
        readers = [*(layer.cross for layer in block.layers), after]
        matrix = np.full((len(readers), len(block.norms)), math.nan)
        for row, cross in zip(matrix, readers, strict=True):
            # The first layer of a block has one source and thus no weights.
            known = np.ones(1) if cross is None else relative_weights(cross)
            row[: len(known)] = known
        found.append(matrix)
    return found


def figure(matrices: Sequence[np.ndarray], title: str) -> Figure:
    """Draws the weights of each block as a heat map."""
    canvas = Figure(figsize=(4.2 * len(matrices) + 1, 4.8), layout="constrained")
    canvas.suptitle(title)
    axes = canvas.subplots(1, len(matrices), squeeze=False)[0]
    limit = max(np.nanmax(matrix) for matrix in matrices)
    for number, (axis, matrix) in enumerate(zip(axes, matrices, strict=True), 1):
        image = axis.imshow(matrix, vmin=0, vmax=limit)
        readers = [f"layer {i}" for i in range(1, len(matrix))]
        last = "classifier" if number == len(matrices) else "transition"
        axis.set_yticks(range(len(matrix)), [*readers, last])
        sources = ["opening", *map(str, range(1, matrix.shape[1]))]
        axis.set_xticks(range(matrix.shape[1]), sources, rotation=90)
        axis.set_title(f"block {number}")
        axis.set_xlabel("source")
    axes[0].set_ylabel("reader")
    bar = canvas.colorbar(image, ax=axes.tolist(), pad=0.01)
    bar.set_label("weight relative to the plain average")
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--which", default="best", help="best, last or a step")
    parser.add_argument("--out", default="cross_layer.png", help="image to write")
    options = parser.parse_args()
    try:
        net, _ = train.restore(options.workdir, options.which)
        title = "Weights of the cross-layer connections"
        figure(weights(net), title).savefig(options.out, dpi=120)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
