"""Properties of every registered net, most of them with every wiring."""

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
from runtime.devices import shard
from tests.support import compiling, tiny
from tests.support.compiling import run_once
from tests.support.stepping import Steps, configured, save_images

EVERY_NET = pytest.mark.parametrize("name", nets.names())
# Even their small forms have millions of weights or many layers.
LARGE = [
    "alexnet",
    "delugenet",
    "densenet_imagenet",
    "gunn",
    "igc_resnet_imagenet",
    "vgg",
]
EVERY_NET_RUN = pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.slow if x in LARGE else ())
        for x in nets.names()
    ],
)
WIRINGS = (*KINDS, "blocks")
# Each pair compiles a train step, which takes seconds: only two are fast.
FAST_PAIRS = [(name, "expander") for name in ("cfmz_resnet", "densenet")]
# GUNN's layers run in a loop.
PAIRS = {(name, "expander") for name in nets.names()} | {("cfmz_resnet", "blocks")}
PAIRS |= {(x, y) for x in ("densenet", "gunn", "plain", "resnet") for y in WIRINGS}


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
    """Returns x -> (logits, statistics), compiled once for all tests."""
    definition, variables = nets.split(create(name))
    apply = run_once(functools.partial(definition.apply, train=train))
    # An argument, because XLA folds constant weights while it compiles.
    return functools.partial(apply, variables)


def expanders(net):
    return {p: m for p, m in nnx.iter_modules(net) if isinstance(m, Expander)}


def graphs_of(layer):
    """Returns the edges (E,) of each graph of an expander, which may be stacked."""
    return np.asarray(layer.edges[...]).reshape(-1, layer.num_edges)


def test_a_net_without_a_tiny_form_is_tested_as_its_smallest_row():
    row = tiny.smallest_row("densenet")
    assert (row["depth"], row["growth"], row["wiring"]["compress"]) == (22, 8, 2)
    with pytest.raises(LookupError, match="'densnet' has no row in configs/"):
        tiny.config("densnet")


@pytest.mark.parametrize(
    ("name", "wiring"),
    [
        pytest.param(*pair, marks=() if pair in FAST_PAIRS else pytest.mark.slow)
        for pair in sorted(PAIRS)
    ],
)
def test_every_wiring_trains_on_eight_devices(name, wiring, tmp_path):
    """One compiled train step, twice on the same batch.

    Its devices exchange nothing but sums, every value stays finite, every parameter has
    a gradient, every statistic moves, and the loss falls.
    """
    npz = save_images(tmp_path / "images.npz", tiny.image_size(name))
    # XLA's partitioner gathers the whole batch for a native grouped convolution, unless
    # the step is a shard_map.
    lowering = "native" if wiring == "grouped" else "auto"
    fields = dict(net__wiring__kind=wiring, net__lowering=lowering)
    if wiring == "blocks":
        fields = dict(net__wiring__block=2, net__lowering="blocks")
    fields |= dict(train__batch_size=32, train__batch_norm_groups=0)
    fields |= dict(data__pad=0, data__flip=False, optimizer__weight_decay=0.0)
    steps = Steps(configured(npz, name, **fields), 8)
    found = compiling.collectives(steps.compiled)
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"] <= 3

    batch = shard(next(steps.batches), steps.mesh)
    old = jax.device_get(steps.state)
    new, totals, _ = steps.compiled(steps.state, batch)
    new, totals = jax.device_get((new, totals))
    # The momentum, as a scale before another BN has too small a gradient to change.
    gradients = optax.tree_utils.tree_get(new.opt_state, "trace")
    moved = jax.tree.map(lambda old, new: new - old, old.stats, new.stats)
    for path, change in jax.tree.leaves_with_path((gradients, moved)):
        assert np.isfinite(change).all(), path
        assert np.any(change), path
    _, next_totals, bad_step = steps.compiled(
        jax.device_put(new, steps.state.step.sharding), batch
    )
    assert next_totals["loss"] - totals["loss"] < totals["loss"]
    assert bad_step == -1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [x for x in nets.names() if {(x, w) for w in WIRINGS} - PAIRS]
)
def test_every_net_has_gradients_with_every_wiring(name):
    """From shapes alone. The test above trains the other pairs."""
    x = jax.ShapeDtypeStruct(images(name, 4).shape, "float32")
    for wiring in WIRINGS:
        if (name, wiring) in PAIRS:
            continue
        kind = dict(kind="expander", block=2) if wiring == "blocks" else wiring
        definition, variables = nets.split(abstract(tiny.config(name, kind)))

        def loss(params, variables, x, definition=definition):
            variables = variables | {"params": params}
            return definition.apply(variables, x, train=True)[0].sum()

        gradient = jax.eval_shape(jax.grad(loss), variables["params"], variables, x)
        same = jax.tree.map(
            lambda a, b: a.shape == b.shape, gradient, dict(variables["params"])
        )
        assert all(jax.tree.leaves(same)), wiring


@EVERY_NET_RUN
def test_evaluation_ignores_the_rest_of_the_batch(name):
    x, other, net = images(name, 4), images(name, 4, seed=1), forward(name)
    other[0] = x[0]
    np.testing.assert_array_equal(net(x)[0][0], net(other)[0][0])


@EVERY_NET_RUN
def test_training_depends_on_the_rest_of_the_batch(name):
    x, other, net = images(name, 4), images(name, 4, seed=1), forward(name, train=True)
    other[0] = x[0]
    assert np.abs(net(x)[0][0] - net(other)[0][0]).max() > 1e-3


@EVERY_NET
@pytest.mark.parametrize(
    ("given", "expected"),
    [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")],
)
def test_the_input_decides_the_precision(name, given, expected):
    """Logits are at least float32; parameters and statistics keep their dtype."""
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


@pytest.mark.slow
@EVERY_NET
def test_half_precision_follows_single_precision(name):
    net, x = forward(name), images(name, 4)
    (exact, _), (rounded, _) = net(x), net(x.astype(jnp.bfloat16))
    assert np.abs(rounded - exact).max() < 0.05 * np.abs(exact).max()


@EVERY_NET
def test_other_image_sizes_and_numbers_of_classes(name):
    net = abstract(tiny.config(name, num_classes=7))
    definition, variables = nets.split(net)
    size = tiny.image_size(name)
    x = jax.ShapeDtypeStruct((2, size + 8, size + 16, 3), jnp.float32)
    assert jax.eval_shape(definition.apply, variables, x)[0].shape == (2, 7)


@EVERY_NET_RUN
def test_removed_connections_do_not_exist(name):
    """A kernel has taps x edges values, and the sampled side has regular degrees."""
    net = create(name, "expander")
    assert expanders(net)
    for layer in expanders(net).values():
        channels = (layer.in_channels, layer.out_channels)
        for edges in graphs_of(layer):
            mask = connectivity.to_matrix(edges, *channels)
            assert layer.kernel.shape[-1] == mask.sum() < mask.size
            side = connectivity.sampled_side(*channels, layer.sampling)
            assert (mask.sum({"input": 1, "output": 0}[side]) == layer.degree).all()


@EVERY_NET_RUN
def test_graphs_are_a_function_of_seed_and_path(name):
    """They do not depend on the weights' seed, jit or other layers."""

    def graphs(net):
        return {
            path: (layer.in_channels, layer.out_channels, graphs_of(layer).tolist())
            for path, layer in expanders(net).items()
        }

    def wiring_of(config):
        return nnx.state(nets.create(config, nnx.Rngs(2)), nets.Connectivity)

    expander = tiny.config(name, "expander")
    expected = graphs(create(name, "expander"))
    net = abstract(expander)
    nnx.update(net, run_once(lambda: wiring_of(expander))())
    assert graphs(net) == expected
    nnx.update(net, run_once(lambda: wiring_of(expander | {"graph_seed": 1}))())
    other = graphs(net)
    for path, graph in expected.items():
        assert other[path] != graph, path
    # Layers of equal shape, even at equal places in their blocks, have own graphs.
    drawn = [(i, o, tuple(g)) for i, o, graphs in expected.values() for g in graphs]
    assert len(set(drawn)) == len(drawn)


@EVERY_NET
def test_configure_sets_every_module(name):
    net = abstract(tiny.config(name, "expander", lowering="native"))
    modules = [module for _, module in nnx.iter_modules(net)]
    convolutions = [module for module in modules if hasattr(module, "lowering")]
    norms = [module for module in modules if isinstance(module, BatchNorm)]
    assert {module.lowering for module in convolutions} == {"native"}
    assert {(norm.axis_name, norm.groups) for norm in norms} == {(None, 1)}
    nets.configure(net, batch_norm_groups=4)
    assert {(norm.axis_name, norm.groups) for norm in norms} == {("data", 4)}
    assert {module.lowering for module in convolutions} == {"native"}
    nets.configure(net, lowering="auto", batch_norm_groups=0)
    assert {(norm.axis_name, norm.groups) for norm in norms} == {(None, 1)}
    assert {module.lowering for module in convolutions} == {"auto"}
    net.eval()
    assert all(norm.use_running_average for norm in norms)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(name="densnet"), "unknown net 'densnet'.*did you mean 'densenet'"),
        (dict(grwth=8), "no field 'grwth': choose from.*did you mean 'growth'"),
        (dict(depth=41), r"depth 6 n \+ 4 with n > 0, got 41"),
        (dict(depth=4), r"depth 6 n \+ 4 with n > 0, got 4"),
        (dict(depth=21, bottleneck=False), r"without .* 3 n \+ 4 .*got 21"),
        (dict(name="cfmz_resnet", depth=21), r"6 n \+ 2 with n > 0, got 21"),
        (dict(name="delugenet", layers=(2.5, 3)), "'delugenet' cannot be built: "),
        (dict(wiring=dict(kind="sparse")), r"'sparse'.*dense.*expander.*grouped"),
        (
            dict(wiring=dict(kind="expander", compress=1000)),
            r"compress=1000 leaves no connection .* 48 input",
        ),
        (
            dict(wiring=dict(kind="grouped", groups=5)),
            "5 groups do not divide 48 input channels",
        ),
        (dict(wiring=dict(compress=0)), "got compress=0"),
        (
            dict(wiring=dict(kind="expander", block=5)),
            r"blocks of 5 .* 48 -> 96 channels: net.wiring.block must divide 48",
        ),
        (
            dict(wiring=dict(kind="expander", sampling="x")),
            "rule 'x'.*per_input",
        ),
        (
            dict(wiring="expander"),
            "net.wiring is a section now: use --config.net.wiring.kind=expander",
        ),
        (
            dict(compress=4, groups=2),
            "compress, groups moved to the section net.wiring: use "
            "--config.net.wiring.compress=4 --config.net.wiring.groups=2",
        ),
        (
            dict(wiring=dict(compres=4)),
            r"net.wiring has no field 'compres'.*did you mean 'compress'",
        ),
    ],
)
def test_create_rejects_invalid_fields_and_values(fields, message):
    with pytest.raises(ValueError, match=message):
        abstract(dict(name="densenet") | fields)


@pytest.mark.slow
def test_dropout_acts_in_training_only_and_by_key():
    net = nets.create(tiny.config("densenet", dropout=0.5), nnx.Rngs(0))
    definition, variables = nets.split(net)
    x = images("densenet", 2)
    train = run_once(functools.partial(definition.apply, train=True))
    first, again, other = (
        train(variables, x, key=jax.random.key(i))[0] for i in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    evaluate, keys = run_once(definition.apply), jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(*(evaluate(variables, x, key=k)[0] for k in keys))
