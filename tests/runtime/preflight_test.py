"""What a run is told beside refusals: changed fields, a recipe of another data set."""

import types

import jax
import pytest

from configs import igcnets
from runtime import devices, preflight
from runtime.checkpoints import save_config


def changed(fields):
    """Two configurations, of a workdir and of an evaluation in it."""
    old = igcnets.get_config("resnet-20-L24M2,cifar10")
    new = old.copy_and_resolve_references()
    new.update_from_flattened_dict(fields)
    return old, new


@pytest.mark.parametrize(
    "fields",
    [
        {"train.dtype": "bfloat16"},
        {"net.depth": 32},
        {"data.mean": (1.0, 2.0, 3.0)},
        {"data.name": "cifar100"},
    ],
)
def test_an_evaluation_is_told_what_it_sees_otherwise(tmp_path, fields):
    old, new = changed(fields)
    save_config(tmp_path, old)
    (field,) = fields
    (told,) = preflight.evaluation_changes(new, tmp_path)
    assert told.startswith(f"this run was trained with {field} = {old[field]}, it is")
    assert str(new[field]) in told


@pytest.mark.parametrize(
    "fields",
    [
        {"data.flip": False, "data.pad": 2, "data.border": "zero"},
        {"data.dir": "/elsewhere", "data.pipeline": "device"},
        {"net.lowering": "native", "net.graph_seed": 5},
        {"optimizer.momentum": 0.5, "train.batch_size": 32, "seed": 3},
    ],
)
def test_and_of_nothing_else(tmp_path, fields):
    old, new = changed(fields)
    save_config(tmp_path, old)
    assert preflight.evaluation_changes(new, tmp_path) == []
    assert len(preflight.changes(new, tmp_path)) == len(fields)


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
