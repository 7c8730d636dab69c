"""health: detect routing collapse during training from a series of recordings of the same text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.intervals import Smooth, leaving_out
from mixlens.decisions.verdict import DECISION, bounded
from mixlens.errors import BadInput
from mixlens.stats.inputs import require
from mixlens.stats.routing import load_entropy
from mixlens.stats.saturation import checkpoint
from mixlens.stats.summaries import described, summed_by
from mixlens.stats.verdicts import fewest_units, level_of_each, of_all, verdict
from mixlens.trace.checkpoints import open_checkpoints
from mixlens.trace.trace import Trace


def health(traces: Mapping[int, Trace], *, limit_bits: float = 0.5, bootstrap: Bootstrap = DECISION) -> xr.Dataset:
    """Follow routing over a training run through recordings of the same text, the probe.

    load_entropy
        entropy of the expert load in bits; 0 if one expert takes everything (see stats.load_entropy).
    max_over_mean
        tokens of the busiest expert over the mean.
    routing_entropy
        mean entropy of single choices in bits.
    dead
        number of experts that no token of the probe chooses.
    saturation_first, saturation_last
        share of the chosen experts that the first, or the last, checkpoint chooses for the same token.

    In addition, drift is the paired change in the loss of the probe since the first checkpoint, in nats per token.

    The verdict says whether to continue: "do it" if load_entropy has fallen by at most `limit_bits` in every layer
    between the first and the last checkpoint, at the worse end of the interval; "do not" if it has fallen further in
    any layer, at the better end; otherwise "not enough evidence". These intervals are paired and hold simultaneously
    for all layers.

    Parameters
    ----------
    traces : Mapping[int, Trace]
        Recordings of the same documents by training step, in order. Each needs ``expert_id`` [token, layer, slot],
        router_logits [token, layer, expert] and logprob [token].
    limit_bits : float, optional
        Maximum fall of the load entropy in any layer.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate``, ci_low, ci_high ``[checkpoint, layer, measure]``; drift, drift_low, drift_high ``[checkpoint]``;
        change, change_low, change_high ``[layer]``, of load_entropy from first to last; attrs verdict.

    Raises
    ------
    BadInput
        If there are fewer than two recordings, or they are of different text.
    MissingSignal
        If a recording lacks router logits or log-probabilities.

    Examples
    --------
    >>> ml.decisions.health({0: trace, 100: trace}).attrs["verdict"]
    'do it'
    """
    if not isinstance(traces, Mapping) or len(traces) < 2:
        raise BadInput(
            "Cannot follow a training run: it has fewer than two recordings. Pass a mapping from steps to traces.",
            argument="traces",
            value=len(traces) if isinstance(traces, Mapping) else type(traces).__name__,
        )
    for trace in traces.values():
        require(trace, "health", "expert_id", "router_logits", "logprob", bootstrap=bootstrap)
    first, last = next(iter(traces.values())), list(traces.values())[-1]
    rows = [checkpoint(trace, first, last, bootstrap) for trace in traces.values()]
    data = xr.concat(rows, xr.IndexVariable("checkpoint", list(traces))).transpose("checkpoint", "layer", "measure")
    change = _change(first, last, bootstrap)
    bounds = zip(change["change_low"][1], change["change_high"][1], strict=True)
    return described(
        data.assign(change), last, bootstrap, statistic="health", limit_bits=limit_bits,
        verdict=of_all(verdict(low, high, needed=-limit_bits) for low, high in bounds),
    )  # fmt: skip


def _change(first: Trace, last: Trace, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return the change of load_entropy [layer] with paired bounds that hold simultaneously for all layers."""
    sides = [summed_by(load_entropy, trace) for trace in (first, last)]
    values: list[Any] = [side.statistic({"chosen": leaving_out(side.totals["chosen"])}).values for side in sides]
    each = replace(bootstrap, level=level_of_each(bootstrap.level, first.n_layers))
    sizes = sides[0].totals["chosen"][:, 0].sum(-1)
    found = bounded("change", ("layer",), Smooth(values[1] - values[0]), sizes, each)
    if len(sizes) < fewest_units(each.level):
        found |= {name: ("layer", np.full(first.n_layers, np.nan)) for name in ("change_low", "change_high")}
    return found


def open_health(path: str | os.PathLike[str], *, check: bool = True) -> xr.Dataset:
    """Compute the health of a training run that a Watch recorded in a folder; raises RunError as open_checkpoints."""
    return health(open_checkpoints(path, check=check))
