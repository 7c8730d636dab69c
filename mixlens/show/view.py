"""Views: one text/html output that is a picture where scripts may not run, and live where they may."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixlens.show import passage, wording
from mixlens.show.html import page
from mixlens.show.live import mount_script
from mixlens.show.packing import pack, token_arrays
from mixlens.show.style import PaperFigure, expert_colours
from mixlens.traces.trace import Trace

_CELL = "padding:2px 8px;text-align:left;border-bottom:1px solid #d6d6dc"


@dataclass(frozen=True)
class View:
    """A live view with its static form.

    title   what the page of its own is called
    kind    name of the view in the JavaScript module
    static  HTML that stands where scripts may not run: picture with alt text, caption and table
    packed  the data, from `packing.pack`
    """

    title: str
    kind: str
    static: str
    packed: str

    def _repr_html_(self) -> str:
        return self.fragment(load=True)

    def fragment(self, *, load: bool) -> str:
        """The view as a piece of HTML; `load` says whether the JavaScript module comes along."""
        return f'<div class="mixlens">{self.static}</div>{mount_script(self.kind, self.packed, load=load)}'

    def to_html(self) -> str:
        """The view as a page of its own, which needs nothing else."""
        return page(self.title, f"<main>{self.fragment(load=False)}</main>")

    def save(self, path: str | os.PathLike) -> Path:
        """Write `to_html()`."""
        Path(path).write_text(self.to_html(), "utf-8")
        return Path(path)


def tokens(trace: Trace, sequence: int | Sequence[int] | None = None, *, layer: int | None = None) -> View:
    """The text of one or several sequences, each token underlined by its experts, with a layer slider and a readout.

    sequence   sequence number or numbers (trace.sequences.index); the first one when not given
    layer      layer number to start at; the middle one when not given

    Weights and entropies are kept in a byte each: they are right to 0.002 and to 0.2 % of log2(experts).

    Raises BadInput for a sequence or layer that is not there.
    """
    wanted = list(sequence) if isinstance(sequence, Sequence | np.ndarray) else [sequence]
    numbers = sorted({passage.sequence_number(trace, n) for n in wanted or [None]})
    number = passage.layer_number(trace, layer)
    header, arrays = token_arrays(trace, numbers)
    header |= {
        "colours": expert_colours(trace.n_experts),
        "labels": [_label(trace, n) for n in numbers],
        "layer": int(np.flatnonzero(trace.layers == number)[0]),
    }
    title = f"Routing of {_label(trace, numbers[0])}" + (f" and {len(numbers) - 1} more" if numbers[1:] else "")
    return View(title, "tokens", _static(trace, numbers[0], number), pack(header, arrays))


def _label(trace: Trace, number: int) -> str:
    row = trace.sequences.loc[number]
    domain = f", {row['domain']}" if "domain" in row else ""
    return f"sequence {number}{domain} (document {row['document_id']})"


def _static(trace: Trace, number: int, layer: int) -> str:
    """Picture, caption and table of the first tokens; inline styles only, which a sanitiser leaves."""
    figure = passage.text(trace, sequence=number, layer=layer).get_figure(root=True)
    assert isinstance(figure, PaperFigure)
    picture = base64.b64encode(figure.png(dpi=130)).decode("ascii")
    one = trace.select(where=trace.sequences.index.to_series() == number, layers=[layer])
    ids = one.read("expert_id")[:, 0]
    counts = np.bincount(ids[:, 0], minlength=trace.n_experts)
    most = ", ".join(f"expert {e} for {counts[e]}" for e in np.argsort(-counts, kind="stable")[:3])
    caption = (
        f"Text of {_label(trace, number)} at layer {layer} of {wording.model_name(trace)}, "
        f"n = {len(ids):,} tokens. First choices: {most} tokens ..."
    )
    return (
        f'<figure style="margin:0"><img alt="{html.escape(caption)}" style="max-width:100%" '
        f'src="data:image/png;base64,{picture}"><figcaption>{html.escape(caption)}</figcaption></figure>'
        f"{_first_tokens(one, ids)}"
    )


def _first_tokens(one: Trace, ids: np.ndarray, rows: int = 8) -> str:
    columns = {"position": [str(p) for p in one.read("position")[:rows]]}
    if "token_id" in one.signals:
        columns["token"] = [_short(piece) for piece in one.pieces(one.read("token_id")[:rows])]
    columns["experts"] = [", ".join(map(str, chosen)) for chosen in ids[:rows]]
    if "weight" in one.signals:
        columns["weights"] = [", ".join(f"{w:.2f}" for w in weights) for weights in one.read("weight")[:rows, 0]]
    if "logprob" in one.signals:
        columns["log-probability (nat)"] = ["–" if np.isnan(p) else f"{p:.2f}" for p in one.read("logprob")[:rows]]
    head = "".join(f'<th style="{_CELL}">{name}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{html.escape(cell)}</td>' for cell in row) + "</tr>"
        for row in zip(*columns.values(), strict=True)
    )
    return (
        f'<table style="border-collapse:collapse"><caption>First {min(rows, len(ids))} of {len(ids):,} tokens</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _short(piece: str) -> str:
    shown = repr(piece)[1:-1]
    return shown if len(shown) <= 60 else f"{shown[:60]}… ({len(piece):,} characters)"
