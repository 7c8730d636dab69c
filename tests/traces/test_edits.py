"""Edits of routing against a Mixtral block written out in plain torch, token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import matrices_of, tiny_mixtral

import mixlens as ml
from mixlens import edits
from mixlens.interventions.routing import Routing
from mixlens.interventions.where import Where
from mixlens.models.quantization.unfuse import unfuse
from mixlens.models.routing_rule import RouterRule, Rule

LAYER, EXPERTS, K = 1, 8, 2


@pytest.fixture(scope="module", params=["fused", "unfused"])
def net(request):
    return unfuse(tiny_mixtral()) if request.param == "unfused" else tiny_mixtral()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(5))


def run(model, ids, *chosen, **options):
    """(logits, trace, inputs and outputs of every block) of one forward under edits."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = [
        layer.mlp.register_forward_hook(lambda _m, args, out, i=i: seen.__setitem__(i, (args[0], out)))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad(), ml.Recorder(model) as recorder:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
        if chosen:
            with ml.edit(model, *chosen):
                logits = model(**inputs).logits
        else:
            logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return logits, recorder.trace(), seen


def strongest(logits: list[float], k: int = K, banned=(), forced=()) -> list[int]:
    order = sorted(range(EXPERTS), key=lambda e: (e not in forced, -logits[e]))
    return [e for e in order if e not in banned][:k]


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v - max(values)) for v in values)
    return [math.exp(v - max(values)) / total for v in values]


def block(moe, hidden: torch.Tensor, decide):
    """(output [T, H], chosen {token: {expert: weight}}) of a block; decide(logits, token) gives {expert: weight}."""
    flat = hidden.reshape(-1, hidden.shape[-1]).double()
    out, chosen = torch.zeros_like(flat), {}
    for t, x in enumerate(flat):
        logits = [float(w.detach().double() @ x) for w in moe.gate.weight]
        chosen[t] = decide(logits, t)
        for expert, weight in chosen[t].items():
            w1, w3, w2 = (matrix.double() for matrix in matrices_of(moe.experts, expert))
            gate = w1 @ x
            out[t] += weight * (w2 @ (gate * torch.sigmoid(gate) * (w3 @ x)))
    return out.reshape(hidden.shape), chosen


def natural(logits, _t, **options):
    picked = strongest(logits, **options)
    return dict(zip(picked, softmax([logits[e] for e in picked]), strict=True))


def tempered(logits, t):
    return natural([v / 0.5 for v in logits], t)


def scaled(logits, t):
    return natural([v * 3 if e in (2, 6) else v for e, v in enumerate(logits)], t)


def shifted(logits, t):
    return natural([v + 1.5 if e == 4 else v for e, v in enumerate(logits)], t)


def rerouted(logits, t):
    if 3 not in strongest(logits):
        return natural(logits, t)
    inherited = list(logits)
    inherited[6] = max(logits[3], logits[6])
    return natural(inherited, t, banned=[3])


def weighted(logits, t):
    picked = strongest(logits, forced=[7])
    other = next(e for e in picked if e != 7)
    return {7: 0.75, other: 0.25}


CASES = {
    "forbid": (edits.forbid(LAYER, [1, 3]), lambda x, t: natural(x, t, banned=[1, 3])),
    "ablate": (edits.ablate(LAYER, 5), lambda x, t: natural(x, t, banned=[5])),
    "force": (edits.force(LAYER, [3]), lambda x, t: natural(x, t, forced=[3])),
    "force two": (edits.force(LAYER, [0, 4]), lambda x, t: natural(x, t, forced=[0, 4])),
    "force with weight": (edits.force(LAYER, 7, weight=0.75), weighted),
    "temperature": (edits.temperature(0.5, layers=LAYER), tempered),
    "scale": (edits.scale(3.0, layers=LAYER, experts=[2, 6]), scaled),
    "add": (edits.add(1.5, layers=LAYER, experts=4), shifted),
    "reroute": (edits.reroute(LAYER, 3, 6), rerouted),
    "some positions": (
        edits.forbid(LAYER, [1, 3], where=Where(positions=range(4))),
        lambda x, t: natural(x, t, banned=[1, 3] if t % 12 < 4 else []),
    ),
    "one row": (
        edits.force(LAYER, 2, where=Where(rows=1)),
        lambda x, t: natural(x, t, forced=[2] if t // 12 == 1 else []),
    ),
    **{f"top {k}": (edits.top_k(k), lambda x, t, k=k: natural(x, t, k=k)) for k in (1, 3, 8)},
}


@pytest.mark.parametrize("case", CASES)
def test_every_edit_gives_what_the_block_written_out_gives(net, ids, case):
    edit, decide = CASES[case]
    _, trace, seen = run(net, ids, edit)
    for layer, moe in enumerate(block_.mlp for block_ in net.model.layers):
        edited = layer == LAYER or case.startswith("top")
        expected, chosen = block(moe, seen[layer][0], decide if edited else natural)
        torch.testing.assert_close(seen[layer][1].double(), expected, atol=2e-4, rtol=1e-4)
        for t, weights in chosen.items():
            recorded = trace.read("expert_id")[t, layer].tolist()
            assert set(recorded) == set(weights)
            got = dict(zip(recorded, trace.read("weight")[t, layer].tolist(), strict=True))
            assert got == pytest.approx(weights, abs=1e-3)
    assert np.abs(trace.read("weight").sum(-1) - 1).max() < 1e-6


def test_slots_are_in_the_order_of_weights_under_every_edit(net, ids):
    for edit, _ in CASES.values():
        assert (np.diff(run(net, ids, edit)[1].read("weight"), axis=-1) <= 0).all()


def test_conditions_on_token_ids(net, ids):
    token = int(ids[0, 3])
    _, trace, _ = run(net, ids, edits.force(LAYER, 6, where=Where(tokens=[token])))
    _, plain, _ = run(net, ids)
    here = trace.read("token_id") == token
    assert (trace.read("expert_id")[here, LAYER] == 6).any(-1).all()
    np.testing.assert_array_equal(trace.read("expert_id")[~here, LAYER], plain.read("expert_id")[~here, LAYER])


def test_positions_count_without_padding(net, ids):
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    _, trace, _ = run(net, ids, edits.force(LAYER, 6, where=Where(positions=0)), attention_mask=mask)
    chose = (trace.read("expert_id")[:, LAYER] == 6).any(-1)
    plain = (run(net, ids, attention_mask=mask)[1].read("expert_id")[:, LAYER] == 6).any(-1)
    first = trace.read("position") == 0
    assert chose[first].all()
    np.testing.assert_array_equal(chose[~first], plain[~first])


# ---------------------------------------------------------------- what changes nothing


def test_replaying_its_own_routing_is_bit_identical(model, ids):
    logits, trace, _ = run(model, ids)
    again, replayed, _ = run(model, ids, edits.replay(trace))
    assert torch.equal(logits, again)
    for name in ("expert_id", "weight", "router_logits"):
        np.testing.assert_array_equal(trace.read(name), replayed.read(name))


def test_ablating_an_expert_that_is_never_chosen_changes_nothing(net, ids):
    logits, trace, _ = run(net, ids[:1, :3])
    never = sorted(set(range(EXPERTS)) - set(trace.read("expert_id")[:, LAYER].reshape(-1).tolist()))
    for how in ("reroute", "zero"):
        assert torch.equal(logits, run(net, ids[:1, :3], edits.ablate(LAYER, never[0], how=how))[0])


def test_forcing_the_natural_choice_changes_nothing(net, ids):
    logits, trace, _ = run(net, ids)
    first = trace.read("expert_id")[:, LAYER, 0]
    natural_choice = [
        edits.force(LAYER, expert, where=Where(rows=row, positions=np.flatnonzero(first[row * 12 :][:12] == expert)))
        for row in range(3)
        for expert in set(first[row * 12 :][:12].tolist())
    ]
    assert torch.equal(logits, run(net, ids, *natural_choice)[0])


@pytest.mark.parametrize(
    "nothing", [edits.temperature(1.0), edits.scale(1.0), edits.add(0.0), edits.top_k(2)], ids=repr
)
def test_edits_that_say_nothing_change_nothing(net, ids, nothing):
    assert torch.equal(run(net, ids)[0], run(net, ids, nothing)[0])


def test_a_forbidden_expert_is_never_recorded_and_weights_sum_to_one(model, ids):
    _, trace, _ = run(model, ids, edits.forbid(None, [0, 3, 7]))
    assert not np.isin(trace.read("expert_id"), [0, 3, 7]).any()
    assert np.abs(trace.read("weight").sum(-1) - 1).max() < 1e-6
    assert np.isneginf(trace.read("router_logits")[..., [0, 3, 7]]).all()
    assert np.isfinite(trace.read("router_logits")[..., [1, 2, 4, 5, 6]]).all()


def test_a_very_sharp_temperature_keeps_the_choice_and_stays_finite(net, ids):
    _, plain, _ = run(net, ids)
    logits, trace, _ = run(net, ids, edits.temperature(1e-4, layers=0))
    np.testing.assert_array_equal(trace.read("expert_id")[:, 0], plain.read("expert_id")[:, 0])
    assert torch.isfinite(logits).all()


# ---------------------------------------------------------------- several edits

COMMUTING = [
    (edits.forbid(LAYER, 1), edits.forbid(LAYER, 4)),
    (edits.forbid(LAYER, [1, 4]), edits.temperature(0.3)),
    (edits.forbid(LAYER, [1, 4]), edits.top_k(3)),
    (edits.force(LAYER, 2), edits.forbid(LAYER, 4)),
    (edits.add(1.0, experts=3), edits.add(-0.5, experts=3)),
    (edits.scale(2.0), edits.temperature(3.0)),
    (edits.ablate(LAYER, 2, how="zero"), edits.forbid(LAYER, 5)),
    (edits.forbid(0, 1), edits.reroute(2, 3, 4)),
]


@pytest.mark.parametrize("pair", COMMUTING, ids=str)
def test_edits_that_should_commute_do(net, ids, pair):
    one, other = run(net, ids, *pair)[0], run(net, ids, *reversed(pair))[0]
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert not torch.equal(one, run(net, ids)[0])


def test_of_two_that_contradict_each_other_the_later_holds(net, ids):
    forbid, force = edits.forbid(LAYER, 2), edits.force(LAYER, 2)
    assert torch.equal(run(net, ids, forbid, force)[0], run(net, ids, force)[0])
    assert torch.equal(run(net, ids, force, forbid)[0], run(net, ids, forbid)[0])


def test_an_edit_inside_another_comes_after_it(net, ids):
    first, second = edits.add(2.0, experts=3), edits.scale(0.5)
    together = run(net, ids, first, second)[0]
    with torch.no_grad(), ml.edit(net, first), ml.edit(net, second):
        nested = net(ids).logits
    assert torch.equal(together, nested)
    assert not torch.equal(together, run(net, ids, second, first)[0])


def test_replay_then_forbid_takes_the_expert_out_of_the_replayed_choice(net, ids):
    other = run(net, ids, edits.add(0.7, experts=2))[1]
    _, trace, _ = run(net, ids, edits.replay(other), edits.forbid(LAYER, 2))
    recorded, replayed = other.read("expert_id")[:, LAYER], trace.read("expert_id")[:, LAYER]
    assert not (replayed == 2).any()
    keeps = ~(recorded == 2).any(-1)
    np.testing.assert_array_equal(np.sort(recorded[keeps], -1), np.sort(replayed[keeps], -1))


def test_recorders_see_the_edit_from_inside_and_from_outside(net, ids):
    mask = torch.ones_like(ids)
    edit = ml.edit(net, edits.forbid(LAYER, [0, 1, 2]))
    with torch.no_grad(), ml.Recorder(net) as outside, edit, ml.Recorder(net) as inside:
        net(ids, attention_mask=mask)
    for name in ("expert_id", "weight"):
        np.testing.assert_array_equal(outside.trace().read(name), inside.trace().read(name))
    assert not np.isin(inside.trace().read("expert_id")[:, LAYER], [0, 1, 2]).any()
    assert inside.trace().meta["settings"]["edits"] == [repr(edits.forbid(LAYER, [0, 1, 2]))]


@pytest.mark.parametrize("chosen", [3, 5])
def test_of_logits_that_tie_the_models_own_choice_is_rerouted(chosen):
    logits = torch.zeros(1, EXPERTS, dtype=torch.bfloat16)
    logits[0, [0, 3, 5]] = torch.tensor([2.0, 1.0, 1.0], dtype=torch.bfloat16)
    rule = RouterRule(Rule(renormalised=True), None, None)
    routing = Routing(logits, torch.tensor([[0.75, 0.25]]), torch.tensor([[0, chosen]]), rule)
    routing.reroute(3, 6, None)
    assert routing.result()[2].tolist() == [[0, 6 if chosen == 3 else 5]]


def test_gradients_flow_through_edited_routing(net, ids):
    with ml.edit(net, edits.temperature(0.7), edits.forbid(LAYER, 3)):
        net(ids, labels=ids).loss.backward()
    gradient = net.model.layers[LAYER].mlp.gate.weight.grad
    assert gradient.abs().sum() > 0
    assert gradient[3].abs().sum() == 0
    net.zero_grad()
