"""On routing that has nothing to decide upon every verdict is "not enough evidence"; on the demo it is not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest

import mixlens as ml

DECISIONS = {
    "batch": lambda trace, **how: ml.decisions.distinct_experts(trace, batch=4, **how),
    "window": lambda trace, **how: ml.decisions.distinct_experts(trace, window=4, **how),
    "lru": lambda trace, **how: ml.decisions.cache(trace, slots=4, policy="lru", **how),
    "lfu": lambda trace, **how: ml.decisions.cache(trace, slots=4, policy="lfu", **how),
    "least-stale": lambda trace, **how: ml.decisions.cache(trace, slots=4, policy="least-stale", **how),
    "optimum": lambda trace, **how: ml.decisions.cache(trace, slots=4, policy="optimum", **how),
    "fixed": lambda trace, **how: ml.decisions.cache(trace, slots=4, policy="fixed", **how),
    "every size": lambda trace, **how: ml.decisions.cache(trace, **how),
    "placement": lambda trace, **how: ml.decisions.placement(trace, ranks=4, step=32, **how),
    "copies": lambda trace, **how: ml.decisions.placement(trace, ranks=4, redundant=4, step=32, **how),
}
# What hangs on the order of tokens. Caches and placements have something to decide upon in any order: documents whose
# tokens are shuffled are all alike, and experts that are used more stay so in each.
OF_ORDER = ("batch", "window")


def traced(ids, lengths):
    sequences = pd.DataFrame({"document_id": [f"d{i}" for i in range(len(lengths))]})
    return ml.Trace.from_arrays(
        ids, n_experts=8, tokens={"sequence": np.repeat(np.arange(len(lengths)), lengths)}, sequences=sequences
    )


def random_routing(rng):
    lengths = np.maximum(8, rng.lognormal(4, 0.5, 40)).astype(int)
    ids = rng.permuted(np.tile(np.arange(8), (lengths.sum(), 4, 1)), axis=-1)[..., :2]
    return traced(ids, lengths)


def renamed_in_each_document(rng, ids, lengths):
    """The documents as they are, but what an expert is called in one says nothing of another."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    names = rng.permuted(np.tile(np.arange(8), (len(lengths), ids.shape[1], 1)), axis=-1)
    return traced(names[document[:, None, None], np.arange(ids.shape[1])[:, None], ids], lengths)


def tokens_shuffled(rng, ids, lengths):
    return traced(ids[rng.permutation(len(ids))], lengths)


@pytest.fixture(scope="module")
def demo():
    quiet = ml.RecordSettings(progress=False)
    trace = ml.record(ml.load("demo", verbose=False), ml.demo_documents(), settings=quiet, signals=[])
    return trace.read("expert_id").astype(int), trace.sequences["length"].to_numpy()


def verdicts(draw, names, draws):
    """Of so many draws, how often each decision says what."""
    found = {name: Counter() for name in names}
    for seed in range(draws):
        trace = draw(np.random.default_rng(seed))
        for name in names:
            found[name][DECISIONS[name](trace).attrs["verdict"]] += 1
    return found


def assert_mostly_unknown(found, draws):
    for name, told in found.items():
        assert told["not enough evidence"] >= 0.95 * draws, (name, told)


def test_random_routing_decides_nothing():
    assert_mostly_unknown(verdicts(random_routing, [*DECISIONS], 4), 4)


@pytest.mark.slow
def test_a_hundred_draws_of_random_routing_decide_nothing():
    assert_mostly_unknown(verdicts(random_routing, [*DECISIONS], 100), 100)


@pytest.mark.slow
def test_names_that_say_nothing_of_other_documents_decide_nothing(demo):
    assert_mostly_unknown(
        verdicts(lambda rng: renamed_in_each_document(rng, *demo), ["fixed", "placement", "copies"], 100), 100
    )


@pytest.mark.slow
def test_tokens_in_another_order_decide_nothing(demo):
    assert_mostly_unknown(verdicts(lambda rng: tokens_shuffled(rng, *demo), OF_ORDER, 100), 100)


@pytest.mark.parametrize("name", DECISIONS)
def test_one_document_is_not_enough_and_none_is_refused(name):
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(8), (600, 2, 1)), axis=-1)[..., :2]
    ids[:, :, 0], ids[:, :, 1] = np.minimum(ids.min(-1), 6), 7  # one expert is in every choice
    trace = ml.Trace.from_arrays(
        ids,
        n_experts=8,
        tokens={"sequence": np.repeat(np.arange(6), 100), "token_id": np.ones(600, int)},
        sequences=pd.DataFrame({"document_id": ["one"] * 6}),
    )
    assert DECISIONS[name](trace).attrs["verdict"] == "not enough evidence"
    with pytest.raises(ml.BadInput):
        DECISIONS[name](trace.select(tokens=[2]))


@pytest.mark.parametrize("name", DECISIONS)
def test_a_cluster_is_what_documents_are_else(name):
    rng = np.random.default_rng(1)
    own = random_routing(rng)
    frame = own.sequences.assign(book=[f"b{i // 4}" for i in range(len(own.sequences))])
    tokens = {"sequence": own.read("sequence")}
    named = ml.Trace.from_arrays(own.read("expert_id"), n_experts=8, tokens=tokens, sequences=frame)
    books = ml.Trace.from_arrays(
        own.read("expert_id"), n_experts=8, tokens=tokens, sequences=frame.assign(document_id=frame["book"])
    )
    assert DECISIONS[name](named, cluster="book").drop_attrs().equals(DECISIONS[name](books).drop_attrs())


@pytest.mark.slow
def test_the_demo_decides_where_there_is_something(demo):
    trace = traced(*demo)
    batch, window = DECISIONS["batch"](trace), DECISIONS["window"](trace)
    lru, fixed, best = (DECISIONS[name](trace) for name in ("lru", "fixed", "optimum"))
    assert [found.attrs["verdict"] for found in (window, lru, fixed)] == ["do it", "do it", "not enough evidence"]
    assert batch.attrs["formula"] == pytest.approx(5.47, abs=0.005)
    assert float(batch["random_tokens"].mean()) == pytest.approx(5.44, abs=0.005)
    assert float(window["estimate"].mean()) == pytest.approx(4.14, abs=0.005)
    shares = [*(float(one[0]) for one in (lru["estimate"], best["estimate"], fixed["in_sample"], fixed["chance"]))]
    assert shares == pytest.approx([0.765, 0.846, 0.552, 0.5], abs=0.001)
    assert float(fixed["ci_low"][0]) < 0.5 < float(fixed["ci_high"][0])  # on documents that it was not fitted on
