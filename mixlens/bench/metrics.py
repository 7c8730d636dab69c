"""Metrics of requests: pure functions of records, so that metrics of saved runs can be recomputed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from mixlens.bench.events import OUTCOMES, Record
from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Mean, leaving_out, quantile_bounds, with_bounds
from mixlens.endpoints.protocols import REASONING, ROLE, TOKEN, Event
from mixlens.errors import BadInput

# Sources of the number of output tokens, best first.
USAGE, CHUNK_USAGE, RETOKENISED, CHUNKS = "usage", "chunk usage", "retokenised", "chunks"
# Metrics of a request, with their definitions.
METRICS = {
    "ttft_s": "sent to the first event that carries a token, of reasoning or of the answer",
    "ttft_reasoning_s": "sent to the first event of reasoning, where it is shown",
    "ttft_answer_s": "sent to the first event of the answer",
    "tpot_s": "(last - first event of the answer) / tokens that came after the first; of reasoning and answer together "
    "where their tokens are not counted apart",
    "itl_s": "time between tokens, where every chunk is one token",
    "inter_chunk_s": "time between events that carry tokens, however many",
    "e2e_token_s": "sent to the last token",
    "e2e_stream_s": "sent to the end of the stream",
    "scheduled_ttft_s": "due to the first token (open loop)",
    "scheduled_e2e_s": "due to the last token (open loop)",
    "connect_s": "opening a connection, where one was opened; in no other metric",
    "headers_s": "sent to the answer's headers",
    "output_tokens_per_s": "one over TPOT, of one request",
}
STATISTICS = ("mean", "p50", "p90", "p95", "p99")
QUANTILES = (0.5, 0.9, 0.95, 0.99)
# With fewer samples the 99th percentile is little more than the maximum.
P99_SAMPLES = 100
# Tokens per event from which events hold several, and the number of events below which the first one matters.
SEVERAL_TOKENS, FEW_EVENTS = 1.5, 8
# Tokens that an answer may have besides its text, such as the end of sequence or template markers.
_BESIDE_TEXT = 8
# Number of slices of a level's window, for the interval of its throughput.
_SLICES = 10

CountTokens = Callable[[str], int]


def output_tokens(record: Record, count_tokens: CountTokens | None = None) -> tuple[int, str]:
    """Return N, the number of output tokens, and its source.

    The sources, best first: the server's usage at the end of the answer; the usage of the last chunk that carries a
    token; the text counted by `count_tokens`; the number of chunks, which is too low if chunks hold several tokens.
    """
    chunks = [event for event in record.events if event.kind in (TOKEN, REASONING)]
    if not chunks:
        return 0, CHUNKS
    after = record.events[record.events.index(chunks[-1]) :]
    carried = (TOKEN, REASONING)
    final = [
        e.output_tokens for e in after if e.output_tokens and e.kind != ROLE and (e.kind not in carried or e.finish)
    ]
    if final:
        return final[-1], USAGE
    running = [event.output_tokens for event in chunks if event.output_tokens]
    if running:
        return running[-1], CHUNK_USAGE
    if count_tokens is not None:
        return count_tokens(record.text) + (count_tokens(record.reasoning) if record.reasoning else 0), RETOKENISED
    return len(chunks), CHUNKS


def paced(record: Record, count_tokens: CountTokens | None = None) -> tuple[np.ndarray, float]:
    """Return the time stamps that the pace is measured over, and the number of tokens that followed the first stamp.

    The stamps are those of the answer, whose tokens are all tokens minus those of reasoning. If reasoning is shown but
    its tokens are not counted separately, reasoning and answer count together; without an answer, reasoning alone. The
    first event holds the tokens of the server's running count, or else one; if there are few events of several tokens
    each, its share of the text. If the server counts more tokens than the text can have, each event is one token.
    """
    n, source = output_tokens(record, count_tokens)
    answer = [event for event in record.events if event.kind == TOKEN]
    shown = [event for event in record.events if event.reasoning]
    hidden = last_of(record.events, "reasoning_tokens")
    if beyond_text(record, count_tokens):
        return np.array([event.at_s for event in answer or shown]), float(len(answer or shown) - 1)
    if not answer:
        timed, total = shown, n
    elif isinstance(hidden, int):
        timed, total = answer, n - hidden
    elif not shown:
        timed, total = answer, n
    elif source in (RETOKENISED, CHUNKS):
        timed, total = answer, len(answer) if count_tokens is None else count_tokens(record.text)
    else:
        timed, total = [event for event in record.events if event.kind in (TOKEN, REASONING)], n
    stamps = np.array([event.at_s for event in timed])
    if not timed:
        return stamps, 0.0
    counted = timed[0].output_tokens if source in (USAGE, CHUNK_USAGE) else None
    if total <= len(timed):
        before = 1
    elif counted is not None:
        before = total - (n - counted)
    elif total < SEVERAL_TOKENS * len(timed) or len(timed) >= FEW_EVENTS:
        before = 1
    else:
        lengths = [len(event.text) + len(event.reasoning) for event in timed]
        before = max(1, round(total * lengths[0] / sum(lengths)))
    return stamps, float(max(total - before, 0))


def beyond_text(record: Record, count_tokens: CountTokens | None = None) -> bool:
    """Return whether the server counts more tokens than its text has bytes, or than twice `count_tokens` of it.

    Such a server counts hidden reasoning, or skips tokens, without reporting how many.
    """
    n, source = output_tokens(record, count_tokens)
    if source not in (USAGE, CHUNK_USAGE):
        return False
    apart = last_of(record.events, "reasoning_tokens") or 0
    n -= apart if isinstance(apart, int) else 0
    texts = [record.text, "" if apart else record.reasoning]
    most = 2 * sum(map(count_tokens, texts)) if count_tokens else len("".join(texts).encode())
    return any(texts) and n > most + _BESIDE_TEXT


def at_once(record: Record) -> bool:
    """Return whether a stream was replayed: its chunks arrived faster than any model writes, 0.1 ms each or less."""
    stamps = token_stamps(record)
    return record.form == "json" or (len(stamps) >= 4 and stamps[-1] - stamps[0] < 1e-4 * len(stamps))


def request_table(records: Iterable[Record], count_tokens: CountTokens | None = None) -> pd.DataFrame:
    """Tabulate requests: load, outcome, tokens and METRICS; NaN where a metric has no value.

    A failed request has NaN for every metric, because the time to a failure is not a latency. TPOT and output speed
    need two events that carry tokens, because a single event has no duration.
    """
    rows = [_row(record, count_tokens) for record in records]
    columns = ["level", "index", "phase", "outcome", "status", "detail", "provider", "input_tokens", "output_tokens"]
    columns += ["cached_tokens", "reasoning_tokens", "finish", "model", "form"]
    frame = pd.DataFrame(rows, columns=[*columns, "token_source", "chunks", "cost_usd", *(m for m in METRICS)])
    return frame.drop(columns=["inter_chunk_s", "itl_s"])


def _row(record: Record, count_tokens: CountTokens | None) -> dict[str, object]:
    n, source = output_tokens(record, count_tokens)
    stamps = token_stamps(record)
    row = {
        "level": record.level,
        "index": record.index,
        "phase": record.phase,
        "outcome": record.outcome,
        "status": np.nan if record.status is None else record.status,
        "detail": record.detail,
        "provider": last_of(record.events, "provider"),
        "input_tokens": _number(last_of(record.events, "input_tokens")),
        "output_tokens": n if stamps.size else np.nan,
        "cached_tokens": _number(last_of(record.events, "cached_tokens")),
        "reasoning_tokens": _number(last_of(record.events, "reasoning_tokens")),
        "finish": record.finish,
        "model": last_of(record.events, "model"),
        "form": record.form,
        "token_source": source if stamps.size else "",
        "chunks": stamps.size,
        "cost_usd": _number(last_of(record.events, "cost_usd")),
    }
    if record.outcome != "ok" or record.sent_s is None:
        return row
    sent, first, last = record.sent_s, stamps[0], stamps[-1]
    row["e2e_token_s"], row["e2e_stream_s"] = last - sent, record.ended_s - sent
    if record.connected_s is not None:
        row["connect_s"] = record.connected_s - record.started_s
    if record.headers_s is not None:
        row["headers_s"] = record.headers_s - sent
    if record.scheduled_s is not None:
        row["scheduled_e2e_s"] = last - record.scheduled_s
    if record.form == "json":
        return row
    row["ttft_s"] = first - sent
    if record.scheduled_s is not None:
        row["scheduled_ttft_s"] = first - record.scheduled_s
    for name, found in (
        ("ttft_reasoning_s", (event.at_s for event in record.events if event.reasoning)),
        ("ttft_answer_s", (event.at_s for event in record.events if event.kind == TOKEN)),
    ):
        if (at := next(found, None)) is not None:
            row[name] = at - sent
    timed, after = paced(record, count_tokens)
    if after > 0 and timed[-1] > timed[0] and not at_once(record):
        row["tpot_s"] = (timed[-1] - timed[0]) / after
        row["output_tokens_per_s"] = after / (timed[-1] - timed[0])
    return row


def summary(
    records: Iterable[Record], *, count_tokens: CountTokens | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute mean and percentiles of every metric over the measured requests that succeeded, by level.

    Percentiles interpolate linearly between order statistics. Their bounds are order statistics too, and infinite if
    there are too few requests to bound them (36 for the 90th percentile, 72 for the 95th). Gaps between the chunks of
    one request are dependent, so they count for fewer. The 99th percentile is NaN below 100 samples.

    Returns
    -------
    xarray.Dataset
        ``estimate, ci_low, ci_high, n`` (requests, or gaps between chunks), ``n_requests`` [level, metric, statistic];
        NaN where no request succeeded.
    """
    records = list(records)
    groups = _by_level(records)
    shape = (len(groups), len(METRICS), len(STATISTICS))
    estimate, low, high = np.full((3, *shape), np.nan)
    n, n_requests = np.zeros((2, *shape), np.int64)
    for at, measured in enumerate(groups.values()):
        table = request_table(measured, count_tokens)
        for metric_at, metric in enumerate(METRICS):
            values, owner = _samples(metric, measured, table, count_tokens)
            n[at, metric_at], n_requests[at, metric_at] = len(values), len(np.unique(owner))
            estimate[at, metric_at], low[at, metric_at], high[at, metric_at] = _estimates(values, owner, bootstrap)
    dims = ("level", "metric", "statistic")
    arrays = {"estimate": estimate, "ci_low": low, "ci_high": high, "n": n, "n_requests": n_requests}
    return xr.Dataset(
        {name: (dims, array) for name, array in arrays.items()},
        coords={"level": list(groups), "metric": list(METRICS), "statistic": list(STATISTICS)},
        attrs={
            "statistic": "summary",
            "unit": "seconds, output_tokens_per_s tokens per second",
            "formula": "; ".join(f"{name}: {what}" for name, what in METRICS.items()),
            "p99": f"NaN below {P99_SAMPLES} samples",
            "source": "recorded by mixlens, token counts from "
            + (", ".join(token_sources(records, count_tokens)) or "nowhere"),
            "level": bootstrap.level,
            "interval": f"mean: {Mean.how}; percentiles: order statistics (David and Nagaraja 2003; Woodruff 1952)",
        },
    )


def throughput(
    records: Iterable[Record], *, count_tokens: CountTokens | None = None, level: float = 0.95
) -> pd.DataFrame:
    """Compute the throughput of the system by level: all measured requests over their common time window.

    The window runs from the first measured request sent to the end of the last one. Tokens of failed requests do not
    count. Intervals use batch means: a t interval over the rates of ten slices of the window; NaN below ten successes.

    Returns
    -------
    DataFrame
        level, metric (output_tokens_per_s, requests_per_s), estimate, ci_low, ci_high, n (successes), window_s; NaN
        where no request succeeded.
    """
    rows = []
    for name, measured in _by_level(records).items():
        succeeded = [record for record in measured if record.outcome == "ok" and record.sent_s is not None]
        starts = [record.sent_s for record in measured if record.sent_s is not None]
        if succeeded:
            window = (min(starts), max(record.ended_s for record in measured))
            seconds = window[1] - window[0]
        else:
            window, seconds = (np.nan, np.nan), np.nan
        tokens = [(s, w) for record in succeeded for s, w in _weighted_stamps(record, count_tokens)]
        ends = [(record.ended_s, float(record.rows)) for record in succeeded]
        for metric, marks in (("output_tokens_per_s", tokens), ("requests_per_s", ends)):
            estimate, low, high = _rate(marks, window, len(succeeded), level)
            rows.append((name, metric, estimate, low, high, len(succeeded), seconds))
    columns = ["level", "metric", "estimate", "ci_low", "ci_high", "n", "window_s"]
    return pd.DataFrame(rows, columns=columns)


@dataclass(frozen=True)
class Limits:
    """Latency limits that a request must meet to count towards goodput.

    Parameters
    ----------
    ttft_s : float, optional
        Maximum time to the first token in seconds; None for no limit.
    tpot_s : float, optional
        Maximum time per output token after the first in seconds; None for no limit.
    e2e_token_s : float, optional
        Maximum time to the last token in seconds; None for no limit.

    Raises
    ------
    BadInput
        For a limit that is not above 0.

    Examples
    --------
    >>> ml.bench.Limits(ttft_s=2.0).ttft_s
    2.0
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_token_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.stated.items():
            if not value > 0:
                raise BadInput(
                    f"Cannot limit {name} to {value:g} seconds: no request takes less. Pass a number above 0.",
                    argument=name,
                    value=value,
                )

    @property
    def stated(self) -> dict[str, float]:
        """The limits that are set, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


def goodput(records: Iterable[Record], limits: Limits, *, count_tokens: CountTokens | None = None) -> pd.DataFrame:
    """Compute the share and the rate of measured requests that meet every limit, by level.

    Failed requests meet no limit. An answer of one token meets every limit on TPOT, since it has no time between
    tokens; if TPOT has no value for another reason, the request does not meet the limit.

    Returns
    -------
    DataFrame
        level, good (requests), good_frac, ci_low, ci_high (of good_frac: 95 %, Clopper and Pearson, as if requests were
        independent), good_per_s, n (measured requests); NaN where no request succeeded.

    Raises
    ------
    BadInput
        If `limits` sets no limit.
    """
    if not limits.stated:
        raise BadInput(
            "Cannot compute goodput: no limit is set. Pass at least one, as in Limits(ttft_s=2.0, tpot_s=0.2).",
            argument="limits",
        )
    from scipy.special import betaincinv  # imported here because it takes a quarter of a second

    rows, records = [], list(records)
    windows = throughput(records, count_tokens=count_tokens).set_index("level")["window_s"]
    for name, measured in _by_level(records).items():
        table = request_table(measured, count_tokens)
        kept = table["outcome"] == "ok"
        for metric, limit in limits.stated.items():
            within = table[metric] <= limit
            kept &= within | (table["output_tokens"] == 1) if metric == "tpot_s" else within
        n, good, none = len(table), int(kept.sum()), not (table["outcome"] == "ok").any()
        seconds = float(windows.loc[[name]].iloc[0])
        low = betaincinv(good, n - good + 1, 0.025) if good else 0.0
        high = betaincinv(good + 1, n - good, 0.975) if good < n else 1.0
        numbers = (np.nan,) * 4 if none else (good / n, low, high, good / seconds)
        rows.append((name, good, *numbers, n))
    return pd.DataFrame(rows, columns=["level", "good", "good_frac", "ci_low", "ci_high", "good_per_s", "n"])


def outcomes(records: Iterable[Record]) -> pd.DataFrame:
    """Count requests by level, phase, outcome and status; combinations that did not occur have no row."""
    records = list(records)
    counts = Counter((r.level, r.phase, r.outcome, np.nan if r.status is None else r.status) for r in records)
    levels, kinds = list(dict.fromkeys(r.level for r in records)), list(OUTCOMES)
    rows = sorted(
        ((*key, n) for key, n in counts.items()), key=lambda row: (levels.index(row[0]), row[1], kinds.index(row[2]))
    )
    return pd.DataFrame(rows, columns=["level", "phase", "outcome", "status", "n"])


def token_sources(records: Iterable[Record], count_tokens: CountTokens | None = None) -> dict[str, int]:
    """Count the measured successes by the source of their token counts."""
    measured = (record for record in records if record.outcome == "ok" and record.phase == "measured")
    return dict(Counter(output_tokens(record, count_tokens)[1] for record in measured))


def cached_frac(records: Iterable[Record]) -> dict[str, float]:
    """Return the share of input tokens from a prefix cache, by level; NaN if the server does not count them."""
    found = {}
    for level, measured in _by_level(records).items():
        table = request_table(record for record in measured if record.outcome == "ok")
        known = table.dropna(subset=["cached_tokens", "input_tokens"])
        total = known["input_tokens"].sum()
        found[level] = float(known["cached_tokens"].sum() / total) if total else float("nan")
    return found


def _by_level(records: Iterable[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.phase == "measured":
            groups.setdefault(record.level, []).append(record)
    return groups


def token_stamps(record: Record) -> np.ndarray:
    """Return the arrival times of the events that carry tokens."""
    return np.array([event.at_s for event in record.events if event.kind in (TOKEN, REASONING)])


def _samples(
    metric: str, records: Sequence[Record], table: pd.DataFrame, count_tokens: CountTokens | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of a metric and the request of each value."""
    if metric not in ("inter_chunk_s", "itl_s"):
        values = table[metric].to_numpy(float)
        owner = np.flatnonzero(np.isfinite(values))
        return values[owner], owner
    gaps, owner = [np.empty(0)], [np.empty(0, np.int64)]
    for at, record in enumerate(records):
        stamps = token_stamps(record)
        one_each = metric == "inter_chunk_s" or output_tokens(record, count_tokens)[0] == len(stamps)
        counted = output_tokens(record, count_tokens)[1] != CHUNKS or metric == "inter_chunk_s"
        if record.outcome == "ok" and one_each and counted:
            gaps.append(np.diff(stamps))
            owner.append(np.full(len(stamps) - 1, at))
    return np.concatenate(gaps), np.concatenate(owner)


def _estimates(values: np.ndarray, owner: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    """Return estimate, lower and upper bound [3, statistic], resampling whole requests."""
    result = np.full((3, len(STATISTICS)), np.nan)
    if not len(values):
        return result
    order = np.argsort(values, kind="stable")
    ordered, request = values[order], np.unique(owner, return_inverse=True)[1][order]
    n = np.bincount(request).astype(float)
    result[:, 0] = with_bounds(Mean(leaving_out(np.bincount(request, ordered)), leaving_out(n)), n, bootstrap.level)
    result[0, 1:] = np.quantile(ordered, QUANTILES)
    if len(n) > 1:
        unit = None if len(n) == len(values) else request
        result[1:, 1:] = np.transpose([quantile_bounds(ordered, q, bootstrap.level, unit) for q in QUANTILES])
    if len(values) < P99_SAMPLES:
        result[:, STATISTICS.index("p99")] = np.nan
    return result


def _weighted_stamps(record: Record, count_tokens: CountTokens | None) -> list[tuple[float, float]]:
    stamps, n = token_stamps(record), output_tokens(record, count_tokens)[0]
    if beyond_text(record, count_tokens):
        n = len(stamps)
    hidden = last_of(record.events, "reasoning_tokens")
    if isinstance(hidden, int) and not record.reasoning:  # hidden reasoning did not arrive
        n = max(n - hidden, 0)
    return [(float(stamp), record.rows * n / len(stamps)) for stamp in stamps]


def _rate(
    marks: Sequence[tuple[float, float]], window: tuple[float, float], n: int, level: float
) -> tuple[float, float, float]:
    """Return the weight of the marks per second, with a t interval over the rates of the slices."""
    from scipy.special import stdtrit  # imported here because it takes a quarter of a second

    start, end = window
    if not marks or not end > start:
        return np.nan, np.nan, np.nan
    stamps, weights = np.array(marks).T
    estimate = float(weights.sum() / (end - start))
    if n < _SLICES:
        return estimate, np.nan, np.nan
    slices = np.histogram(stamps, bins=_SLICES, range=(start, end), weights=weights)[0] * _SLICES / (end - start)
    reach = float(stdtrit(_SLICES - 1, (1 + level) / 2) * slices.std(ddof=1) / np.sqrt(_SLICES))
    return estimate, max(estimate - reach, 0.0), estimate + reach


def last_of(events: Sequence[Event], name: str) -> object:
    """Return the last value of a field that is not None among the events; None if there is none."""
    return next((value for event in reversed(events) if (value := getattr(event, name)) is not None), None)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else np.nan
