"""Differences between two engines in the probability of the same tokens, and the part due to routing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Difference, Mean, Quantity, Share
from mixlens.errors import BadInput
from mixlens.stats.agreement import same_shape, side_by_side
from mixlens.stats.clusters import By
from mixlens.stats.counts import Block, Counts, count
from mixlens.stats.inputs import clustered, require
from mixlens.stats.summaries import described, summarise

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

EXTREME = 2.0  # ratio of probabilities above which a token is extreme
_K3 = "Schulman 2020, Approximating KL Divergence"
_PARTS = ("ids", "weights", "rest", "total")


def likelihood_gap(
    a: Trace, b: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Measure the difference between two runs in the probability of the same tokens.

    With p and q the probabilities of a token in the first and the second run,

    log_ratio
        mean of log p - log q, nats.
    k3
        mean of q / p - 1 - log(q / p), nats: nonnegative, and an unbiased estimate of KL(p || q) if the first run
        sampled the tokens.
    extreme
        share of tokens with p / q or q / p above 2.

    Parameters
    ----------
    a : Trace
        The first trace. Needs ``logprob``, float32 [token] in both.
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
        ``estimate``, ci_low, ci_high ``[*by, measure]``; n (tokens with a probability in both) ``[*by]``.

    Raises
    ------
    BadInput
        If layers, experts or tokens differ; the message names the first difference.

    Examples
    --------
    >>> gap = ml.stats.likelihood_gap(trace, trace)
    >>> float(gap["estimate"].sel(measure="k3"))
    0.0
    """
    a = clustered(a, cluster)
    require(a, "likelihood_gap", "logprob", "position", bootstrap=bootstrap)
    require(b, "likelihood_gap", "logprob", "position")
    same_shape(a, b)

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        known, ratio = _known(block["logprob"], block["other logprob"])
        values = np.stack([ratio, k3(ratio), np.abs(ratio) > np.log(EXTREME)])
        totals["values"][block.clusters, 0] += block.sums(np.where(known, values, 0))
        totals["predicted"][block.clusters] += block.sums(known)

    shapes = {"values": (1, 3), "predicted": ()}
    counts = count(a, by, shapes, side_by_side(a, b, ("position", "logprob")), add)
    predicted = counts.totals.pop("predicted")

    def measures(sums: dict[str, np.ndarray]) -> dict[str, Quantity]:
        ratio, divergence, extreme = np.moveaxis(sums["values"], 1, 0)
        n = sums["n"]
        return {"log_ratio": Difference(ratio, n), "k3": Mean(divergence, n), "extreme": Share(extreme, n)}

    data = summarise(_of_one_layer(counts), measures, {}, bootstrap, size=(predicted, ()))
    return described(
        data.isel(layer=0, drop=True), a, bootstrap,
        statistic="likelihood_gap", unit="nats", source=_K3,
        formula="mean(log p - log q); mean(r - 1 - log r), r = q / p; P(max(r, 1 / r) > 2)",
    )  # fmt: skip


def routing_split(
    a: Trace,
    b: Trace,
    b_with_ids: Trace,
    b_with_weights: Trace,
    *,
    by: By = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> xr.Dataset:
    """Split the gap between two runs into the part caused by routing and the rest.

    With v(r) measured on the second run under routing r,

    ids
        the gain from giving it the experts of the first run: v(own) - v(ids).
    weights
        the further gain from also giving it the weights: v(ids) - v(ids and weights).
    rest
        the remainder: v(ids and weights).
    total
        the gap v(own), which is the sum of the three.

    Here v is the loss of the second run minus that of the first, or the K3 estimate of the divergence between them
    (`likelihood_gap`). A part is negative if the experts of the first run move the second further away.

    Parameters
    ----------
    a, b : Trace
        The two runs. Need ``logprob``, float32 [token], as the others do.
    b_with_ids, b_with_weights : Trace
        The second run repeated with the experts of the first, and with their weights as well.
    by : By, optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate``, ci_low, ci_high ``[*by, quantity (loss, k3), part]``, nats per token; n (tokens) ``[*by]``.

    Raises
    ------
    BadInput
        Where layers, experts or tokens differ.

    Examples
    --------
    >>> split = ml.stats.routing_split(trace, trace, trace, trace)["estimate"]
    >>> float(abs(split).max())
    0.0
    """
    a = clustered(a, cluster)
    runs = (a, b, b_with_ids, b_with_weights)
    for run in runs:
        require(run, "routing_split", "logprob", "position", "token_id", bootstrap=bootstrap)
        same_shape(a, run)
    of = [{name: run.read(name) for name in ("sequence", "position", "token_id", "logprob")} for run in runs]
    for name in ("sequence", "position", "token_id"):
        if not all(np.array_equal(of[0][name], other[name]) for other in of[1:]):
            raise BadInput(
                f"Cannot split the gap: the runs differ in {name}. Pass runs over the same tokens.", argument=name
            )
    logprob = np.stack([columns["logprob"] for columns in of]).astype(np.float64)

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        ratios = [logprob[0] - other for other in logprob[1:]]
        known = np.asarray(np.isfinite(logprob).all(0))
        v = np.stack([np.stack([ratio, k3(ratio)]) for ratio in ratios], axis=1)  # [quantity, run, token]
        parts = np.stack([v[:, 0] - v[:, 1], v[:, 1] - v[:, 2], v[:, 2], v[:, 0]], axis=1)
        totals["parts"][block.clusters, 0] += block.sums(np.where(known, parts, 0))
        totals["predicted"][block.clusters] += block.sums(known)

    shapes = {"parts": (1, 2, len(_PARTS)), "predicted": ()}
    counts = count(a, by, shapes, [{"sequence": of[0]["sequence"]}], add)
    predicted = counts.totals.pop("predicted")
    dims = {"quantity": ["loss", "k3"], "part": list(_PARTS)}
    data = summarise(
        _of_one_layer(counts),
        lambda sums: Difference(sums["parts"], sums["n"]),
        dims,
        bootstrap,
        size=(predicted, ()),
    )
    return described(
        data.isel(layer=0, drop=True), a, bootstrap,
        statistic="routing_split", unit="nats", source=f"mixlens; {_K3}",
        formula="v(own) - v(ids), v(ids) - v(ids, weights), v(ids, weights); v = mean(log p - log q), mean K3",
    )  # fmt: skip


def k3(log_ratio: np.ndarray) -> np.ndarray:
    """Return r - 1 - log r for r = q / p, from log p - log q."""
    return np.expm1(-log_ratio) + log_ratio


def _known(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = np.isfinite(a) & np.isfinite(b)
    return known, np.where(known, a.astype(np.float64) - b, 0)


def _of_one_layer(counts: Counts) -> Counts:
    return replace(counts, layers=counts.layers[:1])
