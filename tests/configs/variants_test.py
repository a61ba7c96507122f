"""Each row of the published tables is built, and has the parameters it should have."""

import functools
import importlib
import json
import pathlib

import jax
import pytest
from flax import nnx

import nets
import optimizers
from configs.data_sets import DATA_SETS

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
FAMILIES = {
    path.stem: importlib.import_module(f"configs.{path.stem}")
    for path in sorted(CONFIGS.glob("*.py"))
    if path.stem not in ("common", "data_sets")
}
ROWS = [
    (family, variant)
    for family, module in FAMILIES.items()
    for variant in getattr(module, "VARIANTS", {})
]


@functools.cache  # data sets with as many classes have one net
def parameters(net_config):
    config = json.loads(net_config)
    net = nnx.eval_shape(lambda: nets.create(config, nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_rows_and_a_default(family):
    module = FAMILIES[family]
    assert module.VARIANTS
    default = module.get_config()
    assert default.variant in module.VARIANTS
    assert default.data.name in DATA_SETS
    # The docstring is a command that works.
    assert f"python main.py --config=configs/{family}.py" in module.__doc__


@pytest.mark.parametrize(("family", "variant"), ROWS)
def test_a_row_says_what_it_should(family, variant):
    row = FAMILIES[family].VARIANTS[variant]
    assert row.parameters, "no parameter count"
    assert row.published.keys() <= row.parameters.keys() <= DATA_SETS.keys()
    for published in row.published.values():
        assert 0 < published.error < 100
        assert published.selection in ("best", "last")
        assert published.source


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        # Those without a published result, and the deepest, wait for the slow tests.
        pytest.param(family, variant, marks=() if published else pytest.mark.slow)
        for family, variant in ROWS
        for published in [
            FAMILIES[family].VARIANTS[variant].published and "1202" not in variant
        ]
    ],
)
def test_a_row_has_the_published_number_of_parameters(family, variant):
    module = FAMILIES[family]
    row = module.VARIANTS[variant]
    counted = {}
    for data in row.parameters:
        config = module.get_config(f"{variant},{data}")
        assert (config.variant, config.data.name) == (variant, data)
        assert config.net.num_classes == DATA_SETS[data].num_classes
        assert config.net.name in nets.names()
        net = config.net.to_dict()
        assert row.net.get("wiring", {}).items() <= net["wiring"].items()
        assert (row.net | {"wiring": net["wiring"]}).items() <= net.items()
        counted[data] = parameters(config.net.to_json())
        rate = optimizers.schedule(config, 50_000)
        optimizers.create(config.optimizer, rate)
    assert counted == dict(row.parameters)
