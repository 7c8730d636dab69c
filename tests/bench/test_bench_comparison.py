"""Two benchmarks compared: ratios with intervals, in pairs where they were measured in turns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from bench_samples import META, bench, record
from bench_server import Script, answer, serving
from helpers.refusals import refused

import mixlens
from mixlens.bench.bench import Bench
from mixlens.bench.comparison import _reach_of_turns, _requests, compare_benches
from mixlens.bench.interleaved import benchmark_together
from mixlens.bench.prompts import Workload
from mixlens.bench.session import BenchSettings, Clock
from mixlens.core.bootstrap import Bootstrap
from mixlens.endpoints.endpoint import Endpoint
from mixlens.errors import BadInput, RunError

QUIET = BenchSettings(progress=False, max_seconds=20.0)
SMALL = Workload(prompt_tokens=16, output_tokens=8)
TURNS = {"names": ["a", "b"], "turns": 4, "requests": 8}
LOAD = "concurrency 1"


def pair(first: list[float], second: list[float], *, turns: bool) -> tuple[Bench, Bench]:
    with_a, with_b = ({"measured_with": {**TURNS, "name": n}} if turns else {} for n in "ab")
    return bench({LOAD: first}, **with_a), bench({LOAD: second}, **with_b)


def row(comparison, metric: str, statistic: str):
    return comparison.table.query("metric == @metric and statistic == @statistic").iloc[0]


def test_ratios_are_of_the_statistics_of_each():
    slower_a, slower_b = [1.0, 1.2, 1.6, 2.0], [2.0, 2.5, 3.5, 3.0]
    compared = mixlens.compare(*pair(slower_a, slower_b, turns=False))
    for statistic, function in (("mean", np.mean), ("p50", np.median)):
        found = row(compared, "ttft_s", statistic)
        assert found["ratio"] == pytest.approx(function(slower_b) / function(slower_a))
        assert found["ci_low"] <= found["ratio"] <= found["ci_high"]
        assert (found["n_a"], found["n_b"], found["paired"]) == (4, 4, False)
    assert compared.table.query("statistic == 'p99'").empty
    assert row(compared, "system_requests_per_s", "rate")["ratio"] == pytest.approx(6.2 / 11.6, rel=0.05)
    assert compared.table.index.tolist() == list(range(len(compared.table)))
    assert "b / a" in compared._repr_html_()


def test_pairs_take_out_what_drifts_for_both():
    drift = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    slower = [1.1 * factor for factor in drift]
    apart, together = (compare_benches(*pair(drift, slower, turns=turns)) for turns in (False, True))
    assert row(apart, "ttft_s", "mean")["ci_low"] < 1
    found = row(together, "ttft_s", "mean")
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((1.1, 1.1), abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.01])  # in all more than a second, and less
def test_throughput_is_paired_by_turn(scale):
    # Requests of 1.5 s times their factor, one after the other, two of them a turn. Both grow slower from turn to turn.
    drift = [scale * d for d in (1.0, 1.4, 2.0, 1.7, 3.0, 3.9, 4.0, 3.2)]
    noise = [1.0, 1.2, 1.1, 0.8, 0.9, 0.9, 1.0, 1.3]
    slower = [1.2 * d * n for d, n in zip(drift, noise, strict=True)]
    apart, together = (compare_benches(*pair(drift, slower, turns=turns)) for turns in (False, True))
    for metric, done in (("system_output_tokens_per_s", 29), ("system_requests_per_s", 1)):
        found = row(together, metric, "rate")
        # By hand: each turn's share of all that was done less its share of the seconds, of b less of a.
        moved = []
        for turn in range(4):
            d = []
            for factors in (drift, slower):
                seconds = [1.6 * (factors[2 * t]) + 1.5 * factors[2 * t + 1] for t in range(4)]
                d.append(2 * done / (8 * done) - seconds[turn] / sum(seconds))
            moved.append(d[1] - d[0])
        reach = 3.182446 * np.sqrt(4 / 3 * sum(x * x for x in moved))
        assert found["paired"]
        assert np.log(found["ci_high"] / found["ratio"]) == pytest.approx(reach, rel=1e-4)
        assert np.log(found["ratio"] / found["ci_low"]) == pytest.approx(reach, rel=1e-4)
        assert np.isnan(row(apart, metric, "rate")["ci_high"])  # fewer than ten requests
    alone = compare_benches(*pair(drift, [1.2 * d for d in drift], turns=True))
    found = row(alone, "system_requests_per_s", "rate")
    assert found["ci_high"] == pytest.approx(found["ci_low"])


def test_the_interval_of_turns_holds_the_true_ratio_as_often_as_it_says():
    draw, held = np.random.default_rng(1), 0
    for _ in range(300):
        # A drift of both, and noise of each.
        seconds = np.exp(draw.normal(0, 0.3, (1, 4)) + draw.normal(0, 0.1, (2, 4)))
        a, b = (np.stack([np.full(4, 100.0), side], axis=1) for side in seconds)
        reach = _reach_of_turns(a, b)
        held += abs(np.log(seconds[0].sum() / seconds[1].sum())) <= reach
    assert held >= 270  # 285 are expected


def test_a_turn_that_a_cap_left_out_is_in_no_interval():
    a, b = pair([1.0] * 8, [1.1, 1.0, 1.2, 1.0, 1.0, 1.3, 1.0, 1.0], turns=True)
    del b.records[2:]  # one turn
    assert np.isnan(row(compare_benches(a, b), "system_requests_per_s", "rate")["ci_low"])


def test_a_pair_of_which_one_failed_is_left_out():
    a, b = pair([1.0, 1.0, 1.0], [1.0, 1.0, 9.0], turns=True)
    a.records[2] = record(2, outcome="timeout")
    assert row(compare_benches(a, b), "ttft_s", "mean")["n_b"] == 2
    assert row(compare_benches(a, b), "ttft_s", "mean")["ratio"] == pytest.approx(1.0)
    assert "Failures, in no ratio: 1 of a, 0 of b." in repr(compare_benches(a, b))


def test_the_interval_holds_the_true_ratio_as_often_as_it_says():
    draw, held = np.random.default_rng(0), 0
    for _ in range(100):
        first, second = pd.Series(draw.uniform(1, 2, 12)), pd.Series(draw.uniform(2, 4, 12))
        mean = _requests(LOAD, "ttft_s", first, second, False, Bootstrap(replicates=200))[0]
        held += mean["ci_low"] <= 2.0 <= mean["ci_high"]
    assert held >= 88  # 95 is expected; fewer than 88 has a chance of 1 in 600


def test_loads_must_be_the_same():
    with refused(BadInput, "loads", (["concurrency 1"], ["concurrency 2"])):
        compare_benches(bench({LOAD: [1.0]}), bench({"concurrency 2": [1.0]}))
    failed = Bench([record(0, outcome="http", events=())], META)
    assert "n/a" in repr(compare_benches(failed, failed))


def test_workloads_must_be_the_same_apart_from_their_seed():
    plans = [SMALL.plan(), Workload(prompt_tokens=32, output_tokens=8).plan(), Workload(prompts=["a"]).plan()]
    a, *others = (bench({LOAD: [1.0]}, workload=plan) for plan in plans)
    for other in others:
        with refused(BadInput, "workload"):
            compare_benches(a, other)
    again = bench({LOAD: [1.0]}, workload=Workload(prompt_tokens=16, output_tokens=8, seed=1).plan())
    assert row(compare_benches(a, again), "ttft_s", "mean")["ratio"] == 1.0


def test_a_clock_stands_still_while_others_are_measured(monkeypatch):
    times = iter([10.0, 11.0, 15.0, 15.5])
    monkeypatch.setattr("mixlens.bench.session.time.perf_counter", lambda: next(times))
    clock = Clock()
    clock.stop()
    assert clock() == 1.0
    clock.go_on()
    assert clock() == 1.5


def test_endpoints_are_measured_in_turns_on_prompts_of_their_own(tmp_path):
    scripts = [Script(answer()), Script(answer(wait=0.02))]
    order: list[int] = []
    for at, script in enumerate(scripts):
        script.requests = Noted(order, at)
    with serving(scripts[0]) as first, serving(scripts[1]) as second:
        endpoints = {"fast": Endpoint(first, model="m"), "slow": Endpoint(second, model="m")}
        made = benchmark_together(endpoints, requests=8, out=tmp_path, workload=SMALL, settings=QUIET)
        # The warm-ups, then turns of two requests, begun by one and the other.
        assert order == [0, 1] + [0, 0, 1, 1, 1, 1, 0, 0] * 2
        again = benchmark_together(endpoints, requests=8, out=tmp_path, workload=SMALL, settings=QUIET)
    sent = [[body["messages"][0]["content"] for _, body in script.requests] for script in scripts]
    assert not {*sent[0]} & {*sent[1]}  # two addresses may share one prefix cache
    assert {len(text.split()) for text in sent[0]} == {len(text.split()) for text in sent[1]}
    assert again["fast"].records == made["fast"].records
    compared = mixlens.compare(tmp_path / "fast", tmp_path / "slow")
    assert row(compared, "tpot_s", "p50")["paired"]
    assert row(compared, "tpot_s", "p50")["n_a"] == 8


def test_a_cap_that_one_meets_ends_the_later_loads_of_all():
    cheap, dear = Script(answer(1)), Script(answer(4))
    # At $10 a million out: 80 millionths at worst, 20 and 80 in fact. The dear one's third request does not fit.
    capped = replace(QUIET, max_dollars=210e-6, price=(0.0, 10.0))
    with serving(cheap) as first, serving(dear) as second:
        endpoints = {"cheap": Endpoint(first, model="m"), "dear": Endpoint(second, model="m")}
        benchmark_together(endpoints, concurrency=(1, 2), requests=8, workload=SMALL, settings=capped)
    assert (len(cheap.requests), len(dear.requests)) == (3, 2)


def test_what_is_wrong_with_one_leaves_no_folder_of_any(tmp_path, monkeypatch):
    monkeypatch.delenv("LOOPBACK_KEY", raising=False)
    url = "http://127.0.0.1:9/v1"
    priced, fine = Endpoint.openrouter(key_env=None), Endpoint(url, model="m")
    for second, changes, named in (
        (Endpoint(url, model="m", key_env="LOOPBACK_KEY"), {}, ("key_env", "LOOPBACK_KEY")),
        (fine, {"settings": replace(QUIET, max_dollars=1.0)}, ("max_dollars", 1.0)),
        (replace(fine, context=20), {"workload": SMALL}, ("context", 24)),
        ("http://127.0.0.1:9/v1", {}, ("endpoint", "str")),
        (fine, {"settings": replace(QUIET, max_seconds=-1.0)}, ("max_seconds", -1.0)),
        (fine, {"settings": replace(QUIET, price=(1.0, -1.0))}, ("price", (1.0, -1.0))),
        (fine, {"requests": 2.5}, ("requests", (2.5, 1))),
    ):
        with refused(BadInput, *named):
            benchmark_together({"a": priced, "b": second}, out=tmp_path, **{"settings": QUIET} | changes)
        assert not list(tmp_path.iterdir())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with refused(RunError, "out", ["mine.txt"]):
        benchmark_together({"a": priced, "b": fine}, out=tmp_path, settings=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


class Noted(list):
    """Requests of a script, and in `order` whose they were."""

    def __init__(self, order: list[int], who: int) -> None:
        super().__init__()
        self.order, self.who = order, who

    def append(self, request: object) -> None:
        super().append(request)
        self.order.append(self.who)


def test_what_cannot_be_measured_together():
    one = Endpoint("http://127.0.0.1:9/v1", model="m")
    for wrong in ({"a": one}, {"a": one, "../b": one}, {}):
        with refused(BadInput, "endpoints"):
            benchmark_together(wrong)
