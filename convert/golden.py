"""Golden files, format 2: recorded facts of an original network, and how its weights,
graphs and inputs are drawn again from their names.

A network is `<model>.json` (facts) beside `<model>.npz` (arrays). Every tensor is a
function of the key "<model>/<tensor name>".
"""

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Mapping

import numpy as np

from nets import connectivity

FORMAT = 2


class GoldenError(ValueError):
    """A golden file that contradicts itself or the rules."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """One recorded network: `facts` of the json, `arrays` of the npz."""

    facts: Mapping
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, path: pathlib.Path) -> "Golden":
        facts = json.loads(path.read_text())
        if facts.get("format") != FORMAT:
            raise GoldenError(
                f"{path}: format {FORMAT} expected, got {facts.get('format')}"
            )
        with np.load(path.with_suffix(".npz")) as arrays:
            return cls(facts, dict(arrays))

    def tensors(self) -> dict[str, np.ndarray]:
        """name -> array, original layouts, float32 values in float64.

        A graph is the boolean tensor `mask` beside its weight, as in the original.
        """
        model, tensors = self.facts["model"], {}
        for entry in self.facts["tensors"]:
            key = f"{model}/{entry['name']}"
            value = draw(
                key, entry["shape"], entry["kind"], self.facts["scale_precision"]
            )
            tensors[entry["name"]] = value.astype(np.float64)
            if "graph" in entry:
                pairs = graph(key, entry["shape"][:2], entry["graph"])
                taps = (1,) * (value.ndim - 2)
                mask = np.broadcast_to(pairs.reshape(*pairs.shape, *taps), value.shape)
                tensors[entry["name"].rpartition(".")[0] + ".mask"] = mask
        return tensors

    def images(self) -> np.ndarray:
        """The input (N, H, W, C), float32 values in float64."""
        images = normal(f"{self.facts['model']}/input", self.facts["input_shape"])
        return images.transpose(0, 2, 3, 1).astype(np.float64)

    def labels(self) -> np.ndarray:
        return np.asarray(self.facts["labels"], np.int32)

    def running(self) -> dict[str, np.ndarray]:
        """Recorded running statistics by the name of their tensor."""
        kinds = {"running_mean": "mean", "running_var": "var"}
        found = {}
        for key, array in self.arrays.items():
            recorded, _, layer = key.partition("/")
            if recorded in kinds:
                # The layer's name, then the framework's word for the statistic.
                (name,) = [
                    entry["name"]
                    for entry in self.facts["tensors"]
                    if entry["kind"] == kinds[recorded]
                    and entry["name"].startswith((f"{layer}.", f"{layer}_"))
                    and "." not in entry["name"][len(layer) + 1 :]
                ]
                found[name] = array
        return found


def generator(key: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)


def normal(key: str, shape) -> np.ndarray:
    return generator(key).standard_normal(shape).astype(np.float32)


def draw(key: str, shape, kind: str, scale_precision: str = "float32") -> np.ndarray:
    """The float32 tensor of a key; `kind` is weight, bias, gamma, mean or var."""
    n, tenth = normal(key, shape), np.float32(0.1)
    match kind:
        case "weight":
            scale = np.sqrt(2 / np.prod(shape[1:]))
            return (n * scale.astype(scale_precision)).astype(np.float32)
        case "bias" | "mean":
            return tenth * n
        case "gamma":
            return 1 + tenth * n
        case "var":
            return np.exp(tenth * n)
    raise GoldenError(f"{key}: unknown kind {kind!r}")


def graph(key: str, pairs, facts: Mapping) -> np.ndarray:
    """The boolean (O, I) mask of an expander; `facts` is the entry's `graph`."""
    out_channels, in_channels = pairs
    sampling = f"per_{facts['sampled_side']}"
    edges = connectivity.expander(
        in_channels,
        out_channels,
        facts["degree"],
        sampling,
        generator(f"{key}/connections"),
    )
    mask = connectivity.mask(edges, in_channels, out_channels).T
    crc = zlib.crc32(np.packbits(mask).tobytes())
    drawn, recorded = (mask.sum(), crc), (facts["nonzeros"], facts["mask_crc32"])
    if drawn != recorded:
        raise GoldenError(f"{key}: drew (nonzeros, crc32) {drawn}, recorded {recorded}")
    return mask
