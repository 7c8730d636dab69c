"""Remarks on answers that would make a benchmark's numbers misleading, with the share of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from mixlens.bench.events import Record
from mixlens.bench.metrics import (
    CHUNK_USAGE,
    FEW_EVENTS,
    SEVERAL_TOKENS,
    USAGE,
    at_once,
    beyond_text,
    last_of,
    output_tokens,
    request_table,
    token_stamps,
)
from mixlens.endpoints.endpoint import same_model
from mixlens.endpoints.protocols import TOKEN, calls_tool, is_cut, is_filtered, is_unknown


def unfinished(records: Iterable[Record]) -> int:
    """Count measured successes without a finish reason if any success has one; the server may have cut them off."""
    good = [(r.phase, any(event.finish for event in r.events)) for r in records if r.outcome == "ok"]
    return good.count(("measured", False)) if any(named for _, named in good) else 0


def shares(records: Iterable[Record], asked: str | None = None) -> list[str]:
    """Return one sentence for each kind of measured answer that can mislead, with its count.

    asked  the requested model
    """
    good = [record for record in records if record.phase == "measured" and record.outcome == "ok"]
    table = request_table(good)

    def told(n: int, what: str) -> list[str]:
        return [f"{what}: {n} of {len(good)} answers."] if n else []

    answered = Counter(name for name in table["model"] if isinstance(name, str)) if asked else Counter()
    others = ", ".join(f"{name} ({n})" for name, n in answered.items() if not same_model(name, asked or ""))
    given, cached = table["input_tokens"].sum(), table["cached_tokens"].sum()
    hidden = [r for r in good if (last_of(r.events, "reasoning_tokens") or 0) != 0 and not r.reasoning]
    ends = Counter(r.finish for r in good if is_unknown(r.finish))
    return [
        *told(sum(is_cut(r.finish) for r in good), "Cut at the length limit"),
        *told(sum(is_filtered(r.finish) for r in good), "Cut by a content filter, or refused"),
        *told(sum(calls_tool(r.finish) for r in good), "Called a tool, whose name and arguments count as text"),
        *(
            told(ends.total(), f"Ended for a reason that may mean truncation ({', '.join(map(str, ends))})")
            if ends
            else []
        ),
        *told(sum(not r.text for r in good), "Reasoning without an answer"),
        *told(len(hidden), "Billed for hidden reasoning, which no rate includes"),
        *told(sum(r.form == "json" for r in good), "Not streamed, so without a time to first token"),
        *told(sum(r.form != "json" and at_once(r) for r in good), "Sent all at once, so without a TPOT"),
        *told(
            sum(map(clumped, good)), "Sent in clumps, with most gaps near zero, so TPOT measures the sender's buffering"
        ),
        *told(
            sum(map(beyond_text, good)),
            "Counted by the server with more tokens than the text can have, so each event counts as one token",
        ),
        *told(
            sum(map(_in_chunks, good)),
            "Counted with several tokens per event; the first event counts as one token, or with fewer than "
            f"{FEW_EVENTS} events as its share of the text. Hidden reasoning looks the same",
        ),
        *told(sum(map(_undercounted, good)), "Counted by the server with fewer tokens than events with text"),
        *told(sum(map(_repeating, good)), "Every event repeats the previous text, so the text is too long"),
        *([f"Answered by a model other than {asked}: {others}."] if others else []),
        *([f"From the server's prefix cache: {cached / given:.0%} of the input tokens."] if cached else []),
    ]


def clumped(record: Record) -> bool:
    """Return whether most gaps between the chunks of a stream are near zero, as if a proxy buffers it."""
    gaps = np.diff(token_stamps(record))
    return len(gaps) >= 8 and not at_once(record) and bool((gaps < 0.1 * gaps.mean()).mean() > 0.5)


def _in_chunks(record: Record) -> bool:
    n, source = output_tokens(record)
    chunks, apart = token_stamps(record).size, last_of(record.events, "reasoning_tokens")
    running = any(event.output_tokens for event in record.events if event.kind == TOKEN)
    if source != USAGE or running or chunks < 2 or at_once(record) or beyond_text(record):
        return False
    return n - (apart if isinstance(apart, int) else 0) >= SEVERAL_TOKENS * chunks


def _undercounted(record: Record) -> bool:
    n, source = output_tokens(record)
    return source in (USAGE, CHUNK_USAGE) and n < token_stamps(record).size


def _repeating(record: Record) -> bool:
    """Return whether each of at least four events begins with the text of the previous one."""
    texts = [event.text for event in record.events if event.kind == TOKEN]
    return len(texts) >= 4 and all(after != before and after.startswith(before) for before, after in pairwise(texts))
