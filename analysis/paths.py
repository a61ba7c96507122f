"""Counts the paths that connect channels through a whole net.

A path takes one edge of the channel graph of each layer on its way, and passes
normalisation, activation, pooling, sums, concatenations and shortcuts within its
channel. It starts in a channel of the stem's output: the stem is dense, so an image
channel has as many paths as all channels of the stem together. It ends in a channel
that the last layer, the classifier, reads. Each pixel of AlexNet's last map is a
feature, and so a channel, of its own.

The counts come from the forward code of the net itself. A copy of the net runs on
constant maps, with its layers replaced by their 0-1 matrices, and without
normalisation. Maps hold one channel of the source each, and one digit of a count: the
batch is (digits, source channels). Layers carry, so that the digits stay small enough
to be exact in float64, and the counts are exact integers of any size.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from analysis import graphs
from nets import cost, intermediates
from nets.layers.conv import Conv, Linear
from nets.layers.cross_layer import CrossLayer
from nets.layers.expander import Expander
from nets.layers.gradual import Gradual
from nets.layers.interleaved import InterleavedConv, SecondaryConv
from nets.layers.norm import Activation, BatchNorm, Measured

LAYERS = (Conv, Linear, Expander, SecondaryConv)
WHOLE = (Gradual, InterleavedConv)  # count as one layer each
# A digit is below 2**25 after a carry. Between two carries it may grow by 2**28: the
# inputs of an output times the maps that are summed.
DIGIT = 2**24
# The value of a single path. ReLU6 leaves digits below 2**42 as they are.
UNIT = 2.0**-40
FIRST_DIGITS = 16  # doubled until the counts fit
IMAGE_SIZES = (1, 2, 4, 8, 16, 32, 64)
# Pixels in a batch, so that the maps of a VGG take less than 300 MB.
BATCH_PIXELS = 2**18


@dataclasses.dataclass(frozen=True)
class Count:
    """The paths from each channel of the source to each channel of a layer's output.

    reach: whether there is a path, (source channels, channels) booleans.
    smallest, total, largest: number of paths, over all pairs of channels.
    """

    reach: np.ndarray
    smallest: int
    total: int
    largest: int


@dataclasses.dataclass(frozen=True)
class Paths:
    """The paths through a net.

    source, last: paths of the first and last layer.
    layers: path -> count for each layer between them, in the order of execution. An
      interleaved pair and a Gradual layer count as one layer each.
    counts: number of paths from each output of the first to each input of the last
      layer, (source channels, channels) Python integers.
    """

    source: str
    last: str
    layers: dict[str, Count]
    counts: np.ndarray

    @property
    def depth(self) -> int | None:
        """The number of layers after which every channel sees the whole source.

        Every channel of all later layers sees it, too. None if a channel that the last
        layer reads does not.
        """
        if not np.all(self.counts > 0):
            return None
        gaps = [i for i, x in enumerate(self.layers.values()) if not x.reach.all()]
        # The sum of the last layer and a shortcut may see what the layer does not.
        return min(gaps[-1] + 2, len(self.layers)) if gaps else 1


class Edges(nnx.Module):
    """Replaces a layer: each output is the sum of the inputs that have an edge to it.

    graph: (in, out) matrix of 0 and 1, stacked (units, in, out) in a Gradual layer.
    lost: rows and columns that the window of a convolution loses for lack of padding.
    """

    def __init__(self, graph: np.ndarray, digits: int, *, stride: int, lost: int):
        # A parameter, because Gradual counts its units by their parameters.
        self.kernel = nnx.Param(jnp.asarray(graph, jnp.float64))
        self.digits, self.stride, self.lost = digits, stride, lost

    def __call__(self, x: jax.Array) -> jax.Array:
        return _product(self.subsample(x), self.kernel[...], self.digits)

    def subsample(self, x: jax.Array) -> jax.Array:
        """Gives a map the size of the layer's output."""
        if x.ndim == 2:
            return x
        rows, cols = (size - self.lost for size in x.shape[1:3])
        if min(rows, cols) < 1:
            raise ValueError(f"a map of {x.shape[1:3]} is smaller than a window")
        return x[:, : rows : self.stride, : cols : self.stride]


class Source(nnx.Module):
    """Replaces the first layer: a path in one channel, for each of some channels."""

    def __init__(self, first: Edges, channels: range):
        total = first.kernel.shape[-1]
        one_hot = np.zeros((first.digits, len(channels), total))
        one_hot[0, np.arange(len(channels)), channels] = UNIT
        self.value = nnx.Variable(jnp.asarray(one_hot.reshape(-1, 1, 1, total)))
        self.first = first

    def __call__(self, x: jax.Array) -> jax.Array:
        size = self.first.subsample(x).shape[:-1]
        return jnp.broadcast_to(self.value[...], (*size, self.value.shape[-1]))


class Identity(nnx.Module):
    """Replaces dropout or the last layer."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Concatenation(nnx.Module):
    """Replaces a BatchNorm: does not normalise, but concatenates and adds maps.

    There are no negative values, so a ReLU would change nothing.
    """

    def measure(self, x: jax.Array) -> Measured:
        return Measured(x)

    def coefficients(self, maps: Sequence[Measured]) -> tuple[jax.Array, jax.Array]:
        channels = sum(each.x.shape[-1] for each in maps)
        return jnp.ones(channels), jnp.zeros(channels)

    def __call__(
        self,
        x: jax.Array | Sequence[Measured],
        activation: Activation = None,
        shortcut: jax.Array | None = None,
    ) -> jax.Array:
        if isinstance(x, Sequence):
            x = jnp.concatenate([each.x for each in x], axis=-1)
        return x if shortcut is None else x + shortcut


@functools.partial(jax.jit, static_argnums=2)
def _product(x: jax.Array, graph: jax.Array, digits: int) -> jax.Array:
    """Multiplies, then carries from each digit to the next."""
    y = x @ graph
    y = y.reshape(digits, -1, *y.shape[1:])
    # Nothing leaves the last digit, which must be 0 in the end.
    carry = jnp.floor(y[:-1] / (DIGIT * UNIT))
    y = y.at[:-1].add(-carry * (DIGIT * UNIT)).at[1:].add(carry * UNIT)
    return y.reshape(-1, *y.shape[2:])


def count(net: nnx.Module, image_size: int) -> Paths:
    """Returns the paths through a net.

    net: concrete, or abstract apart from the edges of its expanders. Does not change.
    image_size: rows and columns of an image that the net accepts. A smaller image
      serves as well, unless the net requires one size.
    """
    digits = FIRST_DIGITS
    with jax.enable_x64(True):
        while (paths := _count(net, image_size, digits)) is None:
            digits *= 2
    return paths


def _count(net, image_size, digits) -> Paths | None:
    """Returns the paths, or None if a count has more than `digits` - 1 digits."""
    net = _replace_layers(net, digits)
    size, (first, *inner, last) = _order(net, digits, (*IMAGE_SIZES, image_size))
    shown = _join_parts(net, inner)
    stem = _get(net, first)
    channels = stem.kernel.shape[-1]
    replace(net, last, Identity())
    found = {path: [] for path in (*shown, last)}
    step = max(1, BATCH_PIXELS // (digits * size**2))
    for start in range(0, channels, step):
        chosen = range(start, min(start + step, channels))
        replace(net, first, Source(stem, chosen))
        images = jnp.zeros((digits * len(chosen), size, size, 3))
        maps = intermediates.outputs(net, images)
        for path, parts in found.items():
            counts = _decode(maps[path][-1], digits)
            if counts is None:
                return None
            parts.append(counts if path == last else summarize(counts))
    counts = np.concatenate(found.pop(last))
    return Paths(first, last, {x: _join(found[x]) for x in shown}, counts)


def summarize(counts: np.ndarray) -> Count:
    """Summarizes numbers of paths (source channels, channels)."""
    reach = (counts > 0).astype(bool)
    return Count(reach, counts.min(), counts.sum(), counts.max())


def replace(net: nnx.Module, path: str, module: nnx.Module) -> None:
    """Replaces the module at a path such as "blocks.0.2.conv1"."""
    parent, _, name = path.rpartition(".")
    parent = _get(net, parent)
    if name.isdigit():
        parent[int(name)] = module
    else:
        setattr(parent, name, module)


def _get(net: nnx.Module, path: str) -> nnx.Module:
    for name in path.split(".") if path else ():
        net = net[int(name)] if name.isdigit() else getattr(net, name)
    return net


def _modules(net: nnx.Module) -> dict[str, nnx.Module]:
    return {".".join(map(str, path)): x for path, x in nnx.iter_modules(net)}


def _join_parts(net: nnx.Module, order: list[str]) -> list[str]:
    """Replaces the parts of a layer by the layer itself, in the place of the last."""
    whole = [x for x, m in _modules(net).items() if isinstance(m, WHOLE)]
    layers = [
        min((x for x in whole if path.startswith(f"{x}.")), key=len, default=path)
        for path in order
    ]
    return list(dict.fromkeys(reversed(layers)))[::-1]


def _replace_layers(net: nnx.Module, digits: int) -> nnx.Module:
    net = nnx.merge(*nnx.split(net), copy=True)
    net.eval()
    modules, found = _modules(net), graphs.of(net)
    units = {f"{x}.": m.segments for x, m in modules.items() if isinstance(m, Gradual)}
    for path, module in modules.items():
        if isinstance(module, LAYERS):
            copies = [n for inside, n in units.items() if path.startswith(inside)]
            if path not in found:  # a stack of expanders
                graph = np.stack([found[f"{path}[{i}]"][1] for i in range(copies[0])])
            else:
                graph = found[path][1]
                graph = np.broadcast_to(graph, (*copies, *graph.shape))
            stride = getattr(module, "stride", 1)
            edges = Edges(graph, digits, stride=stride, lost=_lost(module))
            replace(net, path, edges)
        elif isinstance(module, nnx.Dropout):
            replace(net, path, Identity())
        elif isinstance(module, BatchNorm):
            replace(net, path, Concatenation())
        elif isinstance(module, CrossLayer):
            module.scale.set_value(jnp.ones(module.scale.shape))
            module.bias.set_value(jnp.zeros(module.bias.shape))
        elif any(isinstance(x, nnx.Param) for x in vars(module).values()):
            raise ValueError(
                f"{path} is a {type(module).__name__}, whose paths are unknown: add it "
                "to analysis/paths.py"
            )
    return net


def _lost(module: nnx.Module) -> int:
    if not hasattr(module, "padding"):
        return 0
    axis = -3 if isinstance(module, Expander) else -4
    window = (module.kernel.shape[axis] - 1) * getattr(module, "dilation", 1)
    return max(0, window - 2 * module.padding)


def _order(net, digits: int, sizes) -> tuple[int, list[str]]:
    """Returns the first image size that the net accepts, and its layers in order."""
    for size in sizes:
        try:
            layers = cost.layers(net, (digits, size, size, 3))
            return size, [x.path for x in layers if x.kind == Edges.__name__]
        except ValueError:
            if size == sizes[-1]:
                raise


def _decode(x: jax.Array, digits: int) -> np.ndarray | None:
    """Returns the numbers of paths (source channels, channels), or None: overflow."""
    x = np.asarray(x) / UNIT
    x = x[:, 0, 0] if x.ndim == 4 else x
    x = x.reshape(digits, -1, x.shape[-1])
    if x[-1].any():
        return None
    total = np.zeros(x.shape[1:], object)
    for digit in x[::-1]:
        total = total * DIGIT + digit.astype(np.int64).astype(object)
    return total


def _join(parts: list[Count]) -> Count:
    return Count(
        np.concatenate([part.reach for part in parts]),
        min(part.smallest for part in parts),
        sum(part.total for part in parts),
        max(part.largest for part in parts),
    )
