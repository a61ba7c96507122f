"""Prints tables of networks: published variants, or one network layer by layer.

python -m analysis.summary                                       all variants
python -m analysis.summary '*40-48*' --data=cifar10              some variants
python -m analysis.summary configs/gunn.py --sort=parameters --csv=gunn.csv
python -m analysis.summary configs/xdensenet.py:40-48-2,cifar100     layer by layer
python -m analysis.summary --update       counts again and writes analysis/variants.csv

The counts of variants come from analysis/variants.csv. A variant that is not in it is
counted, which takes about a second. "dense" is the number of parameters of the dense
twin: the same net with the wiring "dense".
"""

import argparse
import csv
import difflib
import fnmatch
import itertools
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence

from configs.common import FAMILIES, Published, load_family
from configs.data_sets import DATA_SETS

TABLE = pathlib.Path(__file__).with_name("variants.csv")
KEY = ("family", "variant", "data")
COUNTS = ("parameters", "dense", "macs", "layers")  # layers: those with multiply-adds
HEADER = (
    *("family", "variant", "data", "parameters", "dense", "MACs", "layers"),
    *("published", "error"),  # parameters and operations as printed; test error
)
WIDTHS = ("12", "24", "18", ">12", ">12", ">10", ">6", "14", "")
LAYER_HEADER = ("layer", "kind", "output", "parameters", "dense", "MACs")
LAYER_WIDTHS = ("32", "14", "14", ">12", ">12", ">14")


def layers(config) -> list:
    """Returns the nets.cost.LayerCost of each layer, for one image."""
    from nets import cost  # imports jax, which the table does not need

    size = DATA_SETS[config.data.name].image_size
    return cost.of(config.net, (size, size, 3))


def select(patterns: Sequence[str], data: str = "") -> list[tuple[str, str, str]]:
    """Returns (family, variant, data set) of each variant that a pattern matches.

    patterns: shell-style, of a family, a variant, or FAMILY:VARIANT; none of them
      selects all variants. A family may be given as its file, configs/FAMILY.py.
    data: the name of a data set, or '' for all.
    Raises ValueError for a pattern or data set without a variant.
    """
    rows = [
        (family, variant, name)
        for family in FAMILIES
        for variant, row in load_family(family).VARIANTS.items()
        for name in row.parameters
    ]
    if data:
        sets = sorted({row[2] for row in rows})
        if data not in sets:
            raise ValueError(
                f"no variant has data set {data!r}: choose from {', '.join(sets)}"
            )
        rows = [row for row in rows if row[2] == data]
    names = {row: (*row[:2], ":".join(row[:2])) for row in rows}
    found = []
    for pattern in patterns or ["*"]:
        path, *rest = pattern.split(":", 1)
        pattern = ":".join([pathlib.Path(path).name.removesuffix(".py"), *rest])
        matching = [row for row in rows if fnmatch.filter(names[row], pattern)]
        if not matching:
            known = itertools.chain(*names.values())
            near = difflib.get_close_matches(pattern, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"no variant{f' with {data}' if data else ''} matches {pattern!r}: "
                "expected a pattern such as '*40-48*', or a family: "
                f"{', '.join(FAMILIES)}{hint}"
            )
        found += matching
    return list(dict.fromkeys(found))


def rows(selected: Sequence[tuple[str, str, str]], *, recount: bool = False) -> list:
    """Returns a dict for each selected variant: KEY, COUNTS and the published figures.

    recount: whether to count all of them, instead of only those not in the table.
    """
    known = {} if recount else read_table()
    if missing := [key for key in selected if key not in known]:
        from tqdm import tqdm

        # disable=None: no bar if standard error is not a terminal
        for key in tqdm(missing, "counting", unit="variant", disable=None):
            known[key] = count(*key)
    return [
        dict(zip(KEY, key, strict=True)) | known[key] | _published(*key)
        for key in selected
    ]


def read_table() -> dict[tuple[str, str, str], dict[str, int]]:
    """Returns (family, variant, data set) -> COUNTS, from analysis/variants.csv."""
    with TABLE.open(newline="") as file:
        return {
            tuple(row[name] for name in KEY): {name: int(row[name]) for name in COUNTS}
            for row in csv.DictReader(file)
        }


def count(family: str, variant: str, data: str) -> dict[str, int]:
    """Returns the COUNTS of a variant for a data set, from its net."""
    return add_up(layers(load_family(family).get_config(f"{variant},{data}")))


def add_up(costs: Sequence) -> dict[str, int]:
    """Returns the COUNTS of a net from the nets.cost.LayerCost of each layer."""
    from nets import cost

    total = cost.total(costs)
    return dict(
        parameters=total.parameters,
        dense=total.dense_parameters,
        macs=total.macs,
        layers=sum(layer.macs > 0 for layer in costs),
    )


def _published(family: str, variant: str, data: str) -> dict:
    none = Published(error=None, selection="", source="")
    row = load_family(family).VARIANTS[variant].published.get(data, none)
    return dict(
        error=row.error,
        top5=row.top5,
        selection=row.selection,
        published_parameters=row.parameters,
        published_macs=row.macs,
        note=row.note,
    )


def cells(row: dict) -> tuple[str, ...]:
    """Returns the cells of a row under HEADER."""
    top5 = f", top-5 {row['top5']}" if row["top5"] else ""
    note = f"; {row['note']}" if row["note"] else ""
    return (
        *(row[name] for name in KEY),
        f"{row['parameters']:,}",
        f"{row['dense']:,}",
        f"{row['macs'] / 1e6:,.1f}M",
        str(row["layers"]),
        f"{row['published_parameters']} {row['published_macs']}".strip(),
        f"{row['error']}{top5} ({row['selection']}){note}" if row["error"] else "",
    )


def layer_rows(config) -> Iterator[tuple[str, ...]]:
    """Yields one row per layer of a configuration's net, then their total."""
    from nets import cost

    found = layers(config)
    for layer in found:
        shape = "x".join(map(str, layer.output_shape[1:]))
        yield (layer.path, layer.kind, shape, *_layer_counts(layer))
    yield ("total", "", "", *_layer_counts(cost.total(found)))


def _layer_counts(layer) -> tuple[str, ...]:
    return f"{layer.parameters:,}", f"{layer.dense_parameters:,}", f"{layer.macs:,}"


def show(header: Sequence[str], rows: Iterable, widths: Sequence[str]) -> None:
    """Prints a table, each row as soon as it is known."""
    for row in itertools.chain([header], rows):
        print_row(row, widths)


def print_row(row: Sequence[str], widths: Sequence[str]) -> None:
    cells = (f"{x:{width}}" for x, width in zip(row, widths, strict=True))
    print("  ".join(cells).rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("patterns", nargs="*", metavar="PATTERN|configs/FAMILY.py[:VARIANT[,DATA]]")
    add("--data", default="", help="data set, such as cifar10")
    add("--sort", choices=(*KEY, *COUNTS, "error"), help="column to sort by")
    add("--csv", metavar="FILE", help="file to write the table to; -: prints it as CSV")
    add("--update", action="store_true", help="write analysis/variants.csv")
    options = parser.parse_args()
    try:
        if options.update:
            _update()
        elif any(map(_is_config, options.patterns)):
            _show_layers(options)
        else:
            _show_variants(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _is_config(argument: str) -> bool:
    """Whether an argument is configs/FAMILY.py:VARIANT[,DATA], without a pattern."""
    return ".py:" in argument and not any(x in argument for x in "*?[")


def _show_layers(options: argparse.Namespace) -> None:
    if not all(map(_is_config, options.patterns)):
        raise ValueError("configs/FAMILY.py:VARIANT and patterns cannot be combined")
    for name in ("data", "sort", "csv"):
        if getattr(options, name):
            raise ValueError(
                f"--{name} applies to tables of variants, not to a network's layers"
            )
    for argument in options.patterns:
        path, _, choice = argument.partition(":")
        config = load_family(pathlib.Path(path).stem).get_config(choice)
        show(LAYER_HEADER, layer_rows(config), LAYER_WIDTHS)


def _show_variants(options: argparse.Namespace) -> None:
    found = rows(select(options.patterns, options.data))
    if column := options.sort:  # rows without a value come last
        found.sort(key=lambda row: (row[column] is None, row[column] or 0))
    if options.csv:
        from runtime.workdir import as_csv, write_text

        text = as_csv(found)
        if options.csv == "-":
            print(text, end="")
            return
        write_text(options.csv, text)
    show(HEADER, map(cells, found), WIDTHS)


def _update() -> None:
    from runtime.workdir import as_csv, write_text

    counted = rows(select([]), recount=True)
    names = (*KEY, *COUNTS)
    write_text(TABLE, as_csv([{name: row[name] for name in names} for row in counted]))
    print(f"wrote {TABLE}: {len(counted)} variants")


if __name__ == "__main__":
    main()
