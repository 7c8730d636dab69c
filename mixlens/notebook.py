"""Notebook displays of a trace, an evaluation, a benchmark or a comparison: its summary, then a live view.

The classes do not depend on this module: their `_repr_html_` is the summary alone, which other front ends show.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from mixlens.bench.bench import Bench
    from mixlens.comparison import Comparison
    from mixlens.evals.log import Log
    from mixlens.trace.trace import Trace

_MAX_SEQUENCES, _MAX_TOKENS, _MAX_SAMPLES = 4, 2_000, 200
_MAX_COMPARED = 10_000  # tokens, also of an evaluation's samples; with 32 layers a saved output has 1 MB


def register() -> None:
    """Register the displays with the running notebook, if there is one.

    IPython finds a class by its name, so nothing is imported before an object is displayed. marimo does not use
    IPython's formatters; it calls the class's `_mime_`.
    """
    if shell := sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None:
        formatter = shell.display_formatter.formatters["text/html"]
        for module, name, draw in _DISPLAYS:
            formatter.for_type_by_name(module, name, draw)
    if "marimo" in sys.modules:
        _register_with_marimo()


def trace_html(trace: Trace) -> str:
    """Return the summary and the first sequences token by token, with a note where tokens are cut."""
    from mixlens import view

    summary = trace._repr_html_()
    if not trace.n_tokens or not trace.n_layers:
        return summary + trace.sequences.head(5).to_html(escape=True)
    shown = trace.select(positions=(0, _MAX_TOKENS))
    numbers, tokens = [], 0
    for number, length in trace.sequences["length"].head(_MAX_SEQUENCES).items():
        if numbers and tokens + min(length, _MAX_TOKENS) > _MAX_TOKENS:
            break
        numbers.append(number)
        tokens += min(length, _MAX_TOKENS)
    cut = f"<p>Shown: {len(numbers)} of {len(trace.sequences):,} sequences, their first {_MAX_TOKENS:,} tokens.</p>"
    return summary + cut + view.tokens(shown, numbers)._repr_html_()


def log_html(log: Log) -> str:
    """Return the scores and the first samples, up to 200 samples and 10,000 routed tokens."""
    from mixlens import view

    views = view.samples(log, most=_samples_shown(log))._repr_html_() if len(log.samples) else ""
    return log._repr_html_() + views


def bench_html(bench: Bench) -> str:
    """Return the summary, and latency curves if any measured request succeeded."""
    from mixlens import view

    return bench._repr_html_() + (view.latency(bench)._repr_html_() if bench.succeeded else "")


def comparison_html(data: Comparison) -> str:
    """Return the summary, and the first sequence of both traces side by side, up to 10,000 tokens."""
    from mixlens import view

    summary = data._repr_html_()
    if not data.a.n_tokens:
        return summary
    a, b = (run.select(where=_is_first(run), positions=(0, _MAX_COMPARED)) for run in (data.a, data.b))
    length = int(data.a.sequences["length"].iloc[0])
    if a.n_tokens < length:
        summary += f"<p>Shown: the first {a.n_tokens:,} of {length:,} tokens of the first sequence.</p>"
    first, second = (name.replace("/", "\u2215") for name in data.names)
    names = (first, second) if first != second else (f"{first} (a)", f"{second} (b)")
    return summary + view.diff(a, b, names=names)._repr_html_()


# Module and name of a class, and the function that draws it.
_DISPLAYS = (
    ("mixlens.trace.trace", "Trace", trace_html),
    ("mixlens.evals.log", "Log", log_html),
    ("mixlens.bench.bench", "Bench", bench_html),
    ("mixlens.comparison", "Comparison", comparison_html),
)


def _register_with_marimo() -> None:
    from mixlens.bench.bench import Bench
    from mixlens.comparison import Comparison
    from mixlens.evals.log import Log
    from mixlens.trace.trace import Trace

    draws: dict[type, Any] = {Trace: trace_html, Log: log_html, Bench: bench_html, Comparison: comparison_html}
    for shown, draw in draws.items():
        shown._mime_ = lambda self, draw=draw: ("text/html", draw(self))  # type: ignore[attr-defined]


def _samples_shown(log: Log) -> int:
    """Return the number of samples to show: at least one, and recorded prompts of at most 10,000 tokens."""
    from mixlens.evals.routing import samples_of

    if log.routing is None:
        return _MAX_SAMPLES
    rows = samples_of(log).sequences.astype({"sample_id": str})
    shown = log.samples[["task", "sample_id"]].head(_MAX_SAMPLES).astype({"sample_id": str})
    tokens = shown.merge(rows, "left", ["task", "sample_id"])["length"].fillna(0).cumsum()
    return max(1, int((tokens <= _MAX_COMPARED).sum()))


def _is_first(run: Trace) -> pd.Series:
    number = run.sequences.index.to_series()
    return number == number.iloc[0]
