"""VGG: expander degrees, depths, normalisations."""

import jax
import pytest
from flax import nnx

import nets
from nets import vgg
from nets.layers.expander import Expander


def build(**fields):
    config = dict(name="vgg") | fields
    return nnx.eval_shape(lambda: nets.create(config, nnx.Rngs(0)))


def blocks(net):
    return [block for stage in net.stages for block in stage]


def test_vgg_16_has_the_published_degrees():
    """64 three times, 16 nine times, 128; layers with no more inputs are dense."""
    net = build(depth=16, wiring=dict(kind="expander"))
    convs = [block.conv for block in blocks(net)]
    degrees = [getattr(conv, "degree", None) for conv in convs]
    assert degrees == [None, None, None, 64] + 9 * [16]
    assert net.hidden.degree == 128
    for conv in convs:
        assert isinstance(conv, Expander) != (getattr(conv, "bias", None) is not None)
    assert not isinstance(net.classifier, Expander)


@pytest.mark.parametrize("depth", vgg.STAGES)
def test_depth_counts_the_weighted_layers(depth):
    convs = sum(map(len, vgg.STAGES[depth]))
    assert convs + 3 == depth  # the original for ImageNet has three linear layers
    assert len(vgg.DEGREES[depth]) == convs - 1
    assert len(blocks(build(depth=depth))) == convs


def test_without_published_degrees_compress_applies():
    wiring = dict(kind="expander", compress=4)
    net = build(depth=11, wiring=wiring, published_degrees=False)
    wired = [block.conv for block in blocks(net)[1:]] + [net.hidden]
    assert all(layer.degree == layer.in_channels // 4 for layer in wired)


def test_without_batch_norm_the_expander_normalises_after_its_stem():
    def normalised(**fields):
        net = build(depth=11, batch_norm=False, **fields)
        return [block.norm is not None for block in blocks(net)]

    assert normalised(wiring=dict(kind="expander")) == [True] + 7 * [False]
    assert normalised() == 8 * [False]


def test_another_depth_is_rejected():
    with pytest.raises(ValueError, match="depth 11, 13, 16, 19, got 12"):
        build(depth=12)


def test_images_too_small_for_five_poolings_are_rejected():
    definition, variables = nets.split(build(depth=11))
    x = jax.ShapeDtypeStruct((2, 31, 31, 3), "float32")
    with pytest.raises(ValueError, match=r"map of \(1, 1\).*images are too small"):
        jax.eval_shape(definition.apply, variables, x)
