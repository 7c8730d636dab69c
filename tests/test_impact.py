"""measure_impact against nested loops and plain forwards; a model against itself; a killed run; bad input."""

from __future__ import annotations

import copy
import math
import shutil
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import dispatch_model
from helpers.refusals import refused
from test_comparing import DOCUMENTS, SIGNALS, rounded
from tiny import Letters, tiny_mixtral
from torch.nn import functional as F

import mixlens as ml
from mixlens.errors import BadInput, ModelError, RunError
from mixlens.stats import Bootstrap

SETTINGS = ml.RecordSettings(progress=False, shard_tokens=150, batch_tokens=128)
QUICK = Bootstrap(replicates=20)


@pytest.fixture(scope="module")
def models():
    model = tiny_mixtral()
    return model, rounded(model)


@pytest.fixture(scope="module")
def impact(models):
    return ml.experiments.measure_impact(*models, DOCUMENTS, tokenizer=Letters(), settings=SETTINGS)


def routed(model, ids, other=None, weights=None):
    """log p [token, vocabulary] of one sequence; with `other` its experts [token, layer, slot] are forced by hand."""

    def hook(layer):
        def force(_module, _args, output):
            logits = output[0].float()
            chosen = torch.from_numpy(other[:, layer].astype(np.int64))
            weight = torch.softmax(logits.gather(1, chosen), -1)
            if weights is not None:
                weight = torch.from_numpy(weights[:, layer])
            return output[0], weight, chosen

        return force

    handles = []
    if other is not None:
        layers = model.model.layers
        handles = [layers[i].mlp.gate.register_forward_hook(hook(i)) for i in range(len(layers))]
    try:
        with torch.no_grad():
            return torch.log_softmax(model(torch.from_numpy(ids)[None]).logits[0].float(), -1).numpy()
    finally:
        for handle in handles:
            handle.remove()


def by_hand(models, force_weights=False):
    """loss, kl, same_top [predicted token, condition], one document after the other, without a batch."""
    traces = [ml.record(m, DOCUMENTS, tokenizer=Letters(), settings=SETTINGS) for m in models]
    rows = []
    for sequence, document in enumerate(DOCUMENTS):
        ids = np.array(Letters()(document["text"])["input_ids"])
        one = [trace.select(where=pd.Series(trace.sequences.index == sequence)) for trace in traces]
        a, b = (trace.read("expert_id") for trace in one)
        w = [trace.read("weight") if force_weights else None for trace in one]
        passes = [
            routed(models[0], ids),
            routed(models[1], ids),
            routed(models[1], ids, a, w[0]),
            routed(models[0], ids, b, w[1]),
        ]
        for t in range(len(ids) - 1):
            loss, kl, same = [], [], []
            for logp in passes:
                loss.append(-logp[t, ids[t + 1]])
                kl.append(sum(math.exp(p) * (p - q) for p, q in zip(passes[0][t], logp[t], strict=True)))
                same.append(logp[t].argmax() == passes[0][t].argmax())
            rows.append((loss, kl, same))
    return np.array(rows).transpose(1, 0, 2)


@pytest.mark.parametrize("force_weights", [False, True])
def test_quality_and_split_by_hand(models, force_weights):
    found = ml.experiments.measure_impact(
        *models, DOCUMENTS, tokenizer=Letters(), settings=SETTINGS, force_weights=force_weights
    )
    loss, kl, same = by_hand(models, force_weights).mean(1)
    quality = found.quality(bootstrap=QUICK).estimate
    expected = {"loss_a": loss[0], "loss_difference": loss[1] - loss[0], "perplexity_b": math.exp(loss[1]), "kl": kl[1]}
    for measure, value in expected.items():
        assert float(quality.sel(measure=measure)) == pytest.approx(value, rel=1e-4), measure
    assert float(quality.sel(measure="same_top")) == pytest.approx(same[1])
    split = found.split(bootstrap=QUICK).estimate
    close = 2e-3 if force_weights else 1e-5  # a trace keeps weights in half precision
    for quantity, (aa, bb, ba, ab) in {"loss": loss, "kl": kl, "other_top": 1 - same}.items():
        parts = {
            "weights_first": (ba - aa, bb - ba),
            "routing_first": (bb - ab, ab - aa),
            "mean": ((ba - aa + bb - ab) / 2, (bb - ba + ab - aa) / 2),
        }
        for order, (weights, routing) in parts.items():
            cell = split.sel(quantity=quantity, order=order)
            assert float(cell.sel(part="weights")) == pytest.approx(weights, abs=close), (quantity, order)
            assert float(cell.sel(part="routing")) == pytest.approx(routing, abs=close), (quantity, order)
            assert float(cell.sel(part="total")) == pytest.approx(bb - aa, abs=1e-6)


def test_where_only_the_dtype_differs_all_of_the_change_is_arithmetic(models):
    rounded = copy.deepcopy(models[0]).to(torch.bfloat16)
    asked = {"tokenizer": Letters(), "settings": SETTINGS}
    found = ml.experiments.measure_impact(models[0], rounded, DOCUMENTS, **asked).split(bootstrap=QUICK)
    assert found["part"].values.tolist() == ["everything else", "routing", "total", "arithmetic"]
    np.testing.assert_allclose(found.estimate.sel(part="arithmetic"), found.estimate.sel(part="total"), atol=1e-7)
    assert float(abs(found.estimate.sel(part="total", quantity="kl")).max()) > 0
    alike = ml.experiments.measure_impact(models[0], models[1], DOCUMENTS, **asked).split(bootstrap=QUICK)
    assert (alike.estimate.sel(part="arithmetic") == 0).all()


def test_weight_and_output_errors_by_hand(models, impact):
    a, b = models
    found = impact.experts(bootstrap=QUICK)
    layer, expert = 2, 5
    trace = ml.record(
        a, DOCUMENTS, tokenizer=Letters(), signals=[ml.Site("moe_in", dtype="float32")], settings=SETTINGS
    )
    inputs = torch.from_numpy(trace.activations("moe_in").sel(layer=layer).values)
    chose = torch.from_numpy((trace.read("expert_id")[:, layer] == expert).any(-1))

    def output(model, x):
        experts = model.model.layers[layer].mlp.experts
        gate, up = F.linear(x, experts.gate_up_proj[expert]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, experts.down_proj[expert])

    with torch.no_grad():
        before, after = output(a, inputs[chose]), output(b, inputs[chose])
    error = float(((after - before) ** 2).sum() / (before**2).sum()) ** 0.5
    cell = found.sel(layer=layer, expert=expert)
    assert float(cell.estimate) == pytest.approx(error, rel=1e-4)
    assert int(cell.n) == int(chose.sum())
    w2 = [model.model.layers[layer].mlp.experts.down_proj[expert].detach() for model in models]
    assert float(cell.weight_error.sel(matrix="w2")) == pytest.approx(float((w2[1] - w2[0]).norm() / w2[0].norm()))
    assert 0 < float(found.weight_error.min()) < float(found.weight_error.max()) < 1


def test_a_run_tells_which_model_was_which(tmp_path):
    one, other = tiny_mixtral(num_hidden_layers=1), tiny_mixtral(num_hidden_layers=1)
    one.config._name_or_path, other.config._name_or_path = "x/one", "x/other"
    asked = {"tokenizer": Letters(), "settings": SETTINGS, "out": tmp_path / "run"}
    found = ml.experiments.measure_impact(one, other, DOCUMENTS[:2], **asked)
    for run in (found, ml.open(tmp_path / "run")):
        assert (run.meta["model"]["name"], run.meta["other"]["name"]) == ("x/one", "x/other")
        assert run.names == ("one", "other")
        assert run.meta["force_weights"] is False
        assert run.split().attrs["forced_weights"] == "False"
    with refused(RunError, "out", ["force_weights"]):
        ml.experiments.measure_impact(one, other, DOCUMENTS[:2], force_weights=True, **asked)
    with refused(RunError, "out", ["model", "other"]):
        ml.experiments.measure_impact(other, one, DOCUMENTS[:2], **asked)


def test_a_model_against_itself(models):
    same = ml.experiments.measure_impact(models[0], models[0], DOCUMENTS, tokenizer=Letters(), settings=SETTINGS)
    # Replay of a model's own routing is the model's own forward: every condition to the last bit.
    assert (same.sums.loss.values == same.sums.loss.values[:, :1]).all()
    assert not same.sums.kl.values.any()
    assert float(same.quality().estimate.sel(measure="same_top")) == 1
    assert float(same.quality().estimate.sel(measure="perplexity_ratio")) == 1
    assert (same.routing().estimate.values == 1).all()
    assert not np.nan_to_num(same.experts().estimate.values).any()
    assert not same.split().estimate.values.any()


def test_only_the_router_changed_means_only_routing_counts(models):
    import copy

    other = copy.deepcopy(models[0])
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.gate.weight += 0.3 * torch.randn_like(layer.mlp.gate.weight)
    found = ml.experiments.measure_impact(
        models[0], other, DOCUMENTS, tokenizer=Letters(), settings=SETTINGS, force_weights=True
    )
    kl = found.split().sel(quantity="kl").estimate
    assert float(kl.sel(part="total", order="mean")) > 1e-3
    assert float(kl.sel(part="weights", order="weights_first")) == pytest.approx(0, abs=1e-5)
    assert float(found.experts().weight_error.max()) == 0


def test_the_bound_from_stored_log_probabilities_is_below_the_divergence(models, impact):
    traces = [ml.record(m, DOCUMENTS, tokenizer=Letters(), signals=SIGNALS, settings=SETTINGS) for m in models]
    compared = ml.compare(*traces)
    bound = float(compared.next_tokens().estimate.sel(measure="kl_at_least"))
    exact = impact.quality().estimate
    assert 0 < bound <= float(exact.sel(measure="kl")) + 1e-7
    for measure in ("perplexity_a", "perplexity_b", "loss_difference", "same_top"):
        ours = float(compared.next_tokens().estimate.sel(measure=measure))
        assert ours == pytest.approx(float(exact.sel(measure=measure)), abs=1e-5), measure
    both = compared.agreement().estimate.sel(measure=["top1", "overlap"])
    np.testing.assert_allclose(impact.routing().estimate, both, atol=1e-6)


def test_intervals_hold_their_estimates_and_parts_have_domains(impact):
    for data in (impact.quality(), impact.split(by="domain"), impact.routing(), impact.experts()):
        known = np.isfinite(data.ci_low)
        assert (data.ci_low.where(known, -1) <= data.estimate.where(known, 0)).all()
        assert (data.ci_high.where(known, 1) >= data.estimate.where(known, 0)).all()
    assert impact.split(by="domain").domain.values.tolist() == ["one", "two"]
    assert int(impact.split(by="domain").n.sum()) == int(impact.quality().n)
    assert "of it from other routing" in repr(impact)
    assert "of it from other routing" in impact._repr_html_()


def test_a_stopped_run_goes_on_to_the_same_numbers(models, impact, tmp_path, monkeypatch):
    from mixlens.experiments import impact as module

    out, calls, measure = tmp_path / "run", [], module._Pair.measure

    def stop(self, shard):
        calls.append(shard.index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, shard)

    monkeypatch.setattr(module._Pair, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        ml.experiments.measure_impact(*models, DOCUMENTS, tokenizer=Letters(), settings=SETTINGS, out=out)
    with refused(RunError, "shards", 1):
        ml.open(out)
    went_on = ml.experiments.measure_impact(*models, DOCUMENTS, tokenizer=Letters(), settings=SETTINGS, out=out)
    assert calls[2:] == list(range(1, max(calls) + 1))
    for found in (went_on, ml.open(out)):
        assert found.sums.equals(impact.sums)
    shutil.rmtree(out)


def test_offloaded_weights_have_no_weight_error_and_all_else(models, impact, monkeypatch):
    from mixlens.experiments import impact as module

    def offloaded(layer):
        raise ModelError("offloaded")

    monkeypatch.setattr(module, "expert_weights", offloaded)
    found = ml.experiments.measure_impact(*models, DOCUMENTS, tokenizer=Letters(), settings=SETTINGS)
    assert np.isnan(found.sums.weight_error).all()
    assert found.sums.drop_vars("weight_error").equals(impact.sums.drop_vars("weight_error"))


def test_a_second_model_whose_layers_accelerate_offloads(models, impact, tmp_path):
    model, _ = models
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(4)}
    offloaded: Any = rounded(model)
    dispatch_model(offloaded, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert offloaded.model.layers[1].mlp.gate.weight.is_meta
    found = ml.experiments.measure_impact(model, offloaded, DOCUMENTS, tokenizer=Letters(), settings=SETTINGS)
    assert found.sums.drop_vars("weight_error").equals(impact.sums.drop_vars("weight_error"))


def test_models_of_different_shapes_are_refused(models):
    with refused(BadInput, "neurons an expert", (64, 32)):
        ml.experiments.measure_impact(models[0], tiny_mixtral(intermediate_size=32), DOCUMENTS, tokenizer=Letters())
    with refused(BadInput, "layers", (4, 3)):
        ml.experiments.measure_impact(models[0], tiny_mixtral(num_hidden_layers=3), DOCUMENTS, tokenizer=Letters())
    with refused(BadInput, "by", "colour"):
        ml.experiments.measure_impact(*models, DOCUMENTS[:2], tokenizer=Letters(), settings=SETTINGS).quality(
            by="colour"
        )
