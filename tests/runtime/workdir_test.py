import fcntl
import functools
import json
import os
import pathlib

import pytest
from ml_collections import ConfigDict

import train
from configs import common, delugenets, igcnets, xdensenet
from input_pipeline import Facts
from runtime import workdir
from runtime.workdir import WorkdirError, as_csv, read_rows
from tests.support.full_disk import files_no_larger_than
from tests.support.words import words

FACTS = Facts(
    ("cat", "caf\udce9"), (32, 32, 3), (1 / 3, 2.0, 3.0), (4.0, 5.0, 6.0), 9, (1, 2)
)


def config(**fields):
    """Returns a configuration with tuples, including empty ones."""
    result = igcnets.get_config("resnet-20-L24M2,cifar10")
    fields = {k.replace("__", "."): v for k, v in fields.items()}
    result.update_from_flattened_dict(fields)
    return result


def test_config_and_facts_round_trip(tmp_path):
    workdir.save_config(tmp_path, config(), FACTS)
    assert workdir.load_config(tmp_path) == config()
    assert workdir.load_facts(tmp_path) == FACTS
    assert workdir.load_step_offset(tmp_path) == 0
    assert os.listdir(tmp_path) == ["config.json"]
    text = (tmp_path / "config.json").read_text()
    assert text.index('"data"') < text.index('"net"') < text.index('"seed"')  # sorted


def test_fields_that_an_older_run_lacks_have_its_values(tmp_path):
    """They are the defaults, with which older runs were trained."""
    base = workdir.flatten(common.base())
    assert workdir.ADDED.items() <= base.items()
    workdir.save_config(tmp_path, config(), FACTS)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for field in workdir.ADDED:
        *sections, name = field.split(".")
        del functools.reduce(dict.__getitem__, sections, fields)[name]
    path.write_text(json.dumps(fields))
    assert workdir.load_config(tmp_path) == config()
    assert workdir.changes(config(), tmp_path) == []


def test_fields_of_one_net_that_an_older_run_lacks_have_its_values(tmp_path):
    config = delugenets.get_config()
    workdir.save_config(tmp_path, config, FACTS)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for field in workdir.ADDED_TO_NETS["delugenet"]:
        del fields["net"][field.removeprefix("net.")]
    path.write_text(json.dumps(fields))
    assert workdir.changes(config, tmp_path) == []


@pytest.mark.parametrize(
    "load", [workdir.load_config, workdir.load_facts, train.restore]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, "by an older version of Wirings .format 1, .* format 2.*"),
        ({"format": 3}, "by a newer version of Wirings .format 3, .* format 2.*"),
        ({"format": "two"}, "cannot be read .*: restore it .* delete it"),
        ({"data_set": None}, "cannot be read .*data_set"),
        ({"data_set": {"mean": [1.0]}}, "cannot be read .*num_train"),
        ({"step_offset": None}, "cannot be read .*step_offset"),
    ],
)
def test_config_of_another_format_is_rejected(tmp_path, load, change, message):
    workdir.save_config(tmp_path, config(), FACTS)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    with pytest.raises(WorkdirError, match=f"{path} .*{message}"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "", "[]", "1", "\0"])
def test_damaged_or_missing_config_is_rejected(tmp_path, text):
    path = tmp_path / "config.json"
    with pytest.raises(WorkdirError, match=f"{path} does not exist.*--workdir"):
        workdir.load_config(tmp_path)
    path.write_text(text)
    with pytest.raises(WorkdirError, match=f"{path} cannot be read .* delete it"):
        workdir.load_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.dtype", "bfloat16"),
        ("data.on_error", "skip"),
        ("data.name", "cifar100"),
    ],
)
def test_changes_that_affect_evaluation(tmp_path, field, value):
    old, new = config(), config(**{field: value})
    workdir.save_config(tmp_path, old, FACTS)
    (change,) = workdir.evaluation_changes(new, tmp_path)
    was = workdir.flatten(old)[field]
    assert change == f"evaluating with {field}={value} (the run was trained with {was})"


@pytest.mark.parametrize(
    "fields",
    [
        {"data.flip": False, "data.pad": 2, "data.border": "zero"},
        {"data.dir": "/elsewhere", "data.pipeline": "device"},
        {"net.lowering": "native", "net.remat": "norm", "net.graph_seed": 5},
        {"optimizer.momentum": 0.5, "train.batch_size": 32, "seed": 3},
    ],
)
def test_changes_that_do_not_affect_evaluation(tmp_path, fields):
    workdir.save_config(tmp_path, config(), FACTS)
    assert workdir.evaluation_changes(config(**fields), tmp_path) == []
    anywhere = fields.keys() - workdir.PATHS  # files may lie elsewhere
    assert len(workdir.changes(config(**fields), tmp_path)) == len(anywhere)


def test_changes_name_the_field_and_both_values(tmp_path):
    assert workdir.changes(config(), tmp_path) == []  # a new workdir
    workdir.save_config(tmp_path, config(train__epochs=0.2), FACTS)
    assert workdir.changes(config(train__epochs=0.2), tmp_path) == []
    assert workdir.changes(config(train__epochs=0.4), tmp_path) == [
        "train.epochs=0.4 (the run was started with 0.2)"
    ]


def test_an_evaluation_takes_the_net_of_the_run(tmp_path, caplog):
    """And its averaged weights, but with the requested lowering."""
    run = config(net__depth=32, train__ema=0.9)
    workdir.save_config(tmp_path, run, FACTS)
    other = xdensenet.get_config("22-8-2,digits")
    other.net.lowering = "native"
    taken = workdir.take_net(other, tmp_path)
    assert taken.net == ConfigDict(run.net.to_dict() | {"lowering": "native"})
    assert taken.train == ConfigDict(other.train.to_dict() | {"ema": 0.9})
    assert taken.data == other.data
    assert "net.depth=32 (not 22)" in caplog.text
    caplog.clear()
    assert workdir.take_net(run, tmp_path) == run
    assert not caplog.text


def test_a_workdir_has_one_run_at_a_time(tmp_path):
    run = tmp_path / "run"
    refused = pytest.raises(WorkdirError, match=f"another process is training in {run}")
    with workdir.lock(run), refused, workdir.lock(run):
        pass
    assert not run.exists()  # nothing was written


def test_a_lock_file_that_its_holder_removes_is_not_taken(tmp_path, monkeypatch):
    """Otherwise the next run would create and hold a new lock file."""
    flock = fcntl.flock

    def late(file, how):
        (tmp_path / ".lock").unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    refused = pytest.raises(WorkdirError, match="another process is training")
    with refused, workdir.lock(tmp_path):
        pass


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with workdir.lock(tmp_path):
        assert "cannot be locked: no locks available" in caplog.text


def test_rows_round_trip(tmp_path):
    rows = [{"step": 100, "loss": 0.1}, {"step": 200, "loss": 1 / 3}]
    (tmp_path / "metrics.csv").write_text(as_csv(rows))
    found = read_rows(tmp_path / "metrics.csv")
    assert found == rows
    assert isinstance(found[0]["step"], int)
    assert read_rows(tmp_path / "absent.csv") == []


@pytest.mark.parametrize(
    "text", ["step,loss\n1,", "loss\n1.0\n", "step,loss\n1\n", "\0\n1"]
)
def test_damaged_rows_are_rejected(tmp_path, text):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(WorkdirError, match=r"metrics\.csv is damaged; delete it"):
        read_rows(tmp_path / "metrics.csv")


def test_failed_write_leaves_the_old_content(tmp_path):
    path = tmp_path / "metrics.csv"
    workdir.write_text(path, "old")
    with files_no_larger_than(10), pytest.raises(WorkdirError, match=str(path)):
        workdir.write_text(path, "new" * 1000)
    assert path.read_text() == "old"


def test_one_run_lives_in_the_workdir_itself(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    run_config = config()
    ((run, folder),) = workdir.runs(run_config, "~/run")
    assert folder == pathlib.Path("/home/somebody/run")
    assert run == run_config


def test_each_seed_has_its_own_directory(tmp_path):
    run_config = config()
    run_config.update(seed=3, seeds=2)
    runs = list(workdir.runs(run_config, tmp_path))
    assert [(run.seed, run.seeds, folder.name) for run, folder in runs] == [
        (3, 1, "seed3"),
        (4, 1, "seed4"),
    ]


@pytest.mark.parametrize(
    ("folder", "seeds", "message"),
    [
        ("", 1, "--workdir empty"),
        ("gs://bucket/run", 1, "gs://bucket/run bucket gcsfuse"),
        ("run", 0, "seeds 1 0"),
    ],
)
def test_a_workdir_or_a_number_of_seeds_that_cannot_be(folder, seeds, message):
    run_config = config()
    run_config.seeds = seeds
    with pytest.raises(ValueError, match=words(message)):
        list(workdir.runs(run_config, folder))
