"""The recipes have the fields, the steps and the learning rates of the originals."""

import functools
import itertools
import operator
import types

import jax
import numpy as np
import pytest

import data_sources
import input_pipeline
import optimizers
from configs import common
from configs.data_sets import DATA_SETS
from runtime import checks, devices
from runtime.clock import Clock
from tests.support.families import FAMILIES


def get_config(argument):
    family, _, rest = argument.partition(":")
    return FAMILIES[family].get_config(rest)


def steps(*drops, total, rates):
    return {"drops": drops, "total": total, "rates": rates}


TENTHS = (0.1, 0.01, 0.001)
HALVES = (*(0.05 / 2**i for i in range(7)), 5e-4)
ROOTS = (*(0.1 / 10 ** (i / 2) for i in range(7)), 5e-5)
DELUGE = steps(116_518, 175_168, total=234_600, rates=TENTHS)
# Each row of TABLE has the steps at which the learning rate drops, the rates, and the
# fields that differ from ORIGINALS.
ORIGINALS = {
    "data.pad": 4,
    "data.crop": "pad",
    "data.flip": True,
    "train.last_batch": "partial",
    "train.batch_norm_groups": 1,
    "train.label_smoothing": 0.0,
    "train.ema": 0.0,
    "optimizer.schedule": "steps",
    "optimizer.warmup_epochs": 0.0,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "optimizer.rate_in_velocity": False,
    "optimizer.weight_decay": 1e-4,
}
FB = {"data.border": "dataset_mean"}
FB_IMAGENET = {
    "train.batch_size": 256,
    "data.crop": "inception",
    "data.image_size": 224,
    "data.mean": (123.675, 116.28, 103.53),
    "data.std": (58.395, 57.12, 57.375),
    "augment": {"jitter": 0.4, "lighting": 0.1},
}
X_IMAGENET = FB_IMAGENET | {
    "augment": {},
    "data.crop": "random_resized",
    "train.batch_size": 128,
}
IGC_CIFAR = steps(156_200, 234_300, 273_350, total=312_500, rates=(*TENTHS, 1e-4))
IGC = {
    "train.batch_size": 64,
    "train.batch_norm_groups": 2,
    "train.last_batch": "fill",
    "data.border": "dataset_mean",
    "net.initial_var": 0.0,
}
SVHN = {
    "data.flip": False,
    "data.pad": 0,
    "data.mean": (111.609, 113.161, 120.565),
    "data.std": (50.498, 51.259, 50.244),
}


def gpus(count):
    return {"train.batch_norm_groups": count}


TABLE = {
    "cfmz:110,cifar10": (
        steps(35_157, 52_735, total=70_313, rates=TENTHS),
        {
            "train.batch_size": 128,
            "train.last_batch": "fill",
            "data.border": "mean",
            "data.std": (1.0, 1.0, 1.0),
            "optimizer.nesterov": False,
            "optimizer.rate_in_velocity": True,
        },
    ),
    "fb_resnet:resnet-20,cifar100": (
        steps(31_280, 47_311, total=64_124, rates=TENTHS),
        FB | {"train.batch_size": 128} | gpus(2),
    ),
    "fb_resnet:preresnet-200,imagenet2012": (
        steps(150_150, 300_300, total=450_450, rates=TENTHS),
        FB_IMAGENET | gpus(4),
    ),
    "delugenets:wide-146,cifar10": (DELUGE, FB | {"train.batch_size": 64}),
    "delugenets:92,imagenet2012": (
        steps(150_150, 300_300, 450_450, total=500_500, rates=(*TENTHS, 1e-4)),
        FB_IMAGENET | gpus(8),
    ),
    "gunn:15,cifar100": (
        DELUGE,
        FB | {"train.batch_size": 64, "augment": {"jigsaw": True}} | gpus(4),
    ),
    "gunn:18,imagenet2012": (
        steps(150_150, 300_300, 450_450, total=600_600, rates=(*TENTHS, 1e-5)),
        FB_IMAGENET | gpus(4),
    ),
    "igcnets:plain-20-L450M2,cifar10": (
        IGC_CIFAR,
        IGC
        | {
            "data.mean": (125.307, 122.950, 113.865),
            "data.std": (62.993, 62.089, 66.705),
        },
    ),
    "igcnets:plain-20-L450M2,cifar100": (
        IGC_CIFAR,
        IGC
        | {
            "data.mean": (129.304, 124.070, 112.434),
            "data.std": (68.170, 65.392, 70.418),
        },
    ),
    "igcnets:plain-20-L16M32,svhn_cropped_extra": (
        steps(188_860, 283_290, 330_505, total=377_743, rates=(*TENTHS, 1e-4)),
        IGC | SVHN,
    ),
    "igcnets:imagenet-L100M2,imagenet2012": (
        steps(150_120, 300_240, 450_360, total=600_548, rates=(*TENTHS, 1e-4)),
        IGC
        | {
            "train.batch_size": 256,
            "data.crop": "scale_aspect",
            "data.image_size": 224,
            "data.mean": (123.370, 112.757, 99.406),
            "data.std": (68.998, 66.093, 68.292),
            "augment": {"hls": (36, 50, 50)},
        }
        | gpus(8),
    ),
    "xdensenet:40-24-2,cifar10": (
        steps(117_300, 175_950, total=234_600, rates=TENTHS),
        {
            "train.batch_size": 64,
            "data.border": "zero",
            "data.mean": (125.3, 123.0, 113.9),
            "data.std": (63.0, 62.1, 66.7),
        },
    ),
    "xvgg:16-bn-expander,cifar10": (
        steps(*range(11_730, 82_111, 11_730), total=117_300, rates=HALVES),
        {
            "train.batch_size": 128,
            "data.border": "zero",
            "optimizer.weight_decay": 5e-4,
            "net.norm_scale": "uniform",
        },
    ),
    "xmobilenet:0.5,imagenet2012": (
        steps(*range(75_075, 525_526, 75_075), total=750_750, rates=ROOTS),
        X_IMAGENET
        | {
            "train.batch_size": 256,
            "optimizer.nesterov": False,
            "optimizer.weight_decay": 4e-5,
            "net.norm_scale": "uniform",
        }
        | gpus(2),
    ),
    "ximagenet:densenet-121-2,imagenet2012": (
        steps(300_300, 600_600, total=900_900, rates=TENTHS),
        X_IMAGENET | {"net.norm_scale": "uniform"} | gpus(2),
    ),
    "ximagenet:densenet-161-2,imagenet2012": (
        steps(300_300, 600_600, total=900_900, rates=TENTHS),
        X_IMAGENET | {"net.norm_scale": "uniform"} | gpus(4),
    ),
    "ximagenet:resnet-34-2,imagenet2012": (
        steps(300_300, 600_600, total=900_900, rates=TENTHS),
        X_IMAGENET | {"net.torch_bias": True},
    ),
    "xalexnet:expander,imagenet2012": (
        steps(300_300, 600_600, total=900_900, rates=TENTHS),
        X_IMAGENET | {"net.norm_scale": "uniform"},
    ),
    "xalexnet:dense,imagenet2012": (
        steps(300_300, 600_600, total=900_900, rates=(0.01, 0.001, 0.0001)),
        X_IMAGENET | {"net.norm_scale": "uniform"},
    ),
}


def lookup(config, path):
    value = functools.reduce(operator.getitem, path.split("."), config)
    return value.to_dict() if hasattr(value, "to_dict") else value


@pytest.mark.parametrize("argument", TABLE)
def test_a_recipe_has_the_fields_of_its_original(argument):
    config, expected = get_config(argument), ORIGINALS | TABLE[argument][1]
    expected["augment"] = common.base().augment.to_dict() | expected.get("augment", {})
    data = config.data
    one = data_sources.InMemory(np.zeros((1, 1, 1, 3), np.uint8), np.zeros(1), ("0",))
    facts = input_pipeline.facts(data, one)
    data.mean, data.std = facts.mean, facts.std
    found = {path: lookup(config, path) for path in expected}
    assert found == expected
    assert config.recipe == "faithful"


@pytest.mark.parametrize("argument", TABLE)
def test_a_recipe_has_the_steps_and_rates_of_its_original(argument):
    config, expected = get_config(argument), TABLE[argument][0]
    images = DATA_SETS[config.data.name].num_train
    clock = Clock.of(config, images)
    assert clock.total == expected["total"]
    rate = optimizers.schedule(config, images)
    edges = [0, *expected["drops"], clock.total]
    found = [
        (float(rate(first)), float(rate(following - 1)))
        for first, following in itertools.pairwise(edges)
    ]
    np.testing.assert_allclose(found, [(r, r) for r in expected["rates"]], rtol=1e-5)


@pytest.mark.parametrize("argument", TABLE)
def test_a_recipe_can_be_run(argument):
    """On one device, the last batch too is split into groups with own statistics."""
    config = get_config(argument)
    names = tuple(map(str, range(config.net.num_classes)))
    shape, num_train = (32, 32, 3), DATA_SETS[config.data.name].num_train
    facts = input_pipeline.Facts(names, shape, (0.0,) * 3, (1.0,) * 3, num_train)
    test = types.SimpleNamespace(class_names=names, image_shape=shape)
    checks.check_data(config, devices.make_mesh(jax.devices()[:1]), facts, test)


def test_every_family_and_published_data_set_has_a_row():
    rows = {tuple(x.partition(":")[::2]) for x in TABLE}
    rows = {(family, rest.partition(",")[2]) for family, rest in rows}
    for family, module in FAMILIES.items():
        for name in {d for v in module.VARIANTS.values() for d in v.published}:
            # The recipes for the two CIFAR sets differ only in their normalisation.
            name = name.replace("cifar100", "cifar10")
            assert {(family, name), (family, name + "0")} & rows, (family, name)


@pytest.mark.parametrize("argument", TABLE)
def test_a_modern_recipe_trains_the_same_net(argument):
    faithful, modern = get_config(argument), get_config(f"{argument},modern")
    assert modern.recipe == "modern"
    assert modern.net == faithful.net
    assert modern.data == faithful.data
    images = DATA_SETS[modern.data.name].num_train
    rate, total = optimizers.schedule(modern, images), modern.train.epochs
    assert total <= faithful.train.epochs
    last = Clock.of(modern, images).total - 1
    assert float(rate(last)) < 1e-3 * modern.optimizer.learning_rate
    chosen = dict(schedule="one_cycle", min_learning_rate=0.0, nesterov=True)
    decay, peak = (faithful.optimizer[x] for x in ("weight_decay", "learning_rate"))
    if modern.data.crop == "pad":
        decay, peak = 5e-4, 2 * peak
    chosen |= dict(weight_decay=decay, learning_rate=peak)
    assert {field: modern.optimizer[field] for field in chosen} == chosen
    assert not modern.optimizer.rate_in_velocity
