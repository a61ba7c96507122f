"""fb.resnet.torch: counts of its executed Lua graphs, shortcuts, initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nets
from nets import cost
from nets.layers.wiring import Wiring
from nets.resnet import PreactBasicBlock
from tests.support.compiling import run_once


def abstract(**fields):
    config = dict(name="resnet") | fields
    return nnx.eval_shape(lambda: nets.create(config, nnx.Rngs(0)))


def counts(size=32, **fields):
    total = cost.total(cost.layers(abstract(**fields), (1, size, size, 3)))
    return total.parameters, total.macs


# The counts of type A are in configs/fb_resnet.py.
@pytest.mark.parametrize(
    ("depth", "preactivation", "shortcut", "parameters"),
    [
        (20, False, "B", 272_474),
        (20, False, "C", 283_962),
        (20, True, "B", 272_282),
        (20, True, "C", 283_290),
        (56, False, "C", 900_858),
        (56, True, "C", 898_842),
    ],
)
def test_counts_with_projections(depth, preactivation, shortcut, parameters):
    net = dict(depth=depth, preactivation=preactivation, shortcut=shortcut)
    assert counts(**net)[0] == parameters


def test_projections_of_two_stages_cost_multiplications():
    plain, projected = (counts(depth=20, shortcut=kind)[1] for kind in "AB")
    assert (plain, projected - plain) == (40_551_040, 262_144)


@pytest.mark.parametrize(
    ("depth", "shortcut", "parameters", "macs"),
    [
        (18, "A", 11_515_688, None),
        (18, "B", 11_689_512, 1_814_073_344),
        (18, "C", 12_043_816, None),
        (50, "B", 25_557_032, 4_089_184_256),
        (50, "C", 40_128_552, None),
    ],
)
def test_counts_for_imagenet(depth, shortcut, parameters, macs):
    net = dict(depth=depth, form="imagenet", shortcut=shortcut, num_classes=1000)
    found = counts(224, **net)
    assert found[0] == parameters
    assert macs in (None, found[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(form="imagenet", depth=50), "got 64 -> 256 channels: choose shortcut B"),
        (dict(form="imagenet", depth=20), "depth 18, 34, 50, 101, 152, 200, got 20"),
        (dict(depth=21), "6 n \\+ 2 .*got 21"),
        (dict(form="mnist"), "unknown form 'mnist': choose from cifar, imagenet"),
        (dict(shortcut="D"), "unknown shortcut 'D': choose from A, B, C"),
    ],
)
def test_impossible_nets_are_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        abstract(**fields)


@pytest.mark.parametrize("activation", ["both", "branch", "none"])
def test_input_of_the_preactivation_shortcut(activation):
    """With zero weights in its branch, the block is its shortcut."""
    options = dict(shortcut="A", wiring=Wiring())
    block = PreactBasicBlock(
        4, 4, 1, activation=activation, **options, rngs=nnx.Rngs(0)
    )
    block.conv2.kernel.set_value(jnp.zeros_like(block.conv2.kernel[...]))
    block.eval()
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 4)).astype(np.float32)
    activated = np.maximum(x, 0) / np.sqrt(1 + 1e-5)
    expected = activated if activation == "both" else x
    np.testing.assert_allclose(block(x), expected, rtol=1e-6)


def test_shortcut_a_appends_zero_channels():
    block = nets.create(dict(name="resnet", depth=8), nnx.Rngs(0)).stages[1][0]
    x = np.random.default_rng(0).standard_normal((2, 6, 6, 16)).astype(np.float32)
    y = run_once(lambda x: block.shortcut(x))(x)
    np.testing.assert_array_equal(y[..., :16], x[:, ::2, ::2])
    assert not np.asarray(y[..., 16:]).any()
    assert not jax.tree.leaves(nnx.state(block.shortcut))


def test_initial_bias_of_the_classifier():
    """Torch's default in X-ResNet, 0 in fb.resnet.torch."""
    config = dict(name="resnet", depth=8)

    def bias(**fields):  # jit drops the rest of the net
        create = lambda: nets.create(config | fields, nnx.Rngs(0)).classifier.bias[...]
        return jax.jit(create)()

    assert (bias() == 0).all()
    drawn = np.abs(bias(torch_bias=True))
    assert len(np.unique(drawn)) == 10
    assert 0.5 * 64**-0.5 < drawn.max() < 64**-0.5
