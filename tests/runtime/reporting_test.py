import csv
import gzip
import io
import json
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import xdensenet
from data_sources import tfrecords
from runtime import reporting, tensorboard
from runtime.clock import Clock
from runtime.reporting import Reporter, write_confusion
from runtime.workdir import read_rows

CONFIG = xdensenet.get_config("22-8-2,digits")
CONFIG.train.update(batch_size=16, epochs=4.0, log_every_steps=10, tensorboard=False)
CLOCK = Clock.of(CONFIG, 1600)  # 100 steps an epoch


def row(step, accuracy):
    return {
        "step": step,
        "epoch": step / 100,
        "test_accuracy": accuracy,
        "test_loss": 1.0,
    }


class Time:
    """A clock that moves only when a test sets it."""

    seconds = 0.0

    def __call__(self):
        return self.seconds


def reporter(workdir, step=0, now=None, **fields):
    config = CONFIG.copy_and_resolve_references()
    config.train.update(fields)
    return Reporter(workdir, CLOCK, step, config, now or Time())


def totals(steps, loss=2.0):
    examples = 16.0 * steps
    sums = dict(loss=loss * examples, accuracy=examples / 2, top5=examples)
    return {k: jnp.float32(v) for k, v in (sums | {"examples": examples}).items()}


@pytest.fixture
def lines(caplog, monkeypatch):
    """Returns the lines logged so far."""
    monkeypatch.setattr(logging.getLogger("absl"), "propagate", True)
    caplog.set_level(logging.INFO, "absl")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def events(monkeypatch):
    """Records the calls of the TensorBoard writer: (kind, *arguments)."""
    calls = []

    class Recorder:
        def __init__(self, workdir):
            self.write = lambda *call: calls.append(call)
            self.close = lambda: calls.append(("close",))

    monkeypatch.setattr(reporting, "TensorBoard", Recorder)
    return calls


def test_rows_that_will_be_repeated_are_dropped(tmp_path):
    """A run resumed at step 250 repeats the evaluation of step 300."""
    first = reporter(tmp_path)
    for step in (100, 200, 300):
        first.evaluated(row(step, 0.5))
    again = reporter(tmp_path, step=250)
    assert [r["step"] for r in again.rows] == [100, 200]
    again.evaluated(row(300, 0.5))
    for name in ("metrics.csv", "speed.csv"):
        assert [r["step"] for r in read_rows(tmp_path / name)] == [100, 200, 300]


def test_best_is_the_first_of_equal_rows(tmp_path):
    writer = reporter(tmp_path)
    for step, accuracy in ((100, 0.5), (200, 0.7), (300, 0.7), (400, 0.6)):
        writer.evaluated(row(step, accuracy))
    assert json.loads((tmp_path / "best.json").read_text()) == row(200, 0.7)


def test_best_ignores_rows_after_the_resumed_step(tmp_path):
    """best.json of a killed run may hold a row that the resumed run has not reached."""
    reporter(tmp_path).evaluated(row(300, 0.9))
    reporter(tmp_path, step=100).evaluated(row(200, 0.2))
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 200


def test_progress_covers_the_last_interval(tmp_path, lines):
    """Not the whole epoch, whose sums `totals` holds."""
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


def test_sums_restart_after_an_evaluation(tmp_path, lines):
    writer = reporter(tmp_path)
    writer.trained(99, totals(99))
    writer.trained(100, totals(100))
    with writer.pause():
        writer.evaluated(row(100, 0.5))
    writer.trained(110, totals(10, loss=1.5))
    writer.close()
    assert lines()[-1].startswith("step 110/400  epoch 1.10  loss 1.5000")


class Computing:
    """A number on a device: fetching it waits until it is ready."""

    def __init__(self, value, now, ready):
        self.value, self.now, self.ready = value, now, ready

    def __array__(self, *_, **__):
        self.now.seconds = max(self.now.seconds, self.ready)
        return np.asarray(self.value)


def computing(steps, now, ready):
    """The totals of some steps, ready at a given time."""
    return {k: Computing(v, now, ready) for k, v in totals(steps).items()}


def test_rates_exclude_compilation_evaluations_and_checkpoints(tmp_path, lines):
    now = Time()
    writer = reporter(tmp_path, now=now)

    def train(steps, seconds_per_step, before=0):
        """Dispatches steps, counted since the last evaluation, without waiting."""
        started = now.seconds
        for number, step in enumerate(steps, start=1):
            ready = started + number * seconds_per_step
            writer.trained(before + step, computing(step, now, ready))

    now.seconds += 50  # compilation
    train(range(1, 51), 0.5)
    with writer.pause():
        now.seconds += 70  # a checkpoint
    train(range(51, 101), 0.5)
    with writer.pause():
        now.seconds += 1000  # an evaluation
        writer.evaluated(row(100, 0.5))
        now.seconds += 30  # its checkpoint
    train(range(1, 21), 0.25, before=100)
    with writer.pause():
        now.seconds += 1000
        writer.evaluated(row(120, 0.5))
    writer.close()
    rates = [line.split("  ")[3] for line in lines() if "images/s" in line]
    assert rates == ["32 images/s"] * 10 + ["64 images/s"] * 2
    first, second = read_rows(tmp_path / "speed.csv")
    assert first["images_per_second"] == 16 / 0.5
    assert first["seconds"] == 99 * 0.5  # timing begins after the first step
    assert second["images_per_second"] == 16 / 0.25
    assert second["seconds"] == 20 * 0.25
    assert (second["step"], second["epoch"]) == (120, 1.2)
    assert second["peak_memory_mb"] > 1


def test_first_interval_excludes_steps_before_the_resume(tmp_path, lines):
    """A run resumed within an epoch starts with the sums since the epoch's start."""
    now = Time()
    writer = reporter(tmp_path, step=50, now=now)
    before = totals(51, loss=8.0)
    writer.trained(51, before)
    now.seconds += 0.5
    writer.trained(60, {k: before[k] + v for k, v in totals(9).items()})
    with writer.pause():
        writer.evaluated(row(60, 0.5))
    assert lines()[0].startswith(
        "step 60/400  epoch 0.60  loss 2.0000  288 images/s  ETA 0:00:19"
    )
    (speed,) = read_rows(tmp_path / "speed.csv")
    assert speed["images_per_second"] == 9 * 16 / 0.5


def test_several_steps_per_dispatch_skip_no_line(tmp_path, lines):
    writer = reporter(tmp_path)
    for step in (8, 16, 24, 32, 40):
        writer.trained(step, totals(step))
    writer.close()
    assert [line.split("/")[0] for line in lines()] == [
        *("step 16", "step 24", "step 32", "step 40")
    ]


def test_a_loss_that_is_not_finite_is_noticed(tmp_path):
    writer = reporter(tmp_path)
    writer.trained(10, totals(10))
    writer.trained(11, totals(11, loss=float("nan")))
    assert writer.finite
    writer.trained(20, totals(20, loss=float("nan")))
    writer.trained(21, totals(21, loss=float("nan")))
    assert not writer.finite


def test_steps_do_not_wait_for_the_device(tmp_path):
    now = Time()
    writer = reporter(tmp_path, now=now)
    writer.trained(1, totals(1))
    for step in range(2, 10):
        writer.trained(step, computing(step, now, ready=1e9))
    assert now.seconds == 0


def test_tensorboard_receives_everything_once(tmp_path, events):
    writer = reporter(tmp_path, tensorboard=True)
    images = np.arange(5 * 2 * 3 * 3, dtype=np.uint8).reshape(5, 2, 3, 3)
    writer.sheet(lambda: images)
    writer.trained(1, totals(1))
    writer.trained(10, totals(10))
    with writer.pause():
        writer.evaluated(row(10, 0.5), np.array([[3, 1], [0, 0]]), ("a", "b"))
    writer.close()
    (kind, fields), sheet, line, matrix, scalars, memory, closed = events
    assert kind == "hparams"
    assert fields["train.batch_size"] == 16
    assert fields["optimizer.drop_epochs"] == str(CONFIG.optimizer.drop_epochs)
    assert sheet[:2] == ("images", 0)
    grid = sheet[2]()["training_images"]  # made in the thread
    assert grid.shape == (6, 9, 3)
    np.testing.assert_array_equal(grid[2:4, 3:6], images[4])  # second row, second place
    assert not grid[4:].any()
    assert line[:2] == ("scalars", 10)
    assert line[2].keys() >= {"train_loss", "images_per_second"}
    assert matrix[:2] == ("images", 10)
    np.testing.assert_array_equal(
        matrix[2]["confusion"][..., 0], [[64, 191], [255, 255]]
    )
    assert scalars == ("scalars", 10, row(10, 0.5))
    assert memory[2].keys() == {"peak_memory_mb"}
    assert closed == ("close",)
    reporter(tmp_path, step=10, tensorboard=True)
    assert len(events) == 7  # a resumed run does not write hyper-parameters again


def test_the_event_file_holds_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    writer = reporter(tmp_path, tensorboard=True)
    images = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    writer.sheet(lambda: images)
    writer.evaluated(row(100, 0.5), np.eye(3, dtype=int))
    writer.close()
    version, hparams, sheet, confusion, scalars, memory = read_events(tmp_path)
    assert version.file_version == "brain.Event:2"
    (value,) = hparams.summary.value
    assert b"train.batch_size" in value.metadata.plugin_data.content
    (value,) = sheet.summary.value
    assert (sheet.step, value.tag) == (0, "training_images")
    np.testing.assert_array_equal(decode(value.image), tensorboard.tile(images))
    (value,) = confusion.summary.value
    assert (confusion.step, value.tag) == (100, "confusion")
    expected = 255 * (1 - np.eye(3, dtype=np.uint8))
    np.testing.assert_array_equal(decode(value.image), expected)
    found = {value.tag: value.simple_value for value in scalars.summary.value}
    assert (scalars.step, found) == (100, row(100, 0.5))
    assert [value.tag for value in memory.summary.value] == ["peak_memory_mb"]


@pytest.mark.slow
def test_tensorboard_shows_the_same_as_from_clu(tmp_path):
    """The same data, however TensorBoard stores older summaries."""
    from clu import metric_writers

    shown = []
    for make in (tensorboard.EventWriter, metric_writers.SummaryWriter):
        folder = tmp_path / make.__module__
        folder.mkdir()
        writer = make(str(folder))
        hparams = {"net.depth": 22, "rate": 0.1, "data.flip": True, "name": "a"}
        writer.write_hparams(hparams)
        writer.write_scalars(3, {"loss": 1.7, "accuracy": 0.5})
        writer.write_scalars(4, {"loss": 1.5})
        image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        writer.write_images(3, {"sheet": image, "confusion": image[..., :1]})
        if hasattr(writer, "close"):  # ours has written every event
            writer.close()
        shown.append(shown_by_tensorboard(folder))
    assert shown[0] == shown[1]
    assert shown[0]["scalars"]["loss"] == [(3, np.float32(1.7)), (4, 1.5)]


def read_events(workdir) -> list:
    from tensorboard.compat.proto.event_pb2 import Event

    (path,) = workdir.glob("events.out.tfevents.*")
    records = tfrecords.records(path.name, path.read_bytes())
    return [Event.FromString(record) for record in records]


def decode(encoded) -> np.ndarray:
    """encoded: its PNG file, or TensorBoard's Summary.Image."""
    content = getattr(encoded, "encoded_image_string", encoded)
    return np.asarray(Image.open(io.BytesIO(content)))


def shown_by_tensorboard(workdir) -> dict:
    """Returns the hyper-parameters, and (step, value) of each plugin and tag."""
    from tensorboard.backend.event_processing import plugin_event_accumulator
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2
    from tensorboard.util import tensor_util

    events = plugin_event_accumulator.EventAccumulator(str(workdir))
    events.Reload()

    def value(plugin, event):
        array = tensor_util.make_ndarray(event.tensor_proto)
        if plugin == "scalars":
            return event.step, array.item()
        width, height, *images = array
        return event.step, width, height, [decode(x).tolist() for x in images]

    shown = {
        plugin: {
            tag: [value(plugin, event) for event in events.Tensors(tag)]
            for tag in events.PluginTagToContent(plugin)
        }
        for plugin in ("scalars", "images")
    }
    ((_, content),) = events.PluginTagToContent(metadata.PLUGIN_NAME).items()
    data = plugin_data_pb2.HParamsPluginData.FromString(content)
    start = data.session_start_info
    return shown | {"hparams": {k: str(v) for k, v in sorted(start.hparams.items())}}


@pytest.mark.parametrize("error", [ImportError, OSError])
def test_a_run_does_not_need_tensorboard(tmp_path, lines, monkeypatch, error):
    """It may not be installed, and the disk may have no space for events."""

    def broken(*_):
        raise error("no space")

    monkeypatch.setattr(tensorboard, "EventWriter", broken)
    writer = reporter(tmp_path, tensorboard=True)
    writer.evaluated(row(100, 0.5))
    writer.close()
    assert len(read_rows(tmp_path / "metrics.csv")) == 1
    assert sum("no TensorBoard events (no space)" in line for line in lines()) == 1


def test_a_failing_writer_does_not_end_the_run(tmp_path, lines, monkeypatch):
    class Full:
        def __init__(self, workdir):
            pass

        def write_scalars(self, *_):
            raise OSError("disk full")

    monkeypatch.setattr(tensorboard, "EventWriter", Full)
    events = tensorboard.TensorBoard(tmp_path)
    for step in range(3):
        events.write("scalars", step, {})
    events.close()
    assert lines() == ["no more TensorBoard events are written: disk full"]


def test_profile_covers_the_requested_steps(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", calls.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    writer = reporter(tmp_path, profile_steps=(20, 30))
    for step in range(8, 80, 8):
        writer.trained(step, totals(step))
        calls.append(step)
    writer.close()
    folder = str(tmp_path / "profile")
    assert calls == [8, 16, folder, 24, "stop", 32, 40, 48, 56, 64, 72]
    calls.clear()
    writer = reporter(tmp_path, step=32, profile_steps=(20, 30))
    writer.trained(40, totals(40))
    writer.close()
    assert calls == []  # a run resumed later does not profile


def test_profile_is_a_trace(tmp_path):
    writer = reporter(tmp_path, profile_steps=(1, 2))
    for step in (1, 2):
        writer.trained(step, totals(step))
    (path,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    assert json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_final_summary_names_accuracies_and_steps(tmp_path):
    result = row(400, 0.875) | {"best_step": 300, "best_test_accuracy": 0.9}
    text = reporting.final_summary(result, tmp_path)
    for word in ("87.50%", "step 400", "90.00%", "step 300", str(tmp_path)):
        assert word in text
    text = reporting.final_summary(row(400, 0.875), tmp_path)
    assert "87.50% (step 400)" in text
    text = reporting.final_summary(
        {"step": 400, "test_loss_flip": 0.5, "test_accuracy_flip": 0.75}, tmp_path
    )
    assert "test accuracy flip 75.00% (step 400), test loss flip 0.5000" in text


def test_seeds_are_summarized_by_mean_and_deviation():
    results = [
        row(400, accuracy) | {"best_step": 300, "best_test_accuracy": accuracy + 0.02}
        for accuracy in (0.9, 0.92, 0.94)
    ]
    text = reporting.summarize_seeds(results)
    for words in ("3 seeds", "final 92.00% ± 2.00", "best 94.00% ± 2.00"):
        assert words in text
    results = [{"step": 4, "test_accuracy_flip": x} for x in (0.5, 0.5)]
    assert "2 seeds" in reporting.summarize_seeds(results)
    assert "flip 50.00% ± 0.00" in reporting.summarize_seeds(results)


def test_confusion_names_the_class_most_taken_for(tmp_path):
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


def test_a_class_name_may_be_undecodable(tmp_path):
    """For example caf\xe9 in Latin 1, as the file system returns it."""
    name = os.fsdecode(b"caf\xe9")
    write_confusion(tmp_path, np.eye(2, dtype=int), (name, "tea"))
    assert (tmp_path / "confusion.csv").read_bytes().startswith(b"caf\xe9,tea\n")
