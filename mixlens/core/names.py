"""Names of the caller's columns, which are renamed only if they collide with one of mixlens in the same table."""

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
    """Return a name for a caller's column in a table that already has the names `own`.

    Parameters
    ----------
    column : str
        Name given by the caller.
    own : Collection[str]
        Names already in use.

    Examples
    --------
    >>> from mixlens.core.names import beside
    >>> beside("domain", {"layer"}), beside("layer", {"layer"})
    ('domain', 'document_layer')
    """
    while column in own:
        column = f"document_{column}"
    return column
