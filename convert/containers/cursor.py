"""Bounded reading: nothing is allocated for a length that the file does not have."""

import io
import math
import struct
import zipfile

import numpy as np

MOST_DIMENSIONS = 64  # NumPy's limit


class ContainerError(ValueError):
    """A weight file that is damaged, or that no reader understands."""


class Cursor:
    """A position in a file's content; all values are little-endian."""

    def __init__(self, content: bytes, position: int = 0):
        self.content, self.position = memoryview(content), position

    def take(self, size: int) -> memoryview:
        """Returns the next `size` bytes, without copying them."""
        end = self.position + size
        if size < 0 or end > len(self.content):
            raise ContainerError(
                f"{size} bytes expected at {self.position}, the file ends at "
                f"{len(self.content)}"
            )
        taken = self.content[self.position : end]
        self.position = end
        return taken

    def unpack(self, form: str) -> tuple:
        form = f"<{form}"
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def number(self, form: str) -> int | float:
        """Returns one number, such as of the form 'I' (uint32) or 'q' (int64)."""
        (value,) = self.unpack(form)
        return value

    def text(self, size: int) -> str:
        return bytes(self.take(size)).decode()

    def array(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(dtype)
        content = self.take(elements(shape) * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(shape)


def elements(shape: tuple[int, ...]) -> int:
    """Returns the number of elements of an array; ContainerError for a bad shape."""
    if len(shape) > MOST_DIMENSIONS:
        raise ContainerError(f"an array has {len(shape)} dimensions")
    if any(type(n) is not int or n < 0 for n in shape):
        raise ContainerError("a shape must consist of integers from 0 on")
    return math.prod(shape)


def strided(
    values: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> np.ndarray:
    """Returns a view of a vector; ContainerError if it is not inside the vector.

    strides: in elements. A view is never larger than its vector.
    """
    elements((*strides, offset))  # refuses negative ones
    size = elements(shape)
    last = offset + sum((n - 1) * k for n, k in zip(shape, strides, strict=True))
    if size > len(values) or (size and last >= len(values)):
        raise ContainerError(f"a tensor {shape} is not inside its {len(values)} values")
    if not size:
        return np.zeros(shape, values.dtype)
    steps = [step * values.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps)


def open_zip(content: bytes, expansion: int) -> zipfile.ZipFile:
    """Opens an archive whose members have at most `expansion` times its size."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile as error:
        raise ContainerError(f"the archive is incomplete ({error})") from error
    members = archive.infolist()
    # zipfile decompresses the other methods in chunks of any size.
    if {x.compress_type for x in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise ContainerError("zip methods other than deflate are not supported")
    size = sum(member.file_size for member in members)
    if size > expansion * len(content):
        raise ContainerError(
            f"an archive of {len(content)} bytes claims to hold {size}"
        )
    return archive
