"""neon: a pickle of nested layers, {'model': {'config': {'layers': [...]}}}.

A layer has `params`, or is a container whose config has `layers`. neon names no layer.
"""

from typing import Any

import numpy as np

from convert.containers.cursor import ContainerError
from convert.containers.weights import Weights
from data_sources import pickles


def matches(content: bytes) -> bool:
    """Accepts every pickle: of protocol 2 or later, or a dict of protocol 0 or 1."""
    return content.startswith((b"\x80", b"(dp", b"}q"))


def read(content: bytes) -> Weights:
    root = _entries(pickles.loads(content))
    layers = _entries(_entries(root.get("model")).get("config")).get("layers")
    if not isinstance(layers, list):
        raise ContainerError("the pickle has no model.config.layers")
    tensors, skipped = {}, [name for name in root if name != "model"]
    _collect(layers, (), tensors, skipped, set())
    return Weights(tensors, skipped)


def _collect(layers: list, path: tuple, tensors: dict, skipped: list, seen: set):
    if id(layers) in seen:
        raise ContainerError("the same layers occur twice")
    seen.add(id(layers))
    for i, layer in enumerate(layers):
        layer, position = _entries(layer), (*path, str(i))
        name = ".".join(position)
        inner = _entries(layer.get("config")).get("layers")
        if isinstance(inner, list):
            _collect(inner, position, tensors, skipped, seen)
        params = _entries(layer.get("params"))
        # The frozen convolution of a shortcut is an identity, and has no parameters.
        matrix = params.get("W")
        matrix = matrix if isinstance(matrix, np.ndarray) else np.zeros(0)
        if matrix.ndim == 2 and np.array_equal(matrix, np.eye(*matrix.shape)):
            skipped.append(f"{name} (identity)")
            continue
        for leaf, tensor in params.items():
            if not isinstance(tensor, np.ndarray):
                raise ContainerError(f"{name}.{leaf} is not an array")
            tensors[f"{name}.{leaf}"] = np.asarray(tensor)
        if layer.get("states"):
            skipped.append(f"{name}.states")


def _entries(value: Any) -> dict[str, Any]:
    """Returns a dict of Python 2 or 3 with text as keys; {} for anything else."""
    if not isinstance(value, dict):
        return {}
    return {k.decode() if isinstance(k, bytes) else str(k): v for k, v in value.items()}
