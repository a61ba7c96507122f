"""Tensor names of X-Nets: complete, distinct, with irregular indices."""

import numpy as np
import pytest

import convert
from nets.layers.expander import Expander

EXPANDER = dict(wiring="expander", sampling="smaller_side")
FORMS = {
    "densenet_cifar": dict(depth=10, growth=4),
    "densenet_imagenet": dict(depth=121, growth=4, blocks=(1, 2)),
    "resnet_imagenet": dict(depth=50),
    "mobilenet": dict(width=0.25),
    "vgg_cifar": dict(depth=11, batch_norm=False),
    "alexnet": dict(image_size=63, hidden=1024),
}


def build(net, **fields):
    config = FORMS[net] | dict(num_classes=10) | fields
    return convert.build({"system": "xnets", "net": net, "config": config})


def layers(net, name):
    """Returns the names of the layers in the order of the net."""
    found = convert.find("xnets", name).sources(net)
    names = [tensor for source in found.values() for tensor in source.shapes]
    return sorted({tensor.rpartition(".")[0] for tensor in names}, key=natural)


def natural(name):
    return [int(part) if part.isdigit() else part for part in name.split(".")]


@pytest.mark.parametrize("wiring", [{}, EXPANDER], ids=["dense", "expander"])
@pytest.mark.parametrize("name", FORMS)
def test_variables_have_distinct_names(name, wiring):
    net = build(name, **wiring)
    tensors = {}
    for path, source in convert.find("xnets", name).sources(net).items():
        owner = next(iter(source.shapes))
        assert tensors.setdefault(owner, path) == path
    assert set(FORMS) == set(convert.FAMILIES["xnets"])


def test_vgg_counts_only_existing_modules():
    """Convolution, BN, ReLU and pooling count; here only the expander's stem has BN."""
    head = ["classifier.0", "classifier.2"]
    dense = [f"features.{i}" for i in (0, 3, 6, 8, 11, 13, 16, 18)]
    assert layers(build("vgg_cifar"), "vgg_cifar") == head + dense
    expander = [f"features.{i}" for i in (0, 1, 4, 7, 9, 12, 14, 17, 19)]
    assert layers(build("vgg_cifar", **EXPANDER), "vgg_cifar") == head + expander


def test_alexnet_counts_dropouts_or_normalisations():
    def indices(**fields):
        found = layers(build("alexnet", **fields), "alexnet")
        return [int(name.split(".")[1]) for name in found]

    assert indices() == [1, 4, 6, 0, 3, 6, 8, 10]
    features = [0, 1, 4, 5, 8, 9, 11, 12, 14, 15]
    assert indices(**EXPANDER) == [0, 1, 3, 4, 6, *features]


def test_an_expander_linear_layer_is_compact_too():
    net = build("alexnet", **EXPANDER)
    name = "classifier.0"
    layer = net.linears[0]
    assert isinstance(layer, Expander)
    rng, tensors = np.random.default_rng(0), {}
    for source in convert.find("xnets", "alexnet").sources(net).values():
        for key, shape in source.shapes.items():
            tensors[key] = rng.standard_normal(shape).astype(np.float32)
    for key in ("classifier.0.mask", "classifier.3.mask", "classifier.6.mask"):
        tensors[key] = _regular(tensors[key].shape)
    convert.load(net, tensors)
    dense = np.asarray(layer.dense(layer.kernel[...])).T
    np.testing.assert_array_equal(
        dense, tensors[f"{name}.weight"] * tensors[f"{name}.mask"]
    )


def _regular(shape):
    """A mask whose number of edges follows from sampling rule and published degree."""
    outputs, inputs = shape
    degree = 512 if outputs == 10 else 256
    mask = np.zeros(shape, bool)
    if inputs > outputs:
        mask[:, :degree] = True
    else:
        mask[:degree] = True
    return mask
