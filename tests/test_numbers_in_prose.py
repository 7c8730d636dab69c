"""Numbers in README, docs and model card are those that the code, a committed result or the formula gives."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from helpers.inside import p_against, quantile_bounds
from scipy import stats as scipy_stats

import mixlens as ml

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def prose(name: str) -> str:
    """The text of a page on one line."""
    return " ".join((ROOT / name).read_text("utf-8").split())


def stated(page: str, pattern: str) -> list[float]:
    """The numbers in the groups of a sentence, which the page must have."""
    found = re.search(pattern, prose(page))
    assert found, f"{page} no longer says {pattern!r}"
    return [float(group.replace(",", "")) for group in found.groups()]


def of_8x7b() -> tuple[int, int]:
    """Weights of Mixtral-8x7B's experts and of all of it, from its config: 32 layers, 8 experts, top-2."""
    hidden, inner, layers, experts, vocabulary = 4096, 14336, 32, 8, 32000
    of_experts = layers * experts * 3 * hidden * inner
    attention = layers * 2 * (hidden * hidden + hidden * 1024)
    others = layers * (hidden * experts + 2 * hidden) + hidden + 2 * vocabulary * hidden
    return of_experts, of_experts + attention + others


def test_sizes_of_models():
    model = ml.load("demo", verbose=False)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert stated("README.md", r"small trained Mixtral \((\d\.\d)M parameters") == [round(parameters / 1e6, 1)]
    assert stated("demo_model/README.md", r"A Mixtral of (\d\.\d+) million parameters") == [round(parameters / 1e6, 2)]
    experts, whole = of_8x7b()
    assert stated("docs/quantize.md", r"experts, (\d+) % of Mixtral-8x7B's weights") == [int(100 * experts / whole)]


def test_bytes_of_a_recorded_token_of_8x7b(tmp_path):
    """In 32 layers of two choices; on disk, less the header."""
    tokens = 2000
    ids, weight = np.tile([0, 1], (tokens, 32, 1)), np.full((tokens, 32, 2), 0.5)
    ml.Trace.from_arrays(ids, n_experts=8, weight=weight, tokens={"sequence": np.zeros(tokens, int)}).save(
        tmp_path / "a"
    )
    size = (tmp_path / "a" / "routing-00000.safetensors").stat().st_size
    assert stated("README.md", r"ids and weights of 8x7B take (\d+) bytes per token") == [size // tokens]


def test_comparison_with_other_tools():
    medians = json.loads((RESULTS / "beside-others.json").read_text("utf-8"))["medians"]
    page = (ROOT / "docs" / "benchmark.md").read_text("utf-8")
    rows = {"TTFT": ("ttft_ms", 1), "ITL": ("itl_ms", 2), "output tokens per": ("output_tokens_per_s", 2)}
    for words, (name, decimals) in rows.items():
        row = next(line for line in page.splitlines() if line.startswith("|") and words in line)
        found = [float(cell) for cell in row.split("|")[3:6]]
        expected = [medians[tool][name] for tool in ("mixlens", "aiperf", "guidellm")]
        np.testing.assert_allclose(found, expected, atol=0.51 * 10**-decimals)
        assert max(expected) / min(expected) <= 1 + stated("docs/benchmark.md", r"agree within (\d+) %")[0] / 100


def test_size_of_a_saved_view():
    views = json.loads((RESULTS / "viewing.json").read_text("utf-8"))["results"]
    sizes = [view["output_bytes"] for view in views if view.get("tokens") == 10_000]
    assert sizes
    assert max(sizes) <= 1e6 * stated("docs/view.md", r"10,000 tokens in 32 layers, .* takes at most (\d+) MB")[0]


def test_requests_that_bound_a_95th_percentile():
    (least,) = map(int, stated("docs/statistics.md", r"then reads `inf`; it takes (\d+)"))
    bounded = [n for n in range(1, 200) if np.isfinite(quantile_bounds(np.arange(float(n)), 0.95, 0.95)[1])]
    assert bounded == list(range(least, 200))
    assert scipy_stats.binom.cdf(least - 1, least, 0.95) >= 0.975 > scipy_stats.binom.cdf(least - 2, least - 1, 0.95)


def test_documents_below_which_nothing_is_told_apart():
    (word,) = re.findall(r"With fewer than (\w+) documents no cell can survive", prose("docs/statistics.md"))
    least = {"six": 6}[word]
    far = [float(p_against(1.0, 0.999, 1.001, 0.0, n, 0.95, 0.0)) for n in (least - 1, least)]
    assert far[0] > 0.05 > far[1]


def test_coverage_is_as_the_page_says():
    low, high = (share / 100 for share in stated("docs/statistics.md", r"The band is (\d+) to (\d+) %"))
    rows = json.loads((RESULTS / "coverage-of-intervals.json").read_text("utf-8"))["coverage"]
    shown = [row for row in rows if row["coverage"] is not None]
    assert all(row["coverage"] >= low - 2 * row["error"] for row in shown)
    assert all(row["coverage"] <= high + 2 * row["error"] for row in shown if row["documents"] >= 20)


def test_false_alarms_are_as_the_page_says():
    page = "docs/statistics.md"
    (most,) = stated(page, r"where there is nothing to find, (\d+) % or fewer")
    (most_short,) = stated(page, r"five documents of a sixth of the length are compared .* (\d+) % or fewer")
    rows = json.loads((RESULTS / "false-alarms.json").read_text("utf-8"))["false_alarms"]
    short = [row for row in rows if "few and short" in row["family"]]
    assert all(100 * row["alarms"] <= most for row in rows if row["alarms"] is not None and row not in short)
    assert {row["documents"] for row in short} == {20, 60}
    assert max(round(100 * row["alarms"]) for row in short) == most_short


def test_what_the_notebooks_cost_on_8x7b():
    """The page's tables are those of docs/needs.py, as another test holds."""
    page = "docs/8x7b.md"
    whole = stated(page, r"\| bfloat16 \| [\d.]+ \| ([\d.]+) \|") + stated(page, r"\| nf4 \| [\d.]+ \| ([\d.]+) \|")
    told = [path for path in sorted((ROOT / "notebooks").glob("*.py")) if "providers" not in path.name]
    for path in told:
        first = " ".join(path.read_text("utf-8").split("# %%\n")[0].replace("\n#", " ").split())
        found = re.search(r"8x7B .*?(\d+) GB (?:of accelerator memory )?in bfloat16.*?(\d+) GB (?:more|in nf4)", first)
        assert found, f"{path.name} does not say what it costs"
        assert [int(number) for number in found.groups()] == [round(number) for number in whole]
    experts, weights = of_8x7b()
    pruned = stated("notebooks/09_should_i_prune_it.py", r"without one expert # of eight (\d+) GB more in bfloat16")
    assert pruned == [round(experts * 2 * 7 / 8 / 1e9)]
    trained = stated("notebooks/10_is_my_training_collapsing.py", r"gradients are # (\d+) GB more, .* float32 (\d+) GB")
    assert trained == [round(weights * 2 / 1e9), round(weights * 8 / 1e9)]
    assert stated("notebooks/08_what_fits_in_my_cache.py", r"experts are (\d+) kB a token") == [32 * 4096 * 2 // 1000]
