"""Does the spectral gap of expanders predict the error? Rank correlation over a study.

python -m analysis.spectral_gap WORKDIR

WORKDIR is that of analysis.study, or holds its study.csv beside the runs. The gap of a
layer is 1 minus the second singular value of its graph (analysis/graphs.py); the gap of
a net is the mean over its expander layers. The command prints the gap and the final
error of each finished run with expanders, then Spearman's rho between the two: over all
runs, over the runs of each density, and within nets, after subtracting the means over
the seeds of each net (docs/studies.md). A negative rho means that a larger gap goes
with a smaller error. The 95 % interval is that of Bonett and Wright (2000), which takes
the runs as independent.
"""

import argparse
import csv
import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence

from runtime import processes

if __name__ == "__main__":
    processes.set_environment()  # before jax is imported

import numpy as np
import scipy.stats

import nets
from analysis import graphs
from nets import cost
from runtime.workdir import load_config

CONFIDENCE = 0.95
MIN_RUNS = 5


@dataclasses.dataclass(frozen=True)
class Row:
    """A run: the mean density and gap of its expander layers, and its error in %."""

    net: str
    seed: int
    density: float
    gap: float
    error: float


def correlate(
    gaps: Sequence[float], errors: Sequence[float], groups: int = 1
) -> tuple[float, float, float]:
    """Returns Spearman's rho, with average ranks for ties, and its interval.

    groups: number of groups whose means were subtracted; costs a degree of freedom for
      each but the first. The formula has no interval for a rho of 1 or -1, which is
      returned as both of its ends.
    Raises ValueError for fewer than MIN_RUNS values, too many groups, or if all gaps or
    all errors are equal.
    """
    size = len(gaps) - groups + 1
    if size < MIN_RUNS:
        raise ValueError(f"a correlation needs {MIN_RUNS} runs, got {size}")
    for name, values in (("gaps", gaps), ("errors", errors)):
        if np.ptp(values) == 0:
            raise ValueError(f"all {name} are equal; there is no rank to correlate")
    rho = round(float(scipy.stats.spearmanr(gaps, errors).statistic), 12)
    if abs(rho) == 1:
        return rho, rho, rho
    quantile = scipy.stats.norm.ppf((1 + CONFIDENCE) / 2)
    half = quantile * math.sqrt((1 + rho**2 / 2) / (size - 3))
    center = math.atanh(rho)
    return rho, math.tanh(center - half), math.tanh(center + half)


def measure(net_config) -> tuple[float, float] | None:
    """Returns the mean density and gap of a net's expander layers; None without any."""
    net = cost.build(net_config)
    nets.configure(net, graph_seed=net_config.graph_seed)
    found = [
        graphs.measure(graph)
        for kind, graph in graphs.of(net).values()
        if kind.startswith("Expander")
    ]
    if not found:
        return None
    return tuple(np.mean([(x.density, 1 - x.second) for x in found], axis=0).tolist())


def read(workdir: pathlib.Path) -> list[Row]:
    """Returns the finished runs with expanders. Raises ValueError without study.csv."""
    path = workdir / "study.csv"
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: WORKDIR must be that of python -m analysis.study"
        )
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            if line["finished"] != "True":
                continue
            config = load_config(workdir / line["run"] / f"seed{line['seed']}")
            if measured := measure(config.net):
                seed, error = int(line["seed"]), float(line["final_error"])
                rows.append(Row(line["run"], seed, *measured, error))
    return rows


def within_nets(rows: Sequence[Row]) -> tuple[list[float], list[float], int]:
    """Returns gaps and errors minus the mean of their net, and the number of nets.

    Skips nets whose gaps are all equal, because they carry no information.
    """
    pairs, count = [], 0
    for net in dict.fromkeys(row.net for row in rows):
        own = np.array([(row.gap, row.error) for row in rows if row.net == net])
        if np.ptp(own[:, 0]) > 0:
            count += 1
            pairs += np.round(own - own.mean(0), 12).tolist()  # so that ties stay ties
    return [gap for gap, _ in pairs], [error for _, error in pairs], count


def report(rows: Sequence[Row]) -> str:
    """Returns Markdown tables. Raises ValueError for fewer than MIN_RUNS runs."""
    if len(rows) < MIN_RUNS:
        raise ValueError(
            f"a rank correlation needs at least {MIN_RUNS} finished runs with expander "
            f"layers, got {len(rows)}: train more seeds or wirings"
        )
    lines = [
        "| run | density | spectral gap | final error, % |",
        "|---|---|---|---|",
        *(
            f"| {x.net}/seed{x.seed} | {x.density:.4f} | {x.gap:.4f} | {x.error:.2f} |"
            for x in rows
        ),
        "",
        "| runs | n | Spearman's rho [95 %] |",
        "|---|---|---|",
        _line("all", [x.gap for x in rows], [x.error for x in rows]),
    ]
    densities = sorted({f"{row.density:.4f}" for row in rows})
    for density in densities if len(densities) > 1 else ():
        some = [row for row in rows if f"{row.density:.4f}" == density]
        if len(some) >= MIN_RUNS:
            name = f"of density {density}"
            gaps, errors = [x.gap for x in some], [x.error for x in some]
            lines.append(_line(name, gaps, errors))
    lines.append(_line("within nets", *within_nets(rows)))
    return "\n".join(lines)


def _line(name: str, gaps, errors, groups: int = 1) -> str:
    try:
        rho, low, high = correlate(gaps, errors, groups)
    except ValueError as error:
        return f"| {name} | {len(gaps)} | {error} |"
    interval = f"[{low:+.2f}, {high:+.2f}]" if abs(rho) < 1 else "(no interval)"
    return f"| {name} | {len(gaps)} | {rho:+.2f} {interval} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR")
    options = parser.parse_args()
    try:
        print(report(read(options.workdir.expanduser())))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
