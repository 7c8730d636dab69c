"""Ways of driving a model, drawn at random, are recorded as each row alone runs, or refused; and the draw can tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fuzz_drivers import outcome

from mixlens.interventions import places
from mixlens.interventions.caches import Caches
from mixlens.interventions.generation import Generation
from mixlens.recording import recorder

QUICK = 200


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wrong(seeds: range) -> dict[int, str]:
    found = {seed: outcome(seed) for seed in seeds}
    refused = [result for result in found.values() if result.startswith("refused:")]
    assert len(refused) <= 0.05 * len(seeds)
    return {seed: result for seed, result in found.items() if result.startswith("wrong")}


def test_a_draw_is_recorded_as_it_ran_or_refused():
    assert not wrong(range(QUICK))


@pytest.mark.slow
def test_a_large_draw_is_recorded_as_it_ran_or_refused():
    assert not wrong(range(QUICK, QUICK + 1500))


def dropped_row(monkeypatch):
    whole = places._seen

    def seen(call, at):
        found = whole(call, at)
        own = np.broadcast_to(found.own, call.shape).copy()
        own[3:] = False
        return found._replace(own=own)

    monkeypatch.setattr(places, "_seen", seen)


def shifted_position(monkeypatch):
    whole = places.Places._place

    def place(self, call):
        placed = whole(self, call)
        return replace(placed, position=placed.position + (len(call.batch.valid) > 3))

    monkeypatch.setattr(places.Places, "_place", place)


def padding_counted(monkeypatch):
    monkeypatch.setattr(Generation, "padding", lambda self, step, ids: np.zeros(ids.shape, bool))


def another_cache_continued(monkeypatch):
    whole = Caches.continued

    def continued(self, cache, rows, past, *, masked):
        batch = whole(self, cache, rows, past, masked=masked)
        others = [held.batch for held in self._held.values() if held.batch.rows == rows and held.batch is not batch]
        if batch is not None and others:
            batch.sequence, others[0].sequence = others[0].sequence, batch.sequence
        return batch

    monkeypatch.setattr(Caches, "continued", continued)


def logits_of_another_column(monkeypatch):
    whole = recorder._columns_of
    monkeypatch.setattr(recorder, "_columns_of", lambda call: whole(call) - (call.logits.shape[1] == 2))


@pytest.mark.parametrize(
    "fault", [dropped_row, shifted_position, padding_counted, another_cache_continued, logits_of_another_column]
)
def test_a_planted_fault_is_found_by_the_quick_draw(fault, monkeypatch):
    fault(monkeypatch)
    assert any(outcome(seed).startswith("wrong") for seed in range(QUICK))
