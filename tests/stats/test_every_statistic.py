"""Every statistic of a trace against nested loops: layers left out, any k, documents in pieces, lengths uneven."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import loops
from helpers.traces import Made, made, made_traces
from hypothesis import given

import mixlens as ml
from mixlens.stats import Bootstrap

QUICK = Bootstrap(replicates=10)


def assert_labels(found, case: Made, groups=None, **dims):
    assert found.layer.values.tolist() == list(case.layers)
    for name, labels in dims.items():
        assert found[name].values.tolist() == list(labels)
    assert found.attrs["top_k"] == case.top_k
    expected = {"domain": groups} if groups else {}
    for name, labels in expected.items():
        assert found[name].values.tolist() == labels


def each(case: Made):
    """(name, its tokens) of every domain."""
    return [(name, loops.tokens_of(case, name)) for name in sorted(set(case.sequences["domain"]))]


def assert_cells(actual, expected):
    np.testing.assert_allclose(np.asarray(actual, float), np.array(expected, float), rtol=2e-5, atol=2e-6)


@given(made_traces())
def test_shares_and_specialization(case):
    whole = ml.stats.expert_share(case.trace, by="domain", bootstrap=QUICK)
    first = ml.stats.expert_share(case.trace, by="domain", slot="first", bootstrap=QUICK)
    special = ml.stats.domain_specialization(case.trace, bootstrap=QUICK)
    assert_labels(whole, case, [name for name, _ in each(case)], expert=range(case.n_experts))
    for domain, tokens in each(case):
        here = {"domain": domain}
        documents = {case.of_tokens("document_id")[t] for t in tokens}
        assert int(whole.n.sel(here)) == int(special.n.sel(here)) == len(tokens)
        assert int(whole.n_documents.sel(here)) == len(documents)
        for place, layer in enumerate(case.layers):
            of_any = [loops.share(case, place, e, tokens, case.top_k) for e in range(case.n_experts)]
            of_first = [loops.share(case, place, e, tokens, 1) for e in range(case.n_experts)]
            assert_cells(whole.estimate.sel(**here, layer=layer), of_any)
            assert_cells(first.estimate.sel(**here, layer=layer), of_first)
            assert_cells(special.estimate.sel(**here, layer=layer), [case.top_k * x for x in of_any])
    assert (whole.attrs["unit"], whole.attrs["slot"], first.attrs["slot"]) == ("fraction", "any", "first")
    assert whole.attrs["uniform"] == first.attrs["uniform"] == 1 / case.n_experts
    assert special.attrs["uniform"] == case.top_k / case.n_experts


@given(made_traces())
def test_balance_entropy_and_confidence(case):
    measures = ["cv", "max_over_mean", "switch_loss"]
    balance = ml.stats.load_balance(case.trace, by="domain", bootstrap=QUICK)
    entropy = ml.stats.routing_entropy(case.trace, by="domain", bootstrap=QUICK)
    confidence = ml.stats.router_confidence(case.trace, by="domain", bootstrap=QUICK)
    assert_labels(balance, case, measure=measures)
    assert_labels(confidence, case, measure=["p1", "p1_minus_p2", "w2_over_w1"])
    for domain, tokens in each(case):
        for place, layer in enumerate(case.layers):
            here = {"domain": domain, "layer": layer}
            bits = [loops.entropy_bits(loops.softmax(case.router_logits[t, place])) for t in tokens]
            assert_cells(entropy.estimate.sel(here), sum(bits) / len(bits))
            assert_cells(balance.estimate.sel(here), loops.balance(case, place, tokens))
            np.testing.assert_allclose(
                confidence.estimate.sel(here), loops.confidence(case, place, tokens), rtol=2e-3, atol=2e-5
            )
    assert balance.attrs["uniform"] == [0, 1, case.top_k]
    assert (balance.attrs["unit"], entropy.attrs["unit"]) == ("ratio", "bits")
    assert entropy.attrs["uniform"] == pytest.approx(math.log2(case.n_experts))
    assert confidence.attrs["uniform"] == [1 / case.n_experts, 0, 1]
    assert ("missing" in confidence.attrs) == (case.top_k == 1)


@given(made_traces(max_length=14))
def test_shares_by_position(case):
    edges = [1, 3, 4, 9]
    found = ml.stats.position_profile(case.trace, edges=edges, by="domain", bootstrap=QUICK)
    assert found.estimate.dims == ("domain", "position_bin", "layer", "expert")
    assert found.position_bin.values.tolist() == ["1-2", "3", "4-8", "9+"]
    assert found.position_start.values.tolist() == edges
    for domain, tokens in each(case):
        for low, high, name in zip(edges, [3, 4, 9, 99], found.position_bin.values, strict=True):
            inside = [t for t in tokens if low <= case.position[t] < high]
            here = found.sel(domain=domain, position_bin=name)
            assert int(here.n) == len(inside)
            for place, layer in enumerate(case.layers):
                nothing = [math.nan] * case.n_experts
                shares = [loops.share(case, place, e, inside, case.top_k) for e in range(case.n_experts) if inside]
                assert_cells(here.estimate.sel(layer=layer), shares or nothing)


def test_balance_is_bounded_by_what_perfect_balance_gives():
    """Documents of two experts each, balanced together: corrected for the bias, intervals would go lower."""
    document = np.repeat(np.arange(8), 10)
    ids = np.stack([2 * (document % 4), 2 * (document % 4) + 1], -1)[:, None]
    trace = ml.Trace.from_arrays(ids, n_experts=8, tokens={"sequence": document})
    low = ml.stats.load_balance(trace, bootstrap=QUICK).ci_low
    assert float(low.sel(measure="cv").min()) == 0
    many = ml.Trace.from_arrays(
        np.concatenate([ids] * 8), n_experts=8, tokens={"sequence": np.repeat(np.arange(64), 10)}
    )
    low = ml.stats.load_balance(many, bootstrap=QUICK).ci_low
    assert float(low.sel(measure="max_over_mean").min()) == 1


@pytest.mark.parametrize(("longest", "bins"), [(1, ["0", "1+"]), (2, ["0", "1+"]), (3, ["0", "1", "2+"]),
                                                   (5, ["0", "1", "2-3", "4+"])])  # fmt: skip
def test_positions_are_in_powers_of_two(longest, bins):
    found = ml.stats.position_profile(made((1, longest)).trace, bootstrap=QUICK)
    assert found.position_bin.values.tolist() == bins
    assert int(found.n.sum()) == 1 + longest


@given(made_traces())
def test_repetition_never_counts_across_gaps(case):
    """Tokens of some ids alone, so that neighbours in the trace are often not neighbours in the text."""
    found = ml.stats.repetition(case.trace.select(tokens=[0, 2, 5, 7, 11, 13]), bootstrap=QUICK)
    tokens = [t for t in loops.tokens_of(case) if case.token_id[t] in (0, 2, 5, 7, 11, 13)]
    assert int(found.n) == len(loops.pairs(case, tokens))
    for place, layer in enumerate(case.layers):
        assert_cells(found.estimate.sel(layer=layer), loops.repeated(case, place, tokens))
    e, k = case.n_experts, case.top_k
    distinct = math.prod((e - k - i) / (e - i) for i in range(k))
    assert_cells(found.attrs["uniform"], [1 / e, 1 - distinct])
    assert found.choice.values.tolist() == ["first", "either"]


@given(made_traces())
def test_pairs_within_a_token_and_from_layer_to_layer(case):
    experts = range(case.n_experts)
    tokens = loops.tokens_of(case)
    if case.top_k > 1:
        found = ml.stats.coactivation(case.trace, bootstrap=QUICK)
        assert_labels(found, case, expert=experts, expert_j=experts)
        assert found.attrs["uniform"] == (case.top_k - 1) / (case.n_experts - 1)
        for place, layer in enumerate(case.layers):
            table = [[loops.together(case, place, i, j, tokens) for j in experts] for i in experts]
            assert_cells(found.estimate.sel(layer=layer), table)
            chose = [sum(i in loops.of_experts(case, place, t) for t in tokens) for i in experts]
            assert found.n.sel(layer=layer).values.tolist() == chose
    if len(case.layers) > 1:
        gap = case.layers[-1] - case.layers[0]
        found = ml.stats.transitions(case.trace, gap=gap, bootstrap=QUICK)
        joint = loops.moves(case, 0, len(case.layers) - 1, tokens)
        assert found.layer.values.tolist() == [case.layers[0]]
        assert (found.attrs["gap"], found.attrs["uniform"]) == (gap, 1 / case.n_experts)
        here = found.isel(layer=0)
        assert here.n.values.tolist() == joint.sum(1).tolist()
        assert_cells(here.estimate, [row / row.sum() if row.sum() else row * math.nan for row in joint])
        assert float(here.mi_bits) == pytest.approx(loops.information_bits(joint), abs=1e-9)


def other_routing(case: Made, seed: int = 5) -> Made:
    """The same tokens, of which about half are routed otherwise."""
    like = made(
        list(case.lengths), layers=case.layers, experts=case.n_experts, top_k=case.top_k, seed=seed,
        documents=list(case.sequences["document_id"]), domains=list(case.sequences["domain"]),
    )  # fmt: skip
    keep = np.random.default_rng(seed).random((case.n_tokens, len(case.layers), 1)) < 0.5
    return Made(
        **{name: getattr(case, name) for name in ("layers", "n_experts", "sequence", "position", "token_id", "phase",
                                                  "logprob", "sequences")},
        expert_id=np.where(keep, case.expert_id, like.expert_id),
        weight=np.where(keep, case.weight, like.weight),
        router_logits=np.where(keep, case.router_logits, like.router_logits),
    )  # fmt: skip


@given(made_traces())
def test_two_runs_over_the_same_tokens(case):
    other = other_routing(case)
    tokens, k = loops.tokens_of(case), case.top_k
    alike = ml.stats.agreement(case.trace, other.trace, bootstrap=QUICK)
    moved = ml.stats.moved(case.trace, other.trace, bootstrap=QUICK)
    flips = ml.stats.flips(case.trace, other.trace, bootstrap=QUICK)
    assert alike.measure.values.tolist() == ["top1", "overlap", "jensen_shannon"]
    assert moved.measure.values.tolist() == ["share_change", "kept"]
    assert flips.measure.values.tolist() == [
        "changed", "first_flip", "so_far", "after_flip", "without_flip", "more_after",
    ]  # fmt: skip
    assert alike.attrs["uniform"][:2] == [1 / case.n_experts, k / case.n_experts]
    assert moved.attrs["uniform"] == [0, k / case.n_experts]
    flipped = dict.fromkeys(tokens, False)
    for place, layer in enumerate(case.layers):
        sets = {t: (loops.of_experts(case, place, t), loops.of_experts(other, place, t)) for t in tokens}
        top1 = [case.expert_id[t, place, 0] == other.expert_id[t, place, 0] for t in tokens]
        overlap = [len(a & b) / k for a, b in sets.values()]
        divergence = []
        for t in tokens:
            p, q = loops.softmax(case.router_logits[t, place]), loops.softmax(other.router_logits[t, place])
            middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
            divergence.append(loops.entropy_bits(middle) - (loops.entropy_bits(p) + loops.entropy_bits(q)) / 2)
        means = [sum(values) / len(tokens) for values in (top1, overlap, divergence)]
        assert_cells(alike.estimate.sel(layer=layer), means)
        for expert in range(case.n_experts):
            before = sum(expert in a for a, _ in sets.values())
            after = sum(expert in b for _, b in sets.values())
            both = sum(expert in a & b for a, b in sets.values())
            kept = both / before if before else math.nan
            assert_cells(moved.estimate.sel(layer=layer, expert=expert), [(after - before) / (k * len(tokens)), kept])
        changed = {t: a != b for t, (a, b) in sets.items()}
        was = [t for t in tokens if flipped[t]]
        was_not = [t for t in tokens if not flipped[t]]
        expected = [
            sum(changed.values()) / len(tokens),
            sum(changed[t] for t in was_not) / len(tokens),
            sum(changed[t] or flipped[t] for t in tokens) / len(tokens),
            sum(changed[t] for t in was) / len(was) if was else math.nan,
            sum(changed[t] for t in was_not) / len(was_not) if was_not else math.nan,
        ]
        assert_cells(flips.estimate.sel(layer=layer), [*expected, expected[3] - expected[4]])
        flipped = {t: flipped[t] or changed[t] for t in tokens}


@given(made_traces())
def test_flips_by_margin(case):
    if case.top_k == case.n_experts:
        return
    other, edges = other_routing(case), [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, math.inf]
    found = ml.stats.flips_by_margin(case.trace, other.trace, pooled=False, bootstrap=QUICK)
    pooled = ml.stats.flips_by_margin(case.trace, other.trace, bootstrap=QUICK)
    assert found.margin.values.tolist() == edges
    assert "layer" not in pooled.coords
    assert found.margin_from.values.tolist() == [0, *edges[:-1]]
    choices, flipped = np.zeros((2, len(case.layers), 10))
    for place in range(len(case.layers)):
        for t in loops.tokens_of(case):
            z = sorted(case.router_logits[t, place].tolist(), reverse=True)
            margin = z[case.top_k - 1] - z[case.top_k]
            into = next(i for i, edge in enumerate(edges) if margin < edge)
            choices[place, into] += 1
            flipped[place, into] += loops.of_experts(case, place, t) != loops.of_experts(other, place, t)
    with np.errstate(invalid="ignore"):
        assert_cells(found.estimate, flipped / choices)
        assert_cells(pooled.estimate, flipped.sum(0) / choices.sum(0))
    assert found.n.values.tolist() == choices.tolist()
    assert pooled.n.values.tolist() == choices.sum(0).tolist()


@given(made_traces(min_sequences=2))
def test_losses_of_two_runs_are_over_tokens_that_both_predict(case):
    other = other_routing(case)
    shifted = np.where(np.arange(case.n_tokens) % 7 == 3, np.nan, 0.75 * case.logprob - 0.25).astype(np.float32)
    other = Made(**{**{f: getattr(other, f) for f in Made.__dataclass_fields__}, "logprob": shifted})
    found = ml.stats.next_tokens(case.trace, other.trace, by="domain", bootstrap=QUICK)
    for domain, tokens in each(case):
        known = [t for t in tokens if case.position[t] > 0 and np.isfinite(case.logprob[t] + shifted[t])]
        here = found.sel(domain=domain)
        assert int(here.n) == len(known)
        if not known:
            assert here.estimate.isnull().all()
            continue
        a, b = (-sum(float(values[t]) for t in known) / len(known) for values in (case.logprob, shifted))
        expected = [a, b, b - a, math.exp(a), math.exp(b), math.exp(b - a), math.nan, math.nan]
        assert_cells(here.estimate, expected)


@given(made_traces(min_sequences=2, max_sequences=6))
def test_information_about_domains(case):
    found = ml.stats.domain_information(case.trace, bootstrap=QUICK)
    labels = sorted(set(case.sequences["domain"]))
    assert found.measure.values.tolist() == ["mutual_information", "permuted", "excess"]
    for place, layer in enumerate(case.layers):
        joint = np.zeros((case.n_experts, len(labels)))
        for t in loops.tokens_of(case):
            for expert in loops.of_experts(case, place, t):
                joint[expert, labels.index(case.of_tokens("domain")[t])] += 1
        here = found.sel(layer=layer).estimate
        assert float(here[0]) == pytest.approx(loops.information_bits(joint), abs=1e-9)
        assert float(here[2]) == pytest.approx(float(here[0] - here[1]))
    assert int(found.n) == case.n_tokens
    assert int(found.n_documents) == case.sequences["document_id"].nunique()


@given(made_traces(min_sequences=2))
def test_the_order_of_documents_changes_no_estimate(case):
    order = np.random.default_rng(1).permutation(len(case.sequences))
    tokens = np.concatenate([np.flatnonzero(case.sequence == one) for one in order])
    fields = {name: getattr(case, name) for name in Made.__dataclass_fields__}
    fields |= {n: v[tokens] for n, v in fields.items() if isinstance(v, np.ndarray)}
    fields["sequence"] = np.argsort(order)[case.sequence[tokens]]
    fields["sequences"] = case.sequences.iloc[order].reset_index(drop=True)
    turned = Made(**fields)
    for statistic in (ml.stats.expert_share, ml.stats.load_balance, ml.stats.repetition, ml.stats.position_profile):
        one, other = (statistic(c.trace, by="domain", bootstrap=QUICK) for c in (case, turned))
        assert_cells(other.estimate, one.estimate)
        np.testing.assert_array_equal(other.n, one.n)
