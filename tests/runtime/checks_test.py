"""A bad value of any field ends in one error: the field, the value, a remedy."""

import importlib
from typing import get_args

import jax
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

import evaluate
import input_pipeline
import optimizers
from configs import common
from nets.connectivity import Sampling
from nets.layers.wiring import KINDS
from runtime import checks
from runtime.devices import make_mesh
from runtime.workdir import flatten
from tests.support.words import words

# A family's variant, fields, and words that the message must contain.
REFUSED = {
    "no batch": ("xdensenet", {"train.batch_size": 0}, "train.batch_size positive 0"),
    "epochs": ("xdensenet", {"train.epochs": -1.0}, "train.epochs positive -1"),
    "nan": ("xdensenet", {"train.epochs": np.nan}, "train.epochs finite nan"),
    "endless": ("xdensenet", {"train.epochs": np.inf}, "train.epochs finite inf"),
    "seed": ("xdensenet", {"seed": -1}, "seed -1"),
    "large seed": ("xdensenet", {"seed": 2**32}, "seed 2**32 4294967296"),
    "graph seed": ("xdensenet", {"net.graph_seed": -1}, "net.graph_seed -1"),
    "dropout": ("xdensenet", {"net.dropout": 2.0}, "net.dropout [0, 1) 2.0"),
    "reduction": ("xdensenet", {"net.reduction": 0.0}, "output channel 0"),
    "warm-up": (
        "xdensenet",
        {"optimizer.warmup_epochs": np.inf},
        "warmup_epochs finite",
    ),
    "no reduction": ("xdensenet", {"net.reduction": np.nan}, "net.reduction finite"),
    "infinite drop": (
        "xdensenet",
        {"optimizer.drop_epochs": (np.inf,)},
        "drop_epochs finite inf",
    ),
    "no numbers": ("xdensenet", {"optimizer.drop_epochs": ("a",)}, "drop_epochs 'a'"),
    "drops backwards": (
        "xdensenet",
        {"optimizer.drop_epochs": (3.0, 1.0)},
        "optimizer.drop_epochs decrease (3.0, 1.0)",
    ),
    "early drop": (
        "xdensenet",
        {"optimizer.drop_epochs": (-1.0, 1.0)},
        "optimizer.drop_epochs 0 (-1.0, 1.0)",
    ),
    "long warm-up": (
        "xdensenet",
        {"optimizer.warmup_epochs": 300.0},
        "optimizer.warmup_epochs=300 train.epochs=20",
    ),
    "two warm-ups": (
        "xdensenet",
        {"optimizer.schedule": "one_cycle", "optimizer.warmup_epochs": 1.0},
        "optimizer.schedule='one_cycle' --config.optimizer.warmup_epochs=0.0",
    ),
    "momentum": (
        "xdensenet",
        {"optimizer.momentum": -0.9},
        "optimizer.momentum negative -0.9",
    ),
    "both momenta": (
        "xdensenet",
        {"optimizer.rate_in_velocity": True},
        "optimizer.rate_in_velocity optimizer.nesterov=False",
    ),
    "optimizer": (
        "xdensenet",
        {"optimizer.name": "adam"},
        "optimizer.name sgd, adamw 'adamw' 'adam'",
    ),
    "decay": (
        "xdensenet",
        {"optimizer.decay_on": "weights"},
        "optimizer.decay_on auto, all, kernels 'weights'",
    ),
    "beta": ("xdensenet", {"optimizer.beta2": 1.0}, "optimizer.beta2 [0, 1) 1.0"),
    "epsilon": ("xdensenet", {"optimizer.epsilon": 0.0}, "optimizer.epsilon positive"),
    "clipping": ("xdensenet", {"optimizer.clip_norm": -1.0}, "clip_norm negative -1.0"),
    "accumulation": (
        "xdensenet",
        {"optimizer.accumulate_steps": 0},
        "optimizer.accumulate_steps positive 0",
    ),
    "schedule": (
        "xdensenet",
        {"optimizer.schedule": "cosin"},
        "optimizer.schedule 'cosin' 'cosine' one_cycle",
    ),
    "keep": ("xdensenet", {"checkpoint.keep": 0}, "checkpoint.keep positive 0"),
    "every": ("xdensenet", {"checkpoint.every_steps": -6}, "checkpoint.every_steps -6"),
    "dtype": ("xdensenet", {"train.dtype": "float16"}, "'float16' bfloat16"),
    "pipeline": ("xdensenet", {"data.pipeline": "tfdata"}, "'tfdata' tf.data device"),
    "border": ("xdensenet", {"data.border": "black"}, "'black' zero mean"),
    "crop": ("xdensenet", {"data.crop": "inceptio"}, "'inceptio' pad inception"),
    "mean": ("xdensenet", {"data.mean": ("x",)}, "data.mean numbers 'x'"),
    "two means": ("xdensenet", {"data.mean": (1.0, 2.0)}, "data.mean 3 numbers"),
    "no deviation": (
        "xdensenet",
        {"data.std": (1.0, 0.0, 1.0)},
        "data.std 3 positive 0.0",
    ),
    "dispatch": (
        "xdensenet",
        {"train.steps_per_dispatch": 4, "data.pipeline": "tf.data"},
        "train.steps_per_dispatch=4 data.pipeline=device",
    ),
    **{
        f"profile {steps}": (
            "xdensenet",
            {"train.profile_steps": steps},
            f"train.profile_steps first < last {steps}",
        )
        for steps in [(20,), (1, 2, 3), (0, 5), (5, 5), (30, 20), (1.5, 2), ("a", "b")]
    },
    "group": (
        "xdensenet",
        {"train.batch_norm_groups": 5},
        "train.batch_norm_groups=5 train.batch_size=32",
    ),
    "depth": ("xdensenet", {"net.depth": 23}, "23 6 n + 4"),
    "endless depth": ("xdensenet", {"net.depth": 10**30}, "net.depth 10,000"),
    "endless growth": ("xdensenet", {"net.growth": 10**30}, "net.growth 1,000,000"),
    "growth": ("xdensenet", {"net.growth": 0}, "output channel 0"),
    "compress": ("xdensenet", {"net.wiring.compress": 99}, "compress 99 16"),
    "groups": (
        "xdensenet",
        {"net.wiring.kind": "grouped", "net.wiring.groups": 3},
        "3 16",
    ),
    "wiring": ("xdensenet", {"net.wiring.kind": "expandr"}, "expander 'expandr'"),
    "lowering": ("xdensenet", {"net.lowering": "fast"}, "'fast' auto"),
    "remat": ("xdensenet", {"net.remat": "blok"}, "'blok' none norm block"),
    "net": ("xdensenet", {"net.name": "densnet"}, "'densnet' 'densenet'"),
    "cfmz depth": ("cfmz", {"net.depth": 21}, "21 6 n + 2"),
    "layers": ("gunn", {"net.segments": (20, 2.5, 30)}, "'gunn' 2.5 integer"),
    "data dir": (
        "xdensenet",
        {"data.name": "cifar10", "data.dir": "/nowhere"},
        "cifar10 /nowhere --config.data.dir --config.data.name=digits",
    ),
}
VARIANTS = {"xdensenet": "22-8-2,digits", "cfmz": "20,digits", "gunn": "15,digits"}


def configured(family, fields):
    config = importlib.import_module(f"configs.{family}").get_config(VARIANTS[family])
    config.update_from_flattened_dict(fields)
    return config


def refuse(config, message, devices=1):
    with pytest.raises(ValueError, match=words(message)):
        checks.check_config(config, make_mesh(jax.devices()[:devices]))


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_value_is_one_clear_line(name):
    family, fields, message = REFUSED[name]
    refuse(configured(family, fields), message)


@pytest.mark.parametrize("family", VARIANTS)
def test_the_defaults_pass(family):
    mesh = make_mesh(jax.devices()[:1])
    net, data_set = checks.check_config(configured(family, {}), mesh)
    assert hasattr(net, "classifier")
    assert data_set.path.name == "digits.npz"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"train.dtype": "float16"}, ["float16"]),
        ({"optimizer.schedule": "cosin"}, ["optimizer.schedule", "'cosin'"]),
        ({"optimizer.drop_epochs": (3.0, 1.0)}, ["optimizer.drop_epochs"]),
        (
            {"optimizer.schedule": "one_cycle", "optimizer.warmup_epochs": 1.0},
            ["'one_cycle' includes a warm-up"],
        ),
        (
            {"train.steps_per_dispatch": 4, "data.pipeline": "tf.data"},
            ["train.steps_per_dispatch=4"],
        ),
    ],
)
def test_all_problems_are_listed_at_once(fields, words):
    """Conflicts between fields and data that do not exist included."""
    fields |= {"net.depth": 41, "data.name": "cifar10", "data.dir": "/nowhere"}
    with pytest.raises(ValueError, match="3 problems") as error:
        checks.check_config(configured("xdensenet", fields), make_mesh())
    for word in ("/nowhere", "41", "6 n + 4", *words):
        assert word in str(error.value)


def test_the_types_are_those_of_the_defaults():
    defaults = {x: type(value) for x, value in flatten(common.base()).items()}
    assert defaults | checks.NET_TYPES == checks.TYPES


def test_every_rule_is_for_a_field():
    fields = {*checks.RULES, *checks.CHOICES, *checks.NEEDS}
    assert fields.union(*checks.NEEDS.values()) <= checks.TYPES.keys()


def test_every_number_has_a_rule():
    """Building the net, augment.check and input_pipeline.find check the others."""
    assert not {
        name
        for name, kind in checks.TYPES.items()
        if kind in (int, float) and name not in checks.RULES
        if not name.startswith(("net.", "data.", "augment."))
    }


# Faulty fields of a user's file, a notebook or a config.json, and words of the error.
WRONG_FIELDS = {
    "misspelt": ({"train.bacth_size": 4}, "train.bacth_size train.batch_size (int)?"),
    "of torch": ({"optimizer.lr": 0.5}, "no field optimizer.lr configs/common.py"),
    "of the net": ({"net.dpeth": 8}, "'densenet' 'dpeth' 'depth'"),
    "of the wiring": ({"net.wiring.compres": 8}, "net.wiring 'compres' 'compress'"),
    "section": ({"trian.epochs": 1.0}, "trian.epochs train.epochs (float)?"),
    "text": ({"train.epochs": "1"}, "train.epochs type float '1' type str"),
    "fraction": ({"train.batch_size": 8.5}, "train.batch_size type int 8.5 float"),
    "truth": ({"train.batch_size": True}, "train.batch_size type int True bool"),
    "number": ({"data.flip": 1}, "data.flip type bool 1 type int"),
    "none": ({"data.dir": None}, "data.dir type str None"),
    "depth": ({"net.depth": "20"}, "net.depth type int '20'"),
}


@pytest.mark.parametrize("name", WRONG_FIELDS)
def test_unknown_fields_and_wrong_types_are_rejected(name):
    fields, message = WRONG_FIELDS[name]
    values = checks.flatten(configured("xdensenet", {})) | fields
    refuse(ConfigDict(traverse_util.unflatten_dict(values, sep=".")), message)


def test_missing_fields_are_rejected():
    config = configured("xdensenet", {}).unlock()
    del config.train.epochs, config.eval
    refuse(config, "missing: eval.batch_size eval.checkpoint train.epochs get_config()")


def test_whole_numbers_are_accepted_for_floats():
    values = checks.flatten(configured("xdensenet", {})) | {"train.epochs": 3}
    config = ConfigDict(traverse_util.unflatten_dict(values, sep="."))
    checks.check_config(config, make_mesh(jax.devices()[:1]))


EXPANDER, DENSE = {"net.wiring.kind": "expander"}, {"net.wiring.kind": "dense"}
GROUPED = {"net.wiring.kind": "grouped"}
INTERLEAVED = {"net.wiring.kind": "interleaved"}
PHOTOGRAPHS, PADDED = {"data.crop": "inception"}, {"data.crop": "pad"}
STEPS, ONE_CYCLE = {"optimizer.schedule": "steps"}, {"optimizer.schedule": "one_cycle"}
STOPPED, ADAMW = {"optimizer.momentum": 0.0}, {"optimizer.name": "adamw"}
# A value of a field, settings in which it has an effect, and in which it has none.
NEEDS = {
    "net.graph_seed": (5, EXPANDER, GROUPED),
    "net.wiring.compress": (4, EXPANDER, DENSE),
    "net.wiring.sampling": ("per_input", EXPANDER, DENSE),
    "net.wiring.block": (4, EXPANDER, DENSE),
    "net.wiring.groups": (4, GROUPED, INTERLEAVED),
    "net.wiring.primary_groups": (4, INTERLEAVED, EXPANDER),
    "net.wiring.secondary_groups": (4, INTERLEAVED, GROUPED),
    "data.pad": (2, PADDED, PHOTOGRAPHS),
    "data.border": ("white", PADDED, {"data.pad": 0}),
    "data.image_size": (64, PHOTOGRAPHS, PADDED),
    "data.photograph_mean": ((1.0, 2.0, 3.0), PHOTOGRAPHS, PADDED),
    "data.photograph_std": ((1.0, 2.0, 3.0), PHOTOGRAPHS, PADDED),
    "augment.randaugment_magnitude": (5.0, {"augment.randaugment_ops": 2}, {}),
    "augment.cutmix_probability": (
        1.0,
        {"augment.cutmix": 1.0},
        {"augment.mixup": 1.0},
    ),
    "optimizer.warmup_epochs": (1.0, {"optimizer.schedule": "cosine"}, ONE_CYCLE),
    "optimizer.drop_epochs": ((5.0,), STEPS, ONE_CYCLE),
    "optimizer.drop_factor": (0.5, STEPS, {"optimizer.drop_epochs": ()}),
    "optimizer.momentum": (0.5, {}, ADAMW),
    "optimizer.nesterov": (True, {}, STOPPED),
    "optimizer.rate_in_velocity": (True, {}, ADAMW),
    "optimizer.beta1": (0.8, ADAMW, {}),
    "optimizer.beta2": (0.9, ADAMW, {}),
    "optimizer.epsilon": (0.1, ADAMW, {}),
    "optimizer.decay_on": ("kernels", {}, {"optimizer.weight_decay": 0.0}),
}


def test_every_field_with_a_need_is_tested():
    assert checks.NEEDS.keys() == NEEDS.keys()


@pytest.mark.parametrize("field", NEEDS)
def test_a_field_without_effect_is_rejected(field):
    value, effective, idle = NEEDS[field]
    checks.check_effects(configured("xdensenet", effective | {field: value}), [field])
    with pytest.raises(
        ValueError, match=words(f"{field}={value!r} no effect requires")
    ):
        checks.check_effects(configured("xdensenet", idle | {field: value}), [field])


def test_a_misspelt_choice_takes_no_effect_from_others():
    """check_config names the misspelt schedule; drop_epochs may belong to it."""
    fields = {"optimizer.schedule": "stps", "optimizer.drop_epochs": (5.0,)}
    fields |= {"net.wiring.kind": "expandr", "net.wiring.compress": 4}
    checks.check_effects(configured("xdensenet", fields), fields)


def test_fields_of_a_recipe_may_lose_their_effect():
    """Empty fields, too."""
    config = configured("cfmz", PHOTOGRAPHS | {"data.pad": 0})
    assert config.data.border == "mean"
    checks.check_effects(config, ["data.crop", "data.pad"])


@pytest.mark.parametrize(
    ("field", "table"),
    [
        ("optimizer.schedule", optimizers.SCHEDULES),
        ("optimizer.name", optimizers.OPTIMIZERS),
        ("net.wiring.kind", KINDS),
        ("net.wiring.sampling", get_args(Sampling)),
        ("eval.views", evaluate.VIEWS),
    ],
)
def test_choices_are_those_of_the_code(field, table):
    assert checks.CHOICES[field] == tuple(table)


@pytest.mark.parametrize(
    ("groups", "refused"), [(1, False), (4, False), (8, False), (24, False), (3, True)]
)
def test_batch_norm_groups_and_devices_that_do_not_fit(groups, refused):
    fields = {"train.batch_size": 48, "train.batch_norm_groups": groups}
    config = configured("xdensenet", fields)
    if refused:
        refuse(config, "train.batch_norm_groups=3 cannot 8 devices", devices=8)
    else:
        checks.check_config(config, make_mesh())


def test_a_batch_that_devices_cannot_share():
    config = configured("xdensenet", {"train.batch_size": 12})
    refuse(config, "train.batch_size=12 8 devices multiple of 8", devices=8)


@pytest.fixture(scope="module")
def digits():
    config = configured("xdensenet", {})
    train, test = input_pipeline.load_both(input_pipeline.find(config.data))
    return input_pipeline.facts(config.data, train), test


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train.batch_size": 1438}, "1438 1437"),
        ({"net.num_classes": 100}, "100 10 --config.net.num_classes=10"),
        (
            {"train.last_batch": "partial"},
            "leaves 29 of 1437 images, which 8 devices last_batch=fill",
        ),
        ({"augment.hls": ("a", 1, 2)}, "hls 'a' number"),
        (
            {"train.epochs": 1.0, "train.profile_steps": (20, 46)},
            "train.profile_steps=(20, 46) last step of the run, 45",
        ),
        ({"augment.mixup": 1.0, "train.batch_size": 8}, "mixup 1 images"),
    ],
)
def test_a_config_that_does_not_fit_the_data(digits, fields, message):
    facts, test = digits
    config = configured("xdensenet", fields)
    with pytest.raises(ValueError, match=words(message)):
        checks.check_data(config, make_mesh(), facts, test)


def test_test_images_of_another_size(digits):
    facts, test = digits
    config, mesh = configured("xdensenet", {}), make_mesh(jax.devices()[:1])
    smaller = type(test)(test.images[:, 1:], test.labels, test.class_names)
    with pytest.raises(ValueError, match=r"\(31, 32, 3\).*\(32, 32, 3\)"):
        checks.check_data(config, mesh, facts, smaller)


def test_ten_crops_require_photographs():
    config = configured("xdensenet", {"eval.views": "tencrop"})
    refuse(config, "eval.views='tencrop' data.crop='pad' --config.eval.views=flip")
