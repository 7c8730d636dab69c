"""Nested-loop oracles for what experts have to do with domains."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.refusals import refused

from mixlens.errors import BadInput
from mixlens.stats import Bootstrap, domain_information, domain_specialization

QUICK = Bootstrap(replicates=20)


def test_domain_specialization_by_hand(make_trace, tokens_of, in_small_blocks):
    trace = in_small_blocks(make_trace())
    found = domain_specialization(trace, bootstrap=QUICK)
    assert found.attrs["uniform"] == 0.25
    for domain in "xy":
        tokens = [t for t in tokens_of(trace) if t.row.domain == domain]
        for layer in range(trace.n_layers):
            for e in range(8):
                expected = sum(e in t.expert_id[layer] for t in tokens) / len(tokens)
                assert found["estimate"].sel(domain=domain, layer=layer, expert=e) == pytest.approx(expected)
    np.testing.assert_allclose(found["estimate"].sum("expert"), 2)


def information_by_hand(tokens, label_of, layer):
    joint: dict[tuple, int] = {}
    for t in tokens:
        for e in t.expert_id[layer]:
            joint[label_of(t), e] = joint.get((label_of(t), e), 0) + 1
    total = sum(joint.values())
    bits = 0.0
    for (label, e), n in joint.items():
        of_label = sum(v for (a, _), v in joint.items() if a == label)
        of_expert = sum(v for (_, b), v in joint.items() if b == e)
        bits += n / total * math.log2(n * total / (of_label * of_expert))
    return bits


def test_domain_information_by_hand(make_trace, tokens_of, in_small_blocks):
    trace = in_small_blocks(make_trace())
    found = domain_information(trace, by=["domain", "source"], bootstrap=QUICK)
    assert found["estimate"].dims == ("layer", "measure")
    assert found["n"] == trace.n_tokens
    assert found["n_documents"] == 9
    for layer in range(trace.n_layers):
        expected = information_by_hand(tokens_of(trace), lambda t: (t.row.domain, t.row.source), layer)
        here = found["estimate"].sel(layer=layer)
        assert here.sel(measure="mutual_information") == pytest.approx(expected)
        assert here.sel(measure="excess") == pytest.approx(expected - here.sel(measure="permuted").item())


def test_permuted_information_is_the_mean_over_dealt_out_labels(make_trace, tokens_of):
    """The 200 permutations, against as many of our own: means agree within their Monte Carlo error."""
    trace = make_trace(n_layers=1, n_documents=12)
    found = domain_information(trace, bootstrap=QUICK)["estimate"].sel(layer=0, measure="permuted").item()
    rng = np.random.default_rng(1)
    documents = trace.sequences.groupby("document_id")["domain"].first()
    tokens, own = tokens_of(trace), []
    for _ in range(200):
        dealt = dict(zip(documents.index, rng.permutation(documents.values), strict=True))
        own.append(information_by_hand(tokens, lambda t, dealt=dealt: dealt[t.row.document_id], 0))
    assert abs(found - np.mean(own)) < 4 * np.std(own) * math.sqrt(2 / 200)


def test_excess_vanishes_where_domains_are_only_names(make_trace):
    trace = make_trace(n_documents=60)
    trace.sequences["domain"] = trace.sequences["document_id"].map(lambda d: hash_free_coin(d))
    found = domain_information(trace)
    excess = found.sel(measure="excess")
    assert (excess["ci_low"] < 0.01).all()
    assert (abs(excess["estimate"]) < 0.01).all()


def hash_free_coin(document_id: str) -> str:
    return "xy"[sum(map(ord, document_id)) * 7 // 3 % 2]


def test_domain_information_of_one_document_has_no_interval(make_trace):
    found = domain_information(make_trace(n_documents=1), bootstrap=QUICK)
    assert np.isnan(found["ci_low"]).all()
    assert np.isnan(found["ci_high"]).all()
    assert (found["estimate"] == 0).all()


def test_an_unknown_domain_column_is_refused(make_trace):
    with refused(BadInput, "by", "topic"):
        domain_specialization(make_trace(), by="topic")
