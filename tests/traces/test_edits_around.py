"""Edits round generate, record, offloaded layers and failures; and what they refuse."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from helpers.refusals import refused
from tiny import tiny_mixtral

import mixlens as ml
from mixlens import BadInput, edits
from mixlens.interventions.where import Where

PROMPT = torch.randint(3, 128, (2, 6), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def net():
    return tiny_mixtral()


def hooks_of(model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def forward(model, *chosen, ids=PROMPT, **options):
    with torch.no_grad(), ml.Recorder(model) as recorder:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **options}
        if chosen:
            with ml.edit(model, *chosen):
                return model(**inputs).logits, recorder.trace()
        return model(**inputs).logits, recorder.trace()


# ---------------------------------------------------------------- coming and going


def test_nothing_is_left_after_an_edit_or_an_exception(net):
    before, names = hooks_of(net), set(vars(net))
    chosen = [edits.forbid(0, 1), edits.ablate(1, 2, how="zero"), edits.force(2, 3, where=Where(phase="prompt"))]
    forward(net, *chosen)
    assert (hooks_of(net), set(vars(net))) == (before, names)
    outer, inner = ml.edit(net, *chosen), ml.edit(net, edits.temperature(2.0))
    with pytest.raises(IndexError), outer, inner:
        net(torch.full((1, 4), 10_000))
    assert (hooks_of(net), set(vars(net))) == (before, names)


def test_nothing_is_left_after_an_edit_that_was_refused(net):
    before, names = hooks_of(net), set(vars(net))
    with pytest.raises(BadInput), ml.edit(net, edits.forbid(99, 1)):
        pass
    assert (hooks_of(net), set(vars(net))) == (before, names)


def test_a_forward_that_fails_half_way_leaves_the_next_one_right(net):
    edit = edits.force(1, 3, where=Where(positions=2))
    plain = forward(net, edit)[0]
    with torch.no_grad(), ml.edit(net, edit):
        with pytest.raises(IndexError):
            net(torch.full((1, 4), 10_000))
        assert torch.equal(net(PROMPT, attention_mask=torch.ones_like(PROMPT)).logits, plain)


# ---------------------------------------------------------------- generate and record


def test_generate_under_an_edit(net):
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(PROMPT), "eos_token_id": None}
    with ml.Recorder(net) as recorder, ml.edit(net, edits.forbid(None, [0, 4])):
        tokens = net.generate(PROMPT, **options)
    trace = recorder.trace()
    assert not np.isin(trace.read("expert_id"), [0, 4]).any()
    # Without the cache the same tokens have the same routing.
    _, again = forward(net, edits.forbid(None, [0, 4]), ids=tokens[:, :-1])
    np.testing.assert_array_equal(trace.read("expert_id"), again.read("expert_id"))


def test_only_generated_tokens(net):
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(PROMPT), "eos_token_id": None}
    with ml.Recorder(net) as recorder, ml.edit(net, edits.force(None, 7, where=Where(phase="generated"))):
        net.generate(PROMPT, **options)
    trace = recorder.trace()
    chose = (trace.read("expert_id") == 7).any(-1)
    assert chose[trace.read("phase") == 1].all()
    np.testing.assert_array_equal(chose[trace.read("phase") == 0], (forward(net)[1].read("expert_id") == 7).any(-1))


def test_a_generation_is_replayed_step_by_step(net):
    options = {"do_sample": True, "attention_mask": torch.ones_like(PROMPT), "eos_token_id": None}
    same = PROMPT[:1].repeat(2, 1)  # two continuations of one prompt
    torch.manual_seed(0)
    with ml.Recorder(net, signals=()) as recorder, ml.edit(net, edits.add(1.0, experts=3)):
        tokens = net.generate(same, max_new_tokens=6, **options)
    recorded = recorder.trace()
    _, replayed = forward(net, edits.replay(recorded), ids=tokens[:, :-1])
    one, other = np.sort(recorded.read("expert_id"), -1), np.sort(replayed.read("expert_id"), -1)
    np.testing.assert_array_equal(one, other)
    torch.manual_seed(0)
    with ml.Recorder(net, signals=()) as again, ml.edit(net, edits.add(1.0, experts=3), edits.replay(recorded)):
        assert torch.equal(net.generate(same, max_new_tokens=6, **options), tokens)
    np.testing.assert_array_equal(np.sort(again.trace().read("expert_id"), -1), one)


def test_weights_of_an_edit_stay_with_the_forwards_it_was_round(net):
    ids, edit = torch.arange(6)[None], edits.force(1, [6, 7], weight=0.2)
    with torch.no_grad(), ml.Recorder(net) as recorder:
        with ml.edit(net, edit):
            net(ids)
        net(ids)
    weight = recorder.trace().read("weight")
    np.testing.assert_allclose(weight[:6, 1], 0.2, atol=1e-3)
    np.testing.assert_allclose(weight[6:].sum(-1), 1, atol=1e-3)


def test_record_under_an_edit_says_so_and_needs_no_order_of_rows(net, letters, tmp_path):
    texts = ["a", "hello there", "abc", "hello"]
    quiet = ml.RecordSettings(progress=False)
    with ml.edit(net, edits.forbid(None, 2, where=Where(positions=[0, 1]))):
        trace = ml.record(net, texts, tokenizer=letters, out=tmp_path / "run", settings=quiet)
    chose = (trace.read("expert_id") == 2).any((1, 2))
    assert not chose[trace.read("position") < 2].any()
    assert chose.any()
    assert "Forbid" in trace.meta["settings"]["edits"][0]
    with ml.edit(net, edits.replay(trace)):
        again = ml.record(net, texts, tokenizer=letters, settings=quiet)
    np.testing.assert_array_equal(np.sort(again.read("expert_id"), -1), np.sort(trace.read("expert_id"), -1))
    with refused(ml.RunError, "out", ["edits"]):
        ml.record(net, texts, tokenizer=letters, out=tmp_path / "run", settings=quiet)


def test_a_document_that_another_begins_with_is_replayed_on_its_own_row(net, letters):
    texts, quiet = ["h", "hello there"], ml.RecordSettings(progress=False)
    with ml.edit(net, edits.add(2.0, experts=3)):
        trace = ml.record(net, texts, tokenizer=letters, settings=quiet)
    with ml.edit(net, edits.replay(trace)):
        again = ml.record(net, texts, tokenizer=letters, settings=quiet)
    np.testing.assert_array_equal(np.sort(again.read("expert_id"), -1), np.sort(trace.read("expert_id"), -1))


def test_record_with_another_top_k(net, letters, tmp_path):
    for k in (1, 4):
        with ml.edit(net, edits.top_k(k)):
            trace = ml.record(
                net, ["hello"], tokenizer=letters, out=tmp_path / str(k), settings=ml.RecordSettings(progress=False)
            )
        assert trace.top_k == k
        assert trace.read("weight").shape[-1] == k
        assert np.abs(trace.read("weight").sum(-1) - 1).max() < 1e-6


# ---------------------------------------------------------------- layouts and places


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_implementation(implementation):
    net = tiny_mixtral()
    chosen = [edits.forbid(0, 1), edits.ablate(1, 2, how="zero"), edits.reroute(2, 3, 4), edits.top_k(3)]
    expected = forward(net, *chosen)[0]
    net.set_experts_implementation(implementation)
    torch.testing.assert_close(forward(net, *chosen)[0], expected, atol=1e-4, rtol=1e-4)


class ExpertByExpert(torch.nn.Module):
    """The experts of a fused module as one nn.Linear for each projection of each expert."""

    def __init__(self, fused):
        super().__init__()
        self.experts = torch.nn.ModuleList()
        for gate_up, down in zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True):
            expert = torch.nn.ModuleDict()
            for name, weight in zip(("w1", "w3", "w2"), (*gate_up.chunk(2), down), strict=True):
                expert[name] = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                expert[name].weight.data = weight.clone()
            self.experts.append(expert)

    def forward(self, hidden, ids, weights):
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(ids == number)
            value = expert["w2"](torch.nn.functional.silu(expert["w1"](hidden[token])) * expert["w3"](hidden[token]))
            out.index_add_(0, token, value * weights[token, slot, None])
        return out


def test_experts_held_one_by_one():
    chosen = [
        edits.forbid(0, 1),
        edits.ablate(1, [2, 5], how="zero"),
        edits.ablate(1, 3, how="mean", mean=torch.ones(32)),
        edits.reroute(2, 3, 4),
        edits.patch("expert_out", torch.ones(32), layer=3, expert=6),
        edits.top_k(3),
    ]
    net = tiny_mixtral()
    expected = forward(net, *chosen)[0]
    for layer in net.model.layers:
        layer.mlp.experts = ExpertByExpert(layer.mlp.experts)
    torch.testing.assert_close(forward(net, *chosen)[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_layers(tmp_path, place):
    chosen = [
        edits.forbid(0, 1),
        edits.ablate(1, 2, how="zero", where=Where(positions=range(3))),
        edits.ablate(1, 3, how="mean", mean=torch.ones(32)),
        edits.force(2, 3, where=Where(phase="prompt")),
    ]
    expected = forward(tiny_mixtral(), *chosen)[0]
    net = tiny_mixtral()
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.3"]
    device_map = dict.fromkeys(parts, "cpu") | {f"model.layers.{i}": place for i in range(3)}
    net = dispatch_model(net, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert place == "cpu" or net.model.layers[0].mlp.experts.down_proj.is_meta
    assert torch.equal(forward(net, *chosen)[0], expected)


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "unknown layer": (lambda _: edits.forbid(4, 1), ("layers", [4])),
    "unknown expert": (lambda _: edits.force(1, 8), ("experts", [8])),
    "unknown target": (lambda _: edits.reroute(1, 2, 9), ("experts", [9])),
    "too few left": (
        lambda _: edits.forbid(1, range(7)),
        ("forbid", 7),
    ),
    "too many forced": (lambda _: edits.force(1, range(3)), ("force", 3)),
    "top 0": (lambda _: edits.top_k(0), ("top_k", 0)),
    "top 9": (lambda _: edits.top_k(9), ("top_k", 9)),
    "no token": (
        lambda _: edits.forbid(1, 1, where=Where(positions=99)),
        ("where", edits.forbid(1, 1, where=Where(positions=99))),
    ),
    "no phase": (
        lambda _: edits.forbid(1, 1, where=Where(phase="generated")),
        ("where", edits.forbid(1, 1, where=Where(phase="generated"))),
    ),
    "bad phase": (lambda _: edits.forbid(1, 1, where=Where(phase="middle")), ("phase", "middle")),
    "bad position": (lambda _: edits.forbid(1, 1, where=Where(positions=-1)), ("positions", -1)),
    "no experts": (lambda _: edits.forbid(1, []), ("experts", [])),
    "no number": (lambda _: edits.ablate(1, "x"), ("experts", "x")),
    "no whole number": (lambda _: edits.ablate(1, 2.7), ("experts", 2.7)),
    "k in words": (lambda _: edits.top_k("two"), ("k", "two")),
    "several k": (lambda _: edits.top_k([1, 2]), ("k", [1, 2])),
    "several sources": (lambda _: edits.reroute(1, [2, 3], 4), ("source", [2, 3])),
    "several experts of a patch": (
        lambda _: edits.patch("expert_out", torch.zeros(32), layer=1, expert=[2, 3]),
        ("expert", [2, 3]),
    ),
    "no whole position": (lambda _: edits.forbid(1, 1, where=Where(positions=[1.5])), ("positions", [1.5])),
    "no condition": (lambda _: edits.forbid(1, 1, where={"positions": [1]}), ("where", {"positions": [1]})),
    "no edit": (lambda _: "forbid", ("edits", "forbid")),
    "no trace": (lambda _: edits.replay("runs/x"), ("trace", "runs/x")),
    "no factor": (lambda _: edits.scale("a"), ("factor", "a")),
    "no values": (lambda _: edits.patch("moe_out", "abc", layer=1), ("values", "abc")),
    "two layers": (lambda _: edits.patch("moe_out", torch.zeros(32), layer=[1, 2]), ("layer", [1, 2])),
    "weight": (lambda _: edits.force(1, [1, 2], weight=0.6), ("weight", 0.6)),
    "temperature": (lambda _: edits.temperature(0.0), ("temperature", 0.0)),
    "infinite": (lambda _: edits.add(float("inf")), ("bias", float("inf"))),
    "itself": (lambda _: edits.reroute(1, 2, 2), ("target", 2)),
    "no mean": (lambda _: edits.ablate(1, 2, how="mean"), ("how", "mean")),
    "other tokens": (lambda t: edits.replay(t.select(where={"document_id": 1})), ("row", (0, 0))),
    "layers of a replay": (lambda t: edits.replay(t.select(layers=[0, 1])), ("layers", [2, 3])),
    "part of a replay": (lambda t: edits.replay(t.select(positions=(2, 4))), ("trace",)),
    "site": (lambda _: edits.patch("resid", torch.zeros(32), layer=1), ("site", "resid")),
    "norm": (lambda _: edits.patch("expert_norm", torch.zeros(32), layer=1), ("site", "expert_norm")),
    "shape": (lambda _: edits.patch("moe_out", torch.zeros(31), layer=1), ("values", (31,))),
    "slots": (
        lambda _: edits.patch("expert_out", torch.zeros(3, 32), layer=1),
        ("values", (3, 32)),
    ),
    "positions": (lambda _: edits.patch("moe_out", torch.zeros(3, 32), layer=1), ("positions", 0)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_said(net, case):
    make, named = REFUSED[case]
    trace = forward(net)[1]
    with refused(BadInput, *named):
        forward(net, make(trace))


def test_together_too_few_experts_remain(net):
    here = Where(positions=range(3))
    with refused(BadInput, "forbid", 7):
        forward(net, edits.forbid(1, range(4)), edits.forbid(1, range(4, 7)))
    with refused(BadInput, "forbid", 6):
        forward(net, edits.forbid(1, range(4)), edits.forbid(1, range(4, 7), where=here))
    with refused(BadInput, "force", 6):
        forward(net, edits.force(1, [1, 2]), edits.force(1, 3, where=here))
    forward(net, edits.top_k(1), edits.forbid(1, range(7)))


def test_a_replay_of_another_shape_of_model(net):
    other = forward(tiny_mixtral(num_experts_per_tok=3))[1]
    with refused(BadInput, "trace", (3, 8)):
        forward(net, edits.replay(other))


def test_a_replay_names_the_position_that_differs(net):
    _, trace = forward(net)
    changed = PROMPT.clone()
    changed[1, 4] += 1
    with refused(BadInput, "row", (1, 4)):
        forward(net, edits.replay(trace), ids=changed)
    longer = torch.cat([PROMPT, PROMPT[:, :1]], 1)
    with refused(BadInput, "row", (0, 6)):
        forward(net, edits.replay(trace), ids=longer)


def test_layers_with_different_k_are_recorded_as_they_are(net):
    _, trace = forward(net, edits.top_k(1, layers=[0, 2]))
    assert trace.layer_top_k == tuple(1 if layer in (0, 2) else 2 for layer in trace.layers)


def test_rows_mean_nothing_to_record(net, letters):
    edit = edits.forbid(0, 1, where=Where(rows=0))
    with refused(BadInput, "where", edit), ml.edit(net, edit):
        ml.record(net, ["ab", "c"], tokenizer=letters)


@pytest.mark.parametrize(
    ("hooked", "chosen"),
    [("gate", edits.forbid([0, 1], 1)), ("experts", edits.ablate([0, 1], 1, how="zero"))],
)
@pytest.mark.parametrize("past", ["gate", "experts"])
def test_an_edit_whose_module_is_not_called_says_so(hooked, chosen, past):
    """Code of somebody's own runs the router, or the experts, of layer 1 past its hooks."""
    model = tiny_mixtral()
    moe = model.model.layers[1].mlp
    called = {name: getattr(moe, name) for name in ("gate", "experts")}
    called[past] = called[past].forward

    def forward(hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, weights, ids = called["gate"](flat)
        return called["experts"](flat, ids, weights).reshape(hidden.shape)

    with ExitStack() as stack:
        if hooked == past:
            stack.enter_context(refused(ml.RecordingError, "layers", [1]))
        stack.enter_context(ml.edit(model, chosen))
        model(PROMPT)
        moe.forward = forward
        model(PROMPT)


def test_an_edit_inside_another_answers_for_its_own_forwards(net):
    with ml.edit(net, edits.forbid(0, 1)):
        net(PROMPT)
        with ml.edit(net, edits.ablate(0, 2, how="zero")):
            pass


def test_layers_that_share_a_router_are_refused():
    model = tiny_mixtral()
    model.model.layers[1] = model.model.layers[0]
    with refused(ml.ModelError, "model", "shared layers"):
        ml.Recorder(model).__enter__()
