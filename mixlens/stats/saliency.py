"""Saliency: which experts matter, by what one recording tells of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Mean, Quantity, Share
from mixlens.errors import BadInput, MissingSignal
from mixlens.stats.counts import Block, count
from mixlens.stats.importance import expert_importance
from mixlens.stats.inputs import clustered, require
from mixlens.stats.summaries import described, summarise

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

REAP = "Lasby et al. 2025, REAP the Experts, arXiv 2510.13999"


def saliency(
    trace: Trace,
    *,
    importance: xr.Dataset | None = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> xr.Dataset:
    """Compute how much each expert matters, by four measures that pruning goes by.

    frequency
        share of choices, sum_t 1[e in S_t] / (k N).
    norm
        mean Euclidean norm of what the expert puts out, over the tokens that choose it.
    reap
        mean norm after its weight, sum_t w_te ||f_e(x_t)|| / sum_t 1[e in S_t] (Lasby et al. 2025, eq. 9).
    loss
        rise of the loss without the expert, nats per token, where `importance` has measured it; else NaN.

    Weights are recorded in half precision; norms too, unless the Site says float32. `experiments.expert_outputs` has
    norm and reap (weighted_norm) without rounding, and without intervals.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id`` and weight [token, layer, slot], and the site expert_norm, recorded with
        ``signals=["expert_norm"]``.
    importance : xarray.Dataset, optional
        What experiments.measure_importance gives.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate``, ci_low, ci_high ``[layer, expert, measure]``; n (tokens that chose it) ``[layer, expert]``; NaN
        where no token chose an expert.

    Raises
    ------
    MissingSignal
        If the trace has no norms.
    BadInput
        For an importance of other layers or experts.

    Examples
    --------
    >>> normed = ml.record(model, documents, signals=["expert_norm"], settings=quiet)
    >>> ml.stats.saliency(normed)["measure"].values.tolist()
    ['frequency', 'norm', 'reap', 'loss']
    """
    trace = clustered(trace, cluster)
    require(trace, "saliency", "expert_id", "weight", bootstrap=bootstrap)
    norms = trace.activations("expert_norm")
    if norms.sizes["token"] != trace.n_tokens or norms.layer.values.tolist() != trace.layers.tolist():
        raise MissingSignal(
            "Cannot compute saliency: the norms were recorded for some of the tokens or layers alone. Record with "
            'signals=["expert_norm"], or select the layers that have it.',
            argument="expert_norm",
            value=(norms.sizes["token"], norms.layer.values.tolist()),
        )

    def blocks() -> Iterator[dict[str, np.ndarray]]:
        start = 0
        for block in trace.blocks("sequence", "expert_id", "weight"):
            stop = start + len(block["sequence"])
            yield {**block, "norm": norms.values[start:stop].astype(np.float64)}
            start = stop

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        size = (len(block.clusters), trace.n_experts)
        weighted = block["weight"] * block["norm"]
        for layer, ids in enumerate(block.by_layer("expert_id")):
            code = (block.local * trace.n_experts + ids).ravel()
            for name, values in (("chosen", None), ("norm", block["norm"]), ("weighted", weighted)):
                own = None if values is None else values[:, layer].T.ravel()
                found = np.bincount(code, own, minlength=size[0] * size[1])
                totals[name][block.clusters, layer] += found.reshape(size)

    def measures(sums: dict[str, np.ndarray]) -> dict[str, Quantity]:
        chosen = sums["chosen"]
        frequency = Share(chosen, np.broadcast_to(chosen.sum(-2, keepdims=True), chosen.shape))
        return {"frequency": frequency, "norm": Mean(sums["norm"], chosen), "reap": Mean(sums["weighted"], chosen)}

    experts = (trace.n_layers, trace.n_experts)
    shapes: dict[str, tuple[int, ...]] = {"chosen": experts, "norm": experts, "weighted": experts}
    counts = count(trace, None, shapes, blocks(), add)
    size = (counts.totals["chosen"], ("layer", "expert"))
    data = summarise(counts, measures, {"expert": np.arange(trace.n_experts)}, bootstrap, size=size)
    loss = _losses(importance, data, bootstrap)
    data = xr.merge(
        [
            xr.concat([data[list(loss)], loss.expand_dims(measure=["loss"])], "measure").transpose(*data.estimate.dims),
            data.drop_vars(["measure", *loss]),
        ],
        combine_attrs="override",
    )
    return described(
        data, trace, bootstrap, statistic="saliency", unit="fraction; norm; norm; nats per token", source=REAP,
        formula="sum 1[e in S_t] / (k N); mean ||f_e||; mean w_te ||f_e||, over tokens that choose e; loss without e",
    )  # fmt: skip


def _losses(importance: xr.Dataset | None, like: xr.Dataset, bootstrap: Bootstrap) -> xr.Dataset:
    """estimate, ci_low, ci_high [layer, expert] of what was measured; NaN where nothing was."""
    names = ["estimate", "ci_low", "ci_high"]
    if importance is None:
        nothing = like["estimate"].isel(measure=0, drop=True) * np.nan
        return xr.Dataset(dict.fromkeys(names, nothing))
    found = expert_importance(importance, bootstrap=bootstrap)[names]
    if not all(np.array_equal(found[name].values, like[name].values) for name in ("layer", "expert")):
        raise BadInput(
            f"Cannot compute saliency: the importance is of layers {found.layer.values.tolist()} with "
            f"{found.sizes['expert']} experts, the recording of layers {like.layer.values.tolist()} with "
            f"{like.sizes['expert']}. Measure the importance of this model, or select the layers that it has.",
            argument="importance",
            value=(found.layer.values.tolist(), found.sizes["expert"]),
        )
    return found


def strongest(scores: xr.DataArray, keep: int) -> xr.DataArray:
    """Tell the experts of each layer with the highest scores, for prune.

    Parameters
    ----------
    scores : xarray.DataArray
        [layer, expert], such as ``saliency(trace)["estimate"].sel(measure="reap")``. NaN is the lowest; of equal scores
        that of the smaller number counts.
    keep : int
        Experts that stay in each layer.

    Returns
    -------
    xarray.DataArray
        Booleans [layer, expert].

    Raises
    ------
    BadInput
        For other dimensions, and a number that the layers do not have.

    Examples
    --------
    >>> share = ml.stats.expert_share(trace)["estimate"]
    >>> ml.decisions.strongest(share, 6).sum("expert").values.tolist()
    [6, 6, 6, 6, 6, 6, 6, 6]
    """
    if not isinstance(scores, xr.DataArray) or set(scores.dims) != {"layer", "expert"}:
        found = scores.dims if isinstance(scores, xr.DataArray) else type(scores).__name__
        raise BadInput(
            f"Cannot choose experts by scores of {found}: expected [layer, expert]. Select one measure, and one group.",
            argument="scores",
            value=found,
        )
    if not isinstance(keep, int | np.integer) or not 1 <= keep <= scores.sizes["expert"]:
        raise BadInput(
            f"Cannot keep {keep} of {scores.sizes['expert']} experts a layer. Pass a number from 1 to that.",
            argument="keep",
            value=keep,
        )
    ordered = scores.transpose("layer", "expert")
    best = np.argsort(-np.nan_to_num(ordered.values, nan=-np.inf), axis=1, kind="stable")[:, :keep]
    chosen = np.zeros(ordered.shape, bool)
    np.put_along_axis(chosen, best, True, axis=1)
    return ordered.copy(data=chosen)
