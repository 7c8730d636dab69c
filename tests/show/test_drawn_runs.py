"""Figures and tables of evaluations and benchmarks: every number read back, against plain records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from bench_samples import META, bench, record
from helpers import displayed as see
from test_scores import log

import mixlens as ml
from mixlens.bench.bench import Bench
from mixlens.endpoints.protocols import DONE, ROLE, TOKEN, USAGE
from mixlens.evals.paired import compare_logs

show = ml.show
ROWS = ["mmlu_5shot", "arc_challenge_25shot"]


@pytest.fixture(scope="module")
def logs() -> dict:
    return {"one": log(0.7, limit=90), "other": log(0.4, "other", limit=90)}


def test_every_score_stands_in_its_row_with_its_interval(logs):
    ax = show.scores(logs, subjects=True)
    strokes = iter(see.level_whiskers(ax))
    for name, made in logs.items():
        table = made.scores.set_index("task").loc[ROWS]
        right = [np.mean([r["correct"] for r in made.records if r["task"] == task]) for task in ROWS]
        x, y = see.marks(ax, name)
        np.testing.assert_allclose(x, 100 * np.array(right))
        assert np.round(y).tolist() == [0, 1]
        for row, at in zip(table.itertuples(), y, strict=True):
            place, low, high = next(strokes)
            assert place == pytest.approx(at)
            assert (low, high) == pytest.approx((100 * row.ci_low, 100 * row.ci_high))
            assert low < 100 * row.score < high
    assert next(strokes, None) is None
    assert list(see.ticks(ax, "y").values()) == ["mmlu 5shot", "arc challenge 25shot"]
    assert ax.yaxis_inverted()
    low, high = ax.get_xlim()
    assert 0 <= low < 25 < high
    assert 90 in see.numbers(see.note(ax))


@pytest.mark.parametrize("turned", [False, True])
def test_a_difference_is_second_less_first_with_its_interval_and_counts(logs, turned):
    a, b = list(logs.values())[:: -1 if turned else 1]
    compared = compare_logs(a, b)
    ax = show.paired_differences(compared)
    points = [line for line in ax.lines if line.get_marker() == "o"]
    for place, point in enumerate(points):
        mine = [[r["correct"] for r in run.records if r["task"] == ROWS[place]] for run in (a, b)]
        less = np.subtract(mine[1], mine[0])
        assert (point.get_xdata()[0], point.get_ydata()[0]) == (pytest.approx(100 * less.mean()), place)
        lost, gained = int((less < 0).sum()), int((less > 0).sum())
        assert see.numbers(see.words(ax)[place]) == [lost, gained, 90]
    table = compared.table
    ends = [(100 * low, 100 * high) for low, high in zip(table.ci_low, table.ci_high, strict=True)]
    np.testing.assert_allclose([(low, high) for _, low, high in see.level_whiskers(ax)], ends)
    assert all(np.sign(ends).ravel() == (1 if turned else -1))


def test_every_cell_of_a_table_of_scores():
    made = log(0.7)
    table = ml.evals.score_table(made)
    for row in table.to_dict("records"):
        estimate, low, high = see.intervals(row["score, %"])[0]
        task = next(task for task in ROWS if task.startswith(row["benchmark"]))
        right = 100 * np.mean([r["correct"] for r in made.records if r["task"] == task])
        assert estimate == round(right, 1)
        assert low < estimate < high
        assert row["n"] == sum(r["task"] == task for r in made.records)
        if row["difference"] not in ("–", "not comparable"):
            published = float(row["published, %"])
            assert float(row["difference"]) == pytest.approx(right - published, abs=0.11)


LOADS = {"concurrency 1": [1.0, 1.5, 2.0, 1.2, 1.1], "concurrency 4": [2.0, 3.0, 4.0]}


@pytest.mark.parametrize(("metric", "at"), [("ttft_s", 0.4), ("e2e_token_s", None)])
def test_a_curve_of_latency_rises_by_one_request_at_every_value(metric, at):
    made = bench(LOADS)
    ax = show.latency_cdf(made, metric=metric)
    rows = made.requests()
    for level, slower in LOADS.items():
        x, y = see.marks(ax, f"{level} (n = {len(slower)})")
        values = np.sort(rows[rows.level == level][metric].to_numpy())
        assert at is None or values == pytest.approx(np.sort(np.multiply(slower, at)))
        factor = 1e3 if ax.get_xlabel().endswith("[ms]") else 1.0
        np.testing.assert_allclose(x, factor * np.r_[values[0], values])
        np.testing.assert_allclose(y, np.arange(len(values) + 1) / len(values))
        reach = np.sqrt(np.log(2 / 0.05) / (2 * len(slower)))
        ends = see.band(ax, list(LOADS).index(level))
        assert max(high for _, high in ends.values()) == pytest.approx(min(1, 1 + reach))
        assert min(low for low, _ in ends.values()) == pytest.approx(max(0, 1 / len(slower) - reach))
    assert see.numbers(see.note(ax))[-2:] == [0, 8]


def test_the_view_of_latency_tells_percentiles_and_successes_of_each_load():
    failed = replace(record(9, level="concurrency 4", start=50.0), outcome="http", events=())
    made = Bench([*bench(LOADS).records, failed], META)
    head, *rows = see.Page(ml.view.latency(made).static).tables[0]
    assert head == ["load", "succeeded", "p50", "p90", "p95"]
    for row, (level, slower) in zip(rows, LOADS.items(), strict=True):
        assert row[0] == level
        assert see.numbers(row[1]) == [len(slower), len(slower) + (level == "concurrency 4")]
        values = np.multiply(slower, 0.4)
        told = [see.numbers(cell)[0] for cell in row[2:]]
        np.testing.assert_allclose(told, [float(f"{np.quantile(values, q):.3g}") for q in (0.5, 0.9, 0.95)])


def test_every_event_of_the_timeline_stands_at_its_time_after_the_first_request():
    shown = [record(3, start=7.0), record(5, slower=2.0, start=8.0), record(6, start=9.5)]
    ax = show.token_timeline(Bench([record(0, "other", start=1.0), *shown], META), level="concurrency 1")
    labels = {TOKEN: "token chunk", ROLE: "role chunk, no token", USAGE: "usage", DONE: "end"}
    for kind, label in labels.items():
        expected = [(e.at_s - 7, row) for row, r in enumerate(shown) for e in r.events if e.kind == kind]
        if expected:
            np.testing.assert_allclose(np.transpose(see.marks(ax, label)), expected)
    lines = [(0, 0.0, shown[0].ended_s - 7), (1, 1.0, shown[1].ended_s - 7), (2, 2.5, shown[2].ended_s - 7)]
    np.testing.assert_allclose(see.level_whiskers(ax), lines)
    assert list(see.ticks(ax, "y").values()) == ["3", "6"]


def test_a_load_stands_at_its_throughput_and_median_latency_with_both_intervals():
    loads = {"concurrency 1": np.linspace(1, 2, 40).tolist(), "concurrency 4": np.linspace(2, 5, 50).tolist()}
    made = bench(loads)
    ax = show.throughput_latency_curve(made)
    table = made.table()
    rows = {(r["level"], r["metric"], r["statistic"]): r for r in table.to_dict("records")}
    line, level_ends = ax.lines[0], []
    for i, level in enumerate(loads):
        across = rows[level, "system_output_tokens_per_s", "rate"]
        up = rows[level, "ttft_s", "p50"]
        assert line.get_xdata()[i] == pytest.approx(across["estimate"])
        assert line.get_ydata()[i] == pytest.approx(1e3 * up["estimate"])
        assert up["estimate"] == pytest.approx(0.4 * np.median(loads[level]))
        assert see.whiskers(ax)[i][1:] == pytest.approx((1e3 * up["ci_low"], 1e3 * up["ci_high"]))
        level_ends.append((across["ci_low"], across["ci_high"]))
    np.testing.assert_allclose([ends for _, *ends in see.level_whiskers(ax)], level_ends)
    assert see.words(ax) == ["1", "4"]
