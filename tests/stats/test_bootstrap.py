"""The intervals: what they cover, and when there is none."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.clustered import SHARES, clustered
from helpers.refusals import refused

from mixlens.core.intervals import effective_number
from mixlens.errors import BadInput
from mixlens.stats import Bootstrap, domain_information, expert_share, load_balance
from mixlens.trace.trace import Trace


def covers(data, truth, low="ci_low", high="ci_high"):
    return ((data[low] <= truth) & (truth <= data[high])).values


@pytest.mark.parametrize("spread", [0.0, 0.8], ids=["equal lengths", "unequal lengths"])
@pytest.mark.parametrize("n_documents", [20, 40, 100])
def test_intervals_of_shares_cover_what_they_say(n_documents, spread):
    rng, hits = np.random.default_rng(n_documents), []
    for seed in range(15):
        ids, tokens, _ = clustered(rng, SHARES, n_documents=n_documents, spread=spread, concentration=30, n_layers=16)
        trace = Trace.from_arrays(ids[..., None], n_experts=8, tokens=tokens)
        hits.append(covers(expert_share(trace, bootstrap=Bootstrap(seed=seed, replicates=400)), SHARES))
    # 240 experiments of 8 shares: the binomial error of one share's coverage is 1.4 %, of their mean about half that.
    assert 0.93 <= np.mean(hits) <= 0.97


@pytest.mark.parametrize("n_documents", [2, 3, 5, 8])
def test_intervals_of_shares_of_few_documents_cover_no_less(n_documents):
    rng, hits = np.random.default_rng(n_documents), []
    for seed in range(20):
        ids, tokens, _ = clustered(rng, SHARES, n_documents=n_documents, spread=0.5, concentration=20, n_layers=16)
        trace = Trace.from_arrays(ids[..., None], n_experts=8, tokens=tokens)
        hits.append(covers(expert_share(trace, bootstrap=Bootstrap(seed=seed, replicates=20)), SHARES))
    assert np.mean(hits) >= 0.93


@pytest.mark.parametrize("n_documents", [5, 20, 100])
def test_an_expert_that_few_documents_use_is_covered(n_documents):
    """Half of the tokens of one document in twenty choose it: most draws of five documents never see it."""
    hits = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        uses = rng.random(n_documents) < 0.05
        ids = np.concatenate([rng.choice([0, 1] if one else [1, 2, 3], 60) for one in uses])
        tokens = {"sequence": np.repeat(np.arange(n_documents), 60)}
        trace = Trace.from_arrays(ids[:, None, None], n_experts=4, tokens=tokens)
        found = expert_share(trace, bootstrap=Bootstrap(replicates=20)).sel(layer=0, expert=0)
        hits.append(covers(found, 0.025))
    assert np.mean(hits) >= 0.93


def test_one_document_has_no_interval(make_trace):
    found = expert_share(make_trace(n_documents=1))
    assert np.isfinite(found["estimate"]).all()
    assert np.isnan(found["ci_low"]).all()
    assert np.isnan(found["ci_high"]).all()
    alone = expert_share(make_trace(), by="document_id")
    assert np.isnan(alone["ci_low"]).all()
    assert (alone["n_documents"] == 1).all()


def test_a_document_of_several_sequences_is_drawn_as_one(make_trace):
    trace = make_trace()
    apart = make_trace()
    apart.sequences["document_id"] = np.arange(len(apart.sequences))
    one, many = expert_share(trace), expert_share(apart)
    assert one["n_documents"] == 9
    assert many["n_documents"] == len(trace.sequences) > 9
    np.testing.assert_array_equal(one["estimate"], many["estimate"])
    assert not np.allclose(one["ci_low"], many["ci_low"])


def test_the_seed_decides_what_is_permuted_and_nothing_else(make_trace):
    trace = make_trace(n_documents=12)
    first, again, other = (domain_information(trace, bootstrap=Bootstrap(seed=s)) for s in (1, 1, 2))
    assert first.identical(again)
    assert not np.array_equal(first["ci_low"], other["ci_low"])
    assert load_balance(trace, bootstrap=Bootstrap(seed=1)).identical(load_balance(trace, bootstrap=Bootstrap(seed=2)))
    assert (first.attrs["seed"], first.attrs["level"]) == (1, 0.95)


def test_a_higher_level_gives_a_wider_interval(make_trace):
    trace = make_trace()
    narrow, wide = (expert_share(trace, bootstrap=Bootstrap(level=level)) for level in (0.5, 0.99))
    assert (wide["ci_low"] <= narrow["ci_low"]).all()
    assert (wide["ci_high"] >= narrow["ci_high"]).all()
    assert ((wide["ci_high"] - wide["ci_low"]) > (narrow["ci_high"] - narrow["ci_low"])).mean() > 0.9


def test_effective_documents_are_fewer_where_lengths_differ():
    sizes = np.array([[10, 10, 10], [30, 10, 0], [5, 0, 0], [0, 0, 0], [1e9, 1, 1]], float)
    np.testing.assert_allclose(effective_number(sizes), [3, 1.6, np.nan, np.nan, 1.01])


@pytest.mark.parametrize(
    ("name", "value"),
    [("level", 95), ("level", 1), ("level", 0), ("replicates", 9), ("replicates", 100.0)],
)
def test_settings_that_make_no_interval_are_refused(name, value):
    with refused(BadInput, name, value):
        Bootstrap(**{name: value})
    assert Bootstrap(level=0.01, replicates=10).replicates == 10
