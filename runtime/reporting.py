"""Reports on a run: the log, CSV files and best.json, and what TensorBoard shows."""

import contextlib
import datetime
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

import input_pipeline
import metrics
from nets import cost
from runtime.clock import Clock
from runtime.tensorboard import TensorBoard, draw_confusion, tile, to_hparams
from runtime.workdir import as_csv, read_rows, write_json, write_text

MAX_CLASSES = 200  # larger confusion matrices are only summarised per class


class _Mark(NamedTuple):
    """The sums of metrics at a step, and the seconds of training until then."""

    step: int
    totals: dict[str, float]
    seconds: float


class Reporter:
    """Writes evaluations to CSV files, progress to the log, and both to TensorBoard.

    metrics.csv depends only on config and seed, so a resumed run ends with the same
    bytes; measurements of time and memory go to speed.csv. No method waits for the
    device on every step.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        clock: Clock,
        step: int,
        config: ConfigDict,
        now: Callable[[], float] = time.perf_counter,
    ):
        """Continues the files in `workdir` from `step`, 0 for a new run."""
        self._workdir, self._clock, self._now = workdir, clock, now
        # The run repeats the steps after its checkpoint and rewrites their rows.
        self.rows, self._speeds = (
            [row for row in read_rows(workdir / name) if row["step"] <= step]
            for name in ("metrics.csv", "speed.csv")
        )
        self.finite = True  # whether the loss fetched last is finite
        self._paused_seconds = 0.0
        self._latest = self._pending = None  # (step, totals), maybe not computed yet
        self._line = self._row = self._end = _Mark(step, {}, now())
        self._profile = self._events = None
        if jax.process_index() == 0:
            self._profile = Profile(workdir, config, step)
            self._events = TensorBoard(workdir) if config.train.tensorboard else None
        if step == 0:
            self._write("hparams", to_hparams(config))

    def trained(self, step: int, totals: dict) -> None:
        """Reports progress; call after each dispatch with the sums since the last row.

        The sums are fetched one call later, when they have been computed. Only the
        first call waits: timing begins after the first dispatch and its start-up work.
        """
        if self._latest is None:
            self._line = self._row = self._fetch(step, totals)
        self._latest = step, totals
        self._flush()
        every = self._clock.config.train.log_every_steps
        if step // every > self._line.step // every:
            self._pending = step, totals
        if self._profile:
            self._profile.advance(step, totals)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes an evaluation or a checkpoint from the training time.

        Waits for the last dispatch.
        """
        self._flush()
        if self._latest:
            self._end = self._fetch(*self._latest)
        started = self._now()
        try:
            yield
        finally:
            self._paused_seconds += self._now() - started

    def evaluated(
        self,
        row: dict[str, float],
        confusion: np.ndarray | None = None,
        class_names: Sequence[str] = (),
    ) -> None:
        """Appends a row to metrics.csv; call inside pause().

        best.json holds the best row (metrics.best). For `confusion` see
        write_confusion.
        """
        step = row["step"]
        if confusion is not None:
            write_confusion(self._workdir, confusion, class_names)
            if len(confusion) <= MAX_CLASSES:
                self._write("images", step, {"confusion": draw_confusion(confusion)})
        # A crash after this step's evaluation left a row without a checkpoint.
        self.rows = [*(x for x in self.rows if x["step"] < step), row]
        write_text(self._workdir / "metrics.csv", as_csv(self.rows))
        write_json(self._workdir / "best.json", metrics.best(self.rows))
        speed = {  # of the training since the last row
            "step": step,
            "epoch": row["epoch"],
            "seconds": round(self._end.seconds - self._row.seconds, 3),
            "images_per_second": round(_compute_rate(self._row, self._end), 1),
            "peak_memory_mb": _measure_peak_memory(),
        }
        self._speeds = [*(x for x in self._speeds if x["step"] < step), speed]
        write_text(self._workdir / "speed.csv", as_csv(self._speeds))
        tests = [f"{k} {v:.4f}" for k, v in row.items() if k.startswith("test_")]
        logging.info(
            f"step {step}/{self._clock.total}  epoch {row['epoch']:.2f}  "
            f"{'  '.join(tests)}"
        )
        self._write("scalars", step, row)
        self._write("scalars", step, {"peak_memory_mb": speed["peak_memory_mb"]})
        # The train step's sums restart after an evaluation.
        self._line = self._row = _Mark(step, {}, self._end.seconds)

    def sheet(self, make: Callable[[], np.ndarray]) -> None:
        """Shows augmented training images in TensorBoard.

        make: returns (N, H, W, 3) uint8; runs in TensorBoard's thread, if enabled.
        """
        sheet = lambda: {"training_images": tile(make())}
        self._write("images", self._line.step, sheet)

    def close(self) -> None:
        """Logs the pending line, ends the profile and waits for TensorBoard."""
        self._flush()
        if self._profile:
            self._profile.stop()
        if self._events:
            self._events.close()

    def _flush(self) -> None:
        """Logs the pending progress line."""
        if self._pending is None:
            return
        mark, self._pending = self._fetch(*self._pending), None
        rate = _compute_rate(self._line, mark)
        sums = {k: v - self._line.totals.get(k, 0.0) for k, v in mark.totals.items()}
        means = metrics.means(sums, "train")
        batch_size = self._clock.config.train.batch_size
        remaining = (self._clock.total - mark.step) * batch_size / rate
        logging.info(
            f"step {mark.step}/{self._clock.total}  "
            f"epoch {self._clock.epoch(mark.step):.2f}  "
            f"loss {means['train_loss']:.4f}  {rate:.0f} images/s  "
            f"ETA {datetime.timedelta(seconds=round(remaining))}"
        )
        self._write("scalars", mark.step, means | {"images_per_second": rate})
        self._line = mark

    def _fetch(self, step: int, totals: dict) -> _Mark:
        totals = {k: float(v) for k, v in jax.device_get(totals).items()}
        self.finite = math.isfinite(totals.get("loss", 0.0))
        return _Mark(step, totals, self._now() - self._paused_seconds)

    def _write(self, kind: str, *arguments) -> None:
        if self._events:
            self._events.write(kind, *arguments)


class Profile:
    """Traces config.train.profile_steps, for TensorBoard and Perfetto.

    Starts and stops at the first dispatches that end at these steps or later.
    """

    def __init__(self, workdir: pathlib.Path, config: ConfigDict, step: int):
        steps = config.train.profile_steps
        self._range = steps if steps and step < steps[1] else None
        self._folder, self._running = workdir / "profile", False

    def advance(self, step: int, totals: dict) -> None:
        """Starts or stops the trace after the dispatch that ends at `step`."""
        if self._range is None or step < self._range[0]:
            return
        if not self._running:
            jax.block_until_ready(totals)  # earlier steps are not part of the trace
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step >= self._range[1]:
            jax.block_until_ready(totals)
            self.stop()

    def stop(self) -> None:
        """Writes the trace if one is running."""
        if self._running:
            jax.profiler.stop_trace()
            logging.info("profile written to %s", self._folder)
        self._range, self._running = None, False


def summarize(rows: list[dict]) -> dict:
    """Returns the last row, and `step` and `test_*` of the best row as `best_*`."""
    if not rows:
        raise ValueError(
            "training is complete, but metrics.csv is missing rows; evaluate the "
            "checkpoints with --mode=eval"
        )
    best = {
        f"best_{k}": v
        for k, v in metrics.best(rows).items()
        if k == "step" or k.startswith("test_")
    }
    return rows[-1] | best


def final_summary(result: dict[str, float], workdir: pathlib.Path) -> str:
    """Returns the final summary that a command prints.

    result: from train_and_evaluate, or from evaluate_checkpoint, which has no best row
      and may append the views to its names.
    """
    metric = metrics.BEST_METRIC

    def accuracy(prefix: str, views: str = "") -> str:
        value = result[f"{prefix}{metric}{views}"]
        return f"{value:.2%} (step {result[f'{prefix}step']})"

    if f"best_{metric}" not in result:
        name = next(name for name in result if name.startswith(metric))
        views = name.removeprefix(metric)
        loss, label = result[f"test_loss{views}"], views.replace("_", " ")
        return (
            f"test accuracy{label} {accuracy('', views)}, test loss{label} {loss:.4f}, "
            f"in {workdir}"
        )
    return (
        f"test accuracy  final {accuracy('')}  best {accuracy('best_')}\n"
        f"results        {workdir}: metrics.csv, best.json, config.json, checkpoints/"
    )


def summarize_seeds(results: Sequence[dict[str, float]]) -> str:
    """Returns the mean and standard deviation of the accuracies of several runs.

    results: as for final_summary.
    """
    metric, cells = metrics.BEST_METRIC, []
    for name in results[0]:
        prefix, found, views = name.partition(metric)
        if found:
            values = [result[name] for result in results]
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            label = "best" if prefix else views.strip("_") or "final"
            cells.append(f"{label} {mean:.2%} ± {100 * deviation:.2f}")
    return f"{len(results)} seeds        test accuracy  {'  '.join(cells)}"


def write_confusion(
    workdir: pathlib.Path,
    confusion: np.ndarray,
    names: Sequence[str] = (),
    suffix: str = "",
) -> None:
    """Writes per_class.csv and, for up to MAX_CLASSES classes, confusion.csv.

    confusion: (classes, classes) counts of test examples, by true and predicted class.
    names: class names; by default, numbers.
    """
    names = names or range(len(confusion))
    examples, correct = confusion.sum(1), confusion.diagonal()
    wrong = confusion - np.diag(correct)
    rows = [
        {
            "class": names[i],
            "examples": n,
            "accuracy": round(correct[i] / max(n, 1), 6),
            "most_taken_for": names[wrong[i].argmax()] if wrong[i].any() else "",
        }
        for i, n in enumerate(examples)
    ]
    write_text(workdir / f"per_class{suffix}.csv", as_csv(rows))
    if len(confusion) <= MAX_CLASSES:
        matrix = [dict(zip(names, row, strict=True)) for row in confusion.tolist()]
        write_text(workdir / f"confusion{suffix}.csv", as_csv(matrix))


def _compute_rate(start: _Mark, end: _Mark) -> float:
    """Returns the images trained per second between two marks."""
    images = end.totals.get("examples", 0.0) - start.totals.get("examples", 0.0)
    return images / max(end.seconds - start.seconds, 1e-9)


def _measure_peak_memory() -> float:
    """Returns the peak memory of the fullest device, or of the process on CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if peak := max(x.get("peak_bytes_in_use", 0) for x in stats):
        return round(peak / 2**20)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def log_run(
    config: ConfigDict, facts: input_pipeline.Facts, net: nnx.Module, mesh: Mesh
) -> None:
    """Logs net (abstract or not), data and devices; layers with --verbosity=1."""
    layers = cost.layers(net, (1, *facts.image_shape))
    for x in layers:
        counts = f"{x.parameters:10,} parameters, {x.macs:13,} multiply-adds"
        logging.vlog(1, f"layer    {x.path:<32} {x.kind:<14} {counts}")
    total = cost.total(layers)
    logging.info(
        f"net      {config.net.name} {config.variant}: {total.parameters:,} parameters "
        f"(dense twin {total.dense_parameters:,}), {total.macs:,} multiply-adds per "
        "image"
    )
    logging.info(
        f"data     {config.data.name}: {facts.num_train:,} training images "
        f"{'x'.join(map(str, facts.image_shape))}, {facts.num_classes} classes, "
        f"pipeline {input_pipeline.pipeline(config.data)}"
    )
    recipe = config.data.recipe.name
    if recipe and not input_pipeline.is_of_recipe(config.data):
        logging.warning(
            f"the recipe (flip, crop, border, schedule) is for {recipe}; to use the "
            f"recipe of another data set, pass --config=FILE:{config.variant},SET"
        )
    steps = config.train.steps_per_dispatch
    if jax.default_backend() == "cpu" and steps > 1:
        logging.warning(
            f"train.steps_per_dispatch={steps}: XLA:CPU runs a loop of steps on one "
            "thread, about 10 times slower; use 1 on CPUs"
        )
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    logging.info(
        f"devices  {mesh.size} x {'/'.join(kinds)}, processes {jax.process_count()}, "
        f"{config.train.dtype}"
    )
