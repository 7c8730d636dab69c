"""Report sections on a trace: functions from an Analysis to HTML, empty if there is nothing to show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mixlens import show, view
from mixlens.core import run_dir
from mixlens.engines.check import FAULTS
from mixlens.plot import labels
from mixlens.plot.heatmap import group_of
from mixlens.plot.html import bullets, details, escape, frame_table, paragraphs, picture
from mixlens.plot.messages import furthest, furthest_surviving
from mixlens.plot.tables import html_table, tidy
from mixlens.reports.analysis import Analysis
from mixlens.reports.findings import place, said_of
from mixlens.reports.symbols import symbols_of
from mixlens.stats import table5
from mixlens.stats.planning import planned
from mixlens.trace.clusters import remark_on_clusters

_MOST_SEQUENCES, _MOST_TOKENS = 12, 1024  # in the live text
_FEW_DOCUMENTS = 20
_UNEVEN = 0.5  # effective documents over documents, below which a note is shown


def summary(analysis: Analysis) -> str:
    trace = analysis.trace
    facts = {
        "model": labels.model_name(trace),
        "tokens": f"{trace.n_tokens:,}",
        "sequences": f"{len(trace.sequences):,}",
        "documents": f"{analysis.n_documents:,}",
        **({} if analysis.by is None else {f"values of {analysis.by}": f"{trace.sequences[analysis.by].nunique():,}"}),
        "layers": f"{trace.n_layers}",
        "experts": f"{trace.n_experts}, top {trace.top_k}",
    }
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    cautions = paragraphs(_few_documents(analysis), remark_on_clusters(trace.sequences), _source(trace.meta))
    return f'<dl class="facts">{cells}</dl>{cautions}'


def _source(meta: Mapping[str, Any]) -> str:
    """Describe the source of routing and its checks, unless it is a model in this process."""
    check = meta.get("source_check")
    if check is None:
        return ""
    corrected = "; ".join(f"{n:,} times {FAULTS[name]}" for name, n in check["corrected"].items())
    open_ = "; ".join(check["partly_checked"].values())
    return (
        f"The routing comes from {meta['source']}. All {check['rows']:,} rows of {check['requests']:,} requests were "
        f"checked for {len(check['checked'])} faults"
        + (f", and corrected: {corrected}." if corrected else "; none was found.")
        + (f" Not everything can be seen: {open_}." if open_ else "")
    )


def _few_documents(analysis: Analysis) -> str:
    grouped = analysis.found.get("expert_share by group")
    data = analysis.found.get("expert_share") if grouped is None else grouped
    fewest = analysis.n_documents if grouped is None else int(grouped["n_documents"].min())
    whose = "Intervals" if grouped is None else f"Intervals by {analysis.by}"
    if fewest == 1:
        return f"{whose} need at least two documents; where there is only one, none is given."
    if data is None:
        return ""
    rough = f"{whose} rest on as few as {fewest} documents: take them as rough." if fewest < _FEW_DOCUMENTS else ""
    return " ".join(filter(None, [rough, _long_documents(data), _too_wide(data)]))


def _long_documents(data: xr.Dataset) -> str:
    """Return a note if a few documents have most of the tokens."""
    share = float((data["n_effective"] / data["n_documents"]).min())
    if not share < _UNEVEN:
        return ""
    least = float(data["n_effective"].min())
    return f"A few documents have most of the tokens: they count as {least:.1f} documents of equal length."


def _too_wide(data: xr.Dataset) -> str:
    """Return a note with a remedy if half of the intervals of shares are wider than half of the uniform share."""
    uniform = float(data.attrs["uniform"])
    plan = planned(data, uniform / 5)
    half = float(plan["now"].median())
    if not half > uniform / 2:
        return ""
    enough = int(plan["documents"].median())
    return (
        f"Half of the intervals of expert shares reach further than {100 * half:.1f} points, where uniform routing is "
        f"{100 * uniform:.1f} %: too wide to be of use. About {enough:,} documents of the kind would give "
        f"{100 * uniform / 5:.1f} points."
    )


def shares(analysis: Analysis) -> str:
    parts = []
    whole, grouped = analysis.found.get("expert_share"), analysis.found.get("expert_share by group")
    if grouped is not None:
        text = f"Share of assignments by {analysis.by} at three layers, as in Figure 7 of the Mixtral paper."
        parts.append(_figure(show.expert_share_grid(grouped), grouped, text))
    if whole is not None:
        parts.append(_figure(show.share_heatmap(whole), whole, "Share of assignments, all documents together."))
        if grouped is None:
            parts.append(_figure(show.expert_share_grid(whole), whole, "Share of assignments at three layers."))
        parts.append(_table(whole, "Expert share"))
    if grouped is not None:
        assert analysis.by is not None
        facets = show.facet(show.share_heatmap, grouped, group_of(grouped))
        parts.append(_figure(facets, grouped, f"Share of assignments in every layer, one panel per {analysis.by}."))
        parts.append(_table(grouped, f"Expert share by {analysis.by}"))
    if (balance := analysis.found.get("load_balance")) is not None:
        for measure in ("cv", "switch_loss"):
            part = balance.sel(measure=measure)
            if np.isfinite(part["estimate"]).any():
                parts.append(_figure(show.by_layer(part), part, f"{labels.label(measure)}, by layer."))
        parts.append(_table(balance, "Load balance"))
    return _figures_first(parts)


def groups(analysis: Analysis) -> str:
    parts = []
    if (data := analysis.found.get("domain_specialization")) is not None:
        cell = furthest(data)
        layer = None if cell is None else int(cell["layer"])
        text = (
            f"Share of each {analysis.by}'s tokens that choose an expert, at the layer that is furthest from uniform."
        )
        parts.append(_figure(show.specialization(data, layer=layer), data.sel(layer=layer), text))
        parts.append(_table(data, "Domain specialization"))
    if (data := analysis.found.get("domain_information")) is not None:
        text = (
            f"How much a token's experts say about its {analysis.by}, and the same with labels permuted over documents."
        )
        parts += [
            _figure(show.domain_information(data), data, text),
            _table(data, f"Information between expert and {analysis.by}"),
        ]
    return _figures_first(parts)


def router(analysis: Analysis) -> str:
    parts = []
    if (data := analysis.found.get("routing_entropy")) is not None:
        text = "How undecided the router is: entropy of its distribution over experts."
        parts += [_figure(show.routing_entropy(data), data, text), _table(data, "Routing entropy")]
    if (data := analysis.found.get("router_confidence")) is not None:
        known = [m for m in data["measure"].to_numpy() if np.isfinite(data.sel(measure=m)["estimate"]).any()]
        text = "How strongly the router prefers its first expert; dashed in the same colour: uniform routing."
        parts.append(_figure(show.by_layer(data.sel(measure=known)), data.sel(measure=known), text))
        parts.append(_table(data, "Router confidence"))
    return _figures_first(parts)


def sequence(analysis: Analysis) -> str:
    parts = []
    reference = table5()
    grouped = analysis.found.get("repetition by group", analysis.found.get("repetition"))
    if grouped is not None:
        for choice in ("first", "either"):
            part = grouped.sel(choice=choice)
            text = f"{labels.label(choice).capitalize()} in consecutive tokens of a sequence."
            parts.append(_figure(show.repetition(grouped, choice=choice, published=reference), part, text))
        parts.append(_table(grouped, "Repetition"))
        parts.append(_published(reference))
    if (data := analysis.found.get("repetition beyond tokens")) is not None:
        text = "First choices that repeat, beside what token identity alone explains."
        parts.append(_figure(show.repetition(data), data.sel(choice="first"), text))
        frame = tidy(data, also=["expected", "excess", "p", "q", "survives"])
        name = "Repetition beside what tokens explain"
        parts.append(details(f"Table: {name}", frame_table(frame, f"{name}; expected: mean of the shuffles")))
    if (data := analysis.found.get("position_profile")) is not None:
        text = "Share of assignments by position in the sequence, at the middle layer."
        parts.append(_figure(show.specialization(data), labels.at_layer(data, None), text))
        parts.append(_table(data, "Expert share by position"))
    return _figures_first(parts)


def together(analysis: Analysis) -> str:
    parts = []
    if (data := analysis.found.get("coactivation")) is not None:
        cell = furthest(data)
        layer = None if cell is None else int(cell["layer"])
        text = "Which experts a token chooses together, at the layer that is furthest from uniform."
        parts.append(_figure(show.coactivation(data, layer=layer), data.sel(layer=layer), text))
        parts.append(_table(data, "Co-activation"))
    if (data := analysis.found.get("transitions")) is not None:
        layer = int(data["layer"][int(data["mi_bits"].fillna(-1).argmax("layer"))])
        text = "Where first choices go from one layer to the next, where the two hang together most."
        parts.append(_figure(show.transitions(data, layer=layer), data.sel(layer=layer), text))
        mutual = _mutual_information(data)
        text = "How much the first choice at one layer says about the first choice at the next."
        parts.append(_figure(show.by_layer(mutual), mutual, text))
        parts += [_table(mutual, "Mutual information between layers"), _table(data, "Transitions")]
    return _figures_first(parts)


def vocabulary(analysis: Analysis) -> str:
    parts = []
    if (data := analysis.found.get("predictability")) is not None:
        text = (
            "How well the first choice is predicted in held-out documents: what the token's identity explains, and "
            "what the token before it adds."
        )
        parts += [_figure(show.by_layer(data), data, text), _table(data, "Predictability of the first choice")]
    if (data := analysis.found.get("vocabulary_specialization")) is not None:
        text = "Share of a token type's occurrences that choose its most frequent expert, averaged over types."
        parts += [_figure(show.by_layer(data), data, text), _table(data, "Vocabulary specialization")]
    return _figures_first(parts)


def text(analysis: Analysis) -> str:
    """Return the live token view of one sequence per group, or of the first sequences if there are no groups."""
    frame = analysis.trace.sequences
    frame = frame[frame["length"] > 0]
    chosen = frame if analysis.by is None else frame.drop_duplicates(analysis.by)
    numbers = [int(n) for n in chosen.index[:_MOST_SEQUENCES]]
    if not numbers:
        return ""
    shown = analysis.trace.select(positions=(0, _MOST_TOKENS))
    which = "the first sequences" if analysis.by is None else f"the first sequence of each {analysis.by}"
    cut = f", at most the first {_MOST_TOKENS:,} tokens of each" if frame["length"].max() > _MOST_TOKENS else ""
    return paragraphs(f"Shown: {which}{cut}.") + view.tokens(shown, numbers).fragment(load=False)


def missing(analysis: Analysis) -> str:
    return bullets([f"{name}: {reason}" for name, reason in analysis.missing.items()])


def methods(analysis: Analysis) -> str:
    entries, seen = [], set()
    for data in analysis.found.values():
        if labels.statistic(data) not in seen:
            seen.add(labels.statistic(data))
            entries.append(
                f"<dt>{escape(labels.title(data))}</dt><dd><code>{escape(data.attrs.get('formula', ''))}</code></dd>"
                f"<dd>Source: {escape(data.attrs.get('source', ''))}.</dd>"
            )
    first = next(iter(analysis.found.values()), None)
    how = "" if first is None else _how(first)
    symbols = "".join(
        f"<dt><code>{escape(symbol)}</code></dt><dd>{escape(meaning)}</dd>"
        for symbol, meaning in symbols_of(
            str(data.attrs.get("formula", "")) for data in analysis.found.values()
        ).items()
    )
    return (
        f'{paragraphs(how)}<dl class="methods">{"".join(entries)}</dl>'
        f'<h3>Symbols</h3><dl class="symbols">{symbols}</dl>'
    )


def _how(data: xr.Dataset) -> str:
    return (
        f"Intervals: {labels.level(data)}s over documents, since the tokens of one document are not independent. A "
        "number is bold, and called different from its value under uniform routing, only if it survives control for "
        "all numbers of its statistic (Benjamini and Hochberg, false discovery rate "
        f"{100 * (1 - data.attrs['level']):.3g} %)."
    )


def provenance(analysis: Analysis) -> str:
    trace = analysis.trace
    meta = dict(trace.meta)
    files: Mapping[str, Any] = meta.pop("files", {})
    meta.pop("shard_counts", None)
    lines = [f"Run: {analysis.name}."]
    if files:
        size = sum(entry["bytes"] for entry in files.values())
        lines.append(f"{len(files)} files of {size:,} bytes in total, each with a sha256 checksum in meta.json.")
    versions = run_dir.versions("mixlens", "numpy", "pandas", "xarray", "matplotlib")
    shown = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines.append(f"Report written {run_dir.now()} with {shown}.")
    parts = [paragraphs(*lines), _json("meta.json", meta)]
    if trace.path is not None:
        parts.append(_json("plan.json", run_dir.open_run(trace.path, check=False).plan))
    return details("Run, versions and settings", "".join(parts))


SECTIONS = {
    "What was recorded": summary,
    "Text": text,
    "Expert share": shares,
    "Groups": groups,
    "Along the text": sequence,
    "Router": router,
    "Between experts and layers": together,
    "Tokens and context": vocabulary,
    "Not computed": missing,
    "Methods": methods,
    "Provenance": provenance,
}


# The statistics that each section speaks of.
_OF_SECTION = {
    "Groups": ("domain_specialization", "domain_information"),
    "Expert share": ("expert_share", "load_balance"),
    "Along the text": ("repetition", "repetition beyond tokens"),
    "Router": ("routing_entropy",),
    "Between experts and layers": ("coactivation", "transitions"),
    "Tokens and context": ("vocabulary_specialization", "predictability"),
}


def trace_sections(analysis: Analysis) -> dict[str, str]:
    """Return all sections as HTML by heading, each beginning with its findings."""
    sections = {}
    for heading, part in SECTIONS.items():
        found = [sentence for statistic in _OF_SECTION.get(heading, ()) for sentence in said_of(analysis, statistic)]
        html = part(analysis)
        sections[heading] = bullets(found) + html if html else ""
    return sections


def trace_findings(analysis: Analysis) -> list[tuple[str, str]]:
    """Return a sentence per statistic with the heading of its section, significant differences from chance first."""
    said = [
        (heading, sentence, statistic)
        for heading, statistics in _OF_SECTION.items()
        for statistic in statistics
        for sentence in said_of(analysis, statistic)[:1]
    ]
    tested = {name: bool(data["survives"].any()) for name, data in analysis.found.items() if "survives" in data}
    return [found[:2] for found in sorted(said, key=lambda found: not tested.get(found[2], False))]


def _figure(drawn: Axes | Figure, data: xr.Dataset, text: str) -> str:
    tested = bool(data.attrs.get("cells")) and "survives" in data
    cell = furthest_surviving(data) if tested else furthest(data)
    far = "" if cell is None else f" {_extreme(data)}: {place(cell)}, {labels.with_interval(cell)}."
    about = [labels.sample(data), labels.over(data), labels.uniform_note(data)]
    return picture(drawn, f"{text}{far}", f"{text}{far} {'; '.join(a for a in about if a)}.")


def _extreme(data: xr.Dataset) -> str:
    if "expected" in data:
        return "Furthest from what the shuffles give"
    return "Largest, as measured" if labels.uniform(data) is None else "Furthest from uniform"


def _figures_first(parts: list[str]) -> str:
    """Put the figures, which flow side by side, before the tables."""
    return "".join(sorted(parts, key=lambda part: not part.startswith("<figure")))


def _table(data: xr.Dataset, name: str) -> str:
    return details(f"Table: {name}", html_table(data, name))


def _published(reference: xr.Dataset) -> str:
    caption = (
        f"Mixtral-8x7B, another model, as published: {reference.attrs.get('source', '')}. No n or interval was given"
    )
    dims = ("domain", "layer", "choice")
    return details("Table: published repetition of Mixtral-8x7B", html_table(reference.transpose(*dims), caption))


def _mutual_information(data: xr.Dataset) -> xr.Dataset:
    """Return the mutual information included with transitions as a separate statistic."""
    mutual = data[["n_documents"]].assign(
        estimate=data["mi_bits"], ci_low=data["mi_ci_low"], ci_high=data["mi_ci_high"], n=data["n"].sum("expert")
    )
    own = {"statistic": "mutual_information_between_layers", "unit": "bits", "uniform": 0.0}
    return mutual.assign_attrs(data.attrs | own)


def _json(name: str, value: Any) -> str:
    return details(name, f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False, default=str))}</pre>")
