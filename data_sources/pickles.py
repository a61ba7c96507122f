"""Reads pickles of numbers without running what they ask for.

A pickle can call any function, and an array of Python objects made from bytes is an
array of arbitrary pointers. This reader builds containers, texts and arrays of numbers,
and refuses everything else.
"""

import io
import pickle
import re
from typing import Any

import numpy as np


def loads(content: bytes, encoding: str = "bytes") -> Any:
    """Returns what was pickled. encoding: of Python 2's strings, as in pickle.loads.

    Raises pickle.UnpicklingError for anything but numbers, texts and containers of
    them, and any exception for a damaged pickle.
    """
    return _Unpickler(io.BytesIO(content), encoding=encoding).load()


class _Array(np.ndarray):
    """Stands in for numpy.ndarray: only bytes become an array, and only of numbers."""

    def __setstate__(self, state):
        version, shape, dtype, fortran, content = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError(f"an array of {dtype!r} is refused")
        super().__setstate__((version, shape, dtype.dtype, fortran, content))


class _Dtype:
    """Stands in for numpy.dtype: numbers of 1 to 8 bytes."""

    def __init__(self, name, *_):
        name = name.decode() if isinstance(name, bytes) else name
        if not isinstance(name, str) or not re.fullmatch("b1|[iu][1248]|f[248]", name):
            raise pickle.UnpicklingError(f"numbers of type {name!r} are refused")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


def _ndarray(*_):
    """An argument of the following, and nothing to call."""
    raise pickle.UnpicklingError("an array that is not made of bytes is refused")


def _reconstruct(*_):
    return np.ndarray.__new__(_Array, (0,), np.uint8)


def _encode(text, encoding):
    """How Python 3 pickles bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding!r} is refused")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(
                f"the pickle asks for {module}.{name}: refused"
            )
        return _STAND_INS[module, name]
