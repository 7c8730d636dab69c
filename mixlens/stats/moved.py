"""Experts that gained or lost tokens between two runs on the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Difference, Quantity, Share
from mixlens.stats.agreement import same_shape, side_by_side
from mixlens.stats.clusters import By
from mixlens.stats.counts import Block, count
from mixlens.stats.inputs import clustered, require
from mixlens.stats.summaries import described, summarise

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


def moved(
    a: Trace, b: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compare each expert between runs a and b of the same tokens, such as base and Instruct, or two checkpoints.

    share_change
        (N_e(b) - N_e(a)) / (k N), the change of the expert's share.
    kept
        N_e(a and b) / N_e(a), the share of its tokens that still choose it; NaN if none did. k/E for independent
        uniform routing.

    Tokens are paired, and each document counts with both of its routings.

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
        ``estimate`` (fraction), ci_low, ci_high, and p, q, survives against no change and chance ``[*by, layer,
        expert, measure]``; n (tokens) ``[*by]``.

    Raises
    ------
    BadInput
        If layers, experts or tokens differ (the message names the first difference), or `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.moved(trace, trace)["estimate"].dims
    ('layer', 'expert', 'measure')
    """
    a = clustered(a, cluster)
    require(a, "moved", "expert_id", bootstrap=bootstrap)
    require(b, "moved", "expert_id")
    same_shape(a, b)
    shape = (a.n_layers, a.n_experts)

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        experts = np.arange(a.n_experts)
        for layer in range(a.n_layers):
            before = (block["expert_id"][:, layer, :, None] == experts).any(1).T
            after = (block["other expert_id"][:, layer, :, None] == experts).any(1).T
            for name, chosen in (("before", before), ("after", after), ("both", before & after)):
                totals[name][block.clusters, layer] += block.sums(chosen)

    def measures(sums: dict[str, np.ndarray]) -> dict[str, Quantity]:
        return {
            "share_change": Difference(sums["after"] - sums["before"], a.top_k * sums["n"]),
            "kept": Share(sums["both"], sums["before"]),
        }

    shapes = {"before": shape, "after": shape, "both": shape}
    counts = count(a, by, shapes, side_by_side(a, b, ("expert_id",)), add)
    uniform = [0.0, a.top_k / a.n_experts]
    data = summarise(counts, measures, {"expert": range(a.n_experts)}, bootstrap, null=np.array(uniform))
    return described(
        data, a, bootstrap,
        statistic="moved", unit="fraction", uniform=uniform,
        formula="(N_e(b) - N_e(a)) / (k N); N_e(a and b) / N_e(a)", source="mixlens",
    )  # fmt: skip
