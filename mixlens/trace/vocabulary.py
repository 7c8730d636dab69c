"""Compare the vocabularies of two runs."""

from __future__ import annotations

import pandas as pd

from mixlens.errors import BadInput


def same_tokenizer(a: pd.Series | None, b: pd.Series | None) -> None:
    """Raise BadInput if two vocabularies (pieces by token id) differ; None stands for an unknown one."""
    if a is None or b is None:
        return
    first, second = a.align(b)
    differs = first.notna() & second.notna() & (first != second)
    if differs.any():
        token = differs.index[differs][0]
        raise BadInput(
            f"Cannot compare the runs: their tokenizers differ: token {token} is {first[token]!r} in the first and "
            f"{second[token]!r} in the second. Use the same tokenizer for both.",
            argument="tokenizer",
            value=(int(token), first[token], second[token]),
        )
