"""Commands that cannot work end with one line that helps, and exit code 1."""

import json
import resource
import shutil
from subprocess import PIPE

import numpy as np
import pytest

from runtime.workdir import read_rows
from tests.support import launch
from tests.support.launch import arguments

DIGITS = "configs/xdensenet.py:22-8-2,digits"
CIFAR = "configs/xdensenet.py"

# name: (config, fields and further flags, words that the message must contain). For
# values of fields see runtime/checks_test.py, for paths runtime/command_line_test.py.
REFUSED = {
    "field": (DIGITS, {"train.batchsize": 2}, "train.batchsize 'batchsize' batch_size"),
    "flat wiring": (DIGITS, {"net.wiring": "grouped"}, "net.wiring net.wiring.kind"),
    "value for a section": (DIGITS, {"data": "{}"}, "data section data.name"),
    "text as config": ("README.md", {}, "README.md get_config()"),
    "type": (
        DIGITS,
        {"train.batch_size": "16: many"},
        "train.batch_size=16: many: expected an integer",
    ),
    "number": (
        DIGITS,
        {"optimizer.learning_rate": "fast"},
        "optimizer.learning_rate=fast: expected a number",
    ),
    "flag type": (
        DIGITS,
        {"data.flip": "perhaps"},
        "data.flip=perhaps: expected true or false",
    ),
    "no effect": (DIGITS, {"data.image_size": 64}, "data.image_size=64 data.crop"),
    "huge": (DIGITS, {"net.depth": 10**30}, "net.depth 10,000"),
    "no batch": (DIGITS, {"train.batch_size": 0}, "train.batch_size positive 0"),
    "no step": (DIGITS, {"train.epochs": 1e-10}, "train.epochs 1e-10 step"),
    "schedule": (DIGITS, {"optimizer.drop_epochs": "(3.0,1.0)"}, "drop_epochs 3.0 1.0"),
    "three at once": (
        CIFAR,
        {"data.dir": "/nowhere", "optimizer.schedule": "stps", "net.depth": 41},
        "/nowhere optimizer.schedule 'stps' 'steps' 41 6 n + 4",
    ),
    "no data": (
        CIFAR,
        {"data.dir": "/tmp"},
        "cifar10 /tmp --config.data.dir --config.data.name=digits",
    ),
    "data name": (CIFAR, {"data.name": "cifar11", "data.dir": "/tmp"}, "cifar10"),
    "bucket": (DIGITS, {"--workdir": "gs://bucket/run"}, "gs://bucket/run gcsfuse"),
    "no such mode": (DIGITS, {"--mode": "test"}, "mode test train eval"),
    "stray word": (DIGITS, {"again": None}, "'again'"),
    "no workdir": (DIGITS, {"--workdir": ""}, "--workdir empty"),
    "no config": (None, {}, "--config config.json --help"),
}
# The same for runs in an existing workdir.
REFUSED_THERE = {
    "damaged config": "damaged/config.json delete",
    "other net": "other/checkpoints/144 other/config.json params/blocks/0/0/conv1",
    "lost rows": "metrics.csv --mode=eval",
    "damaged rows": "metrics.csv delete",
    "eval 145": "'145' last best 135 144 whole/checkpoints",
    "eval first": "'first' last best 135 144 whole/checkpoints",
    "eval nothing": "nothing/config.json exist --workdir",
    "changed": "complete train.log_every_steps=9 10 --workdir init_from",
    "fewer epochs": "holds step 144 step 36 train.epochs=0.4 --workdir",
}


def line(config, workdir, fields):
    if config == DIGITS:
        quick = {"data.pipeline": "device", "train.batch_size": 16, "train.epochs": 0.1}
        fields = quick | fields
    flags = [f"--config={config}"] if config else []
    for field, value in fields.items():
        name = field if field.startswith("--") or value is None else "--config." + field
        flags.append(name if value is None else f"{name}={value}")
    return [f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def results(cache, tmp_path_factory):
    """The results of all runs of this file by name, computed once for all workers."""
    reference = launch.reference(cache)

    def copy(name):
        return shutil.copytree(reference, cache / name)

    def files(name):
        folder = cache / name
        return sorted(str(x.relative_to(folder)) for x in folder.rglob("*"))

    def make(folder):
        folder.mkdir()
        runs = {
            name: line(config, folder / name, fields)
            for name, (config, fields, _) in REFUSED.items()
        }
        damaged, lost, cut = copy("damaged"), copy("lost"), copy("cut")
        (damaged / "config.json").write_text("{")
        (lost / "metrics.csv").unlink()
        (cut / "metrics.csv").write_text("step,epoch\n36,")
        runs["damaged config"] = arguments(damaged)
        runs["other net"] = arguments(copy("other"), net__growth=6)
        runs["lost rows"] = arguments(lost)
        runs["damaged rows"] = arguments(cut)
        runs["changed"] = arguments(copy("changed"), train__log_every_steps=9)
        runs["fewer epochs"] = arguments(copy("fewer"), train__epochs=0.4)
        runs["quiet"] = arguments(copy("quiet"), DIGITS, "--verbosity=-1")
        defaults = dict(data__pipeline="auto", train__tensorboard=True)
        runs["short"] = arguments(folder / "short", train__epochs=0.4, **defaults)
        for which in ("last", "best", 144, 145, "first"):
            # Fields that affect training only are not checked.
            flags = ["--mode=eval", "--config.train.batch_size=2000"]
            flags.append(f"--config.eval.checkpoint={which}")
            runs[f"eval {which}"] = arguments(reference, DIGITS, *flags)
        last = ["--mode=eval", "--config.eval.checkpoint=last"]
        runs["eval own"] = [f"--workdir={reference}", *last]
        runs["eval other"] = arguments(reference, DIGITS, *last, net__depth=16)
        before = {name: files(name) for name in ("damaged", "other")}
        nothing = folder / "nothing"
        runs["eval nothing"] = arguments(nothing, DIGITS, "--mode=eval")
        names, results = sorted(runs), {}
        halves = [{name: runs[name] for name in names[i::2]} for i in range(2)]
        command = ["-m", "tests.support.forked"]
        processes = [launch.start([], cache, command, stdin=PIPE) for _ in halves]
        for process, half in zip(processes, halves, strict=True):
            json.dump(half, process.stdin)
            process.stdin.close()
        for process in processes:
            out = process.stdout.read()
            assert process.wait() == 0, process.stderr.read()
            results |= json.loads(out)
        results["left"] = {name: (before[name], files(name)) for name in before}
        (folder / "results.json").write_text(json.dumps(results))

    folder = launch.once(cache / "refused", make)
    return json.loads((folder / "results.json").read_text())


def refused(result, words):
    assert result["code"] == 1, result
    said = result["out"] + result["err"]
    assert "Traceback" not in said
    assert said.count("error: ") == 1, said
    message = said[said.index("error: ") :]
    assert [word for word in words.split() if word not in message] == []
    assert len(message) < 1200


@pytest.mark.parametrize("name", REFUSED)
def test_errors_are_one_line(results, name):
    refused(results[name], REFUSED[name][2])


@pytest.mark.parametrize("name", REFUSED_THERE)
def test_workdir_errors_are_one_line(results, name):
    refused(results[name], REFUSED_THERE[name])


def test_rejected_runs_leave_no_trace(results, cache):
    for before, after in results["left"].values():
        assert after == before
    config = (cache / "other" / "config.json").read_text()
    assert config == (launch.reference(cache) / "config.json").read_text()
    assert not (cache / "refused" / "no batch").exists()
    assert not (cache / "refused" / "nothing").exists()


def test_a_run_on_images_in_memory_does_not_import_tensorflow(results, cache):
    for name in ("short", "eval last", "no data"):
        assert "TensorFlow was imported" not in results[name]["err"]
    assert results["short"]["code"] == 0
    assert list((cache / "refused" / "short").glob("events.out.tfevents.*"))


def test_a_quiet_run_logs_nothing(results):
    assert results["quiet"]["code"] == 0
    assert results["quiet"]["out"] + results["quiet"]["err"] == ""


def test_eval_takes_the_requested_checkpoint(results, cache):
    rows = read_rows(launch.reference(cache) / "metrics.csv")
    best = max(rows, key=lambda row: row["test_accuracy"])
    wanted = {"best": best} | dict.fromkeys(("last", "144", "own", "other"), rows[-1])
    for name, row in wanted.items():  # "own": without --config
        result = results[f"eval {name}"]
        assert result["code"] == 0
        said = f"{row['test_accuracy']:.2%} (step {row['step']})"
        assert said in result["out"]
        assert f"{row['test_loss']:.4f}" in result["out"]
    assert "the net of the run: net.depth=7 (not 16)" in results["eval other"]["err"]


WITHOUT_TENSORFLOW = """
import runpy, sys

class Hiding:  # as if TensorFlow were not installed, even for find_spec
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ("tensorflow", "tensorboard"):
            return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):  # such as find_distributions, for importlib.metadata
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_machine_without_tensorflow(tmp_path, cache):
    command = ["-c", WITHOUT_TENSORFLOW]
    short = dict(train__tensorboard=True, train__epochs=0.4, eval__every_epochs=0.2)
    flags = arguments(tmp_path / "run", **short)
    said = launch.complete(flags, cache, command=command)
    assert "no TensorBoard events" in said
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows] == [18, 36]
    code, out, err = launch.finish(
        launch.start([*flags, "--mode=eval"], cache, command=command)
    )
    assert code == 0, err
    best = max(row["test_accuracy"] for row in rows)
    assert f"{best:.2%}" in out
    flags = arguments(tmp_path / "other", data__pipeline="tf.data")
    code, out, err = launch.finish(launch.start(flags, cache, command=command))
    refused({"code": code, "out": out, "err": err}, "TensorFlow pipeline=device")


@pytest.mark.slow
def test_too_little_memory(tmp_path, cache):
    images, labels = np.zeros((2000, 256, 256, 3), np.uint8), np.arange(2000) % 2
    few = dict(x_test=images[:2], y_test=labels[:2])
    np.savez_compressed(tmp_path / "big.npz", x_train=images, y_train=labels, **few)
    fields = {
        "data.name": tmp_path / "big.npz",
        "data.pipeline": "device",
        "data.mean": "(1.0,1.0,1.0)",
        "data.std": "(1.0,1.0,1.0)",
        "net.num_classes": 2,
        "train.batch_size": 2000,  # half a terabyte of VGG's maps
    }
    flags = line("configs/xvgg.py", tmp_path / "run", fields)
    env = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # no step is run
    process = launch.start(flags, cache, env=env)
    most = 2**38  # bytes, for systems that promise more than they have
    resource.prlimit(process.pid, resource.RLIMIT_AS, (most, most))
    code, out, err = launch.finish(process)
    result = {"code": code, "out": out, "err": err}
    refused(result, "out of memory train.batch_size eval.batch_size bfloat16")
