"""Live view of the samples of an evaluation, with the routing of each prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.live.payload import pack, token_arrays
from mixlens.live.view import View, static_form, static_table
from mixlens.plot import labels
from mixlens.plot.checks import takes_run
from mixlens.plot.colours import SERIES_COLOURS, expert_colours
from mixlens.plot.style import PAGE, drawing, heading, printable
from mixlens.trace.trace import Trace

_SHOWN = ("task", "sample_id", "prompt", "response", "target", "choices", "logprobs", "gold", "correct")
_MOST_SAMPLES, _MOST_TEXT = 2_000, 20_000


@takes_run("evaluate", "samples", "tasks")
def samples(log: Log, trace: Trace | None = None, *, most: int = _MOST_SAMPLES) -> View:
    """Show the samples of an evaluation, with filters by task and outcome, a search and the routing of each prompt.

    Parameters
    ----------
    log : Log
        An evaluation with at least one sample.
    trace : Trace, optional
        Recorded during the evaluation, with the columns task and sample_id in its sequences. By default the log's own
        trace, if it has one.
    most : int, optional
        Maximum number of samples; the first ones are shown, and the view states if there are more.

    Returns
    -------
    View

    Raises
    ------
    BadInput
        If `log` is not an evaluation or has no samples, or the trace lacks the columns.

    Examples
    --------
    >>> log = ml.evaluate(model, ["demo"], limit=1)
    >>> ml.view.samples(log)
    View: Samples of demo
    """
    frame = log.samples
    if not len(frame):
        raise BadInput(
            "Cannot show samples: the evaluation has none. Run it on at least one sample.",
            argument="log",
            value=0,
        )
    kept = frame.head(most)
    trace = log.routing if trace is None else trace
    rows = [{name: _plain(row.get(name)) for name in _SHOWN} for row in kept.to_dict("records")]
    header: dict[str, Any] = {
        "title": "Samples",
        "rows": rows,
        "colours": expert_colours(8 if trace is None else trace.n_experts),
    }
    arrays: dict[str, np.ndarray] = {}
    if trace is not None:
        header |= _routing_of(kept, trace, arrays)
    cut = "" if len(kept) == len(frame) else f"; the first {len(kept):,} are shown"
    unscored = int(frame["correct"].isna().sum())
    header["note"] = (
        f"{_model_of(log)}: n = {labels.counted(f'{len(frame):,}', 'sample')} of "
        f"{labels.counted(str(len(log.tasks)), 'task')}, {unscored:,} not scored{cut}."
    )
    static = static_form(_scores_picture(frame, header["note"]), header["note"], _sample_table(kept))
    return View(f"Samples of {_model_of(log)}", "samples", static, pack(header, arrays))


def _routing_of(frame: pd.DataFrame, trace: Trace, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    missing = [name for name in ("task", "sample_id") if name not in trace.sequences]
    if missing:
        raise BadInput(
            f"Cannot show samples with their routing: the trace's sequences lack {' and '.join(missing)}. "
            "Record the trace while evaluating, or add these columns to its sequences.",
            argument="trace",
            value=missing,
        )
    if "counted" in trace.sequences:  # keep the one row that represents each sample
        trace = trace.select(where=trace.sequences["counted"].astype(bool))
    place = {(t, str(s)): i for i, (t, s) in enumerate(zip(frame["task"], frame["sample_id"], strict=True))}
    keys = zip(trace.sequences["task"], trace.sequences["sample_id"], strict=True)
    found = {n: place.get((t, str(s))) for n, (t, s) in zip(trace.sequences.index, keys, strict=True)}
    numbers = sorted(n for n, i in found.items() if i is not None)
    header, planes = token_arrays(trace, numbers)
    arrays |= planes
    return header | {"sample_sequence": [found[n] for n in numbers], "layer": trace.n_layers // 2}


def _plain(value: Any) -> Any:
    """Convert `value` for JSON: NaN becomes null, and long text is cut with a note of its length."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and np.isnan(value):
        return None
    if isinstance(value, str) and len(value) > _MOST_TEXT:
        return f"{value[:_MOST_TEXT]}… ({len(value):,} characters)"
    return [_plain(v) for v in value] if isinstance(value, list | tuple | np.ndarray) else value


def _model_of(log: Log) -> str:
    model = log.meta.get("model", "a model")
    return str(model.get("name", "a model") if isinstance(model, dict) else model)


def _scores_picture(frame: pd.DataFrame, note: str) -> Any:
    means = frame.groupby("task", sort=False)["correct"].mean()
    with drawing(None, PAGE * 0.7, 0.9 + 0.22 * min(len(means), 30)) as ax:
        shown = means.head(30)[::-1]
        ax.barh([printable(name) for name in shown.index], shown.to_numpy(), color=SERIES_COLOURS[0])
        ax.set_xlim(0, 1)
        ax.set_xlabel("mean of the primary metric")
        heading(ax, "Scores by task", note)
    return ax


def _sample_table(frame: pd.DataFrame, rows: int = 8) -> str:
    shown = frame.head(rows)
    columns = {
        name: [_cut(value) for value in shown[name]]
        for name in ("task", "sample_id", "response", "target", "correct")
        if name in shown
    }
    return static_table(columns, f"First {len(shown)} of {len(frame):,} samples")


def _cut(value: Any) -> str:
    text = "–" if value is None or (isinstance(value, float) and np.isnan(value)) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
