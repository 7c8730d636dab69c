"""Data of benchmark pictures against loops written from the formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from bench_samples import META, bench, record
from helpers.refusals import refused

from mixlens.bench.bench import Bench
from mixlens.bench.curves import distribution, throughput_latency
from mixlens.errors import BadInput
from mixlens.pricing.tradeoff import Candidate, frontier


def test_the_distribution_counts_requests():
    data = distribution(bench({"concurrency 1": [1.0, 3.0, 2.0, 2.5], "concurrency 2": [1.5]}), "ttft_s")
    part = data[data["level"] == "concurrency 1"]
    times = [0.4, 1.2, 0.8, 1.0]
    reach = math.sqrt(math.log(2 / 0.05) / 8)
    for row in part.itertuples():
        share = sum(time <= row.value + 1e-9 for time in times) / 4
        assert row.fraction == pytest.approx(share)
        assert (row.ci_low, row.ci_high) == pytest.approx((max(share - reach, 0), min(share + reach, 1)))
    assert part["value"].tolist() == pytest.approx(sorted(times))
    assert data.groupby("level")["n"].first().to_dict() == {"concurrency 1": 4, "concurrency 2": 1}


def test_the_band_holds_the_whole_curve_as_often_as_it_says():
    draw = np.random.default_rng(0)
    held, n = 0, 20
    grid = np.linspace(0, 1, 501)
    for _ in range(400):
        slower = draw.uniform(size=n)
        fraction = np.searchsorted(np.sort(slower), grid, side="right") / n
        held += bool(np.abs(fraction - grid).max() <= math.sqrt(math.log(2 / 0.05) / (2 * n)))
    assert held / 400 >= 0.94
    one = distribution(bench({"concurrency 1": [1 + i / n for i in range(n)]}), "ttft_s")
    assert one["ci_high"].iloc[9] - one["fraction"].iloc[9] == pytest.approx(math.sqrt(math.log(40) / (2 * n)))


def test_failures_are_in_no_distribution():
    records = [record(0), record(1, outcome="truncated"), record(2, phase="warm-up")]
    data = distribution(Bench(records, META), "e2e_token_s")
    assert data["value"].tolist() == pytest.approx([1.3])
    assert distribution(Bench(records[1:], META), "ttft_s").empty
    with refused(BadInput, "curve", "latency"):
        distribution(Bench(records, META), "latency")


def test_throughput_and_latency_of_a_load_stand_together():
    made = bench({"concurrency 1": [1.0] * 3, "concurrency 2": [2.0] * 3})
    made.records.append(record(9, "concurrency 2", start=9.6, outcome="error", ended_s=9.6))
    data = throughput_latency(made, metric="ttft_s", statistic="p50").set_index("level")
    assert data["latency"].tolist() == pytest.approx([0.4, 0.8])
    # Requests of 29 tokens begin every 1.6 s, and the last one ends 1.5 s after it began; at half speed twice that.
    assert data["throughput"].tolist() == pytest.approx([3 * 29 / 4.7, 3 * 29 / 9.4], rel=0.02)
    assert data["failed"].tolist() == [0, 1]
    with refused(BadInput, "curve", "p42"):
        throughput_latency(made, statistic="p42")


def test_the_frontier_is_what_no_other_beats():
    draw = np.random.default_rng(1)
    goods = draw.integers(0, 4, size=(12, 3)).astype(float)
    goods[5, 1] = np.nan
    candidates = [Candidate(str(i), (q, q, q), cost, (s, s, s)) for i, (q, cost, s) in enumerate(goods)]
    found = frontier(candidates)["frontier"].tolist()
    for i, (quality, cost, speed) in enumerate(goods):
        if np.isnan(cost):
            assert found[i] is pd.NA
            continue
        expected = True
        for other in goods:
            no_worse = other[0] >= quality and other[1] <= cost and other[2] >= speed
            better = other[0] > quality or other[1] < cost or other[2] > speed
            expected = expected and not (no_worse and better)
        assert found[i] == expected
    assert 0 < sum(on for on in found if on is not pd.NA) < 11


def test_candidates_need_names_of_their_own():
    one = Candidate("a", (1, 1, 1), 1.0, (1, 1, 1))
    for wrong in ([], list(itertools.repeat(one, 2))):
        with refused(BadInput, "candidates"):
            frontier(wrong)
    assert isinstance(frontier([one]), pd.DataFrame)
