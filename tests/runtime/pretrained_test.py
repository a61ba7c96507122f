"""Weights from another run: what fits is taken, the rest is named or refused."""

import numpy as np
import pytest

from runtime.checkpoints import Checkpoints, by_path
from runtime.pretrained import initialize, load_weights
from tests.support.words import words


def variables(value, classes=2, width=4, **more):
    def full(*shape):
        return np.full(shape, value, np.float32)

    classifier = {"kernel": full(width, classes), "bias": full(classes)}
    conv = {"kernel": full(3, 3, 3, width)} | more
    return {
        "params": {"blocks": {0: {"conv": conv}}, "classifier": classifier},
        "stats": {"norm": {"mean": full(width)}},
        "wiring": {"blocks": {0: {"conv": {"edges": np.full(7, value, np.int32)}}}},
    }


def save(workdir, states, **averages):
    """A run whose first checkpoint is the best."""
    workdir.mkdir()
    (workdir / "config.json").touch()
    with Checkpoints(workdir) as checkpoints:
        for step, state in states.items():
            rest = {"opt_state": {"velocity": np.ones(3)}, "ema": averages}
            row = {"test_accuracy": 1 / step}
            checkpoints.save(step, state | rest, row)


@pytest.fixture
def source(tmp_path):
    save(tmp_path / "run", {3: variables(3), 6: variables(6)})
    return str(tmp_path / "run")


def assert_all(tree, value, but=()):
    for path, array in by_path(tree).items():
        expected = 0 if any(name in path for name in but) else value
        assert (array == expected).all(), path


@pytest.mark.parametrize(
    ("suffix", "value"), [("", 3), ("@best", 3), ("@last", 6), ("@6", 6), ("@3", 3)]
)
def test_weights_statistics_and_graphs_are_taken(source, suffix, value):
    assert_all(initialize(variables(0), source + suffix), value)


def test_averages_are_taken_instead_of_weights(tmp_path):
    averages = {k: v for k, v in variables(9).items() if k != "wiring"}
    save(tmp_path / "run", {3: variables(3)}, **averages)
    for path, array in load_weights(str(tmp_path / "run")).items():
        assert (array == (3 if path.startswith("wiring/") else 9)).all()


def test_home_and_an_at_sign_in_a_directory(tmp_path, monkeypatch):
    save(tmp_path / "me@home", {3: variables(3)})
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in ("~/me@home", "~/me@home@last"):
        assert_all(initialize(variables(0), source), 3)


def test_a_classifier_for_other_classes_starts_fresh_and_is_named(source, caplog):
    with caplog.at_level("INFO", logger="absl"):
        result = initialize(variables(0, classes=5), source)
    assert_all(result, 3, but=["classifier"])
    message = "these layers start fresh, as their shapes differ: classifier"
    assert message in caplog.messages


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (variables(0, bias=np.zeros(4)), "another net 1 has no params/blocks/0/conv"),
        (variables(0, width=8), "another net shapes (3, 3, 3, 4) here (3, 3, 3, 8)"),
    ],
)
def test_another_net_is_rejected(source, ours, message):
    with pytest.raises(ValueError, match=words(f"init_from={source} {message}")):
        initialize(ours, source)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        ("/other", "neither workdir config.json"),
        pytest.param("/config.json", "weight file", marks=pytest.mark.slow),
        ("@4", "'4' available: last, best, 3, 6"),
    ],
)
def test_a_missing_source_is_named(source, suffix, message):
    with pytest.raises(ValueError, match=words(f"{source} {message}")):
        load_weights(source + suffix)
