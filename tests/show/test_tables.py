import re
from html.parser import HTMLParser

import numpy as np
import pytest
from show_samples import dataset

from mixlens import stats
from mixlens.plot import tables


class Cells(HTMLParser):
    """Rows of the first table of a page, as lists of cell texts; sort keys in `keys`."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.keys, self.inside = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
            self.keys.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.keys[-1].append(dict(attrs).get("data-v"))
            self.inside = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def test_tidy_has_a_row_for_every_number(share):
    frame = tables.tidy(share)
    assert list(frame.columns) == ["domain", "layer", "expert", "estimate", "ci_low", "ci_high", "n", "n_documents"]
    assert len(frame) == share["estimate"].size
    for row in frame.sample(20, random_state=0).itertuples():
        cell = share.sel(domain=row.domain, layer=row.layer, expert=row.expert)
        assert row.estimate == cell["estimate"]
        assert (row.ci_low, row.ci_high) == (cell["ci_low"], cell["ci_high"])
        assert row.n == cell["n"]


def test_tidy_of_a_selection_and_of_a_statistic_with_more_variables(share, trace):
    assert len(tables.tidy(share.sel(domain="github", layer=1))) == 8
    assert tables.tidy(share.sel(domain="github", layer=1, expert=2)).shape == (1, 5)
    assert "mi_bits" not in tables.tidy(stats.transitions(trace)).columns


def test_html_table_has_every_number_with_interval_and_n(share):
    table = Cells(tables.html_table(share, "Share"))
    assert table.rows[0] == ["domain", "layer", *(f"expert {e}" for e in range(8)), "n", "documents"]
    assert len(table.rows) == 1 + share.sizes["domain"] * share.sizes["layer"]
    first = share.isel(domain=0, layer=0)
    low, high = 100 * float(first["ci_low"][0]), 100 * float(first["ci_high"][0])
    assert table.rows[1][2] == f"{100 * float(first['estimate'][0]):.1f}{low:.1f} to {high:.1f}"
    assert table.rows[1][-2:] == ["360", "6"]
    assert float(table.keys[1][2]) == pytest.approx(float(first["estimate"][0]), abs=1e-6)


def test_html_table_is_accessible(share):
    html = tables.html_table(share, "Share")
    assert re.search(r'<th scope="col"><button type="button">domain</button></th>', html)
    assert "<caption>Share. Per cent of assignments; 95 % interval over documents" in html
    assert 'role="region" aria-label="Share"' in html


def test_layers_go_down_when_they_are_the_only_dimension(trace):
    table = Cells(tables.html_table(stats.routing_entropy(trace)))
    assert table.rows[0] == ["layer", "estimate", "n", "documents"]
    assert len(table.rows) == 1 + trace.n_layers


def test_a_missing_number_is_a_dash_and_sorts_as_missing(trace):
    table = Cells(tables.html_table(stats.coactivation(trace)))
    assert (table.rows[1][2], table.keys[1][2]) == ("–", "")


def test_each_measure_has_its_own_unit(trace):
    table = Cells(tables.html_table(stats.agreement(trace, trace)))
    top1, _, divergence = table.rows[1][1:4]
    assert top1.startswith("100.0")
    assert divergence.startswith("0.000")


def test_a_published_table_has_no_intervals():
    table = Cells(tables.html_table(stats.table5()))
    assert table.rows[1] == ["ArXiv", "0", "14.0", "46.5"]


def test_markdown_and_latex(share):
    one = share.isel(layer=[0], domain=[0], expert=slice(2)).assign_coords(domain=["a_b|c&d"])
    estimate, low, high = (f"{100 * float(one[name][0, 0, 0]):.1f}" for name in ("estimate", "ci_low", "ci_high"))
    markdown = tables.to_markdown(one).splitlines()
    assert markdown[0] == "| domain | layer | expert 0 | expert 1 | n | documents |"
    assert markdown[2].startswith(rf"| a_b\|c&d | 0 | {estimate} [{low}, {high}] |")
    latex = tables.to_latex(one)
    assert rf"a\_b|c\&d & 0 & {estimate} [{low}, {high}] &" in latex
    assert latex.count(r"\\") == 2


def test_names_are_escaped_in_html():
    data = dataset(
        np.zeros((1, 1)),
        {"domain": ["<script>alert(1)</script>"], "layer": [0]},
        n=((), 1),
        n_documents=((), 1),
        statistic="routing_entropy",
        unit="bits",
    )
    html = tables.html_table(data, "<b>")
    assert "<script>" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;" in html
