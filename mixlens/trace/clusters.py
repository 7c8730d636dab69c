"""Columns that group documents, such as the author, and so may make them dependent."""

from __future__ import annotations

import pandas as pd

_GROUPS = "domain"  # chosen by design, not sampled from all domains


def columns_above(sequences: pd.DataFrame) -> list[str]:
    """Return columns of text or integers that group documents: constant within each, and shared by several."""
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
    """Describe the columns that documents share, if any; by default intervals assume independent documents."""
    if not (names := columns_above(sequences)):
        return ""
    counts = [f"{name} ({sequences[name].nunique():,} values)" for name in names]
    return (
        f"Several documents have the same {' and the same '.join(counts)}. Where those resemble each other, intervals "
        f"over documents are too narrow: pass cluster={names[0]!r} to statistics to have its values vary independently."
    )
