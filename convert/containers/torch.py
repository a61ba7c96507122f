"""PyTorch: zip archives (since 1.6) and sequences of pickles (since 0.1.10).

Both pickle a tree of objects in which a tensor is a call of torch._utils with a
storage, an offset, a shape and strides. The values of the storages follow: as members
of the archive, or after the last pickle, ordered by a pickled list of their keys.
"""

import functools
import io
import pickle
import re
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from convert.containers.cursor import (
    ContainerError,
    Cursor,
    elements,
    open_zip,
    strided,
)
from convert.containers.weights import Weights
from data_sources import pickles

MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # a pickled number
DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    start: int  # of a view of the storage `key`


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def matches(content: bytes) -> bool:
    return content.startswith(MAGIC) or bool(_pickle_name(content))


def _pickle_name(content: bytes) -> str:
    if not content.startswith(b"PK\3\4"):
        return ""
    try:
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    except Exception:  # a truncated archive still begins with its first member
        size = int.from_bytes(content[26:28], "little")
        names = [content[30 : 30 + size].decode(errors="replace")]
    found = [name for name in names if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
    return found[0] if found else ""


def read(content: bytes) -> Weights:
    if content.startswith(MAGIC):
        root, values = _read_pickles(content)
    else:
        root, values = _read_zip(content, _pickle_name(content))
    return _select(root, values)


def _read_zip(content: bytes, pickle_name: str) -> tuple[Any, Callable]:
    archive = open_zip(content, expansion=1)
    folder = pickle_name.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist():
        _check_order(archive.read(f"{folder}byteorder") == b"little")
    root = _unpickle(io.BytesIO(archive.read(pickle_name)), {})
    return root, lambda storage: archive.read(f"{folder}data/{storage.key}")


def _read_pickles(content: bytes) -> tuple[Any, Callable]:
    stream, storages = io.BytesIO(content), {}
    _, _, system, root, keys = (_unpickle(stream, storages) for _ in range(5))
    _check_order(system["little_endian"])
    cursor, values = Cursor(content, stream.tell()), {}
    for key in keys:
        count = cursor.number("q")
        values[key] = cursor.take(count * storages[key].dtype.itemsize)
    return root, lambda storage: values[storage.key]


def _check_order(little: bool) -> None:
    if not little:
        raise ContainerError("big-endian numbers are not supported")


def _unpickle(stream: io.BytesIO, storages: dict[str, _Storage]) -> Any:
    """Returns the object, and adds its storages to `storages` by their keys."""

    def persistent_load(saved):
        kind, dtype, key, _, count, *view = saved
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ContainerError(f"unknown kind of object {pickles.show(kind)}")
        key, start = (view[0][0], view[0][1]) if view and view[0] else (key, 0)
        if not isinstance(key, str):
            raise ContainerError(f"the key of a storage is {pickles.show(key)}")
        elements((count, start))  # refuses anything but integers
        storages[key] = _Storage(key, dtype, start)
        return storages[key]

    def rebuild_tensor(storage, offset, shape, strides, *_):
        if not isinstance(storage, _Storage):
            raise ContainerError("a tensor without storage")
        for numbers in (shape, strides, (offset,)):
            elements(numbers)
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    def size(shape):
        elements(shape)
        return tuple(shape)

    stand_ins = {
        ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): lambda x, *_: rebuild_tensor(*x),
        ("torch", "Size"): size,
    }
    for name, kind in DTYPES.items():
        for module in ("torch", "torch.cuda"):
            stand_ins[module, name] = np.dtype(kind)
    try:
        return pickles.load(
            stream, "utf-8", stand_ins=stand_ins, persistent_load=persistent_load
        )
    except pickle.UnpicklingError as error:
        raise ContainerError(f"{error} (of a model, save the state_dict)") from error


def _select(root: Any, values: Callable[[_Storage], bytes]) -> Weights:
    """Returns the tensors of `state_dict`, or of the file if it is one itself.

    torch.nn.DataParallel adds "module" to the names of wrapped modules.
    """
    if not isinstance(root, dict):
        raise ContainerError(f"expected a state_dict, got {type(root).__name__}")
    skipped, state = [], root
    if isinstance(root.get("state_dict"), dict):
        state = root["state_dict"]
        skipped = [str(key) for key in root if key != "state_dict"]
    content, tensors = functools.cache(values), {}
    for name, tensor in state.items():
        clean = re.sub(r"(^|\.)module\.", r"\1", str(name))
        if not isinstance(tensor, _Tensor) or clean.endswith("num_batches_tracked"):
            skipped.append(clean)
            continue
        if clean in tensors:
            raise ContainerError(f"two tensors are called {clean}")
        storage = tensor.storage
        numbers = np.frombuffer(content(storage), storage.dtype)
        tensors[clean] = strided(
            numbers[storage.start :], tensor.offset, tensor.shape, tensor.strides
        )
    return Weights(tensors, skipped)
