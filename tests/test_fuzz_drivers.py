"""Ways of driving a model, drawn at random, are recorded as each row alone runs, or refused; and the draw can tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fuzz_drivers import outcome

from mixlens.interventions.forward_tracker import ForwardTracker
from mixlens.interventions.generation import Generation
from mixlens.interventions.places import Places
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
    refused = [result for result in found.values() if result.startswith("refused")]
    assert len(refused) <= 0.1 * len(seeds)
    return {seed: result for seed, result in found.items() if result.startswith("wrong")}


def test_a_draw_is_recorded_as_it_ran_or_refused():
    assert not wrong(range(QUICK))


@pytest.mark.slow
def test_a_large_draw_is_recorded_as_it_ran_or_refused():
    assert not wrong(range(QUICK, QUICK + 1500))


def dropped_row(monkeypatch):
    whole = Places._valid

    def valid(self, call):
        found = whole(self, call)
        found[3:] = False
        return found

    monkeypatch.setattr(Places, "_valid", valid)


def shifted_position(monkeypatch):
    whole = Places._number

    def number(self, batch, valid, opening):
        sequence, position = whole(self, batch, valid, opening)
        return sequence, position + (len(batch.valid) > 2)

    monkeypatch.setattr(Places, "_number", number)


def padding_counted(monkeypatch):
    monkeypatch.setattr(Generation, "padding", lambda self, step, ids: np.zeros(ids.shape, bool))


def another_cache_continued(monkeypatch):
    whole = ForwardTracker._continued

    def continued(self, rows, past, cache):
        batch = whole(self, rows, past, cache)
        others = [one for one in self._batches.values() if one.rows == rows and one.columns == past]
        return batch and next((one for one in others if one is not batch), batch)

    monkeypatch.setattr(ForwardTracker, "_continued", continued)


def logits_of_another_column(monkeypatch):
    whole = recorder._columns_of
    monkeypatch.setattr(recorder, "_columns_of", lambda call: whole(call) - (call.logits.shape[1] == 2))


@pytest.mark.parametrize(
    "fault", [dropped_row, shifted_position, padding_counted, another_cache_continued, logits_of_another_column]
)
def test_a_planted_fault_is_found_by_the_quick_draw(fault, monkeypatch):
    fault(monkeypatch)
    assert any(outcome(seed).startswith("wrong") for seed in range(QUICK))
