"""Report section that compares quality, cost and speed."""

from __future__ import annotations

from collections.abc import Sequence

from mixlens.bench.bench import Bench
from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.plot.html import frame_table, paragraphs, picture
from mixlens.pricing.figures import quality_cost_speed
from mixlens.pricing.tradeoff import candidates, frontier


def tradeoff_sections(runs: Sequence[Log | Bench]) -> dict[str, str]:
    """Return the HTML section on quality, cost and speed of evaluated and benchmarked models, by title.

    Empty unless `runs` has both an evaluation and a benchmark.
    """
    if len({type(run) for run in runs}) < 2:
        return {}
    title = "Quality, cost and speed"
    try:
        frame = frontier(candidates(runs))
    except BadInput as error:
        return {title: paragraphs(f"Not compared: {error}")}
    text = "Score of the evaluation against the price by the snapshot; area: output speed of the benchmark."
    try:
        figure = picture(quality_cost_speed(frame), text, text)
    except BadInput as error:
        figure = paragraphs(f"Not drawn: {error}")
    return {title: figure + frame_table(frame, "Candidates, and the Pareto frontier of score, price and speed")}
