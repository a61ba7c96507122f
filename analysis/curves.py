"""Compares runs: final and best test errors with mean and deviation, and a plot.

python -m analysis.curves /tmp/run /tmp/other --out=curves.png
python -m analysis.curves xdensenet:40-24-2,cifar10=metrics.csv --out=curves.png

Each directory is the workdir of a run, or contains the runs of --config.seeds. Runs
that differ only in their seed and are equally long share a row. The second form reads a
metrics.csv without its workdir. Errors are on the test set, in percent. "best" is the
best epoch on the same set, as several papers report it; "last 5" is the median of the
last five evaluations, as others report it.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from ml_collections import ConfigDict

from configs.common import FAMILIES, Published, load_family
from runtime.workdir import load_config, read_rows

Curve = list[dict[str, float]]
NETS = {
    "alexnet": "AlexNet",
    "cfmz_resnet": "cfmz ResNet",
    "delugenet": "DelugeNet",
    "densenet": "DenseNet",
    "densenet_imagenet": "DenseNet",
    "gunn": "GUNN",
    "igc_resnet": "IGC",
    "igc_resnet_imagenet": "IGC",
    "mobilenet": "MobileNet",
    "plain": "IGC",
    "resnet": "ResNet",
    "vgg": "VGG",
}
DATA = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "imagenet2012": "ImageNet",
    "svhn_cropped": "SVHN",
    "svhn_cropped_extra": "SVHN with extra",
}
MARKED = 10  # curves with at most this many evaluations have a marker for each


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed: a curve for each, and what was published."""

    curves: list[Curve]
    published: Published | None

    @property
    def seeds(self) -> str:
        return f"{len(self.curves)} seed{'s' if len(self.curves) > 1 else ''}"


def read(arguments: Sequence[str | pathlib.Path]) -> dict[str, Group]:
    """Returns {name of a configuration: its runs}.

    arguments: workdirs, or FAMILY:VARIANT,DATA=FILE. Raises ValueError for a directory
    without an evaluated run, and for a repeated seed.
    """
    groups, names, seen = {}, {}, {}
    for source, config in _runs(arguments):
        rows = read_rows(source if source.is_file() else source / "metrics.csv")
        if not rows:
            raise ValueError(f"{source} has no evaluation yet")
        name = describe(config)
        like = config.to_dict() | {"seed": 0, "seeds": 1, "step": rows[-1]["step"]}
        alike = names.setdefault(name, [])
        if like not in alike:
            alike.append(like)
        number = alike.index(like)
        # The seed of a file without its workdir is unknown.
        run = source if source.is_file() else (name, number, config.seed)
        if (other := seen.setdefault(run, source)) != source:
            raise ValueError(f"{source} repeats the configuration and seed of {other}")
        label = f"{name} ({number + 1})" if number else name
        group = groups.setdefault(label, Group([], find_published(config)))
        group.curves.append(rows)
    return groups


def _runs(arguments) -> Iterator[tuple[pathlib.Path, ConfigDict]]:
    """Yields the workdir or metrics.csv of each run, once, and its configuration."""
    done = set()
    for argument in arguments:
        name, _, file = str(argument).partition("=")
        if file and not pathlib.Path(argument).exists():
            family, _, row = name.partition(":")
            _check_metrics(pathlib.Path(file))
            runs = [(pathlib.Path(file), load_family(family).get_config(row))]
        else:
            runs = [(path, None) for path in _workdirs(pathlib.Path(argument))]
        for path, config in runs:
            if (path := path.resolve()) not in done:
                done.add(path)
                yield path, config or load_config(path)


def _check_metrics(path: pathlib.Path) -> None:
    with path.open(newline="", errors="replace") as file:
        columns = file.readline().strip().split(",")
    if not {"step", "epoch", "test_accuracy"} <= set(columns):
        raise ValueError(f"{path} is not the metrics.csv of a run")


def _workdirs(path: pathlib.Path) -> list[pathlib.Path]:
    path = path.resolve()
    if path.is_file():
        raise ValueError(
            f"{path} is a file: choose a workdir, or name the net of a metrics.csv by "
            "FAMILY:VARIANT,DATA=FILE"
        )
    seeds = sorted(path.glob("seed*/config.json"))
    if (path / "config.json").exists() or not seeds:
        return [path]
    return [config.parent for config in seeds]


def describe(config: ConfigDict) -> str:
    """Returns a name such as "X-DenseNet 40-24-2, CIFAR-10"; never a path."""
    net = NETS.get(config.net.name, config.net.name)
    if config.net.wiring.kind == "expander":
        net = f"X-{net}"
    # The rows of some families begin with the net: "densenet-121-2".
    variant = config.variant.removeprefix(f"{NETS.get(config.net.name, '').lower()}-")
    if config.net.wiring.kind == "grouped" and "group" not in variant:
        net = f"grouped {net}"
    data = DATA.get(config.data.name, pathlib.Path(config.data.name).stem)
    modern = ", modern" if config.recipe == "modern" else ""
    return f"{net} {variant}, {data}{modern}"


def find_published(config: ConfigDict) -> Published | None:
    """Returns the published result of a configuration's net and data set, if any."""
    for family in map(load_family, FAMILIES):
        row = family.VARIANTS.get(config.variant)
        if row and config.data.name in row.published:
            named = family.get_config(f"{config.variant},{config.data.name}")
            if named.net == config.net:
                return row.published[config.data.name]
    return None


def table(groups: dict[str, Group]) -> str:
    """Returns test errors in percent as Markdown, mean and deviation over each row."""
    lines = [
        "| run | epochs | n | final, mean | sd | last 5, mean | sd | best, mean | sd |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, group in groups.items():
        curves = group.curves
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


def figure(groups: dict[str, Group]) -> Figure:
    """Plots test errors: a colour per row, a line per run, dashed if published."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for i, (name, group) in enumerate(groups.items()):
        for j, curve in enumerate(group.curves):
            epochs = [row["epoch"] for row in curve]
            label = None if j else f"{name}, {group.seeds}"
            style = dict(lw=1, ms=4, marker="o" if len(curve) <= MARKED else "")
            axes.plot(epochs, errors(curve), f"C{i}", label=label, **style)
        if published := group.published:
            net = name.partition(",")[0]
            label = f"{net}, published: {published.error:g} % ({published.selection})"
            axes.axhline(published.error, color=f"C{i}", ls="--", lw=1, label=label)
    axes.set(xlabel="epoch", ylabel="test error, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    # Below the plot, where it covers no curve.
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="WORKDIR|FAMILY:VARIANT,DATA=FILE")
    parser.add_argument("--out", type=pathlib.Path, help="image of the plot to write")
    options = parser.parse_args()
    try:
        groups = read(options.runs)
        print(table(groups))
        if options.out:
            figure(groups).savefig(options.out, dpi=120)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
