"""X-Nets (Deep Expander Networks), by the state_dict names of its PyTorch code."""

from collections.abc import Mapping

from flax import nnx

from importers.sources import Importer, Path, by_layer
from nets.densenet import DenseNet
from nets.layers.expander import ExpanderConv

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "edges": "mask",
}


def leaf(attribute: str, layer: nnx.Module) -> str:
    if isinstance(layer, ExpanderConv) and attribute == "kernel":
        return "fpWeight"
    return LEAVES[attribute]


def densenet_cifar(path: Path, layer: nnx.Module) -> str:
    return f"{_densenet_cifar_layer(path[:-1])}.{leaf(path[-1], layer)}"


def _densenet_cifar_layer(path: Path) -> str:
    match path:
        case ("stem",):
            return "conv1"
        case ("blocks", block, layer, part):
            return f"block{block + 1}.layer.{layer}.{part.replace('norm', 'bn')}"
        case ("transitions", transition, part):
            part = {"norm": "bn1", "conv": "conv1"}[part]
            return f"trans{transition + 1}.{part}"
        case ("norm",):
            return "bn1"
        case ("classifier",):
            return "fc"
    raise LookupError(f"densenet_cifar has no layer like {path}")


def _densenet_cifar_section(config: Mapping) -> dict:
    """densenet_cifar, densenetgrouped_cifar and densenetexpander_cifar in one."""
    fields = {"expander_transitions": "wired_transitions"}
    return {"name": "densenet", **{fields.get(k, k): v for k, v in config.items()}}


IMPORTERS = {
    "densenet_cifar": Importer(
        net=DenseNet,
        section=_densenet_cifar_section,
        sources=lambda net: by_layer(net, densenet_cifar),
    )
}
