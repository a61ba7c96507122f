"""Tensor names of cfmz's ResNets (neon 1.2.1). neon has no names, so these are ours.

neon stores convolution weights as (in * kh * kw, out), the golden files as OIHW. Its
images are blue, green, red, and neon 1.2.1 swaps the means of red and blue. Our net
takes red, green, blue, so `layout` reorders the weights of a file, and convert.workdirs
the means.
"""

import math

import numpy as np
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
    """Returns the tensor name of a variable. Raises LookupError for an unknown path."""
    outer = {"stem": "stem.conv", "stem_norm": "stem.bn"}
    outer |= {"classifier": "fc", "classifier_norm": "fc_bn"}
    match path[:-1]:
        case ("stages", stage, block, part):
            where = f"stage{stage + 1}.{block}.{part.replace('norm', 'bn')}"
        case (part,) if part in outer:
            where = outer[part]
        case _:
            raise LookupError(f"unknown cfmz layer {path[:-1]}")
    return f"{where}.{LEAVES[path[-1]]}"


def order(layer: str) -> tuple:
    """Returns the rank of a layer in a file of neon."""
    outer = {"stem.conv": 0, "stem.bn": 1, "fc": 3, "fc_bn": 4}
    if layer in outer:
        return (outer[layer],)
    stage, block, part = layer.split(".")
    return (2, int(stage[-1]), int(block), ("conv1", "bn1", "conv2", "bn2").index(part))


def layout(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a tensor of neon in the layout of the golden files, if it fits."""
    if tensor.ndim == 2 and tensor.shape[1] == 1 and len(shape) == 1:
        return tensor[:, 0]
    if len(shape) != 4 or tensor.shape != (math.prod(shape[1:]), shape[0]):
        return tensor
    kernel = np.moveaxis(tensor.reshape(*shape[1:], shape[0]), -1, 0)
    return kernel[:, ::-1] if shape[1] == 3 else kernel


REFERENCES = {
    "msra_resnet": Reference(
        net=CfmzResNet,
        section=lambda config: {"name": "cfmz_resnet", **config},
        sources=lambda net: by_layer(net, name),
        order=order,
        layout=layout,
    )
}
