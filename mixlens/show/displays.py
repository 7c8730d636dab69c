"""What a notebook shows of a trace, an evaluation, a benchmark or a comparison: its words, then a live view."""

from __future__ import annotations

from html import escape

import pandas as pd

from mixlens.bench.bench import Bench
from mixlens.comparing import Comparison
from mixlens.evals.log import Log
from mixlens.evals.routing import samples_of
from mixlens.show import view
from mixlens.traces.trace import Trace

_MOST_SEQUENCES, _MOST_TOKENS, _MOST_SAMPLES = 4, 2_000, 200
_MOST_COMPARED = 10_000  # tokens, also of an evaluation's samples; a saved output of 32 layers then has 1 MB


def trace_html(trace: Trace) -> str:
    """Summary, and the first sequences token by token; a long one is cut, which its label does not hide."""
    words = f"<p>{escape(repr(trace))}</p>"
    if not trace.n_tokens or not trace.n_layers:
        return words + trace.sequences.head(5).to_html(escape=True)
    shown = trace.select(positions=(0, _MOST_TOKENS))
    numbers, tokens = [], 0
    for number, length in trace.sequences["length"].head(_MOST_SEQUENCES).items():
        if numbers and tokens + min(length, _MOST_TOKENS) > _MOST_TOKENS:
            break
        numbers.append(number)
        tokens += min(length, _MOST_TOKENS)
    cut = f"<p>Shown: {len(numbers)} of {len(trace.sequences):,} sequences, their first {_MOST_TOKENS:,} tokens.</p>"
    return words + cut + view.tokens(shown, numbers)._repr_html_()


def log_html(log: Log, words: str) -> str:
    """`words`, and the first samples, as many as have so many routed tokens; what is cut, the view says."""
    return words + (view.samples(log, most=_samples_shown(log))._repr_html_() if len(log.samples) else "")


def bench_html(bench: Bench, words: str) -> str:
    """`words`, and latency curves where a measured request succeeded."""
    return words + (view.latency(bench)._repr_html_() if bench.succeeded else "")


def comparison_html(data: Comparison, words: str) -> str:
    """`words`, and the first sequence of the two traces side by side; a very long one is cut."""
    if not data.a.n_tokens:
        return words
    a, b = (run.select(where=_is_first(run), positions=(0, _MOST_COMPARED)) for run in (data.a, data.b))
    length = int(data.a.sequences["length"].iloc[0])
    if a.n_tokens < length:
        words += f"<p>Shown: the first {a.n_tokens:,} of {length:,} tokens of the first sequence.</p>"
    first, second = (name.replace("/", "\u2215") for name in data.names)
    names = (first, second) if first != second else (f"{first} (a)", f"{second} (b)")
    return words + view.diff(a, b, names=names)._repr_html_()


def _samples_shown(log: Log) -> int:
    """Number of the first samples whose recorded prompts have 10,000 tokens at most; one at least."""
    if log.routing is None:
        return _MOST_SAMPLES
    rows = samples_of(log).sequences.astype({"sample_id": str})
    shown = log.samples[["task", "sample_id"]].head(_MOST_SAMPLES).astype({"sample_id": str})
    tokens = shown.merge(rows, "left", ["task", "sample_id"])["length"].fillna(0).cumsum()
    return max(1, int((tokens <= _MOST_COMPARED).sum()))


def _is_first(run: Trace) -> pd.Series:
    number = run.sequences.index.to_series()
    return number == number.iloc[0]
