"""Saturation: agreement of a router's choices during training with its final ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.errors import BadInput
from mixlens.stats.agreement import agreement
from mixlens.stats.clusters import By
from mixlens.stats.next_tokens import next_tokens
from mixlens.stats.published import OLMOE
from mixlens.stats.routing import expert_share, load_balance, load_entropy, routing_entropy

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

_MEASURES = ["top1", "overlap"]
_PUBLISHED = (
    "OLMoE-1B-7B: after 1 % of pretraining up to about 60 % of the eight experts chosen are those of the end, in later "
    f"layers earlier ({OLMOE}, section 5.1)"
)


def saturation(
    traces: Mapping[Any, Trace] | Sequence[Trace],
    *,
    by: By = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> xr.Dataset:
    """Compute router saturation over checkpoints of one training run, recorded on the same tokens.

    mean over tokens of ``|E(t) and E(T)| / k``: the share of the experts chosen at checkpoint t that the last
    checkpoint T also chooses for the same token (Muennighoff et al. 2024, OLMoE, eq. 5), in the row "last". The row
    "first" compares with the first checkpoint. The measure top1 does the same for the strongest expert only. A
    checkpoint agrees with itself exactly.

    Parameters
    ----------
    traces : Mapping[Any, Trace] or Sequence[Trace]
        Recordings in the order of training, by step or name. Each needs ``expert_id``, uint8 or uint16 [token, layer,
        slot].
    by : By, optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high ``[against, checkpoint, *by, layer, measure]``; n (tokens) ``[*by]``;
        attrs uniform, what independent uniform routing gives for each measure, and published, what OLMoE's training
        had reached by when.

    Raises
    ------
    BadInput
        If there are fewer than two checkpoints, or their layers, experts or tokens differ.

    Examples
    --------
    >>> found = ml.stats.saturation({0: trace, 100: trace})
    >>> found["estimate"].dims
    ('against', 'checkpoint', 'layer', 'measure')
    """
    named = dict(traces) if isinstance(traces, Mapping) else dict(enumerate(traces))
    if len(named) < 2:
        raise BadInput(
            f"Cannot compute saturation of {len(named)} checkpoints: it compares two or more. Record the same "
            "documents with several checkpoints of a training run.",
            argument="traces",
            value=len(named),
        )
    ends = {"first": next(iter(named.values())), "last": list(named.values())[-1]}
    rows = [[_against(trace, end, by, cluster, bootstrap) for trace in named.values()] for end in ends.values()]
    checkpoints = xr.IndexVariable("checkpoint", list(named))
    joined = xr.concat(
        [xr.concat(row, checkpoints, data_vars=_NUMBERS) for row in rows],
        xr.IndexVariable("against", list(ends)),
        data_vars=_NUMBERS,
    )
    first = rows[0][0].attrs
    return joined.transpose("against", "checkpoint", ...).assign_attrs(
        {**first, "statistic": "saturation", "formula": "mean_t |E(t) and E(T)| / k", "source": f"{OLMOE}, eq. 5"},
        uniform=first["uniform"][: len(_MEASURES)],
        published=_PUBLISHED,
    )


_NUMBERS = ["estimate", "ci_low", "ci_high"]


def _against(trace: Trace, end: Trace, by: By, cluster: str | None, bootstrap: Bootstrap) -> xr.Dataset:
    data = agreement(trace, end, by=by, cluster=cluster, bootstrap=bootstrap).sel(measure=_MEASURES)
    data.attrs.pop("missing", None)
    return data if trace is not end else data.assign(dict.fromkeys(_NUMBERS, data["estimate"]))


def checkpoint(trace: Trace, first: Trace, last: Trace, bootstrap: Bootstrap = DEFAULT) -> xr.Dataset:
    """Summarise a checkpoint of a training run between its `first` and its latest recording, `last`.

    estimate, ci_low, ci_high [measure, layer]: load_entropy and routing_entropy (bits), max_over_mean, dead (experts
    that no token chooses, without an interval), saturation_first and saturation_last; drift, drift_low, drift_high: how
    the loss has changed since the first, nats per token.
    """
    unused = (expert_share(trace)["estimate"] == 0).sum("expert").astype(float)
    cells = {
        "load_entropy": load_entropy(trace, bootstrap=bootstrap),
        "max_over_mean": load_balance(trace, bootstrap=bootstrap).sel(measure="max_over_mean", drop=True),
        "routing_entropy": routing_entropy(trace, bootstrap=bootstrap),
        "dead": xr.Dataset({"estimate": unused, "ci_low": unused * float("nan"), "ci_high": unused * float("nan")}),
    }
    for name, end in (("saturation_first", first), ("saturation_last", last)):
        cells[name] = _against(trace, end, None, None, bootstrap).sel(measure="overlap", drop=True)
    numbers = [cell[_NUMBERS].drop_attrs() for cell in cells.values()]
    drift = next_tokens(first, trace, bootstrap=bootstrap).sel(measure="loss_difference", drop=True)
    named = zip(("drift", "drift_low", "drift_high"), _NUMBERS, strict=True)
    return xr.concat(numbers, xr.IndexVariable("measure", list(cells))).assign(
        {name: drift[of].drop_attrs() for name, of in named}
    )
