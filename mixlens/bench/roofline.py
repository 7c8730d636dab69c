"""Roofline: bytes that a forward pass must read and its operations, against the measured rates of the device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixlens.bench.events import Record
from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Smooth, leaving_out, with_bounds
from mixlens.endpoints.protocols import TOKEN, Event
from mixlens.errors import MissingSignal

PHASES = ("prefill", "decode")
# Metrics of a forward pass in each phase, averaged over the measured calls.
METRICS = {
    "forward_s": "time of one forward",
    "tokens_per_s": "tokens of all rows over time: read in prefill, written in decode",
    "experts_per_layer": "distinct experts that a forward chose in a layer",
    "read_bytes": "weights of the chosen experts and of all else but the embedding table, and keys and values",
    "read_bytes_per_s": "read_bytes over time",
    "mbu_frac": "read_bytes_per_s / measured bandwidth",
    "flops_per_s": "operations over time",
    "mfu_frac": "flops_per_s / measured matrix throughput",
    "flops_per_byte": "arithmetic intensity",
    "roof_tokens_per_s": "tokens / max(read_bytes / bandwidth, operations / matrix throughput)",
}


@dataclass(frozen=True)
class Context:
    """Cache size and attention cost of one layer per past token.

    cached    values that the layer caches per token
    attended  values per query, heads times the mean width of keys and values; each attended token takes as many
              multiply-adds twice (scores and weighted sum)
    window    number of tokens cached; None for all
    """

    cached: int
    attended: int
    window: int | None = None

    def kept(self, tokens: int) -> int:
        return tokens if self.window is None else min(tokens, self.window)

    def reached(self, tokens: int, past: int) -> int:
        """Return the number of attended tokens of `tokens` new ones after `past` others, each including itself."""
        growing = tokens if self.window is None else min(max(self.window - past, 0), tokens)
        return growing * past + growing * (growing + 1) // 2 + (tokens - growing) * self.kept(past + tokens)


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of a mixture of experts by component.

    layers     number of layers with experts
    dense      parameters that every token uses, including shared experts and the head, excluding the embedding table
    expert     parameters of one expert of one layer
    embedding  parameters of the embedding table; 0 if tied to the head
    contexts   one Context per attention layer
    state      state values of the other layers, independent of length
    """

    layers: int
    experts: int
    top_k: int
    dense: int
    expert: int
    head: int
    embedding: int
    contexts: tuple[Context, ...]
    state: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Return the sizes of a Mixtral from the content of its config.json; `sizes_of` handles every loaded model."""
        layers, hidden, inner = (config[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size"))
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        width = config.get("head_dim") or hidden // heads
        experts, head = config["num_local_experts"], config["vocab_size"] * hidden
        attention = 2 * hidden * heads * width + 2 * hidden * kv_heads * width
        dense = layers * (attention + hidden * experts + 2 * hidden) + hidden + head
        return cls(
            layers=layers,
            experts=experts,
            top_k=config["num_experts_per_tok"],
            dense=dense,
            expert=3 * hidden * inner,
            head=head,
            embedding=0 if config.get("tie_word_embeddings") else head,
            contexts=(Context(2 * kv_heads * width, heads * width),) * layers,
        )

    @property
    def total(self) -> int:
        """Number of parameters of the model."""
        return self.dense + self.embedding + self.layers * self.experts * self.expert

    @property
    def read_a_token(self) -> int:
        """Number of parameters that one token must read, excluding the embedding table."""
        return self.dense + self.layers * self.top_k * self.expert

    def kept(self, tokens: int) -> int:
        """Return the number of values that the cache of one row holds after `tokens` tokens."""
        return self.state + sum(one.cached * one.kept(tokens) for one in self.contexts)

    def flops(self, lengths: Sequence[int], past: int = 0) -> int:
        """Return the operations of a forward pass over rows with `lengths` new tokens, after `past` cached tokens.

        Each matrix parameter costs 2 per token, each query value 4 per attended token, and each state value 4 per token
        (it is updated and read). The head runs only on the last token of each row.
        """
        tokens = sum(lengths)
        a_token = self.dense - self.head + self.layers * self.top_k * self.expert
        attended = sum(one.attended * one.reached(n, past) for n in lengths for one in self.contexts)
        return 2 * (a_token * tokens + self.head * len(lengths)) + 4 * (attended + self.state * tokens)


@dataclass(frozen=True)
class Weights:
    """Bytes of weights in memory, from the tensors of a model, or from sizes and bytes per parameter.

    dense_bytes   read by every forward pass; see Sizes.dense
    expert_bytes  [layer, expert]
    """

    dense_bytes: int
    expert_bytes: np.ndarray

    @classmethod
    def of(cls, sizes: Sizes, bytes_a_parameter: float = 2) -> Weights:
        """Return the bytes if all parameters have the same type, such as bfloat16 (2 bytes)."""
        experts = np.full((sizes.layers, sizes.experts), round(sizes.expert * bytes_a_parameter))
        return cls(round(sizes.dense * bytes_a_parameter), experts)

    def read(self, expert_id: np.ndarray) -> tuple[int, int]:
        """Return the bytes of the weights that one forward pass must read, and the number of experts over all layers.

        expert_id  [token, layer, slot] of all tokens of the forward pass

        Every chosen expert is read once, however many tokens chose it.
        """
        chosen = np.zeros(self.expert_bytes.shape, bool)
        chosen[np.arange(len(chosen))[None, :, None], expert_id] = True
        return self.dense_bytes + int(self.expert_bytes[chosen].sum()), int(chosen.sum())


@dataclass(frozen=True)
class Measured:
    """A rate of a device: the mean of n runs with its 95 % interval, the operation, and the rates of all runs.

    bursts  runs grouped into bursts of consecutive runs; a benchmark has one burst before its loads and one after
    """

    estimate: float
    ci_low: float
    ci_high: float
    n: int
    how: str
    bursts: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def of(cls, bursts: Sequence[Sequence[float]], how: str) -> Measured:
        """Return the mean of all runs +- t(n - 1) * s / sqrt(n), widened to include the mean of every burst.

        Runs of one burst follow each other too closely to show the drift of a device; separate bursts do.
        """
        from scipy.special import stdtrit  # imported here because it takes a quarter of a second

        rates = np.concatenate([np.asarray(burst, float) for burst in bursts])
        n, mean, means = len(rates), float(rates.mean()), [float(np.mean(burst)) for burst in bursts]
        reach = float(stdtrit(n - 1, 0.975)) * float(rates.std(ddof=1)) / math.sqrt(n)
        low, high = min(max(mean - reach, 0.0), *means), max(mean + reach, *means)
        return cls(mean, low, high, n, how, tuple(tuple(map(float, burst)) for burst in bursts))


@dataclass(frozen=True)
class Machine:
    """Measured rates of a device, before and after the loads of a benchmark.

    bandwidth_bytes_per_s  bytes read per second
    matmul_flops_per_s     operations per second of a large matrix product in the model's dtype
    """

    name: str
    bandwidth_bytes_per_s: Measured
    matmul_flops_per_s: Measured

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Machine:
        """Create from the JSON values of `dataclasses.asdict`."""
        rates = {key: Measured(**plain[key]) for key in ("bandwidth_bytes_per_s", "matmul_flops_per_s")}
        return cls(plain["name"], **rates)


def roofline(
    records: Iterable[Record], machine: Machine, *, layers: int, bootstrap: Bootstrap = DEFAULT
) -> pd.DataFrame:
    """Compute how close every load came to the limits of the device, by phase: METRICS over the measured calls.

    Metrics are ratios of sums over calls, such as sum of bytes / sum of seconds. Intervals are jackknife t intervals
    over calls, on logarithms. Those of mbu_frac, mfu_frac and roof_tokens_per_s include the interval of the device's
    rate by the method of variance estimates recovery on logarithms (Zou and Donner 2008): for m = r / b with r in
    [r-, r+] and b in [b-, b+] the bounds are m / exp(sqrt(ln(r / r-)^2 + ln(b+ / b)^2)) and
    m * exp(sqrt(ln(r+ / r)^2 + ln(b / b-)^2)).

    Returns
    -------
    DataFrame
        level, phase, metric, estimate, ci_low, ci_high, n (calls); NaN if routing was not recorded.

    Raises
    ------
    MissingSignal
        If no record has the bytes or operations of its forward passes, as with an endpoint.
    """
    groups: dict[str, list[np.ndarray]] = {}
    for record in records:
        if record.phase == "measured" and record.outcome == "ok":
            groups.setdefault(record.level, []).append(_sums(record))
    if not any(np.isfinite(call[:, _FLOPS]).any() for calls in groups.values() for call in calls):
        raise MissingSignal(
            "Cannot compute a roofline: no measured call has the bytes and operations of its forwards. Benchmark a "
            "loaded model, as in ml.benchmark(ml.load(...)); an endpoint does not reveal them.",
            argument="records",
        )
    rows = []
    for level, calls in groups.items():
        for at, phase in enumerate(PHASES):
            sums = np.stack([call[at] for call in calls])
            estimate, low, high = _with_interval(sums, machine, layers, bootstrap)
            rows += [
                (level, phase, metric, estimate[i], low[i], high[i], len(calls)) for i, metric in enumerate(METRICS)
            ]
    return pd.DataFrame(rows, columns=["level", "phase", "metric", "estimate", "ci_low", "ci_high", "n"])


_SECONDS, _FORWARDS, _TOKENS, _EXPERTS, _BYTES, _FLOPS = range(6)


def _sums(record: Record) -> np.ndarray:
    """Return the sums of a call [phase, 6]: seconds, forwards, tokens, experts of all layers, bytes, operations."""
    events = [event for event in record.events if event.kind == TOKEN]
    stamps = [event.at_s for event in events]
    assert record.sent_s is not None
    read = np.nan if (tokens := events[-1].input_tokens) is None else tokens
    return np.array(
        [
            [stamps[0] - record.sent_s, 1, record.rows * read, *_work(events[:1])],
            [stamps[-1] - stamps[0], len(events) - 1, record.rows * (len(events) - 1), *_work(events[1:])],
        ]
    )


def _work(events: Sequence[Event]) -> list[float]:
    names = ("experts", "read_bytes", "flops")
    return [sum(np.nan if (v := getattr(event, name)) is None else v for event in events) for name in names]


def _with_interval(
    sums: np.ndarray, machine: Machine, layers: int, bootstrap: Bootstrap
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return estimate, lower and upper bound of METRICS from the sums of every call [call, 6]."""
    with np.errstate(divide="ignore"):
        on_logs = Smooth(np.log(_metrics(leaving_out(sums), machine, layers)), through=np.exp)
    estimate, low, high = with_bounds(on_logs, np.ones(len(sums)), bootstrap.level)
    return estimate, *_with_device(estimate, low, high, machine)


def _with_device(
    estimate: np.ndarray, low: np.ndarray, high: np.ndarray, machine: Machine
) -> tuple[np.ndarray, np.ndarray]:
    """Widen the bounds of the METRICS that depend on a rate of the device by the interval of that rate."""
    at = {name: i for i, name in enumerate(METRICS)}
    bandwidth, product = machine.bandwidth_bytes_per_s, machine.matmul_flops_per_s
    ridge = product.estimate / bandwidth.estimate
    binding = product if estimate[at["flops_per_byte"]] > ridge else bandwidth
    low, high = low.copy(), high.copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, rate, divides in (
            ("mbu_frac", bandwidth, True),
            ("mfu_frac", product, True),
            ("roof_tokens_per_s", binding, False),
        ):
            i = at[name]
            below, above = np.log(np.divide(rate.estimate, rate.ci_low)), np.log(rate.ci_high / rate.estimate)
            below, above = (above, below) if divides else (below, above)
            low[i], high[i] = (
                estimate[i] / np.exp(np.hypot(np.log(estimate[i] / low[i]), below)),
                estimate[i] * np.exp(np.hypot(np.log(high[i] / estimate[i]), above)),
            )
    return low, high


def _metrics(totals: np.ndarray, machine: Machine, layers: int) -> np.ndarray:
    """Compute METRICS [metric, replicate] from sums over calls [6, replicate]."""
    seconds, forwards, tokens, experts, read, flops = totals
    bandwidth, peak = machine.bandwidth_bytes_per_s.estimate, machine.matmul_flops_per_s.estimate
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = [
            seconds / forwards,
            tokens / seconds,
            experts / forwards / layers,
            read / forwards,
            read / seconds,
            read / seconds / bandwidth,
            flops / seconds,
            flops / seconds / peak,
            flops / read,
            tokens / np.maximum(read / bandwidth, flops / peak),
        ]
    values = np.stack(rows)
    return np.where(np.isfinite(values), values, np.nan)
