"""Drivers that users of neighbouring projects reported: each is recorded as its rows alone run, or refused by name."""

from __future__ import annotations

import contextlib
import copy
import threading
from functools import partial

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import CACHE, Letters, tiny_mixtral
from transformers import (
    DynamicCache,
    GenerationConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    StoppingCriteriaList,
)

import mixlens as ml
from mixlens.errors import BadInput, MissingSignal, ModelError, RecordingError

QUIET = ml.RecordSettings(progress=False)


@pytest.fixture
def model():
    return tiny_mixtral(num_hidden_layers=2)


def texts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (n,), generator=generator) for n in lengths]


def left_padded(rows: list[torch.Tensor], pad: int = 0) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0), value=pad) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def routing_alone(model, tokens) -> np.ndarray:
    """expert_id [token, layer, slot] of one row, by bare hooks."""
    seen = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out: seen.append(out[2])) for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.as_tensor(tokens)[None])
    for handle in handles:
        handle.remove()
    return torch.stack(seen, 1).numpy()


def assert_rows(model, trace, rows, prompts):
    """Every row of the trace has these tokens, from 0 on, routed as the row alone is."""
    assert trace.read("token_id").tolist() == [int(token) for row in rows for token in row]
    assert trace.read("position").tolist() == [place for row in rows for place in range(len(row))]
    expected = [int(place >= n) for row, n in zip(rows, prompts, strict=True) for place in range(len(row))]
    assert trace.read("phase").tolist() == expected
    alone = np.concatenate([routing_alone(model, row) for row in rows])
    assert (trace.read("expert_id") == alone).mean() > 0.99


# ---------------------------------------------------------------------- what generate resolves


@pytest.mark.parametrize("how", ["keyword", "second argument", "of the model"])
def test_a_config_that_names_no_end_takes_the_models(model, how):
    rows = texts(5, 17, 1, 9)
    free = model.generate(**left_padded(rows), max_new_tokens=10, do_sample=False, eos_token_id=None)[:, -10:]
    stop = int(free[0, 3])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = stop, 0
    config = GenerationConfig(max_new_tokens=10, do_sample=False)
    batch = left_padded(rows)
    with ml.Recorder(model) as recorder:
        if how == "keyword":
            model.generate(**batch, generation_config=config)
        elif how == "second argument":
            model.generate(batch["input_ids"], config, attention_mask=batch["attention_mask"])
        else:
            model.generate(**batch, max_new_tokens=10, do_sample=False)
    ends = [int((row == stop).nonzero()[0]) if (row == stop).any() else 9 for row in free]
    read = [[*row.tolist(), *answer[:n].tolist()] for row, answer, n in zip(rows, free, ends, strict=True)]
    assert_rows(model, recorder.trace(), read, [5, 17, 1, 9])


def test_a_static_cache_without_a_mask_leaves_out_what_generate_takes_for_padding(model):
    rows = texts(5, 12, 1)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 127, 0
    config = GenerationConfig(max_new_tokens=4, do_sample=False, cache_implementation="static")
    with ml.Recorder(model) as recorder:
        model.generate(left_padded(rows)["input_ids"], generation_config=config)
    assert recorder.trace().sequences["length"].tolist() == [8, 15, 4]


@pytest.mark.parametrize("many", [2, 3])
def test_several_answers_to_one_prompt_are_sequences_of_their_own(model, many):
    (row,) = texts(9)
    torch.manual_seed(0)
    with ml.Recorder(model) as recorder:
        output = model.generate(
            row[None], max_new_tokens=6, do_sample=True, num_return_sequences=many, eos_token_id=None
        )
    assert_rows(model, recorder.trace(), output[:, :-1].tolist(), [9] * many)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}])
def test_a_positional_config_is_refused_as_by_keyword(model, options):
    config = GenerationConfig(max_new_tokens=6, do_sample=False, **options)
    with refused(RecordingError, "generate"), ml.Recorder(model):
        model.generate(texts(9)[0][None], config)


@pytest.mark.parametrize(
    "options", [{"guidance_scale": 1.5}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2, "do_sample": True}]
)
def test_what_was_recorded_before_a_refusal_is_kept(model, options):
    row, other = texts(9, 7)
    with torch.no_grad(), ml.Recorder(model) as recorder:
        model(row[None])
        with refused(RecordingError, "generate"):
            model.generate(other[None], max_new_tokens=6, eos_token_id=None, **options)
    assert_rows(model, recorder.trace(), [row], [9])


def healing(model, input_ids, **options):
    """Reads the prompt once for itself, then generates: as token healing does."""
    model.generate(input_ids, max_new_tokens=1, do_sample=False)
    return model.generate(input_ids, **options)


def own_sampling(model, input_ids, logits_processor, stopping_criteria, generation_config, **options):
    """A decoding loop that never asks its stopping criteria."""
    cache = DynamicCache(config=model.config)
    for _ in range(3):
        logits = model(input_ids=input_ids[:, cache.get_seq_length() :], past_key_values=cache).logits
        input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
    return input_ids


def speculating(model, input_ids, logits_processor, stopping_criteria, generation_config, **options):
    """Reads guesses, then takes them back."""
    cache = DynamicCache(config=model.config)
    model(input_ids=input_ids, past_key_values=cache)
    stopping_criteria(torch.cat([input_ids, input_ids[:, :1]], 1), None)
    model(input_ids=input_ids[:, :3], past_key_values=cache)
    return input_ids


@pytest.mark.parametrize("loop", [own_sampling, speculating])
def test_a_way_of_generating_not_yet_invented_is_refused_by_what_it_does(model, loop):
    with torch.no_grad(), ml.Recorder(model) as recorder:
        model(texts(5)[0][None])
        with pytest.raises(RecordingError):
            model.generate(texts(7)[0][None], max_new_tokens=3, custom_generate=loop)
    assert recorder.trace().sequences["length"].tolist() == [5]


def test_a_prompt_that_is_read_twice_in_one_generate_is_refused(model):
    def twice(model, input_ids, **options):
        healing(model, input_ids, max_new_tokens=2, do_sample=False)
        return input_ids

    with refused(RecordingError, "generate"), ml.Recorder(model):
        model.generate(texts(7)[0][None], max_new_tokens=3, custom_generate=twice)


# ---------------------------------------------------------------------- streams and columns


def test_decodes_in_turns_are_told_apart_by_their_caches(model):
    first, second = texts(6, 6)
    with torch.no_grad(), ml.Recorder(model) as recorder:
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for row, cache in zip((first, second), caches, strict=True):
            model(row[None, :5], past_key_values=cache)
        for row, cache in zip((first, second), caches, strict=True):
            model(row[None, 5:], past_key_values=cache)
    assert_rows(model, recorder.trace(), [first, second], [5, 5])


def test_compiled_decodes_in_turns_are_told_apart_by_their_keys(model):
    first, second = texts(6, 6)
    with torch.no_grad(), ml.CompiledRecorder(model, tokens=20) as recorder:
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for row, cache in zip((first, second), caches, strict=True):
            model(input_ids=row[None, :5], past_key_values=cache)
        for row, cache in zip((first, second), caches, strict=True):
            model(input_ids=row[None, 5:], past_key_values=cache)
    assert_rows(model, recorder.trace(), [first, second], [5, 5])


@pytest.mark.parametrize("recorder", [ml.Recorder, lambda model: ml.CompiledRecorder(model, tokens=40)])
def test_rows_that_were_reordered_or_taken_back_are_refused(model, recorder):
    rows = torch.stack(texts(5, 5))
    for change in (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), lambda cache: cache.crop(-2)):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), refused(RecordingError, "past_key_values"), recorder(model) as recording:
            model(input_ids=rows, attention_mask=torch.ones_like(rows), past_key_values=cache)
            change(cache)
            mask = torch.ones(2, cache.get_seq_length() + 1, dtype=torch.long)
            model(input_ids=rows[:, :1], attention_mask=mask, past_key_values=cache)
            recording.trace()


@pytest.mark.parametrize("copied", [False, True])
def test_a_cache_filled_before_counts_no_padding(model, copied):
    rows = texts(5, 9)
    batch = left_padded(rows)
    more = torch.tensor([[9, 3], [8, 4]])
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    cache = copy.deepcopy(cache) if copied else cache
    with ml.Recorder(model) as recorder:
        model.generate(
            torch.cat([batch["input_ids"], more], 1),
            attention_mask=torch.cat([batch["attention_mask"], torch.ones_like(more)], 1),
            **{CACHE: cache},
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
        )
    assert recorder.trace().read("position").tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert recorder.trace().read("phase").tolist() == [0, 0, 1, 1] * 2


@pytest.mark.parametrize("how", ["position ids", "mask of blocks"])
def test_documents_packed_into_a_row_are_sequences_of_their_own(model, how):
    rows = texts(5, 17, 9)
    ids = torch.cat(rows)[None]
    with torch.no_grad(), ml.Recorder(model) as recorder:
        if how == "position ids":
            model(ids, position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None], use_cache=False)
        else:
            blocks = [torch.ones(len(row), len(row), dtype=torch.bool).tril() for row in rows]
            model(ids, attention_mask=torch.block_diag(*blocks).bool()[None, None])
    trace = recorder.trace()
    assert_rows(model, trace, rows, [5, 17, 9])
    assert np.isnan(trace.read("logprob")[[0, 5, 22]]).all()


def test_a_mask_that_forgets_the_padding_it_began_with_is_refused(model):
    batch, cache = left_padded(texts(3, 6)), DynamicCache(config=model.config)
    with torch.no_grad(), refused(RecordingError, "attention_mask"), ml.Recorder(model):
        model(**batch, past_key_values=cache)
        model(torch.tensor([[5], [6]]), past_key_values=cache)


@pytest.mark.parametrize("where", ["here", "another thread"])
def test_a_forward_that_reads_a_cache_of_its_own_is_refused_wherever_it_runs(model, where):
    """As continuous batching does: rows of several requests in one, keys in a cache that the mask says nothing of."""
    rows = texts(5, 9)
    paged = {"cache": DynamicCache(config=model.config), "read_index": [torch.arange(3)], "use_cache": False}

    def forward():
        with torch.no_grad(), pytest.raises(RecordingError):
            model(rows[1][None], **paged)

    recorder = ml.Recorder(model)
    with torch.no_grad(), pytest.raises(RecordingError) if where != "here" else contextlib.nullcontext(), recorder:
        model(rows[0][None])
        if where == "here":
            forward()
        else:
            thread = threading.Thread(target=forward)
            thread.start()
            thread.join()
    assert_rows(model, recorder.trace(), rows[:1], [5])


@pytest.mark.parametrize("same", [True, False])
def test_padding_that_nothing_tells_is_refused_unless_rows_are_one(model, same):
    rows = texts(5, 5) if not same else texts(5) * 2
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2, "eos_token_id": 2}
    if same:
        with ml.Recorder(model) as recorder:
            model.generate(torch.stack(rows), **options)
        assert len(recorder.trace().sequences) == 2
    else:
        with refused(RecordingError, "attention_mask", 2), ml.Recorder(model):
            model.generate(torch.stack(rows), **options)


@pytest.mark.parametrize("keep", [5, torch.arange(0, 17, 2), torch.tensor([3])])
def test_logits_of_some_columns_score_those_columns(model, keep):
    (row,) = texts(17)
    with torch.no_grad():
        logp = torch.log_softmax(model(row[None]).logits[0], -1)
    true = np.append(np.nan, logp[:-1].gather(1, row[1:, None])[:, 0])
    with torch.no_grad(), ml.Recorder(model, signals=["logprob"]) as recorder:
        model(row[None], logits_to_keep=keep)
    said = recorder.trace().read("logprob")
    known = np.arange(17)[-keep:] if isinstance(keep, int) else keep.numpy()
    scored = known[known + 1 < 17] + 1
    assert np.flatnonzero(~np.isnan(said)).tolist() == scored.tolist()
    np.testing.assert_allclose(said[scored], true[scored], atol=1e-4)


def test_tokens_without_an_id_are_left_out_of_statistics_of_tokens(model):
    ids = torch.arange(5, 20)[None]
    embeds = model.model.embed_tokens(ids).detach()
    with torch.no_grad(), ml.Recorder(model) as recorder:
        model(inputs_embeds=embeds)
    with refused(MissingSignal, "token_id"):
        ml.stats.vocabulary_specialization(recorder.trace(), min_count=1)
    with ml.Recorder(model) as mixed:
        model.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False, eos_token_id=None)
    found = ml.stats.vocabulary_specialization(mixed.trace(), min_count=1)
    assert int(found["n"].max()) <= 5


# ---------------------------------------------------------------------- modules that are not where they sat


@pytest.mark.parametrize("how", ["model", "layers", "torch.compile"])
def test_a_model_that_was_compiled_and_has_run_is_recorded_and_edited(model, how):
    (row,) = texts(17)
    torch._dynamo.reset()
    call = model
    if how == "model":
        model.compile(backend="eager")
    elif how == "layers":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    else:
        call = torch.compile(model, backend="eager")
    plain = tiny_mixtral(num_hidden_layers=2)
    with torch.no_grad():
        call(row[None])
        with ml.edit(plain, ml.edits.forbid(1, 3)):
            expected = plain(row[None]).logits
        with ml.edit(call, ml.edits.forbid(1, 3)), ml.Recorder(call) as recorder:
            found = call(row[None]).logits
    torch.testing.assert_close(found, expected)
    assert recorder.trace().n_tokens == 17
    torch._dynamo.reset()


def test_a_gate_that_was_replaced_inside_the_block_is_named(model):
    with torch.no_grad(), refused(RecordingError, "expert_id", [1]), ml.Recorder(model):
        model(texts(4)[0][None])
        model.model.layers[1].mlp.gate = copy.deepcopy(model.model.layers[0].mlp.gate)
        model.model.layers[1].mlp.gate._forward_hooks.clear()
        model(texts(4)[0][None])


@pytest.mark.skipif(CACHE == "cache", reason="peft 0.21 finds no cache by its new name")
def test_learned_tokens_before_the_prompt_are_prompt(model):
    (row,) = texts(30)
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with ml.Recorder(tuned) as recorder:
        tuned.generate(
            input_ids=row[None],
            attention_mask=torch.ones(1, 30, dtype=torch.long),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
        )
    assert np.bincount(recorder.trace().read("phase")).tolist() == [34, 3]
    with refused(ModelError, "model"):
        ml.record(tuned, ["a"], tokenizer=Letters(), settings=QUIET)


@pytest.mark.parametrize("target", ["experts", "router"])
def test_adapters_on_experts_and_routers_are_recorded_as_the_merged_model(model, target):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if target == "experts" else ["mlp.gate.weight"]
    config = LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj"], target_parameters=names, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config).eval()
    signals = ["router_logits", ml.Site("expert_out", dtype="float32")]
    found = ml.record(adapted, ["some text", "more"], tokenizer=Letters(), settings=QUIET, signals=signals)
    merged = adapted.merge_and_unload()
    expected = ml.record(merged, ["some text", "more"], tokenizer=Letters(), settings=QUIET, signals=signals)
    np.testing.assert_array_equal(found.read("expert_id"), expected.read("expert_id"))
    np.testing.assert_allclose(
        found.activations("expert_out").values, expected.activations("expert_out").values, atol=1e-4
    )


def test_routing_by_another_rule_is_recorded():
    config = OlmoeConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
    )
    olmoe, (row,) = OlmoeForCausalLM(config).eval(), texts(9)
    with torch.no_grad(), ml.Recorder(olmoe) as recorder:
        olmoe(row[None])
    np.testing.assert_array_equal(recorder.trace().read("expert_id"), routing_alone(olmoe, row))
    assert (recorder.trace().read("weight").sum(-1) < 0.99).any()


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("batch_tokens", [4, 4096])
def test_tokens_without_finite_weights_are_left_out_and_named(model, batch_tokens, tmp_path):
    class Words:
        name_or_path = "words"

        def __call__(self, text):
            return {"input_ids": [int(word) for word in text.split()]}

    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("inf")
    settings = ml.RecordSettings(progress=False, batch_tokens=batch_tokens)
    documents = ["9 8 10 11", "9 7 10 11", "12 13"]
    with pytest.warns(UserWarning, match="document 1"):
        trace = ml.record(model, documents, tokenizer=Words(), settings=settings, out=tmp_path / "run")
    assert trace.sequences["length"].tolist() == [4, 0, 2]
    assert trace.read("token_id").tolist() == [9, 8, 10, 11, 12, 13]
    assert [place[1] for place in trace.meta["left_out"]] == [0, 1, 2, 3]
    assert np.isfinite(trace.read("weight")).all()
    with torch.no_grad(), ml.Recorder(model) as recorder:
        model(torch.tensor([[9, 8, 10, 11]]))
        model(torch.tensor([[9, 7, 10, 11]]))
    with pytest.warns(UserWarning, match="sequence 1"):
        assert recorder.trace().n_tokens == 4


SPOILED = {
    "a middle expert": lambda model: model.model.layers[0].mlp.experts.down_proj[:],
    "the last experts": lambda model: model.model.layers[-1].mlp.experts.down_proj[:],
    "a router": lambda model: model.model.layers[0].mlp.gate.weight[2:3],
    "the head": lambda model: model.lm_head.weight[:],
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", SPOILED)
def test_a_model_that_computes_no_numbers_is_never_measured_without_a_word(model, where, value, tmp_path):
    with torch.no_grad():
        SPOILED[where](model).fill_(value)
    documents = ["One two.", "Three four five."]
    given = {"tokenizer": Letters(), "settings": QUIET}
    with pytest.warns(UserWarning, match="finite"):
        trace = ml.record(model, documents, **given)
    with pytest.warns(UserWarning, match="finite"):
        assert ml.record(model, documents, **given, out=tmp_path / "run").meta["unscored"] == trace.meta["unscored"]
    assert len(trace.meta["left_out"]) + trace.meta["unscored"] > 0
    with torch.no_grad(), ml.Recorder(model) as recorder:
        model(torch.arange(3, 9)[None])
    with pytest.warns(UserWarning, match="finite"):
        recorder.trace()
    measures = [ml.experiments.measure_topk, ml.experiments.measure_importance, ml.experiments.measure_contributions]
    for measure in measures:
        try:
            found = measure(model, documents, **given)
        except ModelError:
            continue
        sums = [found[name] for name in found if found[name].dtype.kind == "f"]
        assert any(not np.isfinite(one.values).all() for one in sums)


def test_router_logits_beyond_half_precision_stay_finite(model):
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.mul_(1e6)
    with torch.no_grad(), ml.Recorder(model) as recorder:
        model(texts(9)[0][None])
    logits = recorder.trace().read("router_logits")
    assert np.isfinite(logits).all()
    assert np.abs(logits[:, 0]).max() > 6e4


def test_gguf_files_and_adapters_are_told_what_they_are(tmp_path):
    gguf, adapter = tmp_path / "gguf", tmp_path / "adapter"
    gguf.mkdir()
    adapter.mkdir()
    (gguf / "m.Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(64))
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    for path, what in ((gguf / "m.Q4_K_M.gguf", "gguf"), (gguf, "gguf"), (adapter, "adapter")):
        with refused(ModelError, "model", what):
            ml.load(path)


FORWARD = {
    "vmap": lambda model, ids: torch.vmap(lambda row: model(row[None]).logits)(ids),
    "grad": lambda model, ids: torch.func.grad(lambda scale: (scale * model(ids).logits).sum())(torch.ones(())),
    "jvp": lambda model, ids: torch.func.jvp(
        lambda scale: scale * model(ids).logits, (torch.ones(()),), (torch.ones(()),)
    ),
    "export": lambda model, ids: torch.export.export(model, (ids,), strict=False),
}


@pytest.mark.parametrize("recorder", [ml.Recorder, partial(ml.CompiledRecorder, tokens=20)])
@pytest.mark.parametrize("transform", FORWARD)
def test_a_forward_whose_tensors_hold_no_values_is_refused_and_what_was_before_is_kept(model, transform, recorder):
    if transform == "export" and recorder is not ml.Recorder:
        pytest.skip("an export takes the hooks of a CompiledRecorder along")
    ids = torch.arange(3, 9)[None]
    with recorder(model) as recording:
        with torch.no_grad():
            model(ids)
        with pytest.raises(RecordingError) as found:
            FORWARD[transform](model, ids)
        trace = recording.trace()
    assert found.value.argument == "model"
    assert trace.read("token_id").tolist() == list(range(3, 9))


def test_an_edit_passes_gradients_of_torch_func_and_refuses_vmap(model):
    ids = torch.arange(3, 9)[None]
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    name = next(name for name in parameters if "layers.1" in name and "gate.weight" in name)

    def loss(gate):
        return torch.func.functional_call(model, {**parameters, name: gate}, (ids,)).logits.square().sum()

    with ml.edit(model, ml.edits.forbid(0, 1)):
        found = torch.func.grad(loss)(parameters[name])
        gate = parameters[name].clone().requires_grad_()
        loss(gate).backward()
        with pytest.raises(RecordingError):
            FORWARD["vmap"](model, ids)
    torch.testing.assert_close(found, gate.grad)


def test_a_criterion_of_the_caller_ends_rows_as_generate_does(model):
    class After:
        def __call__(self, input_ids, scores, **_):
            return torch.tensor([input_ids.shape[1] >= 8, False])

    rows = texts(5, 3)
    batch = left_padded(rows)
    with ml.Recorder(model) as recorder:
        output = model.generate(
            **batch,
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([After()]),
        )
    read = [[*rows[0].tolist(), *output[0, 5:8].tolist()], [*rows[1].tolist(), *output[1, 5:-1].tolist()]]
    assert_rows(model, recorder.trace(), read, [5, 3])


def test_a_refusal_is_a_bad_input():
    assert issubclass(RecordingError, BadInput)
