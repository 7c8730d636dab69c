"""Report sections on two traces of the same tokens, on the impact of quantization, and on schemes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from mixlens.comparison import Comparison
from mixlens.core.text import interval_of, shown
from mixlens.live.tokens_pair import diff
from mixlens.plot import comparison, labels
from mixlens.plot.html import bullets, details, escape, frame_table, paragraphs, picture
from mixlens.plot.lines import by_layer
from mixlens.plot.tables import html_table
from mixlens.stats.impact import Impact
from mixlens.stats.pareto import Pareto

_SCHEMES = "Schemes side by side"
_MOST_TOKENS = 1024  # of the text side by side


def comparison_sections(compared: Comparison, _name: str = "") -> dict[str, str]:
    """Return the differences of two traces in routing and predictions as HTML, by title."""
    flips, agreement = compared.flips(), compared.agreement()
    missing = compared.missing()
    html = (
        paragraphs(compared.title())
        + _table(_overview(compared), "How far both runs agree")
        + _side_by_side(compared, flips)
        + _figure(comparison.flips_by_layer(flips), "Tokens that choose other experts, by layer.")
    )
    if "flips_by_margin" not in missing:
        margins = compared.flips_by_margin()
        html += _figure(comparison.flips_by_margin(margins), "Flips against the margin of the first run's router.")
    first, second = compared.names
    text = f"How far {first} and {second} route the same tokens alike. {labels.sample(agreement)}."
    html += _figure(by_layer(agreement.sel(measure=["top1", "overlap"])), text)
    tables = html_table(agreement, "Agreement") + html_table(flips, "Flips")
    return {_heading(compared): html + bullets(list(missing.values())) + details("Tables", tables)}


def comparison_findings(compared: Comparison) -> list[tuple[str, str]]:
    """Return where the runs part, with the heading of their section."""
    return [(_heading(compared), sentence) for sentence in _flips_found(compared.flips())]


def _heading(compared: Comparison) -> str:
    return " and ".join(compared.names)


def _flips_found(flips: xr.Dataset) -> list[str]:
    first = flips.sel(measure="first_flip")
    if not float(first.estimate.max()) > 0:
        return ["No token chooses other experts in any layer."]
    worst = first.isel(layer=int(first.estimate.argmax("layer")))
    return [
        f"Most tokens part for the first time in layer {worst.layer.item()}: {labels.with_interval(worst)} of tokens.",
        f"With an earlier flip {_mean(flips, 'after_flip')} of choices flip in a layer, on the mean over layers; "
        f"without one {_mean(flips, 'without_flip')}.",
    ]


def _side_by_side(compared: Comparison, flips: xr.Dataset) -> str:
    """Return the live text of the sequence and layer with most changes, opened at the first change."""
    layer = int(flips.layer[int(flips.estimate.sel(measure="changed").argmax("layer"))])
    a, b = (trace.select(layers=[layer]) for trace in (compared.a, compared.b))
    changed = (a.read("expert_id")[:, 0, 0] != b.read("expert_id")[:, 0, 0]).astype(int)
    first, second = (name.replace("/", "∕") for name in compared.names)  # a slash has a meaning in the view's data
    number = int(np.bincount(a.read("sequence"), weights=changed).argmax())
    return paragraphs(f"Sequence {number} at layer {layer}, where most changes.") + diff(
        compared.a.select(positions=(0, _MOST_TOKENS)),
        compared.b.select(positions=(0, _MOST_TOKENS)),
        number,
        layer=layer,
        names=(first, second if second != first else f"{second} (2)"),
    ).fragment(load=False)


def _overview(run: Comparison | Impact) -> pd.DataFrame:
    return shown(run.overview()).rename(columns={"": "value [95 % interval]"}).rename_axis("measure")


def _table(frame: pd.DataFrame, caption: str) -> str:
    return frame_table(frame.reset_index(), caption)


def impact_sections(impact: Impact, _name: str = "") -> dict[str, str]:
    """Return the change in predictions, its sources, and the error of every expert as HTML, by title."""
    split, experts = impact.split(), impact.experts()
    text = (
        "Both models read the same tokens twice: with their own routing, and with the experts that the other chose, "
        "forced in every layer. Changing the routing last or first divides the change in two ways; their mean is the "
        "Shapley value of each part. What is not routing is called weights only where both compute alike; what another "
        "dtype alone changes is measured with the first model cast to it, and shown as arithmetic."
    )
    provenance = {name: impact.meta.get(name) for name in ("created", "model", "other", "versions", "force_weights")}
    return {
        "Impact on predictions": paragraphs(impact.title())
        + _table(_overview(impact), "What both models predict")
        + _figure(by_layer(impact.routing()), "How far both route the same tokens alike."),
        f"Changed routing and {impact.rest}": paragraphs(text)
        + "".join(
            _figure(comparison.quality_split(split, quantity=quantity), f"{name}, divided.")
            for quantity, name in (("loss", "Change in loss"), ("kl", "KL divergence"))
        )
        + details("Table", html_table(split.sel(quantity="loss"), "Change in loss, nats per token")),
        "Errors of experts": _figure(comparison.expert_errors(experts), "Relative error of every expert's output.")
        + details("Table", html_table(experts, "Relative error of every expert's output")),
        "Methods and provenance of the impact": bullets([str(data.attrs["formula"]) for data in (split, experts)])
        + details("Settings and versions", f"<pre>{escape(json.dumps(provenance, indent=1, default=str))}</pre>"),
    }


def impact_findings(impact: Impact) -> list[tuple[str, str]]:
    """Return what changed in loss and predictions, with the heading of its section."""
    (a, b), table = impact.names, shown(impact.overview())
    named = {
        "loss, second less first": f"Loss of {b} less that of {a}",
        "of it from other routing": "Of this from changed routing",
        f"of it from {'other weights' if impact.rest == 'weights' else impact.rest}": f"Of this from {impact.rest}",
        "KL(first || second)": f"KL divergence of {b} from {a}",
        "same most probable next token": "Tokens whose most probable successor stays the same",
    }
    return [
        ("Impact on predictions", f"{told}: {table.loc[row, '']} (n = {table.loc[row, 'n']} predicted tokens).")
        for row, told in named.items()
    ]


def pareto_findings(measured: Pareto) -> list[tuple[str, str]]:
    """Return the schemes on the front, the largest first, with the heading of their section."""
    original = measured.schemes[0]
    size, kl = ({str(row["scheme"]): row for row in _rows(measured, quantity)} for quantity in ("bytes", "kl"))
    found = [(_SCHEMES, f"{_unharmed(measured)}.")] if _unharmed(measured) else []
    for scheme in (scheme for scheme in reversed(measured.front()) if scheme != original):
        held, whole, row = size[scheme]["estimate"], size[original]["estimate"], kl[scheme]
        sentence = (
            f"{scheme}, on the front, takes {held / 1e6:,.4g} MB, {held / whole:.0%} of {original}, at a KL divergence "
            f"of {interval_of(row, 1.0, 4)} nats per token (n = {row['n']:,} tokens)."
        )
        found.append((_SCHEMES, sentence))
    return found


def pareto_message(measured: Pareto) -> str:
    """Return the finding that is the title of a report on schemes; empty if every scheme raised the loss."""
    return _unharmed(measured).partition(":")[0]


def _unharmed(measured: Pareto) -> str:
    """The smallest scheme whose loss does not differ significantly from the original's, and by how much it may."""
    if not (measured.table["quantity"] == "loss_difference").any():
        return ""
    original, size = measured.schemes[0], {row["scheme"]: row["estimate"] for row in _rows(measured, "bytes")}
    alike = [row for row in _rows(measured, "loss_difference") if row["ci_low"] <= 0]
    if not alike:
        return ""
    row = min(alike, key=lambda row: size[row["scheme"]])
    return (
        f"{row['scheme']} is the smallest of {len(measured.schemes)} schemes whose loss does not differ "
        f"significantly from {original}: difference {interval_of(row, 1.0, 4)} nats per token (n = {row['n']:,} tokens)"
    )


def _rows(measured: Pareto, quantity: str) -> list[dict[Any, Any]]:
    return measured.of(quantity).reset_index().to_dict("records")


def pareto_sections(measured: Pareto, _name: str = "") -> dict[str, str]:
    """Return quality against bytes and against speed, one row per scheme, as HTML, by title."""
    figures = [_figure(comparison.pareto(measured), "Quality against the true bytes of all weights.")]
    if (measured.table["quantity"] == "tpot_s").any():
        figures.append(_figure(comparison.pareto(measured, x="tpot_s"), "Quality against time per output token."))
    return {
        _SCHEMES: paragraphs(measured.title())
        + _table(measured.overview(), "Schemes, each number with its interval")
        + "".join(figures)
        + details("All numbers", frame_table(measured.table, "Every quantity of every scheme"))
    }


def _mean(flips, measure: str) -> str:
    values = flips.estimate.sel(measure=measure).to_numpy()
    return f"{100 * values[np.isfinite(values)].mean():.1f} %" if np.isfinite(values).any() else "none"


def _figure(ax, text: str) -> str:
    return picture(ax, text, text)
