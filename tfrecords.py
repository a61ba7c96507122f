"""TFRecord files read in numpy, without TensorFlow; checksums are verified."""

import numpy as np


def records(name: str, content: bytes) -> list[bytes]:
    """The records of a file: 8 bytes length, 4 its checksum, record, 4 its checksum.

    `name` is for messages. Raises ValueError on a file that is cut off or damaged.
    """
    starts, lengths, position = [], [], 0
    while position < len(content):
        if position + 12 > len(content):
            raise ValueError(f"{name} is cut off at byte {position}")
        length = int.from_bytes(content[position : position + 8], "little")
        starts.append(position + 12)
        lengths.append(length)
        position += length + 16
    if position > len(content):
        raise ValueError(f"{name} is cut off after {len(starts) - 1} records")
    starts, lengths = np.array(starts, np.int64), np.array(lengths, np.int64)
    data = np.frombuffer(content, np.uint8)
    stored = data[(starts + lengths)[:, None] + np.arange(4)].view("<u4")[:, 0]
    crc = crc32c(data, starts, lengths)
    masked = ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)
    if (bad := np.flatnonzero(masked != stored)).size:
        raise ValueError(f"record {bad[0]} of {name} has a wrong checksum")
    ends = starts + lengths
    return [content[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


def crc32c(content: np.ndarray, starts: np.ndarray, lengths: np.ndarray):
    """CRC-32C of each piece content[start : start + length], byte k of all at once.

    content: uint8; starts, lengths: (N,) int64. Returns (N,) uint32.
    """
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    order = np.argsort(-lengths, kind="stable")  # the longest first: a prefix is active
    starts, descending = starts[order], -lengths[order]
    crc, result = np.full((2, len(order)), 0xFFFFFFFF, np.uint32)
    for k in range(lengths.max(initial=0)):
        active = np.searchsorted(descending, -k)
        part = crc[:active]
        crc[:active] = table[(part ^ content[starts[:active] + k]) & 255] ^ (part >> 8)
    result[order] = ~crc
    return result
