"""Corpora that invite false claims, through statistics, figures, views, findings and reports: nothing is claimed."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import pandas as pd
import pytest
from helpers.clustered import SHARES, clustered
from helpers.inside import Analysis, analyse, findings, summary
from matplotlib.figure import Figure
from matplotlib.text import Text

import mixlens as ml

show, stats = ml.show, ml.stats
FIGURES = {
    "share": lambda t: show.share_heatmap(stats.expert_share(t)),
    "bars": lambda t: show.expert_share(stats.expert_share(t, by="domain")),
    "three layers": lambda t: show.expert_share_grid(stats.expert_share(t)),
    "balance": lambda t: show.by_layer(stats.load_balance(t).sel(measure="cv")),
    "predictability": lambda t: show.by_layer(stats.predictability(t)),
    "repetition": lambda t: show.repetition(stats.repetition(t, by="domain"), published=stats.table5()),
    "entropy": lambda t: show.routing_entropy(stats.routing_entropy(t)),
    "information": lambda t: show.domain_information(stats.domain_information(t)),
    "text": lambda t: show.text(t, sequence=0),
    "by domain": lambda t: show.facet(show.share_heatmap, stats.expert_share(t, by="domain"), "domain"),
    "specialization": lambda t: show.specialization(stats.domain_specialization(t)),
    "position": lambda t: show.specialization(stats.position_profile(t)),
    "together": lambda t: show.coactivation(stats.coactivation(t)),
    "moves": lambda t: show.transitions(stats.transitions(t)),
}
VIEWS = {
    "bars": lambda t: ml.view.expert_share(stats.expert_share(t, by="domain")),
    "share": lambda t: ml.view.share_heatmap(stats.expert_share(t, by="domain")),
    "together": lambda t: ml.view.coactivation(stats.coactivation(t)),
    "moves": lambda t: ml.view.transitions(stats.transitions(t)),
}


def made(
    seed: int, n: int, shares: np.ndarray, *, length: int = 60, giant: int = 0, domains: bool = True, **columns
) -> ml.Trace:
    """Documents of two domains without any difference, whose two experts a token follow `shares` in 3 layers."""
    rng = np.random.default_rng(seed)
    first, tokens, _ = clustered(rng, shares, n_documents=n, spread=0.4, concentration=20, n_layers=3, length=length)
    if giant:
        grown = np.concatenate([np.flatnonzero(tokens["sequence"] == 0)] * giant + [np.flatnonzero(tokens["sequence"])])
        first, tokens = first[grown], {"sequence": tokens["sequence"][grown]}
    second = (first + rng.integers(1, 8, first.shape)) % 8
    second = np.where(second == 7, (first + 1) % 7, second)  # expert 7 is never a second choice
    second = np.where(second == first, (first + 2) % 7, second)
    tokens["token_id"] = rng.integers(0, 40, len(first))
    table = pd.DataFrame({"domain": np.where(np.arange(n) % 2, "x", "y")} if domains else {}, index=range(n))
    logits = np.where(np.arange(8) == first[..., None], 3.0, np.where(np.arange(8) == second[..., None], 2.0, 0.0))
    return ml.Trace.from_arrays(
        np.stack([first, second], -1), n_experts=8, router_logits=logits, tokens=tokens,
        sequences=table.assign(**columns),
    )  # fmt: skip


NEVER = np.array([0.2, 0.2, 0.15, 0.15, 0.1, 0.1, 0.1, 0.0])  # expert 7 is never a first choice either
CORPORA = {
    "two documents": lambda: made(0, 2, SHARES),
    "three documents": lambda: made(1, 3, SHARES),
    "one giant document": lambda: made(2, 12, SHARES, giant=400),
    "one work in chapters": lambda: made(3, 12, SHARES, document_id="the same work"),
    "one document again and again": lambda: ml.concat([made(4, 1, SHARES)] * 6),
}


@pytest.fixture(scope="module", params=list(CORPORA))
def trace(request) -> ml.Trace:
    return CORPORA[request.param]()


def bold(drawn) -> list[str]:
    axes = drawn.axes if isinstance(drawn, Figure) else [drawn]
    return [t.get_text() for ax in axes for t in ax.texts if t.get_fontweight() == "bold" and t.get_gid() != "note"]


def written(drawn) -> list[str]:
    axes = drawn.axes if isinstance(drawn, Figure) else [drawn]
    return [text.get_text() for ax in axes for text in ax.findobj(Text)]


def drawable(name: str, trace: ml.Trace, draw):
    """The figure, or None where mixlens refuses it in words."""
    try:
        return draw(trace)
    except ml.BadInput:
        assert name in ("by domain", "bars", "specialization", "information", "predictability", "repetition")
        return None


@pytest.mark.parametrize("name", FIGURES)
def test_no_figure_marks_a_cell(trace, name, request):
    if name == "position" and request.node.callspec.params["trace"] == "one giant document":
        pytest.skip("early positions have as many tokens of every document, and the experts are not alike")
    drawn = drawable(name, trace, FIGURES[name])
    if drawn is not None:
        assert bold(drawn) == []
        assert not re.search(r"\bnan\b", " ".join(written(drawn)))


def test_contrasts_are_false_as_seldom_with_a_giant_document_as_without():
    for giant in (0, 200):
        found = [
            stats.contrast(made(seed, 12, SHARES, giant=giant), stats.expert_share, by="domain", a="x")
            for seed in range(20)
        ]
        assert sum(bool(one.survives.any()) for one in found) <= 3  # 5 %, and two standard errors
    few = stats.contrast(made(0, 4, SHARES), stats.expert_share, by="domain", a="x")
    assert not few.survives.any()
    assert np.ma.getmaskarray(show.contrast(few).collections[0].get_array()).all()


@pytest.mark.parametrize("name", VIEWS)
def test_no_view_holds_a_survivor(trace, name, monkeypatch):
    seen = {}
    for module in ("matrices", "plots"):
        monkeypatch.setattr(f"mixlens.live.{module}.pack", lambda header, arrays: seen.update(arrays) or "")
    if drawable(name, trace, VIEWS[name]) is not None:
        assert not np.any(seen.get("survives", False))


def analysed(trace: ml.Trace) -> list[str]:
    found = analyse(trace, "made")
    assert isinstance(found, Analysis)
    return findings(found)


def claims(sentences: list[str]) -> list[str]:
    """Sentences that call something different, in one cell or layer at least."""
    return [
        sentence
        for sentence in sentences
        if "significantly" in sentence
        and not re.match(r"No |In no layer", sentence)
        and not re.search(r"from that in 0 of|\b0 of \d+ layers", sentence)
    ]


def test_no_finding_claims_a_difference(trace):
    sentences = analysed(trace)
    assert sentences
    assert claims(sentences) == []
    assert not any("nan" in sentence for sentence in sentences)


@pytest.mark.parametrize("name", ["two documents", "one giant document"])
def test_the_report_claims_nothing_and_says_why(name, tmp_path):
    page = ml.report(CORPORA[name](), tmp_path / "r.html").read_text("utf-8")
    said = [unescape(item) for item in re.findall(r"<li>(.*?)</li>", page)]
    assert any("None" in item or item.startswith(("No ", "In no layer")) for item in said)
    assert claims(said) == []
    assert re.search("need at least two documents" if name == "two documents" else r"count as 1\.0 documents", page)


def test_a_report_says_where_intervals_are_too_wide_to_be_of_use_and_what_would_help():
    few, many = made(7, 4, SHARES, domains=False), made(7, 60, SHARES, domains=False)
    text = summary(analyse(few, "made"))
    assert "too wide to be of use" in text
    planned = stats.plan(few, stats.expert_share, half_width=1 / 40)
    assert f"About {int(planned['documents'].median()):,} documents" in text
    assert "too wide" not in summary(analyse(many, "made"))


def test_what_has_no_interval_says_so_in_every_form(tmp_path):
    """Of one document nothing is known of others: tables, figures, views and the report say that alike."""
    one = made(8, 1, SHARES, domains=False)
    share = stats.expert_share(one)
    assert share.ci_low.isnull().all()
    page = ml.report(one, tmp_path / "r.html").read_text("utf-8")
    forms = {
        "markdown": show.tables.to_markdown(share),
        "latex": show.tables.to_latex(share),
        "html": show.tables.html_table(share),
        "figure": " ".join(written(show.expert_share(share))),
        "view": ml.view.expert_share(share).static + ml.view.share_heatmap(share).static,
        "report": page,
        "finding": " ".join(analysed(one)),
    }
    for form, text in forms.items():
        assert "no interval" in text, form
        assert not re.search(r"\bnan\b", re.sub("<script.*?</script>", "", text, flags=re.DOTALL), re.IGNORECASE), form


def test_an_expert_never_used_is_no_certainty_and_nothing_is_invented_for_it():
    trace = made(5, 16, NEVER)
    share = stats.expert_share(trace).sel(expert=7)
    assert (share.estimate == 0).all()
    assert (share.ci_high > 0).all()
    together, moves = stats.coactivation(trace).sel(expert=7), stats.transitions(trace).sel(expert=7)
    for data in (together, moves):
        assert data.estimate.isnull().all()
        assert not data.survives.any()
    assert not any("expert 7 also go" in sentence for sentence in analysed(trace))
    for draw in FIGURES.values():
        draw(trace)


def test_of_two_equal_runs_nothing_differs_anywhere():
    trace = made(6, 20, SHARES)
    moved = stats.moved(trace, trace).sel(measure="share_change")
    for data in (stats.contrast(trace, trace, stats.expert_share), moved, stats.flips(trace, trace)):
        assert not data.survives.any()
    halves = [
        stats.contrast(made(seed, 20, SHARES), made(seed + 50, 20, SHARES), stats.expert_share) for seed in range(8)
    ]
    assert sum(bool(found.survives.any()) for found in halves) <= 2  # 5 %, and more than two standard errors


@pytest.fixture(scope="module")
def demo():
    return ml.load("demo", verbose=False)


QUIET = ml.RecordSettings(max_length=24, overlong="truncate", progress=False)


def test_experiments_on_two_documents_mark_and_name_nothing(demo, tmp_path):
    documents = ml.demo_documents()[:2]
    ablation = ml.experiments.Ablation(layers=[0, 7])
    importance = ml.experiments.measure_importance(demo, documents, ablation=ablation, settings=QUIET)
    contributions = ml.experiments.measure_contributions(demo, documents, settings=QUIET)
    maps = [
        show.expert_importance(stats.expert_importance(importance)),
        show.importance_by_domain(stats.expert_importance(importance, by="domain")),
        show.expert_contribution(stats.expert_contribution(contributions)),
        show.contribution_by_domain(stats.expert_contribution(contributions, by="domain")),
    ]
    for ax in maps:
        assert [line for line in ax.lines if line.get_marker() == "." and len(line.get_xdata())] == []
    page = ml.report([importance, contributions], tmp_path / "r.html").read_text("utf-8")
    assert "significantly from 0" in page
    assert not re.search(r"[1-9][\d,]* numbers differ", page)


def test_a_model_beside_itself_is_no_better_and_loses_nothing(demo):
    impact = ml.experiments.measure_impact(demo, demo, ml.demo_documents()[:6], settings=QUIET)
    split = impact.split()
    assert impact.rest == "weights"
    assert not split.survives.any()
    np.testing.assert_allclose(split.estimate.sel(quantity="loss"), 0, atol=1e-6)
    log = ml.evaluate(demo, ["demo"], limit=2, settings=ml.evals.EvalSettings(progress=False))
    compared = ml.compare(log, log)
    assert not compared.table["survives"].any()
    assert all("cannot tell" in verdict for verdict in compared.verdicts())
    points = [line for line in show.paired_differences(compared).lines if line.get_marker() == "o"]
    assert {point.get_markerfacecolor() for point in points} == {"white"}
