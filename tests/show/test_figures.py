import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from helpers.refusals import refused
from matplotlib.figure import Figure
from show_samples import dataset

from mixlens import show, stats
from mixlens.errors import BadInput
from mixlens.plot import labels as wording
from mixlens.plot.colours import EXPERT_COLOURS, expert_colours
from mixlens.plot.style import families, note_of, own_figure, printable
from mixlens.trace.trace import Trace


@pytest.fixture
def entropy() -> xr.Dataset:
    bits = np.array([2.9, 2.5, 2.6, 2.1])
    return dataset(
        bits,
        {"layer": range(4)},
        n=((), 1440),
        n_documents=((), 24),
        statistic="routing_entropy",
        unit="bits",
        uniform=3.0,
    )


@pytest.fixture(scope="module")
def repetition(trace) -> xr.Dataset:
    return stats.repetition(trace, by="domain")


def bars(ax) -> np.ndarray:
    return np.array([[bar.get_height() for bar in group] for group in ax.containers])


def plotted(ax, label: str) -> np.ndarray:
    """Values of the markers of the line called `label`."""
    return next(line for line in ax.lines if line.get_label() == label).get_ydata()


def test_expert_share_draws_every_estimate_and_interval(share):
    ax = show.expert_share(share, layer=2)
    expected = share.sel(layer=2)
    np.testing.assert_allclose(bars(ax), expected["estimate"].transpose("domain", "expert"))
    drawn = np.concatenate([[segment[:, 1] for segment in lines.get_segments()] for lines in ax.collections])
    np.testing.assert_allclose(drawn[:, 0], expected["ci_low"].transpose("domain", "expert").to_numpy().ravel())
    np.testing.assert_allclose(drawn[:, 1], expected["ci_high"].transpose("domain", "expert").to_numpy().ravel())


def test_expert_share_by_domain_on_the_axis(share):
    ax = show.expert_share(share, layer=2, x="domain")
    np.testing.assert_allclose(bars(ax), share.sel(layer=2)["estimate"].transpose("expert", "domain"))
    assert [t.get_text() for t in ax.get_xticklabels()] == list(share["domain"].to_numpy())
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [f"expert {e}" for e in range(8)]


def test_expert_share_draws_the_uniform_line(share):
    ax = show.expert_share(share)
    assert [list(line.get_ydata()) for line in ax.lines] == [[0.125, 0.125]]


def test_expert_share_needs_a_known_layer_and_x(share):
    with refused(BadInput, "layer", 9):
        show.expert_share(share, layer=9)
    with refused(BadInput, "x", "layer"):
        show.expert_share(share, x="layer")


def test_grid_has_first_middle_and_last_layer_on_one_scale(share):
    figure = show.expert_share_grid(share)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["Expert share, layer 0", "layer 1", "layer 3"]
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    np.testing.assert_allclose(bars(figure.axes[2]), share.sel(layer=3)["estimate"])


def test_every_axes_function_draws_on_the_given_axes(share, trace, entropy, repetition):
    functions = {
        show.expert_share: share,
        show.share_heatmap: share.isel(domain=0),
        show.specialization: share,
        show.by_layer: entropy,
        show.routing_entropy: entropy,
        show.repetition: repetition,
        show.coactivation: stats.coactivation(trace),
        show.transitions: stats.transitions(trace),
        show.domain_information: stats.domain_information(trace),
        show.text: trace,
    }
    for draw, data in functions.items():
        ax = Figure().add_subplot()
        assert draw(data, ax=ax) is ax, draw.__name__
        assert ax.has_data(), draw.__name__
        assert "n = " in note_of(ax), draw.__name__


@pytest.mark.parametrize("draw", [show.expert_share, show.specialization])
def test_note_has_n_documents_level_and_denominator(share, draw):
    note = note_of(draw(share))
    drawn = "95 % interval" if draw is show.expert_share else "false discovery rate of 5 %"
    for expected in ("n = 360 tokens per domain", "6 documents per domain", drawn, "12.5 % of assignments"):
        assert expected in note


def test_denominator_of_a_share_is_named(share):
    tokens = share.assign_attrs(statistic="domain_specialization", uniform=0.25)
    assert "25 % of the domain's tokens" in note_of(show.specialization(tokens))
    assert "of assignments" in show.expert_share(share).get_ylabel()


def test_by_layer_draws_one_line_a_combination(repetition):
    part = repetition.sel(domain="github")
    ax = show.by_layer(part)
    np.testing.assert_allclose(plotted(ax, "first choice repeats"), part["estimate"].sel(choice="first"))
    np.testing.assert_allclose(plotted(ax, "first or second choice repeats"), part["estimate"].sel(choice="either"))
    uniform = {round(float(line.get_ydata()[0]), 4) for line in ax.lines if line.get_linestyle() == "--"}
    assert uniform == {0.125, 0.4643}


def test_by_layer_refuses_what_cannot_be_read(share, trace):
    with refused(BadInput, "data"):
        show.by_layer(share)
    with refused(BadInput, "data"):
        show.by_layer(stats.agreement(trace, trace))


def test_entropy_band_is_the_interval(entropy):
    ax = show.routing_entropy(entropy)
    outline = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert outline.min() == pytest.approx(float(entropy["ci_low"].min()))
    assert outline.max() == pytest.approx(float(entropy["ci_high"].max()))


def test_repetition_sets_the_published_table_beside(repetition):
    ax = show.repetition(repetition, published=stats.table5())
    np.testing.assert_allclose(plotted(ax, "arxiv"), repetition["estimate"].sel(domain="arxiv", choice="first"))
    published = plotted(ax, "Mixtral-8x7B, published")
    np.testing.assert_allclose(published, [0.14, 0.279, 0.227])
    assert "another model, Mixtral-8x7B" in note_of(ax)
    assert "Jiang et al. 2024, Table 5" in note_of(ax)


def test_information_stands_beside_its_permuted_baseline(trace):
    data = stats.domain_information(trace)
    ax = show.domain_information(data)
    for measure in ("mutual_information", "permuted"):
        np.testing.assert_allclose(plotted(ax, wording.label(measure)), data["estimate"].sel(measure=measure))


def test_heatmap_has_a_scale_centred_on_uniform_and_a_digit_in_every_cell(share):
    one = share.sel(domain="github")
    ax = show.share_heatmap(one)
    mesh = ax.collections[0]
    np.testing.assert_allclose(mesh.get_array(), one["estimate"])
    assert np.mean(mesh.get_clim()) == pytest.approx(0.125)
    digits = [t for t in ax.texts if t.get_gid() != "note"]
    assert [t.get_text() for t in digits] == [f"{100 * v:.0f}" for v in one["estimate"].to_numpy().ravel()]
    assert [t.get_fontweight() == "bold" for t in digits] == list(one["survives"].to_numpy().ravel())


def test_heatmap_does_not_make_noise_vivid():
    flat = np.full((4, 8), 0.125) + np.linspace(-1e-3, 1e-3, 8)
    data = dataset(
        flat,
        {"layer": range(4), "expert": range(8)},
        n=((), 10),
        n_documents=((), 2),
        statistic="expert_share",
        unit="fraction",
        uniform=0.125,
    )
    low, high = show.share_heatmap(data).collections[0].get_clim()
    assert (low, high) == pytest.approx((0.1, 0.15))


def test_heatmap_of_several_domains_says_what_to_select(share):
    with refused(BadInput, "data", ["domain"]):
        show.share_heatmap(share)


def test_missing_numbers_are_no_colour_and_no_number(trace):
    data = stats.coactivation(trace)
    ax = show.coactivation(data, layer=1)
    assert ax.collections[0].get_array().mask.diagonal().all()
    digits = [t.get_text() for t in ax.texts if t.get_gid() != "note"]
    assert digits[:: data.sizes["expert"] + 1] == ["–"] * data.sizes["expert"]


def test_transitions_name_their_layer(trace):
    data = stats.transitions(trace)
    ax = show.transitions(data, layer=1)
    np.testing.assert_allclose(ax.collections[0].get_array(), data["estimate"].sel(layer=1))
    assert "layer 1" in ax.get_title(loc="left")


def test_facets_share_their_scale(share):
    figure = show.facet(show.share_heatmap, share, "domain")
    panels = figure.axes[: share.sizes["domain"]]
    assert len({ax.collections[0].get_clim() for ax in panels}) == 1
    assert [ax.get_title(loc="left") for ax in panels] == list(share["domain"].to_numpy())
    assert len(figure.axes) == len(panels) + 1
    assert "n = 360 tokens per domain" in figure.get_suptitle()


def test_permuting_experts_permutes_the_bars(share):
    order = [3, 1, 2, 0, 7, 6, 5, 4]
    plain, permuted = show.expert_share(share), show.expert_share(share.isel(expert=order))
    np.testing.assert_allclose(bars(permuted), bars(plain)[:, order])


def test_text_shows_choices_of_its_tokens(trace):
    ax = show.text(trace, sequence=7, layer=3)
    ids = trace.read("expert_id")[trace.read("sequence") == 7, 3]
    digits = [
        int(t.get_text()) for t in ax.texts if t.get_gid() != "note" and t.get_fontfamily()[0] != "DejaVu Sans Mono"
    ]
    assert digits == list(ids[: len(digits), 0])
    assert ax.patches[0].get_facecolor()[:3] == pytest.approx(
        tuple(int(EXPERT_COLOURS[ids[0, 0]][i : i + 2], 16) / 255 for i in (1, 3, 5))
    )
    assert f"n = {len(digits)} of 60 tokens" in note_of(ax)


def test_text_of_an_unknown_sequence_or_layer(trace):
    with refused(BadInput, "sequence", 99):
        show.text(trace, sequence=99)
    with refused(BadInput, "layer", 12):
        show.text(trace, layer=12)


def test_colours_of_many_experts_are_distinct():
    assert expert_colours(8) == list(EXPERT_COLOURS)
    assert len(set(expert_colours(64))) == 64


def test_a_text_finds_signs_that_its_own_font_lacks():
    assert printable("😀", ["DejaVu Sans Mono"]) == "□"
    assert printable("😀 שלום", families("DejaVu Sans Mono")) == "😀 שלום"
    one = Trace.from_arrays(np.tile([0, 1], (2, 1, 1)), n_experts=4, tokens={"token_id": np.arange(2)})
    one._vocabulary = pd.Series(["▁😀", "▁שלום"])
    drawn = show.text(one)
    assert {" 😀", " שלום"} <= {text.get_text() for text in drawn.texts}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a glyph that no font has
        own_figure(drawn).png()


def test_no_formula_is_read_into_a_label_and_unknown_characters_show_as_boxes():
    assert printable("$x$ 🙂") == r"\$x\$ □"
    ax = show.by_layer(
        dataset(
            np.zeros((1, 2)),
            {"domain": [r"$\frac$ 🙂"], "layer": range(2)},
            n=((), 1),
            n_documents=((), 1),
            statistic="routing_entropy",
            unit="bits",
        )
    )
    ax.figure.png(dpi=50)


def test_figures_are_written_as_vectors_and_the_same_each_time(share, tmp_path):
    ax = show.expert_share(share)
    assert ax.save(tmp_path / "share.pdf").read_bytes().startswith(b"%PDF")
    assert show.expert_share(share).figure.svg() == show.expert_share(share).figure.svg()
    assert b"<text" not in ax.figure.svg()
    assert ax._repr_png_().startswith(b"\x89PNG")


def test_drawing_leaves_no_trace_in_matplotlib():
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import matplotlib
before = matplotlib.rcParams.copy()
from show_samples import make_trace, share_of
from mixlens import show
data = share_of(make_trace())
show.expert_share_grid(data).png(dpi=50)
show.facet(show.share_heatmap, data, "domain").svg()
assert "matplotlib.pyplot" not in sys.modules
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert matplotlib.rcParams.copy() == before
"""
    subprocess.run([sys.executable, "-c", code, __file__.rsplit("/", 1)[0]], check=True)
