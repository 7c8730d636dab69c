"""Recording, edits, compiled decode and benchmarks on a CUDA device, against the model run bare. Run by `make gpu`."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import mixlens as ml
from mixlens.models.demo import demo_path
from mixlens.models.layout import moe_layers

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]
# Rounding differs between batch shapes: choices are compared where the margin of the router's logits exceeds this.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.25}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request):
    return ml.load("demo", device_map=DEVICE, dtype=request.param, verbose=False)


@pytest.fixture(scope="module")
def documents():
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(demo_path() / "tokenizer.json"))
    texts = [document["text"] for document in ml.demo_documents()[:8]]
    return [tokenizer(text)["input_ids"][:200] for text in texts]


def bare(model, tokens):
    """Ids, weights and logits of every layer of one document, read from the routers by plain hooks."""
    seen = {}
    handles = [
        layer.gate.register_forward_hook(lambda _m, _a, out, index=index: seen.__setitem__(index, out))
        for index, layer in enumerate(moe_layers(model))
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([tokens], device=DEVICE))
    finally:
        for handle in handles:
            handle.remove()
    logits, weights, ids = (
        torch.stack([seen[index][part] for index in sorted(seen)], 1).float().cpu().numpy() for part in range(3)
    )
    return logits, weights, ids.astype(int)


def clear(logits, k, rounding):
    """Where the k-th choice leads the next by more than rounding can turn."""
    ordered = np.sort(logits, -1)[..., ::-1]
    return (ordered[..., k - 1] - ordered[..., k]) > rounding


def test_a_padded_batch_records_what_bare_hooks_see_of_each_document_alone(model, documents):
    width = max(map(len, documents))
    ids = torch.zeros(len(documents), width, dtype=torch.long, device=DEVICE)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(documents):
        ids[row, width - len(tokens) :] = torch.tensor(tokens, device=DEVICE)
        mask[row, width - len(tokens) :] = 1
    with ml.Recorder(model, signals=("router_logits",)) as recorder, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    trace = recorder.trace()
    assert trace.n_tokens == sum(map(len, documents))
    assert trace.read("token_id").tolist() == [token for tokens in documents for token in tokens]
    truth = [bare(model, tokens) for tokens in documents]
    logits, weights, chosen = (np.concatenate([one[part] for one in truth]) for part in range(3))
    sure = clear(logits, chosen.shape[-1], ROUNDING[model.dtype])
    assert sure.mean() > 0.5
    recorded = np.sort(trace.read("expert_id").astype(int), -1)
    np.testing.assert_array_equal(recorded[sure], np.sort(chosen, -1)[sure])
    if model.dtype == torch.float32:
        np.testing.assert_allclose(np.sort(trace.read("weight"), -1)[sure], np.sort(weights, -1)[sure], atol=1e-3)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_recording_leaves_logits_bit_for_bit(model, documents, experts):
    before = model.config._experts_implementation
    ids = torch.tensor([documents[0][:64], documents[1][:64]], device=DEVICE)
    try:
        model.set_experts_implementation(experts)
        with torch.no_grad():
            plain = model(input_ids=ids).logits
            with ml.Recorder(model, lengths=[64, 64]):
                recorded = model(input_ids=ids).logits
            again = model(input_ids=ids).logits
    finally:
        model.set_experts_implementation(before)
    assert torch.equal(plain, recorded)
    assert torch.equal(plain, again)


def test_a_compiled_decode_records_what_an_eager_one_does_and_writes_the_same_tokens(model, documents):
    ids = torch.tensor([documents[2][:48]], device=DEVICE)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "cache_implementation": "static"}

    def generate(recorder):
        torch.compiler.reset()
        with recorder as entered:
            return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options), entered

    plain, _ = generate(nullcontext())
    compiled, recorder = generate(ml.CompiledRecorder(model, tokens=128))
    assert torch.equal(plain, compiled)
    trace = recorder.trace()
    assert trace.read("token_id").tolist() == compiled[0, :-1].tolist()
    logits, _, chosen = bare(model, compiled[0, :-1].tolist())
    sure = clear(logits, chosen.shape[-1], ROUNDING[model.dtype])
    recorded = np.sort(trace.read("expert_id").astype(int), -1)
    np.testing.assert_array_equal(recorded[sure], np.sort(chosen, -1)[sure])


def test_an_expert_that_is_forbidden_is_never_chosen(model, documents):
    ids = torch.tensor([documents[3][:100]], device=DEVICE)
    with ml.edit(model, ml.edits.forbid([1], [3])), ml.Recorder(model) as recorder, torch.no_grad():
        model(input_ids=ids)
    chosen = recorder.trace().read("expert_id")
    assert 3 not in chosen[:, 1]
    assert 3 in bare(model, documents[3][:100])[2][:, 1]


def test_layers_on_the_card_and_in_memory_record_as_on_the_card(documents):
    whole = ml.load("demo", device_map=DEVICE, dtype="float32", verbose=False)
    n = whole.config.num_hidden_layers
    places = {"model.embed_tokens": DEVICE, "model.rotary_emb": DEVICE, "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": DEVICE if layer < n // 2 else "cpu" for layer in range(n)}
    split = ml.load("demo", device_map=places, dtype="float32", verbose=False)
    with ml.Recorder(split) as recorder, torch.no_grad():
        split(input_ids=torch.tensor([documents[4]], device=DEVICE))
    logits, _, chosen = bare(whole, documents[4])
    sure = clear(logits, chosen.shape[-1], ROUNDING[torch.float32])
    recorded = np.sort(recorder.trace().read("expert_id").astype(int), -1)
    np.testing.assert_array_equal(recorded[sure], np.sort(chosen, -1)[sure])


def test_a_benchmark_knows_the_card_its_memory_and_its_roof(model):
    settings = ml.bench.LocalSettings(progress=False, warmup=1)
    bench = ml.benchmark(model, concurrency=2, requests=3, workload=ml.bench.Workload(32, 8), settings=settings)
    assert bench.succeeded == 3
    assert bench.meta["machine"]["name"] == torch.cuda.get_device_name()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = bench.peak_memory()
    assert (memory["memory"] == "peak_vram_bytes").all()
    assert (memory["bytes"] >= weights).all()
    roofline = bench.roofline()
    shares = roofline[roofline["metric"].str.endswith("_frac")]["estimate"]
    assert len(shares)
    assert shares.between(0, 1.2).all()
