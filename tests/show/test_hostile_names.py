"""Names that look like markup stand as they are in every heading, label and cell, and do nothing."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from helpers import displayed as see
from helpers.hostile import NAMES, harmless, plain_in_a_terminal
from helpers.numbers import LAYERS, made_up, shares
from unpacking import unpack

import mixlens as ml
from mixlens.live.page import page
from mixlens.plot.html import picture
from mixlens.plot.tables import html_table, to_latex, to_markdown

show, view = ml.show, ml.view
ALL = [*NAMES.values(), "[5pt] bracket", "*star", "_hidden", "__init__", "~~struck~~", "![x](y)"]
TOLD_AS = {"excess", "first", "token", "either", "permuted"}  # also measures of ours


def one_line(name: str, unseen: str) -> str:
    """What a table of text keeps of a name."""
    return re.sub(r"[\x00-\x1f\u202e]", unseen, re.sub(r"\s*\n\s*", " ", name)).strip()


@pytest.fixture(scope="module")
def across():
    """A table with a hostile name in every place: of its rows' dimension and values, and of its columns."""
    return made_up({NAMES["script"]: ALL, "domain": [*reversed(ALL)]}, statistic="expert_importance")


def test_a_page_has_every_name_as_heading_as_cell_and_as_caption(across):
    for caption in ALL:
        made = harmless(html_table(across, caption), caption)
    made = harmless(html_table(across), *ALL)
    head, *rows = made.tables[0]
    assert head == [one.replace("_", " ") for one in (NAMES["script"], *reversed(ALL), "n", "documents")]
    assert [row[0] for row in rows] == ALL
    assert made.of("th")[0].attributes == {"scope": "col"}
    harmless(page(NAMES["closing"], f"<p>{len(rows)}</p>"), NAMES["closing"], scripts=1)


def test_markdown_has_every_name_and_none_of_its_marks(across):
    text = to_markdown(across)
    assert plain_in_a_terminal(text)
    head, *rows = see.markdown_rows(text)
    assert [row[0] for row in rows] == [one_line(name, "□") for name in ALL]
    assert head[1:-2] == [one_line(name, "□") for name in reversed(ALL)]
    assert {len(row) for row in (head, *rows)} == {len(ALL) + 3}
    plain = re.sub(r"\\.", "", text)
    assert not re.search(r"[<>`*~$]|\]\(|\b_|_\b|&\w+;|!\[", plain)


def test_latex_has_every_name_and_none_of_its_commands(across):
    text = to_latex(across)
    assert plain_in_a_terminal(text)
    head, *rows = see.latex_rows(text)
    assert [row[0].removeprefix("{}") for row in rows] == [one_line(name, "?") for name in ALL]
    assert head[1:-2] == [one_line(name, "?") for name in reversed(ALL)]
    assert not re.search(r"^[\[*]", text, re.MULTILINE)  # an option of the command on the line before
    commands = set(re.findall(r"\\[A-Za-z]+", text))
    allowed = {"begin", "end", "toprule", "midrule", "bottomrule"}
    assert commands == {rf"\{name}" for name in allowed | {"textbackslash", "textasciitilde", "textasciicircum"}}


@pytest.mark.parametrize("name", ["layer", "n", "documents"])
def test_a_domain_may_be_called_like_a_column(name):
    data = made_up({"layer": LAYERS, "domain": ["wiki", name]}, statistic="expert_importance")
    head, *rows = see.markdown_rows(to_markdown(data))
    assert head == ["layer", "wiki", name, "n", "documents"]
    assert [see.numbers(row[2])[0] for row in rows] == (100 * data.estimate[:, 1]).round(1).values.tolist()
    assert [row[0] for row in see.Page(html_table(data)).tables[0][1:]] == [str(layer) for layer in LAYERS]


def test_a_domain_that_is_called_like_a_measure_keeps_its_name():
    data = shares(sorted(TOLD_AS))
    rows = see.Page(html_table(data)).tables[0][1:]
    assert {row[0] for row in rows} == TOLD_AS
    assert {row[0] for row in see.markdown_rows(to_markdown(data))[1:]} == TOLD_AS
    assert set(see.colours_by_label(show.expert_share(data, layer=2))) == TOLD_AS
    assert "domain first" in see.title(show.share_heatmap(data.sel(domain="first")))
    assert {row[0] for row in see.Page(view.expert_share(data).static).tables[0][1:]} <= TOLD_AS


@pytest.mark.parametrize("draw", [show.expert_share, show.by_layer])
def test_a_legend_has_every_name(draw):
    data = shares(ALL, experts=2)
    data = data.sel(expert=1) if draw is show.by_layer else data.sel(layer=2)
    if draw is show.by_layer:
        data = data.isel(domain=slice(-16, None))
    labels = [label.removeprefix("\u200b") for label in see.colours_by_label(draw(data))]
    assert [label.replace(r"\$", "$") for label in labels] == [as_drawn(name) for name in data.domain.values]


def as_drawn(name: str) -> str:
    return re.sub("[\x00\x07\x1b]", "□", name)


def test_pictures_are_drawn_with_every_name_in_title_ticks_and_note():
    plain = show.specialization(shares(["_a"], layers=[5], experts=2))
    for name in ALL:
        made = harmless(picture(plain, name, name), name)
        assert made.texts("figcaption")[0].startswith(name)
        assert made.of("img")[0].attributes["alt"] == name
    ax = show.specialization(shares(ALL, layers=[5], experts=2))
    assert [name.replace(r"\$", "$") for name in see.ticks(ax, "y").values()] == [as_drawn(name) for name in ALL]
    for name in ALL[:-7]:
        ax = show.specialization(shares([name], layers=[5], experts=2), domain=name)
        title = see.title(ax).replace(r"\$", "$")
        assert re.sub(r"\s", "", as_drawn(name)) in title.replace(" ", "")


def test_views_carry_every_name_as_text():
    n = len(ALL)
    trace = ml.Trace.from_arrays(
        np.tile([0, 1], (n, len(LAYERS), 1)),
        n_experts=4,
        tokens={"sequence": np.arange(n), "token_id": np.arange(n)},
        sequences=pd.DataFrame({"document_id": ALL, "domain": ALL}),
        meta={"model": {"name": NAMES["closing"]}},
    )
    trace._vocabulary = pd.Series(ALL)
    made = view.tokens(trace, list(range(n)))
    header, arrays = unpack(made.packed)
    assert [header["pieces"][i] for i in arrays["piece"]] == ALL
    assert header["domains"] == ALL
    for name, label in zip(ALL, header["labels"], strict=True):
        assert label.count(name) == 2
    for number, name in enumerate(ALL):
        harmless(view.strip(trace, number).static, name)
    harmless(made.to_html(), NAMES["script"], scripts=2)
    names = (NAMES["script"].replace("/", ""), NAMES["quotes"])
    both = view.diff(trace, trace, [0, 1], names=names)
    harmless(both.static, *names)
    assert unpack(both.packed)[0]["runs"] == list(names)


@pytest.mark.parametrize("draw", [view.expert_share, view.share_heatmap])
def test_views_of_shares_carry_every_domain(draw):
    names = [name for name in ALL if len(name) < 100]
    made = draw(shares(names, layers=[5], experts=2, model=NAMES["closing"]))
    header, _ = unpack(made.packed)
    assert header["domains" if draw is view.expert_share else "panels"] == names
    harmless(made.static, NAMES["closing"])
