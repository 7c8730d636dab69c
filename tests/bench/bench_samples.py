"""Benchmarks made of replayed answers, whose every number is known."""

from __future__ import annotations

from dataclasses import replace

from bench_scripts import openai_chat, replay

from mixlens.bench.bench import Bench
from mixlens.bench.events import Record

META = {
    "created": "2026-01-01T00:00:00+00:00",
    "model": {"name": "m"},
    "endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"},
    "price_usd_per_mtok": None,
    "stopped": None,
    "counts": {},
    "versions": {},
}


def record(index: int, level: str = "concurrency 1", *, slower: float = 1.0, start: float = 0.0, **more) -> Record:
    """The scripted answer, sent at `start`, every event `slower` times later."""
    made = replay([(start + slower * at, piece) for at, piece in openai_chat()])
    return replace(made, index=index, level=level, **{"started_s": start, "sent_s": start, "headers_s": start} | more)


def bench(loads: dict[str, list[float]], **meta) -> Bench:
    """One load after the other, its requests one after the other, each so many times slower than the script."""
    records, start = [], 0.0
    for level, slower in loads.items():
        for index, factor in enumerate(slower):
            records.append(record(index, level, slower=factor, start=start))
            start += 1.6 * factor
    return Bench(records, META | meta)
