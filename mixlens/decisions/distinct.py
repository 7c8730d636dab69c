"""Distinct experts: number of experts that a step reads, for a batch of sequences or a window of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.intervals import Smooth, said
from mixlens.decisions.verdict import DECISION, bounded, check_found, check_positive, check_whole, judged
from mixlens.errors import BadInput
from mixlens.stats.inputs import clustered, require
from mixlens.stats.steps import Steps
from mixlens.stats.summaries import described

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
    """Count the distinct experts of a layer that one step reads.

    A step takes the next `window` tokens of each of `batch` sequences: one token of each in batched decoding, several
    of one sequence in speculative decoding, a chunk of one in prefill. The estimate is the exact mean over all batches
    of the trace's sequences, each stepped through until its shortest sequence ends: of D sequences that reach a step,
    of which n read an expert, C(D - n, batch) of C(D, batch) batches do not read it.

    Two references assume n = batch * window independent tokens: random_tokens, sum_e 1 - (1 - p_e)^n, drawn from all
    tokens of the trace, which choose expert e with probability p_e; and formula, E (1 - (1 - k / E)^n), if every expert
    is equally likely. The verdict says whether to plan with fewer experts than random tokens read ("do it") or with
    more ("do not"). Nothing is fitted, so all documents judge.

    Parameters
    ----------
    trace : Trace
        Recording with ``expert_id``, uint8 or uint16 [token, layer, slot], and position. For decoding, select
        ``phase="generated"`` if the trace has this phase.
    batch : int, optional
        Number of sequences per step.
    window : int, optional
        Number of consecutive tokens of each sequence.
    cluster : str, optional
        Column of the sequences whose values are independent if documents are not, such as "author".
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (experts), ci_low, ci_high, random_tokens ``[layer]``; n (windows), n_documents; attrs formula,
        verdict, and gain with gain_low and gain_high: random_tokens minus the estimate, averaged over layers.

    Raises
    ------
    BadInput
        If batch or window is below 1, or no sequences of the trace fill them.

    Examples
    --------
    >>> found = ml.decisions.distinct_experts(trace, window=4)
    >>> found["estimate"].dims, found.attrs["verdict"]
    (('layer',), 'do it')
    """
    counted = _Counted.of("distinct_experts", trace, batch, window, cluster, bootstrap)
    e, n, quantity = trace.n_experts, batch * window, Smooth(counted.read, floor=float(trace.top_k))
    data = bounded("estimate", ("layer",), quantity, counted.steps.sizes, bootstrap)
    return counted.described(
        xr.Dataset(data | {"random_tokens": ("layer", counted.random[:, 0])}, {"layer": trace.layers}), bootstrap,
        statistic="distinct_experts", unit="experts", batch=batch, window=window, interval=said(quantity),
        formula=e * (1 - (1 - trace.top_k / e) ** n),
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
    """Predict the bytes that a decoding step reads, and from them its time or its share of the bandwidth.

    read_bytes = all weights except the embedding table and the experts + bytes of the distinct experts of each layer +
    keys and values of `context` tokens of each sequence, as in benchmarks of loaded models. The time is
    read_bytes / bandwidth, a lower bound. Predict from text like the expected text: ``phase="generated"``.

    Parameters
    ----------
    trace : Trace
        Recording of all layers of the model, with ``expert_id`` and position.
    model : transformers.PreTrainedModel
        The model to run, whose tensors determine the bytes.
    batch, window, cluster, bootstrap
        As for `distinct_experts`.
    context : int
        Number of tokens that each sequence attends to.
    bandwidth_bytes_per_s : float
        Memory bandwidth of the device, preferably measured:
        ``bench.meta["machine"]["bandwidth_bytes_per_s"]["estimate"]``.
    step_s : float, optional
        Measured time of a step in seconds, to compute the share of the bandwidth that it used (MBU).

    Returns
    -------
    xarray.Dataset
        Predicted ``estimate``, ci_low, ci_high ``[quantity]`` of read_bytes, decode_s, tokens_per_s and, with `step_s`,
        mbu_frac; attrs verdict and gain as in `distinct_experts`.

    Raises
    ------
    BadInput
        As for `distinct_experts`, if a number is not above 0, or if the trace lacks layers of the model.

    Examples
    --------
    >>> found = ml.decisions.decode_time(trace, model, batch=4, context=128, bandwidth_bytes_per_s=50e9)
    >>> found["quantity"].values.tolist()
    ['read_bytes', 'decode_s', 'tokens_per_s']
    """
    from mixlens.bench.bytes_and_flops import Work

    check_positive("decode_time", context=context, bandwidth_bytes_per_s=bandwidth_bytes_per_s, step_s=step_s)
    counted = _Counted.of("decode_time", trace, batch, window, cluster, bootstrap)
    work = Work(model)
    if len(work.weights.expert_bytes) != trace.n_layers:
        raise BadInput(
            f"Cannot predict decode_time: the trace has {trace.n_layers} layers and the model "
            f"{len(work.weights.expert_bytes)}. Pass the trace of all layers of this model.",
            argument="trace",
            value=trace.n_layers,
        )
    experts = work.weights.expert_bytes[:, 0] @ counted.read
    quantity = Smooth(work.weights.dense_bytes + work.cached_bytes(context) * batch + experts)
    read_bytes = xr.Dataset(bounded("estimate", (), quantity, counted.steps.sizes, bootstrap))
    decode_s = read_bytes / bandwidth_bytes_per_s
    per_s = (batch * window / decode_s).rename(ci_low="ci_high", ci_high="ci_low")
    rows = {"read_bytes": read_bytes, "decode_s": decode_s, "tokens_per_s": per_s}
    rows |= {} if step_s is None else {"mbu_frac": decode_s / step_s}
    return counted.described(
        xr.concat(rows.values(), xr.IndexVariable("quantity", [*rows])), bootstrap,
        statistic="decode_time", unit="by quantity", predicted="all", batch=batch, window=window, context=context,
        interval=said(quantity),
    )  # fmt: skip


def tensor_overrides(found: xr.Dataset, *, on_gpu: int) -> str:
    """Return llama.cpp's ``--override-tensor`` that keeps the experts of some layers on the GPU, the others on the CPU.

    GGUF files hold the experts of a layer in one tensor, so only whole layers can be placed. The layers whose steps
    read most experts stay on the GPU; for a single sequence, all layers read the same number, and the first ones stay.

    Parameters
    ----------
    found : xarray.Dataset
        Result of `distinct_experts`.
    on_gpu : int
        Number of layers whose experts fit on the GPU.

    Returns
    -------
    str
        Pattern and buffer type, for ``llama-server -ngl 99 --override-tensor``; empty if all layers fit.

    Raises
    ------
    BadInput
        If `found` is not a result of `distinct_experts`, or `on_gpu` is out of range.

    Examples
    --------
    >>> found = ml.decisions.distinct_experts(trace, batch=4)
    >>> ml.decisions.tensor_overrides(found, on_gpu=8)
    ''
    """
    check_found(found, "distinct_experts")
    layers = found["layer"].values
    if not isinstance(on_gpu, int | np.integer) or not 0 <= on_gpu <= len(layers):
        raise BadInput(
            f"Cannot keep {on_gpu!r} layers on the GPU: the trace has {len(layers)}. Pass a whole number up to that.",
            argument="on_gpu",
            value=on_gpu,
        )
    others = np.sort(layers[np.argsort(-found["estimate"].values, kind="stable")[on_gpu:]])
    return rf"blk\.({'|'.join(map(str, others))})\.ffn_.*_exps\.=CPU" if len(others) else ""


@dataclass(frozen=True)
class _Counted:
    """Experts read by a step and by random tokens [layer, 1 + unit], over all units and without each."""

    trace: Trace
    steps: Steps
    read: np.ndarray
    random: np.ndarray

    @classmethod
    def of(
        cls, what: str, trace: Trace, batch: int, window: int, cluster: str | None, bootstrap: Bootstrap
    ) -> _Counted:
        trace = clustered(trace, cluster)
        require(trace, what, "expert_id", "position", bootstrap=bootstrap)
        check_whole(what, batch=batch, window=window)
        steps = Steps.of(trace, batch, window)
        ids = trace.read("expert_id")[steps.kept]
        each = [steps.read(ids[:, layer], trace.n_experts, batch * window) for layer in range(trace.n_layers)]
        return cls(trace, steps, *(np.stack(arrays).round(12) for arrays in zip(*each, strict=True)))

    def described(self, data: xr.Dataset, bootstrap: Bootstrap, **attrs: Any) -> xr.Dataset:
        data = data.assign(n=len(self.steps.step), n_documents=len(self.steps.sizes))
        fewer = Smooth((self.random - self.read).mean(0).round(9))
        return described(data, self.trace, bootstrap, **attrs, **judged(fewer, self.steps.sizes, bootstrap))
