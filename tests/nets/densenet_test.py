"""DenseNet: shared statistics; for ImageNet wired layers, depths, sizes of maps."""

import functools
import itertools

import jax
import jax.extend
import numpy as np
import pytest
from flax import nnx

import nets
from nets import cost
from nets.layers.cpu import calls
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


BASIC = dict(name="densenet", growth=8, bottleneck=False)


def equations(jaxpr):
    """Yields the equations of a program and of the functions that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for called in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(called)


def test_statistics_are_computed_once_per_map(monkeypatch):
    """Two sums (moments) over each channel that enters or is appended to a block."""
    monkeypatch.setattr(calls, "usable", lambda x: False)
    net = nnx.eval_shape(lambda: nets.create(BASIC | dict(depth=16), nnx.Rngs(0)))
    definition, variables = nets.split(net)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
    step = functools.partial(definition.apply, train=True)
    program = jax.make_jaxpr(step)(variables, x).jaxpr
    reduced = sum(
        equation.invars[0].aval.shape[-1]
        for equation in equations(program)
        if equation.primitive.name == "reduce_sum"
        and equation.invars[0].aval.ndim == 5  # groups, images, height, width, channels
    )
    # Four layers append 8 maps each; a transition halves the number of maps.
    assert reduced == 2 * ((16 + 32) + (24 + 32) + (28 + 32))


def test_all_readers_of_a_map_receive_the_same_statistics():
    definition, variables = nets.split(nets.create(BASIC | dict(depth=13), nnx.Rngs(0)))
    x = 3 + np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    train = functools.partial(definition.apply, train=True)
    stats = jax.jit(train, compiler_options=nets.RUN_ONCE)(variables, x)[1]
    readers = [layer["norm1"] for layer in stats["blocks"][2].values()]
    for first, second in itertools.pairwise([*readers, stats["norm"]]):
        for kind in ("mean", "var"):
            shared = first[kind].shape[0]
            assert np.all(first[kind] != 0)
            np.testing.assert_array_equal(second[kind][:shared], first[kind])
