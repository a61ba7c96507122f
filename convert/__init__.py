"""The originals' networks and weights: one file per original framework's naming.

    net = convert.build({"system": "xnets", "net": "densenet_cifar", "config": {...}})
    convert.load(net, tensors)    # original names and layouts, e.g. a state_dict

`system`, `net` and `config` are those of the golden files (golden.py reads them).
"""

import contextlib
import difflib
from collections.abc import Collection, Mapping

import numpy as np
from flax import nnx

import nets
from convert import cfmz, delugenets, fb_resnet, gunn, igcnets, xnets
from convert.sources import Importer, ImportMismatch, Path, Source, assign, empty
from nets.layers.norm import BatchNorm

__all__ = [
    "ImportMismatch",
    "Importer",
    "NoImporter",
    "build",
    "find",
    "load",
    "sources_of",
]


class NoImporter(LookupError):
    """A reference network that has no importer (yet)."""


FAMILIES: dict[str, dict[str, Importer]] = {
    "cfmz": cfmz.IMPORTERS,
    "delugenets": delugenets.IMPORTERS,
    "gunn": gunn.IMPORTERS,
    "igcnets": igcnets.IMPORTERS,
    "resnet": fb_resnet.IMPORTERS,
    "xnets": xnets.IMPORTERS,
}


def find(system: str, net: str) -> Importer:
    importers = {
        f"{family}/{name}": importer
        for family, names in FAMILIES.items()
        for name, importer in names.items()
    }
    wanted = f"{system}/{net}"
    if wanted in importers:
        return importers[wanted]
    nearest = difflib.get_close_matches(wanted, importers, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise NoImporter(
        f"no importer yet for {wanted}: choose from {', '.join(importers)}{hint}"
    )


def build(reference: Mapping) -> nnx.Module:
    """The net of a reference configuration: `system`, `net`, `config`.

    Its variables are zeros, waiting for `load`. Given `tensors` (each with a `name`)
    settle what the configuration leaves open. A given `batch_norm` (eps, keep,
    running_var) must be what our net has: ValueError if not.
    """
    importer = find(reference["system"], reference["net"])
    section = importer.section(reference["config"])
    if "tensors" in reference:
        names = [entry["name"] for entry in reference["tensors"]]
        section = importer.of_tensors(section, names)
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
    """Fills the net with all tensors of an original, by original names and layouts.

    Raises ImportMismatch naming the tensors that are missing, unexpected or of another
    shape.
    """
    assign(net, sources_of(net, tensors), tensors)


def sources_of(net: nnx.Module, names: Collection[str]) -> dict[Path, Source]:
    """What each variable of the net is made of, for an original's names of tensors.

    The naming is the one, of those known for this class of net, that shares most names:
    an original may spell one net in several ways.
    """
    namings = []
    for importer in (i for names in FAMILIES.values() for i in names.values()):
        if type(net) is importer.net:
            # A naming may know only some of the forms of a class.
            with contextlib.suppress(LookupError):
                namings.append(importer.sources(net))
    if not namings:
        raise NoImporter(f"no importer yet for this {type(net).__name__}")

    def shared(sources):
        return sum(
            name in names for source in sources.values() for name in source.shapes
        )

    return max(namings, key=shared)
