"""Reads pickles of numbers without running what they ask for.

A pickle can call any function, and an array of Python objects made from bytes is an
array of arbitrary pointers. This reader builds containers, texts and arrays of numbers,
and refuses everything else. It needs no more memory than a small multiple of the
pickle: pickle.Unpickler would trust the lengths and indices that it reads. Errors show
text and types only, because the repr of nested containers can be exponentially long.
"""

import io
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

MAX_TUPLE = 10_000  # items; the state of Python's random has 628


def loads(content: bytes, encoding: str = "bytes") -> Any:
    """Returns what was pickled, as `load` does."""
    return load(io.BytesIO(content), encoding)


def load(
    stream: BinaryIO,
    encoding: str = "bytes",
    *,
    stand_ins: Mapping[tuple[str, str], Any] | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns what was pickled at the position of a stream, and moves it behind that.

    encoding: of Python 2's strings, as in pickle.load. stand_ins: (module, name) ->
    the object to use for it, which must be harmless with any arguments.
    persistent_load: as pickle.Unpickler's.

    Raises pickle.UnpicklingError for anything but numbers, texts and containers of
    them, and any exception for a damaged pickle.
    """
    content = _cut(stream)
    known = _stand_ins(len(content)) | dict(stand_ins or {})
    return _Unpickler(content, encoding, known, persistent_load).load()


def _cut(stream: BinaryIO) -> bytes:
    """Returns the bytes of one pickle.

    Raises UnpicklingError if unpickling them could take more memory or time than a
    small multiple of their number.
    """
    start, name, stack = stream.tell(), "", _Stack()
    while name != "STOP":
        opcode = pickletools.code2op[stream.read(1).decode("latin1")]
        name, argument = opcode.name, None
        if name == "STRING":  # the reader of pickletools takes ASCII only
            stream.readline()
        elif opcode.arg:
            argument = opcode.arg.reader(stream)  # raises if the stream ends before it
        # Unpickler allocates a memo up to this index. An index counts earlier opcodes.
        if name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > stream.tell():
            raise pickle.UnpicklingError(f"memo index {argument} is refused")
        if name == "BYTEARRAY8" or name.startswith("EXT"):
            raise pickle.UnpicklingError(f"{name} is refused")
        stack.apply(opcode, argument)
    end = stream.tell()
    stream.seek(start)
    return stream.read(end - start)


class _Stack:
    """The stack and memo of an unpickler, with the sizes of objects instead of objects.

    The size of a tuple is that of its items plus one, of any other object one. Hashing
    a tuple, as a key of a dict, visits shared items each time they occur.
    """

    def __init__(self):
        self._sizes: list[int | None] = []  # None for a mark
        self._memo: dict[int, int | None] = {}

    def apply(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name, sizes = opcode.name, self._sizes
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(self._memo) if name == "MEMOIZE" else argument
            self._memo[index] = sizes[-1]
            return
        taken = []
        for kind in reversed(opcode.stack_before):
            if kind is pickletools.markobject:
                while (size := sizes.pop()) is not None:
                    taken.append(size)
            elif kind is not pickletools.stackslice:
                taken.append(sizes.pop())
        size = 1
        if name in ("GET", "BINGET", "LONG_BINGET"):
            size = self._memo[argument]
        elif name == "DUP":
            size = taken[0]
        elif name.startswith("TUPLE") or name == "FROZENSET":
            size += sum(taken)
        if size > MAX_TUPLE:
            raise pickle.UnpicklingError("a tuple of too many items is refused")
        for kind in opcode.stack_after:
            sizes.append(None if kind is pickletools.markobject else size)


class _Unpickler(pickle.Unpickler):
    def __init__(self, content, encoding, stand_ins, persistent_load):
        super().__init__(io.BytesIO(content), encoding=encoding)
        self._stand_ins = stand_ins
        if persistent_load is not None:
            self.persistent_load = persistent_load

    def find_class(self, module: str, name: str):
        if (module, name) not in self._stand_ins:
            raise pickle.UnpicklingError(
                f"the pickle asks for {module}.{name}: refused"
            )
        return self._stand_ins[module, name]


def show(value: Any) -> str:
    """Returns text as a literal, and the type of anything else."""
    text = isinstance(value, (str, bytes))
    return repr(value) if text else f"a {type(value).__name__}"


def _stand_ins(size: int) -> dict[tuple[str, str], Any]:
    """Returns what replaces numpy's functions in one pickle of `size` bytes.

    They are made for each pickle because a pickle can set attributes of classes.
    """
    left = 4 * size  # an array in Python 3 is encoded and then copied

    def spend(more: int) -> None:
        """Counts copies: a pickle may ask for many of the same bytes."""
        nonlocal left
        left -= more
        if left < 0:
            raise pickle.UnpicklingError("arrays larger than their pickle are refused")

    class Dtype:
        """Numbers of 1 to 8 bytes."""

        def __init__(self, name, *_):
            name = name.decode() if isinstance(name, bytes) else name
            numbers = "b1|[iu][1248]|f[248]"
            if not isinstance(name, str) or not re.fullmatch(numbers, name):
                raise pickle.UnpicklingError(f"the dtype {show(name)} is refused")
            self.dtype = np.dtype(name)

        def __setstate__(self, state):
            self.dtype = self.dtype.newbyteorder(state[1])

    class Array(np.ndarray):
        """Only bytes become an array, and only of numbers."""

        def __setstate__(self, state):
            version, shape, dtype, fortran, content = state
            if not isinstance(dtype, Dtype):
                raise pickle.UnpicklingError(f"an array of {show(dtype)} is refused")
            spend(len(content))
            super().__setstate__((version, shape, dtype.dtype, fortran, content))

    def ndarray(*_):
        """An argument of `reconstruct`, and nothing to call."""
        raise pickle.UnpicklingError("an array that is not made of bytes is refused")

    def reconstruct(*_):
        return np.ndarray.__new__(Array, (0,), np.uint8)

    def scalar(dtype, content):
        if not isinstance(dtype, Dtype):
            raise pickle.UnpicklingError(f"a number of type {show(dtype)} is refused")
        (value,) = np.frombuffer(content, dtype.dtype)
        return value

    def encode(text, encoding):
        """How Python 3 pickles bytes for Python 2."""
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"text in {show(encoding)} is refused")
        spend(len(text))
        return text.encode("latin1")

    class Dict(dict):
        """Stands in for OrderedDict: has its items, but not its attributes."""

        def __init__(self, items=()):
            spend(32 * len(items))
            super().__init__(items)

        def __setstate__(self, state):
            pass

    found = {
        ("numpy", "ndarray"): ndarray,
        ("numpy", "dtype"): Dtype,
        ("_codecs", "encode"): encode,
        ("collections", "OrderedDict"): Dict,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        found[module, "_reconstruct"] = reconstruct
        found[module, "scalar"] = scalar
    return found
