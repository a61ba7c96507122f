"""DelugeNets: readers and sources, shared normalisations, weights without effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import configs.delugenets
import convert
import nets
from convert.sources import to_reference
from nets import cost
from nets.layers.conv import Conv
from nets.layers.cross_layer import CrossLayer, make_source, unstack_scales
from nets.layers.expander import ExpanderConv
from nets.layers.norm import BatchNorm
from tests.support.compiling import run_once

TINY = dict(name="delugenet", layers=(3, 2, 1), width=0.25)
REFERENCE = {
    "system": "delugenets",
    "net": "delugenet",
    "config": dict(layers=[3, 2, 1], width=0.25, dataset="cifar", num_classes=10),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def maps(count, channels=5, size=4):
    """Returns maps with different means, and deviations between 1 and 2."""
    return [
        i + (1 + i / count) * normal(3, size, size, channels, seed=i)
        for i in range(count)
    ]


def normalised(xs, reader):
    """Returns sources for a reader, with statistics that change nothing."""
    norm = BatchNorm(5, affine=False, eps=0.0)
    norm.eval()
    return [make_source(x, norm, i, unstack_scales([reader])) for i, x in enumerate(xs)]


class Mixing(nnx.Module):
    """Normalises each of several maps once and mixes them; optionally a BN follows."""

    def __init__(self, count, channels=5, norm=False):
        norms = [BatchNorm(channels, affine=False) for _ in range(count)]
        self.norms = nnx.List(norms)
        self.cross = CrossLayer(channels, count)
        self.cross.scale[...] = jnp.asarray(normal(count, channels, seed=7))
        self.cross.bias[...] = jnp.asarray(normal(count, channels, seed=8))
        self.norm = BatchNorm(channels) if norm else None

    def __call__(self, maps):
        pairs = zip(maps, self.norms, strict=True)
        sources = [
            make_source(x, norm, i, unstack_scales([self.cross]))
            for i, (x, norm) in enumerate(pairs)
        ]
        x = self.cross(sources)
        return x if self.norm is None else self.norm(x)


# The cross-layer convolution


def test_one_normalisation_for_all_readers_equals_one_per_reader():
    """Computes the original: the sum of a batch normalisation of every source."""
    xs, mixing, expected = maps(4), Mixing(4), 0
    for i, x in enumerate(xs):
        norm = BatchNorm(5)
        norm.scale[...], norm.bias[...] = mixing.cross.scale[i], mixing.cross.bias[i]
        expected = expected + norm(x)
    np.testing.assert_allclose(mixing(xs), expected, rtol=1e-5, atol=1e-5)


def test_it_is_initialised_to_the_average_of_the_normalised_maps():
    layer = CrossLayer(5, 4)
    np.testing.assert_allclose(
        layer(normalised(maps(4), layer)), np.mean(maps(4), 0), atol=1e-6
    )


def test_channels_and_pixels_do_not_mix():
    layer, (first, *others) = Mixing(3).cross, maps(3, size=2)

    def one(x):
        return layer(normalised([x, *others], layer))[0, 1, 0, 2]

    reached = np.argwhere(np.asarray(jax.grad(one)(first)))
    np.testing.assert_array_equal(reached, [[0, 1, 0, 2]])


def test_permuting_sources_and_weights_changes_nothing():
    xs, mixing = maps(4), Mixing(4)
    expected, order = mixing(xs), [2, 0, 3, 1]
    for variable in (mixing.cross.scale, mixing.cross.bias):
        variable[...] = variable[...][np.array(order)]
    np.testing.assert_allclose(mixing([xs[i] for i in order]), expected, atol=1e-5)


def test_biases_and_lengths_of_weights_have_no_effect_before_a_normalisation():
    xs, mixing = maps(4), Mixing(4, norm=True)
    expected = mixing(xs)
    mixing.cross.bias[...] += 3.0
    np.testing.assert_allclose(mixing(xs), expected, atol=1e-4)
    mixing.cross.scale[...] *= jnp.asarray([2.0, 3.0, 0.5, 1.5, 4.0])
    np.testing.assert_allclose(mixing(xs), expected, atol=1e-3)  # up to eps
    mixing.cross.scale[0] *= -1.0
    assert np.abs(mixing(xs) - expected).max() > 0.1  # the direction has an effect


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_sources_are_rejected(count):
    with pytest.raises(ValueError, match=f"2 sources, got {count} of 6 channels"):
        CrossLayer(6, count)


def test_half_precision_is_summed_in_single_precision():
    xs = [jnp.asarray(x, jnp.bfloat16) for x in maps(4)]
    y = Mixing(4)(xs)
    assert y.dtype == jnp.bfloat16
    exact = Mixing(4)([np.asarray(x, np.float32) for x in xs])
    assert np.abs(y - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("size", [4, 3])
def test_loops_against_recomputation_change_neither_map_nor_gradient(size):
    xs, layer = maps(3, size=size), CrossLayer(5, 3)
    layer.scale[...] = jnp.asarray(normal(3, 5, seed=7))
    upstream = normal(*xs[0].shape, seed=9)

    def loss(xs):
        return (layer(normalised(xs, layer)) * upstream).sum()

    expected = sum(scale * x for scale, x in zip(layer.scale[...], xs, strict=True))
    np.testing.assert_allclose(loss(xs), (expected * upstream).sum(), rtol=1e-5)
    lowered = jax.jit(jax.value_and_grad(loss)).lower(xs).compile().as_text()
    assert lowered.count(" while(") == 2  # one for the map, one for its gradient
    for gradient, scale in zip(jax.grad(loss)(xs), layer.scale[...], strict=True):
        np.testing.assert_allclose(gradient, scale * upstream, rtol=1e-5)


# The net


@functools.cache
def tiny():
    """Returns the parameters of a net and its gradient, compiled once for all tests."""
    net = nets.create(TINY, nnx.Rngs(0))
    definition, variables = nets.split(net)
    x, weights = normal(4, 32, 32, 3), normal(4, 10, seed=3)

    def loss(params):
        state = variables | {"params": params}
        return (definition.apply(state, x, train=True)[0] * weights).sum()

    return variables["params"], run_once(jax.grad(loss))


def gradients(silent=None):
    """Returns the gradients if no layer reads source `silent` of the first block."""
    params, gradient = tiny()

    def silenced(path, value):
        match tuple(key.key for key in path):
            case ("blocks", 0, "layers", _, "cross", "scale"):
                pass
            case ("blocks", 1, "opening", "cross", "scale"):
                pass
            case _:
                return value
        return jnp.where(np.arange(len(value))[:, None] == silent, 0.0, value)

    return gradient(jax.tree.map_with_path(silenced, params))["blocks"]


@pytest.mark.slow
@pytest.mark.parametrize("silent", [1, 2])
def test_cross_layer_convolutions_have_no_shortcut(silent):
    """The weights of a layer without readers have no gradient."""
    layers = gradients(silent)[0]["layers"]
    for i, layer in layers.items():
        reached = np.abs(layer["conv3"]["kernel"]).max() > 0
        # Source 0 is that of the opening, so layer i computes source i + 1.
        assert reached == (i + 1 != silent)


@pytest.mark.slow
def test_every_weight_of_every_reader_has_a_gradient():
    """From the oldest source to the newest."""
    blocks = gradients()
    for reader in (blocks[0]["layers"][1]["cross"], blocks[1]["opening"]["cross"]):
        largest = np.abs(reader["scale"]).max(1)
        assert (largest > 1e-3).all()
        # Without effect, except for rounding.
        assert np.abs(reader["bias"]).max() < 1e-3 * largest.max()


@pytest.mark.slow
def test_without_cross_layer_connections_the_net_is_a_chain():
    """A layer whose output is constant leaves no gradient to the layers before it."""
    net = nets.create(TINY | dict(cross_layer=False), nnx.Rngs(0))
    assert not [x for _, x in nnx.iter_modules(net) if isinstance(x, CrossLayer)]
    net.blocks[0].layers[1].conv3.kernel[...] *= 0.0
    net.blocks[1].opening.norm.bias[...] += 1.0  # or all later ReLUs are at 0
    definition, variables = nets.split(net)
    x = normal(4, 32, 32, 3)

    def loss(params):
        logits, _ = definition.apply(variables | {"params": params}, x)
        return (logits * normal(4, 10, seed=3)).sum()

    grads = run_once(jax.grad(loss))(variables["params"])
    before, after = grads["blocks"][0]["layers"][0], grads["blocks"][1]["opening"]
    assert not np.any(before["conv1"]["kernel"])
    assert not np.any(grads["stem"]["kernel"])
    assert np.any(grads["blocks"][0]["layers"][1]["conv3"]["kernel"])
    assert np.any(after["norm"]["bias"])


@functools.cache
def abstract(variant):
    data = next(iter(configs.delugenets.VARIANTS[variant].parameters))
    config = configs.delugenets.get_config(f"{variant},{data}").net
    return nnx.eval_shape(lambda: nets.create(config, nnx.Rngs(0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "normalisations", "cross_layers", "maps"),
    [
        ("146", 147, 47, 8 + 17 + 25),
        ("wide-146", 147, 47, 8 + 17 + 25),
        ("218", 219, 71, 12 + 25 + 37),
        ("92", 95, 30, 8 + 8 + 9 + 9),
        ("104", 107, 34, 8 + 9 + 10 + 11),
        ("122", 125, 40, 8 + 10 + 12 + 14),
    ],
)
def test_numbers_of_layers_are_those_of_the_originals(
    variant, normalisations, cross_layers, maps
):
    """And every source has one normalisation for any number of readers."""
    modules = [module for _, module in nnx.iter_modules(abstract(variant))]
    norms = [module for module in modules if isinstance(module, BatchNorm)]
    assert sum(norm.scale is not None for norm in norms) == normalisations
    assert sum(norm.scale is None for norm in norms) == maps
    assert sum(isinstance(module, CrossLayer) for module in modules) == cross_layers
    assert sum(isinstance(module, Conv) for module in modules) == normalisations


@pytest.mark.parametrize(
    ("variant", "blocks"),
    [
        ("146", (110_912, 969_600, 5_588_992)),
        ("wide-146", (332_528, 2_911_776, 16_877_056)),
        ("218", (170_048, 1_442_176, 8_346_624)),
        ("92", (391_424, 1_809_152, 8_052_224, 32_096_256)),
        ("104", (391_424, 2_027_264, 8_915_968, 38_960_128)),
        ("122", (391_424, 2_245_888, 10_646_016, 49_271_808)),
    ],
)
def test_parameters_of_each_block_are_those_of_the_originals(variant, blocks):
    counted = [
        sum(leaf.size for leaf in jax.tree.leaves(nnx.state(block, nnx.Param)))
        for block in abstract(variant).blocks
    ]
    assert counted == list(blocks)


def test_sizes_of_maps():
    shapes = {
        layer.path: layer.output_shape
        for layer in cost.layers(abstract("92"), (1, 224, 224, 3))
    }
    assert shapes["stem"] == (1, 112, 112, 64)
    for i, (size, channels) in enumerate([(56, 128), (28, 256), (14, 512), (7, 1024)]):
        expected = (1, size, size, channels)
        assert shapes[f"blocks.{i}.opening.conv"] == expected
        assert shapes[f"blocks.{i}.layers.6.conv3"] == expected


def test_the_wiring_applies_to_the_composite_layers():
    net = nnx.eval_shape(
        lambda: nets.create(TINY | {"wiring": {"kind": "expander"}}, nnx.Rngs(0))
    )
    kinds = {Conv: set(), ExpanderConv: set()}
    for path, module in nnx.iter_modules(net):
        if type(module) in kinds:
            kinds[type(module)].add(path[-1])
    assert kinds == {
        Conv: {"stem", "conv"},
        ExpanderConv: {"conv1", "conv2", "conv3"},
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(layers=(1, 2, 3)),
            r"block 1 needs at least 2 .* got 1: .*\(1, 2, 3\)",
        ),
        (dict(layers=(2, 0)), r"block 2 needs at least 1 .* got 0"),
        (dict(layers=(0, 1), form="imagenet"), "block 1 needs at least 1 .* got 0"),
        (dict(layers=()), "at least one block"),
        (dict(width=0.3), r"whole number of channels, got 0.3 \* 32 = 9\.6"),
        (dict(width=0.0), r"got 0.0 \* 32"),
        (dict(form="svhn"), "unknown form 'svhn': choose from cifar, imagenet"),
        (dict(wiring=dict(kind="grouped", groups=3)), "3 groups do not divide 8 input"),
    ],
)
def test_impossible_nets_are_rejected(fields, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: nets.create(TINY | fields, nnx.Rngs(0)))


# The importer


def original(net, seed=0):
    """Returns random tensors for all original names; variances are positive."""
    tensors = {}
    sources = convert.find("delugenets", "delugenet").sources(net)
    shapes = {k: v for source in sources.values() for k, v in source.shapes.items()}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        value = normal(*shape, seed=seed + i)
        tensors[name] = np.exp(0.1 * value) if name.endswith("_var") else value
    return tensors


def values(net):
    state = nnx.to_flat_state(nnx.state(net))
    return {path: np.asarray(variable[...]) for path, variable in state}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_export_and_load_round_trip(mode):
    """In train mode all tensors return, except statistics that no longer differ."""
    net, again = convert.build(REFERENCE), convert.build(REFERENCE)
    getattr(net, mode)()
    getattr(again, mode)()
    tensors = original(net)
    convert.load(net, tensors)
    sources = convert.find("delugenets", "delugenet").sources(net)
    returned = to_reference(sources, values(net))
    assert returned.keys() == tensors.keys()
    convert.load(again, returned)
    for path, value in values(net).items():
        np.testing.assert_allclose(values(again)[path], value, 1e-5, err_msg=path)
    if mode == "train":
        for name, tensor in tensors.items():
            if ".cross.running" not in name:
                np.testing.assert_array_equal(returned[name], tensor, err_msg=name)


def test_the_newest_source_comes_first_in_the_original():
    net = convert.build(REFERENCE)
    tensors = original(net)
    convert.load(net, tensors)
    theirs, ours = tensors["block2.trans.cross.weight"], net.blocks[1].opening.cross
    np.testing.assert_array_equal(ours.scale[0], theirs[:, 2])
    np.testing.assert_array_equal(ours.scale[2], theirs[:, 0])
    oldest = tensors["block2.trans.cross.running_mean"][:, 2]
    np.testing.assert_array_equal(net.blocks[0].norms[0].mean[...], oldest)


def test_a_depth_that_was_not_published_is_rejected():
    config = dict(depth=150, width=1.0, dataset="cifar", num_classes=10)
    with pytest.raises(ValueError, match="depth 150: choose from 146"):
        convert.build(REFERENCE | {"config": config})
