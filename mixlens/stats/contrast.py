"""Contrasts of a statistic between two conditions, tested by permutation and adjusted for multiple cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.errors import BadInput
from mixlens.stats.inputs import clustered, require
from mixlens.stats.multiplicity import with_survivors
from mixlens.stats.permutation import PERMUTATIONS, permutations, share_as_far, variances, without_each
from mixlens.stats.summaries import Summed, described, summed_by

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

Statistic = Callable[..., xr.Dataset]


def contrast(
    trace: Trace,
    other: Trace | Statistic,
    statistic: Statistic | None = None,
    *,
    by: str | pd.Series | None = None,
    a: Any = None,
    b: Any = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> xr.Dataset:
    """Compare a statistic between two groups of documents, or between two traces.

    The difference is group a minus group b. Its interval adds the jackknife variances of both groups, with t for the
    smaller one. p is the largest of three values, because documents of one group may be fewer, shorter or more
    variable: the share of permutations of documents between the groups whose difference is at least as many standard
    errors (Janssen 1997); the same share if no group counts as less variable than documents of such lengths usually
    are; and p of Welch's t test. If both groups have the same documents, they are paired, and a permutation swaps the
    two halves of documents. q adjusts p for the number of cells, separately for each measure (Benjamini and Hochberg
    1995). `survives` is true if q is at most one minus the level, which bounds the expected share of false findings.

    Parameters
    ----------
    trace : Trace
        Recording, or the first of two.
    other : Trace or Callable
        The second recording; or the statistic, if one recording holds both groups.
    statistic : Callable, optional
        Function of `ml.stats` that takes a trace, such as ``ml.stats.expert_share``.
    by : str or pandas.Series, optional
        Column of the sequences that defines the groups; or one boolean per sequence.
    a : Any, optional
        Value of the column in the first group. None for the true values.
    b : Any, optional
        Value in the second group; None for all others.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Level of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (difference), ci_low, ci_high, p, q, survives ``[layer, ...]``; attrs n_a, n_b (documents), paired.

    Raises
    ------
    BadInput
        If a group has no documents, the column is unknown, or the statistic is not a function of sums over documents.

    Examples
    --------
    >>> found = ml.stats.contrast(trace, ml.stats.expert_share, by="domain", a="github")
    >>> found["survives"].dims
    ('layer', 'expert')
    """
    trace = clustered(trace, cluster)
    require(trace, "contrast", bootstrap=bootstrap)
    if statistic is not None:
        other = clustered(other, cluster)  # type: ignore[arg-type]
        require(other, "contrast")
    chosen = other if statistic is None else statistic
    if not callable(chosen):
        raise BadInput(
            f"Cannot contrast a {type(chosen).__name__}: expected a statistic. Pass one such as ml.stats.expert_share.",
            argument="statistic",
            value=type(chosen).__name__,
        )
    if statistic is None:
        first, second, names = *_groups(trace, by, a, b), _names(by, a, b)
        statistic = chosen
    else:
        first, second, names = trace, other, ("a", "b")
    one, two = summed_by(statistic, first), summed_by(statistic, second)  # type: ignore[arg-type]
    for name, side in zip(names, (one, two), strict=True):
        if side.n < 2:
            raise BadInput(
                f"Cannot contrast {names[0]} with {names[1]}: {name} has {side.n} documents, and a test needs two or "
                "more on each side. Record more documents.",
                argument="by",
                value=name,
            )
    paired = _same_documents(first, second) and one.n == two.n  # type: ignore[arg-type]
    weights_a, weights_b = permutations(one.n, two.n, paired)
    pooled = one.with_all_of(two)
    chunks = [
        _of_layers(pooled, layers, weights_a, weights_b, (one.n, two.n, paired), bootstrap)
        for layers in pooled.chunks()
    ]
    estimate, low, high, p = (np.concatenate([chunk[i] for chunk in chunks]) for i in range(4))
    dims = tuple(one.labels)
    values = {"estimate": estimate, "ci_low": low, "ci_high": high}
    data = xr.Dataset({name: (dims, array) for name, array in values.items()}, coords=one.labels)
    data["n"] = one.n + two.n
    data = with_survivors(data, xr.DataArray(p, one.labels, dims), bootstrap.level)
    return described(
        data, trace, bootstrap,
        statistic="contrast", of=getattr(statistic, "__name__", str(statistic)), a=str(names[0]), b=str(names[1]),
        n_a=one.n, n_b=two.n, paired=int(paired), permutations=PERMUTATIONS,
        formula="statistic(a) - statistic(b); p by permutation of documents; q of Benjamini and Hochberg",
        source="Benjamini and Hochberg 1995, J. R. Stat. Soc. B 57, 289", interval="jackknife of both groups with t",
    )  # fmt: skip


def _groups(trace: Trace, by: str | pd.Series | None, a: Any, b: Any) -> tuple[Trace, Trace]:
    table = trace.sequences
    if isinstance(by, str):
        if by not in table:
            raise BadInput(
                f"Cannot contrast by {by!r}: the sequences have the columns {', '.join(map(str, table.columns))}. Pass "
                "one of them, or booleans, one a sequence.",
                argument="by",
                value=by,
            )
        first = table[by] == a if a is not None else table[by].astype(bool)
        second = ~first if b is None else table[by] == b
    elif isinstance(by, pd.Series) and len(by) == len(table):
        first = pd.Series(by.to_numpy(bool), index=table.index)
        second = ~first
    else:
        raise BadInput(
            "Cannot contrast a trace with itself: there are no groups. Pass by= with a column of the "
            "sequences or booleans, one a sequence.",
            argument="by",
            value=None,
        )
    for name, chosen in zip(_names(by, a, b), (first, second), strict=True):
        if not chosen.any():
            raise BadInput(
                f"Cannot contrast {name}: the group has no sequences. Pass a value of the column.",
                argument="by",
                value=name,
            )
    return trace.select(where=first), trace.select(where=second)


def _names(by: Any, a: Any, b: Any) -> tuple[str, str]:
    if not isinstance(by, str):
        return "true", "false"
    return f"{by} {a}" if a is not None else by, f"{by} {b}" if b is not None else "all others"


def _same_documents(one: Trace, two: Trace) -> bool:
    first, second = (trace.sequences[trace.cluster].drop_duplicates().tolist() for trace in (one, two))
    return first == second


def _of_layers(
    pooled: Summed,
    layers: slice,
    weights_a: np.ndarray,
    weights_b: np.ndarray,
    groups: tuple[int, int, bool],
    bootstrap: Bootstrap,
) -> tuple[np.ndarray, ...]:
    """Return difference, lower and upper bound, and p of some layers."""
    n_a, n_b, paired = groups
    difference = pooled.values(layers, weights_a) - pooled.values(layers, weights_b)
    estimate, far = difference[..., 0], np.abs(difference)
    if paired:
        p = share_as_far(far)
    else:
        influence = _influence_of(pooled, layers)
        of_a, of_b = (variances(influence, pooled.tokens, weights) for weights in (weights_a, weights_b))
        with np.errstate(divide="ignore", invalid="ignore"):
            t = np.where(far > 1e-12, far / np.sqrt(of_a + of_b), 0)
        welch = _welch(t[0, ..., 0], of_a[0, ..., 0], of_b[0, ..., 0], n_a, n_b)
        p = np.maximum(share_as_far(t).max(0), welch)
    p = np.where(np.isfinite(estimate), p, np.nan)
    if paired:
        left_out = np.tile(1 - np.eye(n_a), 2)
        whole = pooled.values(layers, left_out * weights_a[0]) - pooled.values(layers, left_out * weights_b[0])
        variance = _jackknife_variance(whole)
    else:
        variance = _jackknife_variance(pooled.values(layers, without_each(n_a, n_a + n_b, 0)))
        variance = variance + _jackknife_variance(pooled.values(layers, without_each(n_b, n_a + n_b, n_a)))
    reach = bootstrap.reach(np.array(float(min(n_a, n_b)))) * np.sqrt(variance)
    return estimate, estimate - reach, estimate + reach, p


def _welch(t: np.ndarray, of_a: np.ndarray, of_b: np.ndarray, n_a: int, n_b: int) -> np.ndarray:
    """Return p of Welch's test from the variances of both groups."""
    from scipy.special import stdtr  # imported here: takes a quarter of a second

    spread = of_a**2 / (n_a - 1) + of_b**2 / (n_b - 1)
    freedom = np.divide((of_a + of_b) ** 2, spread, out=np.ones_like(spread), where=spread > 0)
    return 2 * stdtr(freedom, -t)


def _influence_of(pooled: Summed, layers: slice) -> np.ndarray:
    """Return the influence of each document on the statistic [layer, ..., document]."""
    n = pooled.n
    values = pooled.values(layers, np.concatenate([np.ones((1, n)), without_each(n, n, 0)]))
    return np.nan_to_num(values[..., :1] - values[..., 1:]) * (1 - pooled.tokens / pooled.tokens.sum())


def _jackknife_variance(left_out: np.ndarray) -> np.ndarray:
    n = left_out.shape[-1]
    return (n - 1) / n * ((left_out - left_out.mean(-1, keepdims=True)) ** 2).sum(-1)
