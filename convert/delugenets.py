"""Tensor names of DelugeNets. Lua modules have no names, so these are ours.

The original stores running statistics per reader of a feature map, our net once per
map. All readers have the same statistics after training. In train mode, the weights are
loaded unchanged. In eval mode, a map takes the statistics of its last reader; weight
and bias of every other reader absorb the difference:
w (x - m) / s + b = w' (x - m') / s' + b', w' = w s' / s, b' = b + w (m' - m) / s.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from configs.delugenets import VARIANTS
from convert.sources import TORCH_LEAVES, Path, Reference, Source, by_layer
from nets.delugenet import CompositeLayer, DelugeNet

EPS = 1e-5  # of all normalisations
CROSS_LEAVES = ("scale", "bias", "mean", "var")
PARTS = ("cross", "bn", "bn1", "conv", "conv1", "bn2", "conv2", "bn3", "conv3", "fc")


class Reader(NamedTuple):
    """A cross-layer convolution: its path, name and channels.

    norms: paths of the normalisations of its source maps, the oldest first.
    """

    path: Path
    name: str
    channels: int
    norms: tuple[Path, ...]

    def shapes(self, *leaves: str) -> dict[str, tuple[int, int]]:
        """Returns {name: shape} of tensors of this reader in the original."""
        shape = (self.channels, len(self.norms))
        return {f"{self.name}.{TORCH_LEAVES[leaf]}": shape for leaf in leaves}

    def column(self, norm: Path) -> int:
        """Returns a source's column in the original, which counts from the newest."""
        return len(self.norms) - 1 - self.norms.index(norm)


def sources_of(net: DelugeNet) -> dict[Path, Source]:
    """Returns the source of each variable; eval mode folds differing statistics."""
    layers = by_layer(net, lambda path, _: name(net, path))
    return layers | cross_layers(readers(net), folded=net.norm.use_running_average)


def name(net: DelugeNet, path: Path) -> str:
    """Returns the tensor name of a variable. Raises LookupError for an unknown path."""
    # If a block has no transition, its opening is layer 1.
    opening_is_layer = [isinstance(x.opening, CompositeLayer) for x in net.blocks]
    match path[:-1]:
        case ("blocks", block, "norms", source):
            # A placeholder: cross_layers defines the sources of these statistics.
            where = f"block{block + 1}.source{source + 1}"
        case ("blocks", block, "layers", layer, part):
            number = layer + 1 + opening_is_layer[block]
            where = f"block{block + 1}.layer{number}.{part}"
        case ("blocks", block, "opening", part):
            unit = "layer1" if opening_is_layer[block] else "trans"
            where = f"block{block + 1}.{unit}.{part}"
        case ("stem",):
            where = "stem.conv"
        case ("stem_norm",):
            where = "stem.bn"
        case ("cross" | "norm" as part,):
            where = f"head.{part}"
        case ("classifier",):
            where = "head.fc"
        case _:
            raise LookupError(f"unknown DelugeNet layer {path}")
    return f"{where.replace('norm', 'bn')}.{TORCH_LEAVES[path[-1]]}"


def readers(net: DelugeNet) -> list[Reader]:
    """Returns all cross-layer convolutions of a net, in the order of computation."""
    found = []
    for i, block in enumerate(net.blocks):
        norms = tuple(("blocks", i, "norms", k) for k in range(len(block.norms)))
        paths = [("blocks", i, "layers", k, "cross") for k in range(len(block.layers))]
        closing = ("blocks", i + 1, "opening", "cross")
        paths.append(closing if i + 1 < len(net.blocks) else ("cross",))
        channels = block.norms[0].mean.shape[0]
        # The first layer of a block has one source and no cross-layer convolution.
        for count, path in enumerate(paths[1:], start=2):
            module = name(net, (*path, "scale")).removesuffix(".weight")
            found.append(Reader(path, module, channels, norms[:count]))
    return found


def cross_layers(readers: list[Reader], folded: bool) -> dict[Path, Source]:
    """Returns the sources of the readers' weights and of their maps' statistics.

    folded: whether weights absorb differences of statistics (docstring of this file).
    """
    of_norm = {}
    for reader in readers:
        for norm in reader.norms:
            of_norm.setdefault(norm, []).append(reader)
    sources = {
        (*norm, leaf): _statistic(norm, of_norm[norm], leaf)
        for norm in of_norm
        for leaf in ("mean", "var")
    }
    for reader in readers:
        last = {norm: of_norm[norm][-1] for norm in reader.norms}
        for leaf in ("scale", "bias"):
            plain = _weight(reader, leaf)
            fold = folded and set(last.values()) != {reader}
            sources[*reader.path, leaf] = (
                _fold(reader, last, leaf, plain) if fold else plain
            )
    return sources


def _weight(reader: Reader, leaf: str) -> Source:
    """Maps (channels, newest to oldest source) to (oldest to newest, channels)."""
    shapes = reader.shapes(leaf)
    (name,) = shapes
    return Source(
        shapes, lambda tensor: tensor.T[::-1], lambda value: {name: value[::-1].T}
    )


def _statistic(norm: Path, readers: list[Reader], leaf: str) -> Source:
    """Joins to the column of the last reader; splits to the columns of all readers."""

    def split(value):
        columns = {}
        for reader in readers:
            for name, shape in reader.shapes(leaf).items():
                columns[name] = np.zeros(shape, value.dtype)
                columns[name][:, reader.column(norm)] = value
        return columns

    return Source(
        {k: v for reader in readers for k, v in reader.shapes(leaf).items()},
        lambda *tensors: tensors[-1][:, readers[-1].column(norm)],
        split,
    )


def _fold(
    reader: Reader, last: Mapping[Path, Reader], leaf: str, plain: Source
) -> Source:
    """Joins as if the reader had the last reader's statistics; splits unchanged."""
    shapes = reader.shapes(*CROSS_LEAVES)
    for other in last.values():
        shapes |= other.shapes("mean", "var")

    def join(*tensors):
        tensors = dict(zip(shapes, tensors, strict=True))
        scale, bias, mean, var = (
            tensors[name].T[::-1] for name in reader.shapes(*CROSS_LEAVES)
        )
        last_mean, last_var = (
            np.stack(
                [
                    tensors[name][:, last[norm].column(norm)]
                    for norm in reader.norms
                    for name in last[norm].shapes(statistic)
                ]
            )
            for statistic in ("mean", "var")
        )
        if leaf == "scale":  # unchanged to the bit if the statistics are the same
            return scale * np.sqrt((last_var + EPS) / (var + EPS))
        return bias + scale / np.sqrt(var + EPS) * (last_mean - mean)

    return Source(shapes, join, plain.split)


def order(layer: str) -> tuple:
    """Returns the rank of a layer in the module tree."""
    if layer.startswith("stem"):
        return (0, layer == "stem.bn")
    where, part = layer.rsplit(".", 1)
    if where == "head":
        return (2, PARTS.index(part))
    block, unit = where.split(".")
    index = 0 if unit == "trans" else int(unit.removeprefix("layer"))
    return (1, int(block.removeprefix("block")), index, PARTS.index(part))


def _section(config: Mapping) -> dict:
    config = dict(config)
    form = "imagenet" if config.pop("dataset") == "imagenet" else "cifar"
    if "depth" in config:
        depth = str(config.pop("depth"))
        if depth not in VARIANTS:
            raise ValueError(
                f"unknown DelugeNet depth {depth}: choose from {', '.join(VARIANTS)}, "
                "or set `layers`"
            )
        config["layers"] = VARIANTS[depth].net["layers"]
    config["layers"] = tuple(config["layers"])
    return {"name": "delugenet", "form": form, **config}


REFERENCES = {"delugenet": Reference(DelugeNet, _section, sources_of, order=order)}
