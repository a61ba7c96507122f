"""Golden files, format 2: what was recorded when an original network ran.

`<model>.json` holds facts and `<model>.npz` arrays. Weights, graphs and inputs are not
stored. Each is drawn again from its key, "<model>/<tensor name>".
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
    """A golden file that contradicts itself or the format."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """A recorded network: `facts` from the json file, `arrays` from the npz file."""

    facts: Mapping
    arrays: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, path: pathlib.Path) -> "Golden":
        facts = json.loads(path.read_text())
        if facts.get("format") != FORMAT:
            raise GoldenError(
                f"{path}: expected format {FORMAT}, got {facts.get('format')}"
            )
        with np.load(path.with_suffix(".npz")) as arrays:
            return cls(facts, dict(arrays))

    def tensors(self) -> dict[str, np.ndarray]:
        """Draws {name: array} in original layouts, float32 values in float64.

        As in the original, a graph is a boolean tensor `mask` beside its weight.
        """
        model, tensors = self.facts["model"], {}
        for entry in self.facts["tensors"]:
            key = f"{model}/{entry['name']}"
            value = draw(
                key, entry["shape"], entry["kind"], self.facts["scale_precision"]
            )
            tensors[entry["name"]] = value
            if "graph" in entry:
                pairs = draw_graph(key, entry["shape"][:2], entry["graph"])
                taps = (1,) * (value.ndim - 2)
                mask = np.broadcast_to(pairs.reshape(*pairs.shape, *taps), value.shape)
                tensors[entry["name"].rpartition(".")[0] + ".mask"] = mask
        return tensors

    def images(self) -> np.ndarray:
        """Draws the input (N, H, W, C), float32 values in float64."""
        return channels_last(
            normal(f"{self.facts['model']}/input", self.facts["input_shape"])
        )

    def labels(self) -> np.ndarray:
        return np.asarray(self.facts["labels"], np.int32)

    def running(self) -> dict[str, np.ndarray]:
        """Returns the recorded running statistics by tensor name."""
        kinds = {"running_mean": "mean", "running_var": "var"}
        found = {}
        for key, array in self.arrays.items():
            recorded, _, layer = key.partition("/")
            if recorded in kinds:
                # A tensor name is the layer name and the framework's leaf name.
                (name,) = [
                    entry["name"]
                    for entry in self.facts["tensors"]
                    if entry["kind"] == kinds[recorded]
                    and entry["name"].startswith((f"{layer}.", f"{layer}_"))
                    and "." not in entry["name"][len(layer) + 1 :]
                ]
                found[name] = array
        return found


def read_layers(path: pathlib.Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns the json and the arrays of a layer file."""
    with np.load(path.with_suffix(".npz")) as arrays:
        return json.loads(path.read_text()), dict(arrays)


def generator(key: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)


def normal(key: str, shape) -> np.ndarray:
    """Draws float32 values and returns them in float64."""
    return generator(key).standard_normal(shape).astype(np.float32).astype(np.float64)


def draw(key: str, shape, kind: str, scale_precision: str = "float32") -> np.ndarray:
    """Draws a tensor of float32 values and returns it in float64.

    kind: weight, bias, gamma, mean or var.
    """
    n, tenth = normal(key, shape).astype(np.float32), np.float32(0.1)
    match kind:
        case "weight":
            scale = np.sqrt(2 / np.prod(shape[1:]))
            tensor = n * scale.astype(scale_precision)
        case "bias" | "mean":
            tensor = tenth * n
        case "gamma":
            tensor = 1 + tenth * n
        case "var":
            tensor = np.exp(tenth * n)
        case _:
            raise GoldenError(f"{key}: unknown kind {kind!r}")
    return tensor.astype(np.float32).astype(np.float64)


def draw_graph(key: str, pairs, facts: Mapping) -> np.ndarray:
    """Draws the boolean mask (O, I) of an expander and checks it against `facts`.

    facts: the tensor's entry `graph` of the golden file.
    """
    out_channels, in_channels = pairs
    edges = connectivity.draw_expander(
        in_channels,
        out_channels,
        facts["degree"],
        f"per_{facts['sampled_side']}",
        generator(f"{key}/connections"),
    )
    mask = connectivity.to_matrix(edges, in_channels, out_channels).T
    crc = zlib.crc32(np.packbits(mask).tobytes())
    drawn, recorded = (mask.sum(), crc), (facts["nonzeros"], facts["mask_crc32"])
    if drawn != recorded:
        raise GoldenError(f"{key}: drew (nonzeros, crc32) {drawn}, recorded {recorded}")
    return mask


def channels_last(x: np.ndarray) -> np.ndarray:
    """(N, C, ...) -> (N, ..., C) in float64."""
    return np.moveaxis(x, 1, -1).astype(np.float64)


def channels_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)
