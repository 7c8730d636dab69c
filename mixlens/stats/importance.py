"""What experts matter for: the change in loss without each of them, from sums over every document."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.stats.measured import Measured, check_kind, groups_of, intervals_by, ratio, read_measured

KIND = "importance"


def expert_importance(
    measured: xr.Dataset, *, by: str | Sequence[str] | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute how much worse tokens are predicted when an expert is removed from a layer.

    sum_d (v_d without the expert - v_d) / sum_d n_d, v_d the loss (or metric) of document d summed over its n_d
    predicted tokens. Both runs read the same tokens, and the bootstrap draws documents with both their values, so the
    interval is that of the paired difference.

    Parameters
    ----------
    measured : xarray.Dataset
        The result of the measurement. Needs ``measured``, as measure_importance or open gives it.
    by : str or Sequence[str], optional
        Column, or columns, of the sequences to group by.
    bootstrap : Bootstrap, optional
        How intervals are computed.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (nats per token, or the unit of the metric), ci_low, ci_high ``[*by, layer, expert]``; share
        ``[*by, layer, expert]``, the expert share on the same tokens; value ``[*by]``, of the whole model; n
        (predicted tokens), n_documents ``[*by]``.

    Raises
    ------
    BadInput
        For an unknown column in `by`, and anything else than such sums.

    Examples
    --------
    >>> ablation = ml.experiments.Ablation(layers=[0])
    >>> measured = ml.experiments.measure_importance(model, documents[:2], ablation=ablation, settings=quiet)
    >>> ml.stats.expert_importance(measured)["estimate"].dims
    ('layer', 'expert')
    """
    check_kind(measured, KIND, "measure_importance")
    labels, group = groups_of(measured, by)
    shape = tuple(len(values) for values in labels.values())
    n_groups = int(np.prod(shape, dtype=int))
    inner = (measured.sizes["layer"], measured.sizes["expert"])
    estimate, low, high, share = np.full((4, n_groups, *inner), np.nan)
    value = np.full(n_groups, np.nan)
    n, n_documents = np.zeros((2, n_groups), np.int64)
    for one in range(n_groups):
        members = np.flatnonzero((group == one) & (measured.tokens.values > 0))
        if not len(members):
            continue
        here = measured.isel(document=members)
        tokens = here.tokens.values.astype(float)
        estimate[one], low[one], high[one] = ratio(here.change.values, tokens, bootstrap, one)
        share[one] = here.chosen.values.sum(0) / (measured.attrs["top_k"] * here.length.values.sum())
        value[one] = here.value.values.sum() / tokens.sum()
        n[one], n_documents[one] = int(tokens.sum()), len(members)
    kept = {name: measured.attrs[name] for name in ("model", "metric", "unit", "how")}
    numbers = {"estimate": estimate, "ci_low": low, "ci_high": high, "share": share}
    single = {"value": value, "n": n, "n_documents": n_documents}
    return xr.Dataset(
        {name: ((*labels, "layer", "expert"), array.reshape(*shape, *inner)) for name, array in numbers.items()}
        | {name: (tuple(labels), array.reshape(shape)) for name, array in single.items()},
        coords={**labels, "layer": measured.layer.values, "expert": measured.expert.values},
        attrs={
            **kept,
            "statistic": "expert_importance",
            "formula": "sum_d (v_d without the expert - v_d) / sum_d n_d",
            "source": "paired ablation, measured by mixlens",
            **intervals_by(bootstrap),
        },
    )


def open_importance(path: str | os.PathLike[str], *, check: bool = True) -> xr.Dataset:
    """The sums over documents that an importance run holds; `expert_importance` makes the map of them.

    Raises RunError when the run is not there, unfinished or altered, BadInput when it is of another kind.
    """
    return importance_dataset(read_measured(path, KIND, check=check))


def importance_dataset(measured: Measured) -> xr.Dataset:
    """Sums over documents: change, chosen [document, layer, expert]; value, tokens, length [document]."""
    meta, inner = measured.meta, ("document", "layer", "expert")
    data = {name: (inner[: array.ndim], array) for name, array in measured.arrays.items()}
    coords = {**measured.coords(), "layer": meta["layers"], "expert": np.arange(meta["n_experts"])}
    attrs = {"kind": KIND, "model": meta["model"]["name"], "top_k": meta["top_k"], **meta["ablation"]}
    return xr.Dataset(data, coords, attrs)
