"""Batch normalisation: shared statistics, kinds of variance, precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import nets
from nets.layers.norm import BatchNorm


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def batch_norm(channels=5, **options):
    """Returns a layer with random scale, bias and running statistics."""
    layer = BatchNorm(channels, **options)
    for i, variable in enumerate((layer.scale, layer.bias, layer.mean, layer.var)):
        variable[...] = jnp.asarray(1 + 0.3 * normal(channels, seed=i))
    layer.var[...] = jnp.exp(layer.var[...])
    return layer


def test_training_normalises_by_the_batch():
    layer, x = batch_norm(eps=1e-3), 3 + 2 * normal(4, 3, 3, 5)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = (x - mean) / np.sqrt(var + 1e-3) * layer.scale[...] + layer.bias[...]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "factor"), [("biased", 1.0), ("unbiased", 36 / 35)])
def test_running_statistics_keep_a_share_of_the_old_values(kind, factor):
    layer, x = batch_norm(keep=0.8, running_var=kind), 3 + 2 * normal(4, 3, 3, 5)
    mean, var = np.asarray(layer.mean[...]), np.asarray(layer.var[...])
    layer(x)
    axes = (0, 1, 2)
    np.testing.assert_allclose(layer.mean[...], 0.8 * mean + 0.2 * x.mean(axes), 1e-5)
    expected = 0.8 * var + 0.2 * factor * x.var(axes)
    np.testing.assert_allclose(layer.var[...], expected, 1e-5)


def test_evaluation_uses_the_running_statistics_unchanged():
    layer, x = batch_norm(eps=1e-3), normal(4, 3, 3, 5)
    layer.eval()
    mean, var = layer.mean[...], layer.var[...]
    expected = (x - mean) / np.sqrt(var + 1e-3) * layer.scale[...] + layer.bias[...]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layer.mean[...], mean)


def run(layer, x, *, train=True):
    """Returns output, running statistics, and gradients of parameters and x."""
    definition, variables = nets.split(layer)
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
    step = jax.jit(training, static_argnums=(0, 4))
    return step(definition.apply, variables, x, weights, train)


def training(apply, variables, x, weights, train=True):
    def loss(params, x):
        y, stats = apply(variables | {"params": params}, x, train=train)
        return (y * weights).sum(), (y, stats)

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (d_params, d_x), (y, stats) = gradient(variables["params"], x)
    return y, stats, d_params, d_x


def assert_equal_runs(actual, expected):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5),
        actual,
        expected,
    )


@pytest.mark.parametrize("kind", ["biased", "unbiased"])
@pytest.mark.parametrize(
    ("groups", "devices"), [(1, 8), (2, 8), (8, 8), (8, 4), (4, 1)]
)
def test_statistics_do_not_depend_on_the_devices(kind, groups, devices):
    """Compares devices with at least two images each with one device with sixteen."""
    x = 3 + 2 * normal(16, 3, 3, 5)
    layer = batch_norm(running_var=kind)
    layer.groups = groups
    expected = run(layer, x)
    layer.axis_name = "data"
    definition, variables = nets.split(layer)
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def shard(variables, x, weights):
        y, stats, d_params, d_x = training(definition.apply, variables, x, weights)
        # As the train step does.
        stats = jax.lax.pmean(stats, "data")
        return y, stats, jax.lax.psum(d_params, "data"), d_x

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    data, everywhere = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(everywhere, data, data),
        out_specs=(data, everywhere, everywhere, data),
        check_vma=False,
    )
    assert_equal_runs(jax.jit(sharded)(variables, x, weights), expected)


def test_ghost_groups_are_separate_batches():
    """Four images form a group; running statistics average the groups."""
    x = 3 + 2 * normal(12, 3, 3, 5)
    layer = batch_norm()
    layer.groups = 3
    y, stats, *_ = run(layer, x)
    runs = [run(batch_norm(), group) for group in np.split(x, 3)]
    np.testing.assert_allclose(
        y, np.concatenate([r[0] for r in runs]), rtol=1e-4, atol=1e-5
    )
    assert_equal_runs(
        stats, jax.tree.map(lambda *s: np.mean(s, 0), *(r[1] for r in runs))
    )


@pytest.mark.parametrize(
    ("images", "groups", "equal"), [(12, 4, 4), (10, 4, 5), (3, 4, 3), (7, 2, 7)]
)
def test_ghost_groups_of_a_smaller_batch_have_equal_sizes(images, groups, equal):
    """The number of groups is as configured, or the next larger one that divides."""
    x = 3 + 2 * normal(images, 3, 3, 5)
    found, expected = batch_norm(), batch_norm()
    found.groups, expected.groups = groups, equal
    assert_equal_runs(run(found, x)[:2], run(expected, x)[:2])


@pytest.mark.parametrize(
    ("offset", "steps", "tolerance"),
    [(100, 0, 5e-3), (100, 40, 1e-4), (1000, 120, 1e-3)],
)
def test_a_large_mean_costs_few_digits(offset, steps, tolerance):
    """float32, deviation 1. The fast variance is shifted by the running mean, so it is
    exact once that has moved; at the first step a mean of 100 costs three digits.
    """
    layer = BatchNorm(5)
    definition, variables = nets.split(layer)
    x = offset + normal(64, 4, 4, 5)
    step = jax.jit(functools.partial(definition.apply, train=True))
    for _ in range(steps):
        variables["stats"] = step(variables, x)[1]
    exact = x.astype(np.float64)
    exact = (exact - exact.mean((0, 1, 2))) / exact.std((0, 1, 2))
    assert np.abs(step(variables, x)[0] - exact).max() < tolerance


def test_half_precision_has_statistics_in_single_precision():
    layer = BatchNorm(5)
    x = jnp.asarray(3 + 2 * normal(64, 4, 4, 5), jnp.bfloat16)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    assert layer.mean[...].dtype == layer.var[...].dtype == jnp.float32
    mean = np.asarray(x, np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(layer.mean[...], 0.1 * mean, rtol=1e-4)
    layer.eval()
    assert layer(x).dtype == jnp.bfloat16


@pytest.mark.parametrize("groups", [1, 2])
def test_measured_maps_are_normalised_as_their_concatenation(groups):
    """Also by the statistics of an earlier norm, which knows only some channels."""
    x = 3 + 2 * normal(4, 3, 3, 5)
    together, separate, earlier = batch_norm(), batch_norm(), batch_norm(2)
    for layer in (together, separate, earlier):
        layer.groups = groups
    maps = [earlier.measure(x[..., :2]), separate.measure(x[..., 2:])]
    np.testing.assert_allclose(separate(maps), together(x), rtol=1e-4, atol=1e-5)
    assert_equal_runs(nnx.state(separate), nnx.state(together))


ACTIVATIONS = {"relu": nnx.relu, "relu6": nnx.relu6}


class Activated(nnx.Module):
    """A norm and what follows it, in one call or in separate operations."""

    def __init__(self, activation, shortcut, groups, *, separate):
        self.norm, self.shortcut = batch_norm(), shortcut
        self.norm.groups = groups
        self.norm.scale[...] *= 6  # some values exceed 6
        self.activation, self.separate = activation, separate

    def __call__(self, x):
        shortcut = jnp.cos(x) if self.shortcut else None
        if not self.separate:
            return self.norm(x, self.activation, shortcut)
        y = self.norm(x) + (shortcut if self.shortcut else 0)
        return ACTIVATIONS[self.activation](y)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("activation", "shortcut"), [("relu", False), ("relu6", False), ("relu", True)]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_an_activation_equals_separate_operations(activation, shortcut, groups, train):
    """The output, the running statistics and all gradients."""
    x, found = 3 + 2 * normal(4, 3, 3, 5), []
    for separate in (False, True):
        net = Activated(activation, shortcut, groups, separate=separate)
        found.append(run(net, x, train=train))
    assert np.any(found[0][0] == 0)
    assert (activation == "relu6") == bool(np.max(found[0][0]) == 6)
    assert_equal_runs(*found)


def test_a_shortcut_requires_a_relu():
    with pytest.raises(ValueError, match="'relu6'"):
        batch_norm()(normal(2, 3, 3, 5), "relu6", normal(2, 3, 3, 5))
