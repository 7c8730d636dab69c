"""The load generator on a clock that nobody waits for: when requests begin, how many at a time, what ends a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers.inside import Caps, Driver, Job, Level, turn_edges
from helpers.streams import timed
from helpers.virtual_time import Server, clock, in_no_time
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import mixlens as ml

SMALL = ml.bench.Workload(prompt_tokens=16, output_tokens=50)


def drive(level: Level, requests: int, *, server: Server | None = None, warmup: int = 0, caps: Caps | None = None):
    """The server after a load, and the records that were kept."""
    server, kept = server or Server(), []
    driver = Driver(server, SMALL, caps or Caps(), clock, kept.append)
    in_no_time(lambda: driver.run([level], requests, warmup))
    return server, kept


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2))
def test_a_closed_loop_keeps_its_places_full_and_no_more(places, requests, warmup):
    took = lambda job: 1.0 + job.index % 3  # noqa: E731
    server, kept = drive(Level(concurrency=places), requests, server=Server(took), warmup=warmup)
    phases = [job.phase for job in server.jobs]
    assert phases == ["warm-up"] * (warmup * places) + ["measured"] * requests
    assert server.most <= places
    assert warmup or server.most == min(places, requests)
    assert sorted(r.index for r in kept if r.phase == "measured") == list(range(requests))
    # By hand: each begins as soon as one of the places is free, all after the warm-up. Places open evenly over the
    # time of a warm-up request, so that they do not queue for one another.
    begun = server.began[warmup * places :]
    lasted = [r.ended_s - r.started_s for r in kept if r.phase == "warm-up"]
    ramp = np.median(lasted) if lasted else 0.0
    free = [begun[0] + ramp * place / places for place in range(places)]
    for at, index in zip(begun, range(requests), strict=True):
        place = free.index(min(free))
        assert at == pytest.approx(free[place])
        free[place] = at + took(server.jobs[warmup * places + index])
    assert len({job.prompt for job in server.jobs}) == len(server.jobs)


def test_a_warm_up_has_ended_before_the_first_measured_request():
    slow = Server(lambda job: 9.0 if job.phase == "warm-up" and job.index == 2 else 1.0)
    server, kept = drive(Level(concurrency=3), 3, server=slow, warmup=1)
    ramp = np.median([r.ended_s - r.started_s for r in kept if r.phase == "warm-up"])
    assert server.began == pytest.approx([0, 0, 0, 9, 9 + ramp / 3, 9 + 2 * ramp / 3])


def test_an_open_loop_waits_for_nobody():
    level = Level(rate=4.0, arrivals="constant")
    server, kept = drive(level, 12, server=Server(lambda job: 2.0))
    assert server.began == pytest.approx([i / 4 for i in range(12)])
    assert [r.scheduled_s for r in sorted(kept, key=lambda r: r.index)] == pytest.approx(server.began)
    assert server.most == 8  # the rate times two seconds: a closed loop has one at a time


def test_an_open_loop_warms_up_one_at_a_time_and_then_counts_from_zero():
    server, kept = drive(Level(rate=2.0, arrivals="constant"), 3, warmup=2)
    assert server.began == pytest.approx([0, 1, 2, 2.5, 3])
    assert [r.scheduled_s for r in kept[:2]] == [None, None]


@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_poisson_arrivals_are_exponential_and_constant_ones_are_not(rate):
    due = Level(rate=rate).due(3000, 7)
    gaps = np.diff(due)
    assert due[0] == 0
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.06)  # not the rate itself
    assert stats.kstest(gaps, "expon", args=(0, 1 / rate)).pvalue > 0.01
    assert np.diff(Level(rate=rate, arrivals="constant").due(50, 7)) == pytest.approx([1 / rate] * 49)
    assert due == Level(rate=rate).due(3000, 7) != Level(rate=rate).due(3000, 8)


def test_a_turn_of_an_open_loop_begins_at_once_and_keeps_its_gaps():
    server, level = Server(), Level(rate=3.0)
    driver = Driver(server, SMALL, Caps(), clock, lambda record: None)
    in_no_time(lambda: driver.part(level, range(4, 8)))
    due = level.due(8, SMALL.seed)[4:]
    assert server.began == pytest.approx([at - due[0] for at in due])
    assert [job.index for job in server.jobs] == [4, 5, 6, 7]


@given(st.integers(1, 40), st.integers(1, 6))
def test_turns_deal_out_every_request_once(requests, turns):
    edges = turn_edges(requests, turns)
    sizes = np.diff(edges)
    assert (edges[0], edges[-1], len(edges)) == (0, requests, turns + 1)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(("level", "begun"), [
    (Level(concurrency=2), [0, 0, 1, 1, 2, 2]), (Level(rate=2.0, arrivals="constant"), [0, 0.5, 1, 1.5, 2, 2.5]),
])  # fmt: skip
def test_after_the_seconds_of_a_cap_nothing_begins_and_what_has_begun_ends(level, begun):
    """At 3 s exactly the cap is met: a request that is due then does not begin."""
    caps = Caps(seconds=3.0)
    server, kept = drive(level, 50, caps=caps)
    assert server.began == pytest.approx(begun)
    assert len(kept) == len(begun)
    assert "3 seconds" in caps.stopped


def test_an_interrupt_ends_a_load():
    caps = Caps()
    server = Server(lambda job: caps.interrupt.set() or 1.0)
    _, kept = drive(Level(concurrency=1), 5, server=server, caps=caps)
    assert (len(kept), caps.stopped) == (1, "interrupted")


IN, OUT = 3.0, 40.0  # dollars per million tokens, so that in and out cannot be exchanged


def worst(prompt: str, tokens: int) -> float:
    return ((len(prompt.encode()) + 64) * IN + tokens * OUT) / 1e6


def admitted(caps: Caps, prompt: str = "né", tokens: int = 50) -> float | None:
    return caps.admit(Job(0, "l", "measured", prompt, tokens), 0.0)


def test_what_is_set_aside_is_the_worst_that_a_request_can_cost():
    caps = Caps(dollars=1.0, price=(IN, OUT))
    assert admitted(caps) == pytest.approx(worst("né", 50)) == pytest.approx((67 * IN + 50 * OUT) / 1e6)  # 3 bytes
    assert caps.spent_usd == pytest.approx(worst("né", 50))


def test_a_request_that_just_fits_begins():
    caps = Caps(dollars=2 * worst("x", 8), price=(IN, OUT))
    assert admitted(caps, "x", 8) and admitted(caps, "x", 8)  # noqa: PT018
    assert admitted(caps, "x", 8) is None


def test_without_a_cap_in_dollars_nothing_is_reckoned():
    caps = Caps(price=(IN, OUT))
    assert admitted(caps) == 0.0
    caps.settle(0.0, timed(0, 0.5, 0.1))
    assert caps.spent_usd == 0.0


@pytest.mark.parametrize(("changes", "usage", "spent"), [
    ({}, {}, (11 * IN + 5 * OUT) / 1e6),  # 11 tokens in, 5 out
    ({}, {"cost_usd": 0.25}, 0.25),  # what the server says it charged
    ({"outcome": "timeout"}, {"cost_usd": 0.25}, 0.25),
    ({"outcome": "timeout"}, {}, 0.5),  # not known: what was set aside stays
    ({}, {"input_tokens": None}, 0.5),
    *(({"outcome": outcome}, {}, 0.0) for outcome in ("http", "connect", "tls")),  # a refusal costs nothing
    *(({"outcome": outcome}, {}, 0.5) for outcome in ("error", "malformed", "truncated", "empty")),
])  # fmt: skip
def test_a_request_that_ended_costs_what_it_used(changes, usage, spent):
    caps = Caps(dollars=1.0, price=(IN, OUT), spent_usd=2.0)
    record = timed(0, 0.5, 0.1)
    record = replace(record, events=(*record.events[:-1], replace(record.events[-1], **usage)), **changes)
    caps.spent_usd += 0.5
    caps.settle(0.5, record)
    assert caps.spent_usd == pytest.approx(2.0 + spent)


def test_a_run_spends_up_to_its_cap():
    """Each costs 233 millionths of a dollar, and at worst so much more: as many begin as fit at their worst."""
    caps = Caps(dollars=0.01, price=(IN, OUT))
    _, kept = drive(Level(concurrency=1), 500, caps=caps)
    cost = (11 * IN + 5 * OUT) / 1e6
    expected, spent = 0, 0.0
    while spent + worst(SMALL.prompt(expected), 50) <= 0.01:
        spent, expected = spent + cost, expected + 1
    assert len(kept) == expected > 20
    assert caps.spent_usd == pytest.approx(spent)
