"""AlexNet: the two published nets, and images of other sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nets
from nets.layers.expander import Expander
from tests.support.compiling import run_once

SMALL = dict(name="alexnet", image_size=63, hidden=1024, num_classes=10)


def build(**fields):
    return nnx.eval_shape(lambda: nets.create(SMALL | fields, nnx.Rngs(0)))


def test_the_published_expander_has_dense_convolutions_and_no_dropout():
    net = build(
        wiring=dict(kind="expander"), image_size=224, hidden=4096, num_classes=1000
    )
    assert not any(isinstance(conv, Expander) for conv in net.convs)
    assert all(conv.bias is not None for conv in net.convs)
    shapes = [(x.in_channels, x.out_channels, x.degree) for x in net.linears]
    assert shapes == [(9216, 4096, 256), (4096, 4096, 256), (4096, 1000, 512)]
    assert (len(net.conv_norms), len(net.linear_norms)) == (5, 2)
    assert net.dropout is None


def test_without_published_degrees_compress_applies():
    wiring = dict(kind="expander", compress=4)
    net = build(wiring=wiring, published_degrees=False)
    wired = [*net.convs[1:], *net.linears]
    assert all(layer.degree == layer.in_channels // 4 for layer in wired)
    assert not isinstance(net.convs[0], Expander)


def test_the_dense_net_has_dropout_and_no_normalisation():
    net = nets.create(SMALL, nnx.Rngs(0))
    assert net.conv_norms is net.linear_norms is None
    definition, variables = nets.split(net)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 63, 63, 3)), "float32")
    train = run_once(functools.partial(definition.apply, train=True))
    first, again, other = (
        train(variables, x, key=jax.random.key(i))[0] for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_linear_layers_read_channels_then_rows_then_columns():
    """As in the original. Images of 128 pixels yield a 3x3 map."""
    net = build(image_size=128)
    assert net.linears[0].kernel.shape[0] == net.features == 256 * 3 * 3
    net = nets.create(SMALL | dict(image_size=128, dropout=0.0), nnx.Rngs(0))
    net.linears[0].kernel.set_value(net.linears[0].kernel[...].at[9:].set(0))
    for name in ("kernel", "bias"):
        last = getattr(net.convs[-1], name)
        last.set_value(last[...].at[..., 0].set(0))
    x = np.random.default_rng(0).standard_normal((2, 128, 128, 3)).astype(np.float32)
    definition, variables = nets.split(net)
    y, _ = run_once(definition.apply)(variables, x)
    np.testing.assert_array_equal(y[0], y[1])  # rows 0 to 8 read channel 0, which is 0


def test_images_of_another_size_are_rejected():
    with pytest.raises(ValueError, match="image_size of at least 63, got 62"):
        build(image_size=62)
    definition, variables = nets.split(build())
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    with pytest.raises(ValueError, match=r"63 reads 256 features.* yield 9216"):
        jax.eval_shape(definition.apply, variables, x)
