"""Loss and routing at every number of experts, from sums over every document."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.stats.measured import Measured, check_kind, groups_of, intervals_by, ratio, read_measured

KIND = "topk"


def topk_sweep(
    measured: xr.Dataset, *, by: str | Sequence[str] | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute the loss when every token chooses k experts, and its change against the model's own k.

    sum_d v_dk / sum_d n_d, v_dk the loss of document d summed over its n_d predicted tokens; the change is that of
    v_dk - v_d,own. The bootstrap draws documents with both their values, so its interval is that of the paired
    difference.

    Parameters
    ----------
    measured : xarray.Dataset
        The result of the measurement. Needs ``measured``, as measure_topk or open gives it.
    by : str or Sequence[str], optional
        Column, or columns, of the sequences to group by.
    bootstrap : Bootstrap, optional
        How intervals are computed.

    Returns
    -------
    xarray.Dataset
        ``estimate``, ci_low, ci_high, loss in nats a token ``[*by, k]``; change, change_low, change_high ``[*by,
        k]``; share ``[*by, k, layer, expert]``, of assignments; first_weight ``[*by, k, layer]``, mean weight of the
        strongest expert; n (predicted tokens), n_documents ``[*by]``.

    Raises
    ------
    BadInput
        For an unknown column in `by`, and anything else than such sums.

    Examples
    --------
    >>> measured = ml.experiments.measure_topk(model, documents[:2], ks=[1, 2], settings=quiet)
    >>> ml.stats.topk_sweep(measured)["k"].values.tolist()
    [1, 2]
    """
    check_kind(measured, KIND, "measure_topk")
    labels, group = groups_of(measured, by)
    shape = tuple(len(values) for values in labels.values())
    n_groups, ks = int(np.prod(shape, dtype=int)), measured.k.values
    layers, experts = measured.sizes["layer"], measured.sizes["expert"]
    loss, change = np.full((2, 3, n_groups, len(ks)), np.nan)
    share = np.full((n_groups, len(ks), layers, experts), np.nan)
    first = np.full((n_groups, len(ks), layers), np.nan)
    n, n_documents = np.zeros((2, n_groups), np.int64)
    for one in range(n_groups):
        here = measured.isel(document=np.flatnonzero((group == one) & (measured.tokens.values > 0)))
        if not here.sizes["document"]:
            continue
        tokens, own = here.tokens.values, here.loss.sel(k=int(measured.attrs["own_k"])).values[:, None]
        loss[:, one] = ratio(here.loss.values, tokens, bootstrap, one)
        change[:, one] = ratio(here.loss.values - own, tokens, bootstrap, one)
        chosen, length = here.chosen.values.sum(0), here.length.values.sum()
        share[one] = chosen / (length * ks[:, None, None])
        first[one] = here.first_weight.values.sum(0) / length
        n[one], n_documents[one] = int(tokens.sum()), len(tokens)
    by_k = dict(zip(("estimate", "ci_low", "ci_high"), loss, strict=True))
    by_k |= dict(zip(("change", "change_low", "change_high"), change, strict=True))
    data = {name: ((*labels, "k"), values.reshape(*shape, len(ks))) for name, values in by_k.items()}
    data["share"] = ((*labels, "k", "layer", "expert"), share.reshape(*shape, *share.shape[1:]))
    data["first_weight"] = ((*labels, "k", "layer"), first.reshape(*shape, *first.shape[1:]))
    data |= {name: (tuple(labels), v.reshape(shape)) for name, v in (("n", n), ("n_documents", n_documents))}
    attrs = {
        "statistic": "topk_sweep",
        "unit": "nats",
        "own_k": measured.attrs["own_k"],
        "formula": "sum_d v_dk / sum_d n_d",
        "source": "every k on the same tokens, measured by mixlens",
        "model": measured.attrs["model"],
        **intervals_by(bootstrap),
    }
    return xr.Dataset(data, {**labels, "k": ks, "layer": measured.layer.values, "expert": range(experts)}, attrs)


def open_topk(path: str | os.PathLike[str], *, check: bool = True) -> xr.Dataset:
    """The sums over documents that a sweep over k holds; `topk_sweep` makes the curve of them.

    Raises RunError when the run is not there, unfinished or altered, BadInput when it is of another kind.
    """
    return topk_dataset(read_measured(path, KIND, check=check))


def topk_dataset(measured: Measured) -> xr.Dataset:
    """Sums over documents: loss [document, k], first_weight [document, k, layer], chosen [document, k, layer, expert];
    tokens (predicted), length [document].
    """
    meta, inner = measured.meta, ("document", "k", "layer", "expert")
    data = {name: (inner[: array.ndim], array) for name, array in measured.arrays.items()}
    layers = measured.arrays["chosen"].shape[2]
    coords = {**measured.coords(), "k": meta["ks"], "layer": range(layers), "expert": range(meta["n_experts"])}
    return xr.Dataset(data, coords, {"kind": KIND, "model": meta["model"]["name"], "own_k": meta["own_k"]})
