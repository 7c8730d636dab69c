"""Findings of benchmarks, schemes and contrasts: the numbers of the run, each stated once on the page."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import pandas as pd
from bench_samples import bench

from mixlens import stats
from mixlens.endpoints.protocols import TOKEN
from mixlens.reports.report import report
from mixlens.stats.pareto import COLUMNS, Pareto


def summary(run, folder) -> tuple[str, list[str], str]:
    """The title, the findings, and the page of a report."""
    page = unescape(report(run, folder / "report.html").read_text("utf-8"))
    found = re.findall(r"<li>([^<]*) <a href=\"#(s\d+)\">", page.split('<ol class="findings">')[1].split("</ol>")[0])
    assert 1 <= len(found) <= 5
    assert all(f'<section id="{place}">' in page for _, place in found)
    return re.findall("<h1>(.*?)</h1>", page)[0], [sentence for sentence, _ in found], page


def test_a_benchmark_says_its_medians_of_the_fastest_and_the_slowest_load(tmp_path):
    measured = bench({"concurrency 1": [1.0] * 3, "concurrency 2": [2.0] * 3, "concurrency 4": [4.0] * 3})
    _, said, page = summary(measured, tmp_path)
    first = {
        record.level: 1e3 * (next(e.at_s for e in record.events if e.kind == TOKEN or e.reasoning) - record.sent_s)
        for record in measured.records
    }
    [ttft] = [sentence for sentence in said if "first token" in sentence]
    numbers = re.findall(r"([\d,]+) \[[^]]*\] ms at (concurrency \d) \(n = 3", ttft)
    assert [(float(number.replace(",", "")), level) for number, level in numbers] == [
        (round(first[level]), level) for level in ("concurrency 1", "concurrency 4")
    ]
    assert all(page.count(sentence) == 1 for sentence in said)


def schemes(**losses: tuple[float, float, float]) -> Pareto:
    """Schemes of falling size, with the interval of their loss; KL grows as they shrink, but for the last."""
    rows = []
    for at, (scheme, loss) in enumerate({"float32": (0.0, np.nan, np.nan), **losses}.items()):
        numbers = {
            "bytes": (4e6 / 2**at, np.nan, np.nan),
            "kl": (0.1 * at, 0.1 * at, 0.2 * at),
            "loss_difference": loss,
        }
        for quantity, values in numbers.items():
            named = dict(zip(("estimate", "ci_low", "ci_high"), values, strict=True))
            rows.append({"scheme": scheme, "quantity": quantity, "unit": "", "n": 1234, **named})
    meta = {"model": {"name": "m"}, "schemes": {}, "machine": "", "documents": 9}
    return Pareto(pd.DataFrame(rows, columns=COLUMNS), meta)


def test_schemes_name_the_smallest_that_is_not_told_apart(tmp_path):
    title, said, _ = summary(schemes(a=(0.01, -0.02, 0.04), b=(-0.01, -0.03, 0.01), c=(0.5, 0.4, 0.6)), tmp_path)
    assert title.startswith("b is the smallest of 4 schemes")
    assert "-0.0100 [-0.0300, 0.0100]" in said[0]
    assert [sentence.split(",")[0] for sentence in said[1:]] == ["a", "b", "c"]
    assert all("n = 1,234" in sentence for sentence in said)
    title, said, _ = summary(schemes(a=(0.3, 0.2, 0.4)), tmp_path)
    assert (title, len(said)) == ("Quantization schemes of m", 1)


def test_what_was_counted_has_no_missing_interval():
    table = schemes(a=(0.3, 0.2, 0.4)).overview()
    assert table["MB"].tolist() == ["4.00", "2.00"]
    assert table["loss, difference"].tolist() == ["0.0000", "0.3000 [0.2000, 0.4000]"]


def test_a_finding_of_a_contrast_stands_once(trace, tmp_path):
    found = stats.contrast(trace, stats.expert_share, by="domain", a="github", bootstrap=stats.Bootstrap(replicates=99))
    _, said, page = summary(found, tmp_path)
    assert all(page.count(sentence) == 1 for sentence in said)
