"""Every family's routing, recorded and edited, against its own formula in loops."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import CASES, Case, Numbers, table
from helpers.refusals import refused

import mixlens as ml
from mixlens import ModelError, edits
from mixlens.models.families import FAMILIES
from mixlens.models.layout import moe_layers

IDS = torch.arange(3, 17).reshape(2, 7)
CASE = {case.name: case for case in CASES}
every_family = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def forward(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=torch.ones_like(ids)).logits


def recorded(model: Any, **options: Any) -> tuple[torch.Tensor, ml.Trace]:
    with ml.Recorder(model, **options) as recorder:
        logits = forward(model)
    return logits, recorder.trace()


def router_of(layer: Any) -> tuple[Any, Any]:
    """(router, block) of a layer, found by name here as well."""
    for block in (layer, *layer.children()):
        for name in ("gate", "router"):
            router = getattr(block, name, None)
            if isinstance(router, torch.nn.Module) and hasattr(router, "top_k"):
                return router, block
    raise AssertionError(type(layer))


def choices(case: Case, router: Any, block: Any, logits: torch.Tensor, **edit: Any) -> list[list[tuple[int, float]]]:
    numbers: Numbers = replace(case.of(router, block, logits.shape[-1]), **edit)
    logits = logits.clone()
    logits[:, list(numbers.banned)] = -torch.inf
    return [case.formula(row, numbers) for row in logits.double().tolist()]


@contextmanager
def decided(case: Case, model: Any, layer: int, **edit: Any) -> Any:
    """The router of a layer decides by the formula in loops."""
    router, block = router_of(model.model.layers[layer])
    own = router.forward

    def by_formula(*args: Any) -> Any:
        given = own(*args)
        logits = given[-1] if case.name in ("jetmoe", "llama4") else given[0]
        found = choices(case, router, block, logits, **edit)
        ids = torch.tensor([[expert for expert, _ in row] for row in found])
        weights = torch.tensor([[weight for _, weight in row] for row in found]).to(logits.dtype)
        if case.name == "llama4":
            return torch.zeros_like(logits).scatter(1, ids, weights), logits
        if case.name == "jetmoe":
            flat, order = ids.flatten().sort(stable=True)
            sizes = [int((flat == expert).sum()) for expert in range(logits.shape[-1])]
            return order, order // ids.shape[1], weights.flatten()[order], sizes, logits
        return logits, weights, ids

    router.forward = by_formula
    try:
        yield
    finally:
        del router.forward


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@every_family
def test_a_family(case: Case) -> None:
    """Recorded as its formula decides, with the same forward bit for bit; each edit is as a changed model."""
    model = case.model()
    plain = forward(model)
    logits, trace = recorded(model)
    assert torch.equal(plain, logits)
    assert trace.meta["rule"] == "known"
    assert (trace.n_experts, trace.top_k) == (8, 2)
    for place, index in enumerate(trace.layers.tolist()):
        router, block = router_of(model.model.layers[index])
        rows = torch.from_numpy(trace.read("router_logits")[:, place])
        exact = logits_of(case, model, index)
        torch.testing.assert_close(rows, exact, rtol=1e-3, atol=1e-3)
        for token, row in enumerate(choices(case, router, block, exact)):
            weight = dict(zip(trace.read("expert_id")[token, place], trace.read("weight")[token, place], strict=True))
            assert weight.keys() == {expert for expert, _ in row}
            np.testing.assert_allclose([weight[expert] for expert, _ in row], [w for _, w in row], rtol=2e-3, atol=1e-3)
    if case.formula.__name__ != "sparsemixer":
        assert (np.diff(trace.read("weight"), axis=-1) <= 2e-3).all()
    check_edits(case, model, plain, trace)
    check_cache(model)


def logits_of(case: Case, model: Any, index: int) -> torch.Tensor:
    """What the router of a layer computes of what it reads, by a bare hook."""
    router, _ = router_of(model.model.layers[index])
    seen: list[Any] = []
    handle = router.register_forward_hook(lambda _module, _args, output: seen.append(output))
    forward(model)
    handle.remove()
    return seen[0][-1 if case.name in ("jetmoe", "llama4") else 0]


def check_edits(case: Case, model: Any, plain: torch.Tensor, trace: ml.Trace) -> None:
    layer = int(trace.layers[0])
    often = int(np.bincount(trace.read("expert_id")[:, 0].ravel(), minlength=8).argmax())
    router, _ = router_of(model.model.layers[layer])
    for edit, changed in (
        (edits.forbid(layer, often), {"banned": frozenset({often})}),
        (edits.force(layer, (often + 3) % 8), {"forced": frozenset({(often + 3) % 8})}),
    ):
        with ml.edit(model, edit):
            found = forward(model)
        with decided(case, model, layer, **changed):
            expected = forward(model)
        close(found, expected)
        assert (found - plain).abs().max() > 1e-3
    with ml.edit(model, edits.top_k(1, layers=layer)):
        found = forward(model)
    if case.name == "phimoe":  # whose router reads no top_k
        with decided(case, model, layer, k=1):
            close(found, forward(model))
    else:
        router.top_k = 1
        close(found, forward(model))
        router.top_k = 2
    with ml.edit(model, edits.scale(0.25, layers=layer, experts=often)):
        found = forward(model)
    weight = next(own for own in router.parameters() if own.ndim == 2 and own.shape[0] == 8)
    bias = getattr(router, "bias", None)
    with torch.no_grad():
        for values in (weight, bias) if isinstance(bias, torch.Tensor) else (weight,):
            values[often] *= 0.25
        close(found, forward(model))
        for values in (weight, bias) if isinstance(bias, torch.Tensor) else (weight,):
            values[often] *= 4
    with ml.edit(model, edits.replay(trace)):
        close(forward(model), plain)
    check_outputs(case, model, layer, often)


def check_outputs(case: Case, model: Any, layer: int, expert: int) -> None:
    """An expert that puts out nothing is one whose last matrix is zero; sites add up to what its block puts out."""
    part = next(one for one in moe_layers(model) if one.index == layer)
    if case.name in ("jetmoe", "llama4"):
        with refused(ModelError, "layer", layer), ml.edit(model, edits.ablate(layer, expert, how="zero")):
            pass
        return
    with ml.edit(model, edits.ablate(layer, expert, how="zero")):
        found = forward(model)
    own = {name: getattr(part.experts, name) for name in ("down_proj", "down_proj_bias") if hasattr(part.experts, name)}
    kept = {name: values.detach().clone() for name, values in own.items()}
    with torch.no_grad():
        for values in own.values():
            values[expert] = 0
        expected = forward(model)
        for name, values in own.items():
            values.copy_(kept[name])
    close(found, expected)
    seen: list[torch.Tensor] = []
    handle = part.experts.register_forward_hook(lambda _module, _args, output: seen.append(output))
    signals = [ml.Site("expert_out", dtype="float32", layers=(layer,)), *(["shared_out"] if part.shared else [])]
    try:
        _, sites = recorded(model, signals=signals)
    finally:
        handle.remove()
    added = (sites.activations("expert_out")[:, 0].values * sites.read("weight")[:, 0, :, None]).sum(1)
    np.testing.assert_allclose(added, seen[0].detach(), rtol=5e-3, atol=5e-3)


def check_cache(model: Any) -> None:
    """A padded prompt, then one token after the other with a cache: as the rows alone, at once."""
    prompt = torch.cat([torch.zeros(1, 2, dtype=torch.long), IDS[:1, :5]], 1)
    prompt = torch.cat([prompt, IDS[1:]])
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    with ml.Recorder(model) as recorder:
        model.generate(prompt, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
    generated = recorder.trace()
    for sequence in (0, 1):
        rows = generated.read("sequence") == sequence
        with ml.Recorder(model) as alone:
            forward(model, torch.from_numpy(generated.read("token_id")[rows])[None])
        expected = alone.trace()
        assert rows.sum() == (7 - 2 * (sequence == 0)) + 2
        for name in ("expert_id", "weight"):
            found = np.sort(generated.read(name)[rows])
            np.testing.assert_allclose(found, np.sort(expected.read(name)), atol=2e-3)


def test_a_family_that_is_not_in_the_table_is_recorded_and_not_edited(monkeypatch):
    model = CASE["olmoe"].model()
    known = recorded(model)[1]
    monkeypatch.delitem(FAMILIES, "olmoe")
    logits, trace = recorded(model)
    assert torch.equal(logits, forward(model))
    assert trace.meta["rule"] == "unknown"
    np.testing.assert_array_equal(trace.read("expert_id"), known.read("expert_id"))
    for edit in (edits.forbid(0, 1), edits.top_k(1), edits.replay(trace), edits.scale(2.0, layers=0)):
        with refused(ModelError, "rule", "unknown"), ml.edit(model, edit):
            pass
    with ml.edit(model, edits.ablate(0, 1, how="zero")):
        forward(model)


def test_a_router_that_decides_otherwise_than_its_family_is_recorded_and_not_edited(monkeypatch):
    model = CASE["olmoe"].model()
    monkeypatch.setitem(FAMILIES, "olmoe", FAMILIES["mixtral"])  # weights that sum to one
    assert recorded(model)[1].meta["rule"] == "unknown"
    with refused(ModelError, "rule", "unknown"), ml.edit(model, edits.forbid(0, 1)):
        forward(model)
    assert torch.equal(forward(model), recorded(model)[0])


def test_a_softmax_over_all_experts_gives_the_share_of_a_forbidden_one_to_the_others(letters):
    model = CASE["olmoe"].model()
    plain = recorded(model, signals=["router_logits"])[1]
    expert = int(plain.read("expert_id")[0, 0, 0])
    with ml.edit(model, edits.forbid(0, expert)):
        trace = recorded(model)[1]
    share = torch.from_numpy(plain.read("router_logits")[:, 0]).float().softmax(-1)[:, expert].numpy()
    before, after = (dict_of(one) for one in (plain, trace))
    for token, taken in enumerate(share):
        for other in before[token].keys() & after[token].keys():
            assert after[token][other] == pytest.approx(before[token][other] / (1 - taken), abs=2e-3)


def dict_of(trace: ml.Trace) -> list[dict[int, float]]:
    ids, weights = trace.read("expert_id")[:, 0], trace.read("weight")[:, 0]
    return [dict(zip(*row, strict=True)) for row in zip(ids, weights, strict=True)]


def test_layers_without_experts_are_absent_and_named_by_their_own_numbers(letters):
    model = CASE["dots1"].model()
    trace = ml.record(model, ["abc", "de"], tokenizer=letters, settings=ml.RecordSettings(progress=False))
    assert trace.layers.tolist() == [1, 2]
    assert ml.stats.expert_share(trace)["layer"].values.tolist() == [1, 2]
    with refused(ml.BadInput, "layers", [0]), ml.edit(model, edits.forbid(0, 1)):
        pass
    with refused(ml.BadInput, "layers", [0]), ml.Recorder(model, signals=[ml.Site("moe_out", layers=(0,))]):
        pass


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "hunyuan_v1_moe"])
def test_shared_experts_have_sites_of_their_own(name):
    model = CASE[name].model()
    part = moe_layers(model)[-1]
    seen: dict[str, torch.Tensor] = {}
    parts = {"moe": part.moe, "experts": part.experts, "shared": part.shared, "gate": part.shared_gate}
    handles = [
        module.register_forward_hook(lambda _module, _args, output, own=own: seen.update({own: output}))
        for own, module in parts.items()
        if module is not None
    ]
    names = ["shared_out", "moe_out", *(["shared_gate"] if part.shared_gate else [])]
    _, trace = recorded(model, signals=[ml.Site(one, layers=(part.index,), dtype="float32") for one in names])
    for handle in handles:
        handle.remove()
    found = {one: torch.from_numpy(trace.activations(one)[:, 0].values) for one in names}
    assert torch.equal(found["shared_out"], seen["shared"].flatten(0, -2))
    gate = found["shared_gate"].sigmoid() if "shared_gate" in found else 1.0
    close(seen["experts"].reshape(-1, 32) + gate * found["shared_out"], found["moe_out"])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_a_compiled_forward_is_recorded_as_an_eager_one(name, compiled):
    model = CASE[name].model()
    expected = recorded(model)[1]
    with torch.no_grad(), ml.CompiledRecorder(model, tokens=64) as recorder:
        run = torch.compile(model.forward, fullgraph=True) if compiled else model.forward
        run(IDS, attention_mask=torch.ones_like(IDS))
    trace = recorder.trace()
    assert trace.meta["rule"] == "known"
    assert trace.layers.tolist() == expected.layers.tolist()
    np.testing.assert_array_equal(trace.read("expert_id"), expected.read("expert_id"))
    np.testing.assert_allclose(trace.read("weight"), expected.read("weight"), atol=1e-3)


def test_the_page_of_models_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    assert table() in page
    assert {case.name for case in CASES} <= FAMILIES.keys()
    assert len(CASES) >= 30
