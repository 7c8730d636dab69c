"""Nested-loop oracle for the experts that moved."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.refusals import refused

from mixlens.errors import BadInput
from mixlens.stats import Bootstrap, agreement, moved
from mixlens.trace.trace import Trace

QUICK = Bootstrap(replicates=20)


def rerouted(trace: Trace) -> Trace:
    """The same tokens; in layer 1 every choice is one expert further, in the others half of the tokens are."""
    ids = trace.read("expert_id").astype(int)
    further = np.random.default_rng(1).random(ids.shape[:2]) < 0.5
    further[:, 1] = True
    return Trace.from_arrays(
        (ids + further[..., None]) % 8,
        n_experts=8,
        tokens={"sequence": trace.read("sequence"), "token_id": trace.read("token_id")},
    )


def test_moved_by_hand(make_trace, tokens_of):
    a = make_trace()
    b = rerouted(a)
    found = moved(a, b, by="domain", bootstrap=QUICK)
    pairs = list(zip(tokens_of(a), tokens_of(b), strict=True))
    for domain in "xy":
        here = [(s, t) for s, t in pairs if s.row.domain == domain]
        for layer in range(a.n_layers):
            for expert in range(8):
                before = sum(expert in s.expert_id[layer] for s, _ in here)
                after = sum(expert in t.expert_id[layer] for _, t in here)
                both = sum(expert in s.expert_id[layer] and expert in t.expert_id[layer] for s, t in here)
                cell = found.sel(domain=domain, layer=layer, expert=expert)
                assert float(cell.estimate.sel(measure="share_change")) == pytest.approx(
                    (after - before) / 2 / len(here)
                )
                kept = cell.sel(measure="kept")
                if not before:
                    assert np.isnan(kept.estimate)
                    continue
                assert float(kept.estimate) == pytest.approx(both / before)
                assert kept.ci_low <= kept.estimate <= kept.ci_high


def test_nothing_moves_between_a_trace_and_itself(make_trace):
    found = moved(make_trace(), make_trace(), bootstrap=QUICK).estimate
    np.testing.assert_allclose(found.sel(measure="share_change"), 0, atol=1e-12)
    kept = found.sel(measure="kept").values
    np.testing.assert_allclose(kept[np.isfinite(kept)], 1)


def test_changes_sum_to_nothing_and_kept_is_the_overlap(make_trace):
    a = make_trace()
    b = rerouted(a)
    found = moved(a, b, bootstrap=QUICK).estimate
    np.testing.assert_allclose(found.sel(measure="share_change").sum("expert"), 0, atol=1e-12)
    ids = a.read("expert_id")
    share = np.stack([(ids == e).mean((0, 2)) for e in range(8)], 1)
    overlap = agreement(a, b, bootstrap=QUICK).estimate.sel(measure="overlap")
    np.testing.assert_allclose((found.sel(measure="kept").fillna(0) * share).sum("expert"), overlap, atol=1e-6)


def test_other_tokens_are_refused(make_trace):
    a, b = make_trace(seed=0), make_trace(seed=1)
    first = np.flatnonzero(a.read("token_id")[:5] != b.read("token_id")[:5])[0]
    pair = (int(a.read("token_id")[first]), int(b.read("token_id")[first]))
    with refused(BadInput, "token_id") as error:
        moved(a, b, bootstrap=QUICK)
    assert error.value.value["token_id"] == pair
