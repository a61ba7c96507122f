"""A run knows its data and counts its progress in images."""

import dataclasses
import shutil

import numpy as np
import pytest

import train
from input_pipeline import Facts
from runtime import resume
from runtime.workdir import load_facts, read_rows, save_config
from tests.support.stepping import configured, save_images
from tests.support.words import words

FACTS = Facts(("a", "b"), (8, 8, 3), (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), 100, (7, 8))


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    return save_images(tmp_path_factory.mktemp("data") / "small.npz", 8)


@pytest.fixture(scope="module")
def finished(npz, tmp_path_factory):
    """The workdir of one epoch in batches of 16, and its rows."""
    workdir = tmp_path_factory.mktemp("run")
    train.train_and_evaluate(configured(npz, train__epochs=1.0), workdir)
    return workdir


@pytest.mark.slow
def test_other_batches_continue_from_the_share_that_is_done(
    npz, finished, tmp_path, caplog
):
    """One epoch in batches of 16, the next in batches of 32, of 8 and of 16."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for epochs, batch_size in ((2.0, 32), (3.0, 8), (4.0, 16)):
        fields = dict(train__epochs=epochs, train__batch_size=batch_size)
        config = configured(npz, **fields)
        before = len(read_rows(tmp_path / "metrics.csv"))
        result = train.train_and_evaluate(config, tmp_path)
        assert epochs <= result["epoch"] < epochs + batch_size / 100
        rows = read_rows(tmp_path / "metrics.csv")
        assert len(rows) == before + 1
        trained = (rows[-1]["step"] - rows[-2]["step"]) * batch_size
        assert abs(trained - 100) < 32
        assert train.train_and_evaluate(config, tmp_path) == result  # complete
    change = "train.batch_size=32 (the run was started with 16)"
    assert f"resuming with {change}" in caplog.text
    steps, epochs = ([row[x] for row in rows] for x in ("step", "epoch"))
    assert steps == sorted(set(steps))
    assert epochs == sorted(set(epochs))


@pytest.mark.slow
def test_a_rate_follows_the_share_that_is_done(npz, finished, tmp_path):
    """The rate drops at epoch 1.5, which is 4 steps after the first epoch, not 7."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    config = configured(npz, train__epochs=2.0, train__batch_size=32)
    config.eval.every_epochs = 0.25
    train.train_and_evaluate(config, tmp_path)
    first, *rows = read_rows(tmp_path / "metrics.csv")
    assert first["learning_rate"] == 0.01
    assert {row["learning_rate"] for row in rows} == {0.01, 0.001}
    for row in rows:  # the rate of the last step before the row
        assert (row["learning_rate"] == 0.001) == (row["epoch"] - 0.32 >= 1.5)


@pytest.mark.slow
def test_a_training_set_that_grew_is_named_and_normalised_as_before(
    npz, finished, tmp_path, caplog
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    with np.load(npz) as file:
        arrays = dict(file)
    arrays["x_train"] = np.concatenate([arrays["x_train"], arrays["x_train"] // 2])
    arrays["y_train"] = np.concatenate([arrays["y_train"]] * 2)
    np.savez(npz.with_name("grown.npz"), **arrays)
    config = configured(npz.with_name("grown.npz"), train__epochs=2.0)
    old = load_facts(tmp_path)
    train.train_and_evaluate(config, tmp_path)
    assert "resuming with 200 training images (the run was started with 100)" in (
        caplog.text
    )
    new = load_facts(tmp_path)
    assert (new.mean, new.std, new.num_train) == (old.mean, old.std, 200)
    epochs = [row["epoch"] for row in read_rows(tmp_path / "metrics.csv")]
    assert epochs == sorted(epochs)
    assert 2 <= epochs[-1] < 2.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer__momentum": 0.5}, "complete optimizer.momentum=0.5 0.9"),
        ({"train__batch_size": 32}, "complete train.batch_size=32 16"),
        ({"train__epochs": 0.5}, "holds step 7 ends at step 4 train.epochs=0.5"),
        ({"data__mean": (1.0, 2.0, 3.0)}, "data.mean (1.0, 2.0, 3.0) --workdir"),
        ({"optimizer__name": "adamw"}, "optimizer.name sgd adamw --workdir"),
        ({"optimizer__accumulate_steps": 2}, "accumulate_steps 1 2 --workdir"),
    ],
)
def test_a_complete_run_with_other_settings_is_rejected(npz, finished, fields, message):
    config = configured(npz, **{"train__epochs": 1.0} | fields)
    ended = message.startswith(("complete", "holds"))
    remedy = "--config.train.epochs init_from" if ended else ""
    with pytest.raises(ValueError, match=words(f"{message} {remedy} --workdir")):
        train.train_and_evaluate(config, finished)


def test_only_a_complete_run_is_complete(npz, finished, tmp_path):
    assert resume.find(finished).complete
    assert resume.find(tmp_path) is None
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    save_config(tmp_path, configured(npz, train__epochs=2.0), FACTS)
    assert not resume.find(tmp_path).complete
    (tmp_path / "config.json").unlink()
    assert resume.find(tmp_path) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, []),
        ({"num_train": 90}, ["90 training images (the run was started with 100)"]),
        ({"digests": (7, 9)}, ["the test images or labels differ"]),
        (
            {"digests": (6, 9)},
            ["the training images or labels", "the test images or labels"],
        ),
        ({"image_shape": (9, 9, 3), "digests": (0, 0)}, []),
    ],
)
def test_changed_data_is_described(fields, message):
    found = resume.data_changes(FACTS, dataclasses.replace(FACTS, **fields))
    assert len(found) == len(message)
    assert all(line.startswith(x) for line, x in zip(found, message, strict=True))
