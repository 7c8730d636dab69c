"""Every metric of generated streams against loops over what they were made of."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from helpers import loops
from helpers.streams import LEVELS, Known, bench_of, runs, spread, timed
from hypothesis import given, settings
from scipy import stats

import mixlens as ml

PERCENTILES = {"p50": 50, "p90": 90, "p95": 95, "p99": 99}
NAN = float("nan")
FEW = settings(max_examples=10)  # of 16 requests each


def truth(known: Known) -> dict[str, float]:
    """Each metric of a request that succeeded, from its stamps and the number of tokens alone."""
    r, first, last = known.record, known.stamps[0], known.stamps[-1]
    several = known.n >= 2 and last > first
    after = known.n - known.n // len(known.stamps)  # all chunks are of one size
    return {
        "ttft_s": first - r.sent_s,  # not from the start of the connection, not to the role or a comment
        "e2e_token_s": last - r.sent_s,
        "e2e_stream_s": r.ended_s - r.sent_s,
        "headers_s": r.headers_s - r.sent_s,
        "connect_s": NAN if r.connected_s is None else r.connected_s - r.started_s,
        "scheduled_ttft_s": NAN if r.scheduled_s is None else first - r.scheduled_s,
        "scheduled_e2e_s": NAN if r.scheduled_s is None else last - r.scheduled_s,
        "tpot_s": (last - first) / after if several else NAN,
        "output_tokens_per_s": after / (last - first) if several else NAN,
    }


def succeeded(run: list[Known], level: str) -> list[Known]:
    return [k for k in run if (k.record.level, k.record.phase, k.record.outcome) == (level, "measured", "ok")]


def bench(run: list[Known]) -> ml.bench.Bench:
    return bench_of([known.record for known in run])


@FEW
@given(runs())
def test_every_metric_of_every_request(run):
    table = bench(run).requests()
    for known, row in zip(run, table.to_dict("records"), strict=True):
        ok = known.record.outcome == "ok"
        for metric, value in truth(known).items():
            assert row[metric] == pytest.approx(value if ok else NAN, nan_ok=True), metric
        assert (row["output_tokens"], row["token_source"]) == (known.n, known.source)
        assert (row["input_tokens"], row["chunks"]) == (7 + known.record.index, len(known.stamps))


@FEW
@given(runs())
def test_mean_and_percentiles_are_numpy_s_over_measured_successes(run):
    data = bench(run).summary(bootstrap=ml.stats.Bootstrap(replicates=10))
    assert set(data.level.values) == {k.record.level for k in run if k.record.phase == "measured"}
    for level in data.level.values:
        good = succeeded(run, level)
        values = {name: [truth(k)[name] for k in good if truth(k)[name] == truth(k)[name]] for name in truth(run[0])}
        chunks = [np.diff(k.stamps) for k in good]
        # Between tokens only where each chunk is one, by somebody's count.
        tokens = [np.diff(k.stamps) if k.n == len(k.stamps) and k.source != "chunks" else np.empty(0) for k in good]
        for name, parts in (("inter_chunk_s", chunks), ("itl_s", tokens)):
            values[name] = np.concatenate([*parts, np.empty(0)])
        for metric, told in values.items():
            cell = data.sel(level=level, metric=metric)
            assert (cell.n == len(told)).all()
            expected = [np.mean(told), *np.percentile(told, [50, 90, 95])] if len(told) else [NAN] * 4
            np.testing.assert_allclose(cell.estimate.values, [*expected, NAN])
        owners = sum(len(part) > 0 for part in chunks)
        assert (data.n_requests.sel(level=level, metric="inter_chunk_s") == owners).all()


@FEW
@given(runs())
def test_throughput_and_goodput_are_over_the_window_of_all_measured_requests(run):
    made = bench(run)
    limits = {"ttft_s": 1.5, "tpot_s": 0.2, "e2e_token_s": 2.5}
    rates = made.throughput().set_index(["level", "metric"])
    kept = {stated: made.goodput(ml.bench.Limits(**{name: limits[name] for name in stated})).set_index("level")
            for stated in (("ttft_s",), ("tpot_s",), ("e2e_token_s",), tuple(limits))}  # fmt: skip
    for level in LEVELS:
        good = succeeded(run, level)
        measured = [k.record for k in run if k.record.level == level and k.record.phase == "measured"]
        window = max(r.ended_s for r in measured) - min(r.sent_s for r in measured)  # of failures too
        done = {"output_tokens_per_s": sum(k.n for k in good), "requests_per_s": len(good)}
        for metric, amount in done.items():
            row = rates.loc[(level, metric)]
            assert row["estimate"] == pytest.approx(amount / window if good else NAN, nan_ok=True)
            assert (row["n"], row["window_s"]) == (len(good), pytest.approx(window if good else NAN, nan_ok=True))
            assert np.isnan(row["ci_low"])  # fewer than ten
        for stated, table in kept.items():
            row = table.loc[level]
            holds = sum(all(_within(k, name, limits[name]) for name in stated) for k in good)
            assert (row["good"], row["n"]) == (holds, len(measured))
            assert row["good_frac"] == pytest.approx(holds / len(measured) if good else NAN, nan_ok=True)
            assert row["good_per_s"] == pytest.approx(holds / window if good else NAN, nan_ok=True)


def _within(known: Known, name: str, limit: float) -> bool:
    return (name == "tpot_s" and known.n == 1) or truth(known)[name] <= limit


@FEW
@given(runs())
def test_outcomes_and_sources_of_counts_are_counted(run):
    made = bench(run)
    told = {tuple(row[:3]): row[4] for row in made.outcomes().itertuples(index=False, name=None)}
    assert told == Counter((k.record.level, k.record.phase, k.record.outcome) for k in run)
    assert made.succeeded == sum(len(succeeded(run, level)) for level in LEVELS)
    counted = Counter(k.source for level in LEVELS for k in succeeded(run, level))
    [said] = [remark for remark in made.remarks() if any(source in remark for source in counted)] or [""]
    assert all(f"{source} ({n} " in said for source, n in counted.items())


@FEW
@given(runs())
def test_events_are_told_in_seconds_after_their_request_was_sent(run):
    table = bench(run).events()
    expected = [(k.record.index, e.at_s - k.record.sent_s, e.kind, e.text) for k in run for e in k.record.events]
    assert len(table) == len(expected)
    for row, (index, at, kind, text) in zip(table.to_dict("records"), expected, strict=True):
        assert (row["index"], row["kind"], row["text"]) == (index, kind, text)
        assert row["at_s"] == pytest.approx(at)


def test_a_limit_that_is_just_met_is_kept():
    records = [timed(0, 0.5, 0.25, n=3), timed(0, 0.5, 0.25, n=3, outcome="timeout")]
    for name, value in (("ttft_s", 0.5), ("tpot_s", 0.25), ("e2e_token_s", 1.0)):
        at, below = (ml.bench.Limits(**{name: limit}) for limit in (value, value - 1e-6))
        assert [bench_of(records).goodput(limits)["good"].item() for limits in (at, below)] == [1, 0]


def test_two_tokens_that_arrive_at_once_have_no_speed_and_keep_no_limit():
    row = bench_of([timed(0, 0.5, 0.0, n=2)]).requests().iloc[0]
    assert np.isnan([row["tpot_s"], row["output_tokens_per_s"]]).all()
    assert bench_of([timed(0, 0.5, 0.0, n=2)]).goodput(ml.bench.Limits(tpot_s=9.0))["good"].item() == 0


@pytest.mark.parametrize(("n", "known"), [(99, False), (100, True)])
def test_each_percentile_is_its_own_and_the_99th_needs_100(n, known):
    ttft, gap = spread(n, 3)
    data = bench_of([timed(i, *pair) for i, pair in enumerate(zip(ttft, gap, strict=True))]).summary(
        bootstrap=ml.stats.Bootstrap(replicates=10)
    )
    for metric, values in (("ttft_s", ttft), ("tpot_s", gap)):
        cell = data.sel(metric=metric).isel(level=0)
        for name, q in PERCENTILES.items():
            expected = np.percentile(values, q) if q != 99 or known else NAN
            assert cell.estimate.sel(statistic=name).item() == pytest.approx(expected, nan_ok=True)
            low, estimate, high = (cell[v].sel(statistic=name).item() for v in ("ci_low", "estimate", "ci_high"))
            assert low <= estimate <= high or np.isnan(expected)


def test_the_interval_of_a_rate_is_student_s_over_ten_slices():
    starts = np.cumsum(np.random.default_rng(5).gamma(2.0, 1.0, 40))
    records = [timed(0, 0.1, 0.02, n=3) for _ in starts]
    moved = [_moved(record, start, i) for i, (record, start) in enumerate(zip(records, starts, strict=True))]
    table = bench_of(moved).throughput().set_index("metric")
    begin, end = starts[0], starts[-1] + 0.1 + 0.04 + 0.05
    stamps = {
        "output_tokens_per_s": [start + 0.1 + 0.02 * i for start in starts for i in range(3)],
        "requests_per_s": [start + 0.19 for start in starts],
    }
    for metric, marks in stamps.items():
        width = (end - begin) / 10
        rates = [sum(min(int((mark - begin) / width), 9) == s for mark in marks) / width for s in range(10)]
        reach = stats.t.ppf(0.975, 9) * np.std(rates, ddof=1) / np.sqrt(10)
        row = table.loc[metric]
        assert (row["ci_low"], row["ci_high"]) == pytest.approx(
            (max(row["estimate"] - reach, 0), row["estimate"] + reach), rel=1e-3
        )
        assert row["estimate"] == pytest.approx(len(marks) / (end - begin))


def _moved(record, start, index):
    events = tuple(dataclasses.replace(e, at_s=e.at_s + start) for e in record.events)
    return dataclasses.replace(
        record, index=index, events=events, started_s=start, sent_s=start, ended_s=record.ended_s + start
    )


def test_the_interval_of_a_mean_draws_requests_and_not_chunks():
    """Gaps of a request are alike: drawn one by one they would have an interval of a third of the width."""
    gap = spread(12, 8)[1]
    data = bench_of([timed(i, 0.1, g, n=10) for i, g in enumerate(gap)]).summary().isel(level=0)
    chunks, tpot = (data.sel(metric=m, statistic="mean") for m in ("inter_chunk_s", "tpot_s"))
    assert (chunks.n.item(), chunks.n_requests.item()) == (9 * 12, 12)
    assert (chunks.ci_low.item(), chunks.ci_high.item()) == pytest.approx((tpot.ci_low.item(), tpot.ci_high.item()))
    rows = [np.array([g, 1]) for g in gap]
    bounds = loops.interval(rows, lambda s: s[0] / s[1], [1] * 12, 0.95, "mean")
    assert (tpot.ci_low.item(), tpot.ci_high.item()) == pytest.approx(bounds)


def test_gaps_of_one_request_count_for_fewer_than_gaps_of_many():
    """Every request has one gap throughout: a hundred of them bound no percentile that twelve requests do not."""
    gap = np.sort(spread(12, 8)[1])
    data = bench_of([timed(i, 0.1, g, n=10) for i, g in enumerate(gap)]).summary().isel(level=0)
    chunks, tpot = (data.sel(metric=m, statistic="p50") for m in ("inter_chunk_s", "tpot_s"))
    assert chunks.n.item() == 9 * 12
    assert chunks.ci_low.item() <= tpot.ci_low.item() * 1.3
    assert chunks.ci_high.item() >= tpot.ci_high.item() / 1.3
    assert np.isinf(data.sel(metric="inter_chunk_s", statistic="p95").ci_high.item())
