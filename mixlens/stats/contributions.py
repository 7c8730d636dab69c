"""Contributions of experts: norms of their weighted outputs, and their effect on the logit of the next token."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Difference, Mean
from mixlens.core.names import beside
from mixlens.errors import BadInput
from mixlens.stats.measured import Measured, check_kind, groups_of, read_measured, summarised
from mixlens.trace.detokenize import display_pieces

KIND = "contributions"
MEASURES = {"logit": "mean over tokens that chose the expert of w o . (s * (u_next - mean_v u_v))",
            "norm": "mean over tokens that chose the expert of |w o|"}  # fmt: skip


def expert_contribution(
    contributions: xr.Dataset,
    *,
    measure: str = "logit",
    by: str | Sequence[str] | None = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> xr.Dataset:
    """Summarise the contribution of each expert to the tokens that choose it.

    sum_t c_te / n_e, over the n_e tokens that chose the expert; for logits, only those whose next token is known.

    Parameters
    ----------
    contributions : xarray.Dataset
        The result of measure_contributions. Needs ``contributions``, as measure_contributions or open gives them.
    measure : str, optional
        "logit", what its weighted output adds to the logit of the token that came next, less the mean logit; or
        "norm", the Euclidean norm of its weighted output.
    by : str or Sequence[str], optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (logits, or the unit of the hidden states), ci_low, ci_high, n (tokens that chose the expert),
        n_effective ``[*by, layer, expert]``, NaN if no token chose the expert; for logits also p, q, survives of the
        same shape, tested against 0 and adjusted for all cells; max_abs, the largest absolute value of its output
        before weighting, ``[*by, layer, expert]``, for super_experts; n_documents ``[*by]``.

    Raises
    ------
    BadInput
        If the measure is unknown, `by` or `cluster` names an unknown column, or the argument does not hold
        contributions.

    Examples
    --------
    >>> measured = ml.experiments.measure_contributions(model, documents[:3], settings=quiet)
    >>> ml.stats.expert_contribution(measured)["estimate"].dims
    ('layer', 'expert')
    """
    if measure not in MEASURES:
        raise BadInput(
            f"Cannot compute contributions in {measure!r}: measures are {', '.join(MEASURES)}. Pass one of them.",
            argument="measure",
            value=measure,
        )
    check_kind(contributions, KIND, "measure_contributions")
    kind = Difference if measure == "logit" else Mean
    documents = _by_document(contributions, measure)
    experts = {"expert": documents.expert.values}
    data = summarised(
        documents,
        ("sum", "chosen"),
        lambda sums: kind(sums["sum"], sums["chosen"]),
        experts,
        by,
        bootstrap,
        tokens="chosen",
        null=0.0 if measure == "logit" else None,  # no norm is 0
        cluster=cluster,
    )
    _, group = groups_of(documents, by)
    largest = np.full((data.n_documents.size, *documents.peak.shape[1:]), np.nan)
    for one in np.unique(group):
        largest[one] = documents.peak.values[group == one].max(0)
    max_abs = data.estimate.copy(data=largest.reshape(data.estimate.shape)).where(data.n > 0)
    return data.assign(max_abs=max_abs).assign_attrs(
        statistic="expert_contribution",
        measure=measure,
        unit="logits" if measure == "logit" else "norm",
        formula=MEASURES[measure],
        source="direct logit attribution, measured by mixlens" if measure == "logit" else "measured by mixlens",
        model=contributions.attrs["model"],
        level=bootstrap.level,
    )


def open_contributions(path: str | os.PathLike[str], *, check: bool = True) -> xr.Dataset:
    """Return the contributions of a run as measure_contributions does, in memory.

    Raises RunError if the run is missing, unfinished or altered, BadInput if it is of another kind.
    """
    return contributions_dataset(read_measured(path, KIND, check=check))


def contributions_dataset(measured: Measured) -> xr.Dataset:
    """Return logit, norm, peak, expert_id, weight [token, layer, slot], with token coordinates."""
    arrays, meta = dict(measured.arrays), measured.meta
    number = np.repeat(np.arange(len(measured.documents)), arrays.pop("length"))
    position, token_id = arrays.pop("position").astype(np.int64), arrays.pop("token_id").astype(np.int64)
    following = np.append(token_id[1:], -1)
    following[np.append(position[1:] == 0, True)] = -1
    coords = {
        "sequence": ("token", np.cumsum(position == 0) - 1),
        "position": ("token", position),
        "token_id": ("token", token_id),
        "next_id": ("token", following),
        "piece": ("token", display_pieces(token_id, measured.vocabulary)),
    }
    data = {name: (("token", "layer", "slot"), values) for name, values in arrays.items()}
    columns = measured.columns({*data, *coords, "token", "layer", "slot"})
    coords |= {name: ("token", values[number]) for name, values in columns.items()}
    attrs = {
        "kind": KIND,
        "statistic": "expert_contributions",
        "unit": "logit",
        "model": meta["model"]["name"],
        "n_experts": meta["n_experts"],
    }
    return xr.Dataset(data, {**coords, "layer": measured.meta.get("layers", range(arrays["logit"].shape[1]))}, attrs)


def _by_document(data: xr.Dataset, measure: str) -> xr.Dataset:
    """Return sum, chosen (tokens), peak (largest absolute output) [document, layer, expert]; length [document]."""
    number, ids = pd.factorize(data.document_id.values)
    count, layers, experts = len(ids), data.sizes["layer"], int(data.attrs["n_experts"])
    sums, n, peak = np.zeros((3, count * experts, layers))
    for layer in range(layers):
        here = data.isel(layer=layer)
        values = here[measure].values
        known = np.isfinite(values)
        cell = (number[:, None] * experts + here.expert_id.values)[known]
        sums[:, layer] = np.bincount(cell, values[known].astype(np.float64), minlength=count * experts)
        n[:, layer] = np.bincount(cell, minlength=count * experts)
        np.maximum.at(peak[:, layer], cell, here.peak.values[known])
    first = np.unique(number, return_index=True)[1]
    columns = [str(name) for name in data.coords if data[name].dims == ("token",)]
    own = [name for name in columns if name not in ("sequence", "position", "token_id", "next_id", "piece")]
    arrays = (array.reshape(count, experts, layers).swapaxes(1, 2) for array in (sums, n, peak))
    named = dict(zip(("sum", "chosen", "peak"), arrays, strict=True))
    taken = {*named, "length", "layer", "expert", "document"}
    return xr.Dataset(
        {name: (("document", "layer", "expert"), array) for name, array in named.items()}
        | {"length": ("document", np.bincount(number, minlength=count))},
        coords={beside(name, taken): ("document", data[name].values[first]) for name in own}
        | {"layer": data.layer.values, "expert": range(experts)},
    )
