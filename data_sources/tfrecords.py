"""Records in files of TFDS; TFRecord is read and verified without TensorFlow."""

import contextlib
import io
import os
import pathlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np


def records(name: str, content: bytes) -> list[bytes]:
    """Splits the content of a TFRecord file into records and verifies their checksums.

    A record is stored as 8 bytes of length, 4 of checksum, the record, 4 of checksum.
    name: of the file, for messages. Raises ValueError if it is truncated or damaged.
    """
    starts, lengths = index(name, io.BytesIO(content))
    data, ends = np.frombuffer(content, np.uint8), starts + lengths
    stored = data[ends[:, None] + np.arange(4)].view("<u4")[:, 0]
    if (bad := np.flatnonzero(_masked(data, starts, lengths) != stored)).size:
        raise ValueError(f"record {bad[0]} of {name} has a wrong checksum")
    return [content[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


def index(
    path: str | os.PathLike, file: BinaryIO | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the starts and lengths of a file's records, (N,) int64 each.

    Reads and verifies only the headers. file: its content, if it is open. Raises
    ValueError if the file is truncated or damaged.
    """
    headers, starts, position = [], [], 0
    with file or open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        while position < size:
            file.seek(position)
            header = file.read(12)
            if len(header) < 12:
                raise ValueError(f"{path} is truncated at byte {position}")
            headers.append(header)
            starts.append(position + 12)
            position += int.from_bytes(header[:8], "little") + 16
    if position > size:
        raise ValueError(f"{path} is truncated after {len(starts) - 1} records")
    data = np.frombuffer(b"".join(headers), np.uint8)
    masked = _masked(data, 12 * np.arange(len(headers)), np.full(len(headers), 8))
    rows = data.view([("length", "<i8"), ("checksum", "<u4")])
    if (bad := np.flatnonzero(masked != rows["checksum"])).size:
        raise ValueError(f"record {bad[0]} of {path} has a damaged header")
    return np.array(starts, np.int64), rows["length"].astype(np.int64)


def files(builder, split: str) -> list[pathlib.Path]:
    """Returns the files of a split, or of several joined by +, in the given order.

    TFDS sorts the files of joined splits by name.
    """
    parts = [builder.info.splits[part].filepaths for part in split.split("+")]
    return [pathlib.Path(path) for part in parts for path in part]


def source(builder, split: str) -> Sequence[bytes]:
    """Returns the records of a split by number; not for TFRecord, which has no index.

    Files are opened when first needed and stay open.
    """
    import tensorflow_datasets as tfds

    _allow_open_files(len(files(builder, split)))
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return builder.as_data_source(split, deserialize_method=raw)


def _allow_open_files(more: int) -> None:
    """Raises the soft limit, often 1,024; ImageNet's training split has 1,024 files."""
    import resource  # missing on Windows, like array_record

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
    with contextlib.suppress(OSError, ValueError):  # macOS has a second, lower limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def first(builder, split: str) -> bytes:
    """Returns the first record of a split; errors of the readers propagate."""
    paths = files(builder, split)
    if not all(".tfrecord" in path.name for path in paths):
        return source(builder, split)[0]
    indexed = ((path, *index(path)) for path in paths)
    return next(read(x, y[0], z[0]) for x, y, z in indexed if len(y))


def read(path: str | os.PathLike, start: int, length: int) -> bytes:
    """Reads a record at a position from `index`; does not verify its checksum."""
    with open(path, "rb") as file:
        file.seek(start)
        content = file.read(length)
    if len(content) != length:
        raise ValueError(f"{path} is truncated at byte {start + len(content)}")
    return content


def _masked(data: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the checksums in the form that TFRecord stores."""
    crc = crc32c(data, starts, lengths)
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)


def crc32c(content: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
    """Returns the CRC-32C (N,) uint32 of each piece content[start : start + length].

    content: uint8; starts, lengths: (N,) int64. Processes byte k of all pieces at once.
    """
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    # Longest first: the active pieces are a prefix.
    order = np.argsort(-lengths, kind="stable")
    starts, descending = starts[order], -lengths[order]
    crc, result = np.full((2, len(order)), 0xFFFFFFFF, np.uint32)
    for k in range(lengths.max(initial=0)):
        active = np.searchsorted(descending, -k)
        part = crc[:active]
        crc[:active] = table[(part ^ content[starts[:active] + k]) & 255] ^ (part >> 8)
    result[order] = ~crc
    return result
