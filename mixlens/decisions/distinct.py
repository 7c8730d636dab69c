"""Distinct experts: how many experts a step reads, for a batch of sequences or a window of consecutive tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.intervals import Smooth, said, with_bounds
from mixlens.decisions.verdict import DECISION, check_positive, judged
from mixlens.errors import BadInput
from mixlens.stats.counts import clustered, described, require

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


def distinct_experts(
    trace: Trace,
    *,
    batch: int = 1,
    window: int = 1,
    cluster: str | None = None,
    bootstrap: Bootstrap = DECISION,
) -> xr.Dataset:
    """Compute how many experts of a layer one step reads.

    A step takes the next `window` tokens of each of `batch` sequences: one token of each when a batch decodes, several
    of one in speculative decoding, a chunk of one in prefill. The estimate is the mean over all batches that the
    sequences of the trace can form, each stepped through until its shortest sequence ends, counted exactly: of D
    sequences that reach a step, of which n read an expert, C(D - n, batch) of C(D, batch) batches do not read it. The
    tokens that are left at the end of a sequence are no window.

    Two figures stand beside it, both for n = batch window tokens that know nothing of each other:

    random_tokens   sum_e 1 - (1 - p_e)^n, drawn from all tokens of the trace, which choose expert e with p_e
    formula         E (1 - (1 - k / E)^n), where every expert is chosen as often

    The verdict says whether to plan with fewer experts than random tokens read ("do it"), with more ("do not"), or
    whether the trace does not tell. Nothing is fitted, so that all documents judge.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot]; position. To decode is to generate:
        select ``phase="generated"`` where there is such a phase.
    batch : int, optional
        Sequences of a step.
    window : int, optional
        Consecutive tokens of each sequence.
    cluster : str, optional
        Column of the sequences, such as "author", whose values vary independently where documents do not.
    bootstrap : Bootstrap, optional
        How intervals are computed.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (experts), ci_low, ci_high, random_tokens ``[layer]``; n (windows), n_documents; attrs formula,
        verdict, and gain with gain_low and gain_high: random_tokens less the estimate, on average over layers.

    Raises
    ------
    BadInput
        For a batch or window below 1 or that no sequences of the trace fill.

    Examples
    --------
    >>> found = ml.decisions.distinct_experts(trace, window=4)
    >>> found["estimate"].dims, found.attrs["verdict"]
    (('layer',), 'do it')
    """
    trace, steps, read, random = _counted("distinct_experts", trace, batch, window, cluster, bootstrap)
    e, n = trace.n_experts, batch * window
    quantity = Smooth(read, floor=float(trace.top_k))
    estimate, low, high = with_bounds(quantity, steps.sizes, bootstrap.level)
    data = xr.Dataset(
        {
            "estimate": ("layer", estimate),
            "ci_low": ("layer", low),
            "ci_high": ("layer", high),
            "random_tokens": ("layer", random[:, 0]),
            "n": len(steps.step),
            "n_documents": len(steps.sizes),
        },
        coords={"layer": trace.layers},
    )
    return described(
        data, trace, bootstrap,
        statistic="distinct_experts", unit="experts", batch=batch, window=window,
        formula=e * (1 - (1 - trace.top_k / e) ** n), interval=said(quantity),
        **judged(Smooth((random - read).mean(0).round(9)), steps.sizes, bootstrap),
        source="hypergeometric: every batch of the trace's sequences, counted exactly",
    )  # fmt: skip


def decode_time(
    trace: Trace,
    model: Any,
    *,
    batch: int = 1,
    window: int = 1,
    context: int,
    bandwidth_bytes_per_s: float,
    step_s: float | None = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DECISION,
) -> xr.Dataset:
    """Predict the bytes that a step of decoding reads, and from them its time or its share of the bandwidth.

    read_bytes = all weights but the embedding table and the experts + bytes of the distinct experts of each layer +
    keys and values of `context` tokens of each sequence, as a benchmark counts those of its own forwards. The time is
    read_bytes / bandwidth, which no step beats that has to read them. Text like that to come gives a prediction for it:
    record what the model generates, and select ``phase="generated"``.

    Parameters
    ----------
    trace : Trace
        The recording, of the layers of the whole model. Needs ``expert_id`` and position.
    model : transformers.PreTrainedModel
        The model that is to run, whose tensors have the bytes.
    batch : int, optional
        Sequences of a step.
    window : int, optional
        Consecutive tokens of each sequence.
    context : int
        Tokens that each sequence attends to.
    bandwidth_bytes_per_s : float
        Of the device's memory, best as measured: ``bench.meta["machine"]["bandwidth_bytes_per_s"]["estimate"]``.
    step_s : float, optional
        Measured time of a step, for the share of the bandwidth that it used (MBU).
    cluster : str, optional
        Column of the sequences, such as "author", whose values vary independently where documents do not.
    bootstrap : Bootstrap, optional
        How intervals are computed.

    Returns
    -------
    xarray.Dataset
        ``estimate``, ci_low, ci_high ``[quantity]`` of read_bytes, decode_s, tokens_per_s and, with `step_s`, mbu_frac;
        all predicted; attrs verdict and gain as of `distinct_experts`.

    Raises
    ------
    BadInput
        As `distinct_experts`, for numbers that are not above 0, and for a trace that lacks layers of the model.

    Examples
    --------
    >>> found = ml.decisions.decode_time(trace, model, batch=4, context=128, bandwidth_bytes_per_s=50e9)
    >>> found["quantity"].values.tolist()
    ['read_bytes', 'decode_s', 'tokens_per_s']
    """
    from mixlens.bench.bytes_and_flops import Work

    rates = {"bandwidth_bytes_per_s": bandwidth_bytes_per_s, "step_s": step_s}
    check_positive("decode_time", context=context, **rates)
    trace, steps, read, random = _counted("decode_time", trace, batch, window, cluster, bootstrap)
    work = Work(model)
    weights = work.weights
    if len(weights.expert_bytes) != trace.n_layers:
        raise BadInput(
            f"Cannot predict decode_time: the trace has {trace.n_layers} layers and the model "
            f"{len(weights.expert_bytes)}. Pass the trace of all layers of this model.",
            argument="trace",
            value=trace.n_layers,
        )
    bytes_read = weights.dense_bytes + work.cached_bytes(context) * batch + weights.expert_bytes[:, 0] @ read
    estimate, low, high = with_bounds(Smooth(bytes_read), steps.sizes, bootstrap.level)
    times = {name: value / bandwidth_bytes_per_s for name, value in {"e": estimate, "l": low, "h": high}.items()}
    rows = {
        "read_bytes": (estimate, low, high),
        "decode_s": (times["e"], times["l"], times["h"]),
        "tokens_per_s": tuple(batch * window / times[name] for name in "ehl"),
        **({} if step_s is None else {"mbu_frac": tuple(times[name] / step_s for name in "elh")}),
    }
    columns = zip(("estimate", "ci_low", "ci_high"), zip(*rows.values(), strict=True), strict=True)
    data = xr.Dataset({name: ("quantity", np.array(values)) for name, values in columns}, coords={"quantity": [*rows]})
    return described(
        data.assign(n=len(steps.step), n_documents=len(steps.sizes)), trace, bootstrap,
        statistic="decode_time", unit="by quantity", predicted="all", batch=batch, window=window, context=context,
        interval=said(Smooth(bytes_read)), **judged(Smooth((random - read).mean(0).round(9)), steps.sizes, bootstrap),
    )  # fmt: skip


def tensor_overrides(found: xr.Dataset, *, on_gpu: int) -> str:
    """Return llama.cpp's ``--override-tensor`` that keeps the experts of some layers on the GPU, others on the CPU.

    GGUF files hold the experts of a layer in one tensor, so that layers can be placed and single experts cannot. The
    layers whose steps read most experts stay on the GPU, since they would wait for memory longest; a single sequence
    reads as many in each, and the first layers stay.

    Parameters
    ----------
    found : xarray.Dataset
        From `distinct_experts`.
    on_gpu : int
        Layers whose experts fit on the GPU.

    Returns
    -------
    str
        Pattern and buffer type, for ``llama-server -ngl 99 --override-tensor``; empty where all layers fit.

    Raises
    ------
    BadInput
        If `found` is no count of distinct experts, or for layers that are not there.

    Examples
    --------
    >>> found = ml.decisions.distinct_experts(trace, batch=4)
    >>> ml.decisions.tensor_overrides(found, on_gpu=8)
    ''
    """
    if not isinstance(found, xr.Dataset) or found.attrs.get("statistic") != "distinct_experts":
        raise BadInput(
            f"Cannot place tensors by a {type(found).__name__}. Pass what ml.decisions.distinct_experts returns.",
            argument="found",
            value=type(found).__name__,
        )
    layers = found["layer"].values
    if not isinstance(on_gpu, int | np.integer) or not 0 <= on_gpu <= len(layers):
        raise BadInput(
            f"Cannot keep {on_gpu!r} layers on the GPU: the trace has {len(layers)}. Pass a whole number up to that.",
            argument="on_gpu",
            value=on_gpu,
        )
    others = np.sort(layers[np.argsort(-found["estimate"].values, kind="stable")[on_gpu:]])
    return rf"blk\.({'|'.join(map(str, others))})\.ffn_.*_exps\.=CPU" if len(others) else ""


def _counted(
    what: str, trace: Trace, batch: int, window: int, cluster: str | None, bootstrap: Bootstrap
) -> tuple[Trace, _Steps, np.ndarray, np.ndarray]:
    """The trace by cluster, its steps, and experts of a step and of random tokens [layer, 1 + document]."""
    trace = clustered(trace, cluster)
    require(trace, what, "expert_id", "position", bootstrap=bootstrap)
    for name, value in {"batch": batch, "window": window}.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise BadInput(
                f"Cannot count the experts of a step with {name}={value!r}: it is no whole number from 1. Pass 4, for "
                "example.",
                argument=name,
                value=value,
            )
    steps = _Steps.of(trace, batch, window)
    ids = trace.read("expert_id")[steps.kept]
    each = [steps.read(ids[:, layer], trace.n_experts, batch * window) for layer in range(trace.n_layers)]
    read, random = (np.stack(arrays).round(12) for arrays in zip(*each, strict=True))
    return trace, steps, read, random


@dataclass(frozen=True)
class _Steps:
    """The windows of a trace by the step at which a batch of its sequences reads them.

    kept     [token of the trace] whether it lies in a window of a step that a batch fills
    window   [token that is kept] its window
    step     [window]
    unit     [window] document, or what else varies independently
    sizes    [unit] windows of each
    batch    sequences of a step
    """

    kept: np.ndarray
    window: np.ndarray
    step: np.ndarray
    unit: np.ndarray
    sizes: np.ndarray
    batch: int

    @classmethod
    def of(cls, trace: Trace, batch: int, window: int) -> _Steps:
        sequence, position = trace.read("sequence"), trace.read("position")
        starts = np.ones(len(sequence), bool)
        starts[1:] = (np.diff(sequence) != 0) | (np.diff(position) != 1)
        first, run = np.flatnonzero(starts), np.cumsum(starts) - 1
        offset = np.arange(len(sequence)) - first[run]
        kept = offset < np.bincount(run)[run] // window * window
        opens = offset[kept] % window == 0
        of_window = sequence[kept][opens]
        step = np.arange(len(of_window)) - np.searchsorted(of_window, of_window)
        rows = np.bincount(step)
        filled = (rows >= batch)[step]
        if not filled.any():
            raise BadInput(
                f"Cannot count the experts of batches of {batch} sequences with {window} consecutive tokens each: the "
                f"trace has at most {rows.max(initial=0)} such windows at one step. Pass a smaller batch or window, or "
                "record more and longer documents.",
                argument="batch",
                value=batch,
            )
        number = np.cumsum(opens) - 1
        kept[kept] = filled[number]
        unit, _ = pd.factorize(trace.sequences[trace.cluster].loc[of_window[filled]])
        renumbered = (np.cumsum(filled) - 1)[number[filled[number]]]
        return cls(kept, renumbered, step[filled], unit, np.bincount(unit).astype(float), batch)

    def read(self, ids: np.ndarray, n_experts: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Distinct experts of a step, and of `n` random tokens, of all units and without each [1 + unit].

        ids  [token that is kept, slot] of one layer
        """
        n_units = len(self.sizes)
        reads = np.zeros((len(self.step), n_experts), bool)
        reads[self.window[:, None], ids] = True
        pair, of_window = np.unique(self.unit * (self.step.max() + 1) + self.step, return_inverse=True)
        unit, step = np.divmod(pair, self.step.max() + 1)
        own = np.zeros((len(pair), n_experts), np.int64)
        np.add.at(own, of_window, reads)
        own_rows = np.bincount(of_window)
        readers = np.zeros((self.step.max() + 1, n_experts), np.int64)
        np.add.at(readers, step, own)
        rows = np.bincount(self.step)
        # Only the steps that a unit reaches change without it.
        whole = self._of_step(rows, readers)
        without = self._of_step(rows[step] - own_rows, readers[step] - own)
        less, fewer = (np.bincount(unit, before[step] - after) for before, after in zip(whole, without, strict=True))
        total, weight = (part.sum() for part in whole)
        with np.errstate(divide="ignore", invalid="ignore"):  # without a unit that every batch needs there is none
            read = np.append(total, total - less) / np.append(weight, weight - fewer)
        chosen = np.zeros((n_units, n_experts))
        of_token = self.unit[self.window]
        np.add.at(chosen, (of_token[:, None], ids), 1.0)
        chosen = np.concatenate([chosen.sum(0, keepdims=True), chosen.sum(0) - chosen])
        tokens = np.bincount(of_token, minlength=n_units)
        with np.errstate(invalid="ignore"):
            share = chosen / np.append(tokens.sum(), tokens.sum() - tokens)[:, None]
        return read, (1 - (1 - share) ** n).sum(-1)

    def _of_step(self, rows: np.ndarray, readers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distinct experts of all batches of a step, added up, and how many batches; both over those of all rows."""
        number = np.arange(int(np.bincount(self.step).max()) + 1)
        with np.errstate(divide="ignore"):
            ways = np.sum([np.log(np.maximum(number - i, 0)) for i in range(self.batch)], axis=0)
        with np.errstate(invalid="ignore"):
            batches = np.exp(ways[rows] - ways[-1])
            missed = np.exp(ways[rows[:, None] - readers] - ways[-1])
        return (batches[:, None] - missed).sum(-1), batches
