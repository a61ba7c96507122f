"""Layer files of DelugeNets: units of the net applied to given maps, every value."""

import pathlib

import numpy as np
from flax import nnx

from convert.delugenets import Reader, cross_layers
from convert.sources import TORCH_LEAVES, assign, by_layer, empty
from nets.delugenet import Block, CompositeLayer, Transition
from nets.layers.cross_layer import CrossLayer, Source, make_source, unstack_scales
from nets.layers.norm import BatchNorm
from nets.layers.wiring import Wiring
from tests.support.golden_checks import Comparison, evaluate, train
from tests.support.golden_files import (
    channels_first,
    channels_last,
    draw,
    normal,
    read_layers,
)

KEEP = 0.9
KINDS = {
    "param_weight": "weight",
    "param_crossweight": "weight",
    "param_gamma": "gamma",
    "param_bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
}


def reader(facts: dict):
    units = {"cross", "trans", "composite", "block"}
    return delugenet_layers if facts.get("cases", {}).keys() & units else None


class Unit(nnx.Module):
    """Applies a unit to maps (N, H, W, C). Inputs and outputs have the newest first."""

    def __init__(self, unit: nnx.Module, channels: int, num_sources: int):
        self.unit = unit
        norms = [BatchNorm(channels, affine=False) for _ in range(num_sources)]
        self.norms = nnx.List(norms)

    def __call__(self, maps):
        block = self.unit if isinstance(self.unit, Block) else None
        first = block.opening if block else self.unit
        reader = first if isinstance(first, CrossLayer) else first.cross
        pairs = enumerate(zip(maps[::-1], self.norms, strict=True))
        sources = [
            Source(x)
            if reader is None
            else make_source(x, norm, i, unstack_scales([reader]))
            for i, (x, norm) in pairs
        ]
        if not block:
            return [self.unit(sources)]
        # Blocks compute their sources for a reader behind them.
        reader = CrossLayer(block.norms[0].mean.shape[0], len(block.norms))
        return [source.raw for source in block.sources(sources, reader)[::-1]]


def delugenet_layers(path: pathlib.Path) -> Comparison:
    comparison, (recorded, arrays) = Comparison(), read_layers(path)
    for case, facts in recorded["cases"].items():
        expected = {
            key.removeprefix(f"{case}__"): array
            for key, array in arrays.items()
            if key.startswith(f"{case}__")
        }
        results, spacings = _results(case, facts)
        assert results.keys() == expected.keys()
        largest = max(np.abs(v).max() for k, v in expected.items() if "grad__" in k)
        for name, actual in results.items():
            group, label = name.split("_")[0], f"{case} {name}"
            # The gradient of a bias before a batch norm is zero up to rounding.
            if np.abs(expected[name]).max() < 1e-10 * largest:
                zero = np.abs(actual).max() / largest
                comparison.add("zero gradients", zero, 0.0, 1e-10, label)
            else:
                spacing = spacings.get(name.removeprefix("after__"))
                comparison.add(
                    group, actual, expected[name], name=label, spacing=spacing
                )
    return comparison


def _results(case: str, facts) -> tuple[dict, dict]:
    """Returns our values by the names in the file, and the spacings of `train`."""
    tensors = {
        entry["name"]: draw(
            entry["full"], entry["shape"], KINDS[entry["kind"]], "float64"
        )
        for entry in facts["params"]
    }
    first = facts["params"][0]["name"]
    prefix = first.removesuffix("cross.weight")
    assert first == f"{prefix}cross.weight"
    if case == "block":
        prefix = prefix.removesuffix("trans.")
    shapes = {name.removeprefix(prefix): v.shape for name, v in tensors.items()}
    unit = empty(lambda: _unit(case, shapes))
    maps = [_values(entry) for entry in facts["inputs"]]
    upstream = [_values(entry) for entry in facts["grad_outputs"]]

    def loss(outputs):
        return sum((y * g).sum() for y, g in zip(outputs, upstream, strict=True))

    sources = {}
    for mode in ("eval", "train"):
        getattr(unit, mode)()
        sources = _sources(unit, prefix, folded=mode == "eval")
        known = {  # the newest output of a block has no reader
            path: source
            for path, source in sources.items()
            if source.shapes.keys() <= tensors.keys()
        }
        assign(unit, known, tensors)
        if mode == "eval":
            evaluated = evaluate(unit, maps)
    trained = train(unit, sources, maps, loss)

    results = {}
    for what, values in (
        ("eval_out", evaluated),
        ("train_out", trained["output"]),
        ("grad_input", trained["input gradient"]),
    ):
        results |= {f"{what}{i}": channels_first(v) for i, v in enumerate(values)}
    results |= {f"grad__{name}": v for name, v in trained["gradients"].items()}
    for name, before in trained["statistics before"].items():
        if name in tensors:
            added = trained["statistics"][name] - KEEP * before
            results[f"after__{name}"] = KEEP * tensors[name] + added
    return results, trained["spacing"]


def _unit(case: str, shapes) -> Unit:
    options = dict(rngs=nnx.Rngs(0))
    wired = options | {"wiring": Wiring()}
    opening = "trans." if case == "block" else ""
    channels, num_sources = shapes[f"{opening}cross.weight"]
    match case:
        case "cross":
            unit = CrossLayer(channels, num_sources)
        case "composite":
            width = shapes["conv1.weight"][0]
            unit = CompositeLayer(channels, width, num_sources, **wired)
        case "trans" | "block":
            new = shapes[f"{opening}conv.weight"][0]
            unit = Transition(channels, new, num_sources, **options)
            if case == "block":
                num_layers = sum(name.endswith(".conv1.weight") for name in shapes)
                unit = Block(unit, new // 2, num_layers, cross_layer=True, **wired)
    return Unit(unit, channels, num_sources)


def _sources(unit: Unit, prefix: str, folded: bool) -> dict:
    """Returns the sources of a unit, as convert.delugenets does for a net."""
    outer = [("norms", i) for i in range(len(unit.norms))]
    norms = {(): outer, ("opening",): outer}
    if isinstance(unit.unit, Block):
        inner = [("unit", "norms", i) for i in range(len(unit.unit.norms))]
        norms |= {("layers", i): inner[: i + 1] for i in range(len(inner))}
    readers = []
    for path, module in nnx.iter_modules(unit):
        if isinstance(module, CrossLayer):
            name = _name((*path, "scale"), prefix).removesuffix(".weight")
            position = tuple(part for part in path[1:] if part != "cross")
            channels = module.scale.get_value().shape[1]
            readers.append(Reader(path, name, channels, tuple(norms[position])))
    # Readers of more maps come later in the net.
    readers.sort(key=lambda reader: len(reader.norms))
    layers = by_layer(unit, lambda path, _: _name(path, prefix))
    return layers | cross_layers(readers, folded)


def _name(path: tuple, prefix: str) -> str:
    match path:
        case ("unit", "opening", part, leaf):
            where = f"trans.{part}"
        case ("unit", "layers", layer, part, leaf):
            where = f"layer{layer + 1}.{part}"
        case ("unit", part, leaf):
            where = part
        case ("unit", leaf):
            where = "cross"
        case _:  # a placeholder: cross_layers defines the sources of statistics
            return ".".join(map(str, path))
    return f"{prefix}{where.replace('norm', 'bn')}.{TORCH_LEAVES[leaf]}"


def _values(entry) -> np.ndarray:
    return channels_last(normal(entry["key"], entry["shape"]))
