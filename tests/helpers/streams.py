"""Requests with known clocks: hypothesis strategies for event streams, and what is true of each by its making."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

import mixlens as ml
from helpers.inside import Event, Record

LEVELS = ("concurrency 2", "poisson 2/s")
META = {
    "created": "2026-01-01T00:00:00+00:00",
    "model": {"name": "m"},
    "endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"},
    "price_usd_per_mtok": None,
    "stopped": None,
}


@dataclass(frozen=True)
class Known:
    """A record, and what its stream was made of: stamps of its tokens, how many tokens they are, who says so."""

    record: Record
    stamps: tuple[float, ...]
    n: int
    source: str


@st.composite
def requests(draw: st.DrawFn, level: str = LEVELS[0], index: int = 0, phase: str = "measured") -> Known:
    """A stream that opens with a comment, an empty chunk or a role, and goes on after its last token."""
    step = st.integers(1, 900).map(lambda ms: ms / 1000)
    at = started = index + draw(step)
    connected = at = at + draw(step)
    sent = at = at + draw(step)
    headers = at = at + draw(step)
    events = []
    for kind in draw(st.lists(st.sampled_from(["comment", "role", "other"]), min_size=1, max_size=3)):
        at += draw(step)
        events.append(Event(at, kind))
    stamps = [at := at + draw(step) for _ in range(draw(st.integers(1, 5)))]
    source = draw(st.sampled_from(["usage", "last chunk", "chunk usage", "chunks"]))
    # One token a chunk, or several: the time between chunks is that between tokens in the first case alone.
    n = len(stamps) * draw(st.sampled_from([1, 3])) if source != "chunks" else len(stamps)
    for i, stamp in enumerate(stamps):
        last = i == len(stamps) - 1
        counted = {"output_tokens": n} if last and source in ("last chunk", "chunk usage") else {}
        events.append(Event(stamp, "token", f"t{i} ", **counted, finish="stop" if source == "last chunk" else None))
    at += draw(step)
    events.append(Event(at, "usage", output_tokens=n if source == "usage" else None, input_tokens=7 + index))
    ended = at + draw(step)
    outcome = draw(st.sampled_from(["ok", "ok", "ok", "truncated", "timeout", "http"]))
    record = Record(
        index,
        level,
        phase,
        outcome,
        tuple(events),
        started,
        ended,
        connected_s=draw(st.sampled_from([connected, None])),
        sent_s=sent,
        headers_s=headers,
        scheduled_s=draw(st.sampled_from([started - 0.25, None])),
        status=429 if outcome == "http" else 200,
    )
    return Known(record, tuple(stamps), n, "usage" if source == "last chunk" else source)


@st.composite
def runs(draw: st.DrawFn) -> list[Known]:
    """Two loads, warm-up and measured requests, of which some fail; in no order."""
    keys = [(level, phase, i) for level in LEVELS for phase in ("warm-up", *["measured"] * 3) for i in range(2)]
    kept = [draw(requests(level, i, phase)) for level, phase, i in keys]
    return draw(st.permutations(kept))


def timed(index: int, ttft: float, gap: float, n: int = 5, **more: Any) -> Record:
    """Sent at 100 s a request; n tokens, one a chunk, and 0.05 s of stream after the last."""
    sent = 100.0 * index
    stamps = [sent + ttft + gap * i for i in range(n)]
    events = [Event(sent + ttft / 2, "role"), *(Event(at, "token", "x ") for at in stamps)]
    events.append(Event(stamps[-1] + 0.05, "usage", finish="stop", input_tokens=11, output_tokens=n))
    fields = {"level": "concurrency 1", "phase": "measured", "outcome": "ok"} | more
    return Record(index, events=tuple(events), started_s=sent, ended_s=stamps[-1] + 0.05, sent_s=sent, **fields)


def spread(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """TTFT and gap of n requests, seconds, all different and skewed: no mean is a median, no percentile another."""
    random = np.random.default_rng(seed)
    return random.gamma(1.5, 0.3, n) + 0.01, random.gamma(1.5, 0.02, n) + 0.001


def bench_of(records: list[Record], **meta: Any) -> ml.bench.Bench:
    return ml.bench.Bench(records, META | meta)
