"""Graphs between the channels of two layers, as numpy arrays.

A graph between I input and O output channels is the sorted vector of its edges. An
edge is the flat index `input * O + output`, the row-major position of the connection
in a dense (I, O) matrix.

With `block` > 1, the graph is drawn between blocks of consecutive channels, and an edge
between two blocks connects all of their channels. Degrees still count channels.
"""

import math
import zlib
from typing import Literal, get_args

import numpy as np

from nets import ramanujan

Sampling = Literal["smaller_side", "per_output", "per_input", "ramanujan"]


def sampled_side(in_channels: int, out_channels: int, sampling: Sampling) -> str:
    """Returns the side, 'input' or 'output', whose channels draw their partners.

    smaller_side: the latest published code (Deep-Expander-Networks, layers); inputs
      draw if the sides are equal.
    per_output: the paper and earlier published code.
    per_input: the "reverse" convolution in earlier published code.
    ramanujan: not random, regular on both sides; the degree is that of an output
      (nets/ramanujan.py).
    """
    if sampling not in get_args(Sampling):
        raise ValueError(
            f"unknown sampling rule {sampling!r}: choose from "
            f"{', '.join(get_args(Sampling))}"
        )
    if sampling == "smaller_side":
        return "output" if in_channels > out_channels else "input"
    return "output" if sampling == "ramanujan" else sampling.removeprefix("per_")


def num_edges(
    in_channels: int, out_channels: int, degree: int, sampling: Sampling, block: int = 1
) -> int:
    """Returns the number of edges.

    Raises ValueError if `degree` is out of range, if `block` does not divide it and
    both numbers of channels, or if no Ramanujan graph has these sizes.
    """
    _check_block(in_channels, out_channels, degree, block)
    side = sampled_side(in_channels, out_channels, sampling)
    drawing, partners = in_channels, out_channels
    if side == "output":
        drawing, partners = out_channels, in_channels
    if not 1 <= degree <= partners:
        raise ValueError(
            f"expander degree must be in 1..{partners}, got {degree}: each {side} "
            f"channel of {in_channels} -> {out_channels} draws from {partners} "
            "partners; choose another net.wiring.compress or other widths"
        )
    if sampling == "ramanujan":
        sizes = (in_channels, out_channels, degree)
        ramanujan.check(*(size // block for size in sizes), block)
    return drawing * degree


def _check_block(in_channels: int, out_channels: int, degree: int, block: int) -> None:
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if in_channels % block or out_channels % block:
        raise ValueError(
            f"blocks of {block} channels do not divide an expander of {in_channels} -> "
            f"{out_channels} channels: net.wiring.block must divide "
            f"{math.gcd(in_channels, out_channels)}"
        )
    if degree % block:
        raise ValueError(
            f"blocks of {block} channels do not divide the expander degree {degree}: "
            f"choose a multiple of {block}"
        )


def draw_expander(
    in_channels: int,
    out_channels: int,
    degree: int,
    sampling: Sampling,
    rng,
    block: int = 1,
) -> np.ndarray:
    """Returns the edges (E,) int32 of a graph.

    It is random and regular on the sampled side only, unless sampling is "ramanujan".

    Each channel of that side, in order, connects to the first `degree` entries of
    `rng.permutation(partners)`. The originals draw in the same order, so a numpy
    RandomState reproduces their graphs. Blocks draw blocks in the same way.
    """
    num_edges(in_channels, out_channels, degree, sampling, block)
    if block > 1:
        ends = in_channels // block, out_channels // block
        edges = draw_expander(*ends, degree // block, sampling, rng)
        whole = np.ones((block, block), bool)
        return np.flatnonzero(np.kron(to_matrix(edges, *ends), whole)).astype(np.int32)
    if sampling == "ramanujan":
        return ramanujan.connect(in_channels, out_channels, degree)
    side = sampled_side(in_channels, out_channels, sampling)
    if side == "output":
        inputs = [rng.permutation(in_channels)[:degree] for _ in range(out_channels)]
        edges = np.stack(inputs) * out_channels + np.arange(out_channels)[:, None]
    else:
        outputs = [rng.permutation(out_channels)[:degree] for _ in range(in_channels)]
        edges = np.arange(in_channels)[:, None] * out_channels + np.stack(outputs)
    return np.sort(edges.ravel()).astype(np.int32)


def to_matrix(edges: np.ndarray, in_channels: int, out_channels: int) -> np.ndarray:
    """Returns the graph as a boolean (I, O) matrix."""
    dense = np.zeros(in_channels * out_channels, bool)
    dense[edges] = True
    return dense.reshape(in_channels, out_channels)


def connect_groups(in_channels: int, out_channels: int, groups: int) -> np.ndarray:
    """Returns the edges (E,) of a grouped convolution: input block g feeds block g."""
    for side, channels in (("input", in_channels), ("output", out_channels)):
        if channels % groups:
            raise ValueError(
                f"{groups} groups do not divide {channels} {side} channels"
            )
    blocks = np.ones((in_channels // groups, out_channels // groups), bool)
    return np.flatnonzero(np.kron(np.eye(groups, dtype=bool), blocks)).astype(np.int32)


def make_layer_rng(seed: int, path: str) -> np.random.Generator:
    """Returns the generator that draws a layer's graph from (seed, path) alone."""
    return np.random.default_rng([seed, zlib.crc32(path.encode())])
