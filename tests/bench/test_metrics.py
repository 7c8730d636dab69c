"""Metrics of saved records against their definitions, written out by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from bench_scripts import SCRIPTS, chunk, openai_chat, replay, sse
from helpers.refusals import refused
from scipy.stats import binomtest

from mixlens.bench.bench import Bench
from mixlens.bench.events import Record
from mixlens.bench.metrics import (
    METRICS,
    Limits,
    goodput,
    outcomes,
    output_tokens,
    request_table,
    summary,
    throughput,
    token_sources,
)
from mixlens.bench.shares import unfinished
from mixlens.core.bootstrap import Bootstrap
from mixlens.errors import BadInput

FAST = Bootstrap(replicates=50)


def shifted(record: Record, by: float, **fields) -> Record:
    """The same request, sent `by` seconds later."""
    events = tuple(dataclasses.replace(event, at_s=event.at_s + by) for event in record.events)
    times = {name: getattr(record, name) + by for name in ("started_s", "sent_s", "headers_s", "ended_s")}
    return dataclasses.replace(record, **{"events": events, **times, **fields})


def streamed(ttft: float, gap: float, n: int, **fields) -> Record:
    script = [(ttft + gap * i, sse(chunk({"content": f" {i}"}))) for i in range(n)]
    end = {"choices": [], "usage": {"completion_tokens": n}}
    return replay([*script, (ttft + gap * (n - 1), sse(end) + sse("[DONE]"))], **fields)


FAILED = {"outcome": "http", "status": 429, "events": ()}


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("protocol", SCRIPTS)
def test_the_scripted_stream_is_measured_as_it_was_sent(protocol, size):
    row = request_table([replay(SCRIPTS[protocol](), protocol, size=size)]).iloc[0]
    assert row["ttft_s"] == pytest.approx(0.400)
    assert row["tpot_s"] == pytest.approx(0.0321, abs=5e-5)
    assert row["e2e_token_s"] == pytest.approx(1.300)
    assert row["e2e_stream_s"] == pytest.approx(1.500)
    assert row["output_tokens_per_s"] == pytest.approx(28 / 0.9)
    assert (row["output_tokens"], row["token_source"], row["chunks"], row["input_tokens"]) == (29, "usage", 10, 11)


def test_inter_chunk_latency_is_not_the_time_between_tokens():
    data = summary([replay(openai_chat())])
    assert float(data.estimate.sel(metric="inter_chunk_s", statistic="mean").item()) == pytest.approx(0.1)
    assert np.isnan(data.estimate.sel(metric="itl_s", statistic="mean").item())
    assert data.n.sel(metric="inter_chunk_s", statistic="mean").item() == 9
    one_each = summary([streamed(0.1, 0.02, 5)])
    assert one_each.estimate.sel(metric="itl_s", statistic="mean").item() == pytest.approx(0.02)


def test_the_number_of_tokens_says_where_it_comes_from():
    first, last = sse(chunk({"content": "a b"})), sse(chunk({"content": " c"}))
    running = sse(chunk({"content": " c"}, usage={"prompt_tokens": 1, "completion_tokens": 7}))
    zero = sse({"choices": [], "usage": {"completion_tokens": 0}})
    finish = sse(chunk({"content": " c"}, "stop", usage={"completion_tokens": 4}))
    done = sse("[DONE]")

    def count(*pieces: bytes, **more) -> tuple[int, str]:
        return output_tokens(replay([(0.1 * i, piece) for i, piece in enumerate(pieces)]), **more)

    words = {"count_tokens": lambda text: len(text.split())}
    assert count(first, finish) == (4, "usage")
    assert count(first, running, done) == (7, "chunk usage")
    assert count(first, last, zero, done, **words) == (3, "retokenised")
    assert count(first, last, done) == (2, "chunks")
    assert count(done) == (0, "chunks")


def test_what_an_anthropic_stream_says_at_its_start_is_no_count():
    cut = SCRIPTS["anthropic"]()[:6]
    assert output_tokens(replay(cut, "anthropic")) == (4, "chunks")


def test_one_chunk_has_no_time_per_token():
    row = request_table([replay([(0.4, sse(chunk({"content": "all"}, "stop", usage={"completion_tokens": 9})))])]).iloc[
        0
    ]
    assert row["ttft_s"] == pytest.approx(0.4)
    assert np.isnan(row["tpot_s"])
    assert np.isnan(row["output_tokens_per_s"])


def test_connection_set_up_stands_apart_and_the_schedule_counts():
    script = [(at + 2.0, piece) for at, piece in openai_chat()]
    row = request_table([replay(script, started_s=1.7, connected_s=1.9, sent_s=2.0, scheduled_s=1.0)]).iloc[0]
    assert row["connect_s"] == pytest.approx(0.2)
    assert row["ttft_s"] == pytest.approx(0.4)
    assert (row["scheduled_ttft_s"], row["scheduled_e2e_s"]) == (pytest.approx(1.4), pytest.approx(2.3))


def test_failures_are_counted_by_kind_and_in_no_mean():
    good = streamed(0.4, 0.1, 5)
    records = [good, shifted(good, 1.0, index=1), shifted(good, 2.0, index=2, **FAILED)]
    records.append(shifted(good, 0.0, phase="warm-up"))
    data = summary(records, bootstrap=FAST)
    assert data.estimate.sel(metric="ttft_s", statistic="mean").item() == pytest.approx(0.4)
    assert data.n.sel(metric="ttft_s", statistic="mean").item() == 2
    counts = outcomes(records).set_index(["phase", "outcome"])["n"]
    assert counts.to_dict() == {("measured", "ok"): 2, ("measured", "http"): 1, ("warm-up", "ok"): 1}
    assert token_sources(records) == {"usage": 2}


def test_no_success_means_no_number():
    records = [shifted(streamed(0.4, 0.1, 5), 0.0, **FAILED)]
    assert summary(records).estimate.isnull().all()
    assert throughput(records)["estimate"].isna().all()
    assert np.isnan(goodput(records, Limits(ttft_s=1.0))["good_frac"][0])
    assert request_table(records)[[m for m in METRICS if m not in ("itl_s", "inter_chunk_s")]].isna().all(axis=None)
    assert summary([]).sizes["level"] == 0


def test_percentiles_are_numpy_s_and_lie_in_their_intervals():
    times = np.random.default_rng(1).gamma(2.0, 0.2, 120)
    data = summary([streamed(t, 0.01, 3, index=i) for i, t in enumerate(times)], bootstrap=FAST).sel(metric="ttft_s")
    for statistic, q in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        one = data.sel(statistic=statistic).isel(level=0)
        assert one.estimate.item() == pytest.approx(np.percentile(times, q))
        assert one.ci_low.item() <= one.estimate.item() <= one.ci_high.item()
        assert one.ci_low.item() < one.ci_high.item()
    assert data.estimate.sel(statistic="mean").item() == pytest.approx(times.mean())


def test_p99_is_suppressed_below_100_samples():
    records = [streamed(0.1 + 0.001 * i, 0.01, 3, index=i) for i in range(99)]
    data = summary(records, bootstrap=FAST)
    assert np.isnan(data.estimate.sel(metric="ttft_s", statistic="p99").item())
    assert np.isfinite(data.estimate.sel(metric="ttft_s", statistic="p95").item())
    assert np.isfinite(data.estimate.sel(metric="inter_chunk_s", statistic="p99").item())
    assert data.attrs["p99"] == "NaN below 100 samples"


def test_one_request_has_an_estimate_and_no_interval():
    one = summary([streamed(0.4, 0.1, 5)]).sel(metric="ttft_s", statistic="mean")
    assert one.estimate.item() == pytest.approx(0.4)
    assert np.isnan(one.ci_low.item())


def test_the_interval_of_a_mean_is_that_of_student():
    times = np.random.default_rng(0).normal(1.0, 0.1, 20)
    one = summary([streamed(t, 0.01, 2, index=i) for i, t in enumerate(times)]).isel(level=0)
    one = one.sel(metric="ttft_s", statistic="mean")
    width = 2 * 2.093 * times.std(ddof=1) / np.sqrt(20)
    assert one.ci_high.item() - one.ci_low.item() == pytest.approx(width, rel=0.1)


def test_system_throughput_is_not_the_sum_of_speeds():
    # Two at a time, each with 11 tokens in 1.0 to 2.0 s after it was sent; then one alone.
    one = streamed(1.0, 0.1, 11)
    records = [one, shifted(one, 0.0, index=1), shifted(one, 2.0, index=2)]
    table = throughput(records).set_index("metric")
    assert table.loc["output_tokens_per_s", "estimate"] == pytest.approx(33 / 4)
    assert table.loc["requests_per_s", "estimate"] == pytest.approx(3 / 4)
    assert table["ci_low"].isna().all()
    steady = [shifted(one, 0.25 * i, index=i) for i in range(40)]
    row = throughput(steady).iloc[0]
    assert 0 <= row["ci_low"] < row["estimate"] < row["ci_high"]


def test_goodput_counts_failures_as_missed():
    fast, slow = streamed(0.4, 0.01, 5), streamed(0.9, 0.01, 5, index=1)
    records = [fast, slow, shifted(fast, 0.0, index=2, **FAILED), streamed(0.4, 0.0, 1, index=3)]
    row = goodput(records, Limits(ttft_s=0.5, tpot_s=0.02)).iloc[0]
    assert (row["good"], row["n"], row["good_frac"]) == (2, 4, 0.5)
    assert row["good_per_s"] == pytest.approx(2 / 0.94)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(tuple(binomtest(2, 4).proportion_ci(method="exact")))
    with refused(BadInput, "limits"):
        goodput(records, Limits())


def test_levels_stand_apart_in_order():
    records = [streamed(0.2, 0.1, 3, level="concurrency 2"), streamed(0.1, 0.1, 3, level="concurrency 1")]
    data = summary(records)
    assert list(data.level.values) == ["concurrency 2", "concurrency 1"]
    assert data.estimate.sel(metric="ttft_s", statistic="p50").values == pytest.approx([0.2, 0.1])
    assert isinstance(throughput(records), pd.DataFrame)


def test_answers_without_a_finish_reason_are_counted_where_others_have_one():
    whole = streamed(0.1, 0.01, 3)
    named = dataclasses.replace(
        whole, events=(*whole.events[:-1], dataclasses.replace(whole.events[-1], finish="length"))
    )
    cut = [shifted(whole, 1.0, index=1), shifted(whole, 2.0, index=2)]
    assert unfinished([named, *cut]) == 2
    assert unfinished([dataclasses.replace(named, phase="warm-up"), *cut]) == 2
    assert unfinished(cut) == 0  # a server that never says so
    assert unfinished([dataclasses.replace(named, outcome="malformed"), *cut]) == 0  # and one that failed says nothing
    assert unfinished([named, *(dataclasses.replace(record, outcome="connect") for record in cut)]) == 0
    bench = Bench([named, *cut], {"endpoint": {"model": "m", "url": "http://127.0.0.1"}, "created": "today"})
    assert any("2 of 3 successes" in remark for remark in bench.remarks())
