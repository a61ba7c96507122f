"""Builds the networks of the original codes and loads their weights.

    net = convert.build({"system": "xnets", "net": "densenet_cifar", "config": {...}})
    convert.load(net, tensors)    # original names and layouts, e.g. a state_dict

The tensor names of each system are defined in a file of their own.
"""

import contextlib
import difflib
from collections.abc import Collection, Iterator, Mapping

import numpy as np
from flax import nnx

import nets
from convert import cfmz, delugenets, fb_resnet, gunn, igcnets, xnets
from convert.sources import (
    Mismatch,
    Path,
    Reference,
    Source,
    assign,
    by_position,
    empty,
    own,
    tensor_shapes,
)
from nets.layers.norm import BatchNorm

__all__ = [
    "Mismatch",
    "UnknownReference",
    "build",
    "find",
    "find_sources",
    "load",
    "own",
]

# A net that several references describe is exported with the names of the first. So
# ResNets for ImageNet get the names of X-Nets, which are PyTorch's, not those of Lua.
FAMILIES: dict[str, dict[str, Reference]] = {
    "xnets": xnets.REFERENCES,
    "cfmz": cfmz.REFERENCES,
    "delugenets": delugenets.REFERENCES,
    "gunn": gunn.REFERENCES,
    "igcnets": igcnets.REFERENCES,
    "resnet": fb_resnet.REFERENCES,
}


class UnknownReference(LookupError):
    """A reference network that this package cannot convert."""


def find(system: str, net: str) -> Reference:
    """Returns the reference network `system`/`net`; raises UnknownReference."""
    if reference := FAMILIES.get(system, {}).get(net):
        return reference
    known = [f"{family}/{name}" for family in FAMILIES for name in FAMILIES[family]]
    nearest = difflib.get_close_matches(f"{system}/{net}", known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UnknownReference(
        f"unknown reference {system}/{net}: choose from {', '.join(known)}{hint}"
    )


def build(reference: Mapping) -> nnx.Module:
    """Builds the net of a reference configuration, with zeros in all variables.

    reference: `system`, `net` and `config`, as in the golden files. Optional:
      `tensors` (dicts with a `name`), which decide what `config` leaves open;
      `batch_norm` (eps, keep, running_var), which our net must match. Raises
      ValueError if it does not.
    """
    original = find(reference["system"], reference["net"])
    section = original.section(reference["config"])
    if "tensors" in reference:
        names = [entry["name"] for entry in reference["tensors"]]
        section = original.refine(section, names)
    net = empty(lambda: nets.create(section, nnx.Rngs(0)))
    for path, module in nnx.iter_modules(net):
        for field, value in reference.get("batch_norm", {}).items():
            if isinstance(module, BatchNorm) and getattr(module, field) != value:
                raise ValueError(
                    f"{'.'.join(map(str, path))}: {field} is "
                    f"{getattr(module, field)!r} here and {value!r} in the reference"
                )
    return net


def load(net: nnx.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Sets all variables of a net from tensors with the names of its original, or ours.

    Names may also be positions, as in files of neon and Torch7. Raises Mismatch, which
    lists missing and unexpected tensors and wrong shapes.
    """
    positions = all(name[:1].isdigit() for name in tensors)
    ordered = [x for x in _originals(net) if x[0].order] if positions else []
    if ordered:
        reference, sources = ordered[0]
        tensors = by_position(sources, reference, tensors)
    else:
        sources = find_sources(net, tensors)
    assign(net, sources, tensors)


def find_sources(net: nnx.Module, names: Collection[str] = ()) -> dict[Path, Source]:
    """Returns the source of each variable of a net, given the names of the tensors.

    Some nets have several original namings. Chooses the one, or ours, that has most of
    the given names; without names, the first of the originals.
    """

    def shared(sources):
        return len(tensor_shapes(sources).keys() & set(names))

    ours = own(net)
    candidates = [sources for _, sources in _originals(net)]
    candidates += [ours] if shared(ours) else []
    if not candidates:
        raise UnknownReference(
            f"cannot convert this {type(net).__name__}: no reference has its layers"
        )
    return max(candidates, key=shared)


def _originals(net: nnx.Module) -> Iterator[tuple[Reference, dict[Path, Source]]]:
    for reference in (x for family in FAMILIES.values() for x in family.values()):
        # A reference may not name all layers that its class can have.
        with contextlib.suppress(LookupError):
            if type(net) is reference.net:
                yield reference, reference.sources(net)
