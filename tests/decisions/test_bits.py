"""Bits for experts: the optimum against every choice there is, the costs against a model with one expert rounded."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Letters, tiny_mixtral

import mixlens as ml
from mixlens.decisions.bits import allocated
from mixlens.errors import BadInput, ModelError
from mixlens.models.quantization.linears import dequantized, quantize_linear
from mixlens.models.quantization.schemes import parse_scheme
from mixlens.models.quantization.unfuse import unfuse
from mixlens.stats.verdicts import UNKNOWN

QUIET = ml.RecordSettings(progress=False)
TEXTS = ["a router sends tokens", "to experts that add", "up what they found", "in two of eight parts"]


def measured(model, how: str, texts=TEXTS, **more):
    ablation = ml.experiments.Ablation(how=how, **more)
    return ml.experiments.measure_importance(model, texts, ablation=ablation, tokenizer=Letters(), settings=QUIET)


@given(
    st.lists(st.lists(st.integers(-20, 99), min_size=3, max_size=3), min_size=1, max_size=5),
    st.lists(st.integers(1, 30), min_size=3, max_size=3),
    st.floats(0, 1),
)
def test_no_choice_within_the_budget_costs_less(costs, sizes, share):
    costs = np.array(costs, float).T
    n = costs.shape[1]
    budget = n * (min(sizes) + share * (max(sizes) - min(sizes)))
    chosen = allocated(costs, sizes, budget)
    fitting = [way for way in product(range(3), repeat=n) if sum(sizes[s] for s in way) <= budget]
    least = min(sum(costs[s, expert] for expert, s in enumerate(way)) for way in fitting)
    assert sum(sizes[s] for s in chosen) <= budget
    assert costs[chosen, np.arange(n)].sum() == pytest.approx(least, abs=1e-9)


def test_a_cost_is_the_change_in_loss_with_one_expert_rounded_and_weights_are_as_they_were_afterwards():
    model = tiny_mixtral()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measured(model, "hqq2-g16")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def loss(text: str) -> float:
        ids = torch.tensor([Letters()(text)["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))

    scheme = parse_scheme("hqq2-g16")
    for layer, expert in ((0, 3), (2, 0), (3, 5)):
        whole = [loss(text) for text in TEXTS]
        experts = model.model.layers[layer].mlp.experts
        with torch.no_grad():
            for fused, halves in ((experts.gate_up_proj, 2), (experts.down_proj, 1)):
                parts = fused[expert].clone().chunk(halves)
                linears = [quantize_linear(part, scheme, part.device, part.dtype) for part in parts]
                fused[expert] = torch.cat([dequantized(linear) for linear in linears])
        wanted = [loss(text) - one for text, one in zip(TEXTS, whole, strict=True)]
        np.testing.assert_allclose(found.change.values[:, layer, expert], wanted, atol=2e-5)
        model.load_state_dict(before)


def test_the_mixed_scheme_loads_and_takes_the_bytes_that_were_counted(tmp_path):
    model = tiny_mixtral()
    costs = {how: measured(model, how) for how in ("hqq2-g16", "hqq4-g16")}
    sizes = {how: one.attrs["expert_bytes"] for how, one in costs.items()}
    budget = 32 * sum(sizes.values()) / 2
    found = ml.decisions.allocate_bits(costs, budget_bytes=budget)
    assert set(found["scheme"].values.ravel()) == set(costs)
    assert int(found["bytes"].sum()) <= budget
    folder = ml.decisions.save(model, tmp_path / "tiny")
    loaded = ml.load(folder, quantization=found.attrs["quantization"], verbose=False)
    table = ml.audit(loaded).table
    rows = table[table["kind"] == "experts"].set_index("scheme")["bytes"]
    for scheme, size in sizes.items():
        assert rows[scheme.partition("-")[0]] == int((found["scheme"] == scheme).sum()) * size
    for layer, expert in product(range(4), range(8)):
        held = loaded.model.layers[layer].mlp.experts[expert].w2
        assert f"{held.scheme}-g16" == found["scheme"].values[layer, expert]


def belonging_to_nobody(one, seed: int):
    """The same costs, each document's given to other experts by chance, and 0 on average over experts."""
    rng = np.random.default_rng(seed)
    flat = one.change.values.reshape(one.sizes["document"], -1)
    moved = np.stack([row[rng.permutation(len(row))] - row.mean() for row in flat]).reshape(one.change.shape)
    return one.assign(change=one.change.copy(data=moved))


def without_a_verdict(draws: int) -> int:
    model = tiny_mixtral()
    texts = [" ".join(np.random.default_rng(n).permutation(TEXTS)[: 1 + n % 3]) for n in range(24)]
    costs = {how: measured(model, how, texts, layers=[3]) for how in ("hqq2-g16", "hqq4-g16")}
    budget = 8 * sum(one.attrs["expert_bytes"] for one in costs.values()) / 2
    unknown = 0
    for seed in range(draws):
        moved = {how: belonging_to_nobody(one, seed) for how, one in costs.items()}
        unknown += ml.decisions.allocate_bits(moved, budget_bytes=budget).attrs["verdict"] == UNKNOWN
    return unknown


def test_costs_that_belong_to_no_expert_give_no_verdict():
    assert without_a_verdict(12) >= 11


@pytest.mark.slow
def test_costs_that_belong_to_no_expert_give_no_verdict_in_a_hundred_draws():
    assert without_a_verdict(100) >= 95


def test_an_expert_that_costs_much_keeps_its_bits_and_the_verdict_says_so():
    model = tiny_mixtral()
    texts = [f"{text} {n}" for n in range(4) for text in TEXTS]
    cheap, dear = (measured(model, how, texts, layers=[0]) for how in ("hqq2-g16", "hqq4-g16"))
    noise = np.random.default_rng(0).normal(0, 1e-3, cheap.change.shape)
    cost = noise + np.where(np.arange(8) < 4, 5.0, 0.1)
    cheap, dear = cheap.assign(change=cheap.change.copy(data=cost)), dear.assign(change=dear.change * 0)
    sizes = [one.attrs["expert_bytes"] for one in (cheap, dear)]
    found = ml.decisions.allocate_bits({"hqq2-g16": cheap, "hqq4-g16": dear}, budget_bytes=4 * sum(sizes))
    assert found["scheme"].values.tolist() == [["hqq4-g16"] * 4 + ["hqq2-g16"] * 4]
    assert (found.attrs["single"], found.attrs["verdict"]) == ("hqq2-g16", "do it")


def test_what_cannot_be_measured_or_allocated_is_refused():
    model = tiny_mixtral()
    for how, kind in (("int8", BadInput), ("hqq9", BadInput), ("hqq2-g13", BadInput)):
        with pytest.raises(kind):
            measured(model, how)
    with pytest.raises(ModelError):
        measured(unfuse(tiny_mixtral()), "hqq2-g16")
    one = measured(model, "hqq2-g16", layers=[0])
    for importance in ({}, {"hqq4": one}, {"hqq2-g16": one.isel(document=[0])}, one):
        with pytest.raises(BadInput):
            ml.decisions.allocate_bits(importance, budget_bytes=1e9)
    with pytest.raises(BadInput) as refused:
        ml.decisions.allocate_bits({"hqq2-g16": one}, budget_bytes=10)
    assert refused.value.argument == "budget_bytes"
