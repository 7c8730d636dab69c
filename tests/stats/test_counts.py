"""What holds for every statistic: permutations, duplicates, groups, processes, many documents, shapes."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from helpers.refusals import refused

from mixlens import stats
from mixlens.errors import BadInput
from mixlens.stats import Bootstrap, clusters
from mixlens.trace.trace import Trace

QUICK = Bootstrap(replicates=20)


def agreement_with_shifted(trace, **options):
    """Agreement as a function of one trace: with itself, every expert id one higher."""
    ids = (trace.read("expert_id").astype(int) + 1) % trace.n_experts
    names = [name for name in ("sequence", "token_id") if name in trace.signals]
    shifted = Trace.from_arrays(ids, n_experts=trace.n_experts, tokens={n: trace.read(n) for n in names})
    return stats.agreement(trace, shifted, **options)


STATISTICS = {
    "expert_share": stats.expert_share,
    "load_balance": stats.load_balance,
    "routing_entropy": stats.routing_entropy,
    "router_confidence": stats.router_confidence,
    "position_profile": stats.position_profile,
    "repetition": stats.repetition,
    "coactivation": stats.coactivation,
    "transitions": stats.transitions,
    "domain_specialization": stats.domain_specialization,
    "domain_information": stats.domain_information,
    "vocabulary_specialization": stats.vocabulary_specialization,
    "predictability": stats.predictability,
    "agreement": agreement_with_shifted,
}
# Those whose groups are the documents' domains.
OF_DOMAINS = ("domain_specialization", "domain_information")


def every(*, but: tuple[str, ...] = ()):
    """Every statistic by name, but for those that the property does not apply to."""
    return pytest.mark.parametrize("name", [name for name in STATISTICS if name not in but])


def assert_bounds_hold_the_estimate(found):
    estimate, low, high = (found[v].values for v in ("estimate", "ci_low", "ci_high"))
    known = np.isfinite(low)
    assert known.any() == (found.attrs["interval"] != "none")
    assert (np.isnan(low) == np.isnan(high)).all()
    assert (low[known] <= estimate[known]).all()
    assert (estimate[known] <= high[known]).all()


@every()
def test_the_form_of_every_result(make_trace, name):
    trace = make_trace()
    found = STATISTICS[name](trace, bootstrap=QUICK)
    assert {"estimate", "ci_low", "ci_high", "n", "n_documents"} <= set(found)
    assert found["ci_low"].dims == found["ci_high"].dims == found["estimate"].dims
    assert set(found["n"].dims) <= set(found["estimate"].dims)
    assert found["n"].dtype.kind == found["n_documents"].dtype.kind == "i"
    assert found["n_documents"].sum() == 9
    attrs = {"statistic", "unit", "formula", "source", "level", "interval", "model"}
    assert attrs <= set(found.attrs)
    assert found.attrs["statistic"] == name
    assert found.attrs["model"] == "random"
    assert_bounds_hold_the_estimate(found)


@every()
def test_64_experts_of_which_8_are_chosen(make_trace, name):
    assert_bounds_hold_the_estimate(STATISTICS[name](make_trace(n_layers=2, n_experts=64, top_k=8), bootstrap=QUICK))


@every(but=("coactivation",))
def test_one_expert_a_token(make_trace, name):
    assert_bounds_hold_the_estimate(STATISTICS[name](make_trace(n_layers=2, n_experts=3, top_k=1), bootstrap=QUICK))


# Predictions fall to the lower number where two experts are equally likely, and agreement is with the next number here.
@every(but=("predictability", "agreement"))
def test_renaming_experts_renames_the_result(make_trace, name):
    trace = make_trace()
    new = np.array([3, 0, 7, 5, 1, 2, 6, 4])
    renamed = Trace.from_arrays(
        new[trace.read("expert_id")],
        n_experts=8,
        weight=trace.read("weight"),
        router_logits=trace.read("router_logits")[..., np.argsort(new)],
        tokens={n: trace.read(n) for n in ("sequence", "token_id")},
        sequences=trace.sequences.drop(columns="length"),
    )
    before, after = (STATISTICS[name](t, bootstrap=QUICK) for t in (trace, renamed))
    for dim in ("expert", "expert_j"):
        if dim in before.dims:
            after = after.isel({dim: new}).assign_coords({dim: before[dim]})
    np.testing.assert_allclose(after["estimate"], before["estimate"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after["n"], before["n"])
    # Where two experts are equally frequent for a token type, its interval is that of the lower number.
    tolerance = 0.05 if name == "vocabulary_specialization" else 1e-5
    np.testing.assert_allclose(after["ci_low"], before["ci_low"], atol=tolerance)


# What is learnt, dealt out or thresholded by count changes with the number of documents.
@every(but=("predictability", "domain_information", "vocabulary_specialization"))
def test_documents_twice_leave_the_estimate_and_narrow_the_interval(make_trace, name):
    once, twice = (STATISTICS[name](make_trace(n_documents=20, repeat=r)) for r in (1, 2))
    np.testing.assert_allclose(twice["estimate"], once["estimate"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(twice["n"], 2 * once["n"])
    ratio = (twice["ci_high"] - twice["ci_low"]).mean() / (once["ci_high"] - once["ci_low"]).mean()
    assert 0.5 < ratio < 0.9


# One number for all domains, or learnt from all of them; the bins of positions follow the longest sequence.
@every(but=("domain_information", "predictability", "position_profile", "agreement"))
def test_groups_are_what_selections_are(make_trace, name):
    trace, statistic = make_trace(), STATISTICS[name]
    grouped = statistic(trace, by="domain", bootstrap=QUICK)
    selected = trace.select(where={"domain": "x"})
    alone = statistic(selected, bootstrap=QUICK)
    if name in OF_DOMAINS:
        alone = alone.isel(domain=0, drop=True)
    for variable in ("estimate", "ci_low", "ci_high", "n", "n_documents"):
        np.testing.assert_allclose(grouped[variable].sel(domain="x"), alone[variable])


@every(but=("transitions", "agreement"))
def test_selected_layers_keep_their_numbers_and_values(make_trace, name):
    whole, part = (STATISTICS[name](t, bootstrap=QUICK) for t in (make_trace(), make_trace().select(layers=[1, 3])))
    assert part["layer"].values.tolist() == [1, 3]
    for variable in ("estimate", "ci_low", "ci_high"):
        np.testing.assert_allclose(part[variable], whole[variable].sel(layer=[1, 3]), rtol=1e-12)


# The second trace of the agreement is made from the whole first one here.
@every(but=("agreement",))
def test_processes_add_up_to_one(make_trace, name):
    """Two threads stand for two processes: each reads every other sequence, `reduce` sums over both."""
    expected = STATISTICS[name](make_trace(), bootstrap=QUICK)
    barrier, shared, results = threading.Barrier(2, timeout=30), [None, None], [None, None]

    def process(rank: int) -> None:
        def reduce(array: np.ndarray) -> np.ndarray:
            shared[rank] = array.copy()
            barrier.wait()
            total = shared[0] + shared[1]
            barrier.wait()
            return total

        trace = make_trace()
        whole = trace.blocks

        def blocks(*names, tokens=0):
            for block in whole(*{"sequence", *names}, tokens=40):
                mine = block["sequence"] % 2 == rank
                yield {n: block[n][mine] for n in names}

        trace.blocks, trace.reduce = blocks, reduce
        results[rank] = STATISTICS[name](trace, bootstrap=QUICK)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        assert found is not None
        for variable in expected:
            np.testing.assert_allclose(found[variable], expected[variable], rtol=1e-9, atol=1e-12)


def test_a_great_many_documents_are_drawn_in_bundles(monkeypatch):
    rng = np.random.default_rng(0)
    tilt = rng.dirichlet(np.full(4, 20), size=600)
    ids = np.stack([rng.choice(4, size=20, p=p) for p in tilt]).reshape(-1, 1, 1)
    trace = Trace.from_arrays(ids, n_experts=4, tokens={"sequence": np.repeat(np.arange(600), 20)})
    each = stats.expert_share(trace)
    monkeypatch.setattr(clusters, "_MOST_BUNDLES", 100)
    bundled = stats.expert_share(trace)
    np.testing.assert_array_equal(bundled["estimate"], each["estimate"])
    assert bundled["n_documents"] == 600
    ratio = (bundled["ci_high"] - bundled["ci_low"]) / (each["ci_high"] - each["ci_low"])
    assert ((ratio > 0.75) & (ratio < 1.3)).all()


def test_bundles_hold_equally_many_documents_of_one_group():
    group = np.repeat([0, 1, 2], [95, 3, 50])
    bundle = clusters._bundles(group, most=10)
    for g, sizes in ((0, {9, 10}), (1, {1}), (2, {5})):
        assert set(np.bincount(bundle[group == g])[np.unique(bundle[group == g])]) == sizes
    assert (bundle // 10 == group).all()


def test_columns_are_checked(make_trace):
    trace = make_trace()
    with refused(BadInput, "by", "topic"):
        stats.expert_share(trace, by=["domain", "topic"])
    with refused(BadInput, "by", "domain"):
        stats.expert_share(trace, by=["domain", "domain"])
    trace.sequences["topic"] = [None, *["a"] * (len(trace.sequences) - 1)]
    with refused(BadInput, "topic", 1):
        stats.expert_share(trace, by="topic")
    kept = trace.select(where=trace.sequences["topic"].notna())
    assert list(stats.expert_share(kept, by="topic", bootstrap=QUICK)["topic"].values) == ["a"]


def test_a_trace_without_tokens_has_no_numbers(make_trace):
    found = stats.expert_share(make_trace().select(phase="generated"), by="domain", bootstrap=QUICK)
    assert np.isnan(found["estimate"]).all()
    assert (found["n"] == 0).all()
    assert (found["n_documents"] == 0).all()


def test_labels_of_every_kind_become_coordinates(make_trace):
    trace = make_trace()
    n = len(trace.sequences)
    for labels in (np.arange(n) % 3, np.arange(n) % 2 == 0, np.where(np.arange(n) % 2, 0.5, 1.5)):
        trace.sequences["topic"] = labels
        found = stats.expert_share(trace, by="topic", bootstrap=QUICK)
        np.testing.assert_array_equal(found["topic"], np.unique(labels))
    trace.sequences["topic"] = trace.sequences["domain"].astype("category")
    assert list(stats.expert_share(trace, by="topic", bootstrap=QUICK)["topic"].values) == ["x", "y"]
