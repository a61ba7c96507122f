"""Recomputation: equal results and gradients, and what the backward pass keeps."""

import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

import nets
from nets import remat
from tests.support import tiny
from tests.support.compiling import run_once


def loss_and_gradients(definition):
    def loss(params, variables, x):
        logits, stats = definition.apply(variables | {"params": params}, x, train=True)
        return (logits * np.cos(np.arange(logits.size).reshape(logits.shape))).sum(), (
            logits,
            stats,
        )

    return jax.grad(loss, has_aux=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", nets.names())
def test_levels_have_equal_results_and_gradients(name):
    """In float64, since batch norm over two images amplifies rounding errors."""
    wiring = "interleaved" if name == "plain" else "expander"
    # At 16 pixels, ImageNet forms end in maps of one, whose batch norm has no gradient.
    size, found = max(tiny.image_size(name), 32), {}
    with jax.enable_x64(True):
        net = nets.create(tiny.config(name, wiring), nnx.Rngs(0))
        x = np.random.default_rng(0).standard_normal((2, size, size, 3))
        for level in remat.LEVELS:
            nets.configure(net, remat=level)
            definition, variables = nets.split(net)
            step = run_once(loss_and_gradients(definition))
            found[level] = jax.device_get(step(variables["params"], variables, x))
    for level in ("norm", "block"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
            found[level],
            found["none"],
        )


@functools.cache
def kept_bytes(level, form, layers):
    """Returns the bytes of the maps that the backward pass of a net reads."""
    config = dict(num_classes=10, remat=level) | form(layers)
    definition, variables = nets.split(
        nnx.eval_shape(lambda: nets.create(config, nnx.Rngs(0)))
    )

    def backward(variables, x):
        forward = lambda params: definition.apply(
            variables | {"params": params}, x, train=True
        )[0]
        return jax.vjp(forward, variables["params"])[1]

    x = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
    leaves = jax.tree.leaves(jax.eval_shape(backward, variables, x))
    maps = [leaf for leaf in leaves if leaf.ndim == 4 and leaf.shape[0] == 2]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in maps)


def dense(layers):
    return dict(name="densenet", growth=8, depth=6 * layers + 4)


def deluge(layers):
    return dict(name="delugenet", width=0.25, layers=(layers,))


def residual(layers):
    return dict(name="cfmz_resnet", depth=6 * layers + 2)


def plain(layers):
    return dict(name="plain", depth=3 * layers + 2)


@pytest.mark.parametrize(("form", "maps"), [(residual, (6, 4, 4)), (plain, (4, 2, 1))])
def test_only_inputs_and_outputs_of_convolutions_are_kept(form, maps):
    """Normalisation, ReLU and shortcuts read these maps in their backward passes.

    maps: the number of maps kept in each stage. A residual net also keeps the output of
    its last unit, which the gradient of that unit's ReLU reads.
    """
    sizes = [32 * 32 * 16, 16 * 16 * 32, 8 * 8 * 64]
    values = np.dot(maps, sizes) + 32 * 32 * 3  # and the images
    assert kept_bytes("none", form, 1) == 2 * 4 * values


@pytest.mark.parametrize(
    ("level", "form"),
    [
        ("block", dense),
        *[("none", deluge), ("block", deluge)],
        *[("none", residual), ("block", residual)],
        *[
            pytest.param("norm", form, marks=pytest.mark.slow)
            for form in (dense, deluge, residual)
        ],
    ],
)
def test_kept_bytes_grow_linearly_with_the_depth(form, level):
    two, three, four = (kept_bytes(level, form, layers) for layers in (2, 3, 4))
    assert 0 < four - three == three - two


@pytest.mark.parametrize(("form", "share"), [(dense, 0.5), (residual, 0.8)])
def test_every_level_keeps_less_than_the_previous_one(form, share):
    found = [kept_bytes(level, form, 4) for level in remat.LEVELS]
    assert found[1] < share * found[0]
    assert found[2] < share * found[1]
