"""Report sections on an evaluation, and on two evaluations of the same samples."""

from __future__ import annotations

import json

import pandas as pd

from mixlens.evals.figures import paired_differences, score_table, scores
from mixlens.evals.log import Log
from mixlens.evals.paired import LogComparison
from mixlens.evals.routing import sample_share
from mixlens.plot.bars import expert_share_grid
from mixlens.plot.html import bullets, details, escape, paragraphs, picture
from mixlens.plot.tables import html_table

_MOST_SAMPLES, _MOST_CHARACTERS = 40, 600


def score_sections(log: Log, _name: str = "") -> dict[str, str]:
    """Return scores beside published ones, subjects, some samples, their routing, and provenance as HTML, by title."""
    several = len(log.tasks) > 1
    caption = "Scores with 95 % intervals, and published ones of the same protocol."
    html = paragraphs(*log.remarks()) + picture(scores(log), caption, caption) + frame_table(score_table(log), "Scores")
    if several:
        text = "Scores of every task with 95 % intervals."
        html += details("Every task", picture(scores(log, subjects=True), text, text))
    if len(near := log.near_ties):
        lead = f"{len(near)} samples whose two likeliest choices lie within 1e-4: rounding decides between them."
        shown = near.head(_MOST_SAMPLES).assign(gap=near["gap"].map("{:.1e}".format))
        html += details("Near ties", paragraphs(lead) + frame_table(_cut(shown), "Near ties"))
    sections = {"Benchmark scores": html}
    if log.routing is not None:
        sections["Routing of the samples"] = _routing(log)
    sections["Samples"] = _samples(log.samples)
    provenance = {key: log.meta.get(key) for key in ("created", "model", "settings", "tasks", "versions")}
    kept = f"<pre>{escape(json.dumps(provenance, indent=1, ensure_ascii=False))}</pre>"
    sections["How it was evaluated"] = details("Model, settings, tasks and versions", kept)
    return sections


def score_findings(log: Log) -> list[tuple[str, str]]:
    """Return every score with its interval and n, with the heading of its section."""
    rows = score_table(log).to_dict("records")
    said = [f"{row['benchmark']} ({row['protocol']}): {row['score, %']} %, n = {row['n']:,} samples." for row in rows]
    return [("Benchmark scores", sentence) for sentence in said]


def score_comparison_findings(compared: LogComparison) -> list[tuple[str, str]]:
    """Return the verdict on every benchmark, with the heading of its section."""
    return [("Paired comparison", sentence) for sentence in compared.verdicts()]


def score_comparison_sections(compared: LogComparison, _name: str = "") -> dict[str, str]:
    """Return the paired comparison and the samples that flipped as HTML, by title."""
    text = "Paired differences with intervals."
    table = compared.table.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value)
    html = (
        bullets(compared.verdicts())
        + picture(paired_differences(compared), text, text)
        + frame_table(table, "Paired comparison")
        + paragraphs(*compared.remarks())
    )
    flips = compared.flips
    shown = flips[["task", "sample_id", "change", "prompt", "target", "response_a", "response_b"]].head(_MOST_SAMPLES)
    lead = paragraphs(f"{len(flips)} samples flipped; shown: {len(shown)}.")
    return {"Paired comparison": html, "Flipped samples": lead + frame_table(_cut(shown), "Flipped samples")}


def frame_table(table: pd.DataFrame, caption: str) -> str:
    """Return a sortable table of plain cells."""
    head = "".join(f'<th scope="col"><button type="button">{escape(c)}</button></th>' for c in table.columns)
    rows = table.astype(object).to_numpy().tolist()
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="sortable">'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _samples(samples: pd.DataFrame) -> str:
    """Show the same number of samples of every task, wrong ones first."""
    each = max(1, _MOST_SAMPLES // max(1, samples["task"].nunique()))
    shown = samples.sort_values("correct", kind="stable").groupby("task", sort=False).head(each)
    columns = ["task", "sample_id", "prompt", "target", "response", "correct"]
    lead = paragraphs(f"{len(shown)} of {len(samples)} samples, the wrong ones of every task first.")
    return lead + frame_table(_cut(shown[columns]), "Samples")


def _cut(table: pd.DataFrame) -> pd.DataFrame:
    def short(value: object) -> object:
        long = isinstance(value, str) and len(value) > _MOST_CHARACTERS
        return f"… {value[-_MOST_CHARACTERS:]}" if long and isinstance(value, str) else value

    return table.map(short)


def _routing(log: Log) -> str:
    by = "group" if log.samples["task"].nunique() > 1 else "outcome"
    share, outcome = sample_share(log, by=by), sample_share(log, by="outcome")
    text = f"Share of choices on each expert over the samples, by {by}."
    html = paragraphs(text) + picture(expert_share_grid(share), text, text)
    return html + details("Right against wrong answers", html_table(outcome, "Expert share by outcome"))
