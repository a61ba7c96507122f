"""Tensor names of GUNN. Torch7 has no names, so these are positions in the module tree.

Positions count from 1: "7.3.1.2.4.weight" is the 3x3 convolution of segment 3 of the
first layer. The original has separate tensors per segment; our units stack them.
"""

import functools
from collections.abc import Collection, Mapping

import numpy as np
from flax import nnx

from configs.gunn import VARIANTS
from convert.sources import TORCH_LEAVES, Path, Reference, Source, by_layer
from nets.gunn import Gunn
from nets.layers.gradual import unstack

# Positions in the bottleneck, and in the projection beside it.
BOTTLENECK = {"conv1": 1, "norm1": 2, "conv2": 4, "norm2": 5, "conv3": 7, "norm3": 8}
PROJECTION = {"projection": 1, "projection_norm": 2}


def _section(config: Mapping) -> dict:
    config = dict(config)
    depth, wide = config.pop("depth"), config.pop("wide", False)
    variant = f"wide-{depth}" if wide else str(depth)
    if variant not in VARIANTS:
        raise ValueError(f"unknown GUNN {variant!r}: choose from {', '.join(VARIANTS)}")
    net = VARIANTS[variant].net
    form = "imagenet" if config.pop("dataset") == "imagenet" else "cifar"
    # In the original, the data set alone decides the shortcuts.
    shortcuts = ("none",) if form == "imagenet" else ("projection",)
    section = dict(
        name="gunn",
        form=form,
        channels=config.pop("channels", net["channels"]),
        segments=config.pop("segments", net["segments"]),
        expansion=net.get("expansion", 2),
        num_classes=config.pop("num_classes"),
    )
    if depth == 24:  # derived: all other fields are ignored
        shortcuts += (config.pop("second_shortcut", "projection"),)
    elif config:
        raise ValueError(f"GUNN-{depth} has no field {sorted(config)}")
    return section | dict(shortcuts=shortcuts)


def _refine(section: Mapping, names: Collection[str]) -> dict:
    """Sets GUNN-24's second shortcut to the one whose tensors exist.

    This net is derived: no original configuration defines the choice.
    """
    if len(section["shortcuts"]) == 1 or section["form"] == "imagenet":
        return dict(section)
    second = [n for n in names if n.startswith("7.1.2.") and n.endswith(".weight")]
    kind = "projection" if len(second) > len(BOTTLENECK) else "identity"
    return section | dict(shortcuts=("projection", kind))


def sources(net: Gunn) -> dict[Path, Source]:
    """Returns the source of each variable of a net."""
    rest = nnx.clone(net)
    rest.layers = nnx.List()
    found = by_layer(rest, functools.partial(_name, net))
    for i, layer in enumerate(net.layers):
        name = functools.partial(layer_name, layer.units, f"{_positions(net)[i][1]}.")
        stacked = layer_sources(layer.units, name)
        found |= {("layers", i, "units", *path): s for path, s in stacked.items()}
    return found


def layer_sources(units: nnx.Module, name) -> dict[Path, Source]:
    """Returns the sources of stacked units, by their paths below `units`.

    name: (segment, path of a variable, its layer) -> name of the reference tensor.
    """
    each = [
        by_layer(unit, functools.partial(name, segment))
        for segment, unit in enumerate(unstack(units))
    ]
    return {path: _stack([sources[path] for sources in each]) for path in each[0]}


def layer_name(units, prefix: str, segment: int, path: Path, layer) -> str:
    """Returns the tensor name of a unit's variable. prefix: the layer's, with a dot."""
    _, index, part, leaf = path
    position = [segment + 1]
    if len(units.bottlenecks) > 1:
        position.append(index + 1)
    if units.bottlenecks[index].shortcut != "none":  # two branches, 1 and 2
        position += [1, 1 if part in PROJECTION else 2]
    position.append((PROJECTION | BOTTLENECK)[part])
    return f"{prefix}{'.'.join(map(str, position))}.{TORCH_LEAVES[leaf]}"


def _positions(net: Gunn) -> list[tuple[int, int]]:
    """Returns the positions of each stage's first transition module and of its layer.

    Pooling precedes the transition (ImageNet) or follows it (CIFAR).
    """
    stages = range(len(net.layers))
    if net.imagenet:
        return [(5 + 5 * stage, 8 + 5 * stage) for stage in stages]
    return [(3 + 5 * stage + (not stage), 7 + 5 * stage) for stage in stages]


def _name(net: Gunn, path: Path, layer: nnx.Module) -> str:
    last_layer = _positions(net)[-1][1]
    match path[:-1]:
        case ("stem" | "stem_norm" as part,):
            position = 1 + (part == "stem_norm")
        case ("transitions", stage, part):
            position = _positions(net)[stage][0] + (part == "norm")
        case ("last", part):
            position = last_layer + 1 + (part == "norm")
        case ("classifier",):
            position = last_layer + (3 if net.imagenet else 6)
        case _:
            raise LookupError(f"unknown GUNN layer {path}")
    return f"{position}.{TORCH_LEAVES[path[-1]]}"


def _stack(sources: list[Source]) -> Source:
    """Combines the sources of slices into the source of the stacked variable."""

    def join(*tensors):
        size = len(tensors) // len(sources)
        pieces = [tensors[i * size : (i + 1) * size] for i in range(len(sources))]
        return np.stack(
            [s.join(*piece) for s, piece in zip(sources, pieces, strict=True)]
        )

    def split(value):
        pieces = zip(sources, value, strict=True)
        return {k: v for source, x in pieces for k, v in source.split(x).items()}

    shapes = {k: v for source in sources for k, v in source.shapes.items()}
    return Source(shapes, join, split)


REFERENCES = {"gunn": Reference(Gunn, _section, sources, refine=_refine)}
