"""health: what a series of recordings of one text tells of a training run, and whether its routing collapses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.intervals import Smooth, leaving_out
from mixlens.core.run_dir import open_run
from mixlens.decisions.verdict import DECISION, DO, DO_NOT, UNKNOWN, fewest_units, verdict
from mixlens.errors import BadInput
from mixlens.stats.counts import described, require, summed_by
from mixlens.stats.next_tokens import next_tokens
from mixlens.stats.routing import expert_share, load_balance, load_entropy, routing_entropy
from mixlens.stats.saturation import saturation
from mixlens.trace.trace import Trace

KIND = "training"
MEASURES = (
    "load_entropy", "max_over_mean", "routing_entropy", "dead", "saturation_first", "saturation_last",
)  # fmt: skip


def health(traces: Mapping[int, Trace], *, limit_bits: float = 0.5, bootstrap: Bootstrap = DECISION) -> xr.Dataset:
    """Follow routing over a training run by recordings of the same text, the probe.

    load_entropy
        how evenly experts are used, in bits; 0 where one takes everything (see stats.load_entropy).
    max_over_mean
        tokens of the busiest expert over the mean.
    routing_entropy
        mean entropy of single choices, bits.
    dead
        experts that no token of the probe chooses, counted.
    saturation_first, saturation_last
        share of the experts chosen that the first, or the last, checkpoint chooses for the same token.

    Beside them drift, by how much the loss of the probe has changed since the first checkpoint, nats a token, paired.

    The verdict is about going on: "do it" where in no layer load_entropy has fallen by more than `limit_bits` between
    the first and the last checkpoint, "do not" where in one it has, at the end of the interval that speaks against it;
    else "not enough evidence". The intervals of the verdict are paired and hold for all layers at once.

    Parameters
    ----------
    traces : Mapping[int, Trace]
        Recordings of the same documents by training step, in order. Each needs ``expert_id`` [token, layer, slot],
        router_logits [token, layer, expert] and logprob [token].
    limit_bits : float, optional
        How far the entropy of the load may fall in any layer.
    bootstrap : Bootstrap, optional
        How intervals are computed.

    Returns
    -------
    xarray.Dataset
        ``estimate``, ci_low, ci_high ``[checkpoint, layer, measure]``; drift, drift_low, drift_high ``[checkpoint]``;
        change, change_low, change_high ``[layer]``, of load_entropy from first to last; attrs verdict.

    Raises
    ------
    BadInput
        For fewer than two recordings, or of different text.
    MissingSignal
        If one lacks router logits or log-probabilities.

    Examples
    --------
    >>> ml.decisions.health({0: trace, 100: trace}).attrs["verdict"]
    'do it'
    """
    if not isinstance(traces, Mapping) or len(traces) < 2:
        raise BadInput(
            "Cannot follow a training run by fewer than two recordings. Pass a mapping from steps to traces.",
            argument="traces",
            value=len(traces) if isinstance(traces, Mapping) else type(traces).__name__,
        )
    for trace in traces.values():
        require(trace, "health", "expert_id", "router_logits", "logprob", bootstrap=bootstrap)
    first, last = next(iter(traces.values())), list(traces.values())[-1]
    agreed = saturation(traces, bootstrap=bootstrap).sel(measure="overlap", drop=True)
    rows = []
    for step, trace in traces.items():
        balance = load_balance(trace, bootstrap=bootstrap).sel(measure="max_over_mean", drop=True)
        unused = (expert_share(trace, bootstrap=bootstrap)["estimate"] == 0).sum("expert").astype(float)
        nothing = unused * np.nan
        cells = [
            load_entropy(trace, bootstrap=bootstrap),
            balance,
            routing_entropy(trace, bootstrap=bootstrap),
            xr.Dataset({"estimate": unused, "ci_low": nothing, "ci_high": nothing}),
            agreed.sel(against="first", checkpoint=step, drop=True),
            agreed.sel(against="last", checkpoint=step, drop=True),
        ]
        numbers = [cell[["estimate", "ci_low", "ci_high"]].drop_attrs() for cell in cells]
        drift = next_tokens(first, trace, bootstrap=bootstrap).sel(measure="loss_difference", drop=True)
        row = xr.concat(numbers, xr.IndexVariable("measure", list(MEASURES)))
        names = {"drift": "estimate", "drift_low": "ci_low", "drift_high": "ci_high"}
        rows.append(row.assign({name: drift[of].drop_attrs() for name, of in names.items()}))
    data = xr.concat(rows, xr.IndexVariable("checkpoint", list(traces))).transpose("checkpoint", "layer", "measure")
    change = _change(first, last, bootstrap)
    ways = [verdict(low, high, needed=-limit_bits) for low, high in zip(*change[1:], strict=True)]
    data = data.assign({name: ("layer", values) for name, values in zip(_CHANGE, change, strict=True)})
    return described(
        data, last, bootstrap, statistic="health", limit_bits=limit_bits,
        verdict=DO_NOT if DO_NOT in ways else UNKNOWN if UNKNOWN in ways else DO,
    )  # fmt: skip


_CHANGE = ("change", "change_low", "change_high")


def _change(first: Trace, last: Trace, bootstrap: Bootstrap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Change of load_entropy [layer] and its paired bounds, which hold for all layers at once."""
    sides = [summed_by(load_entropy, trace) for trace in (first, last)]
    values: list[Any] = [side.statistic({"chosen": leaving_out(side.totals["chosen"])}).values for side in sides]
    level = 1 - (1 - bootstrap.level) / first.n_layers
    sizes = sides[0].totals["chosen"][:, 0].sum(-1)
    change = Smooth(values[1] - values[0])
    bounds = change.bounds(sizes, level)
    if len(sizes) < fewest_units(level):
        bounds = (np.full_like(bound, np.nan) for bound in bounds)
    return change.values[..., 0], *bounds  # type: ignore[return-value]


def open_health(path: str | os.PathLike[str], *, check: bool = True) -> xr.Dataset:
    """The health of the training run that a Watch followed into a folder.

    Raises RunError when the run is not there, unfinished, altered, or of another kind.
    """
    run = open_run(path, KIND, check=check)
    steps: list[Any] = run.meta["steps"]
    traces = {step: Trace.open(run.path / folder_of(step), check=check) for step in steps}
    return health(traces, limit_bits=run.meta["limit_bits"])


def folder_of(step: int) -> str:
    return f"step-{step:08d}"
