"""Loss and routing by the number of experts per token, computed from sums per document."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Difference, Mean, Quantity, Share
from mixlens.stats.measured import Measured, check_kind, predicted_alone, read_measured, summarised

KIND = "topk"


def topk_sweep(
    measured: xr.Dataset,
    *,
    by: str | Sequence[str] | None = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> xr.Dataset:
    """Compute the loss with k experts per token, and its change from the model's own k.

    sum_d v_dk / sum_d n_d, with v_dk the loss of document d summed over its n_d predicted tokens; the change is that of
    v_dk - v_d,own, with the interval of the paired difference.

    Parameters
    ----------
    measured : xarray.Dataset
        Result of measure_topk, or of open for its run.
    by : str or Sequence[str], optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate``, ci_low, ci_high, loss in nats per token ``[*by, k]``; change, change_low, change_high ``[*by,
        k]``; share ``[*by, k, layer, expert]``, of assignments; first_weight ``[*by, k, layer]``, mean weight of the
        strongest expert; n (predicted tokens), n_documents ``[*by]``.

    Raises
    ------
    BadInput
        If `by` or `cluster` names an unknown column, or `measured` is not the result of measure_topk.

    Examples
    --------
    >>> measured = ml.experiments.measure_topk(model, documents[:2], ks=[1, 2], settings=quiet)
    >>> ml.stats.topk_sweep(measured)["k"].values.tolist()
    [1, 2]
    """
    check_kind(measured, KIND, "measure_topk")
    ks, own = measured.k.values, int(np.flatnonzero(measured.k.values == measured.attrs["own_k"])[0])
    of_k, of_experts = {"k": ks}, {"k": ks, "expert": measured.expert.values}
    sums = predicted_alone(measured).transpose("document", "layer", "k", "expert")

    def losses(sums: dict[str, np.ndarray]) -> dict[str, Quantity]:
        loss = sums["loss"]
        return {"loss": Mean(loss, sums["n"]), "change": Difference(loss - loss[:, [own]], sums["n"])}

    both = summarised(sums, ("loss",), losses, of_k, by, bootstrap, along="quantity", cluster=cluster)
    loss, change = (both.sel(quantity=name, drop=True) for name in ("loss", "change"))
    share = summarised(
        sums,
        ("chosen",),
        lambda sums: Share(sums["chosen"], sums["n"] * ks[:, None, None]),
        of_experts,
        by,
        bootstrap,
        tokens="length",
    )
    first = summarised(
        sums,
        ("first_weight",),
        lambda sums: Mean(sums["first_weight"], sums["n"]),
        of_k,
        by,
        bootstrap,
        tokens="length",
    )
    return loss.assign(
        change=change["estimate"],
        change_low=change["ci_low"],
        change_high=change["ci_high"],
        share=share["estimate"].transpose(..., "k", "layer", "expert"),
        first_weight=first["estimate"].transpose(..., "k", "layer"),
    ).assign_attrs(
        statistic="topk_sweep",
        unit="nats",
        own_k=measured.attrs["own_k"],
        formula="sum_d v_dk / sum_d n_d",
        source="every k on the same tokens, measured by mixlens",
        model=measured.attrs["model"],
        level=bootstrap.level,
    )


def open_topk(path: str | os.PathLike[str], *, check: bool = True) -> xr.Dataset:
    """Return the sums per document of a sweep over k; `topk_sweep` turns them into a curve.

    Raises RunError if the run is missing, unfinished or altered, BadInput if it is of another kind.
    """
    return topk_dataset(read_measured(path, KIND, check=check))


def topk_dataset(measured: Measured) -> xr.Dataset:
    """Return sums per document as a Dataset.

    loss [document, k], first_weight [document, k, layer], chosen [document, k, layer, expert]; tokens (predicted),
    length [document].
    """
    meta, inner = measured.meta, ("document", "k", "layer", "expert")
    data = {name: (inner[: array.ndim], array) for name, array in measured.arrays.items()}
    layers = meta.get("layers", range(measured.arrays["chosen"].shape[2]))
    coords = {"k": meta["ks"], "layer": layers, "expert": range(meta["n_experts"])}
    attrs = {"kind": KIND, "model": meta["model"]["name"], "own_k": meta["own_k"]}
    return measured.along_documents(data, coords, attrs)
