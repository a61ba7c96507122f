"""Compares runs: final and best test errors with mean and deviation, and a plot.

python -m analysis.curves /tmp/run /tmp/other --out=curves.png

Each directory is the workdir of a run, or contains the runs of --config.seeds. Runs
that differ only in their seed and are equally long share a row. Errors are on the test
set, in percent. "best" is the best epoch on the same set, as several papers report it;
"last 5" is the median of the last five evaluations, as others report it.
"""

import argparse
import pathlib
import statistics
import sys
from collections.abc import Sequence

from matplotlib.figure import Figure

from runtime.workdir import load_config, read_rows

Curve = list[dict[str, float]]


def read(workdirs: Sequence[pathlib.Path]) -> dict[str, list[Curve]]:
    """Returns {configuration name: rows of metrics.csv for each of its runs}.

    Raises ValueError for a directory without an evaluated run, and for a repeated seed.
    """
    groups, names, seen = {}, {}, {}
    for workdir in dict.fromkeys(run for path in workdirs for run in _runs(path)):
        config = load_config(workdir).to_dict()
        rows = read_rows(workdir / "metrics.csv")
        if not rows:
            raise ValueError(f"{workdir} has no evaluation yet")
        name = f"{config['net']['name']} {config['variant']}, {config['data']['name']}"
        if config["recipe"] == "modern":
            name += ", modern"
        like = config | {"seed": 0, "seeds": 1, "step": rows[-1]["step"]}
        alike = names.setdefault(name, [])
        if like not in alike:
            alike.append(like)
        number = alike.index(like)
        run = (name, number, config["seed"])
        if (other := seen.setdefault(run, workdir)) != workdir:
            raise ValueError(f"{workdir} repeats the configuration and seed of {other}")
        label = f"{name} ({number + 1})" if number else name
        groups.setdefault(label, []).append(rows)
    return groups


def _runs(path: pathlib.Path) -> list[pathlib.Path]:
    path = path.resolve()
    seeds = sorted(path.glob("seed*/config.json"))
    if (path / "config.json").exists() or not seeds:
        return [path]
    return [config.parent for config in seeds]


def table(groups: dict[str, list[Curve]]) -> str:
    """Returns test errors in percent as Markdown, mean and deviation over each row."""
    lines = [
        "| run | epochs | n | final, mean | sd | last 5, mean | sd | best, mean | sd |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, curves in groups.items():
        cells = [name, f"{curves[0][-1]['epoch']:g}", str(len(curves))]
        for pick in (lambda x: x[-1], lambda x: statistics.median(x[-5:]), min):
            cells += _spread([pick(errors(curve)) for curve in curves])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def errors(curve: Curve) -> list[float]:
    """Returns the test error of each evaluation in percent."""
    return [100 * (1 - row["test_accuracy"]) for row in curve]


def _spread(values: list[float]) -> tuple[str, str]:
    deviation = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}", deviation


def figure(groups: dict[str, list[Curve]]) -> Figure:
    """Plots test error over epochs, one colour per row and one line per run."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, curves) in enumerate(groups.items()):
        for j, curve in enumerate(curves):
            epochs = [row["epoch"] for row in curve]
            label = name if j == 0 else None
            axes.plot(epochs, errors(curve), f"C{i}", lw=1, label=label)
    axes.set(xlabel="epoch", ylabel="test error, %")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, help="image of the plot to write")
    options = parser.parse_args()
    try:
        groups = read(options.workdirs)
        print(table(groups))
        if options.out:
            figure(groups).savefig(options.out, dpi=120)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
