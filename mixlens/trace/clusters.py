"""Columns of the documents that stand above them, such as the author: what documents may have in common."""

from __future__ import annotations

import pandas as pd

_GROUPS = "domain"  # compared with each other by design, and so no sample of all domains


def columns_above(sequences: pd.DataFrame) -> list[str]:
    """Columns of text or whole numbers with several values, each in one document throughout and most in several."""
    documents = sequences.drop(columns=["length", _GROUPS], errors="ignore").groupby("document_id", sort=False)
    found = []
    for name in sequences.columns.difference(["document_id", "length", _GROUPS], sort=False):
        values = documents[name]
        of_document = values.first().dropna()
        if not all(isinstance(value, str | int) and not isinstance(value, bool) for value in of_document.tolist()):
            continue
        sizes = of_document.value_counts()
        if len(sizes) > 1 and sizes.median() >= 2 and bool((values.nunique(dropna=False) == 1).all()):
            found.append(str(name))
    return found


def remark_on_clusters(sequences: pd.DataFrame) -> str:
    """Say which columns documents share, if any: intervals take documents for independent unless told otherwise."""
    if not (names := columns_above(sequences)):
        return ""
    counts = [f"{name} ({sequences[name].nunique():,} values)" for name in names]
    return (
        f"Several documents have the same {' and the same '.join(counts)}. Where those resemble each other, intervals "
        f"over documents are too narrow: pass cluster={names[0]!r} to statistics to have its values vary independently."
    )
