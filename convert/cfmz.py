"""cfmz on neon 1.2.1, by the names of its golden files (neon itself has none).

neon keeps convolution weights as (in * kh * kw, out); the files have them as OIHW.
"""

from flax import nnx

from convert.sources import Importer, Path, by_layer
from nets.resnet import CfmzResNet

LEAVES = {
    "kernel": "W",
    "scale": "gamma",
    "bias": "beta",
    "mean": "gmean",
    "var": "gvar",
    "edges": "mask",  # of an expander variant, which the original does not have
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
    raise LookupError(f"cfmz has no layer like {path}")


IMPORTERS = {
    "msra_resnet": Importer(
        net=CfmzResNet,
        section=lambda config: {"name": "cfmz_resnet", **config},
        sources=lambda net: by_layer(net, name),
    )
}
