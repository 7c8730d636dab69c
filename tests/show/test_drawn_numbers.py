"""Every number of a figure, read back from its artists and compared with the arrays that were given."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from helpers import displayed as see
from helpers.numbers import DOMAINS, LAYERS, made_up, shares, strokes

import mixlens as ml

show = ml.show
EXPERTS = [str(expert) for expert in range(8)]


def spread(found) -> list[tuple[float, float]]:
    return [(low, high) for _, low, high in found]


def test_bars_of_experts_stand_in_clusters_with_their_intervals_in_the_colours_of_the_legend():
    data = shares()
    ax = show.expert_share(data, layer=9)
    one = data.sel(layer=9)
    np.testing.assert_allclose(see.bars(ax), one.estimate)
    np.testing.assert_allclose(spread(see.whiskers(ax)), strokes(one, "domain", "expert"))
    assert list(see.ticks(ax, "x").values()) == EXPERTS
    for i, group in enumerate(ax.containers):
        centres = [bar.get_x() + bar.get_width() / 2 for bar in group]
        assert np.round(centres).tolist() == list(range(8))
        assert see.colours_by_label(ax)[DOMAINS[i]] == see.to_hex(group[0].get_facecolor())
    assert len(set(see.colours_by_label(ax).values())) == 3
    assert "layer 9" in see.title(ax)


def test_bars_of_domains_stand_in_clusters_the_other_way_round():
    data = shares(missing=True)
    ax = show.expert_share(data, layer=5, x="domain")
    one = data.sel(layer=5)
    np.testing.assert_allclose(see.bars(ax), one.estimate.T)
    assert list(see.ticks(ax, "x").values()) == list(DOMAINS)
    assert list(see.colours_by_label(ax)) == [f"expert {e}" for e in range(8)]


def test_the_layer_that_is_drawn_without_a_wish_is_the_middle_one():
    np.testing.assert_allclose(see.bars(show.expert_share(shares())), shares().estimate.sel(layer=9))
    odd = shares(layers=(3, 4, 8))
    np.testing.assert_allclose(see.bars(show.expert_share(odd)), odd.estimate.sel(layer=4))


def test_a_grid_draws_the_layers_that_its_titles_name_on_one_scale_that_holds_all_whiskers():
    data = shares(layers=(2, 5, 9, 14, 20))
    figure = show.expert_share_grid(data)
    for ax, layer in zip(figure.axes, (2, 9, 20), strict=True):
        assert see.title(ax).endswith(f"layer {layer}")
        np.testing.assert_allclose(see.bars(ax), data.estimate.sel(layer=layer))
        assert ax.get_ylim()[1] == pytest.approx(1.12 * float(data.ci_high.sel(layer=[2, 9, 20]).max()))
    asked = show.expert_share_grid(data, layers=[14, 5], x="domain")
    np.testing.assert_allclose(see.bars(asked.axes[0]), data.estimate.sel(layer=14).T)
    np.testing.assert_allclose(see.bars(asked.axes[1]), data.estimate.sel(layer=5).T)
    assert [text.get_text() for text in asked.legends[0].get_texts()] == [f"expert {e}" for e in range(8)]


def test_small_print_has_the_smallest_and_largest_counts_the_level_and_chance():
    data = shares()
    one = data.sel(layer=9)
    said = see.numbers(see.note(show.expert_share(data, layer=9)))
    n, documents = one.n.to_numpy(), one.n_documents.to_numpy()
    assert said == [n.min(), n.max(), documents.min(), documents.max(), 90, 12.5]


@pytest.mark.parametrize("statistic", ["load_balance", "routing_entropy"])
def test_lines_by_layer_stand_at_the_numbers_of_their_layers(statistic):
    data = made_up({"layer": LAYERS, "domain": DOMAINS}, statistic=statistic, unit="bits", uniform=None)
    ax = show.by_layer(data)
    assert list(see.colours_by_label(ax)) == list(DOMAINS)
    at = []
    for i, domain in enumerate(DOMAINS):
        x, y = see.marks(ax, domain)
        assert np.round(x).tolist() == list(LAYERS)
        np.testing.assert_allclose(y, data.estimate.sel(domain=domain))
        strokes_of = see.whiskers(ax)[4 * i : 4 * i + 4]
        np.testing.assert_allclose([where for where, _, _ in strokes_of], x)
        np.testing.assert_allclose(spread(strokes_of), strokes(data.sel(domain=domain), "layer"))
        at.append(x)
    assert np.all(np.diff(at, axis=0) > 0)  # side by side, never one over the other
    assert ax.get_ylabel() == "bits"
    assert ax.get_xlabel() == "layer"
    assert ax.get_xlim() == (1.5, 14.5)


def test_a_line_stops_where_a_number_is_missing():
    data = made_up({"domain": ["wiki"], "layer": LAYERS}, statistic="routing_entropy", unit="bits", missing=True)
    _, y = see.marks(show.by_layer(data), "wiki")
    assert np.isnan(y).tolist() == [False, False, False, True]


def test_each_line_of_its_own_chance_has_that_chance_in_its_colour():
    data = made_up({"layer": LAYERS, "choice": ["either", "first"]}, statistic="repetition", uniform=[0.125, 0.46])
    ax = show.by_layer(data)
    dashed = [line for line in ax.lines if len(set(np.asarray(line.get_ydata()).tolist())) == 1]
    levels = {see.to_hex(line.get_color()): float(line.get_ydata()[0]) for line in dashed}
    colours = see.colours_by_label(ax)
    assert levels == {colours["first choice repeats"]: 0.125, colours["first or second choice repeats"]: 0.46}


def test_the_band_of_entropy_is_its_interval_at_every_layer():
    data = made_up({"layer": LAYERS}, statistic="routing_entropy", unit="bits", uniform=3.0)
    ax = show.routing_entropy(data)
    for layer in LAYERS:
        one = data.sel(layer=layer)
        assert see.band(ax)[layer] == pytest.approx((float(one.ci_low), float(one.ci_high)))
    assert ax.lines[0].get_xdata().tolist() == list(LAYERS)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), data.estimate)
    assert ax.lines[1].get_ydata()[0] == 3.0
    assert ax.get_ylim()[0] == 0


@pytest.mark.parametrize(("choice", "first_of_table"), [("first", 0.14), ("either", 0.465)])
def test_repetition_draws_the_choice_asked_for_and_the_published_one_at_its_relative_depth(choice, first_of_table):
    data = made_up({"domain": DOMAINS, "layer": LAYERS, "choice": ["first", "either"]}, statistic="repetition")
    ax = show.repetition(data, choice=choice, published=ml.stats.table5())
    np.testing.assert_allclose(see.marks(ax, "wiki")[1], data.estimate.sel(domain="wiki", choice=choice))
    at, values = see.marks(ax, "Mixtral-8x7B, published")
    np.testing.assert_allclose(at, [2, 2 + 15 / 31 * 12, 14])
    assert values[0] == first_of_table
    hollow = [line for line in ax.lines if line.get_marker() == "D" and line.get_markerfacecolor() == "none"]
    assert len(hollow) == ml.stats.table5().sizes["domain"]


def test_information_and_its_permuted_labels_are_told_apart():
    data = made_up(
        {"measure": ["excess", "permuted", "mutual_information"], "layer": LAYERS}, statistic="domain_information"
    )
    ax = show.domain_information(data.assign_attrs(unit="bits"))
    np.testing.assert_allclose(see.marks(ax, "mutual information")[1], data.estimate.sel(measure="mutual_information"))
    np.testing.assert_allclose(see.marks(ax, "domain labels permuted")[1], data.estimate.sel(measure="permuted"))
    assert len(see.colours_by_label(ax)) == 2


MAPS = {
    "share": (lambda data: show.share_heatmap(data), "layer", "expert"),
    "by domain": (lambda data: show.specialization(data), "domain", "expert"),
    "together": (lambda data: show.coactivation(data, layer=5), "expert", "expert_j"),
    "moves": (lambda data: show.transitions(data, layer=5), "expert", "expert_j"),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_has_its_rows_down_its_columns_across_and_no_colour_for_what_is_missing(name):
    draw, down, across = MAPS[name]
    dims = {"expert_j": range(6), "layer": LAYERS, "expert": range(6)}
    if down == "layer":
        dims = {"expert": range(6), "layer": LAYERS}
    elif down == "domain":
        dims = {"expert": range(6), "domain": DOMAINS}
    data = made_up(dims, missing=True)
    ax = draw(data)
    drawn = data.sel(layer=5) if "layer" in dims and down != "layer" else data
    expected = drawn.estimate.transpose(down, across).to_numpy()
    np.testing.assert_allclose(see.cells(ax), expected)
    assert list(see.ticks(ax, "y").values()) == [str(v) for v in data[down].to_numpy()]
    assert list(see.ticks(ax, "x").values()) == [str(v) for v in data[across].to_numpy()]
    assert ax.yaxis_inverted()
    digits = [f"{100 * v:.0f}" if np.isfinite(v) else "–" for v in expected.ravel()]
    assert see.words(ax) == digits
    places = [text.get_position() for text in ax.texts if text.get_gid() != "note"]
    assert places == [(j + 0.5, i + 0.5) for i, j in np.ndindex(expected.shape)]
    bold = [text.get_fontweight() == "bold" for text in ax.texts if text.get_gid() != "note"]
    assert bold == drawn.survives.transpose(down, across).to_numpy().ravel().tolist()
    assert 0 < sum(bold) < len(bold)


def test_the_colour_scale_is_centred_on_chance_and_ends_at_the_furthest_number():
    data = made_up({"layer": LAYERS, "expert": range(6)})
    far = float(np.abs(data.estimate.to_numpy() - 0.125).max())
    assert see.scale(show.share_heatmap(data)) == pytest.approx((0.125 - far, 0.125 + far))
    assert see.scale(show.share_heatmap(data, limit=0.5)) == pytest.approx((-0.375, 0.625))
    ends = show.share_heatmap(data).figure.axes[1].get_ylim()
    assert ends == pytest.approx((0, 0.125 + far))  # no share is below 0


@pytest.mark.parametrize("layers", [range(0, 56), range(3, 63, 2), [0, 15, 31]])
def test_layers_are_labelled_by_their_numbers_where_not_all_are(layers):
    data = made_up({"layer": layers, "expert": range(4)})
    importance = data.assign_attrs(statistic="expert_importance", unit="nats", metric="loss", how="zero")
    errors = data.assign_attrs(statistic="expert_errors")
    size = data.assign_attrs(statistic="expert_contribution", measure="norm", unit="logits")
    for ax in (
        show.share_heatmap(data),
        show.expert_importance(importance),
        show.expert_contribution(size),
        show.expert_errors(errors),
    ):
        labels = see.ticks(ax, "y")
        assert len(labels) <= 32
        assert {int(place - 0.5): label for place, label in labels.items()} == {
            int(place - 0.5): str(list(layers)[int(place - 0.5)]) for place in labels
        }
        np.testing.assert_allclose(see.cells(ax), data.estimate)


def test_panels_are_of_the_value_they_name_and_share_one_scale():
    data = shares()
    figure = show.facet(show.share_heatmap, data, "domain", columns=2)
    far = float(np.abs(data.estimate - 0.125).max())
    for ax, domain in zip(figure.axes, DOMAINS, strict=False):
        assert see.title(ax) == domain
        np.testing.assert_allclose(see.cells(ax), data.estimate.sel(domain=domain))
        assert see.scale(ax) == pytest.approx((0.125 - far, 0.125 + far))
    by_layer = show.facet(show.expert_share, data, "layer")
    np.testing.assert_allclose(see.bars(by_layer.axes[3]), data.estimate.sel(layer=14))


def test_transitions_over_several_layers_say_how_many():
    data = made_up({"layer": LAYERS, "expert": range(6), "expert_j": range(6)}, gap=3)
    assert 3 in see.numbers(show.transitions(data).get_xlabel())
    assert see.numbers(show.transitions(data.assign_attrs(gap=1)).get_xlabel()) == []


def test_of_a_domain_the_heat_map_is_of_that_domain():
    data = shares()
    ax = show.specialization(data, domain="github")
    np.testing.assert_allclose(see.cells(ax), data.estimate.sel(domain="github"))
    assert "github" in see.title(ax)


def test_numbers_without_a_document_are_counted_as_tokens_of_none():
    data = xr.Dataset.drop_vars(shares(), "n_documents")
    assert len(see.numbers(see.note(show.expert_share(data, layer=5)))) == 4


def test_lines_are_named_where_there_are_several():
    several = show.by_layer(shares().sel(expert=0)).get_legend()
    assert [text.get_text() for text in several.get_texts()][:3] == list(DOMAINS)
    assert show.by_layer(shares().sel(expert=0, domain=DOMAINS[0])).get_legend() is None


@pytest.mark.parametrize("least", [0.0, 0.01])
def test_colours_of_changes_reach_to_the_largest_and_as_far_below_zero(least):
    data = made_up({"layer": LAYERS, "expert": range(8)}, statistic="expert_importance", unit="nats", metric="loss",
                   how="zero")  # fmt: skip
    data["estimate"][0, 0], data["estimate"][1, 1] = least, -0.3
    mesh = show.expert_importance(data).collections[0]
    largest = float(abs(data.estimate).max())
    assert mesh.get_clim() == pytest.approx((-largest, largest))
