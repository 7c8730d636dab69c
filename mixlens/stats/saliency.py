"""Saliency: measures of the importance of experts from a single recording."""

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
    """Compute the importance of each expert by four measures used for pruning.

    frequency
        share of choices, sum_t 1[e in S_t] / (k N).
    norm
        mean Euclidean norm of the expert's output, over the tokens that choose it.
    reap
        mean norm after its weight, sum_t w_te ||f_e(x_t)|| / sum_t 1[e in S_t] (Lasby et al. 2025, eq. 9).
    loss
        rise of the loss without the expert, nats per token, where `importance` has measured it; else NaN.

    Weights are recorded in half precision, and so are norms unless the Site says float32. `experiments.expert_outputs`
    computes norm and reap (weighted_norm) without rounding, and without intervals.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id`` and weight [token, layer, slot], and the site expert_norm, recorded with
        ``signals=["expert_norm"]``.
    importance : xarray.Dataset, optional
        Result of experiments.measure_importance.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate``, ci_low, ci_high ``[layer, expert, measure]``; n (tokens that chose it) ``[layer, expert]``; NaN
        for experts that no token chose.

    Raises
    ------
    MissingSignal
        If the trace has no norms.
    BadInput
        If the importance covers other layers or experts.

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
            "Cannot compute saliency: the norms were recorded for only some of the tokens or layers. Record with "
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
    """Return the measured estimate, ci_low, ci_high [layer, expert]; NaN without a measurement."""
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
    """Select the experts with the highest scores in each layer, for prune.

    Parameters
    ----------
    scores : xarray.DataArray
        [layer, expert], such as ``saliency(trace)["estimate"].sel(measure="reap")``. NaN ranks lowest; ties go to the
        smaller expert number.
    keep : int
        Number of experts to keep in each layer.

    Returns
    -------
    xarray.DataArray
        Booleans [layer, expert].

    Raises
    ------
    BadInput
        If the dimensions differ, or `keep` exceeds the number of experts.

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
            f"Cannot keep {keep} of {scores.sizes['expert']} experts per layer. Pass a number within that range.",
            argument="keep",
            value=keep,
        )
    ordered = scores.transpose("layer", "expert")
    best = np.argsort(-np.nan_to_num(ordered.values, nan=-np.inf), axis=1, kind="stable")[:, :keep]
    chosen = np.zeros(ordered.shape, bool)
    np.put_along_axis(chosen, best, True, axis=1)
    return ordered.copy(data=chosen)
