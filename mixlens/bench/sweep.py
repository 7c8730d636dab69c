"""load_sweep and knee: find the load beyond which an endpoint gains more latency than throughput."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pandas as pd

from mixlens.bench.bench import Bench
from mixlens.bench.events import Record
from mixlens.bench.load_generator import Level
from mixlens.bench.metrics import output_tokens
from mixlens.bench.prompts import Workload
from mixlens.bench.session import BenchSettings, Session, check_requests, measure
from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.endpoints.endpoint import Endpoint
from mixlens.endpoints.protocols import TOKEN
from mixlens.errors import BadInput

# The sweep ends after this many loads without a new maximum of power; a single fall may be noise.
_FALLS = 2
_WORKLOAD, _SETTINGS = Workload(), BenchSettings()


def load_sweep(
    endpoint: Endpoint,
    *,
    most: int = 64,
    requests: int = 32,
    out: str | os.PathLike[str] | None = None,
    workload: Workload = _WORKLOAD,
    settings: BenchSettings = _SETTINGS,
) -> Bench:
    """Benchmark concurrencies 1, 2, 4, ... until two loads in a row do not exceed the highest power.

    Parameters
    ----------
    endpoint : Endpoint
        The server and its model.
    most : int, optional
        Highest concurrency.
    requests : int, optional
        Measured requests per load, at least twice its concurrency, so that each slot is used twice.
    out, workload, settings : str or os.PathLike, optional
        As in `benchmark`; a cap ends the sweep.

    Returns
    -------
    Bench

    Raises
    ------
    BadInput
        If `most` is below 1.

    Examples
    --------
    >>> bench = ml.bench.load_sweep(ml.Endpoint("http://127.0.0.1:8000/v1", model="mixtral"))  # doctest: +SKIP
    """
    check_requests(requests, settings)
    if most < 1:
        raise BadInput(
            f"Cannot sweep up to concurrency {most}: the lowest concurrency is 1. Pass 1 or more.",
            argument="most",
            value=most,
        )
    plan = {"sweep": {"most": most, "falls": _FALLS}, "requests": requests}
    loads = [2**i for i in range(most.bit_length()) if 2**i <= most]
    total = sum(max(requests, 2 * n) for n in loads)
    with Session(endpoint, plan, out=out, workload=workload, settings=settings, total=total) as session:
        if session.opened is not None:
            return session.opened

        async def doubling() -> None:
            powers: list[float] = []
            for n in loads:
                level = Level(concurrency=n)
                await session.driver.run([level], max(requests, 2 * n), settings.warmup)
                assert session.kept is not None
                powers.append(
                    _power([r for r in session.kept.records if r.level == level.name and r.phase == "measured"])
                )
                best = int(np.nanargmax(powers)) if np.isfinite(powers).any() else 0
                if session.caps.stopped or len(powers) - 1 - best >= _FALLS or not np.isfinite(powers[-1]):
                    return

        [bench] = measure([session], doubling)
        return bench


def knee(bench: Bench, *, bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
    """Find the load with the highest power, where throughput costs the least latency.

    power = output tokens per second of the system / median end-to-end seconds (Kleinrock 1979, "Power and deterministic
    rules of thumb for probabilistic problems in computer communications"). Below the knee, doubling the load almost
    doubles throughput and adds little latency; beyond it, latency almost doubles and throughput hardly grows.
    `chosen_frac` is the share of bootstrap resamples, over requests, in which a load has the highest power: close to 1,
    the knee is clearly separated from its neighbours.

    Parameters
    ----------
    bench : Bench
        The benchmark.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    DataFrame
        level, tokens_per_s, e2e_s, power, chosen_frac, knee (bool), n; NaN if no request succeeded.

    Examples
    --------
    >>> ml.bench.knee(ml.open("runs/sweep"))  # doctest: +SKIP
    """
    levels = list(dict.fromkeys(r.level for r in bench.records if r.phase == "measured"))
    throughput = bench.throughput().query("metric == 'output_tokens_per_s'")
    rates = dict(zip(throughput["level"], throughput["estimate"].to_numpy(float), strict=True))
    rows, drawn = [], []
    for stream, level in enumerate(levels):
        good = [r for r in bench.records if r.level == level and r.phase == "measured" and r.outcome == "ok"]
        times = np.array([_token_time(r) for r in good])
        tokens = np.array([output_tokens(r, bench.count_tokens)[0] for r in good], float)
        rate = rates.get(level, np.nan)
        median = float(np.median(times)) if len(times) else np.nan
        rows.append({"level": level, "tokens_per_s": rate, "e2e_s": median, "power": rate / median, "n": len(good)})
        drawn.append(_resampled_power(times, tokens, rate, bootstrap, stream))
    frame = pd.DataFrame(rows, columns=["level", "tokens_per_s", "e2e_s", "power", "n"])
    powers = np.nan_to_num(np.array(drawn).reshape(len(levels), -1), nan=-1.0)
    chosen = np.bincount(powers.argmax(0), minlength=len(levels)) / powers.shape[1] if len(levels) else []
    known = frame["power"].notna()
    frame.insert(4, "chosen_frac", np.where(known, chosen, np.nan))
    frame.insert(5, "knee", known & (frame["power"] == frame["power"].max()))
    return frame


def _resampled_power(
    times: np.ndarray, tokens: np.ndarray, rate: float, bootstrap: Bootstrap, stream: int
) -> np.ndarray:
    """Return the power in every resample of requests: their rate, estimated as below, over their median time.

    In a closed loop, throughput is the number of slots times tokens per request / seconds per request.
    """
    n = len(times)
    if not n:
        return np.full(bootstrap.replicates, np.nan)
    weights = bootstrap.draw(n, stream)
    at = np.repeat(np.tile(np.arange(n), len(weights)), weights.astype(int).ravel()).reshape(-1, n)
    drawn = rate * (tokens[at].mean(1) / tokens.mean()) * (times.mean() / times[at].mean(1))
    return drawn / np.median(times[at], axis=1)


def _power(records: Sequence[Record]) -> float:
    good = [r for r in records if r.outcome == "ok"]
    if not good:
        return float("nan")
    seconds = max(r.ended_s for r in records) - min(r.sent_s for r in good if r.sent_s is not None)
    tokens = sum(output_tokens(r)[0] for r in good)
    return tokens / seconds / float(np.median([_token_time(r) for r in good]))


def _token_time(record: Record) -> float:
    assert record.sent_s is not None
    return max(event.at_s for event in record.events if event.kind == TOKEN) - record.sent_s
