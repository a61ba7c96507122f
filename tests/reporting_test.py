import json

import pytest

import reporting
from optimizers import Clock
from reporting import Reporter

CLOCK = Clock(
    num_examples=100,
    batch_size=10,
    total=40,
    steps_per_dispatch=1,
    log_every=2,
    eval_every_epochs=1.0,
    save_every=0,
)


def row(step, accuracy):
    # A third and a tenth have no short binary form: their digits must survive.
    return {
        "step": step,
        "epoch": step / 30,
        "test_loss": 0.1,
        "test_accuracy": accuracy,
    }


def write(folder, rows, start=0):
    reporter = Reporter(folder, CLOCK, start, tensorboard=False)
    for each in rows:
        reporter.evaluated(each)
    reporter.close()
    return reporter


def test_rows_come_back_as_they_were(tmp_path):
    rows = [row(10, 1 / 3), row(20, 2 / 3)]
    write(tmp_path, rows)
    assert reporting.read_rows(tmp_path / "metrics.csv") == rows


def test_a_resumed_run_repeats_the_rows_after_its_checkpoint(tmp_path):
    write(tmp_path / "whole", [row(10, 0.1), row(20, 0.3), row(30, 0.2)])
    write(tmp_path / "parts", [row(10, 0.1), row(20, 0.3)])
    write(tmp_path / "parts", [row(20, 0.3), row(30, 0.2)], start=10)
    for name in ("metrics.csv", "best.json"):
        whole, parts = (tmp_path / run / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()


def test_best_is_the_first_of_equals(tmp_path):
    write(tmp_path, [row(10, 0.5), row(20, 0.7), row(30, 0.7), row(40, 0.6)])
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 20


def test_progress_tells_the_mean_of_its_interval(tmp_path, caplog):
    caplog.set_level("INFO")
    reporter = Reporter(tmp_path, CLOCK, 0, tensorboard=False)

    def totals(loss, examples):
        return {"loss": loss, "accuracy": 0, "top5": 0, "examples": examples}

    reporter.trained(1, totals(30, 10))
    reporter.trained(2, totals(40, 20))
    assert not caplog.messages  # fetched when the next step is under way
    reporter.trained(3, totals(45, 30))
    reporter.trained(4, totals(50, 40))
    reporter.trained(5, totals(55, 50))
    lines = [message for message in caplog.messages if message.startswith("step")]
    assert len(lines) == 2
    assert lines[0].startswith("step 2/40  epoch 0.20  loss 2.0000")
    assert lines[1].startswith("step 4/40  epoch 0.40  loss 0.5000")
    assert all("images/s" in line and "ETA" in line for line in lines)


def test_tensorboard_gets_the_numbers_of_the_row(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util import tensor_util

    reporter = Reporter(tmp_path, CLOCK, 0, tensorboard=True)
    reporter.evaluated(row(10, 0.25))
    reporter.close()
    events = event_accumulator.EventAccumulator(str(tmp_path), {"tensors": 0})
    events.Reload()
    (event,) = events.Tensors("test_accuracy")
    assert event.step == 10
    assert tensor_util.make_ndarray(event.tensor_proto) == pytest.approx(0.25)


def test_conclusion_names_final_best_and_place(tmp_path):
    final = {"step": 40, "test_accuracy": 0.5, "best_step": 20}
    text = reporting.conclusion(final | {"best_test_accuracy": 0.75}, tmp_path)
    assert "final 50.00% (step 40)" in text
    assert "best 75.00% (step 20)" in text
    assert str(tmp_path) in text
