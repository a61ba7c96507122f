"""NumPy: .npz, a zip archive of .npy files."""

import io
import json
import zipfile
from collections.abc import Mapping

import numpy as np

from convert.containers.cursor import ContainerError, Cursor, open_zip
from convert.containers.weights import (
    Normalization,
    Weights,
    from_metadata,
    to_metadata,
)

EXPANSION = 100  # largest size of the arrays over that of a compressed file


def matches(content: bytes) -> bool:
    return content.startswith((b"PK\3\4", b"PK\5\6"))


def read(content: bytes) -> Weights:
    archive = open_zip(content, EXPANSION)
    names = [name for name in archive.namelist() if name.endswith(".npy")]
    tensors = {n.removesuffix(".npy"): _array(archive.read(n)) for n in names}
    skipped = sorted(set(archive.namelist()) - set(names))
    try:
        metadata = json.loads(archive.comment)
    except ValueError:  # a comment of other software
        metadata = None
    stated = from_metadata(metadata) if isinstance(metadata, dict) else None
    return Weights(tensors, skipped, normalization=stated)


def write(
    tensors: Mapping[str, np.ndarray], normalization: Normalization | None = None
) -> bytes:
    """Returns the content of a file that np.load reads.

    It has no metadata, so the archive's comment holds the normalisation.
    """
    stream = io.BytesIO()
    np.savez(stream, **tensors)
    if normalization:
        with zipfile.ZipFile(stream, "a") as archive:
            archive.comment = json.dumps(to_metadata(normalization)).encode()
    return stream.getvalue()


def _array(content: bytes) -> np.ndarray:
    """Reads a .npy file; np.load would allocate what its header asks for."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, fortran, dtype = readers[version](stream)
    if dtype.hasobject or dtype.names:
        raise ContainerError(f"an array of {dtype} is not supported")
    shape = tuple(map(int, shape))
    array = Cursor(content, stream.tell()).array(
        dtype, shape[::-1] if fortran else shape
    )
    return array.T if fortran else array
