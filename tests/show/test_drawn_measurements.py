"""Figures of what was measured, evaluated and compared: every number read back from the artists."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers import displayed as see
from helpers.numbers import DOMAINS, LAYERS, made_up, strokes

import mixlens as ml
from mixlens.pricing.tradeoff import Candidate
from mixlens.stats.pareto import COLUMNS, Pareto

show = ml.show
EXPERTS = range(6)
IMPORTANCE = {"statistic": "expert_importance", "unit": "nats", "metric": "loss", "how": "zero"}


def pairs(values) -> list[tuple[float, float]]:
    return [(low, high) for _, low, high in values]


def changes(dims, missing=True, **attrs):
    """Numbers on both sides of 0, whose intervals hold it, lie above it and below it."""
    data = made_up(dims, missing=missing, **attrs)
    return data.assign({name: data[name] - 0.2 for name in ("estimate", "ci_low", "ci_high")})


def surviving(data) -> set[tuple[int, int]]:
    return {(i, j) for i, j in np.argwhere(data.survives.to_numpy()).tolist()}


@pytest.mark.parametrize("draw", [show.expert_importance, show.expert_contribution])
def test_a_map_of_changes_marks_what_survives_on_either_side(draw):
    data = changes({"layer": LAYERS, "expert": EXPERTS}, **IMPORTANCE, measure="logit")
    ax = draw(data)
    np.testing.assert_array_equal(see.cells(ax), data.estimate)
    assert see.marked(ax) == surviving(data)
    assert 0 < len(surviving(data)) < data.estimate.size
    assert {(data.estimate.values[place] > 0) for place in surviving(data)} == {True, False}
    assert list(see.ticks(ax, "y").values()) == [str(layer) for layer in LAYERS]
    assert ax.yaxis_inverted()
    largest = float(np.nanmax(np.abs(data.estimate)))
    assert see.scale(ax) == pytest.approx((-largest, largest))


def test_sizes_have_no_dots_and_their_scale_begins_at_zero():
    data = made_up({"layer": LAYERS, "expert": EXPERTS}, statistic="expert_contribution", measure="norm", unit="logits")
    ax = show.expert_contribution(data)
    np.testing.assert_array_equal(see.cells(ax), data.estimate)
    assert see.scale(ax) == pytest.approx((0, float(data.estimate.max())))
    assert not ax.lines


@pytest.mark.parametrize("draw", [show.importance_by_domain, show.contribution_by_domain])
def test_of_several_domains_each_has_a_row_and_each_layer_its_block(draw):
    data = changes({"expert": EXPERTS, "layer": LAYERS, "domain": DOMAINS}, **IMPORTANCE, measure="logit")
    ax = draw(data)
    flat = data.transpose("domain", "layer", "expert")
    np.testing.assert_array_equal(see.cells(ax), flat.estimate.to_numpy().reshape(3, -1))
    wide = {(i, j * 6 + e) for i, j, e in np.argwhere(flat.survives.to_numpy()).tolist()}
    assert see.marked(ax) == wide
    assert list(see.ticks(ax, "y").values()) == list(DOMAINS)
    assert see.ticks(ax, "x") == {(i + 0.5) * 6: str(layer) for i, layer in enumerate(LAYERS)}
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == [6, 12, 18]
    assert see.numbers(ax.get_xlabel()) == [0, 5]


def test_importance_stands_at_its_share_with_its_interval():
    data = changes({"layer": LAYERS, "expert": EXPERTS}, missing=False, **IMPORTANCE)
    data["share"] = data.estimate.dims, np.random.default_rng(1).dirichlet(np.ones(6), 4)
    ax = show.importance_against_share(data)
    for layer in LAYERS:
        x, y = see.marks(ax, f"layer {layer}")
        np.testing.assert_array_equal(x, data.share.sel(layer=layer))
        np.testing.assert_array_equal(y, data.estimate.sel(layer=layer))
    np.testing.assert_allclose(see.whiskers(ax), [(x, *ends) for x, ends in zip(
        data.share.to_numpy().ravel(), strokes(data, "layer", "expert"), strict=True)])  # fmt: skip
    assert ax.lines[-1].get_xdata()[0] == pytest.approx(1 / 6)


def test_the_loss_at_every_k_has_its_interval_and_the_models_own_k():
    ks = [1, 2, 4, 7]
    data = made_up({"domain": DOMAINS, "k": ks}, statistic="topk_sweep", unit="nats", own_k=4)
    ax = show.topk_sweep(data)
    for domain in DOMAINS:
        x, y = see.marks(ax, domain)
        np.testing.assert_array_equal(y, data.estimate.sel(domain=domain))
        assert np.round(x).tolist() == ks
    assert pairs(see.whiskers(ax)) == strokes(data, "domain", "k")
    assert ax.lines[3].get_xdata()[0] == 4
    one = data.isel(domain=0, drop=True)
    first = np.random.default_rng(0).uniform(0.3, 1, (4, 4))
    one = one.assign(first_weight=(("k", "layer"), first)).assign_coords(layer=list(LAYERS))
    ax = show.topk_routing(one)
    for i, layer in enumerate(LAYERS):
        np.testing.assert_array_equal(see.marks(ax, f"layer {layer}")[1], first[:, i])


def test_flips_by_margin_stand_over_the_share_of_choices_in_their_bin():
    data = made_up({"domain": DOMAINS, "margin": [0.1, 0.5, 2.0, 9.0]}, statistic="flips_by_margin")
    data = data.assign_coords(margin_from=("margin", [0.0, 0.1, 0.5, 2.0]))
    ax = show.flips_by_margin(data)
    n = data.n.transpose("domain", "margin").to_numpy()
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], n.sum(0) / n.sum())
    assert list(see.ticks(ax, "x").values()) == ["<0.1", "0.1–0.5", "0.5–2", ">2"]
    for domain in DOMAINS:
        np.testing.assert_array_equal(see.marks(ax, domain)[1], data.estimate.sel(domain=domain))
    assert pairs(see.whiskers(ax)) == strokes(data, "domain", "margin")
    assert see.numbers(see.note(ax))[0] == n.sum()


@pytest.mark.parametrize("rest", ["weights", "everything else"])
@pytest.mark.parametrize("quantity", ["loss", "kl", "other_top"])
def test_both_parts_of_a_split_have_bars_and_intervals_in_the_row_of_their_order(quantity, rest):
    orders, parts = ["mean", "routing_first", "weights_first"], ["routing", "total", rest, "arithmetic"]
    data = made_up({"quantity": ["kl", "loss", "other_top"], "order": orders, "part": parts}, statistic="split")
    ax = show.quality_split(data, quantity=quantity)
    ax.figure.canvas.draw()
    assert any("%" in tick.get_text() for tick in ax.get_xticklabels()) == (quantity == "other_top")
    one = data.sel(quantity=quantity)
    down = [f"{order}" for order in ("weights_first", "routing_first", "mean")]
    for group, part in zip(ax.containers, ("routing", rest), strict=True):
        cell = one.sel(part=part, order=down)
        np.testing.assert_array_equal([bar.get_width() for bar in group], cell.estimate)
        ys = [round(bar.get_y() + bar.get_height() / 2) for bar in group]
        assert ys == [2, 1, 0]
    expected = one.sel(part=["routing", rest], order=down)
    assert pairs(see.level_whiskers(ax)) == strokes(expected, "part", "order")
    colours = see.colours_by_label(ax)
    other = "from other weights" if rest == "weights" else "from everything else"
    assert [colours["from other routing"], colours[other]] == [
        see.to_hex(group[0].get_facecolor()) for group in ax.containers
    ]
    whole = next(line for line in ax.lines if line.get_label() == "in all")
    assert whole.get_xdata()[0] == float(one.estimate.sel(part="total", order="mean"))
    cast = [line.get_xdata()[0] for line in ax.lines if line.get_label() == "arithmetic alone"]
    assert cast == ([] if rest == "weights" else [float(one.estimate.sel(part="arithmetic", order="mean"))])


SCHEMES = {"bf16": (93e9, 0.0, 0.9), "int8": (47e9, 0.02, 0.5), "bad": (50e9, 0.3, 0.7), "nf4": (26e9, 0.1, 0.2)}


def schemes() -> Pareto:
    rows = [
        (name, quantity, value, value * 0.9, value * 1.3, "", 1234)
        for name, values in SCHEMES.items()
        for quantity, value in zip(("bytes", "kl", "tpot_s"), values, strict=True)
    ]
    return Pareto(pd.DataFrame(rows, columns=COLUMNS), {"documents": 77, "model": {"name": "m"}})


@pytest.mark.parametrize(("x", "place", "factor", "front"), [
    ("bytes", 0, 1e-6, ["nf4", "int8", "bf16"]), ("tpot_s", 2, 1e3, ["nf4", "int8", "bf16"])])  # fmt: skip
def test_schemes_stand_where_they_were_measured_and_the_line_joins_those_that_none_beats(x, place, factor, front):
    ax = show.pareto(schemes(), x=x)
    for name, values in SCHEMES.items():
        at, height = see.marks(ax, name)
        assert (at[0], height[0]) == pytest.approx((values[place] * factor, values[1]))
    ends = [(v[place] * factor * 0.9, v[place] * factor * 1.3) for v in SCHEMES.values()]
    np.testing.assert_allclose([(low, high) for _, low, high in see.level_whiskers(ax)], ends)
    np.testing.assert_allclose(pairs(see.whiskers(ax)), [(v[1] * 0.9, v[1] * 1.3) for v in SCHEMES.values()])
    line = ax.lines[0]
    np.testing.assert_allclose(line.get_xdata(), [SCHEMES[name][place] * factor for name in front])
    np.testing.assert_allclose(line.get_ydata(), [SCHEMES[name][1] for name in front])
    assert see.numbers(see.note(ax))[:2] == [1234, 77]


def test_candidates_have_score_price_and_an_area_in_proportion_to_speed():
    given = [
        Candidate("good", (70, 60, 75), 0.5, (100, 90, 115)),
        Candidate("cheap", (60, 55, 68), 0.3, (50, 40, 65)),
        Candidate("beaten", (59, 50, 66), 0.6, (25, 20, 35)),
        Candidate("unpriced", (90, 80, 95), float("nan"), (90, 80, 100)),
    ]
    ax = show.quality_cost_speed(given, score="MMLU")
    points = ax.collections[-1]
    assert points.get_offsets().tolist() == [[0.5, 70], [0.3, 60], [0.6, 59]]
    areas = points.get_sizes()
    np.testing.assert_allclose(areas / areas[0], [1, 0.5, 0.25])
    assert see.whiskers(ax) == [(0.5, 60, 75), (0.3, 55, 68), (0.6, 50, 66)]
    labels = [line.get_label() for line in ax.lines]
    assert [see.numbers(label) for label in labels] == [
        [1, 100, 90, 115], [2, 50, 40, 65], [3, 25, 20, 35],
    ]  # fmt: skip
    white = [face[:3].tolist() == [1, 1, 1] for face in points.get_facecolors()]
    assert white == [False, False, True]
    assert see.numbers(see.note(ax))[0] == 3
    assert see.numbers(see.note(ax))[-1] == 1
