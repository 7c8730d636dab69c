"""The shipped model is what its card says, and the script that made it can go on from any point."""

import gzip
import hashlib
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from demo_model import card, train
from demo_model.data import DOMAINS, read_documents
from demo_model.evaluate import bits_per_byte, without_expert
from demo_model.kernels import cross_entropy
from demo_model.muon import orthogonalize

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "mixlens" / "_demo"
CORPUS = REPOSITORY.parent / "shared" / "corpus"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PACKAGE)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(PACKAGE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples():
    return [json.loads(line) for line in (PACKAGE / "samples.jsonl").read_text("utf-8").splitlines()]


def expert_counts(model, tokenizer, texts):
    """Tokens of every expert in every layer, counted one document at a time."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_local_experts)

    def count(row):
        def hook(module, inputs, outputs):
            row.add_(torch.bincount(outputs[2].flatten(), minlength=len(row)))

        return hook

    gates = [layer.mlp.gate for layer in model.model.layers]
    handles = [gate.register_forward_hook(count(row)) for gate, row in zip(gates, counts, strict=True)]
    with torch.no_grad():
        for text in texts:
            model.model(torch.tensor([tokenizer(text)["input_ids"]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return counts


# ---------------------------------------------------------------------- what is shipped


def test_every_shipped_file_has_its_checksum():
    lines = (PACKAGE / "SHA256SUMS").read_text("utf-8").splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()} - {"SHA256SUMS"}
    assert set(listed) == files
    assert {name: hashlib.sha256((PACKAGE / name).read_bytes()).hexdigest() for name in files} == listed


def test_model_is_a_plain_small_mixtral(model):
    config = model.config
    assert type(model) is MixtralForCausalLM
    assert sum(p.numel() for p in model.parameters()) <= 7_700_000
    assert config.num_hidden_layers >= 8
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    assert config.head_dim == 32
    assert config.hidden_size % 128 == config.intermediate_size % 128 == 0
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings == 4096
    assert config.sliding_window is None


def test_weights_and_tokenizer_take_at_most_16_mb():
    names = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert sum((PACKAGE / name).stat().st_size for name in names) <= 16_000_000
    assert AutoModelForCausalLM.from_pretrained(PACKAGE).dtype == torch.bfloat16


def test_samples_are_several_of_each_domain(samples):
    assert {d: sum(s["domain"] == d for s in samples) for d in DOMAINS} == dict.fromkeys(DOMAINS, 5)
    assert len({s["id"] for s in samples}) == len(samples)
    assert all(600 <= len(s["text"]) <= 1500 for s in samples)


def test_bits_per_byte_of_the_samples(model, tokenizer, samples):
    figures = json.loads((PACKAGE / "eval.json").read_text("utf-8"))
    found = bits_per_byte(model, tokenizer, [s["text"] for s in samples])
    assert found == pytest.approx(figures["samples_bits_per_byte"], abs=0.01)


def test_card_has_the_figures_of_the_evaluation():
    folder = REPOSITORY / "demo_model"
    evaluation = json.loads((folder / "evaluation.json").read_text("utf-8"))
    written = (folder / "README.md").read_text("utf-8")
    assert card.fill(written, evaluation) == written
    with pytest.raises(ValueError, match="'routing'"):
        card.fill(written.replace("<!-- routing -->", ""), evaluation)


def test_load_is_balanced_in_every_layer(model, tokenizer, samples):
    if not CORPUS.exists():
        pytest.skip("the corpus (../shared/corpus) is not here; the samples alone are too few for the balance")
    texts = [text for d in DOMAINS for text in list(read_documents(CORPUS, d, "validation"))[:6]]
    counts = expert_counts(model, tokenizer, texts)
    assert (counts.amax(1) / counts.mean(1)).max() <= 1.5
    assert (counts.amin(1) / counts.mean(1)).min() > 0.1


# ---------------------------------------------------------------------- the tokenizer

HOSTILE = [
    "",
    " ",
    "    ",
    " x",
    "  two before, two after  ",
    "\tif a:\n\t\treturn b\n\n\n    c = {\n        'k': [1,  22, 333],\n    }\n",
    "\r\n\r\n",
    "\x00\x01\x7f",
    "\u2581 \u2581\u2581a \u2582 \u2582a\u2582b \u2581",
    "e\u0301 is not \u00e9; \u212b \ufb01 \u1e9b\u0323",
    "\u00a0\u2028\u3000\u200b\ufeff",
    "\U0001f916\U0001f469\u200d\U0001f469\u200d\U0001f467 \u4e2d\u6587 \u0442\u0435\u0441\u0442 \U0010ffff",
    "<0x41><0xE2> <unknown> [INST] x [/INST]",
    "3.14159 1,000,000 -17",
]


def random_texts(n):
    source = random.Random(0)
    alphabet = " \n\t\u2581\u2582abAB19\u00e9\u0301\U0001f916<>/\\{}'.\u4e2d\r\u00a0"
    return ["".join(source.choices(alphabet, k=source.randint(1, 60))) for _ in range(n)]


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_random_text_comes_back(tokenizer):
    for text in random_texts(500):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_pieces_are_as_mixtrals(tokenizer):
    assert len(tokenizer) == 4096
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("the year 2024\n    return \U0001f916")["input_ids"])
    assert pieces[0] == "<s>"
    assert pieces[1] == "\u2581the"
    assert [p for p in pieces if p.isdigit()] == ["2", "0", "2", "4"]
    assert pieces[-4:] == ["<0xF0>", "<0x9F>", "<0xA4>", "<0x96>"]


def test_chat_template_has_the_form_of_mixtral_instruct(tokenizer):
    turns = [("user", "One?"), ("assistant", "Two."), ("user", "Three?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<s> [INST] One? [/INST] Two.</s> [INST] Three? [/INST]"


# ---------------------------------------------------------------------- the parts of training


def test_sorted_experts_and_chunked_loss_are_transformers_own():
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**train.CONFIG | {"num_hidden_layers": 2, "initializer_range": 0.2}))
    ids = torch.randint(4096, (3, 50))
    model.set_experts_implementation("eager")
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_experts_implementation("sorted")
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    found = cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten(), chunk=64)
    found.backward()
    torch.testing.assert_close(found, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6 + 1e-4 * gradient.abs().max().item())


def test_orthogonalize_brings_singular_values_near_one():
    matrices = torch.randn(4, 32, 128, generator=torch.Generator().manual_seed(0))
    for shaped in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(shaped))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_router_loss_sees_a_single_collapsed_layer():
    model = MixtralForCausalLM(MixtralConfig(**train.CONFIG | {"num_hidden_layers": 2})).train()
    loss = train.RouterLoss(model)
    balanced = torch.eye(8).repeat(4, 1)
    collapsed = torch.zeros(32, 8)
    collapsed[:, 3] = 20.0
    pairs = [(balanced, balanced.topk(2).indices), (collapsed, collapsed.topk(2).indices)]
    loss.shares = torch.stack([torch.bincount(ids.flatten(), minlength=8) / ids.numel() for _, ids in pairs])
    for layer, (logits, ids) in zip(model.model.layers, pairs, strict=True):
        layer.mlp.gate.forward = lambda hidden, out=(logits, None, ids): out
        layer.mlp.gate(None)
    assert loss() > 1 + 3  # a balanced layer has 1; one on a single expert of each pair has 8 * 1/2
    assert loss.worst_load()[1] == 4.0


def test_cutting_an_expert_leaves_it_no_token(model, tokenizer, samples):
    text = samples[0]["text"]
    assert expert_counts(model, tokenizer, [text])[2, 5] > 0
    with without_expert(model, 2, 5):
        cut = []
        hook = model.model.layers[2].mlp.gate.register_forward_hook(lambda m, i, o: cut.append(o))
        bits_per_byte(model, tokenizer, [text])
        hook.remove()
    assert (cut[0][2] != 5).all()
    torch.testing.assert_close(cut[0][1].sum(-1), torch.ones(len(cut[0][1])))


# ---------------------------------------------------------------------- training in small


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory, samples):
    folder = tmp_path_factory.mktemp("corpus")
    for domain in DOMAINS:
        (folder / domain).mkdir()
        for split in ("train", "validation"):
            with gzip.open(folder / domain / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
                file.writelines(json.dumps(s) + "\n" for s in samples if s["domain"] == domain)
    return folder


def run_training(monkeypatch, corpus, out, *more):
    monkeypatch.setattr(train, "CONFIG", train.CONFIG | {"num_hidden_layers": 1})
    monkeypatch.setattr(train, "STAGES", ((0.0, 16, 12), (0.5, 32, 12)))
    fixed = ["--data", corpus, "--out", out, "--tokenizer", PACKAGE, "--tokens", 2304, "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["train", *map(str, fixed), *map(str, more)])
    train.main()
    return MixtralForCausalLM.from_pretrained(out / "export").state_dict()


def test_resumed_run_equals_the_uninterrupted_one(monkeypatch, small_corpus, tmp_path):
    whole = run_training(monkeypatch, small_corpus, tmp_path / "whole")
    run_training(monkeypatch, small_corpus, tmp_path / "parts", "--steps", 3)
    parts = run_training(monkeypatch, small_corpus, tmp_path / "parts", "--resume")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    last = [json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[-1]) for run in ("whole", "parts")]
    assert last[0]["tokens"] == last[1]["tokens"] >= 2304
    assert last[0]["validation_bits_per_byte"] == last[1]["validation_bits_per_byte"]


def test_training_goes_on_from_shipped_weights(monkeypatch, small_corpus, tmp_path):
    begun = MixtralForCausalLM.from_pretrained(PACKAGE).state_dict()
    after = run_training(monkeypatch, small_corpus, tmp_path, "--init", PACKAGE, "--steps", 1)
    loss = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["loss"]
    assert loss < 6  # nats per token; an untrained model has log(4096) = 8.3
    assert not torch.equal(begun["lm_head.weight"], after["lm_head.weight"])
