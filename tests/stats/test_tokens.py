"""Nested-loop oracles for vocabulary specialization and predictability."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pandas as pd
import pytest
from helpers import loops
from helpers.refusals import refused

from mixlens.errors import BadInput, MissingSignal
from mixlens.stats import Bootstrap, contexts, predictability, tokens, vocabulary_specialization
from mixlens.trace.trace import Trace

QUICK = Bootstrap(replicates=20)


@pytest.fixture(params=[2**29, 4096])
def table_bytes(request, monkeypatch):
    """All layers at once, and one layer after the other."""
    monkeypatch.setattr(contexts, "_TABLE_BYTES", request.param)


@pytest.mark.usefixtures("table_bytes")
@pytest.mark.parametrize("min_count", [6, 10])
def test_vocabulary_specialization_by_hand(make_trace, tokens_of, in_small_blocks, min_count):
    trace = in_small_blocks(make_trace())
    found = vocabulary_specialization(trace, by="domain", min_count=min_count, bootstrap=QUICK)
    for domain in "xy":
        of_type = defaultdict(list)
        for t in tokens_of(trace):
            if t.row.domain == domain:
                of_type[t.token_id].append(t)
        frequent = [found_tokens for found_tokens in of_type.values() if len(found_tokens) >= min_count]
        assert frequent
        assert found["n_types"].sel(domain=domain) == len(frequent)
        assert found["n"].sel(domain=domain) == sum(map(len, frequent))
        for layer in range(trace.n_layers):
            best = [max(sum(e in t.expert_id[layer] for t in ts) for e in range(8)) / len(ts) for ts in frequent]
            expected = sum(best) / len(best)
            assert found["estimate"].sel(domain=domain, layer=layer) == pytest.approx(expected)


def test_vocabulary_specialization_of_rare_types_only_is_nan(make_trace):
    found = vocabulary_specialization(make_trace(), min_count=10_000, bootstrap=QUICK)
    assert np.isnan(found["estimate"]).all()
    assert found["n"] == 0
    assert found["n_types"] == 0


def test_vocabulary_specialization_interval_is_that_of_a_linear_mean(make_trace):
    """With one type the statistic is the share of one expert, and so is what a document adds to it."""
    trace = make_trace(n_documents=60, vocabulary=1, n_layers=1)
    found = vocabulary_specialization(trace)
    sequences, first = trace.read("sequence"), trace.read("expert_id")[:, 0]
    best = np.bincount(first.ravel()).argmax()
    documents = trace.sequences["document_id"].to_numpy()[sequences]
    table = pd.DataFrame({"document": documents, "hit": (first == best).any(1)}).groupby("document")["hit"]
    rows = [np.array(row, float) for row in zip(table.sum(), table.count(), strict=True)]
    expected = loops.interval(rows, lambda s: s[0] / s[1], table.count().tolist(), 0.95, "difference")
    np.testing.assert_allclose([found["ci_low"].item(), found["ci_high"].item()], expected, rtol=0.02)


def predicted_by_hand(trace, tokens_of, layer, folds):
    """Correct predictions by measure, in plain dictionaries, with the docstring's rule."""
    rows = tokens_of(trace)
    for i, t in enumerate(rows):
        before = rows[i - 1] if i else None
        joined = before is not None and before.sequence == t.sequence and before.position == t.position - 1
        t.pair = (before.token_id, t.token_id) if joined else None
        t.first = t.expert_id[layer][0]
        t.fold = folds[t.row.document_id]
    pairs = Counter(t.pair for t in rows)
    correct = np.zeros(3)
    for t in rows:
        learn = [s for s in rows if s.fold != t.fold]
        p = np.bincount([s.first for s in learn], minlength=8).astype(float)
        guesses = [p.argmax()]
        p /= p.sum()
        of_token = np.bincount([s.first for s in learn if s.token_id == t.token_id], minlength=8) + 4 * p
        guesses.append(of_token.argmax())
        of_token = of_token / of_token.sum()
        of_pair = 4 * of_token
        if t.pair is not None and pairs[t.pair] >= 2:
            of_pair = of_pair + np.bincount([s.first for s in learn if s.pair == t.pair], minlength=8)
        guesses.append(of_pair.argmax())
        correct += [guess == t.first for guess in guesses]
    return correct / len(rows)


@pytest.mark.usefixtures("table_bytes")
@pytest.mark.parametrize("n_documents", [3, 9])
def test_predictability_by_hand(make_trace, tokens_of, in_small_blocks, n_documents):
    trace = in_small_blocks(make_trace(n_layers=2, n_documents=n_documents, vocabulary=5))
    found = predictability(trace, bootstrap=QUICK)
    of_sequence, n_folds = tokens._folds(trace, len(trace.sequences), QUICK.seed)
    assert n_folds == min(5, n_documents)
    folds = dict(zip(trace.sequences["document_id"], of_sequence, strict=True))
    for layer in range(2):
        expected = predicted_by_hand(trace, tokens_of, layer, folds)
        np.testing.assert_allclose(found["estimate"].sel(layer=layer), expected)


def test_predictability_tells_identity_from_context():
    """Layer 0 depends on the token, layer 1 on the token before, layer 2 on neither."""
    rng = np.random.default_rng(0)
    n = 6000
    token_id = rng.integers(0, 8, n)
    before = np.roll(token_id, 1)
    ids = np.stack([token_id, before, rng.integers(0, 8, n)], axis=1)[..., None]
    trace = Trace.from_arrays(ids, n_experts=8, tokens={"token_id": token_id, "sequence": np.arange(n) // 100})
    found = predictability(trace, bootstrap=QUICK)["estimate"]
    assert found.sel(layer=0, measure="token") == 1
    assert found.sel(layer=1, measure="token") < 0.2
    assert found.sel(layer=1, measure="token_and_previous") > 0.98
    assert (found.sel(layer=2) < 0.2).all()


def test_predictability_needs_two_documents_and_token_ids(make_trace):
    with refused(BadInput, "documents", 1):
        predictability(make_trace(n_documents=1))
    without = Trace.from_arrays(np.zeros((4, 1, 1), int), n_experts=2)
    for statistic in (predictability, vocabulary_specialization):
        with refused(MissingSignal, "token_id", statistic.__name__):
            statistic(without)


def test_min_count_of_zero_is_refused(make_trace):
    with refused(BadInput, "min_count", 0):
        vocabulary_specialization(make_trace(), min_count=0)
