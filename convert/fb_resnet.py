"""Tensor names of fb.resnet.torch. Lua modules have no names, so these are ours."""

from flax import nnx

from convert.sources import TORCH_LEAVES, Path, Reference, by_layer
from nets.resnet import ResNet

PARTS = (
    *("bn0", "conv1", "bn1", "conv2", "bn2", "conv3", "bn3"),
    *("shortcut.conv", "shortcut.bn"),
)


def resnet(path: Path, layer: nnx.Module) -> str:
    """Returns the tensor name of a variable. Raises LookupError for an unknown path."""
    match path[:-1]:
        case ("stages", stage, block, "shortcut", part):
            where = f"layer{stage + 1}.{block}.shortcut.{part}"
        case ("stages", stage, block, part):
            where = f"layer{stage + 1}.{block}.{part}"
        case (part,):
            names = {"stem": "conv1", "stem_norm": "bn1", "norm": "bn_last"}
            where = names.get(part, "fc")
        case _:
            raise LookupError(f"unknown fb.resnet.torch layer {path}")
    return f"{where.replace('norm', 'bn')}.{TORCH_LEAVES[path[-1]]}"


def preresnet(path: Path, layer: nnx.Module) -> str:
    """Like resnet, but counts the batch norms of a block from 0: bn0 precedes conv1."""
    if path[0] == "stages" and path[-2] in ("norm1", "norm2", "norm3"):
        path = (*path[:-2], f"norm{int(path[-2][-1]) - 1}", path[-1])
    return resnet(path, layer)


def order(layer: str) -> tuple:
    """Returns the rank of a layer in the module tree: a shortcut follows its branch."""
    outer = {"conv1": 0, "bn1": 1, "bn_last": 3, "fc": 4}
    if layer in outer:
        return (outer[layer],)
    stage, block, part = layer.split(".", 2)
    return (2, int(stage.removeprefix("layer")), int(block), PARTS.index(part))


def _reference(preactivation: bool) -> Reference:
    naming = preresnet if preactivation else resnet

    def section(config):
        form = "imagenet" if config["dataset"] == "imagenet" else "cifar"
        fields = {k: config[k] for k in ("depth", "shortcut", "num_classes")}
        return dict(name="resnet", form=form, preactivation=preactivation, **fields)

    def sources(net):
        if (net.norm is not None) != preactivation:
            raise LookupError(f"not a net with preactivation={preactivation}")
        return by_layer(net, naming)

    return Reference(ResNet, section, sources, order=order)


REFERENCES = {"resnet": _reference(False), "preresnet": _reference(True)}
