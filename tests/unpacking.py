"""What `packing.pack` packed, read back without its code."""

from __future__ import annotations

import gzip
import json

import numpy as np

_TYPES = {"uint8": np.uint8, "int8": np.int8, "uint16": "<u2", "int32": "<i4", "float32": "<f4"}
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#:%/()*+-;,=.?@^_[{|}~"


def bytes_of(text: str) -> bytes:
    """Five digits of base 85 hold four bytes."""
    values = [_DIGITS.index(c) for c in text] + [84] * (-len(text) % 5)
    groups = np.array(values, np.uint64).reshape(-1, 5) @ np.array([85**i for i in (4, 3, 2, 1, 0)], np.uint64)
    return groups.astype(">u4").tobytes()[: len(text) * 4 // 5]


def unpack(text: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and arrays."""
    raw = gzip.decompress(bytes_of(text))
    length = int.from_bytes(raw[:4], "little")
    header = json.loads(raw[4 : 4 + length])
    # JavaScript reads numbers where they lie only at multiples of their size.
    assert all((4 + length + offset) % 8 == 0 for _, _, offset in header["arrays"].values())
    arrays = {
        name: np.frombuffer(raw, np.dtype(_TYPES[dtype]), int(np.prod(shape)), 4 + length + offset).reshape(shape)
        for name, (dtype, shape, offset) in header["arrays"].items()
    }
    return header, arrays
