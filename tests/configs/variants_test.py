"""The rows of every VARIANTS table are complete, and their configs agree."""

import pytest

import nets
import optimizers
from configs.data_sets import CIFAR, DATA_SETS
from nets import cost
from tests.support.counting import with_classes
from tests.support.families import FAMILIES

ROWS = [
    (family, variant)
    for family, module in FAMILIES.items()
    for variant in module.VARIANTS
]
CIFAR_FAMILIES = [
    family
    for family, module in FAMILIES.items()
    if any(row.parameters.keys() >= {*CIFAR} for row in module.VARIANTS.values())
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_rows_and_a_default(family):
    module = FAMILIES[family]
    default = module.get_config()
    assert default.variant in module.VARIANTS
    assert default.data.name in DATA_SETS


@pytest.mark.parametrize(("family", "variant"), ROWS)
def test_a_row_is_complete(family, variant):
    row = FAMILIES[family].VARIANTS[variant]
    assert row.parameters, "no parameter count"
    assert row.published.keys() <= row.parameters.keys() <= DATA_SETS.keys()
    for published in row.published.values():
        assert 0 < published.error < 100
        assert published.selection in ("best", "last")
        assert published.source


def configs(family, variant) -> dict:
    """Returns the config of a row for each of its data sets."""
    module = FAMILIES[family]
    data_sets = module.VARIANTS[variant].parameters
    return {data: module.get_config(f"{variant},{data}") for data in data_sets}


@pytest.mark.parametrize(("family", "variant"), ROWS)
def test_data_sets_of_a_row_differ_in_the_number_of_classes_alone(family, variant):
    row, built = FAMILIES[family].VARIANTS[variant], None
    for data, config in configs(family, variant).items():
        assert (config.variant, config.data.name) == (variant, data)
        assert config.net.num_classes == DATA_SETS[data].num_classes
        assert config.net.name in nets.names()
        net = config.net.to_dict()
        assert row.net.get("wiring", {}).items() <= net["wiring"].items()
        assert (row.net | {"wiring": net["wiring"]}).items() <= net.items()
        built = built or net
        assert net | {"num_classes": built["num_classes"]} == built
        optimizers.schedule(config, 50_000)
        assert not (config.optimizer.rate_in_velocity and config.optimizer.nesterov)


@pytest.mark.slow
@pytest.mark.parametrize("family", CIFAR_FAMILIES)
def test_only_the_classifier_grows_with_the_classes(family):
    """analysis/summary_test.py counts each net for one number of classes only."""
    module = FAMILIES[family]
    rows = {n: v.parameters for n, v in module.VARIANTS.items()}
    rows = {n: x["cifar100"] for n, x in rows.items() if x.keys() >= {*CIFAR}}
    smallest = min(rows, key=rows.get)
    ten, hundred = (
        cost.of(module.get_config(f"{smallest},{data}").net, (32, 32, 3))
        for data in CIFAR
    )
    assert with_classes(ten, 100) == hundred
