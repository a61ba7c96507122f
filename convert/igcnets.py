"""Tensor names of IGCNets, from the authors' MXNet builders and symbol files."""

from collections.abc import Mapping
from typing import NamedTuple

from flax import nnx

from convert.sources import Path, Reference, by_layer
from nets.layers.interleaved import InterleavedConv
from nets.layers.norm import BatchNorm
from nets.plain import IgcImageNetResNet, IgcResNet, Plain

LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "gamma",
    "mean": "moving_mean",
    "var": "moving_var",
    "edges": "mask",  # only in expander variants, which have no original
}


class Naming(NamedTuple):
    """A builder's names of the classifier, the blocks of a unit and a single conv."""

    classifier: str
    blocks: Mapping[str, str] = {}
    conv: str = "conv"


PLAIN = Naming("fc_score")
RESNET = Naming("fc", {"block1": "p2_two1", "block2": "p2_two2", "shortcut": "p0_line"})
# ImageNet: symbol files of regular nets, symbol files of IGCNets, and Python builder.
UNIT = {"block1": "conv1", "block2": "conv2", "shortcut": "proj"}
REGULAR = Naming("fc_score", UNIT, conv="")
SYMBOLS = Naming("fc_score", UNIT)
BUILDER = Naming("fc_score", UNIT | {"block1": "igc1", "block2": "igc2"})


def name(path: Path, layer: nnx.Module, naming: Naming) -> str:
    """Returns the tensor name of a variable. Raises LookupError for an unknown path."""
    match path[:-1]:
        case ("classifier",):
            return f"{naming.classifier}_{LEAVES[path[-1]]}"
        case ("stem", *inner):
            parts = ["g0"]
        case ("stages", stage, i, block, *inner) if block in naming.blocks:
            parts = [f"g{stage + 1}_b{i + 1}", naming.blocks[block]]
        case ("stages", stage, i, *inner):
            parts = [f"g{stage + 1}_b{i + 1}"]
        case _:
            raise LookupError(f"unknown IGCNet layer {path}")
    match inner:
        case ["norm"]:
            parts.append("bn")
        case ["conv"]:
            parts.append(naming.conv)
        case ["conv", "primary" | "secondary" as member]:
            parts.append({"primary": "conv1", "secondary": "conv2"}[member])
    is_beta = isinstance(layer, BatchNorm) and path[-1] == "bias"
    parts.append("beta" if is_beta else LEAVES[path[-1]])
    return "_".join(filter(None, parts))


def _cifar(net: type[nnx.Module], naming: Naming, *, interleaved: bool) -> Reference:
    def section(config):
        fields = dict(config)
        primary_groups = fields.pop("L")
        fields["width"] = primary_groups * fields.pop("M")
        fields["name"] = {Plain: "plain", IgcResNet: "igc_resnet"}[net]
        wiring = dict(kind="interleaved", primary_groups=primary_groups)
        return fields | (dict(wiring=wiring) if interleaved else {})

    return _reference(net, section, naming)


def _imagenet_section(config: Mapping) -> dict:
    depth, stem, widths = (config[k] for k in ("depth", "stem", "stage_channels"))
    doubled = [widths[0] * 2**stage for stage in range(4)]
    expand = widths[0] == 2 * stem
    units = [(depth - 2) // 8] * 4
    if (
        widths != doubled
        or widths[0] not in (stem, 2 * stem)
        or config.get("blocks_per_stage", units) != units
    ):
        raise ValueError(
            f"no IGCNet builder supports {dict(config)}: stage_channels must start at "
            "stem or twice stem and double, with (depth - 2) / 8 blocks per stage"
        )
    section = dict(name="igc_resnet_imagenet", depth=depth, width=stem)
    section |= dict(expand_first_stage=expand, num_classes=config["num_classes"])
    primary = config.get("primary_partitions")
    if primary is None:
        return section
    # All pairs are canonical: secondary = width / primary.
    secondary = [width // count for width, count in zip(widths, primary, strict=True)]
    if len(set(primary)) == 1:
        groups = dict(primary_groups=primary[0], secondary_groups=0)
    elif len(set(secondary)) == 1:
        groups = dict(primary_groups=0, secondary_groups=secondary[0])
    else:
        raise ValueError(
            f"stages of {widths} channels with {primary} primary groups: the primary "
            "or the secondary groups must be equal in all stages"
        )
    return section | dict(wiring=dict(kind="interleaved", **groups))


def _reference(net, section, naming: Naming) -> Reference:
    def sources(net):
        modules = (module for _, module in nnx.iter_modules(net))
        if naming is REGULAR and any(isinstance(x, InterleavedConv) for x in modules):
            raise LookupError("the symbol files of regular nets have no IGC blocks")
        return by_layer(net, lambda path, layer: name(path, layer, naming))

    return Reference(net=net, section=section, sources=sources)


def _imagenet(naming: Naming) -> Reference:
    return _reference(IgcImageNetResNet, _imagenet_section, naming)


REFERENCES = {
    "plain": _cifar(Plain, PLAIN, interleaved=False),
    "plain_igc": _cifar(Plain, PLAIN, interleaved=True),
    "resnet": _cifar(IgcResNet, RESNET, interleaved=False),
    "resnet_igc": _cifar(IgcResNet, RESNET, interleaved=True),
    "resnet_imagenet_mx": _imagenet(REGULAR),
    "resnet_igc_imagenet": _imagenet(SYMBOLS),
    # The same net with the names of the Python builder.
    "resnet_igc_imagenet_builder": _imagenet(BUILDER),
}
