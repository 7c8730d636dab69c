"""Every family with every verb that reads its weights or its layers: right by an oracle, or refused in words."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import CASES, REFUSED, VERBS, Case
from helpers.refusals import refused
from tiny import Letters

import mixlens as ml
from mixlens import BadInput, MixlensError
from mixlens.bench import local
from mixlens.bench.bytes_and_flops import sizes_of
from mixlens.bench.roofline import Machine, Measured
from mixlens.experiments import Ablation
from mixlens.models.families import FAMILIES
from mixlens.models.layout import moe_layers
from mixlens.models.quantization.linears import dequantized, scheme_of

IDS = torch.arange(3, 17).reshape(2, 7)
DOCUMENTS = ["abcdefg", "hijklm", "xyzabc and so on", "qqrst"]
QUIET = ml.RecordSettings(progress=False)
ONE = Measured(1.0, 1.0, 1.0, 2, "made up")
# Dense layers and groups; biases; states beside keys; a layout of its own.
QUICK = {"deepseek_v3", "gpt_oss", "qwen3_next", "llama4"}


@torch.no_grad()
def quantize(model: Any, folder: Path) -> None:
    """As the fused model whose weights are those that the quantized Linears compute with."""
    model.save_pretrained(folder)
    small = ml.load(folder, quantization="nf4", verbose=False)
    experts = ml.audit(small).table.query("kind == 'experts'")
    assert experts["scheme"].tolist() == ["nf4"]
    assert experts["bits_per_weight"].item() < 6
    plain = model(IDS).logits
    modules = dict(model.named_modules())
    for name, linear in small.named_modules():
        if not hasattr(linear, "in_features") or not scheme_of(linear).startswith("nf4"):
            continue
        weight = dequantized(linear).float()
        if name in modules:
            modules[name].weight.copy_(weight)
            continue
        block, expert, matrix = name.rsplit(".", 2)
        fused = modules[block]
        of_all = fused.down_proj if matrix == "w2" else fused.gate_up_proj if fused.has_gate else fused.up_proj
        rows = of_all[int(expert)].T if fused.is_transposed else of_all[int(expert)]
        if of_all is getattr(fused, "gate_up_proj", None):
            halves = rows.chunk(2) if fused.is_concatenated else (rows[::2], rows[1::2])
            rows = halves[0 if matrix == "w1" else 1]
        rows.copy_(weight)
    close(small(IDS).logits, model(IDS).logits)
    assert (plain - model(IDS).logits).abs().max() > 0.1


def benchmark(model: Any, _folder: Path) -> None:
    """Bytes are those of the parameters that are no experts, of the distinct experts chosen, and of the cache."""
    settings = ml.bench.LocalSettings(warmup=0, progress=False)
    work = ml.bench.Workload(prompt_tokens=16, output_tokens=3)
    bench = ml.benchmark(model, requests=1, workload=work, settings=settings)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    layers = moe_layers(model)
    experts = {id(p): p.numel() for layer in layers for p in layer.experts.parameters()}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in experts) - (0 if head is table else table.numel())
    events = bench.records[-1].events
    assert all(len(layers) * layers[0].top_k <= event.experts <= 8 * len(layers) for event in events)
    assert events[1].experts == len(layers) * layers[0].top_k  # one token
    with torch.no_grad():
        cache = model(torch.ones(1, 17, dtype=torch.long), use_cache=True).past_key_values
    kept = [
        sum(t.numel() for t in values)
        for one in cache.layers
        if (values := [t for own in vars(one).values() for t in (own.values() if isinstance(own, dict) else [own])
                       if isinstance(t, torch.Tensor) and t.ndim > 1])
    ]  # fmt: skip
    assert sizes_of(model).kept(17) == sum(kept)
    read = 4 * (dense + sum(experts.values()) / len(layers) / 8 * events[1].experts + sum(kept))
    assert events[1].read_bytes == pytest.approx(read, rel=2e-3)  # biases of the choice are no parameters


def losses(model: Any) -> np.ndarray:
    trace = ml.record(model, DOCUMENTS, tokenizer=Letters(), settings=QUIET)
    logprob, sequence = trace.read("logprob"), trace.read("sequence")
    return np.array([-np.nansum(logprob[sequence == number]) for number in range(len(DOCUMENTS))])


def importance(model: Any, _folder: Path) -> None:
    """As forwards under the same edit."""
    last = moe_layers(model)[-1].index
    ablation = Ablation(layers=last)
    found = ml.experiments.measure_importance(model, DOCUMENTS, ablation=ablation, tokenizer=Letters(), settings=QUIET)
    whole = losses(model)
    np.testing.assert_allclose(found.value, whole, rtol=1e-4)
    for expert in (1, 5):
        with ml.edit(model, ml.edits.ablate(last, expert)):
            change = losses(model) - whole
        np.testing.assert_allclose(found.change.sel(layer=last, expert=expert), change, atol=1e-3)


@torch.no_grad()
def contributions(model: Any, _folder: Path) -> None:
    """The contributions of a token's slots add up to that of what its experts put out together."""
    found = ml.experiments.measure_contributions(model, DOCUMENTS[:1], tokenizer=Letters(), settings=QUIET)
    layers = moe_layers(model)
    assert found.layer.values.tolist() == [layer.index for layer in layers]
    seen: dict[Any, torch.Tensor] = {}
    handles = [
        layer.experts.register_forward_hook(lambda _m, _a, output, of=layer.index: seen.update({of: output}))
        for layer in layers
    ]
    handles.append(
        model.model.norm.register_forward_hook(lambda _m, args, output: seen.update(before=args[0], after=output))
    )
    ids = torch.tensor([Letters()(DOCUMENTS[0])["input_ids"]])
    model(ids)
    for handle in handles:
        handle.remove()
    head = model.lm_head.weight
    for token in range(ids.shape[1] - 1):
        scale = seen["after"][0, token] / seen["before"][0, token]
        direction = scale * (head[ids[0, token + 1]] - head.mean(0))
        for layer in layers:
            together = seen[layer.index].reshape(-1, len(direction))[token] @ direction
            close(torch.tensor(found.logit.sel(layer=layer.index).values[token].sum()), together, 2e-3)


def outputs(model: Any, _folder: Path) -> None:
    """Means over the tokens that a recording of the same outputs shows."""
    found = ml.experiments.expert_outputs(model, DOCUMENTS, tokenizer=Letters(), settings=QUIET)
    signals = [ml.Site("expert_out", dtype="float32")]
    trace = ml.record(model, DOCUMENTS, signals=signals, tokenizer=Letters(), settings=QUIET)
    values, ids = trace.activations("expert_out").values, trace.read("expert_id")
    assert found.layer.values.tolist() == trace.layers.tolist()
    for place, layer in enumerate(trace.layers):
        for expert in (0, 3):
            chosen = ids[:, place] == expert
            assert found.n.sel(layer=layer, expert=expert) == chosen.sum()
            if chosen.any():
                mean = values[:, place][chosen].mean(0)
                np.testing.assert_allclose(found["mean"].sel(layer=layer, expert=expert), mean, rtol=1e-3, atol=1e-3)


def topk(model: Any, _folder: Path) -> None:
    """As forwards under the same edit, and without one for the model's own number."""
    found = ml.experiments.measure_topk(model, DOCUMENTS, ks=[1, 2], tokenizer=Letters(), settings=QUIET)
    assert found.layer.values.tolist() == [layer.index for layer in moe_layers(model)]
    np.testing.assert_allclose(found.loss.sel(k=2), losses(model), rtol=1e-4)
    with ml.edit(model, ml.edits.top_k(1)):
        np.testing.assert_allclose(found.loss.sel(k=1), losses(model), rtol=1e-4)


@torch.no_grad()
def impact(model: Any, _folder: Path) -> None:
    """The losses of both models are those of recordings, and only the layer that differs has errors in its weights."""
    other = copy.deepcopy(model)
    changed = moe_layers(other)[-1]
    for name, values in changed.experts.named_parameters():
        values.mul_(1.1 if name == "down_proj" else 1.0)
    found = ml.experiments.measure_impact(model, other, DOCUMENTS, tokenizer=Letters(), settings=QUIET)
    sums = found.sums
    assert sums.layer.values.tolist() == [layer.index for layer in moe_layers(model)]
    np.testing.assert_allclose(sums.loss.values[:, 0], losses(model), rtol=1e-4)
    np.testing.assert_allclose(sums.loss.values[:, 1], losses(other), rtol=1e-4)
    error = sums.error.sum(("document", "expert")) / sums["size"].sum(("document", "expert"))
    biased = getattr(changed.experts, "has_bias", False)
    np.testing.assert_allclose(error.sel(layer=changed.index), 0.01, rtol=0.5 if biased else 1e-3)
    np.testing.assert_allclose(error.values[:-1], 0, atol=1e-9)


def similarity(model: Any, _folder: Path) -> None:
    """Cosines of the experts' last matrices, and of the rows of the matrix that makes router logits."""
    found = ml.experiments.measure_similarity(model)
    for layer in moe_layers(model):
        router = next(p for p in layer.gate.parameters() if p.ndim == 2)
        for cosines, rows in (
            (found.cosine.sel(layer=layer.index, matrix="w2"), layer.experts.down_proj.flatten(1)),
            (found.router_cosine.sel(layer=layer.index), router),
        ):
            unit = torch.nn.functional.normalize(rows.detach().double(), dim=1)
            np.testing.assert_allclose(cosines, unit @ unit.T, atol=1e-5)


@torch.no_grad()
def compiled(model: Any, _folder: Path) -> None:
    """A CompiledRecorder sees of a generation what a Recorder sees."""
    traces = []
    for make in (lambda: ml.CompiledRecorder(model, tokens=64), lambda: ml.Recorder(model)):
        with make() as recorder:
            mask = torch.ones_like(IDS)
            model.generate(IDS, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
        traces.append(recorder.trace())
    for name in ("expert_id", "token_id", "position", "phase"):
        np.testing.assert_array_equal(traces[0].read(name), traces[1].read(name))


def views(model: Any, folder: Path) -> None:
    """Figures, and a report, of layers by the model's own numbers."""
    documents = [{"text": text, "domain": text[0]} for text in DOCUMENTS]
    trace = ml.record(model, documents, tokenizer=Letters(), settings=QUIET)
    share = ml.stats.expert_share(trace, by="domain")
    assert share.layer.values.tolist() == [layer.index for layer in moe_layers(model)]
    assert ml.show.expert_share(share) is not None
    assert "<img" in ml.view.tokens(trace, sequence=1).static
    if trace.layers[-1] >= trace.n_layers:  # beside dense layers, which a report has to leave out
        ml.report(trace, folder / "report.html")
        assert (folder / "report.html").stat().st_size > 10_000


def close(found: torch.Tensor, expected: torch.Tensor, slack: float = 2e-4) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=slack, atol=slack)


OF_VERB: dict[str, Callable[[Any, Path], None]] = {
    verb.__name__: verb
    for verb in (
        quantize, benchmark, importance, contributions, outputs, topk, impact, similarity, compiled, views,
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "verb"),
    [
        pytest.param(case, verb, marks=[] if case.name in QUICK and verb != "views" else pytest.mark.slow)
        for case in CASES
        for verb in OF_VERB
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_family_and_a_verb(case: Case, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "measure", lambda *_args, **_options: Machine("made up", ONE, ONE))
    model = case.model()
    if case.name in REFUSED.get(verb, ()):
        with pytest.raises(MixlensError):
            OF_VERB[verb](model, tmp_path)
    else:
        OF_VERB[verb](model, tmp_path)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [({"experts": "nope"}, "nope"), ({"router": "int8wo"}, "router"), ({"*.none": "nf4"}, "*.none")],
)
def test_a_scheme_that_a_family_cannot_have_is_refused_by_name(quantization, named, tmp_path):
    next(case for case in CASES if case.name == "qwen2_moe").model().save_pretrained(tmp_path)
    with refused(BadInput, "quantization", named):
        ml.load(tmp_path, quantization=quantization, verbose=False)


def test_the_table_has_the_verbs_that_are_tested():
    assert set(VERBS) <= set(OF_VERB)
    assert set(REFUSED) <= set(OF_VERB)


@pytest.mark.parametrize("verb", OF_VERB)
@pytest.mark.slow
def test_a_family_that_is_not_in_the_table_has_what_needs_no_rule(verb, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "measure", lambda *_args, **_options: Machine("made up", ONE, ONE))
    monkeypatch.delitem(FAMILIES, "olmoe")
    model = next(case for case in CASES if case.name == "olmoe").model()
    if verb in ("importance", "contributions", "topk", "impact"):
        with pytest.raises(MixlensError):
            OF_VERB[verb](model, tmp_path)
    else:
        OF_VERB[verb](model, tmp_path)
