"""Reports: one self-contained HTML file about one or several runs, written without network access."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from mixlens.bench.report import speed_findings, speed_sections
from mixlens.comparison import Comparison
from mixlens.core import run_dir
from mixlens.core.files import write_file
from mixlens.errors import BadInput, MixlensError
from mixlens.evals.report import (
    score_comparison_findings,
    score_comparison_sections,
    score_findings,
    score_sections,
)
from mixlens.live.page import page
from mixlens.plot import labels
from mixlens.plot.html import escape, paragraphs
from mixlens.pricing.report import tradeoff_sections
from mixlens.registry import open as open_any
from mixlens.reports.analysis import analyse
from mixlens.reports.comparison import (
    comparison_findings,
    comparison_sections,
    impact_findings,
    impact_sections,
    pareto_findings,
    pareto_message,
    pareto_sections,
)
from mixlens.reports.contrast import contrast_findings, contrast_sections, contrast_title
from mixlens.reports.contributions import (
    contribution_findings,
    contribution_sections,
    topk_findings,
    topk_sections,
)
from mixlens.reports.findings import headline
from mixlens.reports.importance import importance_findings, importance_sections
from mixlens.reports.trace import trace_findings, trace_sections
from mixlens.trace.trace import Trace

_LONGEST_LABEL = 60  # characters; beyond it, its beginning and a hash that keeps it apart from others
_MOST_FINDINGS = 5  # at the top
RunOrPath = Trace | xr.Dataset | str | os.PathLike[str]


@dataclass(frozen=True)
class _Part:
    """Report content of one run: findings as (heading, sentence), sections as HTML by heading, and its main message."""

    findings: list[tuple[str, str]]
    sections: Mapping[str, str]
    message: str = ""


_Draw = Callable[[Any, str], _Part]
_Findings = Callable[[Any], list[tuple[str, str]]]


def _trace(trace: Trace, name: str, by: str | None = None) -> _Part:
    analysis = analyse(trace, name, by)
    return _Part(trace_findings(analysis), trace_sections(analysis), headline(analysis))


def _contrast(data: xr.Dataset, name: str) -> _Part:
    return _Part(contrast_findings(data), contrast_sections(data, name), contrast_title(data))


def _of(
    sections: Callable[[Any, str], Mapping[str, str]], findings: _Findings, message: Callable[[Any], str] = lambda _: ""
) -> _Draw:
    return lambda run, name: _Part(findings(run), sections(run, name), message(run))


_SUBJECTS = {
    "bench": "speed",
    "eval": "benchmark scores",
    "eval comparison": "benchmark scores",
    "importance": "importance of experts",
    "contributions": "contributions of experts",
    "topk": "experts per token",
    "impact": "quantization",
    "pareto": "quantization schemes",
}
# For each kind of run, the function that turns a run and its name into a part of the report.
_KINDS: Mapping[str, _Draw] = {
    "trace": _trace,
    "importance": _of(importance_sections, importance_findings),
    "contributions": _of(contribution_sections, contribution_findings),
    "topk": _of(topk_sections, topk_findings),
    "bench": _of(speed_sections, speed_findings),
    "eval": _of(score_sections, score_findings),
    "eval comparison": _of(score_comparison_sections, score_comparison_findings),
    "comparison": _of(comparison_sections, comparison_findings),
    "impact": _of(impact_sections, impact_findings),
    "pareto": _of(pareto_sections, pareto_findings, pareto_message),
    "contrast": _contrast,
}


def report(
    runs: RunOrPath | Sequence[RunOrPath],
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    names: Sequence[str] | None = None,
    by: str | None = None,
) -> Path:
    """Write one HTML file with summary, figures, live text, tables, methods and provenance of `runs`.

    The page loads nothing and opens offline. It lists each statistic whose signal is missing, with the reason.

    Parameters
    ----------
    runs : Trace, Dataset, other run, str or path-like, or a sequence of these
        A trace, an evaluation, a benchmark, a comparison, the result of `ml.stats.contrast` or of a function
        ``measure_...`` of `ml.experiments`, the folder of one of these, or several of them.
    path : str or path-like
        Path of the file, which is overwritten.
    title : str, optional
        Heading. By default the message of a single run, where one was computed; else its subject and model.
    names : sequence of str, optional
        A name for each run. By default those of their folders.
    by : str, optional
        Column of the documents by which statistics of traces are grouped. By default `domain`, or else the first column
        with at most 20 values that documents share.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    BadInput
        If there are no runs, `names` are not as many as runs, a trace cannot be grouped by `by`, a run is of another
        kind or has no tokens, or `path` is not a file in an existing folder.
    RunError
        If a run cannot be opened, or the file cannot be written; one that was there is then kept.

    Examples
    --------
    >>> short = ml.RecordSettings(max_length=8, overlong="truncate", progress=False)
    >>> measured = ml.experiments.measure_topk(model, documents[:1], ks=(1, 2), settings=short)
    >>> ml.report(measured, tmp / "report.html", title="One expert or two").name
    'report.html'
    """
    given: list[Any] = list(runs) if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]
    if not given:
        raise BadInput(
            "Cannot write a report: no runs. Pass a trace, a run folder, or a list of them.",
            argument="runs",
            value=0,
        )
    check_path(path)
    if names is not None and (isinstance(names, str) or len(names) != len(given)):
        raise BadInput(
            f"Cannot name {len(given)} runs {names!r}: each takes one name. Pass a list of {len(given)} names.",
            argument="names",
            value=names,
        )
    called = [None] * len(given) if names is None else [str(name) for name in names]

    def whole() -> str:
        return _whole([_open(run, i, name) for i, (run, name) in enumerate(zip(given, called, strict=True))], title, by)

    return write_file(path, whole)


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise BadInput if no report can be written there."""
    if Path(path).is_dir() or not Path(path).parent.is_dir():
        raise BadInput(
            f"Cannot write a report to {path}: it is a folder, or its folder does not exist. "
            "Pass the path of a file in an existing folder.",
            argument="path",
            value=str(path),
        )


def _whole(opened: list[tuple[str, Any, str]], title: str | None, by: str | None) -> str:
    blocks: list[tuple[str, str]] = []
    found: list[list[tuple[str, str]]] = []
    messages = []
    for kind, run, name in opened:
        prefix = f"{name}: " if len(opened) > 1 else ""
        part = _trace(run, name, by) if kind == "trace" else _KINDS[kind](run, name)
        blocks += [(prefix + heading, html) for heading, html in part.sections.items()]
        found.append([(prefix + heading, prefix + sentence) for heading, sentence in part.findings])
        messages.append(part.message)
    blocks += tradeoff_sections([run for kind, run, _ in opened if kind in ("bench", "eval")]).items()
    blocks += _comparisons([run for run in opened if run[0] == "trace"])
    models = dict.fromkeys(_model(run) for _, run, _ in opened)
    subject = ", ".join(dict.fromkeys(_SUBJECTS.get(kind, "routing") for kind, _, _ in opened)).capitalize()
    about_what = f"{subject} of {' and '.join(models)}"
    title = title or (messages[0] if len(messages) == 1 else "") or about_what
    in_turn = [finding for turn in zip_longest(*found) for finding in turn if finding is not None]
    return _page(title, about_what, in_turn[:_MOST_FINDINGS], [block for block in blocks if block[1]])


def _open(run: RunOrPath, number: int, called: str | None) -> tuple[str, Any, str]:
    """Return (kind, run, name); the name is `called` where the caller gave one."""
    opened = _with_short_labels(open_any(run) if isinstance(run, str | os.PathLike) else run)
    kind = "trace" if isinstance(opened, Trace) else str(getattr(opened, "kind", ""))
    if isinstance(opened, xr.Dataset) and opened.attrs.get("statistic") == "contrast":
        kind = "contrast"
    if kind not in _KINDS:
        raise BadInput(
            f"Cannot write a report: got {type(opened).__name__}{f' ({kind})' if kind else ''}, but reports take "
            f"{', '.join(_KINDS)}. Pass what was recorded or measured, such as ml.record(...), or its folder.",
            argument="runs",
            value=type(opened).__name__,
        )
    if isinstance(opened, Trace) and not opened.n_tokens:
        raise BadInput(
            f"Cannot write a report on {_name(opened, number, kind)}: it has no tokens. Record some text first.",
            argument="runs",
            value=0,
        )
    own = Path(run).name if isinstance(run, str | os.PathLike) else _name(opened, number, kind)
    return kind, opened, own if called is None else called


def _with_short_labels(run: Any) -> Any:
    """Shorten labels of documents to a readable length, because a figure draws each of them many times."""
    if isinstance(run, Trace):
        short = {str(name): _short_labels(column) for name, column in run.sequences.items()}
        run = copy(run)
        run.sequences = run.sequences.assign(**short)
    elif isinstance(run, xr.Dataset):
        names = [str(name) for name in run.coords if run[name].dims == ("document",)]
        run = run.assign_coords({n: ("document", _short_labels(pd.Series(run[n].values)).to_numpy()) for n in names})
    return run


def _short_labels(column: pd.Series) -> pd.Series:
    def short(value: Any) -> Any:
        if not isinstance(value, str) or len(value) <= _LONGEST_LABEL:
            return value
        return f"{value[:_LONGEST_LABEL]}… ({hashlib.sha256(value.encode('utf-8', 'replace')).hexdigest()[:8]})"

    return column if pd.api.types.is_numeric_dtype(column) else column.map(short)


def _model(run: Any) -> str:
    if isinstance(run, Trace):
        return labels.model_name(run)
    return Path(str(run.attrs["model"] if isinstance(run, xr.Dataset) else run.meta["model"]["name"])).name


def _name(run: Any, number: int, kind: str) -> str:
    path = getattr(run, "path", None)
    return path.name if path is not None else f"{kind} {number + 1}"


def _comparisons(opened: list[tuple[str, Trace, str]]) -> list[tuple[str, str]]:
    """Compare the first trace with every other one of the same text."""
    if not opened:
        return []
    (_, first, first_name), *others = opened
    blocks = []
    for _, other, name in others:
        heading = f"{first_name} and {name}"
        try:
            compared = Comparison(first, other, names=(first_name, name))
            blocks += [(heading, html) for html in comparison_sections(compared).values()]
        except MixlensError as error:
            blocks.append((heading, paragraphs(f"Not computed: {error}")))
    return blocks


def _page(title: str, about: str, findings: list[tuple[str, str]], blocks: list[tuple[str, str]]) -> str:
    links = "".join(f'<li><a href="#s{i}">{escape(heading)}</a></li>' for i, (heading, _) in enumerate(blocks))
    places = {heading: f"s{i}" for i, (heading, _) in reversed(list(enumerate(blocks)))}
    body = "".join(
        f'<section id="s{i}"><h2>{escape(heading)}</h2>{html}</section>' for i, (heading, html) in enumerate(blocks)
    )
    said = "".join(
        f'<li>{escape(sentence)} <a href="#{places[heading]}">Figures: {escape(heading)}</a></li>'
        for heading, sentence in findings
        if heading in places
    )
    lead = f"{about}. mixlens {run_dir.versions('mixlens').get('mixlens', '')}, {run_dir.now()}"
    summary = f'<h2 class="first">Findings</h2><ol class="findings">{said}</ol>' if said else ""
    return page(
        title,
        f'<nav aria-label="sections"><ul>{links}</ul></nav>'
        f'<main><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{summary}{body}</main>',
    )
