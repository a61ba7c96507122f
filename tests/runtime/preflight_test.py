"""What a run logs before it starts: a recipe of another data set."""

import types

import jax
import pytest

from configs import igcnets
from runtime import devices, preflight


@pytest.mark.parametrize("name", ["cifar10", "cifar10:3.0.2", "svhn_cropped"])
def test_a_recipe_of_another_data_set_is_told(name, monkeypatch):
    said = []
    monkeypatch.setattr(preflight.logging, "warning", lambda x, *y: said.append(x % y))
    config = igcnets.get_config("resnet-20-L24M2,cifar10")
    config.data.name = name
    examples = types.SimpleNamespace(
        image_shape=(32, 32, 3), labels=range(100), num_classes=10
    )
    mesh = devices.make_mesh(jax.devices()[:1])
    preflight.describe(config, examples, mesh)
    told = [
        x for x in said if "are those for cifar10" in x and "resnet-20-L24M2,SET" in x
    ]
    assert len(told) == len(said) == (name == "svhn_cropped")
