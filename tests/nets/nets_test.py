"""Statements that hold for every registered net and every wiring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nets
from nets import connectivity
from nets.layers.expander import Expander
from nets.layers.norm import BatchNorm
from nets.layers.wiring import KINDS
from tests.support import tiny
from tests.support.compiling import run_once

EVERY_NET = pytest.mark.parametrize("name", nets.names())
# Those of millions of weights, however small the form, only in CI.
EVERY_NET_RUN = pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.slow if x in ("alexnet", "vgg") else ())
        for x in nets.names()
    ],
)
# Each pair is compiled: one wiring of every net always, the others in CI.
EVERY_PAIR = pytest.mark.parametrize(
    ("name", "wiring"),
    [
        pytest.param(
            *(name, wiring), marks=() if wiring == "expander" else pytest.mark.slow
        )
        for name in nets.names()
        for wiring in KINDS
    ],
)


@functools.cache
def create(name, wiring="dense"):
    return nets.create(tiny.config(name, wiring), nnx.Rngs(0))


def abstract(config):
    return nnx.eval_shape(lambda: nets.create(config, nnx.Rngs(0)))


def images(name, count, seed=0):
    size, rng = tiny.image_size(name), np.random.default_rng(seed)
    return rng.standard_normal((count, size, size, 3)).astype(np.float32)


@functools.cache
def forward(name, train=False):
    """x -> logits, compiled once for all tests."""
    definition, variables = nets.split(create(name))
    return run_once(functools.partial(definition.apply, variables, train=train))


def expanders(net):
    return {p: m for p, m in nnx.iter_modules(net) if isinstance(m, Expander)}


def graphs_of(layer):
    """Edges (E,) of each graph of an expander; stacked ones have several."""
    return np.asarray(layer.edges[...]).reshape(-1, layer.num_edges)


def test_a_net_without_a_small_form_is_tested_in_that_of_its_smallest_row():
    row = tiny.smallest_row("densenet")
    assert (row["depth"], row["growth"], row["wiring"]["compress"]) == (22, 8, 2)
    with pytest.raises(LookupError, match="'densnet' has no row in configs/"):
        tiny.config("densnet")


@EVERY_PAIR
def test_every_wiring_takes_a_step(name, wiring):
    """All values finite, all weights pulled, all statistics moved, the loss lower."""
    definition, variables = nets.split(create(name, wiring))
    x, labels = images(name, 4), jnp.arange(4)

    def objective(params, stats):
        state = variables | {"params": params, "stats": stats}
        logits, stats = definition.apply(state, x, train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), stats

    gradient = jax.value_and_grad(objective, has_aux=True)
    step = run_once(gradient)
    (loss, stats), gradients = step(variables["params"], variables["stats"])
    params = jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], gradients)
    (next_loss, _), _ = step(params, stats)
    assert next_loss < loss
    # A scale before another BN is pulled by its eps alone, too little to move it.
    moved = jax.tree.map(lambda old, new: new - old, variables["stats"], stats)
    for path, change in jax.tree.leaves_with_path((gradients, moved)):
        assert np.isfinite(change).all(), path
        assert np.any(change), path


@EVERY_NET_RUN
def test_evaluation_ignores_the_rest_of_the_batch(name):
    x, other, net = images(name, 4), images(name, 4, seed=1), forward(name)
    other[0] = x[0]
    np.testing.assert_array_equal(net(x)[0][0], net(other)[0][0])


@EVERY_NET_RUN
def test_training_does_not(name):
    x, other, net = images(name, 4), images(name, 4, seed=1), forward(name, train=True)
    other[0] = x[0]
    assert np.abs(net(x)[0][0] - net(other)[0][0]).max() > 1e-3


@EVERY_NET
@pytest.mark.parametrize(
    ("given", "expected"),
    [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")],
)
def test_the_input_decides_the_precision(name, given, expected):
    """Logits in float32 at least; parameters and statistics stay as they are."""
    with jax.enable_x64(given == "float64"):
        net = abstract(tiny.config(name))
        to_given = lambda x: x.update(dtype=given)
        if given == "float64":
            graphdef, state = nnx.split(net)
            net = nnx.merge(graphdef, jax.tree.map(to_given, state))
        definition, variables = nets.split(net)
        x = jax.ShapeDtypeStruct(images(name, 4).shape, given)
        apply = functools.partial(definition.apply, train=True)
        logits, stats = jax.eval_shape(apply, variables, x)
    assert logits.shape == (4, 10)
    assert logits.dtype == expected
    assert {s.dtype for s in jax.tree.leaves(stats)} == {np.dtype(expected)}


@EVERY_NET_RUN
def test_half_precision_follows_single(name):
    net, x = forward(name), images(name, 4)
    (exact, _), (rounded, _) = net(x), net(x.astype(jnp.bfloat16))
    assert np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


@EVERY_NET
def test_other_sizes_of_image_and_numbers_of_classes(name):
    net = abstract(tiny.config(name, num_classes=7))
    definition, variables = nets.split(net)
    size = tiny.image_size(name)
    x = jax.ShapeDtypeStruct((2, size + 8, size + 16, 3), jnp.float32)
    assert jax.eval_shape(definition.apply, variables, x)[0].shape == (2, 7)


@EVERY_NET
def test_removed_connections_do_not_exist(name):
    """A kernel has taps x edges values, and its edges are the degrees of its rule."""
    net = create(name, "expander")
    assert expanders(net)
    for layer in expanders(net).values():
        channels = (layer.in_channels, layer.out_channels)
        for edges in graphs_of(layer):
            mask = connectivity.mask(edges, *channels)
            assert layer.kernel.shape[-1] == mask.sum() < mask.size
            side = connectivity.sampled_side(*channels, layer.sampling)
            assert (mask.sum({"input": 1, "output": 0}[side]) == layer.degree).all()


@EVERY_NET
def test_graphs_are_a_function_of_seed_and_path(name):
    """Not of the weights' seed, of jit, nor of the other layers."""

    def graphs(net):
        return {
            path: (layer.in_channels, layer.out_channels, graphs_of(layer).tolist())
            for path, layer in expanders(net).items()
        }

    expander = tiny.config(name, "expander")
    expected = graphs(create(name, "expander"))
    assert graphs(nets.create(expander, nnx.Rngs(1))) == expected
    net = abstract(expander)
    nnx.update(net, run_once(lambda: wiring_of(expander))())
    assert graphs(net) == expected
    nnx.update(net, run_once(lambda: wiring_of(expander | {"graph_seed": 1}))())
    other = graphs(net)
    for path, graph in expected.items():
        assert other[path] != graph, path
    # Layers of one shape, even of one place in their block, have graphs of their own.
    drawn = [(i, o, tuple(g)) for i, o, graphs in expected.values() for g in graphs]
    assert len(set(drawn)) == len(drawn)


def wiring_of(config):
    return nnx.state(nets.create(config, nnx.Rngs(2)), nets.Connectivity)


@EVERY_NET
def test_every_convolution_takes_the_configured_lowering(name):
    net = abstract(tiny.config(name, "expander", lowering="native"))
    lowerings = [m.lowering for _, m in nnx.iter_modules(net) if hasattr(m, "lowering")]
    assert set(lowerings) == {"native"}


@EVERY_NET
def test_normalisation_is_set_for_the_whole_net_at_once(name):
    net = abstract(tiny.config(name))
    norms = [m for _, m in nnx.iter_modules(net) if isinstance(m, BatchNorm)]
    net.eval()
    assert norms
    assert all(norm.use_running_average for norm in norms)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="densnet"), "unknown net 'densnet'.*did you mean 'densenet'"),
        (
            dict(name="densenet", grwth=8),
            "no field 'grwth': choose from.*did you mean 'growth'",
        ),
        (dict(name="densenet", depth=41), r"depth 6 n \+ 4 with n > 0, got 41"),
        (dict(name="densenet", depth=4), r"depth 6 n \+ 4 with n > 0, got 4"),
        (
            dict(name="densenet", depth=21, bottleneck=False),
            r"without .* 3 n \+ 4 .*got 21",
        ),
        (dict(name="cfmz_resnet", depth=21), r"depth 6 n \+ 2 with n > 0, got 21"),
        (
            dict(name="densenet", wiring=dict(kind="sparse")),
            r"'sparse'.*dense.*expander.*grouped",
        ),
        (
            dict(name="densenet", wiring=dict(kind="expander", compress=1000)),
            r"compress=1000 leaves no connection .* 48 input",
        ),
        (
            dict(name="densenet", wiring=dict(kind="grouped", groups=5)),
            "5 groups do not divide 48 input channels",
        ),
        (dict(name="densenet", wiring=dict(compress=0)), "got compress=0"),
        (
            dict(name="densenet", wiring=dict(kind="expander", sampling="x")),
            "rule 'x'.*per_input",
        ),
        (
            dict(name="densenet", wiring="expander"),
            "net.wiring is a section now: use --config.net.wiring.kind=expander",
        ),
        (
            dict(name="densenet", compress=4, groups=2),
            "compress, groups moved to the section net.wiring: "
            "use --config.net.wiring.compress=4 "
            "--config.net.wiring.groups=2",
        ),
        (
            dict(name="densenet", wiring=dict(compres=4)),
            r"net.wiring has no field 'compres'.*did you mean 'compress'",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        abstract(fields)


def test_names_are_filtered_by_pattern():
    assert nets.names("dense*") == ["densenet", "densenet_imagenet"]
    assert nets.names("nothing*") == []


def test_dropout_acts_in_training_only_and_by_key():
    net = nets.create(tiny.config("densenet", dropout=0.5), nnx.Rngs(0))
    definition, variables = nets.split(net)
    x = images("densenet", 2)
    train = run_once(functools.partial(definition.apply, variables, train=True))
    first, again, other = (train(x, key=jax.random.key(i))[0] for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    evaluate = run_once(functools.partial(definition.apply, variables))
    np.testing.assert_array_equal(
        *(evaluate(x, key=key)[0] for key in jax.random.split(jax.random.key(0)))
    )
