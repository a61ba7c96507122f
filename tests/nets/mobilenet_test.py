"""MobileNet: widths in both readings, densities, channels without inputs."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nets
from nets import cost
from nets.layers.expander import Expander
from nets.layers.wiring import Wiring
from nets.mobilenet import SeparableBlock
from tests.support.compiling import run_once

HALF = dict(name="mobilenet", width=0.5, num_classes=1000)
TEXTBOOK = dict(textbook_widths=True, classifier_inputs=1024)


def build(**fields):
    return nnx.eval_shape(lambda: nets.create(HALF | fields, nnx.Rngs(0)))


def widths(net):
    return [
        net.stem.kernel.shape[-1],
        *(block.pointwise.kernel.shape[-1] for block in net.blocks),
    ]


def test_the_code_scales_all_widths_except_the_first_and_the_last():
    inner = [64, 64, 128, 128, *(6 * [256]), 512]
    assert widths(build()) == [32, 32, *inner, 1024]
    assert widths(build(textbook_widths=True)) == [16, 32, *inner, 512]
    assert widths(build(width=1.0)) == widths(build(width=1.0, textbook_widths=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compress", "code", "textbook", "printed"),
    [
        (2, 105_854_208, 85_783_808, 85.8),
        (4, 70_530_304, 53_671_168, 53.7),
        (8, 52_868_352, 37_614_848, 37.6),
        (16, 44_037_376, 29_586_688, 29.5),  # printed without rounding
    ],
)
def test_the_published_operations_are_those_of_the_textbook_widths(
    compress, code, textbook, printed
):
    def macs(**fields):
        net = build(wiring=dict(kind="expander", compress=compress), **fields)
        return cost.total(cost.layers(net, (1, 224, 224, 3))).macs

    assert macs() == code
    assert macs(**TEXTBOOK) == textbook == pytest.approx(1e6 * printed, abs=1e5)
    # The 512 maps of the last block need no classifier of 1024 inputs.
    assert macs(textbook_widths=True) == textbook - 512 * 1000


@pytest.mark.parametrize("sampling", ["smaller_side", "per_output", "per_input"])
def test_compression_is_exact_for_every_sampling(sampling):
    net = build(wiring=dict(kind="expander", compress=4, sampling=sampling))
    pointwise = [block.pointwise for block in net.blocks]
    assert not isinstance(pointwise[0], Expander)
    for layer in pointwise[1:]:
        assert 4 * layer.num_edges == layer.in_channels * layer.out_channels


def test_groups_and_expanders_have_equally_many_weights():
    counts = [
        cost.total(cost.layers(build(**fields), (1, 64, 64, 3)))
        for fields in (
            dict(wiring=dict(kind="expander", compress=8)),
            dict(wiring=dict(kind="grouped", groups=8)),
        )
    ]
    assert counts[0].parameters == counts[1].parameters
    assert counts[0].macs == counts[1].macs


def test_an_output_without_inputs_is_constant():
    """Possible if inputs sample: 8 of 64 outputs at compression 16, for example."""
    wiring = Wiring("expander", compress=16)
    options = dict(wiring=wiring, norm_scale="ones", rngs=nnx.Rngs(0))
    block = SeparableBlock(32, 64, 1, **options)
    block.pointwise.draw(np.random.default_rng(0))
    fed = np.unique(np.asarray(block.pointwise.edges[...]) % 64)
    dead = np.setdiff1d(np.arange(64), fed)
    assert 0 < len(dead) < 32
    block.pointwise_norm.bias.set_value(jnp.full(64, 0.25))
    definition, variables = nets.split(block)
    forward = run_once(functools.partial(definition.apply, train=True))
    y, _ = forward(variables, np.random.default_rng(1).standard_normal((2, 4, 4, 32)))
    constant = (np.asarray(y) == 0.25).all((0, 1, 2))
    assert np.flatnonzero(constant).tolist() == dead.tolist()


def test_missing_inputs_of_the_classifier_are_zeros():
    small = dict(blocks=((64, 1), (512, 2)), num_classes=3, classifier_inputs=300)
    net = nets.create(HALF | TEXTBOOK | small, nnx.Rngs(0))
    net.eval()
    definition, variables = nets.split(net)
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    forward = run_once(lambda variables: definition.apply(variables, x)[0])
    logits, kernel = forward(variables), variables["params"]["classifier"]["kernel"]
    for rows, matter in ((slice(256, 300), False), (slice(0, 256), True)):
        variables["params"]["classifier"]["kernel"] = kernel.at[rows].add(1)
        assert (forward(variables) != logits).any() == matter
    with pytest.raises(ValueError, match=r"at least the 256 maps .*got 100"):
        build(**TEXTBOOK | dict(width=0.25, classifier_inputs=100))


def test_initial_values_count_all_channels_in_the_fan():
    """In torch 0.3, so depthwise kernels start sqrt(channels) times smaller."""
    blocks = ((512, 1), (512, 1))
    net = nets.create(HALF | dict(blocks=blocks, num_classes=10), nnx.Rngs(0))
    kernel = np.asarray(net.blocks[1].depthwise.kernel[...])
    bound = 1 / np.sqrt(9 * 256)
    assert 0.95 * bound < np.abs(kernel).max() <= bound
    assert np.abs(net.classifier.bias[...]).max() > 0


def test_initial_scales_of_normalisation_can_be_those_of_torch():
    config = HALF | dict(blocks=((512, 1),), norm_scale="uniform")
    net = nets.create(config, nnx.Rngs(0))
    scales = np.asarray(net.blocks[0].pointwise_norm.scale[...])
    assert 0 <= scales.min() < 0.1
    assert 0.9 < scales.max() < 1
    with pytest.raises(ValueError, match=r"unknown norm_scale 'random'.*ones, uniform"):
        build(norm_scale="random")
