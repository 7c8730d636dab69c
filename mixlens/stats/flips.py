"""Flips: tokens for which two runs choose different experts, by layer and by margin."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Quantity, Share, Smooth
from mixlens.errors import BadInput
from mixlens.stats.agreement import same_shape, side_by_side
from mixlens.stats.clusters import By
from mixlens.stats.counts import Block, count
from mixlens.stats.inputs import clustered, require
from mixlens.stats.summaries import described, summarise

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

# Upper edges of the margin bins, in logits. Fixed, so that figures of different models are comparable.
MARGINS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, np.inf)


def flips(
    a: Trace, b: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute the share of tokens whose set of experts differs between two traces, per layer.

    With C_l = 1 if the sets S_l and S'_l of a token differ,
    changed        P(C_l)
    first_flip     P(C_l and no C_m for m < l), where the first flip happens; sums to 1 - P(never)
    so_far         P(C_m for some m <= l), how flips build up with depth
    after_flip     P(C_l | some C_m, m < l), among tokens that have flipped before
    without_flip   P(C_l | no C_m, m < l), among tokens that have not
    more_after     after_flip minus without_flip, tested against 0

    "Before" refers to the layers of the traces.

    Parameters
    ----------
    a : Trace
        The first trace. Needs ``expert_id``, uint8 or uint16 [token, layer, slot] in both.
    b : Trace
        The second trace, of the same tokens.
    by : By, optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high ``[*by, layer, measure]``; NaN if no token meets the condition; p, q,
        survives of more_after, else NaN; n (tokens) ``[*by]``.

    Raises
    ------
    BadInput
        If layers, experts or tokens differ (the message names the first difference), or `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.flips(trace, trace)["measure"].values.tolist()
    ['changed', 'first_flip', 'so_far', 'after_flip', 'without_flip', 'more_after']
    """
    a = clustered(a, cluster)
    require(a, "flips", "expert_id", bootstrap=bootstrap)
    require(b, "flips", "expert_id")
    same_shape(a, b)
    names = ("changed", "first", "so_far", "flipped_before", "changed_after")

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        changed = _differ(block)
        so_far = np.logical_or.accumulate(changed, axis=0)
        before = np.concatenate([np.zeros_like(so_far[:1]), so_far[:-1]])
        found = (changed, changed & ~before, so_far, before, changed & before)
        for name, values in zip(names, found, strict=True):
            totals[name][block.clusters] += block.sums(values)

    def measures(sums: dict[str, np.ndarray]) -> dict[str, Quantity]:
        n, before = sums["n"], sums["flipped_before"]
        after, without = Share(sums["changed_after"], before), Share(sums["first"], n - before)
        return {
            "changed": Share(sums["changed"], n),
            "first_flip": Share(sums["first"], n),
            "so_far": Share(sums["so_far"], n),
            "after_flip": after,
            "without_flip": without,
            "more_after": Smooth(after.values - without.values),
        }

    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (a.n_layers,))
    counts = count(a, by, shapes, side_by_side(a, b, ("expert_id",)), add)
    data = summarise(counts, measures, {}, bootstrap, null=np.array([np.nan] * 5 + [0.0]))
    return described(
        data, a, bootstrap,
        statistic="flips", unit="fraction", source="mixlens",
        formula="C_l = 1[S_l != S'_l]; P(C_l), P(C_l and none before), P(any C_m, m <= l), P(C_l | any or none before)",
    )  # fmt: skip


def routers_changed(
    a: Trace, b: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute the share of choices, over all tokens and layers, whose set of experts differs between two traces.

    Parameters, errors and result are those of `flips`, without layer and measure.
    """
    a = clustered(a, cluster)
    require(a, "routers_changed", "expert_id", bootstrap=bootstrap)
    require(b, "routers_changed", "expert_id")
    same_shape(a, b)

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        totals["changed"][block.clusters, 0] += block.sums(_differ(block).sum(0))

    counts = count(a, by, {"changed": (1,)}, side_by_side(a, b, ("expert_id",)), add)
    counts = replace(counts, layers=counts.layers[:1])
    data = summarise(counts, lambda sums: Share(sums["changed"], a.n_layers * sums["n"]), {}, bootstrap)
    return described(
        data.isel(layer=0, drop=True), a, bootstrap,
        statistic="routers_changed", unit="fraction", source="mixlens", formula="mean over layers of P(S_l != S'_l)",
    )  # fmt: skip


def flips_by_margin(
    a: Trace,
    b: Trace,
    *,
    by: By = None,
    pooled: bool = True,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> xr.Dataset:
    """Compute the share of tokens whose experts differ, by the margin of the router in the first run.

    The margin is the router logit of the weakest of the k strongest experts minus that of the best excluded expert. A
    flip at a small margin is a tie broken by rounding; one at a large margin means that the router's input differs.

    Parameters
    ----------
    a : Trace
        The first trace. Needs ``expert_id``, uint8 or uint16 [token, layer, slot] in both, router_logits [token, layer,
        expert] in the first.
    b : Trace
        The second trace, of the same tokens.
    by : By, optional
        Column or columns of the sequences to group by.
    pooled : bool, optional
        Pool all layers; otherwise per layer.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high ``[*by, (layer,) margin]``; the coordinates margin and margin_from are
        the upper and lower bin edges in logits; n (choices in the bin) of the same shape.

    Raises
    ------
    BadInput
        As flips; or if every expert is chosen, so that there is no margin.

    Examples
    --------
    >>> ml.stats.flips_by_margin(trace, trace)["estimate"].dims
    ('margin',)
    """
    a = clustered(a, cluster)
    require(a, "flips_by_margin", "expert_id", "router_logits", bootstrap=bootstrap)
    require(b, "flips_by_margin", "expert_id")
    same_shape(a, b)
    if a.top_k == a.n_experts:
        raise BadInput(
            f"Cannot compute flips_by_margin: every token chooses all {a.n_experts} experts, so none is left out. "
            "Compare traces whose tokens choose some of the experts.",
            argument="top_k",
            value=a.top_k,
        )
    n_layers, n_bins = 1 if pooled else a.n_layers, len(MARGINS)

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        changed = _differ(block)
        logits = np.sort(block["router_logits"], axis=-1)
        margin = (logits[..., -a.top_k] - logits[..., -a.top_k - 1]).T
        codes = np.minimum(np.searchsorted(MARGINS, margin, side="right"), n_bins - 1)
        for layer in range(a.n_layers):
            for one in range(n_bins):
                here = codes[layer] == one
                into = 0 if pooled else layer
                totals["choices"][block.clusters, into, one] += block.sums(here)
                totals["flipped"][block.clusters, into, one] += block.sums(here & changed[layer])

    shapes = {"flipped": (n_layers, n_bins), "choices": (n_layers, n_bins)}
    columns = side_by_side(a, b, ("expert_id",), ("router_logits",))
    counts = count(a, by, shapes, columns, add)
    counts = replace(counts, layers=counts.layers[:n_layers])
    data = summarise(
        counts,
        lambda sums: Share(sums["flipped"], sums["choices"]),
        {"margin": MARGINS},
        bootstrap,
        size=(counts.totals["choices"], ("layer", "margin")),
    )
    data = (data.isel(layer=0, drop=True) if pooled else data).assign_coords(
        margin_from=("margin", np.array([0.0, *MARGINS[:-1]]))
    )
    return described(
        data, a, bootstrap,
        statistic="flips_by_margin", unit="fraction", source="mixlens",
        formula="P(S != S' | margin), margin = z_(k) - z_(k+1) of the first run's router logits",
    )  # fmt: skip


def _differ(block: Block) -> np.ndarray:
    """Mask [layer, token] of tokens whose sets of experts differ."""
    ids, others = np.sort(block.by_layer("expert_id"), axis=1), np.sort(block.by_layer("other expert_id"), axis=1)
    return (ids != others).any(axis=1)
