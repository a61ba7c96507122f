import csv
import json
import logging
import os
import re

import jax.numpy as jnp
import numpy as np
import pytest

from configs import xdensenet
from runtime import reporting
from runtime.clock import Clock
from runtime.reporting import Reporter, write_confusion
from runtime.workdir import read_rows

CONFIG = xdensenet.get_config("22-8-2,digits")
CONFIG.train.update(batch_size=16, epochs=4.0, log_every_steps=10)
CLOCK = Clock.of(CONFIG, 1600)  # 100 steps an epoch


def row(step, accuracy):
    return {
        "step": step,
        "epoch": step / 100,
        "test_accuracy": accuracy,
        "test_loss": 1.0,
    }


def reporter(workdir, start=0):
    return Reporter(workdir, CLOCK, start, tensorboard=False)


def totals(steps, loss=2.0):
    examples = 16.0 * steps
    sums = dict(loss=loss * examples, accuracy=examples / 2, top5=examples)
    return {k: jnp.float32(v) for k, v in (sums | {"examples": examples}).items()}


@pytest.fixture
def lines(caplog, monkeypatch):
    """What was told, line by line."""
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    caplog.set_level(logging.INFO, "absl")
    return lambda: [record.getMessage() for record in caplog.records]


def test_rows_that_will_come_again_are_dropped(tmp_path):
    """A run resumed at 250 repeats the evaluation of step 300."""
    first = reporter(tmp_path)
    for step in (100, 200, 300):
        first.evaluated(row(step, 0.5))
    again = reporter(tmp_path, start=250)
    assert [r["step"] for r in again.rows] == [100, 200]
    again.evaluated(row(300, 0.5))
    assert [r["step"] for r in read_rows(tmp_path / "metrics.csv")] == [100, 200, 300]


def test_best_is_the_first_of_equals(tmp_path):
    writer = reporter(tmp_path)
    for step, accuracy in ((100, 0.5), (200, 0.7), (300, 0.7), (400, 0.6)):
        writer.evaluated(row(step, accuracy))
    assert json.loads((tmp_path / "best.json").read_text()) == row(200, 0.7)


def test_best_comes_back_after_a_resume(tmp_path):
    """best.json of a killed run may know a row that the resumed one has not yet."""
    reporter(tmp_path).evaluated(row(300, 0.9))
    reporter(tmp_path, start=100).evaluated(row(200, 0.2))
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 200


def test_progress_tells_of_the_last_interval(tmp_path, lines):
    """Not of the whole epoch, whose sums the totals hold."""
    writer = reporter(tmp_path)
    for step in range(1, 10):
        writer.trained(step, totals(step))
    assert not lines()
    writer.trained(10, totals(10))
    assert not lines()  # still being computed
    later = {k: totals(10)[k] + v for k, v in totals(10, loss=1.0).items()}
    writer.trained(20, later)
    writer.close()
    first, second = lines()
    assert first.startswith("step 10/400  epoch 0.10  loss 2.0000")
    assert second.startswith("step 20/400  epoch 0.20  loss 1.0000")
    assert "images/s" in first
    assert "ETA" in first


def test_sums_start_over_after_an_evaluation(tmp_path, lines):
    writer = reporter(tmp_path)
    writer.trained(99, totals(99))
    writer.trained(100, totals(100))
    writer.evaluated(row(100, 0.5))
    writer.trained(110, totals(10, loss=1.5))
    writer.close()
    assert lines()[-1].startswith("step 110/400  epoch 1.10  loss 1.5000")


def test_the_first_interval_has_neither_compilation_nor_what_was_before(
    tmp_path, lines
):
    """A run resumed in the middle of an epoch starts with the sums of its beginning."""
    writer = reporter(tmp_path, start=50)
    before = totals(51, loss=8.0)
    writer.trained(51, before)
    writer._last_time -= 0.5
    writer.trained(60, {k: before[k] + v for k, v in totals(9).items()})
    writer.close()
    (line,) = lines()
    assert line.startswith("step 60/400  epoch 0.60  loss 2.0000")
    rate = int(re.search(r"(\d+) images/s", line)[1])
    assert 200 < rate <= 9 * 16 / 0.5


def test_several_steps_a_dispatch_skip_no_line(tmp_path, lines):
    writer = reporter(tmp_path)
    for step in (8, 16, 24, 32, 40):
        writer.trained(step, totals(step))
    writer.close()
    assert [line.split("/")[0] for line in lines()] == [
        *("step 16", "step 24", "step 32", "step 40")
    ]


def test_it_notices_a_loss_that_is_not_finite(tmp_path):
    writer = reporter(tmp_path)
    writer.trained(10, totals(10))
    writer.trained(11, totals(11, loss=float("nan")))
    assert writer.finite
    writer.trained(20, totals(20, loss=float("nan")))
    writer.trained(21, totals(21, loss=float("nan")))
    assert not writer.finite


@pytest.mark.parametrize("error", [AttributeError, OSError])
def test_without_tensorboard_a_run_goes_on(tmp_path, lines, monkeypatch, error):
    """A TensorFlow that does not fit its NumPy, or a disk without room for events."""

    def broken(*_):
        raise error("no _pywrap")

    from clu import metric_writers

    where = [
        (metric_writers, "SummaryWriter"),
        (reporting.input_pipeline, "tensorflow"),
    ]
    monkeypatch.setattr(*where[error is AttributeError], broken)
    writer = Reporter(tmp_path, CLOCK, 0, tensorboard=True)
    writer.evaluated(row(100, 0.5))
    writer.close()
    assert len(read_rows(tmp_path / "metrics.csv")) == 1
    assert sum("no TensorBoard events (no _pywrap)" in line for line in lines()) == 1


def test_last_words(tmp_path):
    result = row(400, 0.875) | {"best_step": 300, "best_test_accuracy": 0.9}
    said = reporting.conclusion(result, tmp_path)
    for word in ("87.50%", "step 400", "90.00%", "step 300", str(tmp_path)):
        assert word in said
    said = reporting.conclusion(row(400, 0.875), tmp_path)
    assert "87.50% (step 400)" in said


def test_confusion_says_which_class_is_taken_for_which(tmp_path):
    matrix = np.array([[3, 1, 0], [0, 5, 0], [2, 0, 0]])
    write_confusion(tmp_path, matrix, ("a", "b, c", "d"), "-7")
    rows = list(csv.DictReader((tmp_path / "per_class-7.csv").open()))
    assert [row["class"] for row in rows] == ["a", "b, c", "d"]
    assert [row["accuracy"] for row in rows] == ["0.75", "1.0", "0.0"]
    assert [row["most_taken_for"] for row in rows] == ["b, c", "", "a"]
    lines = (tmp_path / "confusion-7.csv").read_text().splitlines()
    assert lines == ['a,"b, c",d', "3,1,0", "0,5,0", "2,0,0"]
    write_confusion(tmp_path, matrix)
    assert (tmp_path / "confusion.csv").read_text().startswith("0,1,2\n3,1,0\n")
    (tmp_path / "confusion.csv").unlink()
    write_confusion(tmp_path, np.eye(1000, dtype=int))
    assert (tmp_path / "per_class.csv").exists()
    assert not (tmp_path / "confusion.csv").exists()


def test_a_class_may_have_a_name_that_is_no_text(tmp_path):
    """As the file system gives it: caf\xe9 of Latin 1."""
    name = os.fsdecode(b"caf\xe9")
    write_confusion(tmp_path, np.eye(2, dtype=int), (name, "tea"))
    assert (tmp_path / "confusion.csv").read_bytes().startswith(b"caf\xe9,tea\n")
