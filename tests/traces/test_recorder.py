"""The Recorder against a plain full forward of each sequence alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.refusals import refused
from tiny import tiny_mixtral
from transformers import DynamicCache, GenerationConfig

from mixlens import BadInput, ModelError, Recorder, RecordingError, Site, edit, edits
from mixlens.trace.signals import SHARED_SITES
from mixlens.trace.signals import SITES as EVERY_SITE

SITES = [name for name in EVERY_SITE if name not in SHARED_SITES]
LENGTHS = [5, 17, 1, 9]
# Rounding differs between batch shapes; a router this close to a tie may fall either way.
MARGIN = 1e-4


def prompts(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (n,), generator=generator) for n in LENGTHS]


def padded(rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        where = slice(width - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, where], mask[row, where] = tokens, 1
    return {"input_ids": ids, "attention_mask": mask}


def oracle(model, rows):
    """Expert ids, weights and router logits [token, layer, ...] of each row alone, by hooks written out here."""
    found = []
    for tokens in rows:
        seen, handles = [], []
        for layer in model.model.layers:
            handles.append(layer.mlp.gate.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out)))
        with torch.no_grad():
            logits = model(tokens[None]).logits[0]
        for handle in handles:
            handle.remove()
        found.append(
            {
                "router_logits": torch.stack([s[0] for s in seen], 1).numpy(),
                "weight": torch.stack([s[1] for s in seen], 1).numpy(),
                "expert_id": torch.stack([s[2] for s in seen], 1).numpy(),
                "logits": logits,
            }
        )
    return found


def assert_same_routing(trace, expected):
    logits = np.concatenate([e["router_logits"] for e in expected])
    ids = np.concatenate([e["expert_id"] for e in expected])
    ranked = np.sort(logits, -1)[..., ::-1]
    clear = ((ranked[..., 0] - ranked[..., 1]) > MARGIN) & ((ranked[..., 1] - ranked[..., 2]) > MARGIN)
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(trace.read("expert_id")[clear], ids[clear])
    np.testing.assert_allclose(
        trace.read("weight")[clear], np.concatenate([e["weight"] for e in expected])[clear], atol=1e-3
    )
    np.testing.assert_allclose(trace.read("router_logits"), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_records_what_each_row_alone_routes(model, side):
    rows = prompts()
    with torch.no_grad(), Recorder(model) as recorder:
        model(**padded(rows, side))
    trace = recorder.trace()
    assert trace.sequences["length"].tolist() == LENGTHS
    np.testing.assert_array_equal(trace.read("token_id"), torch.cat(rows))
    np.testing.assert_array_equal(trace.read("position"), np.concatenate([np.arange(n) for n in LENGTHS]))
    assert_same_routing(trace, oracle(model, rows))


def test_lengths_stand_in_for_a_mask(model):
    rows = prompts()
    with torch.no_grad(), Recorder(model, lengths=LENGTHS) as recorder:
        model(padded(rows, "right")["input_ids"])
    np.testing.assert_array_equal(recorder.trace().read("token_id"), torch.cat(rows))


def test_a_prompt_read_in_chunks_with_a_cache_is_one_sequence(model):
    tokens = prompts()[1]
    with torch.no_grad(), Recorder(model, signals=["router_logits", "logprob", "top_logprobs"]) as recorder:
        first = model(tokens[None, :6], use_cache=True)
        second = model(tokens[None, 6:13], past_key_values=first.past_key_values)
        model(tokens[None, 13:], past_key_values=second.past_key_values)
    trace = recorder.trace()
    np.testing.assert_array_equal(trace.read("position"), np.arange(len(tokens)))
    expected = oracle(model, [tokens])
    assert_same_routing(trace, expected)
    logp = torch.log_softmax(expected[0]["logits"].float(), -1)
    np.testing.assert_allclose(trace.read("logprob")[1:], logp[:-1].gather(1, tokens[1:, None])[:, 0], atol=1e-4)
    assert np.isnan(trace.read("logprob")[0])
    best = logp.topk(64)
    np.testing.assert_allclose(trace.read("top_logprob"), best.values, atol=1e-4)
    tail = trace.read("top_logprob").astype(float)
    total = np.exp(tail).sum(1) + np.exp(trace.read("tail_logprob").astype(float))
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_a_right_padded_prompt_that_is_decoded_on_scores_the_next_token_after_the_last_one(model):
    rows, following = prompts(), torch.tensor([[9], [8], [7], [6]])
    batch = padded(rows, "right")
    with torch.no_grad(), Recorder(model) as recorder:
        cache = model(**batch, use_cache=True).past_key_values
        mask = torch.cat([batch["attention_mask"], torch.ones(4, 1, dtype=torch.long)], 1)
        places = torch.tensor(LENGTHS)[:, None]
        model(following, attention_mask=mask, position_ids=places, past_key_values=cache)
    trace = recorder.trace()
    for i, tokens in enumerate(rows):
        whole = torch.cat([tokens, following[i]])
        with torch.no_grad():
            logp = torch.log_softmax(model(whole[None]).logits[0], -1)
        found = trace.select(where=trace.sequences.index.to_series() == i).read("logprob")
        np.testing.assert_allclose(found[1:], logp[:-1].gather(1, whole[1:, None])[:, 0], atol=1e-4)


def test_logits_are_bit_for_bit_the_same(model):
    batch = padded(prompts(), "left")
    everything = ["router_logits", "logprob", "top_logprobs", *SITES]
    with torch.no_grad():
        before = model(**batch).logits
        with Recorder(model, signals=everything), Recorder(model):
            during = model(**batch).logits
        after = model(**batch).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)


def test_generation_is_the_same_and_hooks_are_gone_after_an_exception(model):
    batch = padded(prompts(), "left")
    plain = model.generate(**batch, max_new_tokens=8, do_sample=False)
    implementation = model.config._experts_implementation
    with pytest.raises(ZeroDivisionError), Recorder(model, signals=[*SITES]):  # noqa: PT012
        recorded = model.generate(**batch, max_new_tokens=8, do_sample=False)
        raise ZeroDivisionError
    assert torch.equal(plain, recorded)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    assert "generate" not in vars(model)
    assert model.config._experts_implementation == implementation


def test_a_recorder_that_cannot_be_put_round_a_model_leaves_nothing(model, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(model.model.layers[-1].mlp.gate, "register_forward_hook", refuse)
    with pytest.raises(ZeroDivisionError):
        Recorder(model, signals=[*SITES]).__enter__()
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert "generate" not in vars(model)


def test_a_cache_that_is_copied_for_more_rows_begins_new_ones(model):
    ids, cache = prompts()[0][None, :4], DynamicCache(config=model.config)
    with torch.no_grad(), Recorder(model) as recorder:
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        model(torch.tensor([[5], [6]]), past_key_values=cache, attention_mask=torch.ones(2, 5, dtype=torch.long))
        assert recorder.n_tokens == 6
    trace = recorder.trace()
    assert trace.read("sequence").tolist() == [0, 0, 0, 0, 1, 2]
    assert trace.read("position").tolist() == [0, 1, 2, 3, 4, 4]


def test_what_was_forgotten_leaves_no_number_behind(model):
    rows = prompts()
    with torch.no_grad(), Recorder(model, signals=["moe_out"]) as fresh:
        model(rows[0][None])
        model(rows[3][None])
    with torch.no_grad(), Recorder(model, signals=["moe_out"]) as recorder:
        model(rows[1][None])
        recorder.clear()
        model(rows[0][None])
        model(rows[3][None])
    assert recorder.trace().read("sequence").tolist() == fresh.trace().read("sequence").tolist()
    assert recorder.trace().activations("moe_out").equals(fresh.trace().activations("moe_out"))


def test_a_generation_config_may_stand_behind_the_prompt(model):
    ids, config = prompts()[0][None], GenerationConfig(max_new_tokens=3, do_sample=False)
    with Recorder(model) as recorder:
        model.generate(ids, config)
    assert recorder.trace().read("phase").tolist() == [0] * ids.shape[1] + [1] * 2


@pytest.mark.parametrize("rows", [1, 3])
def test_a_table_has_one_row_for_every_row_of_a_batch(model, rows):
    with torch.no_grad(), Recorder(model) as recorder:
        model(torch.ones(2, 4, dtype=torch.long), attention_mask=torch.ones(2, 4, dtype=torch.long))
    with refused(BadInput, "sequences", rows):
        recorder.trace(pd.DataFrame({"domain": ["x"] * rows}))


def test_lengths_that_the_batch_does_not_have_are_refused(model):
    with refused(BadInput, "lengths", [2, 9]), torch.no_grad(), Recorder(model, lengths=[2, 9]):
        model(torch.ones(2, 4, dtype=torch.long))


def test_a_recorder_within_a_recorder_gives_generate_back_in_turn(model):
    ids = prompts()[0][None]
    with Recorder(model) as outer:
        with Recorder(model) as inner:
            model.generate(ids, max_new_tokens=3)
        model.generate(ids, max_new_tokens=3)
    assert "generate" not in vars(model)
    assert len(inner.trace().sequences) == 1
    assert len(outer.trace().sequences) == 2


def test_generation_has_one_row_for_every_token_that_a_forward_saw(model):
    rows = prompts()
    stop = 77  # a token these random models do produce becomes the end of sequence
    alone = []
    for tokens in rows:
        with Recorder(model) as recorder:
            out = model.generate(tokens[None], max_new_tokens=10, do_sample=False, eos_token_id=stop, pad_token_id=0)
        trace = recorder.trace()
        seen = out[0, :-1].numpy()
        np.testing.assert_array_equal(trace.read("token_id"), seen)
        np.testing.assert_array_equal(trace.read("phase"), np.arange(len(seen)) >= len(tokens))
        alone.append(trace)
    with Recorder(model) as recorder:
        model.generate(**padded(rows, "left"), max_new_tokens=10, do_sample=False, eos_token_id=stop, pad_token_id=0)
    together = recorder.trace()
    np.testing.assert_array_equal(together.read("token_id"), np.concatenate([t.read("token_id") for t in alone]))
    np.testing.assert_array_equal(together.read("phase"), np.concatenate([t.read("phase") for t in alone]))
    np.testing.assert_allclose(
        together.read("router_logits"), np.concatenate([t.read("router_logits") for t in alone]), atol=2e-2
    )


def test_a_row_that_ends_early_is_not_recorded_past_its_end(model):
    rows = prompts()
    free = model.generate(**padded(rows, "left"), max_new_tokens=10, do_sample=False)[:, -10:]
    stop = int(free[0, 3])
    ends = [int((row == stop).nonzero()[0]) if (row == stop).any() else None for row in free]
    assert any(end is None for end in ends), "some row must go on for the test to mean anything"
    with Recorder(model) as recorder:
        model.generate(**padded(rows, "left"), max_new_tokens=10, do_sample=False, eos_token_id=stop, pad_token_id=stop)
    generated = recorder.trace().select(phase="generated")
    counts = np.bincount(generated.read("sequence"), minlength=len(rows))
    assert counts.tolist() == [9 if end is None else end for end in ends]


def test_sites_agree_with_transformers_and_with_each_other(model):
    tokens = prompts()[1]
    signals = [Site(name, dtype="float32") for name in SITES]
    with torch.no_grad(), Recorder(model, signals=["router_logits", *signals]) as recorder:
        hidden = model(tokens[None], output_hidden_states=True).hidden_states
    trace = recorder.trace()
    site = {name: trace.activations(name).values for name in SITES}
    np.testing.assert_array_equal(site["resid_pre"], torch.stack(hidden[:-1], 2)[0])
    np.testing.assert_allclose(site["resid_post"], site["resid_pre"] + site["attn_out"] + site["moe_out"], atol=1e-4)
    weight = np.concatenate([e["weight"] for e in oracle(model, [tokens])])
    mixed = (site["expert_out"] * weight[..., None]).sum(2)
    np.testing.assert_allclose(mixed, site["moe_out"], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(site["expert_out"], axis=-1), site["expert_norm"], rtol=1e-4)
    down = torch.stack([layer.mlp.experts.down_proj for layer in model.model.layers]).detach().numpy()
    chosen = down[np.arange(down.shape[0])[None, :, None], trace.read("expert_id")]
    np.testing.assert_allclose(
        np.einsum("tlshn,tlsn->tlsh", chosen, site["expert_neurons"]), site["expert_out"], atol=1e-3
    )


@pytest.mark.parametrize(("tokens", "rows"), [("last", [12, 24]), ("prompt", [8, 8]), ("generated", [4, 4])])
def test_token_selection_of_a_site(model, tokens, rows):
    ids = torch.stack([prompts(1)[1][:8], prompts(2)[1][:8]])
    with Recorder(model, signals=[Site("moe_out", layers=(1, 3), tokens=tokens)]) as recorder:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, eos_token_id=None)
    found = recorder.trace().activations("moe_out")
    assert found.layer.values.tolist() == [1, 3]
    if tokens == "last":
        assert found.position.values.tolist() == [11, 11]
    else:
        assert np.bincount(found.sequence.values).tolist() == rows


def test_activations_that_half_precision_cannot_hold_are_refused(model):
    model.model.embed_tokens.weight.data *= 1e6
    with (
        torch.no_grad(),
        refused(BadInput, "dtype", "resid_pre"),
        Recorder(model, signals=["resid_pre"]),
    ):
        model(prompts()[0][None])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"num_beams": 2}, ("generate", "beam search")),
        ({"use_cache": False}, ("generate", "generation without a cache")),
        ({"prompt_lookup_num_tokens": 2}, ("generate", "assisted generation")),
    ],
)
def test_generation_that_cannot_be_counted_is_refused(model, options, what):
    with refused(RecordingError, *what), Recorder(model):
        model.generate(prompts()[0][None], max_new_tokens=2, **options)


def test_a_batch_without_mask_or_lengths_is_refused(model):
    with refused(RecordingError, "attention_mask", 2), Recorder(model):
        model(torch.ones(2, 4, dtype=torch.long))


def test_what_a_failed_forward_left_does_not_enter_the_trace(model):
    tokens = prompts()[0]
    bomb = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with torch.no_grad(), Recorder(model) as recorder:
        with pytest.raises(ZeroDivisionError):
            model(tokens[None])
        bomb.remove()
        model(tokens[None])
    trace = recorder.trace()
    np.testing.assert_array_equal(trace.read("token_id"), tokens)
    assert len(trace.sequences) == 1


def test_recording_adds_nothing_to_the_graph_of_a_training_step(model):
    ids = prompts()[1][None]

    def step(*signals):
        model.zero_grad()
        with Recorder(model, signals=signals):
            model(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        plain = step()
        without = len(kept)
        recorded = step(*SITES)
    assert len(kept) == 2 * without
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_recomputation_during_backward_is_not_recorded(model):
    model.train()
    model.gradient_checkpointing_enable()
    tokens = prompts()[1]
    with Recorder(model) as recorder:
        model(tokens[None], labels=tokens[None], use_cache=False).loss.backward()
    assert recorder.trace().n_tokens == len(tokens)


def test_unknown_signals_name_the_near_one(model):
    with refused(BadInput, "signals", "moe_outt"):
        Recorder(model, signals=["moe_outt"])
    n_layers = len(model.model.layers)
    with refused(BadInput, "layers", [n_layers]):
        Recorder(model, signals=[Site("moe_out", layers=(n_layers,))])


def test_a_model_without_experts_is_refused():
    with refused(ModelError, "model", "Linear"):
        Recorder(torch.nn.Linear(2, 2))


def test_an_empty_recorder_says_so(model):
    with Recorder(model) as recorder:
        pass
    with refused(BadInput, "Recorder", 0):
        recorder.trace()


def test_other_top_k_and_expert_counts():
    model = tiny_mixtral(num_local_experts=16, num_experts_per_tok=4)
    rows = prompts()
    with torch.no_grad(), Recorder(model) as recorder:
        model(**padded(rows, "right"))
    trace = recorder.trace()
    assert (trace.n_experts, trace.top_k) == (16, 4)
    np.testing.assert_allclose(trace.read("weight").sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(
        np.sort(trace.read("expert_id"), -1), np.sort(np.concatenate([e["expert_id"] for e in oracle(model, rows)]), -1)
    )


def test_forwards_of_another_top_k_are_refused_and_those_before_are_kept(model):
    with torch.no_grad(), Recorder(model) as recorder:
        model(torch.arange(3, 9)[None])
        kept = recorder.trace().read("expert_id")
        with refused(RecordingError, "top_k", 1), edit(model, edits.top_k(1)):
            model(torch.arange(3, 9)[None])
        assert np.array_equal(recorder.trace().read("expert_id"), kept)
        recorder.clear()
        with edit(model, edits.top_k(1)):
            model(torch.arange(3, 9)[None])
    assert recorder.trace().top_k == 1


def test_layers_are_looked_for_on_entering_alone(model, monkeypatch):
    """Finding them takes a millisecond, which a decode has none to spare for."""
    looked = []
    with torch.no_grad(), Recorder(model) as recorder:
        for name in ("mixlens.recording.recorder", "mixlens.recording.hooks", "mixlens.models.layout"):
            monkeypatch.setattr(f"{name}.moe_layers", lambda _model: looked.append(1))
        model.generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert recorder.n_tokens > 6
    assert not looked
