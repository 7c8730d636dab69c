"""Next-token predictions of two runs on the same tokens: losses and divergence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Difference, Mean, Quantity, Share
from mixlens.stats.agreement import side_by_side
from mixlens.stats.clusters import By
from mixlens.stats.counts import Block, count
from mixlens.stats.inputs import clustered, require
from mixlens.stats.summaries import described, summarise

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

_TOP = ("top_id", "top_logprob", "tail_logprob")
_ROWS = 1024  # tokens at a time: 4 MB of pairs of stored tokens


def next_tokens(
    a: Trace, b: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compare the predictions of two runs on the same tokens: means over predicted tokens with paired intervals.

    loss_a, loss_b
        -mean log p(token | earlier ones), nats.
    loss_difference
        loss_b - loss_a on the same tokens, nats.
    perplexity_a, _b
        exp of the losses.
    perplexity_ratio
        exp(loss_difference).
    same_top
        share of tokens for which both runs have the same most probable next token.
    kl_at_least
        lower bound of the mean ``KL(p_a || p_b)``, nats: computed from the tokens that both runs store among their top
        ones, with all others merged into one outcome. Merging never increases the divergence (data-processing
        inequality); measure_impact gives the exact value.

    A document counts with the values of both runs, whose layers and experts may differ. All measures use the same
    tokens: those with a predecessor in their sequence.

    Parameters
    ----------
    a : Trace
        The first trace. Needs ``logprob``, float32 [token] in both; top_id, top_logprob [token, 64] and tail_logprob
        [token] in both for same_top and kl_at_least, which are otherwise NaN, with a note in attrs["missing"].
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
        ``estimate``, ci_low, ci_high ``[*by, measure]``; n (predicted tokens) ``[*by]``.

    Raises
    ------
    BadInput
        If tokens differ (the message names the first difference), or `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.next_tokens(trace, trace)["measure"].values.tolist()[:2]
    ['loss_a', 'loss_b']
    """
    a = clustered(a, cluster)
    require(a, "next_tokens", "logprob", "position", bootstrap=bootstrap)
    require(b, "next_tokens", "logprob", "position")
    has_top = all(name in trace.signals for trace in (a, b) for name in _TOP)

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        known = block.follows() & np.isfinite(block["logprob"]) & np.isfinite(block["other logprob"])
        losses = np.stack([-block["logprob"], -block["other logprob"]]).astype(np.float64)
        totals["losses"][block.clusters, 0] += block.sums(np.where(known, losses, 0))
        totals["predicted"][block.clusters] += block.sums(known)
        if has_top:
            predicts = np.flatnonzero(known) - 1
            apart = np.zeros((2, block.n_tokens))
            apart[:, predicts] = _apart(block, predicts)
            totals["apart"][block.clusters, 0] += block.sums(apart)

    names = ("position", "logprob", *(_TOP if has_top else ()))
    shapes = {"losses": (1, 2), "apart": (1, 2), "predicted": ()}
    counts = count(a, by, shapes, side_by_side(a, b, names), add)
    predicted = counts.totals.pop("predicted")
    counts = replace(counts, layers=counts.layers[:1])
    missing = {} if has_top else {"missing": "same_top and kl_at_least need top_logprobs in both traces"}

    def measures(sums: dict[str, np.ndarray]) -> dict[str, Quantity]:
        same, divergence = np.moveaxis(sums["apart"] if has_top else np.nan * sums["apart"], 1, 0)
        a, b = np.moveaxis(sums["losses"], 1, 0)
        return {
            **losses_of(a, b, sums["n"]),
            "same_top": Share(same, sums["n"]),
            "kl_at_least": Mean(divergence, sums["n"]),
        }

    data = summarise(counts, measures, {}, bootstrap, size=(predicted, ()))
    return described(
        data.isel(layer=0, drop=True), a, bootstrap,
        statistic="next_tokens", unit="nats", source="mixlens; Cover and Thomas 2006, section 2.8 (data processing)",
        formula="-mean log p(t); exp of it; 1[argmax p_a = argmax p_b]; KL over {shared top tokens, all others}",
        **missing,
    )  # fmt: skip


def losses_of(a: np.ndarray, b: np.ndarray, n: np.ndarray) -> dict[str, Quantity]:
    """Return losses and perplexities of two runs from sums of their losses over n tokens."""
    return {
        "loss_a": Mean(a, n),
        "loss_b": Mean(b, n),
        "loss_difference": Difference(b - a, n),
        "perplexity_a": Mean(a, n, through=np.exp),
        "perplexity_b": Mean(b, n, through=np.exp),
        "perplexity_ratio": Difference(b - a, n, through=np.exp),
    }


def _apart(block: Block, rows: np.ndarray) -> np.ndarray:
    """Return [2, row]: whether the most probable next tokens agree, and the lower bound of the divergence."""
    columns = {name: block[name][rows] for name in (*_TOP, *(f"other {name}" for name in _TOP))}
    found = np.zeros((2, len(rows)))
    found[0] = columns["top_id"][:, 0] == columns["other top_id"][:, 0]
    found[1] = coarse_divergence([columns[name] for name in _TOP], [columns[f"other {name}"] for name in _TOP])
    return found


def coarse_divergence(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
    """Return KL(p_a || p_b) [row] in nats over {tokens known to both, all others}.

    a and b are (ids, log p [row, n], log tail). The unshared tokens of a run are added to its tail, so that the tail
    remains a sum of positive numbers.
    """
    out = np.empty(len(a[0]))
    for start in range(0, len(out), _ROWS):
        rows = slice(start, start + _ROWS)
        (ids, p, tail), (other_ids, q, other_tail) = ([values[rows] for values in side] for side in (a, b))
        p, q = p.astype(np.float64), q.astype(np.float64)
        match = ids[:, :, None] == other_ids[:, None, :]
        shared, theirs = match.any(2), np.take_along_axis(q, match.argmax(2), 1)
        rest, other_rest = _joined(p, shared, tail), _joined(q, match.any(1), other_tail)
        of_shared = np.where(shared, np.exp(p) * (p - theirs), 0).sum(1)
        has_rest = np.isfinite(rest)
        of_rest = np.exp(rest) * (np.where(has_rest, rest, 0) - np.where(has_rest, other_rest, 0))
        out[rows] = of_shared + of_rest
    return np.maximum(out, 0)


def _joined(logp: np.ndarray, shared: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Return the log probability [row] of everything that is not shared."""
    others = np.where(shared, -np.inf, logp)
    return np.logaddexp.reduce(np.concatenate([others, tail[:, None].astype(np.float64)], axis=1), axis=1)
