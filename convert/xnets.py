"""Tensor names of X-Nets (Deep Expander Networks), from the PyTorch state_dicts.

The functions that take a path return the name of a layer, and raise LookupError for an
unknown path.
"""

from collections.abc import Callable

from flax import nnx

from convert.sources import TORCH_LEAVES, Path, Reference, by_layer
from nets.alexnet import CONVOLUTIONS, AlexNet
from nets.densenet import DenseNet, ImageNetDenseNet
from nets.layers.expander import ExpanderConv
from nets.mobilenet import MobileNet
from nets.resnet import ResNet
from nets.vgg import VGG

# Fields of the golden files -> ours; our wiring is a section.
RENAMED = {"expander_transitions": "wired_transitions"}
WIRING = {"wiring": "kind"} | {k: k for k in ("compress", "sampling", "groups")}


def leaf(attribute: str, layer: nnx.Module) -> str:
    """Returns the last part of a variable's tensor name."""
    if isinstance(layer, ExpanderConv) and attribute == "kernel":
        return "fpWeight"
    return TORCH_LEAVES[attribute]


def densenet_cifar(path: Path) -> str:
    match path:
        case ("blocks", block, layer, part):
            return f"block{block + 1}.layer.{layer}.{part.replace('norm', 'bn')}"
        case ("transitions", transition, part):
            return f"trans{transition + 1}.{dict(norm='bn1', conv='conv1')[part]}"
        case (part,):
            return {"stem": "conv1", "norm": "bn1", "classifier": "fc"}[part]
    raise LookupError(f"unknown densenet_cifar layer {path}")


def densenet_imagenet(path: Path) -> str:
    match path:
        case ("blocks", block, layer, part):
            part = f"{part[:-1]}.{part[-1]}"
            return f"features.denseblock{block + 1}.denselayer{layer + 1}.{part}"
        case ("transitions", transition, part):
            return f"features.transition{transition + 1}.{part}"
        case ("classifier",):
            return "classifier"
        case (part,):
            names = {"stem": "conv0", "stem_norm": "norm0", "norm": "norm5"}
            return f"features.{names[part]}"
    raise LookupError(f"unknown densenet_imagenet layer {path}")


def resnet_imagenet(path: Path) -> str:
    match path:
        case ("stages", stage, block, "shortcut", part):
            return f"layer{stage + 1}.{block}.downsample.{('conv', 'norm').index(part)}"
        case ("stages", stage, block, part):
            return f"layer{stage + 1}.{block}.{part.replace('norm', 'bn')}"
        case (part,):
            return {"stem": "conv1", "stem_norm": "bn1", "classifier": "fc"}[part]
    raise LookupError(f"unknown resnet_imagenet layer {path}")


def mobilenet(path: Path) -> str:
    match path:
        case ("blocks", block, part):
            names = {"depthwise": 0, "depthwise_norm": 1}
            names |= {"pointwise": 3, "pointwise_norm": 4}
            return f"model.{block + 1}.{names[part]}"
        case (part,):
            names = {"stem": "model.0.0", "stem_norm": "model.0.1", "classifier": "fc"}
            return names[part]
    raise LookupError(f"unknown mobilenet layer {path}")


def vgg_cifar(net: VGG) -> Callable[[Path], str]:
    """Names the layers of a net: conv, BN, ReLU and pooling count as modules."""
    names, index = {("hidden",): "classifier.0", ("classifier",): "classifier.2"}, 0
    for stage, blocks in enumerate(net.stages):
        for i, block in enumerate(blocks):
            names["stages", stage, i, "conv"] = f"features.{index}"
            names["stages", stage, i, "norm"] = f"features.{index + 1}"
            index += 2 if block.norm is None else 3
        index += 1
    return names.__getitem__


def alexnet(net: AlexNet) -> Callable[[Path], str]:
    """Names the layers of a net: in a dense net, dropouts count as modules."""
    names, index = {}, 0
    for i, (*_, pooled) in enumerate(CONVOLUTIONS):
        names["convs", i] = f"features.{index}"
        names["conv_norms", i] = f"features.{index + 1}"
        index += (2 if net.conv_norms is None else 3) + pooled
    indices = (1, 4, 6) if net.linear_norms is None else (0, 3, 6)
    for i, index in enumerate(indices):
        names["linears", i] = f"classifier.{index}"
        names["linear_norms", i] = f"classifier.{index + 1}"
    return names.__getitem__


def _reference(net: type[nnx.Module], layers, name: str, **fields) -> Reference:
    """layers: net -> (path of a layer -> its name); name, fields: of our section."""

    def section(config):
        wiring = {WIRING[k]: v for k, v in config.items() if k in WIRING}
        rest = {RENAMED.get(k, k): v for k, v in config.items() if k not in WIRING}
        return {"name": name, **fields, **rest, "wiring": wiring}

    def sources(net):
        where = layers(net)
        return by_layer(
            net, lambda path, layer: f"{where(path[:-1])}.{leaf(path[-1], layer)}"
        )

    return Reference(net, section, sources)


def _resnet_layers(net: ResNet):
    if net.norm is not None or not net.pool:
        raise LookupError("resnet_imagenet is a post-activation net for ImageNet")
    return resnet_imagenet


REFERENCES = {
    "densenet_cifar": _reference(DenseNet, lambda _: densenet_cifar, "densenet"),
    "densenet_imagenet": _reference(
        ImageNetDenseNet, lambda _: densenet_imagenet, "densenet_imagenet"
    ),
    "resnet_imagenet": _reference(
        ResNet, _resnet_layers, "resnet", form="imagenet", shortcut="B"
    ),
    "vgg_cifar": _reference(VGG, vgg_cifar, "vgg"),
    "mobilenet": _reference(MobileNet, lambda _: mobilenet, "mobilenet"),
    # The goldens were recorded without dropout.
    "alexnet": _reference(AlexNet, alexnet, "alexnet", dropout=0.0),
}
