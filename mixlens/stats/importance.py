"""Importance of experts: the change in loss without each one, computed from sums per document."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Difference, Share
from mixlens.stats.measured import Measured, check_kind, predicted_alone, read_measured, summarised

KIND = "importance"


def expert_importance(
    measured: xr.Dataset,
    *,
    by: str | Sequence[str] | None = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> xr.Dataset:
    """Compute the change in loss when an expert is removed from a layer.

    sum_d (v_d without the expert - v_d) / sum_d n_d, v_d the loss (or metric) of document d summed over its n_d
    predicted tokens. Both runs read the same tokens, so the interval is that of the paired difference.

    Parameters
    ----------
    measured : xarray.Dataset
        Result of measure_importance, or of open for its run.
    by : str or Sequence[str], optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (nats per token, or the unit of the metric), ci_low, ci_high, p, q, survives ``[*by, layer,
        expert]``, tested against no change and adjusted for all cells; share ``[*by, layer, expert]``, the expert share
        on the same tokens; value ``[*by]`` of the whole model; n (predicted tokens), n_documents, n_effective
        ``[*by]``.

    Raises
    ------
    BadInput
        If `by` or `cluster` names an unknown column, or `measured` is not the result of measure_importance.

    Examples
    --------
    >>> ablation = ml.experiments.Ablation(layers=[0])
    >>> measured = ml.experiments.measure_importance(model, documents[:2], ablation=ablation, settings=quiet)
    >>> ml.stats.expert_importance(measured)["estimate"].dims
    ('layer', 'expert')
    """
    check_kind(measured, KIND, "measure_importance")
    measured = predicted_alone(measured)
    data = summarised(
        measured,
        ("change",),
        lambda sums: Difference(sums["change"], sums["n"]),
        {"expert": measured.expert.values},
        by,
        bootstrap,
        null=0.0,
        cluster=cluster,
    )
    share = summarised(
        measured,
        ("chosen",),
        lambda sums: Share(sums["chosen"], measured.attrs["top_k"] * sums["n"]),
        {"expert": measured.expert.values},
        by,
        bootstrap,
        tokens="length",
    )
    value = summarised(measured, ("value",), lambda sums: Difference(sums["value"], sums["n"]), {}, by, bootstrap)
    return data.assign(share=share["estimate"], value=value["estimate"]).assign_attrs(
        {name: measured.attrs[name] for name in ("model", "metric", "unit", "how")},
        statistic="expert_importance",
        formula="sum_d (v_d without the expert - v_d) / sum_d n_d",
        source="paired ablation, measured by mixlens",
        level=bootstrap.level,
    )


def open_importance(path: str | os.PathLike[str], *, check: bool = True) -> xr.Dataset:
    """Return the sums per document of an importance run; `expert_importance` turns them into a map.

    Raises RunError if the run is missing, unfinished, altered, or of another kind.
    """
    return importance_dataset(read_measured(path, KIND, check=check))


def importance_dataset(measured: Measured) -> xr.Dataset:
    """Return sums per document: change, chosen [document, layer, expert]; value, tokens, length [document]."""
    meta, inner = measured.meta, ("document", "layer", "expert")
    data = {name: (inner[: array.ndim], array) for name, array in measured.arrays.items()}
    coords = {"layer": meta["layers"], "expert": np.arange(meta["n_experts"])}
    attrs = {"kind": KIND, "model": meta["model"]["name"], "top_k": meta["top_k"], **meta["ablation"]}
    return measured.along_documents(data, coords, attrs)
