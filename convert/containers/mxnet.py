"""MXNet: .params, a list of arrays and their names.

A uint64 0x112, a reserved uint64, a counted list of arrays, a counted list of names. An
array begins with the magic number of its version, the oldest one with its number of
dimensions.
"""

import numpy as np

from convert.containers.cursor import ContainerError, Cursor
from convert.containers.weights import Weights

MAGIC = bytes.fromhex("1201000000000000")
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
DTYPES = "<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8"


def matches(content: bytes) -> bool:
    return content.startswith(MAGIC)


def read(content: bytes) -> Weights:
    cursor = Cursor(content, len(MAGIC) + 8)
    arrays = [_array(cursor) for _ in range(_count(cursor))]
    names = [cursor.text(cursor.number("Q")) for _ in range(_count(cursor))]
    if len(names) != len(arrays):
        raise ContainerError(f"it has {len(arrays)} arrays and {len(names)} names")
    # "arg:" are parameters, "aux:" are running statistics.
    names = [name.removeprefix("arg:").removeprefix("aux:") for name in names]
    if len(set(names)) < len(names):
        raise ContainerError("two arrays have the same name")
    found = {n: x for n, x in zip(names, arrays, strict=True) if x is not None}
    return Weights(found, [name for name in names if name not in found])


def _count(cursor: Cursor) -> int:
    count = cursor.number("Q")
    if count > len(cursor.content):
        raise ContainerError(f"its list of {count} entries is longer than the file")
    return count


def _array(cursor: Cursor) -> np.ndarray | None:
    """Returns the next array; None for one without shape."""
    version = cursor.number("I")
    if version in (V2, V3) and (kind := cursor.number("i")) != 0:
        raise ContainerError(f"a sparse array (kind {kind}) is not supported")
    modern = version in (V1, V2, V3)
    dimensions = cursor.number("i") if modern else version
    if dimensions < 0 or (dimensions == 0 and version != V3):
        return None
    shape = cursor.unpack(f"{dimensions}{'q' if modern else 'I'}")
    cursor.take(8)  # the device
    dtype = cursor.number("i")
    if not 0 <= dtype < len(DTYPES):
        raise ContainerError(f"unknown number type {dtype}")
    return cursor.array(DTYPES[dtype], shape)
