"""safetensors: a uint64, a JSON header of that length, and the values."""

import json
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from convert.containers.cursor import ContainerError, Cursor, elements
from convert.containers.weights import (
    Normalization,
    Weights,
    from_metadata,
    to_metadata,
)

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def matches(content: bytes) -> bool:
    return content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content)


def read(content: bytes) -> Weights:
    cursor = Cursor(content)
    header = json.loads(cursor.text(cursor.number("Q")))
    start, tensors = cursor.position, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ContainerError(f"{name}: unknown number type {entry['dtype']}")
        dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
        first, end = entry["data_offsets"]
        if elements(shape) * dtype.itemsize != end - first or first < 0:
            raise ContainerError(f"{name}: {end - first} bytes for {dtype}{shape}")
        tensors[name] = Cursor(content, start + first).array(dtype, shape)
    skipped = [name for name in header if name not in tensors]
    normalization = from_metadata(header.get("__metadata__", {}))
    return Weights(tensors, skipped, normalization=normalization)


def write(
    tensors: Mapping[str, np.ndarray], normalization: Normalization | None = None
) -> bytes:
    """Returns the content of a file that the safetensors library loads, too."""
    kinds = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}
    header, pieces, start = {}, [], 0
    if normalization:
        header["__metadata__"] = to_metadata(normalization)
    for name, tensor in tensors.items():
        pieces.append(np.ascontiguousarray(tensor).tobytes())
        header[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start := start + len(pieces[-1])],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the values
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])
