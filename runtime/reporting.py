"""What a run tells while it lives: metrics.csv, best.json, TensorBoard, progress."""

import concurrent.futures
import datetime
import math
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import logging

import input_pipeline
import metrics
from runtime.workdir import as_csv, read_rows, write_json, write_text

MOST_CLASSES = 200  # of which a matrix is small


class Reporter:
    """Rows of evaluations go to metrics.csv, progress to the log and TensorBoard.

    metrics.csv holds only what is a function of config and seed, so an interrupted
    and resumed run ends with the same bytes; speed goes to the log and TensorBoard.
    """

    def __init__(self, workdir: pathlib.Path, clock, start: int, tensorboard: bool):
        """`clock` is the run's Clock, `start` the step it goes on from."""
        self._path = workdir / "metrics.csv"
        # Rows after the checkpoint come again: the run repeats those steps.
        self.rows = [row for row in read_rows(self._path) if row["step"] <= start]
        self._clock = clock
        # In a thread: importing TensorFlow may take longer than compiling the step.
        self._writer = None
        if tensorboard and jax.process_index() == 0:
            thread = concurrent.futures.ThreadPoolExecutor(1)
            self._writer = thread.submit(_summary_writer, workdir)
        self._pending = self._last_totals = None
        self.finite = True  # the last loss that was fetched

    def trained(self, step: int, totals: dict) -> None:
        """Called after each dispatch; reports on every `log_every` steps.

        The totals are still being computed: they are fetched one call later. Only
        the first are waited for: they begin the first interval, as that call compiled.
        """
        if self._last_totals is None:
            self._restart(step, _fetched(totals))
        self._flush()
        if step // self._clock.log_every > self._last_step // self._clock.log_every:
            self._pending = (step, totals)

    def _flush(self) -> None:
        if self._pending is None:
            return
        (step, totals), self._pending = self._pending, None
        totals = _fetched(totals)
        interval = {k: v - self._last_totals.get(k, 0.0) for k, v in totals.items()}
        means, started = metrics.means(interval, "train"), self._last_time
        self._restart(step, totals)
        rate = interval["examples"] / (self._last_time - started)
        remaining = (self._clock.total - step) * self._clock.batch_size / rate
        logging.info(
            "step %d/%d  epoch %.2f  loss %.4f  %.0f images/s  ETA %s",
            step,
            self._clock.total,
            self._clock.epoch(step),
            means["train_loss"],
            rate,
            datetime.timedelta(seconds=round(remaining)),
        )
        self._write(step, means | {"images_per_second": rate})

    def _restart(self, step: int, totals: dict[str, float]) -> None:
        """Begins an interval of the progress lines with what the sums are now."""
        self._last_step, self._last_totals = step, totals
        self._last_time = time.perf_counter()
        self.finite = math.isfinite(totals.get("loss", 0.0))

    def evaluated(self, row: dict[str, float]) -> None:
        """Adds a row to metrics.csv; best.json holds the first of equal bests."""
        self._flush()
        self.rows.append(row)
        write_text(self._path, as_csv(self.rows))
        best = max(self.rows, key=lambda row: row[metrics.BEST_METRIC])
        write_json(self._path.with_name("best.json"), best)
        logging.info(
            "step %d/%d  epoch %.2f  %s",
            row["step"],
            self._clock.total,
            row["epoch"],
            "  ".join(f"{k} {row[k]:.4f}" for k in row if k.startswith("test_")),
        )
        self._write(row["step"], row)
        self._restart(row["step"], {})  # an evaluation is not training time

    def close(self) -> None:
        self._flush()
        self._with_events(lambda writer: writer.close())

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        self._with_events(lambda writer: writer.write_scalars(step, scalars))

    def _with_events(self, use: Callable) -> None:
        if not self._writer or not (writer := self._writer.result()):
            return
        try:
            use(writer)
        except Exception as error:  # TensorFlow's, of an earlier call: a full disk
            logging.warning("no more TensorBoard events are written: %s", error)
            self._writer = None


def conclusion(result: dict[str, float], workdir: pathlib.Path) -> str:
    """The last words of a command: final and best accuracy, and where the rest lies.

    `result`: of train_and_evaluate, or of evaluate_checkpoint, which has no best.
    """

    def accuracy(prefix: str) -> str:
        value = result[f"{prefix}{metrics.BEST_METRIC}"]
        return f"{value:.2%} (step {result[f'{prefix}step']})"

    if f"best_{metrics.BEST_METRIC}" not in result:
        loss = result["test_loss"]
        return f"test accuracy {accuracy('')}, test loss {loss:.4f}, of {workdir}"
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
    """per_class.csv, and for at most MOST_CLASSES of them the matrix, confusion.csv.

    confusion: (classes, classes) counts of test examples: row true, column predicted.
    names: of the classes; without, they are numbered.
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
    if len(confusion) <= MOST_CLASSES:
        matrix = [dict(zip(names, row, strict=True)) for row in confusion.tolist()]
        write_text(workdir / f"confusion{suffix}.csv", as_csv(matrix))


def _fetched(totals: dict) -> dict[str, float]:
    return {k: float(v) for k, v in jax.device_get(totals).items()}


def _summary_writer(workdir: pathlib.Path):
    """CLU's TensorBoard writer, or None where there is none to be had.

    Whatever the reason, TensorFlow missing or broken or no room for a file: a run is
    more than its events.
    """
    try:
        input_pipeline.tensorflow()  # first of all, to keep it off the accelerators
        from clu import metric_writers

        return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(workdir)))
    except Exception as error:
        cause = error.__cause__ or error
        logging.info("no TensorBoard events (%s); metrics.csv has the numbers", cause)
        return None
