"""Prints tables of networks: all published rows, or one network layer by layer.

python -m analysis.summary                                  all variants, minutes
python -m analysis.summary configs/xvgg.py configs/gunn.py  some families
python -m analysis.summary configs/xdensenet.py:40-48-2,cifar100    layer by layer
"""

import argparse
import importlib
import itertools
import pathlib
import sys
from collections.abc import Iterator

from configs.common import Published
from configs.data_sets import DATA_SETS
from nets import cost

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
FAMILIES = sorted({p.stem for p in CONFIGS.glob("*.py")} - {"common", "data_sets"})
HEADER = (
    *("family", "variant", "data", "parameters", "dense", "MACs", "layers"),
    *("published", "error"),  # parameters and operations as printed; test error
)
WIDTHS = ("18", "24", "12", ">12", ">12", ">10", ">6", "14", "")
LAYER_HEADER = ("layer", "kind", "output", "parameters", "dense", "MACs")
LAYER_WIDTHS = ("32", "14", "14", ">12", ">12", ">14")


def layers(config) -> list[cost.LayerCost]:
    """Returns the costs of each layer of a configuration's net, for one image."""
    size = DATA_SETS[config.data.name].image_size
    return cost.of(config.net, (size, size, 3))


def rows(families: list[str]) -> Iterator[tuple[str, ...]]:
    """Yields one row per variant and data set: our counts and the published figures."""
    for family in families:
        module = _module(family)
        for name, variant in module.VARIANTS.items():
            for data in variant.parameters:
                found = layers(module.get_config(f"{name},{data}"))
                counts = cost.total(found)
                published = variant.published.get(data)
                yield (
                    family,
                    name,
                    data,
                    f"{counts.parameters:,}",
                    f"{counts.dense_parameters:,}",
                    f"{counts.macs / 1e6:,.1f}M",
                    str(sum(layer.macs > 0 for layer in found)),
                    *(_published(published) if published else ("", "")),
                )


def _published(row: Published) -> tuple[str, str]:
    printed = f"{row.parameters} {row.macs}".strip()
    top5 = f", top-5 {row.top5}" if row.top5 else ""
    note = f"; {row.note}" if row.note else ""
    return printed, f"{row.error}{top5} ({row.selection}){note}"


def layer_rows(config) -> Iterator[tuple[str, ...]]:
    """Yields one row per layer of a configuration's net, then their total."""
    found = layers(config)
    for layer in found:
        shape = "x".join(map(str, layer.output_shape[1:]))
        yield (layer.path, layer.kind, shape, *_counts(layer))
    yield ("total", "", "", *_counts(cost.total(found)))


def _counts(layer: cost.Cost) -> tuple[str, ...]:
    return f"{layer.parameters:,}", f"{layer.dense_parameters:,}", f"{layer.macs:,}"


def show(header: tuple[str, ...], rows: Iterator, widths: tuple[str, ...]) -> None:
    """Prints each row as soon as it is counted, because all rows take minutes."""
    for row in itertools.chain([header], rows):
        cells = (f"{x:{width}}" for x, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="*", help="configs/FAMILY.py[:VARIANT,DATA]")
    families = []
    for name in parser.parse_args().config or FAMILIES:
        path, _, argument = name.partition(":")
        family = pathlib.Path(path).stem
        if argument:
            try:
                config = _module(family).get_config(argument)
            except ValueError as error:
                sys.exit(f"error: {error}")
            show(LAYER_HEADER, layer_rows(config), LAYER_WIDTHS)
        else:
            families.append(family)
    if families:
        show(HEADER, rows(families), WIDTHS)


def _module(family: str):
    if family not in FAMILIES:
        sys.exit(f"error: unknown family {family!r}: choose from {', '.join(FAMILIES)}")
    return importlib.import_module(f"configs.{family}")


if __name__ == "__main__":
    main()
