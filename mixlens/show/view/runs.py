"""Live views that put runs side by side: two recordings of the same tokens, an evaluation and its routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.show import figures, passage, wording
from mixlens.show.packing import pack, token_arrays
from mixlens.show.style import PAGE, drawing, expert_colours, heading, printable
from mixlens.show.taking import takes_run
from mixlens.show.view.base import View, static_form, static_table
from mixlens.show.view.text import domain, first_tokens, label
from mixlens.stats import agreement
from mixlens.traces.trace import Trace

_MOST_STRIP = 40
_SHOWN = ("task", "sample_id", "prompt", "response", "target", "choices", "logprobs", "gold", "correct")
_MOST_SAMPLES, _MOST_TEXT = 2_000, 20_000


def strip(trace: Trace, sequence: int | None = None, *, start: int = 0, count: int = _MOST_STRIP) -> View:
    """Up to 40 tokens of a sequence across and layers down, each cell the expert that was chosen first.

    sequence   sequence number; the first one when not given
    start      position of the first token; `count` follow

    Raises BadInput for a sequence that is not there, or no token in the range.
    """
    number = passage.sequence_number(trace, sequence)
    stop = start + min(count, _MOST_STRIP)
    part = trace.select(where=trace.sequences.index.to_series() == number, positions=(start, stop))
    if not part.n_tokens:
        raise BadInput(
            f"A strip of sequence {number} from position {start} was to be shown. The sequence has "
            f"{trace.sequences['length'].loc[number]} tokens. Give a smaller start.",
            argument="start",
            value=start,
        )
    header, arrays = token_arrays(part, [number])
    header |= {"colours": expert_colours(trace.n_experts), "labels": [label(trace, number)]}
    layer = passage.layer_number(trace, None)
    caption = (
        f"Experts of {part.n_tokens} tokens of {label(trace, number)} in {trace.n_layers} layers of "
        f"{wording.model_name(trace)}; picture and table: layer {layer}."
    )
    one = part.select(layers=[layer])
    drawn = passage.text(part, sequence=number, layer=layer)
    static = static_form(drawn, caption, static_table(first_tokens(one, one.read("expert_id")[:, 0]), "First tokens"))
    return View(f"Strip of {label(trace, number)}", "strip", static, pack(header, arrays))


def diff(
    a: Trace,
    b: Trace,
    sequence: int | Sequence[int] | None = None,
    *,
    layer: int | None = None,
    names: tuple[str, str] = ("first run", "second run"),
) -> View:
    """Two recordings of the same tokens side by side, under one cursor, with what changed outlined.

    sequence   sequence number or numbers; the first one when not given
    layer      layer number to start at; the middle one when not given
    names      what the runs are called, without a slash

    Entropies are not in it: two runs of 10,000 tokens in 32 layers are to fit into 1 MB.

    Raises BadInput where the runs are not of the same tokens, layers and experts.
    """
    given = agreement(a, b)
    wanted = list(sequence) if isinstance(sequence, Sequence | np.ndarray) else [sequence]
    numbers = sorted({passage.sequence_number(a, n) for n in wanted})
    number = passage.layer_number(a, layer)
    if names[0] == names[1] or any("/" in name for name in names):
        raise BadInput(
            f"Two runs were to be called {names}. Names differ and have no slash. Give two others.",
            argument="names",
            value=names,
        )
    header, arrays = _two_runs(names, token_arrays(a, numbers), token_arrays(b, numbers))
    arrays = {key: plane for key, plane in arrays.items() if not key.endswith("/entropy")}
    header |= {
        "colours": expert_colours(a.n_experts),
        "labels": [label(a, n) for n in numbers],
        "domains": [domain(a, n) for n in numbers],
        "layer": int(np.flatnonzero(a.layers == number)[0]),
    }
    title = f"{names[0]} and {names[1]}"
    same = given.sel(measure=["top1", "overlap"])
    caption = f"How far {names[0]} and {names[1]} route the same tokens alike, by layer. {wording.sample(given)}."
    return View(
        title, "diff", static_form(figures.by_layer(same), caption, _agreement_table(same)), pack(header, arrays)
    )


def _two_runs(
    names: tuple[str, str], a: tuple[dict[str, Any], dict[str, Any]], b: tuple[dict[str, Any], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header, and arrays "name/array", of two runs; of what both have, the second's is its difference: it is small."""
    own = {key: value for key, value in b[0].items() if value != a[0].get(key)}
    first = a[1]
    second = {
        key: plane - first[key] if key in first and _alike(plane, first[key]) else plane for key, plane in b[1].items()
    }
    arrays = {f"{name}/{key}": p for name, run in zip(names, (first, second), strict=True) for key, p in run.items()}
    return {**a[0], "runs": list(names), "of": {names[0]: {}, names[1]: own}}, arrays


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.size == b.size


@takes_run("evaluate", "samples", "tasks")
def samples(log: Log, trace: Trace | None = None, *, most: int = _MOST_SAMPLES) -> View:
    """The samples of an evaluation: filter by task and outcome, search, read; with the routing of each prompt.

    log     an evaluation
    most    samples shown, the first ones; the view says so where there are more
    trace   recorded while it ran, with the columns task and sample_id of its sequences; None for the log's own, if any

    Raises BadInput where the log has no samples, or the trace no such columns.
    """
    frame = log.samples
    if not len(frame):
        raise BadInput(
            "Samples were to be shown. The evaluation has none. Run it on at least one sample.",
            argument="log",
            value=0,
        )
    kept = frame.head(most)
    trace = log.routing if trace is None else trace
    rows = [{name: _plain(row.get(name)) for name in _SHOWN} for row in kept.to_dict("records")]
    header: dict[str, Any] = {"rows": rows, "colours": expert_colours(8 if trace is None else trace.n_experts)}
    arrays: dict[str, np.ndarray] = {}
    if trace is not None:
        header |= _routing_of(kept, trace, arrays)
    cut = "" if len(kept) == len(frame) else f"; the first {len(kept):,} are shown"
    unscored = int(frame["correct"].isna().sum())
    header["note"] = (
        f"{_model_of(log)}: n = {wording.counted(f'{len(frame):,}', 'sample')} of "
        f"{wording.counted(str(len(log.tasks)), 'task')}, {unscored:,} not scored{cut}."
    )
    static = static_form(_scores_picture(frame, header["note"]), header["note"], _sample_table(kept))
    return View(f"Samples of {_model_of(log)}", "samples", static, pack(header, arrays))


def _routing_of(frame: pd.DataFrame, trace: Trace, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    missing = [name for name in ("task", "sample_id") if name not in trace.sequences]
    if missing:
        raise BadInput(
            f"Samples were to be shown with their routing. The trace's sequences lack {' and '.join(missing)}. "
            "Record it while evaluating, or give its sequences these columns.",
            argument="trace",
            value=missing,
        )
    if "counted" in trace.sequences:  # of the rows of a sample the one that stands for it
        trace = trace.select(where=trace.sequences["counted"].astype(bool))
    place = {(t, str(s)): i for i, (t, s) in enumerate(zip(frame["task"], frame["sample_id"], strict=True))}
    keys = zip(trace.sequences["task"], trace.sequences["sample_id"], strict=True)
    found = {n: place.get((t, str(s))) for n, (t, s) in zip(trace.sequences.index, keys, strict=True)}
    numbers = sorted(n for n, i in found.items() if i is not None)
    header, planes = token_arrays(trace, numbers)
    arrays |= planes
    return header | {"sample_sequence": [found[n] for n in numbers], "layer": trace.n_layers // 2}


def _plain(value: Any) -> Any:
    """`value` for JSON: NaN is nothing, long text is cut with a word about it."""
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
        ax.barh([printable(name) for name in shown.index], shown.to_numpy(), color=expert_colours(1)[0])
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


def _agreement_table(data: Any) -> str:
    columns = {"layer": [str(layer) for layer in data["layer"].to_numpy()]}
    for measure in data["measure"].to_numpy():
        part = data.sel(measure=measure)
        columns[wording.label(measure)] = [wording.with_interval(part.sel(layer=layer)) for layer in data["layer"]]
    return static_table(columns, "Agreement by layer")
