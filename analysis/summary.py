"""Tables of networks: all rows of the published tables, or one net layer by layer.

python -m analysis.summary                                  every variant, minutes
python -m analysis.summary configs/xvgg.py configs/gunn.py  of some families
python -m analysis.summary configs/xdensenet.py:40-48-2,cifar100    layer by layer
"""

import argparse
import importlib
import itertools
import pathlib
import sys
from collections.abc import Iterator

from flax import nnx

import nets
from configs.common import Published
from configs.data_sets import DATA_SETS
from nets import cost

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NO_FAMILY = ("common", "data_sets")
HEADER = (
    *("family", "variant", "data", "parameters", "dense", "MACs", "layers"),
    *("published", "error"),  # parameters and operations as printed; test error
)
WIDTHS = ("18", "24", "12", ">12", ">12", ">10", ">6", "14", "")
LAYER_HEADER = ("layer", "kind", "output", "parameters", "dense", "MACs")
LAYER_WIDTHS = ("32", "14", "14", ">12", ">12", ">14")


def layers(config) -> list[cost.LayerCost]:
    """The costs of a configuration's net for one image; nothing is compiled."""
    net = nnx.eval_shape(lambda: nets.create(config.net, nnx.Rngs(0)))
    size = DATA_SETS[config.data.name].image_size
    return cost.layers(net, (1, size, size, 3))


def rows(families: list[str]) -> Iterator[tuple[str, ...]]:
    """One row per variant and data set: our counts, and what was published."""
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
    return printed, f"{row.error}{top5} ({row.selection})"


def layer_rows(config) -> Iterator[tuple[str, ...]]:
    found = layers(config)
    for layer in found:
        shape = "x".join(map(str, layer.output_shape[1:]))
        yield (layer.path, layer.kind, shape, *_counts(layer))
    yield ("total", "", "", *_counts(cost.total(found)))


def _counts(layer: cost.Cost) -> tuple[str, ...]:
    return f"{layer.parameters:,}", f"{layer.dense_parameters:,}", f"{layer.macs:,}"


def show(header: tuple[str, ...], rows: Iterator, widths: tuple[str, ...]) -> None:
    """Row by row, because counting them all takes a while."""
    for row in itertools.chain([header], rows):
        cells = (f"{x:{width}}" for x, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="*", help="configs/FAMILY.py[:VARIANT,DATA]")
    families = []
    for name in parser.parse_args().config or sorted(CONFIGS.glob("*.py")):
        path, _, argument = str(name).partition(":")
        family = pathlib.Path(path).stem
        if argument:
            try:
                config = _module(family).get_config(argument)
            except ValueError as error:
                sys.exit(f"error: {error}")
            show(LAYER_HEADER, layer_rows(config), LAYER_WIDTHS)
        elif family not in NO_FAMILY:
            families.append(family)
    if families:
        show(HEADER, rows(families), WIDTHS)


def _module(family: str):
    known = sorted({path.stem for path in CONFIGS.glob("*.py")} - {*NO_FAMILY})
    if family not in known:
        sys.exit(f"error: no family {family!r}: choose from {', '.join(known)}")
    return importlib.import_module(f"configs.{family}")


if __name__ == "__main__":
    main()
