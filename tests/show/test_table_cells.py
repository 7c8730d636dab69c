"""Every cell of a table, in every format, against the arrays that were given."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import displayed as see
from helpers.numbers import DOMAINS, LAYERS, made_up, shares

import mixlens as ml
from mixlens.plot.tables import html_table, tidy, to_latex, to_markdown, unit_note

UNITS = {
    "fraction": ("expert_share", 100, 1),
    "bits": ("routing_entropy", 1, 3),
    "nats": ("expert_importance", 1, 3),
    "1": ("load_balance", 1, 3),
}


def made(unit: str):
    """Shares of experts by domain and layer, some negative, some missing, some without an interval."""
    data = shares(statistic=UNITS[unit][0], unit=unit, missing=True)
    for name in ("estimate", "ci_low", "ci_high"):
        data[name][1, 2, 3] -= 0.9
    data["ci_low"][0, 1, 0] = data["ci_high"][0, 1, 0] = np.nan
    return data.transpose("domain", "layer", "expert")


def told(value: float, unit: str) -> str:
    _, factor, digits = UNITS[unit]
    return f"{factor * value:.{digits}f}"


def expected(data, unit: str, between: tuple[str, str, str]) -> list[list[str]]:
    """Cells of every row from the raw arrays; `between` is what stands round an interval."""
    estimate, low, high = (data[name].to_numpy() for name in ("estimate", "ci_low", "ci_high"))
    rows = []
    for i, j in np.ndindex(len(DOMAINS), len(LAYERS)):
        row = [DOMAINS[i], str(LAYERS[j])]
        for e in range(8):
            if not math.isfinite(estimate[i, j, e]):
                row.append("–")
                continue
            a, b, c = (told(v[i, j, e], unit) for v in (estimate, low, high))
            bounds = "no interval" if math.isnan(low[i, j, e]) else f"{b}{between[1]}{c}"
            row.append(f"{a}{between[0]}{bounds}{between[2]}")
        for name in ("n", "n_documents"):
            counts = data[name].to_numpy()[i, j]
            row.append(f"{counts.min():,} to {counts.max():,}")
        rows.append(row)
    return rows


@pytest.mark.parametrize("unit", UNITS)
def test_every_cell_in_html_with_its_sort_key(unit):
    data = made(unit)
    page = see.Page(html_table(data))
    head, *rows = page.tables[0]
    assert head == ["domain", "layer", *(f"expert {e}" for e in range(8)), "n", "documents"]
    assert rows == expected(data, unit, (" [", " to ", "]"))
    keys = np.array([row[2:10] for row in page.keys[0][1:]])
    values = data.estimate.to_numpy().reshape(-1, 8)
    assert (keys == "").tolist() == np.isnan(values).tolist()
    known = np.isfinite(values)
    np.testing.assert_allclose(keys[known].astype(float), values[known], rtol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
def test_every_cell_in_markdown_and_latex(unit):
    data = made(unit)
    head, *rows = see.markdown_rows(to_markdown(data))
    assert head == ["domain", "layer", *(f"expert {e}" for e in range(8)), "n", "documents"]
    assert rows == expected(data, unit, (" [", ", ", "]"))
    assert see.latex_rows(to_latex(data)) == [head, *rows]


def test_the_note_has_level_and_chance_in_the_unit_of_the_cells():
    assert see.numbers(unit_note(made("fraction"))) == [90, 12.5]
    assert see.numbers(unit_note(made("bits").assign_attrs(uniform=3.0))) == [90, 3]
    assert see.numbers(unit_note(made("nats").assign_attrs(uniform=None))) == [90]
    pairs = made_up({"layer": LAYERS, "choice": ["first", "either"]}, statistic="repetition", uniform=[0.125, 0.46])
    assert see.numbers(unit_note(pairs)) == [90, 12.5, 46]
    assert see.numbers(unit_note(pairs.sel(choice="either"))) == [90, 46]


def test_each_measure_of_agreement_has_a_unit_of_its_own():
    measures = ["top1", "overlap", "jensen_shannon"]
    data = made_up({"layer": LAYERS, "measure": measures}, statistic="agreement", uniform=None)
    rows = see.markdown_rows(to_markdown(data))[1:]
    for row, values in zip(rows, data.estimate.to_numpy(), strict=True):
        first = [see.numbers(cell)[0] for cell in row[1:4]]
        assert first == [round(100 * values[0], 1), round(100 * values[1], 1), round(values[2], 3)]


def test_one_count_for_all_stands_once_and_a_count_by_domain_in_its_rows():
    data = shares(layers=(2, 5))
    data = data.assign(n=("domain", [1000, 20, 7]), n_documents=((), 3))
    rows = see.markdown_rows(to_markdown(data))[1:]
    assert [row[-2:] for row in rows] == [[n, "3"] for n in ("1,000", "1,000", "20", "20", "7", "7")]
    head = see.Page(html_table(data)).keys[0]
    assert [row[-2] for row in head[1:]] == ["1000", "1000", "20", "20", "7", "7"]


def test_layers_never_go_across_and_a_single_number_is_a_table():
    column = made_up({"domain": DOMAINS, "layer": LAYERS}, unit="bits", statistic="routing_entropy")
    head, *rows = see.markdown_rows(to_markdown(column))
    assert head == ["domain", "layer", "estimate", "n", "documents"]
    assert [see.numbers(row[2])[0] for row in rows] == column.estimate.to_numpy().round(3).ravel().tolist()
    assert [row[3] for row in rows] == [f"{n:,}" for n in column.n.to_numpy().ravel()]
    one = column.isel(domain=1, layer=2)
    assert see.numbers(see.markdown_rows(to_markdown(one))[1][0])[0] == round(float(one.estimate), 3)


@pytest.mark.parametrize("dims", [("domain", "layer", "expert"), ("expert", "domain", "layer")])
def test_tidy_has_every_number_once_under_its_own_labels(dims):
    data = made("fraction").transpose(*dims)
    frame = tidy(data)
    assert list(frame.columns) == [*dims, "estimate", "ci_low", "ci_high", "n", "n_documents"]
    assert len(frame) == data.estimate.size
    for name in ("estimate", "ci_low", "ci_high", "n", "n_documents"):
        flat = [float(data[name].sel({d: row[d] for d in dims})) for row in frame.head(40).to_dict("records")]
        np.testing.assert_array_equal(frame[name].head(40), flat)


def test_views_tell_the_numbers_furthest_from_chance_with_interval_and_n():
    data = made("fraction")
    for draw in (ml.view.expert_share, ml.view.share_heatmap):
        head, *rows = see.Page(draw(data).static).tables[0]
        distance = np.abs(data.estimate.to_numpy() - 0.125)
        order = np.argsort(-np.nan_to_num(distance, nan=-1), axis=None, kind="stable")[:8]
        places = [np.unravel_index(i, distance.shape) for i in order]
        assert head[:3] == ["domain", "layer", "expert"]
        assert [row[:3] for row in rows] == [[DOMAINS[i], str(LAYERS[j]), str(e)] for i, j, e in places]
        for row, place in zip(rows, places, strict=True):
            cell = data.isel(dict(zip(data.estimate.dims, place, strict=True)))
            assert row[3] == told(float(cell.estimate), "fraction")
            ends = [told(float(cell[name]), "fraction") for name in ("ci_low", "ci_high")]
            assert row[4].split(" to ") == ends or math.isnan(cell.ci_low)
            assert row[5] == f"{int(cell.n):,}"
