"""Pictures of benchmarks: what is drawn is what the records say, and the report has a section of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bench_samples import META, bench, record
from helpers.refusals import refused

import mixlens
from mixlens import show
from mixlens.bench.bench import Bench
from mixlens.endpoints.protocols import TOKEN
from mixlens.errors import BadInput
from mixlens.plot.style import note_of, own_figure
from mixlens.pricing.tradeoff import Candidate

MADE = bench({"concurrency 1": [1.0, 1.5, 2.0], "concurrency 4": [2.0, 3.0, 4.0]})
FAILED = Bench([record(0, outcome="http", events=())], META)


def test_a_curve_of_each_load_with_its_n():
    ax = show.latency_cdf(MADE)
    assert ax.get_legend_handles_labels()[1] == ["concurrency 1 (n = 3)", "concurrency 4 (n = 3)"]
    assert np.sort(ax.lines[0].get_xdata())[-1] == pytest.approx(800.0)
    assert "0 of 6 requests failed" in note_of(ax)
    assert "m at http://127.0.0.1:1/v1" in note_of(ax)
    assert len(show.latency_cdfs(MADE).axes) == 3
    with refused(BadInput, "metric", "ttft_s"):
        show.latency_cdf(FAILED)


def test_a_point_of_each_load_and_a_line_of_each_benchmark():
    ax = show.throughput_latency_curve([MADE, bench({"concurrency 1": [1.0, 1.0]})], metric="e2e_token_s")
    assert [len(line.get_xdata()) for line in ax.lines] == [2, 1]
    assert {text.get_text() for text in ax.texts} >= {"1", "4"}
    assert "n = 6 + 2 requests" in note_of(ax)
    with refused(BadInput, "benches", 0):
        show.throughput_latency_curve(FAILED)


def test_the_timeline_has_every_event_and_names_failures():
    broken = replace(record(1, start=2.0), outcome="truncated")
    ax = show.token_timeline(Bench([record(0), broken], META))
    drawn = {line.get_label(): line.get_xdata() for line in ax.lines}
    stamps = [event.at_s for r in (record(0), broken) for event in r.events if event.kind == TOKEN]
    assert sorted(drawn["token chunk"]) == pytest.approx(sorted(stamps))
    assert drawn["role chunk, no token"][0] == pytest.approx(0.05)
    assert any("truncated" in text.get_text() for text in ax.texts)
    assert "the first 1 of 2 requests" in note_of(show.token_timeline(Bench([record(0), broken], META), most=1))
    with refused(BadInput, "level", "concurrency 2"):
        show.token_timeline(MADE, level="concurrency 2")


def test_the_frontier_is_filled_and_what_lacks_a_number_is_said_to():
    ax = show.quality_cost_speed(
        [
            Candidate("good", (0.7, 0.6, 0.8), 0.5, (100, 90, 110)),
            Candidate("beaten", (0.6, 0.5, 0.7), 0.6, (90, 80, 100)),
            Candidate("unpriced", (0.9, 0.8, 1.0), float("nan"), (90, 80, 100)),
        ],
        score="MMLU, 5-shot",
    )
    faces = ax.collections[-1].get_facecolor()
    assert faces[1].tolist() == [1, 1, 1, 1]
    assert faces[0].tolist() != [1, 1, 1, 1]
    assert "1 without all three numbers left out" in note_of(ax)
    assert own_figure(ax).png()[:4] == b"\x89PNG"
    with refused(BadInput, "runs", 1):
        show.quality_cost_speed([Candidate("x", (1, 1, 1), float("nan"), (1, 1, 1))])


def test_the_report_has_sections_of_speed_and_escapes_what_a_server_said(tmp_path):
    said = replace(record(7), outcome="http", detail="<script>alert(1)</script>", events=())
    made = Bench([*MADE.records, said], META)
    text = mixlens.report(made, tmp_path / "r.html").read_text()
    assert "Speed of m" in text
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert text.count("<figure") == 3
    alone = mixlens.report([FAILED, made], tmp_path / "s.html").read_text()
    assert "Not drawn: " in alone


def test_records_and_events_are_exported(tmp_path):
    from mixlens.bench.events import read_records

    assert list(read_records(MADE.to_jsonl(tmp_path / "x.jsonl"))) == MADE.records
    events = MADE.events()
    assert len(events) == sum(len(r.events) for r in MADE.records)
    first = events[(events["level"] == "concurrency 4") & (events["index"] == 0) & (events["kind"] == TOKEN)]
    assert first["at_s"].iloc[0] == pytest.approx(0.8)
