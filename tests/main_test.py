"""What a user reads who asks for the impossible: one line that helps, exit code 1."""

import json
import os
import shutil
import time

import launch
import pytest
from launch import TOTAL, arguments

DIGITS = "configs/xdensenet.py:22-8-2,digits"
CIFAR = "configs/xdensenet.py"

# name: (config, fields and further flags, what the message must contain)
REFUSED = {
    "variant": ("configs/xdensenet.py:40-25-2", {}, "'40-25-2' 40-24-2, did you mean"),
    "data set": ("configs/xdensenet.py:40-24-2,cifa10", {}, "'cifa10' cifar10 digits"),
    "config file": ("configs/xdensnet.py", {}, "configs/xdensnet.py xdensenet.py"),
    "field": (DIGITS, {"train.batchsize": 2}, "train.batchsize 'batch_size'"),
    "section": (DIGITS, {"traim.batch_size": 2}, "traim.batch_size 'train'"),
    "type": (DIGITS, {"train.batch_size": "many"}, "train.batch_size=many int"),
    "flag type": (DIGITS, {"data.flip": "perhaps"}, "data.flip perhaps"),
    "no batch": (DIGITS, {"train.batch_size": 0}, "train.batch_size positive 0"),
    "large batch": (DIGITS, {"train.batch_size": 1438}, "1438 1437"),
    "epochs": (DIGITS, {"train.epochs": -1.0}, "train.epochs positive -1"),
    "no epochs": (DIGITS, {"train.epochs": "nan"}, "train.epochs nan"),
    "endless": (DIGITS, {"train.epochs": "inf"}, "train.epochs inf"),
    "seed": (DIGITS, {"seed": -1}, "seed -1"),
    "momentum": (DIGITS, {"optimizer.momentum": -0.9}, "optimizer.momentum -0.9"),
    "schedule": (DIGITS, {"optimizer.drop_epochs": "(3.0,1.0)"}, "drop_epochs 3.0 1.0"),
    "both momenta": (
        DIGITS,
        {"optimizer.rate_in_velocity": True},
        "optimizer.nesterov False",
    ),
    "keep": (DIGITS, {"checkpoint.keep": 0}, "checkpoint.keep 0"),
    "every": (DIGITS, {"checkpoint.every_steps": -6}, "checkpoint.every_steps -6"),
    "dtype": (DIGITS, {"train.dtype": "float16"}, "'float16' bfloat16"),
    "pipeline": (DIGITS, {"data.pipeline": "tfdata"}, "'tfdata' tf.data device"),
    "dispatch": (
        DIGITS,
        {"train.steps_per_dispatch": 4, "data.pipeline": "tf.data"},
        "train.steps_per_dispatch 4 data.pipeline=device",
    ),
    "border": (DIGITS, {"data.border": "black"}, "'black' zero mean"),
    "group": (DIGITS, {"train.batch_norm_group": 5}, "5 16"),
    "depth": (DIGITS, {"net.depth": 23}, "23 6 n + 4"),
    "cfmz depth": ("configs/cfmz.py:20,digits", {"net.depth": 21}, "21 6 n + 2"),
    "growth": (DIGITS, {"net.growth": 0}, "groups 0"),
    "compress": (DIGITS, {"net.compress": 99}, "99 8"),
    "groups": (DIGITS, {"net.wiring": "grouped", "net.groups": 3}, "3 8"),
    "wiring": (DIGITS, {"net.wiring": "expandr"}, "'expandr' expander"),
    "lowering": (DIGITS, {"net.lowering": "fast"}, "'fast' auto"),
    "net": (DIGITS, {"net.name": "densnet"}, "'densnet' 'densenet'"),
    "classes": (DIGITS, {"net.num_classes": 100}, "100 10 --config.net.num_classes=10"),
    "no data": (
        CIFAR,
        {"data.dir": "/nowhere"},
        "cifar10 /nowhere --config.data.dir= --config.data.name=digits",
    ),
    "data name": (CIFAR, {"data.name": "cifar11", "data.dir": "/nowhere"}, "cifar10"),
    "no such mode": (DIGITS, {"--mode": "test"}, "mode test train eval"),
    "stray word": (DIGITS, {"again": None}, "'again'"),
    "no config": (None, {}, "config"),
}


def line(config, workdir, fields):
    flags = [f"--config={config}"] if config else []
    for field, value in fields.items():
        name = field if field.startswith("--") or value is None else "--config." + field
        flags.append(name if value is None else f"{name}={value}")
    return [f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def results(cache, tmp_path_factory):
    """The results of all runs of this file, by name; made once for all workers."""
    reference = launch.reference(cache)

    def copy(name):
        return shutil.copytree(reference, cache / name)

    def make(folder):
        folder.mkdir()
        quick = {"data.pipeline": "device", "train.batch_size": 16, "train.epochs": 0.1}
        runs = {
            name: line(config, folder / name, (quick if config == DIGITS else {}) | fields)
            for name, (config, fields, _) in REFUSED.items()
        }
        damaged, other, lost = copy("damaged"), copy("other"), copy("lost")
        (damaged / "config.json").write_text("{")
        (lost / "metrics.csv").unlink()
        runs["damaged config"] = arguments(damaged, train__log_every_steps=9)
        runs["other net"] = arguments(other, net__growth=6)
        runs["lost rows"] = arguments(lost)
        evaluate = {"data__dir": "", "data__pipeline": "device"}
        for which in ("last", "best", TOTAL, TOTAL + 1, "first"):
            fields = evaluate | {"eval__checkpoint": which}
            flags = arguments(reference, DIGITS, "--mode=eval", **fields)
            runs[f"eval {which}"] = flags
        empty = arguments(folder / "nothing", DIGITS, "--mode=eval")
        runs["eval nothing"] = empty
        process = launch.start(
            [], cache, command=["tests/forked.py"], stdin=launch.subprocess.PIPE
        )
        out, err = process.communicate(json.dumps(runs), timeout=300)
        assert process.returncode == 0, err
        (folder / "results.json").write_text(out)

    return json.loads((launch.once(cache / "refused", make) / "results.json").read_text())


def refused(result, words):
    assert result["code"] == 1, result
    said = result["out"] + result["err"]
    assert "Traceback" not in said
    assert said.count("error: ") == 1, said
    message = said[said.index("error: ") :]
    assert [word for word in words.split() if word not in message] == []
    assert len(message) < 700
    return message


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_that_helps(results, name):
    refused(results[name], REFUSED[name][2])
