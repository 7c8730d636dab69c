"""Distances between the routing of domains."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.names import OF_STATISTICS, beside
from mixlens.errors import BadInput
from mixlens.stats.domains import choices, influence_of_choices, times_chance
from mixlens.stats.inputs import clustered, require
from mixlens.stats.multiplicity import with_survivors
from mixlens.stats.permutation import permutations, share_as_far, variances, without_each
from mixlens.stats.summaries import described

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


def domain_distance(
    trace: Trace, *, by: str = "domain", cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute the Jensen-Shannon divergence between the expert shares of each pair of domains, per layer.

    H((f + g) / 2) - (H(f) + H(g)) / 2 in bits, with f and g the expert shares in both domains: 0 for equal shares, 1
    for disjoint experts. Variation between documents biases the plain divergence upwards even for equal domains; the
    estimate subtracts this bias, by the jackknife over the documents of both.

    p is the share of permutations of documents between the two domains whose plain divergence, relative to its
    expectation from the variance within domains, is at least as large (Pauly, Brunner and Konietschke 2015, J. R. Stat.
    Soc. B 77, 461).

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot]; the column `by` of the sequences.
    by : str, optional
        Column of the sequences with at least two values.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Level of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (bits, 0 on the diagonal), plain, ci_low, ci_high, p, q (over all pairs and layers), survives
        ``[layer, by, by_other]``; n (documents) ``[by]``; no interval and no p if a domain has only one document.

    Raises
    ------
    BadInput
        If `by` names an unknown column, or one with a single value.

    Examples
    --------
    >>> ml.stats.domain_distance(trace)["estimate"].dims
    ('layer', 'domain', 'domain_other')
    """
    trace = clustered(trace, cluster)
    require(trace, "domain_distance", "expert_id", bootstrap=bootstrap)
    column = beside(by, OF_STATISTICS)
    counts = choices(trace, by)
    names, layers, seen = counts.clusters.by[column], counts.layers, counts.tokens > 0
    if len(names) < 2:
        raise BadInput(
            f"Cannot compute distances between the values of {by!r}: there are {len(names)}. Pass a column with two "
            "values or more.",
            argument="by",
            value=by,
        )
    chosen, group = counts.totals["chosen"][seen], counts.clusters.group[seen]
    numbers = np.full((5, len(layers), len(names), len(names)), np.nan)
    numbers[:2] = np.where(np.eye(len(names), dtype=bool), 0.0, np.nan)
    for i, j in combinations(range(len(names)), 2):
        numbers[:, :, i, j] = numbers[:, :, j, i] = _of_pair(chosen[group == i], chosen[group == j], bootstrap)
    coords = {"layer": layers, column: names, f"{column}_other": names}
    keys = ("estimate", "plain", "ci_low", "ci_high")
    data = xr.Dataset({key: (tuple(coords), each) for key, each in zip(keys, numbers[:4], strict=True)}, coords)
    data["n"] = column, np.bincount(group, minlength=len(names))
    # A pair counts as one cell of the family, although the table has it on both sides of the diagonal.
    once = np.where(np.triu(np.ones((len(names), len(names)), bool), 1), numbers[4], np.nan)
    data = with_survivors(data, xr.DataArray(once, coords, tuple(coords)), bootstrap.level)
    for name in ("p", "q", "survives"):
        upper = data[name].to_numpy()
        other = upper.swapaxes(1, 2)
        data[name] = tuple(coords), upper | other if upper.dtype == bool else np.fmax(upper, other)
    return described(
        data, trace, bootstrap,
        statistic="domain_distance", unit="bits", formula="H((f + g) / 2) - (H(f) + H(g)) / 2, less its jackknife bias",
        source="Lin 1991, IEEE Trans. Inf. Theory 37, 145", interval="jackknife of both domains with t",
    )  # fmt: skip


def _of_pair(one: np.ndarray, two: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    """Return [estimate, plain, ci_low, ci_high, p] [layer] from two domains' choices [document, layer, expert]."""
    n_a, n_b = len(one), len(two)
    pooled = np.concatenate([one, two]).astype(float)

    def divergence(weights_a: np.ndarray, weights_b: np.ndarray) -> np.ndarray:
        """Return the divergence [layer, resample] for weights [resample, document] of both sides."""
        f, g = (np.tensordot(weights, pooled, 1) for weights in (weights_a, weights_b))
        f, g = f / f.sum(-1, keepdims=True), g / g.sum(-1, keepdims=True)
        return (_entropy((f + g) / 2) - (_entropy(f) + _entropy(g)) / 2).T

    in_a, in_b = permutations(n_a, n_b, paired=False)
    every = divergence(in_a, in_b)
    plain = np.maximum(every[:, 0], 0)
    if min(n_a, n_b) < 2:
        return np.stack([plain, plain, *np.full((3, len(plain)), np.nan)])
    left_out = (
        divergence(without_each(n_a, n_a + n_b, 0), in_b[:1]),
        divergence(in_a[:1], without_each(n_b, n_a + n_b, n_a)),
    )
    bias, variance = np.zeros((2, len(plain)))
    for left, n in zip(left_out, (n_a, n_b), strict=True):
        bias += (n - 1) * (left.mean(-1) - plain)
        variance += (n - 1) * left.var(-1)
    reach = bootstrap.reach(np.array(float(min(n_a, n_b)))) * np.sqrt(variance)
    estimate, low, high = (np.clip(plain - bias + side * reach, 0, 1) for side in (0, -1, 1))
    influence, sizes = influence_of_choices(pooled)
    of_a, of_b = (variances(influence, sizes, weights) for weights in (in_a, in_b))
    p = share_as_far(times_chance(every, of_a + of_b, pooled)).max(0)
    return np.stack([estimate, plain, low, high, p])


def _entropy(share: np.ndarray) -> np.ndarray:
    """Entropy in bits over the last axis."""
    return -(share * np.log2(np.where(share > 0, share, 1))).sum(-1)
