import re
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr
from helpers.refusals import refused
from show_samples import HOSTILE, make_trace

from mixlens import stats
from mixlens.errors import BadInput, RunError
from mixlens.plot import labels as wording
from mixlens.reports.analysis import analyse
from mixlens.reports.findings import findings
from mixlens.reports.report import report
from mixlens.reports.symbols import symbols_of
from mixlens.trace.trace import Trace


@pytest.fixture(scope="module")
def saved(trace, tmp_path_factory) -> Trace:
    return trace.save(tmp_path_factory.mktemp("runs") / "sample")


@pytest.fixture(scope="module")
def page(saved, tmp_path_factory) -> str:
    return report(saved.path, tmp_path_factory.mktemp("report") / "report.html").read_text("utf-8")


class Addresses(HTMLParser):
    """Every address in an attribute that a browser would load or follow."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")]


def captions(page: str) -> list[str]:
    return [unescape(text) for text in re.findall(r"<figcaption>(.*?)</figcaption>", page)]


def test_every_section_is_there(page):
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    for heading in (
        "Findings",
        "What was recorded",
        "Text",
        "Expert share",
        "Groups",
        "Along the text",
        "Router",
        "Methods",
        "Provenance",
    ):
        assert heading in headings
    assert re.findall(r'<li><a href="#(s\d+)">', page) == re.findall(r'<section id="(s\d+)">', page)


def test_every_caption_has_its_n_and_every_figure_its_words(page):
    assert len(captions(page)) > 12
    for caption in captions(page):
        assert "n = " in caption, caption
    for alt in re.findall(r'<img alt="(.*?)"', page):
        assert len(alt) > 30


def test_every_finding_has_interval_and_n(trace):
    sentences = findings(analyse(trace, "sample"))
    assert len(sentences) >= 9
    for sentence in sentences:
        if "none survives" in sentence:
            continue
        assert re.search(r"\[([\d.-]+, [\d.-]+|no interval)\]", sentence), sentence
        assert re.search(r"\(n = [\d,]+ (tokens|token pairs), [\d,]+ documents\)", sentence), sentence


def test_findings_are_the_numbers_of_the_statistics():
    trace = make_trace(documents=15, tokens=30)
    data = stats.domain_specialization(trace, by="domain")
    far = np.abs(data["estimate"] - 0.25).where(data["survives"]).to_numpy()
    domain, layer, expert = np.unravel_index(np.nanargmax(far), far.shape)
    cell = data.isel(domain=domain, layer=layer, expert=expert)
    expected = (
        f"Most specialised: {data['domain'].to_numpy()[domain]}, layer {layer}, expert {expert}, chosen by "
        f"{100 * float(cell['estimate']):.1f} % [{100 * float(cell['ci_low']):.1f}, {100 * float(cell['ci_high']):.1f}]"
    )
    assert any(sentence.startswith(expected) for sentence in findings(analyse(trace, "sample")))


def test_groups_are_of_the_column_that_is_there_or_named(tmp_path):
    trace, renamed = (make_trace(documents=4, tokens=30, column=name) for name in ("domain", "condition"))
    found = analyse(renamed, "made")
    assert found.by == analyse(renamed, "made", "condition").by == "condition"
    xr.testing.assert_equal(
        found.found["expert_share by group"].rename(condition="domain"), stats.expert_share(trace, by="domain")
    )
    page = report(renamed, tmp_path / "r.html").read_text("utf-8")
    assert "Expert share by condition" in page
    with refused(BadInput, "by"):
        report(renamed, tmp_path / "other.html", by="domain")


def test_nothing_is_loaded(page):
    assert "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' blob:; img-src data:" in page
    assert not re.findall(r"<(?:link|iframe|object|embed|base)\b(?! rel=\"icon\" href=\"data:,\")", page)
    for address in Addresses(page).found:
        assert address.startswith(("data:", "#")), address
    assert not re.findall(r"@import|url\(\s*['\"]?(?!data:)http", page)


def test_published_figures_are_another_models(page):
    assert "Mixtral-8x7B, another model, as published" in page


def test_provenance_is_at_the_end(page, saved):
    last = page.rsplit("<h2>", 1)[1]
    assert last.startswith("Provenance")
    assert "plan.json" in last
    assert f"{len(saved.meta['files'])} files of" in last
    assert "sha256" in last
    assert re.search(r"Report written 20\d\d-", last)


def test_hostile_text_does_not_become_markup(page):
    assert HOSTILE[0].strip("▁") not in page
    assert HOSTILE[2] not in page
    assert page.count("<script>") == page.count("</script>")


def test_hostile_names_do_not_become_markup(tmp_path):
    trace = make_trace(domains=("<script>alert(3)</script>", "$a_1$ & 🙂"), documents=3, tokens=20, layers=2)
    trace.meta["model"] = {"name": "</title><script>alert(4)</script>"}
    page = report(trace, tmp_path / "r.html", title="<b>bold</b>").read_text("utf-8")
    assert "<script>alert" not in page
    assert "<b>bold</b>" not in page


def test_what_cannot_be_computed_is_named_with_its_reason(tmp_path, trace):
    bare = Trace.from_arrays(trace.read("expert_id"), n_experts=8, tokens={"sequence": trace.read("sequence")})
    page = report(bare, tmp_path / "bare.html").read_text("utf-8")
    missing = unescape(page.split("<h2>Not computed</h2>")[1].split("</section>")[0])
    assert "routing_entropy needs router_logits" in missing
    assert "vocabulary_specialization needs token_id" in missing
    assert "statistics by group" in missing
    assert "switch_loss needs router_logits" in missing
    assert "<h2>Expert share</h2>" in page


def test_several_runs_come_with_their_agreement(tmp_path):
    ids = make_trace(domains=("arxiv",), documents=4, tokens=20, layers=2).read("expert_id")
    first, other = (Trace.from_arrays(part, n_experts=8) for part in (ids, ids[:60]))
    saved = first.save(tmp_path / "saved")
    page = report([saved.path, first, other], tmp_path / "three.html").read_text("utf-8")
    assert "<h2>saved: What was recorded</h2>" in page
    assert "<h2>trace 2: What was recorded</h2>" in page
    assert "n = 80 tokens, 1 document." in page
    assert "<h2>saved and trace 3</h2><p>Not computed: " in page


def test_nothing_to_report_on(tmp_path):
    with refused(BadInput, "runs", 0):
        report([], tmp_path / "r.html")
    with refused(RunError, "path"):
        report(tmp_path / "nowhere", tmp_path / "r.html")
    empty = Trace.from_arrays(np.zeros((0, 2, 2), int), n_experts=4)
    with refused(BadInput, "runs", 0):
        report(empty, tmp_path / "r.html")
    for path in (tmp_path, tmp_path / "nowhere" / "r.html"):
        with refused(BadInput, "path"):
            report(empty, path)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ({"name": "/models/mine"}, "mine"),
        ({}, "a model"),
    ],
)
def test_a_model_is_called_by_its_name_or_folder(model, name):
    trace = Trace.from_arrays(np.zeros((1, 1, 1), int), n_experts=2, meta={"model": model})
    assert wording.model_name(trace) == name


def test_the_summary_has_five_findings_at_most_each_with_a_number_and_a_place(page):
    found = re.findall(r"<li>([^<]*) <a href=\"#(s\d+)\">", page.split('<ol class="findings">')[1].split("</ol>")[0])
    assert 1 <= len(found) <= 5
    for sentence, place in found:
        assert re.search(r"\[[\d.-]+, [\d.-]+\]", sentence) or "none survives" in sentence
        assert f'<section id="{place}">' in page


def test_every_symbol_of_a_formula_is_defined(trace):
    words = {
        "argmax",
        "log",
        "log2",
        "mean",
        "max",
        "softmax",
        "sorted",
        "sum",
        "less",
        "minus",
        "its",
        "under",
        "domains",
        "permuted",
    }
    words |= {"and", "have", "an", "expert", "in", "common", "first", "either", "of", "choice", "types", "with", "over"}
    words |= {"min", "count", "previous", "router", "logits", "switch", "loss", "documents", "held", "out", "accuracy"}
    for data in analyse(trace, "sample").found.values():
        formula = data.attrs["formula"]
        known = symbols_of([formula])
        for word in re.findall(r"[A-Za-z]+\d?", formula):
            letters = word if len(word) == 2 and word not in known else (word,)
            assert word in words or word in known or all(letter in known for letter in letters), (word, formula)


def test_runs_have_the_names_that_they_are_given(tmp_path, trace):
    page = report([trace, trace], tmp_path / "two.html", names=["before", "<b>after</b>"]).read_text("utf-8")
    assert "<h2>before: Groups</h2>" in page
    assert "<h2>&lt;b&gt;after&lt;/b&gt;: Groups</h2>" in page
    with refused(BadInput, "names", ["one"]):
        report([trace, trace], tmp_path / "two.html", names=["one"])
