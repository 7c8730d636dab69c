"""Expert outputs, contributions and the top-k sweep against sums written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from helpers.refusals import refused
from tiny import Letters, tiny_mixtral

import mixlens as ml
from mixlens import BadInput, RecordSettings, RunError
from mixlens.models.quantization.linears import dequantized, quantize_linear
from mixlens.models.quantization.schemes import parse_scheme
from mixlens.stats import super_experts

DOCUMENTS = [
    {"id": "a", "domain": "code", "text": "def f(x): return x"},
    {"id": "b", "domain": "prose", "text": "It was night."},
    {"id": "c", "domain": "code", "text": "x = 1"},
    {"id": "d", "domain": "prose", "text": "Rain"},
]
QUIET = RecordSettings(progress=False, batch_tokens=32)


@pytest.fixture(scope="module")
def net():
    return tiny_mixtral()


def seen_by_hand(model, text: str):
    """ids, per-layer (expert ids, weights, moe inputs), attention outputs, embedding, last residual and logits."""
    ids = torch.tensor([Letters()(text)["input_ids"]])
    gates, attention, residual, moe_in = [], [], [], []
    handles = []
    for layer in model.model.layers:
        handles.append(layer.mlp.gate.register_forward_hook(lambda _m, _a, out: gates.append(out)))
        handles.append(layer.self_attn.register_forward_hook(lambda _m, _a, out: attention.append(out[0][0])))
        handles.append(layer.register_forward_hook(lambda _m, _a, out: residual.append(out[0])))
        handles.append(layer.mlp.register_forward_pre_hook(lambda _m, args: moe_in.append(args[0][0])))
    with torch.no_grad():
        logits = model(ids).logits[0]
        embedding = model.model.embed_tokens(ids)[0]
    for handle in handles:
        handle.remove()
    return ids[0], gates, attention, residual[-1], moe_in, embedding, logits


def expert_output(model, layer: int, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    experts = model.model.layers[layer].mlp.experts
    gate, up = (experts.gate_up_proj[expert].detach() @ hidden).chunk(2)
    return experts.down_proj[expert].detach() @ (torch.nn.functional.silu(gate) * up)


def test_outputs_of_experts(net):
    found = ml.experiments.expert_outputs(net, DOCUMENTS, tokenizer=Letters(), settings=QUIET)
    outputs: dict[tuple[int, int], list] = {}
    for document in DOCUMENTS:
        _, gates, _, _, moe_in, _, _ = seen_by_hand(net, document["text"])
        for layer, (_, weights, ids) in enumerate(gates):
            for t in range(len(ids)):
                for weight, expert in zip(weights[t].tolist(), ids[t].tolist(), strict=True):
                    outputs.setdefault((layer, expert), []).append(
                        (weight, expert_output(net, layer, expert, moe_in[layer][t]))
                    )
    for layer in range(4):
        for expert in range(8):
            cell, mine = found.sel(layer=layer, expert=expert), outputs.get((layer, expert), [])
            assert cell.n == len(mine)
            if not mine:
                assert np.isnan(cell["mean"]).all()
                assert np.isnan(cell.max_abs)
                continue
            values = torch.stack([value for _, value in mine])
            assert float(cell.max_abs) == pytest.approx(float(values.abs().max()), rel=1e-4)
            assert float(cell.norm) == pytest.approx(float(values.norm(dim=1).mean()), rel=1e-4)
            weighted = np.mean([weight * float(value.norm()) for weight, value in mine])
            assert float(cell.weighted_norm) == pytest.approx(weighted, rel=1e-4)
            np.testing.assert_allclose(cell["mean"], values.mean(0), atol=1e-5)


def test_means_fit_the_ablation_by_the_mean(net):
    means = ml.experiments.expert_outputs(net, DOCUMENTS, tokenizer=Letters(), settings=QUIET)["mean"]
    expert = int(np.flatnonzero(np.isfinite(means.sel(layer=2).values[:, 0]))[0])
    with torch.no_grad(), ml.edit(net, ml.edits.ablate(2, expert, how="mean", mean=means)):
        assert torch.isfinite(net(torch.tensor([[1, 5, 9]])).logits).all()
    ablation = ml.experiments.Ablation(how="mean", means=means.fillna(0), layers=[2])
    ml.experiments.measure_importance(net, DOCUMENTS, tokenizer=Letters(), settings=QUIET, ablation=ablation)


def test_contributions_with_attention_and_embedding_add_up_to_the_logit(net):
    found = ml.experiments.measure_contributions(net, DOCUMENTS, tokenizer=Letters(), settings=QUIET)
    rows = net.lm_head.weight.detach()
    for number, document in enumerate(DOCUMENTS):
        ids, gates, attention, last, moe_in, embedding, logits = seen_by_hand(net, document["text"])
        here = found.isel(token=np.flatnonzero(found.sequence.values == number))
        np.testing.assert_array_equal(here.token_id, ids)
        assert len(here.piece) == len(ids)
        assert np.isnan(here.logit.values[-1]).all()
        assert here.next_id.values[-1] == -1
        for t in range(len(ids) - 1):
            scale = net.model.norm.weight.detach() / torch.sqrt(last[t].pow(2).mean() + 1e-5)
            direction = scale * (rows[ids[t + 1]] - rows.mean(0))
            for layer, (_, weights, chosen) in enumerate(gates):
                for slot in range(2):
                    value = float(weights[t, slot]) * expert_output(net, layer, int(chosen[t, slot]), moe_in[layer][t])
                    cell = here.isel(token=t, layer=layer, slot=slot)
                    assert int(cell.expert_id) == int(chosen[t, slot])
                    assert float(cell.logit) == pytest.approx(float(value @ direction), abs=2e-4)
                    assert float(cell.norm) == pytest.approx(float(value.norm()), abs=2e-4)
            rest = sum(float(out[t] @ direction) for out in attention) + float(embedding[t] @ direction)
            whole = float(logits[t, ids[t + 1]] - logits[t].mean())
            assert float(here.logit.values[t].sum()) + rest == pytest.approx(whole, abs=1e-3)


@pytest.mark.parametrize("scheme", ["nf4", "int8", "int8wo", "hqq4-g32"])
def test_contributions_through_a_quantized_head_are_those_of_its_weights(scheme):
    held, plain = tiny_mixtral(), tiny_mixtral()
    asked = parse_scheme(scheme)
    held.lm_head = quantize_linear(plain.lm_head.weight.detach(), asked, torch.device("cpu"), torch.float32)
    plain.lm_head.weight.data = dequantized(held.lm_head).clone()
    found, wanted = (
        ml.experiments.measure_contributions(m, DOCUMENTS, tokenizer=Letters(), settings=QUIET) for m in (held, plain)
    )
    np.testing.assert_allclose(found.logit, wanted.logit, atol=1e-5)


@pytest.mark.parametrize("measure", ["logit", "norm"])
def test_contributions_of_experts_are_means_over_their_tokens(net, measure):
    found = ml.experiments.measure_contributions(net, DOCUMENTS, tokenizer=Letters(), settings=QUIET)
    data = ml.stats.expert_contribution(found, measure=measure, by="domain")
    assert data.estimate.dims == ("domain", "layer", "expert")
    for domain in ("code", "prose"):
        values: dict[tuple[int, int], list[float]] = {}
        peaks: dict[tuple[int, int], list[float]] = {}
        for t in np.flatnonzero(found.domain.values == domain):
            for layer in range(4):
                for slot in range(2):
                    cell = found.isel(token=t, layer=layer, slot=slot)
                    if np.isfinite(cell[measure]):
                        values.setdefault((layer, int(cell.expert_id)), []).append(float(cell[measure]))
                        peaks.setdefault((layer, int(cell.expert_id)), []).append(float(cell.peak))
        for layer in range(4):
            for expert in range(8):
                cell, mine = data.sel(domain=domain, layer=layer, expert=expert), values.get((layer, expert), [])
                assert cell.n == len(mine)
                if mine:
                    assert float(cell.estimate) == pytest.approx(np.mean(mine), rel=1e-5)
                    assert float(cell.max_abs) == pytest.approx(max(peaks[layer, expert]))
                else:
                    assert np.isnan(cell.estimate)
                    assert np.isnan(cell.max_abs)
    whole = ml.stats.expert_contribution(found, measure="norm")
    outputs = ml.experiments.expert_outputs(net, DOCUMENTS, tokenizer=Letters(), settings=QUIET)
    np.testing.assert_allclose(whole.max_abs, outputs.max_abs, rtol=1e-5)
    np.testing.assert_allclose(whole.estimate, outputs.weighted_norm, rtol=1e-4)
    with refused(BadInput, "measure", "size"):
        ml.stats.expert_contribution(found, measure="size")


@pytest.mark.parametrize("what", [ml.experiments.measure_contributions, ml.experiments.measure_topk])
def test_a_run_that_was_stopped_resumes_to_the_same_numbers(net, tmp_path, monkeypatch, what):
    small = RecordSettings(progress=False, shard_tokens=12)
    whole = what(net, DOCUMENTS, tokenizer=Letters(), settings=small, out=tmp_path / "whole")
    in_memory = what(net, DOCUMENTS, tokenizer=Letters(), settings=small)
    xr.testing.assert_identical(whole, in_memory)
    from mixlens.recording.reader import Reader

    calls, own = [], Reader.placed

    def stops(self, sequences):
        calls.append(len(sequences))
        if len(calls) == 10:
            raise KeyboardInterrupt
        return own(self, sequences)

    monkeypatch.setattr(Reader, "placed", stops)
    calls += [0] * 8 if what is ml.experiments.measure_contributions else []
    with pytest.raises(KeyboardInterrupt):
        what(net, DOCUMENTS, tokenizer=Letters(), settings=small, out=tmp_path / "stopped")
    with refused(RunError, "shards", 1):
        ml.open(tmp_path / "stopped")
    again = what(net, DOCUMENTS, tokenizer=Letters(), settings=small, out=tmp_path / "stopped")
    xr.testing.assert_identical(again, whole)
    xr.testing.assert_identical(ml.open(tmp_path / "stopped"), whole)
    with refused(RunError, "out", ["documents", "input_sha256"]):
        what(net, DOCUMENTS[:3], tokenizer=Letters(), settings=small, out=tmp_path / "whole")


def test_contributions_under_edits_are_of_what_the_model_then_used(net):
    with ml.edit(net, ml.edits.top_k(3), ml.edits.forbid(1, 2)):
        found = ml.experiments.measure_contributions(net, DOCUMENTS, tokenizer=Letters(), settings=QUIET)
    assert found.sizes["slot"] == 3
    assert not (found.expert_id.sel(layer=1) == 2).any()
    np.testing.assert_allclose(found.weight.sum("slot"), 1, atol=1e-5)
    with ml.edit(net, ml.edits.top_k(3, layers=1)), refused(BadInput, "top_k", [2, 3]):
        ml.experiments.measure_contributions(net, DOCUMENTS, tokenizer=Letters(), settings=QUIET)


def test_a_super_expert_is_found():
    sizes = np.random.default_rng(0).uniform(1, 2, (32, 8))
    sizes[1, 3] = 300
    found = super_experts(xr.Dataset({"max_abs": (("layer", "expert"), sizes)}))
    assert np.argwhere(found.is_super.values).tolist() == [[1, 3]]
    assert found.over_median.sel(layer=1, expert=3) > 100
    sizes[5, 2] = 20  # above the percentile, but below a tenth of the largest
    assert np.argwhere(
        super_experts(xr.Dataset({"max_abs": (("layer", "expert"), sizes)})).is_super.values
    ).tolist() == [[1, 3]]


def test_the_sweep_is_recording_at_every_k(net):
    data = ml.topk_sweep(net, DOCUMENTS, by="domain", ks=[1, 2, 8], tokenizer=Letters(), settings=QUIET)
    assert data.estimate.dims == ("domain", "k")
    losses = {}
    for k in (1, 2, 8):
        with ml.edit(net, ml.edits.top_k(k)):
            trace = ml.record(net, DOCUMENTS, tokenizer=Letters(), settings=QUIET)
        losses[k] = np.array([-np.nansum(trace.read("logprob")[trace.read("sequence") == s]) for s in range(4)])
        for domain, members in {"code": [0, 2], "prose": [1, 3]}.items():
            here, cell = np.isin(trace.read("sequence"), members), data.sel(domain=domain, k=k)
            np.testing.assert_allclose(cell.first_weight, trace.read("weight")[here, :, 0].mean(0), atol=1e-4)
            shares = (trace.read("expert_id")[here][..., None] == np.arange(8)).mean((0, 2))
            np.testing.assert_allclose(cell.share, shares, atol=1e-9)
    tokens = np.array([len(d["text"]) for d in DOCUMENTS])
    for domain, members in {"code": [0, 2], "prose": [1, 3]}.items():
        for k in (1, 2, 8):
            cell = data.sel(domain=domain, k=k)
            assert float(cell.estimate) == pytest.approx(losses[k][members].sum() / tokens[members].sum(), abs=1e-5)
            change = (losses[k] - losses[2])[members].sum() / tokens[members].sum()
            assert float(cell.change) == pytest.approx(change, abs=1e-5)
            assert cell.change_low <= cell.change <= cell.change_high
        assert data.n.sel(domain=domain) == tokens[members].sum()
    assert (data.change.sel(k=2) == 0).all()


def test_a_k_the_model_has_not(net):
    for ks in ([9], [0], "two", []):
        with refused(BadInput, "ks", ks):
            ml.topk_sweep(net, DOCUMENTS, ks=ks, tokenizer=Letters(), settings=QUIET)


def test_statistics_refuse_what_they_are_not_made_of(net):
    trace = ml.record(net, DOCUMENTS, tokenizer=Letters(), settings=QUIET)
    sweep = ml.experiments.measure_topk(net, DOCUMENTS, ks=1, tokenizer=Letters(), settings=QUIET)
    for statistic in (ml.stats.expert_importance, ml.stats.expert_contribution, ml.stats.topk_sweep):
        with refused(BadInput, "kind", "Trace"):
            statistic(trace)
    with refused(BadInput, "kind", "topk"):
        ml.stats.expert_importance(sweep)
    with refused(BadInput, "max_abs", "Trace"):
        super_experts(trace)


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_unless_it_is_switched_off(net, capfd, shown):
    settings = ml.RecordSettings(progress=shown)
    ml.experiments.measure_contributions(net, ["hello"], tokenizer=Letters(), settings=settings)
    assert capfd.readouterr().err.count("100%") == shown
