"""DenseNet for ImageNet: wired layers, depths, and sizes of maps."""

import pytest
from flax import nnx

import nets
from nets import cost
from nets.layers.expander import Expander

SMALL = dict(name="densenet_imagenet", growth=8, blocks=(1, 2), num_classes=10)


def build(**fields):
    return nnx.eval_shape(lambda: nets.create(SMALL | fields, nnx.Rngs(0)))


def test_transitions_are_wired_on_request_only():
    def expanders(net):
        return {
            ".".join(map(str, path[:1]))
            for path, module in nnx.iter_modules(net)
            if isinstance(module, Expander)
        }

    assert expanders(build(wiring=dict(kind="expander"))) == {"blocks"}
    wired = build(wiring=dict(kind="expander"), wired_transitions=True)
    assert expanders(wired) == {"blocks", "transitions"}


def test_a_depth_determines_growth_and_blocks():
    net = build(depth=161, growth=0, blocks=())
    assert [len(layers) for layers in net.blocks] == [6, 12, 36, 24]
    assert net.stem.kernel.shape == (7, 7, 3, 96)
    assert net.classifier.kernel.shape == (2208, 10)
    with pytest.raises(ValueError, match="depth 121, 161, 169, 201, got 100"):
        build(depth=100)


def test_the_maps_shrink_as_published():
    """From 224 to 112 by the stem, 56 by its pooling, half by each transition."""
    layers = {x.path: x for x in cost.layers(build(), (1, 224, 224, 3))}
    sides = [
        layers[path].output_shape[1]
        for path in (
            "stem",
            "blocks.0.0.conv1",
            "transitions.0.conv",
            "blocks.1.1.conv2",
        )
    ]
    assert sides == [112, 56, 56, 28]
