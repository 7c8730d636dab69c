"""Caches against plain sets and lists, the optimum against every choice there is, LRU and LFU against libCacheSim."""

from __future__ import annotations

from functools import cache as remembered

import numpy as np
import pytest
import torch
from helpers.traces import made, made_traces
from hypothesis import given
from hypothesis import strategies as st

import mixlens as ml
from mixlens.stats import cache_replay


def sequences_of(case, layer: int) -> list[list[list[int]]]:
    """[sequence][token] its experts in one layer."""
    return [case.expert_id[case.sequence == n, layer].tolist() for n in range(len(case.sequences))]


def by_hand(sequences, size: int, victim) -> int:
    """Hits of a cache that begins empty in each sequence; `victim(uses, times)` names the expert that leaves.

    uses   {expert: how often it was used since it was loaded}, of those that may leave
    times  {expert: when it was used last}
    """
    hits = 0
    for tokens in sequences:
        uses, times = {}, {}
        for at, experts in enumerate(tokens):
            hits += sum(e in uses for e in experts)
            missing = [e for e in experts if e not in uses]
            while len(uses) + len(missing) > size:
                others = {e: n for e, n in uses.items() if e not in experts}
                gone = victim(others, times)
                del uses[gone], times[gone]
            for slot, e in enumerate(experts):
                uses[e], times[e] = uses.get(e, 0) + 1, (at, slot)
    return hits


def lru(uses, times):
    return min(uses, key=lambda e: times[e])


def lfu(uses, times):
    return min(uses, key=lambda e: (uses[e], times[e]))


def best_possible(tokens, size: int) -> int:
    """The most hits that any choice of what leaves can have, by trying all."""

    @remembered
    def most(at: int, held: frozenset) -> int:
        if at == len(tokens):
            return 0
        experts = frozenset(tokens[at])
        after = {held | experts}
        while any(len(one) > size for one in after):
            after = {one - {e} if len(one) > size else one for one in after for e in (one - experts or {None})}
        return len(held & experts) + max(most(at + 1, one) for one in after)

    return most(0, frozenset())


def hits_of(found, case):
    return hits_of_trace(found, case.expert_id)


def hits_of_trace(found, ids):
    return np.rint(found["estimate"].values * ids.size).astype(int).tolist()


@given(made_traces(max_length=12))
def test_lru_and_lfu_equal_lists(case):
    sizes = range(case.top_k, case.n_experts + 1)
    for policy, victim in {"lru": lru, "lfu": lfu}.items():
        found = ml.decisions.cache(case.trace, policy=policy)
        layers = range(len(case.layers))
        by_layer = [[by_hand(sequences_of(case, i), size, victim) for i in layers] for size in sizes]
        assert hits_of(found, case) == np.sum(by_layer, axis=1).tolist()
        of_layer = case.n_tokens * case.top_k
        np.testing.assert_allclose(found["by_layer"], np.array(by_layer) / of_layer)
        loads = (case.expert_id.size - np.sum(by_layer, axis=1)) / case.n_tokens
        np.testing.assert_allclose(found["loads"], loads)
        assert found["slots"].values.tolist() == list(sizes)


@given(st.integers(0, 2**16), st.integers(3, 5), st.integers(1, 2), st.integers(0, 2))
def test_the_optimum_equals_every_choice_tried(seed, experts, top_k, more):
    case = made([7, 5], layers=(0,), experts=experts, top_k=top_k, seed=seed)
    size = min(top_k + more, experts)
    found = ml.decisions.cache(case.trace, slots=size, policy="optimum")
    assert hits_of(found, case) == [sum(best_possible(tokens, size) for tokens in sequences_of(case, 0))]


@given(made_traces(max_length=12))
def test_no_policy_beats_the_optimum_and_a_larger_cache_never_has_fewer_hits(case):
    best = ml.decisions.cache(case.trace, policy="optimum")["estimate"]
    for policy in ("lru", "lfu"):
        found = ml.decisions.cache(case.trace, policy=policy)["estimate"]
        assert (found <= best + 1e-12).all()
        assert policy == "lfu" or (found.diff("slots") >= 0).all()  # lfu knows no order of all sizes
    assert (best.diff("slots") >= 0).all()


def test_a_long_sequence_is_read_in_parts(monkeypatch):
    case = made([300, 211], layers=(0, 1), top_k=3)
    whole = ml.decisions.cache(case.trace)
    monkeypatch.setattr(cache_replay, "_MOST", 64)
    assert whole.equals(ml.decisions.cache(case.trace))
    best = ml.decisions.cache(case.trace, policy="optimum")
    monkeypatch.undo()
    assert best.equals(ml.decisions.cache(case.trace, policy="optimum"))


def test_lru_lfu_and_the_optimum_equal_libcachesim():
    simulator = pytest.importorskip("libcachesim", reason="libcachesim is not installed")
    case = made([1500], layers=(0,), top_k=1)
    stream = case.expert_id[:, 0, 0].tolist()
    after = [stream.index(e, at + 1) if e in stream[at + 1 :] else 2**62 for at, e in enumerate(stream)]
    for policy, theirs in {"lru": simulator.LRU, "lfu": simulator.LFU, "optimum": simulator.Belady}.items():
        for size in range(1, 9):
            cached = theirs(cache_size=size)
            requests = (
                simulator.Request(obj_id=e + 1, obj_size=1, next_access_vtime=then)
                for e, then in zip(stream, after, strict=True)
            )
            assert hits_of(ml.decisions.cache(case.trace, slots=size, policy=policy), case) == [
                sum(bool(cached.get(request)) for request in requests)
            ]


@given(st.integers(0, 2**16), st.integers(2, 8), st.integers(1, 3), st.integers(1, 4))
def test_least_stale_equals_a_pool_of_pairs(seed, size, top_k, n_layers):
    case = made([20, 1, 13], layers=range(n_layers), top_k=min(top_k, size), seed=seed)
    hits = 0
    for number in range(len(case.sequences)):
        pool, used = set(), {}
        for at, token in enumerate(case.expert_id[case.sequence == number].tolist()):
            for here, experts in enumerate(token):
                asked = {(here, e) for e in experts}
                hits += len(asked & pool)
                pool |= asked
                used |= {(here, e): (at, slot) for slot, e in enumerate(experts)}
                while len(pool) > size * n_layers:
                    pool.remove(max(
                        pool - asked,
                        key=lambda one: (used[one][0] < at, (one[0] - here - 1) % n_layers, *(-n for n in used[one])),
                    ))  # fmt: skip
    assert hits_of(ml.decisions.cache(case.trace, slots=size, policy="least-stale"), case) == [hits]


def test_the_fixed_set_is_fitted_on_one_half_and_judged_on_the_other():
    case = made([30] * 10, layers=(0, 2), documents=[f"d{i}" for i in range(10)], seed=5)
    found = ml.decisions.cache(case.trace, slots=3, policy="fixed")
    kept = found["kept"].sel(slots=3).values
    drawn = np.random.default_rng(0).permutation(case.sequences["document_id"].to_numpy())[:5]
    fits = np.isin(case.of_tokens("document_id"), drawn)
    hits = 0
    for layer in range(2):
        used = np.bincount(case.expert_id[fits, layer].ravel(), minlength=8)
        assert sorted(used[kept[layer]]) == sorted(used)[-3:]
        hits += kept[layer][case.expert_id[~fits, layer]].sum()
    assert float(found["estimate"][0]) == pytest.approx(hits / case.expert_id[~fits].size)
    assert float(found["fixed"][0]) == pytest.approx(float(found["estimate"][0]))
    assert found.attrs["gain"] == pytest.approx(float(found["estimate"][0]) - 3 / 8)
    assert found.attrs["judged_on"] == 5


def test_the_gain_counts_tokens_that_find_the_cache_filled():
    case = made([20] * 8, layers=(0,), documents=[f"d{i}" for i in range(8)], seed=2)
    found = ml.decisions.cache(case.trace, slots=4)
    kept = found["kept"].sel(slots=4).values[0]
    drawn = np.random.default_rng(0).permutation(case.sequences["document_id"].to_numpy())[:4]
    ahead = counted = 0
    for number, name in enumerate(case.sequences["document_id"]):
        tokens = case.expert_id[case.sequence == number, 0].tolist()
        held: list[int] = []
        for experts in tokens:
            if len(held) == 4 and name not in drawn:
                ahead += sum(e in held for e in experts) - sum(bool(kept[e]) for e in experts)
                counted += 2
            for e in experts:
                held = [*(one for one in held if one != e), e]
            held = held[-4:]
    assert found.attrs["gain"] == pytest.approx(ahead / counted)


def test_the_experts_with_the_highest_counts_that_are_saved_are_the_fixed_set(tmp_path):
    case = made([30] * 8, layers=(1, 3), documents=[f"d{i}" for i in range(8)], seed=5)
    found = ml.decisions.cache(case.trace, policy="fixed")
    saved = ml.decisions.save_fixed_set(found, tmp_path / "on_gpu.pt", slots=3)
    counts = torch.load(saved, weights_only=True)["logical_count"].sum(0)  # as KTransformers reads them
    on_gpu = torch.zeros(4 * 8, dtype=torch.bool)
    on_gpu[counts.flatten().topk(2 * 3).indices] = True
    assert np.array_equal(on_gpu.reshape(4, 8)[[1, 3]], found["kept"].sel(slots=3))
    for asked, argument in (
        ((found, "set.json", 3), "path"),
        ((found, "set.pt", 9), "slots"),
        ((3, "set.pt", 3), "found"),
    ):
        with pytest.raises(ml.BadInput) as refused:
            ml.decisions.save_fixed_set(asked[0], tmp_path / asked[1], slots=asked[2])
        assert refused.value.argument == argument


def test_bytes_and_tokens_per_second_follow_from_loads():
    case = made([30] * 6, documents=[f"d{i}" for i in range(6)])
    found = ml.decisions.cache(case.trace, slots=[3, 5], expert_bytes=10.0, link_bytes_per_s=1000.0)
    np.testing.assert_allclose(found["bytes_per_token"], 10 * found["loads"])
    np.testing.assert_allclose(found["tokens_per_s"], 100 / found["loads"])
    assert (found["tokens_per_s_low"] <= found["tokens_per_s"]).all()
    assert found.attrs["predicted"] == "tokens_per_s"


@pytest.mark.parametrize(
    ("asked", "argument"),
    [
        ({"slots": 1}, "slots"),
        ({"slots": 9}, "slots"),
        ({"slots": [3, 2.5]}, "slots"),
        ({"policy": "mru"}, "policy"),
        ({"link_bytes_per_s": 0}, "link_bytes_per_s"),
    ],
)
def test_caches_that_cannot_be_are_refused(asked, argument):
    with pytest.raises(ml.BadInput) as refused:
        ml.decisions.cache(made().trace, **asked)
    assert refused.value.argument == argument


@pytest.mark.parametrize("given_model", [False, True])
def test_prefetch_names_what_it_lacks(given_model):
    with pytest.raises(ml.MissingSignal) as refused:
        ml.decisions.cache(made().trace, policy="prefetch", model=object() if given_model else None)
    assert refused.value.argument == ("moe_in" if given_model else "model")


def test_prefetch_loads_what_the_next_router_chooses_for_this_layers_input():
    model = ml.load("demo", verbose=False)
    quiet = ml.RecordSettings(progress=False)
    trace = ml.record(model, ml.demo_documents()[:3], signals=["moe_in"], settings=quiet).select(layers=[2, 3, 5])
    found = ml.decisions.cache(trace, slots=4, policy="prefetch", model=model)
    inputs, ids, sequence = trace.activations("moe_in"), trace.read("expert_id"), trace.read("sequence")
    weight = model.model.layers[3].mlp.gate.weight.detach().float().numpy()
    ahead = np.argsort(-inputs.sel(layer=2).values.astype(np.float32) @ weight.T, axis=-1)[:, :2]
    hits = loads = 0
    for layer in range(3):
        for number in range(3):
            held: list[int] = []
            for token in np.flatnonzero(sequence == number):
                for experts, counts in ((ahead[token].tolist(), False), (ids[token, layer].tolist(), True)):
                    if layer != 1 and not counts:  # neither layer 1 nor layer 4 is in the trace
                        continue
                    missing = [e for e in experts if e not in held]
                    hits += (2 - len(missing)) * counts
                    loads += len(missing)
                    held = [*(e for e in held if e not in experts), *experts][-4:]
    assert hits_of_trace(found, ids) == [hits]
    assert float(found["loads"][0]) == pytest.approx(loads / trace.n_tokens)
    plain = ml.decisions.cache(trace, slots=4, model=model)
    assert float(found["by_layer"].sel(layer=3)[0]) > float(plain["by_layer"].sel(layer=3)[0])
    of_expert = sum(p.numel() * p.element_size() for p in model.model.layers[2].mlp.experts.parameters()) / 8
    assert float(plain["bytes_per_token"][0]) == pytest.approx(of_expert * float(plain["loads"][0]))
