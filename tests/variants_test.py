"""Every row of every VARIANTS table is built and counted, because it exists."""

import importlib
import pathlib

import jax
import pytest
from flax import nnx

import nets
from configs import common

FAMILIES = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parents[1] / "configs").glob("*.py")
    if path.stem not in ("__init__", "common")
)
ROWS = [
    (family, name)
    for family in FAMILIES
    for name in importlib.import_module(f"configs.{family}").VARIANTS
]


def count(config) -> int:
    net = nnx.eval_shape(lambda: nets.create(config.net, nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(net, nnx.Param)))


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_variant_has_exactly_its_parameters(family, name):
    module = importlib.import_module(f"configs.{family}")
    variant = module.VARIANTS[name]
    assert variant.parameters, "a row states its parameter count"
    assert set(variant.published) <= set(variant.parameters)
    for data, parameters in variant.parameters.items():
        config = module.get_config(f"{name},{data}")
        assert config.variant == name
        assert config.data.name == data
        assert count(config) == parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_default_is_a_variant_and_rows_say_where_they_come_from(family):
    module = importlib.import_module(f"configs.{family}")
    assert module.get_config().variant in module.VARIANTS
    for variant in module.VARIANTS.values():
        for published in variant.published.values():
            assert published.selection in ("best", "last")
            assert 0 < published.error < 100
            assert published.source


def test_the_smallest_change_of_a_net_changes_the_count():
    config = importlib.import_module("configs.xdensenet").get_config()
    before = count(config)
    config.net.compress = 3
    assert count(config) < before


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("40-42-2", "40-42-2.*choose from.*40-24-2.*did you mean"),
        ("40-24-2,cifar11", "cifar11.*choose from.*digits.*did you mean 'cifar10'"),
    ],
)
def test_unknown_names_are_answered_with_the_choices(argument, message):
    with pytest.raises(ValueError, match=message):
        importlib.import_module("configs.xdensenet").get_config(argument)


def test_every_data_set_of_an_argument_has_a_class_count():
    for data, classes in common.NUM_CLASSES.items():
        config = importlib.import_module("configs.xdensenet").get_config(f",{data}")
        assert config.net.num_classes == classes
