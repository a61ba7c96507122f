"""Torch7: .t7, a tree of Lua values in binary form.

A value is an int32 for its type and its content. Tables, tensors and modules are
numbered, so that later references are to a number. A module is a table of its fields,
with `modules` for the inner ones. Functions are skipped.
"""

from typing import Any, NamedTuple

import numpy as np

from convert.containers.cursor import ContainerError, Cursor, elements, strided
from convert.containers.weights import Weights

NIL, NUMBER, STRING, TABLE, TORCH, BOOLEAN = range(6)
FUNCTION, FUNCTIONS = 6, (7, 8)  # the first has no number
DTYPES = {
    "Float": "<f4",
    "Double": "<f8",
    "Half": "<f2",
    "Long": "<i8",
    "Int": "<i4",
    "Short": "<i2",
    "Char": "i1",
    "Byte": "u1",
}
DTYPES |= {f"Cuda{kind}": dtype for kind, dtype in DTYPES.items()} | {"Cuda": "<f4"}
LEAVES = "weight", "bias", "running_mean", "running_var"


class Module(NamedTuple):
    """An object of a Lua class, such as nn.Sequential."""

    name: str
    fields: dict


def matches(content: bytes) -> bool:
    """Accepts a table or an object with number 1."""
    return content[:8] in (b"\3\0\0\0\1\0\0\0", b"\4\0\0\0\1\0\0\0")


def read(content: bytes) -> Weights:
    root = _Reader(content).value()
    skipped = []
    if isinstance(root, dict) and isinstance(root.get("model"), Module):
        skipped = [str(key) for key in root if key != "model"]
        root = root["model"]
    if not isinstance(root, Module):
        raise ContainerError("it holds no nn module")
    tensors = {}
    _collect(root, (), tensors, set())
    return Weights(tensors, skipped)


def _collect(module: Module, path: tuple, tensors: dict, seen: set) -> None:
    if id(module) in seen:
        raise ContainerError(f"module {'.'.join(path)} occurs twice")
    seen.add(id(module))
    own = {leaf: module.fields.get(leaf) for leaf in LEAVES}
    own = {leaf: x for leaf, x in own.items() if isinstance(x, np.ndarray) and x.size}
    for leaf, tensor in own.items():
        tensors[".".join((*path, leaf))] = tensor
    inner = module.fields.get("modules")
    # DelugeNet's cross-layer convolution computes with a batch norm that has no weights
    # of its own.
    if own or not isinstance(inner, dict):
        return
    children = sorted((k, v) for k, v in inner.items() if isinstance(k, int))
    if module.name == "nn.DataParallelTable":  # replicas of one module
        _collect(children[0][1], path, tensors, seen)
        return
    for position, child in children:
        if isinstance(child, Module):
            _collect(child, (*path, str(position)), tensors, seen)


class _Reader(Cursor):
    def __init__(self, content: bytes):
        super().__init__(content)
        self._known: dict[int, Any] = {}

    def value(self) -> Any:
        kind = self.number("i")
        if kind == NIL:
            return None
        if kind == NUMBER:
            number = self.number("d")
            return int(number) if number.is_integer() else number
        if kind == STRING:
            return self._string()
        if kind == BOOLEAN:
            return bool(self.number("i"))
        if kind == FUNCTION:
            return self._function()
        index = self.number("i")
        if index in self._known:
            return self._known[index]
        if kind == TABLE:
            return self._table(index)
        if kind == TORCH:
            return self._object(index)
        if kind in FUNCTIONS:
            self._known[index] = None
            return self._function()
        raise ContainerError(f"unknown type {kind} at {self.position}")

    def _function(self) -> None:
        """Skips the bytecode and the captured variables."""
        self._string()
        self.value()

    def _string(self) -> str:
        content = self.take(self.number("i"))
        return bytes(content).decode(errors="replace")

    def _table(self, index: int) -> dict:
        table = self._known[index] = {}
        for _ in range(self.number("i")):
            key = self.value()
            if not isinstance(key, (str, int, float)):
                raise ContainerError(f"a table with {type(key).__name__} as key")
            table[key] = self.value()
        return table

    def _object(self, index: int) -> Any:
        name = self._string()
        if name.startswith("V "):  # a version precedes the name
            name = self._string()
        kind = name.removeprefix("torch.")
        if kind.endswith("Tensor") and kind.removesuffix("Tensor") in DTYPES:
            made = self._tensor()
        elif kind.endswith("Storage") and kind.removesuffix("Storage") in DTYPES:
            dtype = DTYPES[kind.removesuffix("Storage")]
            made = self.array(dtype, (self.number("q"),))
        else:
            # Known before its fields, which may refer to it.
            made = self._known[index] = Module(name, {})
            fields = self.value()
            made.fields.update(fields if isinstance(fields, dict) else {})
        self._known[index] = made
        return made

    def _tensor(self) -> np.ndarray:
        dimensions = elements((self.number("i"),))
        shape, strides = (self.unpack(f"{dimensions}q") for _ in range(2))
        offset, storage = self.number("q"), self.value()
        if storage is None or not dimensions:  # an empty tensor
            return np.zeros(0)
        if not isinstance(storage, np.ndarray) or storage.ndim != 1:
            raise ContainerError("a tensor without storage")
        return strided(storage, offset - 1, shape, strides)
