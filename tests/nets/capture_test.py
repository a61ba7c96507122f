"""nets.capture: the maps inside every registered net, by module path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nets
from nets import cost
from tests.support import tiny

# Compiling a net takes seconds: only one of them is fast.
EVERY_NET = pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=() if x == "densenet" else pytest.mark.slow)
        for x in nets.names()
    ],
)


def images(name, count=2):
    size, rng = tiny.image_size(name), np.random.default_rng(0)
    return rng.standard_normal((count, size, size, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def net():
    return nets.create(tiny.config("densenet"), nnx.Rngs(0))


@EVERY_NET
def test_maps_are_those_of_the_named_layers(name):
    """Doubling the last convolution doubles its map, but not the map of the first."""
    net, x = nets.create(tiny.config(name, "expander"), nnx.Rngs(0)), images(name)
    net.eval()
    maps = [layer for layer in cost.layers(net, x.shape) if len(layer.output_shape) > 2]
    convolutions = [layer for layer in maps if layer.macs]
    first, last = convolutions[0].path, convolutions[-1].path
    before = nets.capture(net, x, [first, last, ""])
    assert list(before) == [first, last, ""]
    for layer in (convolutions[0], convolutions[-1]):
        assert before[layer.path].shape == layer.output_shape
    layer = dict(nnx.iter_modules(net))[_path(last)]
    nnx.update(layer, jax.tree.map(lambda x: 2 * x, nnx.state(layer, nnx.Param)))
    after = nets.capture(net, x, [first, last, ""])
    np.testing.assert_array_equal(after[first], before[first])
    np.testing.assert_array_equal(after[last], 2 * before[last])
    assert np.any(before[last])
    assert before[""].shape == (2, 10)  # the logits
    assert np.any(before[""] != after[""])


def _path(name):
    return tuple(int(x) if x.isdigit() else x for x in name.split("."))


def test_blocks_have_maps_too(net):
    maps = nets.capture(net, images("densenet"), ["stem", "blocks.0.0", "blocks.1.0"])
    assert [y.shape for y in maps.values()] == [
        (2, 16, 16, 16),
        (2, 16, 16, 8),
        (2, 8, 8, 8),
    ]


def test_the_net_keeps_its_mode_and_statistics(net):
    """In training, maps depend on the batch, and statistics would move."""
    x = images("densenet", count=4)
    net.train()
    before = jax.device_get(nnx.state(net, nnx.BatchStat))
    alone, together = (
        nets.capture(net, x[:n], ["blocks.0.0.norm1"])["blocks.0.0.norm1"]
        for n in (2, 4)
    )
    assert np.abs(alone - together[:2]).max() > 1e-3
    after = jax.device_get(nnx.state(net, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not net.norm.use_running_average


def test_maps_can_be_captured_inside_jit_and_differentiated(net):
    x = jnp.asarray(images("densenet"))

    @jax.jit
    @jax.grad
    def gradient(x):
        return nets.capture(net, x, ["stem"])["stem"][:, 0, 0].sum()

    touched = np.any(np.asarray(gradient(x)) != 0, axis=(0, 3))
    assert touched[:2, :2].all()  # the 3x3 window of the corner
    assert touched.sum() == 4


@pytest.mark.parametrize(
    ("net_name", "names", "message"),
    [
        ("densenet", ["stem", "stm"], r"no outputs of stm: .*did you mean stem"),
        (
            "densenet",
            ["block.0.0", "norms"],
            r"no outputs of block\.0\.0, norms: .*did you mean blocks\.0\.0.* norm",
        ),
        ("gunn", ["layers.0.units"], r"layers\.0\.units: .*loops of Gradual layers"),
    ],
)
def test_one_error_names_the_nearest_paths(net_name, names, message):
    def captured():
        net = nets.create(tiny.config(net_name), nnx.Rngs(0))
        return nets.capture(net, images(net_name), names)

    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(captured)  # compiles nothing
    assert "\n" not in str(error.value)
