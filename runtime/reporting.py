"""Reports on a run: the log, its CSV files, best.json, TensorBoard and profiles."""

import concurrent.futures
import contextlib
import datetime
import math
import pathlib
import re
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
from runtime.workdir import as_csv, flatten, read_rows, write_json, write_text

MAX_CLASSES = 200  # of a confusion matrix: a larger one is only summarized per class


class _Mark(NamedTuple):
    """The sums of metrics at a step, and the seconds of training until then."""

    step: int
    totals: dict[str, float]
    seconds: float


class Reporter:
    """Writes evaluations to CSV files, progress to the log, and both to TensorBoard.

    metrics.csv depends only on config and seed, so a resumed run ends with the same
    bytes; measurements of time and memory go to speed.csv. Nothing here waits for the
    device in each step.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        clock: Clock,
        step: int,
        config: ConfigDict,
        now: Callable[[], float] = time.perf_counter,
    ):
        """`step`: the step that the run resumes from, or 0."""
        self._workdir, self._clock, self._now = workdir, clock, now
        # The run repeats the steps after its checkpoint, and their rows.
        self.rows, self._speeds = (
            [row for row in read_rows(workdir / name) if row["step"] <= step]
            for name in ("metrics.csv", "speed.csv")
        )
        self.finite = True  # whether the last loss that was fetched is finite
        self._paused_seconds = 0.0
        self._latest = self._pending = None  # (step, totals), maybe not computed yet
        self._line = self._row = self._end = _Mark(step, {}, now())
        self._profile = self._events = None
        if jax.process_index() == 0:
            self._profile = _Profile(workdir, config, step)
            self._events = TensorBoard(workdir) if config.train.tensorboard else None
        if step == 0:
            self._write("hparams", _to_hparams(config))

    def trained(self, step: int, totals: dict) -> None:
        """Reports progress; call after each dispatch with the sums since the last row.

        The sums are fetched one call later, when they have been computed. Only the
        first call waits: timing begins after the first dispatch and its start-up work.
        """
        if self._latest is None:
            self._line = self._row = self._fetch(step, totals)
        self._latest = step, totals
        self._flush()
        if step // self._clock.log_every > self._line.step // self._clock.log_every:
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

        best.json holds the row with the highest BEST_METRIC, the first if equal.
        `confusion` as in write_confusion.
        """
        step = row["step"]
        if confusion is not None:
            write_confusion(self._workdir, confusion, class_names)
            if len(confusion) <= MAX_CLASSES:
                self._write("images", step, {"confusion": _draw_confusion(confusion)})
        # A row of this step has lost its checkpoint, in a crash after the evaluation.
        self.rows = [*(x for x in self.rows if x["step"] < step), row]
        write_text(self._workdir / "metrics.csv", as_csv(self.rows))
        write_json(self._workdir / "best.json", metrics.best(self.rows))
        speed = self._measure_speed(row)
        self._speeds = [*(x for x in self._speeds if x["step"] < step), speed]
        write_text(self._workdir / "speed.csv", as_csv(self._speeds))
        logging.info(
            "step %d/%d  epoch %.2f  %s",
            step,
            self._clock.total,
            row["epoch"],
            "  ".join(f"{k} {row[k]:.4f}" for k in row if k.startswith("test_")),
        )
        self._write("scalars", step, row)
        self._write("scalars", step, {"peak_memory_mb": speed["peak_memory_mb"]})
        # The sums start over.
        self._line = self._row = _Mark(step, {}, self._end.seconds)

    def sheet(self, make: Callable[[], np.ndarray]) -> None:
        """Shows augmented training images in TensorBoard.

        make: returns (N, H, W, 3) uint8; runs in TensorBoard's thread, if it is on.
        """
        sheet = lambda: {"training_images": _tile(make())}
        self._write("images", self._line.step, sheet)

    def close(self) -> None:
        """Reports what is pending and waits for TensorBoard."""
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
        remaining = (self._clock.total - mark.step) * self._clock.batch_size / rate
        logging.info(
            "step %d/%d  epoch %.2f  loss %.4f  %.0f images/s  ETA %s",
            mark.step,
            self._clock.total,
            self._clock.epoch(mark.step),
            means["train_loss"],
            rate,
            datetime.timedelta(seconds=round(remaining)),
        )
        self._write("scalars", mark.step, means | {"images_per_second": rate})
        self._line = mark

    def _fetch(self, step: int, totals: dict) -> _Mark:
        totals = {k: float(v) for k, v in jax.device_get(totals).items()}
        self.finite = math.isfinite(totals.get("loss", 0.0))
        return _Mark(step, totals, self._now() - self._paused_seconds)

    def _measure_speed(self, row: dict[str, float]) -> dict[str, float]:
        """Returns the row of speed.csv about the training since the last row."""
        return {
            "step": row["step"],
            "epoch": row["epoch"],
            "seconds": round(self._end.seconds - self._row.seconds, 3),
            "images_per_second": round(_compute_rate(self._row, self._end), 1),
            "peak_memory_mb": _measure_peak_memory(),
        }

    def _write(self, kind: str, *arguments) -> None:
        if self._events:
            self._events.write(kind, *arguments)


class TensorBoard:
    """Writes TensorBoard events in a thread, which first imports TensorFlow and CLU.

    The import may take longer than compiling the train step. CLU's LoggingWriter is not
    used: the log has its own lines. A run must not fail because events cannot be
    written.
    """

    def __init__(self, workdir: pathlib.Path):
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._writer = None
        self._thread.submit(self._open, workdir)

    def write(self, kind: str, *arguments) -> None:
        """Calls a write_... method of clu.metric_writers: 'scalars', 'images', ...

        Arguments that are functions are replaced by their results, in the thread.
        """
        self._thread.submit(self._call, f"write_{kind}", *arguments)

    def close(self) -> None:
        self._thread.submit(self._call, "close")
        self._thread.shutdown()

    def _open(self, workdir: pathlib.Path) -> None:
        try:
            input_pipeline.tensorflow()  # keeps it off the accelerators
            from clu import metric_writers

            self._writer = metric_writers.SummaryWriter(str(workdir))
        except Exception as error:
            cause = error.__cause__ or error
            logging.info("no TensorBoard events (%s); see metrics.csv", cause)

    def _call(self, method: str, *arguments) -> None:
        if self._writer is None:
            return
        try:
            arguments = [x() if callable(x) else x for x in arguments]
            getattr(self._writer, method)(*arguments)
        except Exception as error:
            logging.warning("no more TensorBoard events are written: %s", error)
            self._writer = None


def profile_range(
    config: ConfigDict, total: int | None = None
) -> tuple[int, int] | None:
    """Returns the steps between which a run is profiled, or None.

    Raises ValueError for an impossible range; `total` is the last step, if known.
    """
    steps = config.train.profile_steps
    if not steps:
        return None
    valid = len(steps) == 2 and all(isinstance(step, int) for step in steps)
    if not valid or not 0 < steps[0] < steps[1]:
        raise ValueError(
            f"train.profile_steps={steps} must be (first, last) with 0 < first < last, "
            "such as (20, 30)"
        )
    if total is not None and steps[1] > total:
        raise ValueError(
            f"train.profile_steps={steps} must end by the last step of the run, {total}"
        )
    return steps


class _Profile:
    """Traces config.train.profile_steps, for TensorBoard and Perfetto.

    Starts and stops at the first dispatches that end at these steps or later.
    """

    def __init__(self, workdir: pathlib.Path, config: ConfigDict, step: int):
        steps = profile_range(config)
        self._range = steps if steps and step < steps[1] else None
        self._folder, self._running = workdir / "profile", False

    def advance(self, step: int, totals: dict) -> None:
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
        if self._running:
            jax.profiler.stop_trace()
            logging.info("profile written to %s", self._folder)
        self._range, self._running = None, False


def final_summary(result: dict[str, float], workdir: pathlib.Path) -> str:
    """Returns the final summary that a command prints.

    `result` is that of train_and_evaluate, or of evaluate_checkpoint, which has no best
    row and may end its names in the views.
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


def write_confusion(
    workdir: pathlib.Path,
    confusion: np.ndarray,
    names: Sequence[str] = (),
    suffix: str = "",
) -> None:
    """Writes per_class.csv and, for up to MAX_CLASSES classes, confusion.csv.

    confusion: (classes, classes) counts of test examples, by true and predicted class.
    names: of the classes, by default their numbers.
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


def _draw_confusion(confusion: np.ndarray) -> np.ndarray:
    """Returns (classes, classes, 1) uint8; black: all examples of the true class."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    return np.rint(255 * (1 - share)).astype(np.uint8)[..., None]


def _tile(images: np.ndarray) -> np.ndarray:
    """Arranges images (N, H, W, 3) in a square grid, filled up with black."""
    count, height, width, channels = images.shape
    side = math.ceil(math.sqrt(count))
    grid = np.zeros((side * side, height, width, channels), images.dtype)
    grid[:count] = images
    grid = grid.reshape(side, side, height, width, channels).swapaxes(1, 2)
    return grid.reshape(side * height, side * width, channels)


def _to_hparams(config: ConfigDict) -> dict[str, bool | int | float | str]:
    """Returns the flat configuration; TensorBoard accepts no tuples."""
    fields, kinds = flatten(config), (bool, int, float, str)
    return {k: v if isinstance(v, kinds) else str(v) for k, v in fields.items()}


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
    """Logs what is about to be trained; `net` may be abstract."""
    total = cost.total(cost.layers(net, (1, *facts.image_shape)))
    logging.info(
        "net      %s %s: %s parameters (dense twin %s), %s multiply-adds per image",
        config.net.name,
        config.variant,
        f"{total.parameters:,}",
        f"{total.dense_parameters:,}",
        f"{total.macs:,}",
    )
    logging.info(
        "data     %s: %s training images %s, %d classes, pipeline %s",
        config.data.name,
        f"{facts.num_train:,}",
        "x".join(map(str, facts.image_shape)),
        len(facts.class_names),
        input_pipeline.pipeline(config.data),
    )
    recipe = config.data.recipe.name
    if recipe not in (re.split("[:/]", config.data.name)[0], ""):
        logging.warning(
            "the recipe (flip, crop, border, schedule) is the one for %s; to use that "
            "of another set, pass --config=FILE:%s,SET",
            recipe,
            config.variant,
        )
    if jax.default_backend() == "cpu" and config.train.steps_per_dispatch > 1:
        logging.warning(
            "train.steps_per_dispatch=%d: XLA:CPU runs a loop of steps on one thread, "
            "about 10 times slower; use 1 on CPUs",
            config.train.steps_per_dispatch,
        )
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    logging.info(
        "devices  %d x %s, processes %d, %s",
        mesh.size,
        "/".join(kinds),
        jax.process_count(),
        config.train.dtype,
    )
