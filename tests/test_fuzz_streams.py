"""Streams drawn at random are read as the drawn server wrote them; and the draw can tell."""

from __future__ import annotations

import dataclasses

import pytest
from fuzz_streams import outcome

from mixlens.bench import events, metrics
from mixlens.endpoints.protocols import REASONING, ROLE, TOKEN

QUICK = 300


def wrong(seeds: range) -> dict[int, str]:
    return {seed: found for seed in seeds if (found := outcome(seed)) != "equal"}


def test_a_draw_of_streams_is_read_as_it_was_written():
    assert not wrong(range(QUICK))


@pytest.mark.slow
def test_a_large_draw_of_streams_is_read_as_it_was_written():
    assert not wrong(range(QUICK, QUICK + 20_000))


def a_role_chunk_counts_as_a_token(monkeypatch):
    whole = events.decode

    def decode(message, protocol):
        event = whole(message, protocol)
        return dataclasses.replace(event, kind=TOKEN) if event.kind == ROLE else event

    monkeypatch.setattr(events, "decode", decode)


def reasoning_counts_in_the_pace(monkeypatch):
    whole = metrics.paced
    monkeypatch.setattr(
        metrics,
        "paced",
        lambda record, count=None: (whole(record, count)[0], float(metrics.output_tokens(record, count)[0] - 1)),
    )


def reasoning_is_lost(monkeypatch):
    whole = events.decode

    def decode(message, protocol):
        event = whole(message, protocol)
        return dataclasses.replace(event, kind=ROLE, reasoning="") if event.kind == REASONING else event

    monkeypatch.setattr(events, "decode", decode)


def the_last_stamp_is_that_of_the_end(monkeypatch):
    whole = metrics.token_stamps

    def stamps(record):
        found = whole(record)
        found[-1] = record.ended_s + 1.0
        return found

    monkeypatch.setattr(metrics, "token_stamps", stamps)


@pytest.mark.parametrize(
    "fault",
    [
        a_role_chunk_counts_as_a_token,
        reasoning_counts_in_the_pace,
        reasoning_is_lost,
        the_last_stamp_is_that_of_the_end,
    ],
)
def test_a_planted_fault_is_found_by_the_quick_draw(fault, monkeypatch):
    fault(monkeypatch)
    assert wrong(range(QUICK))
