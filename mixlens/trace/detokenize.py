"""Text of single tokens from a SentencePiece-style vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def display_pieces(token_ids: Sequence[int] | np.ndarray, vocabulary: pd.Series | None) -> list[str]:
    """Return the text of each token; a run of byte tokens shows its character at the last byte.

    Bytes that are not valid UTF-8 are shown as ⟨E2⟩, and tokens without a vocabulary as "#id".
    """
    if vocabulary is None:
        return [f"#{int(i)}" for i in token_ids]
    raw = [vocabulary.get(int(i), f"#{int(i)}") for i in token_ids]
    shown = [piece.replace("▁", " ") for piece in raw]
    pending: list[int] = []
    for i, piece in enumerate([*raw, ""]):
        if match := _BYTE.fullmatch(piece):
            pending.append(int(match[1], 16))
            continue
        if pending:
            shown[i - len(pending) : i] = _decode(bytes(pending))
            pending = []
    return shown


def _decode(run: bytes) -> list[str]:
    texts, start = [""] * len(run), 0
    while start < len(run):
        for stop in range(start + 1, min(start + 4, len(run)) + 1):
            try:
                texts[stop - 1] = run[start:stop].decode()
            except UnicodeDecodeError:
                continue
            start = stop
            break
        else:
            texts[start] = f"⟨{run[start]:02X}⟩"
            start += 1
    return texts
