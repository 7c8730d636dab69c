"""Published scores with their sources, and their comparison with evaluations under the same protocol."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.evals.protocols import near, tasks_folder
from mixlens.evals.scoring import primary_rows

COLUMNS = [
    "model", "quantization", "benchmark", "protocol", "shots", "split", "metric", "scorer", "average", "score", "n",
    "source", "page", "status", "note",
]  # fmt: skip
# Parts of a protocol that must agree; most sources do not state the last two.
_PARTS = ("protocol", "shots", "split", "metric", "n", "scorer", "average")
_SELDOM_STATED = ("scorer", "average")
BESIDE = [
    "benchmark", "protocol", "metric", "score", "ci_low", "ci_high", "n", "published", "published_protocol",
    "comparable", "why_not", "difference", "source", "status", "quantization", "note",
]  # fmt: skip


def references(model: str | None = None, *, benchmark: str | None = None) -> pd.DataFrame:
    """Return published scores in percent (perplexities unscaled), with conflicting sources side by side.

    Parameters
    ----------
    model : str, optional
        Name on the Hub, such as "mistralai/Mixtral-8x7B-v0.1". By default all models.
    benchmark : str, optional
        Name of the benchmark, such as "mmlu". By default all benchmarks.

    Returns
    -------
    DataFrame
        model, quantization, benchmark, protocol, shots, split (scored split), metric (name in the task file), scorer
        (grading program), average ("macro" if stated), score, n (number of questions), source, page (table, figure or
        configuration in the source), status ("official", "reproduction" or "quantized") and note. Values that the
        source does not state are None or NaN.

    Raises
    ------
    BadInput
        If there are no scores of the model or the benchmark.

    Examples
    --------
    >>> ml.evals.references("mistralai/Mixtral-8x7B-v0.1", benchmark="mmlu")["score"].max()
    np.float64(71.34)
    """
    entries = json.loads((tasks_folder() / "references.json").read_text("utf-8"))["entries"]
    frame = pd.DataFrame(entries, columns=COLUMNS).astype({"score": float, "n": float, "shots": float})
    for column, asked in (("model", model), ("benchmark", benchmark)):
        if asked is None:
            continue
        known = sorted(frame[column].unique())
        chosen = frame[column].map(_plain) == _plain(asked)
        if not chosen.any():
            raise BadInput(
                f"Cannot find published scores of the {column} {asked!r}{near(asked, known)}. Pass one of "
                f"{', '.join(known)}.",
                argument=column,
                value=asked,
            )
        frame = frame[chosen]
    return frame.reset_index(drop=True)


def beside(log: Log, *, model: str | None = None) -> pd.DataFrame:
    """Compare every score with the published ones, or state why they are not comparable.

    A published score is comparable if its source states protocol, shots, split, metric and number of questions, and all
    of them agree with the log; if no limit left out samples; and if no chat endpoint put its template around the
    prompts. The grading program and, for a benchmark with several tasks, the kind of average must not differ either; if
    the source does not state them, as is common in papers, `note` says so.

    Parameters
    ----------
    log : Log
        The evaluation.
    model : str, optional
        Model of the published scores. By default the evaluated model, found by its name.

    Returns
    -------
    DataFrame
        One row per score and published score, in percent: benchmark, protocol, metric, score, ci_low, ci_high, n,
        published (NaN if there is none), published_protocol, comparable, why_not (differing and unknown parts),
        difference (NaN unless comparable), source, status, quantization, note.

    Examples
    --------
    >>> log = ml.evaluate(model, ["demo"], limit=1, settings=ml.evals.EvalSettings(progress=False))
    >>> ml.evals.beside(log)["comparable"].tolist()
    [False]
    """
    name = str(model or log.meta["model"]["name"])
    entries = references()
    entries = entries[entries["model"].map(_plain) == _plain(name)]
    rows = []
    for score in primary_rows(log.scores, log.meta["tasks"]):
        percent = {key: 100 * score[key] for key in ("score", "ci_low", "ci_high")}
        row = {key: score[key] for key in ("benchmark", "protocol", "metric", "average", "n")} | percent
        found = entries[entries["benchmark"] == score["benchmark"]].to_dict("records")
        for entry in found:
            stated = _as_stated(log, score, entry)
            rows.append(row | stated | _compared(log, row | stated, {str(k): v for k, v in entry.items()}))
        if not found:
            rows.append(row | {"comparable": False, "why_not": f"no published score of {name}"})
    return pd.DataFrame(rows, columns=BESIDE)


def _as_stated(log: Log, score: dict[str, Any], entry: dict[Any, Any]) -> dict[str, Any]:
    """Return the score of the log under the metric and average stated by a source, if the log has it."""
    wanted = {key: entry[key] if isinstance(entry[key], str) else score[key] for key in ("metric", "average")}
    if all(score[key] == value for key, value in wanted.items()):
        return {}
    rows = log.scores
    for key, value in ({"protocol": score["protocol"], "benchmark": score["benchmark"]} | wanted).items():
        rows = rows[rows[key] == value]
    if len(rows) != 1:
        return {}
    return wanted | {key: 100 * rows[key].iloc[0] for key in ("score", "ci_low", "ci_high")}


def _compared(log: Log, row: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    reasons = []
    limit = log.meta["settings"].get("limit")
    asked_by = (log.meta["model"].get("endpoint") or {}).get("protocol", "openai-completions")
    if asked_by != "openai-completions":
        reasons.append(f"asked by {asked_by}: the server's chat template is around the prompt")
    if limit is not None:
        reasons.append(f"only the first {limit} samples of every task")
    about = next(task for task in log.meta["tasks"].values() if task["protocol"] == row["protocol"])
    ours = {part: about.get(part) for part in _PARTS} | {part: row[part] for part in ("protocol", "metric", "n")}
    ours["average"] = row["average"]
    # The average matters only for a benchmark with several tasks.
    skipped = {"average": not row["average"], "n": limit is not None}
    ours = {part: mine for part, mine in ours.items() if not skipped.get(part)}
    known = {part: (entry[part], mine) for part, mine in ours.items() if _stated(entry[part]) and _stated(mine)}
    reasons += [f"published {part} is {_shown(theirs)}" for part, (theirs, mine) in known.items() if theirs != mine]
    lacking = [part for part in ours if not _stated(entry[part])]
    unstated = f"not stated by the source: {', '.join(lacking)}" if lacking else ""
    if set(lacking) - set(_SELDOM_STATED):
        reasons.append(unstated)
    if lacking := [part for part, mine in ours.items() if not _stated(mine)]:
        reasons.append(f"not known of this evaluation: {', '.join(lacking)}")
    return {
        "published": entry["score"],
        "published_protocol": entry["protocol"],
        "comparable": not reasons,
        "why_not": "; ".join(reasons),
        "difference": float("nan") if reasons else row["score"] - entry["score"],
        **{key: entry[key] for key in ("source", "status", "quantization")},
        "note": "; ".join(filter(None, [entry["note"] if _stated(entry["note"]) else "", unstated])),
    }


def _stated(value: Any) -> bool:
    return value is not None and value == value


def _shown(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _plain(name: str) -> str:
    """Return a name in lower case without owner and folder."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower()
