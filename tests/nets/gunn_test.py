"""The published and the derived GUNNs: counts, and the names of the original."""

import jax
import numpy as np
import pytest
from flax import nnx

import convert
import nets
from configs import gunn
from convert.sources import empty, to_reference
from nets import cost
from nets.layers.norm import BatchNorm

# Variant, reference configuration: parameters, their tensors, running numbers of the
# batch norms, multiply-adds. Counted on the original (15, 18) or on its
# derivation.
CIFAR, IMAGENET = dict(dataset="cifar"), dict(dataset="imagenet", num_classes=1000)
SECOND = {"second_shortcut": "identity"}
NETS = {
    "15": (
        dict(depth=15, num_classes=10, **CIFAR),
        (1_585_746, 917, 13_448, 555_716_112),
    ),
    "18,imagenet2012": (
        dict(depth=18, wide=False, **IMAGENET),
        (28_909_736, 1_097, 57_728, 7_747_079_552),
    ),
    "wide-18,imagenet2012": (
        dict(depth=18, wide=True, **IMAGENET),
        (45_624_936, 1_547, 81_728, 26_066_650_752),
    ),
    "24": (
        dict(depth=24, num_classes=10, **CIFAR),
        (29_636_706, 1_817, 94_088, 10_707_270_192),
    ),
    "24-identity,cifar100": (
        dict(depth=24, num_classes=100, **CIFAR, **SECOND),
        (29_631_396, 1_592, 88_688, 10_670_042_592),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", NETS)
def test_counts_equal_the_originals(variant):
    reference, expected = NETS[variant]
    config = gunn.get_config(variant).net
    net = nnx.eval_shape(lambda: nets.create(config, nnx.Rngs(0)))
    size = 224 if reference["dataset"] == "imagenet" else 32
    total = cost.total(cost.layers(net, (1, size, size, 3)))

    imported = convert.build(dict(system="gunn", net="gunn", config=reference))
    assert jax.tree.map(np.shape, nnx.state(imported)) == jax.tree.map(
        np.shape, nnx.state(net)
    )
    sources = convert.find("gunn", "gunn").sources(imported)
    running = ("mean", "var")
    names = {k for path, s in sources.items() if path[-1] not in running for k in s[0]}
    norms = [m for _, m in nnx.iter_modules(net) if isinstance(m, BatchNorm)]
    numbers = 2 * sum(norm.mean.size for norm in norms)
    assert (total.parameters, len(names), numbers, total.macs) == expected


@pytest.mark.parametrize(
    ("reference", "names"),
    [
        (
            dict(depth=15, num_classes=10, **CIFAR),
            ["1", "4", "5", "7.1.1.1.1", "17.30.1.2.8", "18", "19", "23"],
        ),
        (
            dict(depth=18, **IMAGENET),
            ["1", "5", "6", "8.1.1", "13.20.4", "23.50.8", "20", "21", "26"],
        ),
        (
            dict(depth=24, num_classes=10, **CIFAR),
            ["7.1.1.1.1.1", "7.1.1.1.2.8", "12.25.2.1.1.2", "12.25.2.1.2.7"],
        ),
    ],
)
def test_names_are_positions_in_the_original(reference, names):
    net = convert.build(dict(system="gunn", net="gunn", config=reference))
    sources = convert.find("gunn", "gunn").sources(net)
    known = {name for source in sources.values() for name in source.shapes}
    assert {f"{name}.weight" for name in names} <= known


@pytest.mark.slow
@pytest.mark.parametrize("second", ["projection", "identity"])
def test_tensors_distinguish_the_two_readings_of_gunn_24(second):
    """GUNN-24 was not published, so its configuration is not enough."""
    reference = dict(system="gunn", net="gunn", config=dict(depth=24, num_classes=10))
    reference["config"] |= CIFAR
    section = convert.find("gunn", "gunn").section
    shortcuts = dict(shortcuts=("projection", second))
    known = section(reference["config"]) | shortcuts
    net = empty(lambda: nets.create(known, nnx.Rngs(0)))
    sources = convert.find("gunn", "gunn").sources(net)
    names = {name for source in sources.values() for name in source.shapes}
    imported = convert.build(
        reference | {"tensors": [{"name": name} for name in names]}
    )
    assert imported.layers[0].units.bottlenecks[1].shortcut == second


def test_a_stacked_variable_holds_the_tensors_of_all_segments():
    reference = dict(depth=15, num_classes=10, **CIFAR)
    net = convert.build(dict(system="gunn", net="gunn", config=reference))
    sources = convert.find("gunn", "gunn").sources(net)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape).astype(np.float32)
        for source in sources.values()
        for name, shape in source.shapes.items()
    }
    convert.load(net, tensors)
    kernel = net.layers[1].units.bottlenecks[0].conv2.kernel[...]
    third = tensors["12.3.1.2.4.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel[2], third)
    state = nnx.to_flat_state(nnx.state(net))
    returned = to_reference(sources, {path: np.asarray(v[...]) for path, v in state})
    assert returned.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(returned[name], tensor, err_msg=name)


def test_an_unknown_reference_is_rejected():
    def build(**config):
        return convert.build(dict(system="gunn", net="gunn", config=config))

    with pytest.raises(ValueError, match=r"unknown GUNN '16': choose from 15, 18"):
        build(depth=16, num_classes=10, **CIFAR)
    with pytest.raises(ValueError, match=r"GUNN-15 has no field \['mystery'\]"):
        build(depth=15, num_classes=10, mystery=1, **CIFAR)
