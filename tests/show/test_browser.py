"""The report and the views in Debian's Chromium, from file://, with every other request refused and counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers.streams import bench_of, timed
from lab import CHROMIUM, FLAGS
from show_samples import HOSTILE, make_trace
from tiny import Letters, tiny_mixtral

import mixlens as ml
from mixlens import view
from mixlens.reports.report import report
from mixlens.trace.trace import Trace

pytestmark = pytest.mark.browser
AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not there; apt-get install chromium")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Open a file; what the page logs, throws and asks for is in `log`, `errors` and `requests`."""
    contexts = []

    def visit(path: Path, **options) -> SimpleNamespace:
        context = chromium.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        seen = SimpleNamespace(page=page, log=[], errors=[], requests=[])
        page.on("console", lambda message: seen.log.append(message.text))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("dialog", lambda dialog: (seen.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))

        def gate(route):
            if route.request.url.startswith(("file:", "blob:", "data:")):
                return route.continue_()
            seen.requests.append(route.request.url)
            return route.abort()

        page.route("**/*", gate)
        page.goto(path.as_uri())
        page.wait_for_selector('[data-ready="1"]', state="attached", timeout=20_000)
        return seen

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def report_file(trace, tmp_path_factory) -> Path:
    return report(trace, tmp_path_factory.mktemp("browser") / "report.html")


@pytest.fixture(scope="module")
def comparison_file(trace, tmp_path_factory) -> Path:
    return report(ml.compare(trace, trace), tmp_path_factory.mktemp("browser") / "comparison.html")


@pytest.fixture(scope="module")
def view_file(trace, tmp_path_factory) -> Path:
    return view.tokens(trace, [0, 7], layer=0).save(tmp_path_factory.mktemp("browser") / "view.html")


def clean(seen: SimpleNamespace) -> bool:
    return (seen.log, seen.errors, seen.requests) == ([], [], [])


def text_of_view(page) -> str:
    return page.locator(".mixlens .text").text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_opens_offline_with_a_clean_console(visit, report_file, scheme):
    seen = visit(report_file, color_scheme=scheme, offline=True)
    broken = seen.page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length")
    assert broken == 0
    assert clean(seen)


def test_report_fits_a_phone(visit, report_file):
    seen = visit(report_file, viewport={"width": 390, "height": 800})
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", [390, 1100])
@pytest.mark.parametrize("title", ["A" * 300, "words " * 60])
def test_a_report_of_two_runs_overflows_at_no_width(visit, trace, tmp_path, width, title):
    path = report([trace, trace], tmp_path / "two.html", title=title, names=["before", "x" * 200])
    seen = visit(path, viewport={"width": width, "height": 800})
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    assert clean(seen)


def test_headings_are_not_hidden_by_the_bar(visit, report_file):
    page = visit(report_file).page
    page.locator("nav a").nth(5).click()
    under = "document.querySelector('nav').getBoundingClientRect().bottom"
    heading = "document.querySelector(location.hash + ' h2').getBoundingClientRect().top"
    assert page.evaluate(f"{heading} >= {under}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("file", ["report_file", "comparison_file", "view_file"])
def test_axe_finds_nothing_serious(chromium, request, file, scheme):
    if not AXE.exists():
        pytest.skip(f"{AXE} is not there; npm install")
    context = chromium.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(request.getfixturevalue(file).as_uri())
    page.wait_for_selector('[data-ready="1"]', state="attached", timeout=20_000)
    page.add_script_tag(path=str(AXE))
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    context.close()
    assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []


def test_three_arrow_presses_move_the_layer_by_three(visit, view_file):
    seen = visit(view_file)
    slider = seen.page.locator('.mixlens input[type="range"]')
    slider.focus()
    for _ in range(3):
        seen.page.keyboard.press("ArrowRight")
    assert slider.input_value() == "3"
    assert seen.page.locator(".mixlens .slider output").text_content() == "3"
    assert clean(seen)


def test_arrow_keys_on_the_slider_stay_in_the_view(visit, view_file):
    page = visit(view_file).page
    page.evaluate("window.heard = 0; document.addEventListener('keydown', () => window.heard++)")
    page.locator('.mixlens input[type="range"]').focus()
    page.keyboard.press("ArrowRight")
    page.locator(".mixlens .text").focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("window.heard") == 0


def test_colours_are_the_trace_at_the_chosen_layer(visit, view_file, trace):
    page = visit(view_file).page
    page.locator(".mixlens select").first.select_option("1")
    page.locator(".mixlens .text").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    ids = trace.read("expert_id")[trace.read("sequence") == 7, 2]
    page.wait_for_function(PAINTED, arg=[""] * 60 + [f"t e{first} s{second}" for first, second in ids])
    assert page.locator(".mixlens .text span").count() == len(ids)


def test_readout_by_hover_click_and_keys(visit, view_file, trace):
    page = visit(view_file).page
    page.locator(".mixlens select").first.select_option("1")
    rows = trace.read("sequence") == 7
    ids, logprob = trace.read("expert_id")[rows, 0], trace.read("logprob")[rows]
    readout = page.locator(".mixlens .readout")
    tokens = page.locator(".mixlens .text span.t")
    tokens.nth(5).hover()
    assert "position5" in readout.text_content().replace(" ", "")
    tokens.nth(9).click()
    tokens.nth(5).hover()
    shown = readout.text_content()
    assert "position9" in shown
    assert f"{ids[9, 0]} (weight" in shown
    assert f"{logprob[9]:.2f} nat" in shown
    assert "bits" in shown
    page.locator(".mixlens .text").focus()
    page.keyboard.press("ArrowRight")
    assert "position10" in readout.text_content()
    page.keyboard.press("Home")
    assert "none (first token)" in readout.text_content()


def test_focus_mode_fades_the_other_experts(visit, view_file, trace):
    page = visit(view_file).page
    page.locator(".mixlens select").first.select_option("1")
    page.locator(".mixlens button.expert").nth(4).click()
    faded = page.locator(".mixlens .text span.t").evaluate_all("spans => spans.map(s => s.classList.contains('off'))")
    ids = trace.read("expert_id")[trace.read("sequence") == 7, 0]
    assert faded == [4 not in chosen for chosen in ids]


def test_hostile_text_shows_as_text(visit, view_file, report_file):
    for path in (view_file, report_file):
        seen = visit(path)
        shown = text_of_view(seen.page)
        for piece in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[3], HOSTILE[4], HOSTILE[8]):
            assert piece.replace("▁", " ") in shown
        assert "⟨E2⟩" in shown
        assert "(10,000 characters)" in shown
        assert seen.page.locator(".mixlens .text script, .mixlens .text img").count() == 0
        assert clean(seen)


def test_tables_sort_numbers_as_numbers_and_back(visit, report_file):
    page = visit(report_file).page
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    table = page.locator("table.sortable").nth(0)
    head = table.locator("th").nth(1)
    keys = "rows => rows.map(r => parseFloat(r.cells[1].dataset.v))"
    head.locator("button").click()
    ascending = table.locator("tbody tr").evaluate_all(keys)
    assert ascending == sorted(ascending)
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").press("Enter")
    assert table.locator("tbody tr").evaluate_all(keys) == sorted(ascending, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"


def test_view_follows_the_notebooks_theme(visit, view_file):
    page = visit(view_file, color_scheme="light").page
    frame = page.locator(".mixlens .frame")
    assert frame.get_attribute("data-theme") == "light"
    page.evaluate("document.body.dataset.jpThemeLight = 'false'")
    page.wait_for_selector(".mixlens .frame[data-theme=dark]")


def test_one_output_in_a_page_that_is_not_ours(visit, trace, tmp_path):
    path = tmp_path / "notebook.html"
    outputs = "".join(f"<div>{view.tokens(trace, n)._repr_html_()}</div>" for n in (0, 1))
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{outputs}</body>", "utf-8")
    seen = visit(path)
    seen.page.wait_for_function("document.querySelectorAll('[data-ready=\"1\"]').length === 2")
    assert clean(seen)


@pytest.mark.parametrize(("attached", "in_place"), [(True, True), (False, True), (True, False)])
def test_live_where_a_notebook_makes_the_scripts_anew(chromium, trace, attached, in_place):
    """After innerHTML JupyterLab puts a copy in the place of each script, before or after the node is shown; VS Code
    puts it at the node's end and takes it away again."""
    context = chromium.new_context()
    page = context.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.evaluate(
        """([html, attached, inPlace]) => {
            const node = document.createElement("div");
            if (attached) document.body.append(node);
            node.innerHTML = html;
            for (const old of node.querySelectorAll("script")) {
                const script = document.createElement("script");
                script.textContent = old.textContent;
                if (inPlace) old.replaceWith(script);
                else node.appendChild(script).remove();
            }
            if (!attached) document.body.append(node);
        }""",
        [view.tokens(trace, 3)._repr_html_(), attached, in_place],
    )
    page.wait_for_selector('[data-ready="1"]', state="attached", timeout=10_000)
    assert errors == []
    context.close()


def test_without_scripts_the_picture_stands(chromium, view_file):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(view_file.as_uri())
    assert page.locator(".mixlens img").is_visible()
    assert page.locator(".mixlens img").get_attribute("alt").startswith("Text of sequence 0, arxiv")
    assert page.locator(".mixlens table tr").count() == 9
    context.close()


# Class names in the box of the text, and how many spans changed theirs, right after a step of the slider; then whether
# all spans have theirs.
STEP = """async () => {
    const root = document.querySelector(".mixlens").shadowRoot, text = root.querySelector(".text");
    const slider = root.querySelector("input[type=range]"), box = text.getBoundingClientRect();
    const seen = () => [...text.querySelectorAll("span")].filter((span) => {
        const { top, bottom } = span.getBoundingClientRect();
        return bottom > box.top && top < box.bottom;
    });
    const watch = new MutationObserver(() => {});
    watch.observe(text, { subtree: true, attributeFilter: ["class"] });
    slider.value = 2;
    slider.dispatchEvent(new Event("input"));
    const painted = new Set(watch.takeRecords().map((change) => change.target)).size;
    const looks = seen().map((span) => [span.token, span.className]);
    return { painted, looks };
}"""
PAINTED = """looks => [...document.querySelector(".mixlens").shadowRoot.querySelectorAll(".text span")]
    .every((span) => span.className === looks[span.token])"""


@pytest.mark.parametrize("tokens", [10_000, 50_000])
def test_a_layer_step_costs_the_same_however_long_the_text(visit, tmp_path, tokens):
    """Only what is in sight is painted at once: the work of a step, counted, not timed."""
    long = make_trace(domains=("arxiv",), documents=1, tokens=tokens, layers=4)
    page = visit(view.tokens(long, layer=0).save(tmp_path / "long.html")).page
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.locator(".mixlens .text span").count() < 4_000
    step = page.evaluate(STEP)
    looks = [f"t e{first} s{second}" for first, second in long.read("expert_id")[:, 2]]
    assert 100 < step["painted"] <= len(step["looks"]) < 600
    assert [look for _, look in step["looks"]] == [looks[token] for token, _ in step["looks"]]
    page.wait_for_function(PAINTED, arg=looks)
    page.locator(".mixlens .text").focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    last = page.locator(".mixlens .text [data-cursor]")
    first, second = long.read("expert_id")[-1, 3]
    assert f"e{first} s{second}" in last.get_attribute("class")
    assert page.locator(".mixlens .text span").count() < 8_000


def test_every_digit_is_that_of_the_first_choice(visit, view_file, trace):
    page = visit(view_file).page
    page.get_by_label("digits").check()
    shown = page.locator(".mixlens .text span.t").evaluate_all(
        "spans => spans.map(s => decodeURIComponent(getComputedStyle(s).backgroundImage).match(/>(\\d+)</)[1])"
    )
    assert [int(digit) for digit in shown] == trace.read("expert_id")[trace.read("sequence") == 0, 0, 0].tolist()


def test_two_long_runs_are_compared_without_painting_all_of_them(visit, tmp_path):
    long = make_trace(domains=("arxiv",), documents=1, tokens=10_000)
    ids = long.read("expert_id").copy()
    ids[::100, 1] = ids[::100, 1, ::-1]
    ids[-1, 2, 1] = (set(range(8)) - set(ids[-1, 2])).pop()
    tokens = {name: long.read(name) for name in ("sequence", "token_id")}
    other = Trace.from_arrays(ids, n_experts=8, tokens=tokens, sequences=long.sequences[["document_id"]])
    other._vocabulary = long.vocabulary
    seen = visit(view.diff(long, other, layer=1).save(tmp_path / "diff.html"))
    page, spans = seen.page, seen.page.locator(".mixlens .text span")
    assert "100 of 10,000 tokens" in page.locator(".mixlens .legend").text_content()
    assert spans.count() < 4_000
    page.locator(".mixlens .text").first.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    page.locator(".mixlens select").select_option(label="set of experts")
    assert "1 of 10,000 tokens" in page.locator(".mixlens .legend").text_content()
    cursors = page.locator(".mixlens .text [data-cursor]")
    first, second = ids[-1, 2]
    page.locator(f".mixlens section:nth-child(2) .e{first}.s{second}.changed[data-cursor]").wait_for()
    assert cursors.evaluate_all("spans => spans.map(s => s.token)") == [9_999, 9_999]
    inside = "s => { const b = s.closest('.text').getBoundingClientRect(), r = s.getBoundingClientRect();"
    inside += " return r.top >= b.top && r.bottom <= b.bottom; }"
    assert [cursors.nth(i).evaluate(inside) for i in range(2)] == [True, True]
    page.keyboard.press("Home")
    page.get_by_label("next changed token").click()
    assert cursors.evaluate_all("spans => spans.map(s => s.token)") == [9_999, 9_999]
    assert spans.count() < 8_000
    assert clean(seen)


def test_views_of_a_report_move_together(visit, trace, tmp_path):
    half = trace.select(where={"domain": ["github", "mathematics"]})
    seen = visit(report([trace, half], tmp_path / "report.html"))
    page = seen.page
    page.wait_for_function("document.querySelectorAll('[data-ready=\"1\"]').length === 2")
    first, second = page.locator(".mixlens").nth(0), page.locator(".mixlens").nth(1)
    first.locator("input[type=range]").press("End")
    assert second.locator(".slider output").text_content() == "3"
    second.locator("button.expert").nth(6).click()
    assert first.locator("[aria-pressed=true]").text_content() == "6"
    chosen = "s => s.selectedOptions[0].textContent"
    labels = first.locator("select").first.locator("option").all_text_contents()
    first.locator("select").first.select_option(index=next(i for i, label in enumerate(labels) if "mathem" in label))
    assert "mathematics" in second.locator("select").first.evaluate(chosen)
    assert clean(seen)


def test_search_finds_what_spans_tokens_and_steps_on(visit, view_file, trace):
    page = visit(view_file).page
    page.locator(".mixlens select").first.select_option("1")
    pieces = trace.pieces(trace.read("token_id")[trace.read("sequence") == 7])
    wanted = (pieces[20] + pieces[21]).strip()
    whole = "".join(pieces).lower()
    search = page.locator(".mixlens input[type=search]")
    search.fill(wanted)
    search.press("Enter")
    n = whole.count(wanted.lower())
    assert page.locator(".mixlens .search output").text_content() == f"1 of {n}"
    assert page.locator(".mixlens .text .hit").count() >= 2
    start = len("".join(pieces[: int(page.locator(".mixlens .text [data-cursor]").evaluate("s => s.token - 60"))]))
    assert start <= whole.index(wanted.lower())
    search.fill("no such words")
    search.press("Enter")
    assert page.locator(".mixlens .search output").text_content() == "0 tokens"


def test_jumps_to_where_an_expert_is_strongest(visit, view_file, trace):
    page = visit(view_file).page
    page.locator(".mixlens select").first.select_option("1")
    page.locator(".mixlens button.expert").nth(4).click()
    page.get_by_label("next token where the expert is strongest at this layer").click()
    rows = trace.read("sequence") == 7
    ids, weight = trace.read("expert_id")[rows, 0], trace.read("weight")[rows, 0]
    of_expert = np.where(ids == 4, weight, 0).sum(-1)
    at = page.locator(".mixlens .text [data-cursor]").evaluate("s => s.token - 60")
    assert of_expert[at] >= of_expert.max() - 0.008
    assert f"1 of {(of_expert > 0).sum()}" in page.locator(".mixlens .stepper").first.text_content()


def test_printing_paints_what_was_not_yet_in_sight(visit, tmp_path):
    long = make_trace(domains=("arxiv",), documents=1, tokens=3000)
    page = visit(view.tokens(long).save(tmp_path / "long.html")).page
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".mixlens .text span.t").count() == 3000


# It runs a script, loads a picture, a sheet and a font, and leaves every element and attribute that it may stand in.
PAYLOAD = (
    "</script></style></title></textarea></svg>'\"><img src=http://127.0.0.1:9/x onerror=alert(1)>"
    "<svg onload=alert(2)><style>@import 'http://127.0.0.1:9/y'</style><script>alert(3);fetch('http://127.0.0.1:9/z')"
    '</script><a href="javascript:alert(4)">x</a> ${alert(5)} {{7*7}} \\u003cscript>alert(6)<!-- ]]>'
)


def hostile_runs(tmp_path: Path) -> list[object]:
    """A run of every quick kind whose free texts are all the payload."""
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(4), (12, 3, 1)), axis=-1)[..., :2]
    columns = {name: [f"{PAYLOAD}{i}" for i in range(4)] for name in ("document_id", "domain", PAYLOAD)}
    tokens = {"sequence": np.repeat(range(4), 3), "token_id": np.arange(12) % 5}
    sequences = pd.DataFrame(columns)
    meta = {"model": {"name": PAYLOAD}, "source": PAYLOAD, "created": PAYLOAD, "settings": {PAYLOAD: PAYLOAD}}
    trace = Trace.from_arrays(ids, n_experts=4, tokens=tokens, sequences=sequences, meta=meta)
    trace._vocabulary = pd.Series([f"{PAYLOAD}{i}" for i in range(5)], name="piece")

    documents = [{"text": f"Some text {i}.", "domain": f"{PAYLOAD}{i % 2}"} for i in range(4)]
    settings = ml.RecordSettings(progress=False)
    measured = ml.experiments.measure_topk(
        tiny_mixtral(), documents, ks=(1, 2), tokenizer=Letters(), settings=settings
    ).assign_attrs(model=PAYLOAD)

    answers = [
        timed(0, 0.1, 0.01),
        timed(1, 0.2, 0.02),
        timed(2, 0.2, 0.02, outcome="http", detail=PAYLOAD, status=500),
    ]
    endpoint = {"endpoint": {"model": PAYLOAD, "url": PAYLOAD}, "model": {"name": PAYLOAD}, "created": PAYLOAD}
    return [trace, measured, bench_of(answers, **endpoint)]


@pytest.mark.filterwarnings("ignore:constrained_layout")  # a title of 400 characters leaves no room
def test_hostile_names_in_every_field_run_nothing_and_fetch_nothing(visit, tmp_path):
    path = report(hostile_runs(tmp_path), tmp_path / "report.html", title=PAYLOAD)
    seen = visit(path)
    seen.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert clean(seen)
    assert seen.page.title() == PAYLOAD
    assert seen.page.locator("main").text_content().count(PAYLOAD[:60]) > 20
    policy = seen.page.locator("meta[http-equiv='Content-Security-Policy']").get_attribute("content")
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy
