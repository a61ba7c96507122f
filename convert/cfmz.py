"""The ResNets of cfmz (neon 1.2.1), by the names in its golden files (neon has none).

neon stores convolution weights as (in * kh * kw, out), the golden files as OIHW.
"""

from flax import nnx

from convert.sources import Path, Reference, by_layer
from nets.resnet import CfmzResNet

LEAVES = {
    "kernel": "W",
    "scale": "gamma",
    "bias": "beta",
    "mean": "gmean",
    "var": "gvar",
    "edges": "mask",  # only in expander variants, which have no original
}


def name(path: Path, layer: nnx.Module) -> str:
    return f"{_layer(path[:-1])}.{LEAVES[path[-1]]}"


def _layer(path: Path) -> str:
    match path:
        case ("stem",):
            return "stem.conv"
        case ("stem_norm",):
            return "stem.bn"
        case ("stages", stage, block, part):
            return f"stage{stage + 1}.{block}.{part.replace('norm', 'bn')}"
        case ("classifier",):
            return "fc"
        case ("classifier_norm",):
            return "fc_bn"
    raise LookupError(f"unknown cfmz layer {path}")


REFERENCES = {
    "msra_resnet": Reference(
        net=CfmzResNet,
        section=lambda config: {"name": "cfmz_resnet", **config},
        sources=lambda net: by_layer(net, name),
    )
}
