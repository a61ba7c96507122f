"""Tables and the figure of a study: means, deviations and paired differences."""

import dataclasses
import math
import pathlib
import statistics
import textwrap
from collections.abc import Sequence

import scipy.stats

from runtime.reporting import summarize
from runtime.workdir import as_csv, read_rows, write_text

CONFIDENCE = 0.95
SHIFT = 0.02  # of the largest price, between the wirings of the figure
# Columns of table.md: name -> heading.
COLUMNS = {
    "width": "width",
    "parameters": "parameters",
    "macs": "multiply-adds",
    "remainder": "off by",
    "seeds": "seeds",
    "final": "final error, %",
    "final_difference": "difference [95 %]",
    "best": "best error, %",
    "best_difference": "difference [95 %]",
    "seconds": "s/step",
    "published": "published, %",
}
PANELS = {
    "parameters": "parameters",
    "macs": "multiply-adds per image",
    "seconds_per_step": "seconds per step",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of a study, a row of study.csv. Errors are on the test set, in percent.

    width: of this net; reference_width: of the reference that it is compared with.
    remainder: (count - the reference's) / the reference's, of what is held equal.
    best_error: of the best epoch on the same set. None if the run has not ended.
    seconds_per_step: median over the evaluation intervals.
    published: error of the same net in its paper, None if not published.
    """

    run: str
    backbone: str
    wiring: str
    width: int
    reference_width: int
    seed: int
    parameters: int
    macs: int
    remainder: float
    published: float | None
    finished: bool
    final_step: int | None = None
    final_error: float | None = None
    best_step: int | None = None
    best_error: float | None = None
    seconds_per_step: float | None = None


def measure(workdir: pathlib.Path, batch_size: int) -> dict[str, float | None]:
    """Returns the fields of a finished run that come from its workdir."""
    result = summarize(read_rows(workdir / "metrics.csv"))
    rates = [row["images_per_second"] for row in read_rows(workdir / "speed.csv")]
    rates = [rate for rate in rates if rate > 0]  # 0: a single dispatch, not timed
    seconds = batch_size / statistics.median(rates) if rates else None
    return dict(
        final_step=result["step"],
        final_error=_percent(result["test_accuracy"]),
        best_step=result["best_step"],
        best_error=_percent(result["best_test_accuracy"]),
        seconds_per_step=seconds and float(f"{seconds:.4g}"),
    )


def _percent(accuracy: float) -> float:
    return round(100 * (1 - accuracy), 6)


def interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Returns the mean and its 95 % interval by Student's t; None below two values."""
    if len(values) < 2:
        return None
    mean, n = statistics.mean(values), len(values)
    quantile = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    half = quantile * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def differences(rows: Sequence[Row], reference: Sequence[Row], field: str) -> list:
    """Returns the differences to the reference over the seeds that both finished."""
    base = {row.seed: getattr(row, field) for row in reference if row.finished}
    return [
        getattr(row, field) - base[row.seed]
        for row in rows
        if row.finished and row.seed in base
    ]


def group(rows: Sequence[Row]) -> dict[tuple[str, int, str], list[Row]]:
    """Returns (backbone, reference width, wiring) -> the runs of all seeds."""
    groups = {}
    for row in rows:
        key = (row.backbone, row.reference_width, row.wiring)
        groups.setdefault(key, []).append(row)
    return groups


def table(
    rows: Sequence[Row], reference: str, columns: Sequence[str] = tuple(COLUMNS)
) -> str:
    """Returns a Markdown table with one line per contestant."""
    lines = [
        "| " + " | ".join(["net", *(COLUMNS[name] for name in columns)]) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    groups = group(rows)
    for (backbone, width, wiring), runs in groups.items():
        base = [] if wiring == reference else groups[backbone, width, reference]
        cells = _cells(runs, base)
        name = f"{backbone} {wiring}{'' if base else ' (reference)'}"
        lines.append(f"| {' | '.join([name, *(cells[x] for x in columns)])} |")
    return "\n".join(lines) + "\n"


def _cells(runs: Sequence[Row], reference: Sequence[Row]) -> dict[str, str]:
    """Returns the cells of a contestant. reference: its runs, [] for itself."""
    first, done = runs[0], [row for row in runs if row.finished]
    times = [row.seconds_per_step for row in done if row.seconds_per_step]
    cells = dict(
        width=str(first.width),
        parameters=f"{first.parameters:,}",
        macs=f"{first.macs:,}",
        remainder=f"{first.remainder:+.1%}" if reference else "",
        seeds=str(len(done)) if len(done) == len(runs) else f"{len(done)}/{len(runs)}",
        seconds=f"{statistics.median(times):.3g}" if times else "",
        published="" if first.published is None else f"{first.published:g}",
    )
    for name in ("final", "best"):
        field = f"{name}_error"
        cells[name] = _spread([getattr(row, field) for row in done])
        paired = differences(runs, reference, field)
        cells[f"{name}_difference"] = _difference(paired)
    return cells


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else ""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _difference(values: Sequence[float]) -> str:
    if found := interval(values):
        mean, low, high = found
        return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"{values[0]:+.2f}" if values else ""


def write(
    workdir: pathlib.Path,
    rows: Sequence[Row],
    *,
    claim: str,
    equal: str,
    reference: str,
    columns: Sequence[str] = tuple(COLUMNS),
) -> None:
    """Writes study.csv, table.md and, if a run has finished, figure.png, atomically."""
    write_text(workdir / "study.csv", as_csv([dataclasses.asdict(x) for x in rows]))
    note = (
        f"Equal {equal}. Test errors in percent: mean ± standard deviation over seeds; "
        "difference: mean over paired seeds minus the reference, with its "
        f"{CONFIDENCE:.0%} interval (Student's t). An interval that contains 0 shows "
        "no difference. The best epoch is chosen on the test set."
    )
    text = f"{claim}\n\n{note}\n\n{table(rows, reference, columns)}"
    write_text(workdir / "table.md", text)
    if any(row.finished for row in rows):
        path, draft = workdir / "figure.png", workdir / ".figure.png.draft"
        figure(rows, claim).savefig(draft, dpi=120, format="png")
        draft.replace(path)


def figure(rows: Sequence[Row], title: str = ""):
    """Plots the mean final error against each price, one colour per wiring.

    A bar spans one standard deviation over seeds to each side. A cross is the published
    error of the same net. Wirings are shifted sideways by SHIFT, because nets of equal
    price would cover one another.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 110)), fontsize="medium")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    wirings = list(dict.fromkeys(row.wiring for row in rows))
    backbones = list(dict.fromkeys(row.backbone for row in rows))
    for axes, (price, heading) in zip(panels, PANELS.items(), strict=True):
        groups = group([row for row in rows if row.finished and getattr(row, price)])
        medians = {
            key: statistics.median(getattr(row, price) for row in runs)
            for key, runs in groups.items()
        }
        largest = max(medians.values(), default=0)
        for key, runs in groups.items():
            backbone, _, wiring = key
            index = wirings.index(wiring)
            x = medians[key] + SHIFT * largest * (index - (len(wirings) - 1) / 2)
            errors = [row.final_error for row in runs]
            spread = statistics.stdev(errors) if len(errors) > 1 else None
            color, marker = f"C{index % 10}", "osD^v"[backbones.index(backbone) % 5]
            name = f"{backbone} {wiring}"
            label = f"{name}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
            style = dict(color=color, fmt=marker, capsize=3, label=label)
            axes.errorbar(x, statistics.mean(errors), spread, **style)
            if runs[0].published is not None:
                style = dict(color=color, marker="x", ls="", label=f"{name}, published")
                axes.plot(x, runs[0].published, **style)
        axes.set_xlabel(heading)
        axes.margins(0.15)
        axes.set_xlim(0, 1.15 * largest or None)
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        if largest >= 1000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("final test error, % (mean ± standard deviation)")
    unique = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4)
    return figure
