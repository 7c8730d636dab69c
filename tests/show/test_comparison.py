"""Figures and report sections of comparisons: what is drawn is what was computed, and the words say it."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.refusals import refused
from test_comparing import DOCUMENTS, SIGNALS, rounded
from tiny import Letters, tiny_mixtral

import mixlens as ml
from mixlens.errors import BadInput
from mixlens.plot.style import note_of

SETTINGS = ml.RecordSettings(progress=False)


@pytest.fixture(scope="module")
def models():
    model = tiny_mixtral()
    return model, rounded(model)


@pytest.fixture(scope="module")
def compared(models):
    a, b = (ml.record(m, DOCUMENTS, tokenizer=Letters(), signals=SIGNALS, settings=SETTINGS) for m in models)
    return ml.compare(a, b)


@pytest.fixture(scope="module")
def impact(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("impact") / "nf4"
    return ml.experiments.measure_impact(*models, DOCUMENTS, tokenizer=Letters(), settings=SETTINGS, out=out)


def test_flips_by_layer_draws_each_measure(compared):
    ax = ml.show.flips_by_layer(compared.flips())
    drawn = [line.get_ydata() for line in ax.lines if line.get_marker() not in ("", "None")]
    expected = compared.flips().estimate.sel(measure=["changed", "first_flip", "so_far"]).transpose("measure", "layer")
    np.testing.assert_allclose(drawn, expected)
    assert "10 documents" in note_of(ax)


def test_flips_by_margin_has_a_bar_and_a_point_for_every_bin(compared):
    data = compared.flips_by_margin()
    ax = ml.show.flips_by_margin(data)
    assert [label.get_text() for label in ax.get_xticklabels()][:2] == ["<0.01", "0.01–0.02"]
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], data.n / data.n.sum())
    np.testing.assert_allclose(ax.lines[0].get_ydata(), data.estimate)
    by_domain = ml.show.flips_by_margin(compared.flips_by_margin(by="domain"))
    assert len([line for line in by_domain.lines if len(line.get_ydata()) > 2]) == 2


@pytest.mark.parametrize("quantity", ["loss", "kl", "other_top"])
def test_split_bars_are_the_parts(impact, quantity):
    data = impact.split()
    ax = ml.show.quality_split(data, quantity=quantity)
    orders = ["weights_first", "routing_first", "mean"]
    expected = data.estimate.sel(quantity=quantity, order=orders, part=["weights", "routing"]).transpose(
        "part", "order"
    )
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], expected.values.ravel())


def test_what_cannot_be_drawn_says_what_to_select(impact):
    with refused(BadInput, "quantity", "speed"):
        ml.show.quality_split(impact.split(), quantity="speed")
    with refused(BadInput, "data", ["domain"]):
        ml.show.quality_split(impact.split(by="domain"))


def test_errors_of_experts_are_a_map(impact):
    ax = ml.show.expert_errors(impact.experts())
    mesh = ax.collections[0].get_array()
    assert mesh is not None
    np.testing.assert_allclose(np.ma.filled(mesh, np.nan).ravel(), impact.experts().estimate.values.ravel())


def test_a_report_has_the_sections(compared, impact, tmp_path):
    page = ml.report([impact.path, compared], tmp_path / "report.html").read_text("utf-8")
    for words in (
        "Impact on predictions",
        "Changed routing and weights",
        "Errors of experts",
        "of it from other routing",
        "KL(first || second), at least",
        "Most tokens part for the first time in layer",
    ):
        assert words in page, words
    two = ml.report([compared.a, compared.b], tmp_path / "two.html").read_text("utf-8")
    assert "other experts in some layer" in two
