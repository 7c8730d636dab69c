"""Every number that a benchmark shows, read back from what is displayed and compared with numpy over its requests."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.displayed import Page, intervals, number, numbers
from helpers.streams import bench_of, spread, timed

import mixlens as ml
from mixlens.cli import main as cli

N = {"concurrency 1": 130, "concurrency 4": 110}


def load(level: str, n: int, seed: int, **more) -> tuple[list, dict[str, np.ndarray]]:
    """Requests of 5 tokens, 100 s apart; and their numbers."""
    ttft, gap = spread(n, seed)
    records = [timed(i, t, g, level=level, **more) for i, (t, g) in enumerate(zip(ttft, gap, strict=True))]
    return records, {"ttft_s": ttft, "tpot_s": gap, "e2e_token_s": ttft + 4 * gap, "output_tokens_per_s": 1 / gap}


@pytest.fixture(scope="module")
def measured() -> tuple[ml.bench.Bench, dict]:
    """Two loads, each with failures; a warm-up request slower than all."""
    records, truth = [], {}
    for seed, (level, n) in enumerate(N.items()):
        made, truth[level] = load(level, n, seed)
        failed = [timed(n, 0.001, 0.001, level=level, outcome=outcome) for outcome in ("timeout", "http")]
        records += [timed(0, 50.0, 1.0, level=level, phase="warm-up"), *made, *failed]
    return bench_of(records), truth


# Heading of a column, what it says in that unit, decimals shown.
SHOWN = [
    ("TTFT p50 [ms]", lambda one: 1e3 * np.percentile(one["ttft_s"], 50), 0),
    ("TTFT p95 [ms]", lambda one: 1e3 * np.percentile(one["ttft_s"], 95), 0),
    ("TPOT p50 [ms]", lambda one: 1e3 * np.percentile(one["tpot_s"], 50), 1),
    ("end to end p50 [s]", lambda one: np.percentile(one["e2e_token_s"], 50), 2),
    ("a request [tok/s]", lambda one: np.percentile(one["output_tokens_per_s"], 50), 1),
]


def held_to_truth(cells: dict[str, dict[str, str]], bench: ml.bench.Bench, truth: dict) -> None:
    """{load: {heading: text}} against the raw numbers, at the precision shown."""
    assert list(cells) == list(N)
    table = bench.table().set_index(["level", "metric", "statistic"])
    at = {"TTFT p50 [ms]": ("ttft_s", "p50"), "TTFT p95 [ms]": ("ttft_s", "p95"), "TPOT p50 [ms]": ("tpot_s", "p50")}
    for level, one in truth.items():
        row = cells[level]
        assert numbers(row["succeeded"]) == [N[level], N[level] + 2]
        for heading, value, decimals in SHOWN:
            [(estimate, low, high)] = intervals(row[heading])
            assert estimate == pytest.approx(value(one), abs=0.51 * 10**-decimals), heading
            if heading in at:
                bounds = table.loc[(level, *at[heading]), ["ci_low", "ci_high"]].to_numpy(float)
                assert (low, high) == pytest.approx(1e3 * bounds, abs=0.51 * 10**-decimals)
            assert low <= estimate <= high
        # From the first request sent to the end of the last, a failure, 100 s after the last that succeeded.
        window = 100.0 * N[level] + 0.001 + 4 * 0.001 + 0.05
        for heading, done in (("system [tok/s]", 5 * N[level]), ("system [requests/s]", N[level])):
            assert numbers(row[heading])[0] == pytest.approx(done / window, abs=0.0051)


def cells_of(rows: list[list[str]]) -> dict[str, dict[str, str]]:
    head, *rest = [row for row in rows if any(cell and cell != "load" for cell in row[1:])]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rest}


def test_the_overview_in_text_html_and_csv(measured):
    bench, truth = measured
    frame = bench.overview()
    held_to_truth({str(level): dict(row) for level, row in frame.iterrows()}, bench, truth)
    held_to_truth(cells_of(Page(bench._repr_html_()).tables[0]), bench, truth)
    held_to_truth(cells_of(list(csv.reader(io.StringIO(frame.to_csv())))), bench, truth)
    lines = repr(bench).split("\n")
    for heading, value, decimals in SHOWN:
        [line] = [line for line in lines if line.startswith(heading)]
        told = [found[0] for found in intervals(line)]
        assert told == pytest.approx([value(one) for one in truth.values()], abs=0.51 * 10**-decimals)


def test_the_remarks_count_warm_up_and_failures_by_name(measured):
    bench, _ = measured
    said = bench.remarks()
    [warm] = [one for one in said if "50000" in one]  # ms of the first of two
    assert numbers(warm)[:2] == [2, 50000]
    [failed] = [one for one in said if "timeout" in one]
    assert "2 timeout" in failed
    assert "2 http" in failed
    [counted] = [one for one in said if "usage" in one]
    assert numbers(counted) == [sum(N.values()), 95]


def test_the_run_as_json(measured, tmp_path):
    bench, truth = measured
    lines = bench.to_jsonl(tmp_path / "r.jsonl").read_text().splitlines()
    plain = [json.loads(line) for line in lines]
    good = [one for one in plain if one["phase"] == "measured" and one["outcome"] == "ok"]
    ttft = [next(e["at_s"] for e in one["events"] if e["kind"] == "token") - one["sent_s"] for one in good]
    assert ttft == pytest.approx(np.concatenate([one["ttft_s"] for one in truth.values()]))
    assert len(plain) == len(bench.records)


def test_a_table_is_every_number_with_its_n(measured):
    bench, truth = measured
    table = bench.table().set_index(["level", "metric", "statistic"]).sort_index()
    for level, one in truth.items():
        for metric, values in one.items():
            rows = table.loc[(level, metric)]
            assert (rows["n"] == N[level]).all()
            expected = [values.mean(), *np.percentile(values, [50, 90, 95, 99])]
            assert rows.loc[["mean", "p50", "p90", "p95", "p99"], "estimate"].tolist() == pytest.approx(expected)


@pytest.fixture(scope="module", params=[False, True], ids=["apart", "in turns"])
def compared(request):
    """Two benchmarks with other speeds, where one request of each failed; and the numbers of each request."""
    turns = {"names": ["a", "b"], "turns": 4, "requests": 120}
    sides, values = [], []
    for seed, (name, n) in enumerate((("a", 120), ("b", 115))):
        records, truth = load("concurrency 1", n, 10 + seed)
        records[7 + seed] = replace(records[7 + seed], outcome="http", status=503)
        sides.append(bench_of(records, **({"measured_with": turns | {"name": name}} if request.param else {})))
        values.append({m: np.delete(v, 7 + seed) if not request.param else v for m, v in truth.items()})
    if request.param:  # pairs of which both succeeded
        kept = [i for i in range(115) if i not in (7, 8)]
        values = [{m: v[kept] for m, v in side.items()} for side in values]
    return ml.compare(*sides), values, request.param


def statistics_of(values: np.ndarray) -> dict[str, float]:
    names = ("p50", "p90", "p95", "p99")
    return {"mean": values.mean(-1), **dict(zip(names, np.percentile(values, [50, 90, 95, 99], axis=-1), strict=True))}


def test_every_statistic_of_a_comparison_is_b_over_a(compared):
    comparison, (a, b), paired = compared
    table = comparison.table.set_index(["metric", "statistic"])
    for metric in a:
        one, other = statistics_of(a[metric]), statistics_of(b[metric])
        for statistic in one:
            row = table.loc[(metric, statistic)]
            assert (row["a"], row["b"]) == pytest.approx((one[statistic], other[statistic]))
            assert row["ratio"] == pytest.approx(other[statistic] / one[statistic])
            assert (row["n_a"], row["n_b"], row["paired"]) == (len(a[metric]), len(b[metric]), paired)
            assert row["ci_low"] <= row["ratio"] <= row["ci_high"]
    rates = comparison.table.query("statistic == 'rate'").set_index("metric")
    assert rates.loc["system_requests_per_s", ["n_a", "n_b"]].tolist() == [119, 114]


def test_the_intervals_of_a_comparison_are_those_of_draws_made_here(compared):
    comparison, (a, b), paired = compared
    table, draw = comparison.table.set_index(["metric", "statistic"]), np.random.default_rng(2)
    for metric in ("ttft_s", "tpot_s"):
        one, other = a[metric], b[metric]
        rows = draw.integers(len(one), size=(4000, len(one)))
        also = rows if paired else draw.integers(len(other), size=(4000, len(other)))
        drawn, by = statistics_of(other[also]), statistics_of(one[rows])
        for statistic in ("mean", "p50", "p90", "p95"):
            bounds = np.percentile(drawn[statistic] / by[statistic], [2.5, 97.5])
            row = table.loc[(metric, statistic)]
            assert (row["ci_low"], row["ci_high"]) == pytest.approx(bounds, rel=0.12), (metric, statistic)


def test_a_comparison_shows_its_numbers(compared):
    comparison, (a, b), _ = compared
    for shown in (comparison.overview().to_numpy().tolist(), Page(comparison._repr_html_()).tables[0][1:]):
        rows = {row[1]: row for row in shown}
        for metric in ("ttft_s", "tpot_s", "e2e_token_s"):
            _, _, left, right, ratio, told = rows[f"{metric} p50"]
            medians = [np.median(side[metric]) for side in (a, b)]
            assert [number(left), number(right)] == pytest.approx(medians, rel=1e-3)
            [(estimate, _, _)] = intervals(ratio)
            assert estimate == pytest.approx(medians[1] / medians[0], abs=0.0051)
            [row] = comparison.table.query("metric == @metric and statistic == 'p50'").to_dict("records")
            assert told == ("yes" if row["survives"] else "no")
            assert row["ci_low"] > 1 or row["ci_high"] < 1 or not row["survives"]
    assert numbers(comparison.remarks[-1]) == [1, 1]  # failures of each


@pytest.mark.parametrize(("slower", "told"), [(1.5, "yes"), (1 / 1.5, "yes"), (1.0, "no")])
def test_two_are_told_apart_in_both_directions(slower, told):
    ttft, gap = 0.4 + spread(30, 1)[0] / 50, spread(30, 1)[1]
    sides = [
        bench_of([timed(i, factor * t, factor * g) for i, (t, g) in enumerate(zip(ttft, gap, strict=True))])
        for factor in (1.0, slower)
    ]
    row = ml.compare(*sides).overview().set_index("metric").loc["ttft_s p50"]
    assert row["different"] == told
    assert numbers(row["b / a"])[0] == pytest.approx(slower, abs=0.0051)


def test_throughput_of_two_runs_has_the_interval_of_two_independent_rates():
    sides = [bench_of(load("l", n, n)[0]) for n in (20, 40)]
    rates = [side.throughput().set_index("metric").loc["requests_per_s"] for side in sides]
    row = ml.compare(*sides).table.set_index("metric").loc["system_requests_per_s"]
    reach = np.hypot(*[(rate["ci_high"] - rate["ci_low"]) / 2 / rate["estimate"] for rate in rates])
    ratio = rates[1]["estimate"] / rates[0]["estimate"]
    assert (row["ratio"], row["ci_low"]) == pytest.approx((ratio, ratio * np.exp(-reach)))
    assert row["ci_high"] == pytest.approx(ratio * np.exp(reach))


def test_the_command_prints_the_numbers_of_its_run(measured, monkeypatch, capsys):
    bench, truth = measured
    monkeypatch.setattr("mixlens.bench.run.benchmark", lambda *_, **__: bench)
    argv = ["bench", "http://127.0.0.1:1/v1", "--model", "m", "--out", "unused"]
    assert cli.main([*argv, "--json"]) == 0
    rows = {(r["level"], r["metric"], r["statistic"]): r for r in json.loads(capsys.readouterr().out)["rows"]}
    for level, one in truth.items():
        for metric, values in one.items():
            for statistic, value in statistics_of(values).items():
                assert rows[level, metric, statistic]["estimate"] == pytest.approx(value)
    assert cli.main(argv) == 0
    assert repr(bench) in capsys.readouterr().out
