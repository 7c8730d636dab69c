"""Names of the caller's columns beside mixlens's own: theirs are free, and give way only where one table needs both."""

from __future__ import annotations

from collections.abc import Collection

# Dimensions and variables of statistics.
OF_STATISTICS = frozenset({
    "change", "change_high", "change_low", "choice", "ci_high", "ci_low", "estimate", "expert", "expert_j",
    "first_weight", "k", "layer", "loss", "margin", "matrix", "max_abs", "measure", "mi_bits", "mi_ci_high",
    "mi_ci_low", "n", "n_documents", "n_effective", "order", "p", "part", "position_bin", "position_start", "q",
    "quantity", "share", "survives", "token_id", "value", "weight_error",
})  # fmt: skip


def beside(column: str, own: Collection[str]) -> str:
    """Return the name of a column in a table that has `own` names.

    Parameters
    ----------
    column : str
        As the caller named it.
    own : Collection[str]
        Names that are taken.

    Examples
    --------
    >>> from mixlens.core.names import beside
    >>> beside("domain", {"layer"}), beside("layer", {"layer"})
    ('domain', 'document_layer')
    """
    while column in own:
        column = f"document_{column}"
    return column
