"""IGCNets, by the argument names of the authors' MXNet builders and symbol files."""

from collections.abc import Mapping
from typing import NamedTuple

from flax import nnx

from convert.sources import Importer, Path, by_layer
from nets.layers.norm import BatchNorm
from nets.plain import IgcImageNetResNet, IgcResNet, Plain

LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "gamma",
    "mean": "moving_mean",
    "var": "moving_var",
    "edges": "mask",  # of an expander variant, which the original does not have
}


class Naming(NamedTuple):
    """How a builder calls things. blocks: those of a unit. conv: a lone convolution."""

    classifier: str
    blocks: Mapping[str, str] = {}
    conv: str = "conv"


PLAIN = Naming("fc_score")
RESNET = Naming("fc", {"block1": "p2_two1", "block2": "p2_two2", "shortcut": "p0_line"})
# ImageNet: the symbol files of regular nets, of IGCNets, and the Python builder.
UNIT = {"block1": "conv1", "block2": "conv2", "shortcut": "proj"}
REGULAR = Naming("fc_score", UNIT, conv="")
SYMBOLS = Naming("fc_score", UNIT)
BUILDER = Naming("fc_score", UNIT | {"block1": "igc1", "block2": "igc2"})


def name(path: Path, layer: nnx.Module, naming: Naming) -> str:
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
            raise LookupError(f"IGCNets have no layer like {path}")
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


def _cifar(net: type[nnx.Module], naming: Naming, *, interleaved: bool) -> Importer:
    def section(config):
        fields = dict(config)
        primary_groups = fields.pop("L")
        fields["width"] = primary_groups * fields.pop("M")
        fields["name"] = {Plain: "plain", IgcResNet: "igc_resnet"}[net]
        wiring = dict(kind="interleaved", primary_groups=primary_groups)
        return fields | (dict(wiring=wiring) if interleaved else {})

    return _importer(net, section, naming)


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
        raise ValueError(f"no builder of IGCNets makes the stages of {dict(config)}")
    section = dict(name="igc_resnet_imagenet", depth=depth, width=stem)
    section |= dict(expand_first_stage=expand, num_classes=config["num_classes"])
    return section | _partitions(widths, config.get("primary_partitions"))


def _partitions(widths: list[int], primary: list[int] | None) -> dict:
    """The wiring of ImageNet stages: either the primary or the secondary groups stay.

    All their pairs are canonical: secondary = width / primary.
    """
    if primary is None:
        return {}
    secondary = [width // count for width, count in zip(widths, primary, strict=True)]
    if len(set(primary)) == 1:
        groups = dict(primary_groups=primary[0], secondary_groups=0)
        return dict(wiring=dict(kind="interleaved", **groups))
    if len(set(secondary)) == 1:
        groups = dict(primary_groups=0, secondary_groups=secondary[0])
        return dict(wiring=dict(kind="interleaved", **groups))
    raise ValueError(
        f"stages of {widths} channels in {primary} partitions: neither the primary nor "
        "the secondary groups are equal in all"
    )


def _importer(net, section, naming: Naming) -> Importer:
    def sources(net):
        return by_layer(net, lambda path, layer: name(path, layer, naming))

    return Importer(net=net, section=section, sources=sources)


def _imagenet(naming: Naming) -> Importer:
    return _importer(IgcImageNetResNet, _imagenet_section, naming)


IMPORTERS = {
    "plain": _cifar(Plain, PLAIN, interleaved=False),
    "plain_igc": _cifar(Plain, PLAIN, interleaved=True),
    "resnet": _cifar(IgcResNet, RESNET, interleaved=False),
    "resnet_igc": _cifar(IgcResNet, RESNET, interleaved=True),
    "resnet_imagenet_mx": _imagenet(REGULAR),
    "resnet_igc_imagenet": _imagenet(SYMBOLS),
    # The same net, as the Python builder spells it.
    "resnet_igc_imagenet_builder": _imagenet(BUILDER),
}
