"""The explorer without a browser: what its buttons do, that stop is heard, and that nothing is left on the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.displayed import numbers
from helpers.refusals import refused
from unpacking import unpack

import mixlens as ml


@pytest.fixture(scope="module")
def model():
    return ml.load("demo", verbose=False)


@pytest.fixture
def explorer(model):
    return ml.Explorer(model, ml.demo_documents())


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_generating_streams_routing_into_the_view(explorer, model):
    explorer.prompt.value = "The theorem <script>alert(1)</script>"
    explorer.new_tokens.value = 9
    packed = []
    explorer.text.observe(
        lambda change: change["new"][0].observe(lambda c: packed.append(c["new"]), "packed"), "children"
    )
    explorer.start(explorer._generate)
    explorer.wait()
    header, arrays = unpack(explorer.text.children[0].packed)
    ids = explorer.trace.read("expert_id")
    np.testing.assert_array_equal(arrays["pair"], (ids @ [model.config.num_local_experts, 1]).T)
    lengths = [unpack(p)[0]["starts"][-1] for p in packed]
    assert lengths == sorted(lengths)
    assert len(lengths) >= 2
    assert lengths[-1] == len(ids)
    assert "<script>" in "".join(header["pieces"][i] for i in arrays["piece"])
    assert "recorded tokens" in explorer.status.value
    assert hooks(model) == 0


def test_stop_is_heard_at_the_next_forward_and_keeps_what_there_is(explorer, model):
    explorer.prompt.value = "Once"
    explorer.new_tokens.value = 500

    def press(change):
        if change["new"] >= 5:
            explorer.buttons["stop"].click()

    explorer.progress.observe(press, "value")
    explorer.start(explorer._generate)
    explorer.wait()
    assert explorer.status.value.startswith("Stopped after")
    assert 4 <= explorer.trace.select(phase="generated").n_tokens <= 8
    assert hooks(model) == 0
    assert not explorer.buttons["generate"].disabled


def test_a_domain_fills_the_prompt_and_recording_maps_the_documents(explorer):
    explorer.domain.value = explorer.documents[0]["domain"]
    assert explorer.prompt.value == explorer.documents[0]["text"][:300]
    explorer.n_documents.value = 3
    explorer.start(explorer._record)
    explorer.wait()
    assert explorer.trace.sequences["document_id"].nunique() == 3
    whole = ml.record(explorer.model, explorer.documents[:3], settings=ml.RecordSettings(progress=False))
    np.testing.assert_array_equal(explorer.trace.read("expert_id"), whole.read("expert_id"))
    assert [child.kind for child in explorer.maps.children] == ["matrix", "dots"]
    assert explorer.progress.value == explorer.progress.max == 3


def test_documents_of_record_are_those_of_the_explorer(model):
    explorer = ml.Explorer(model, ["One text.", "Another text."])
    assert explorer.domain.options == ("own text",)
    explorer.start(explorer._record)
    explorer.wait()
    assert explorer.trace.sequences["document_id"].tolist() == [0, 1]
    with refused(ml.BadInput, "text", 1):
        ml.Explorer(model, ["One text.", ""])
    with refused(ml.ModelError, "model", "str"):
        ml.Explorer("demo")


def test_a_domain_moves_the_maps_which_keep_what_is_chosen_when_more_is_recorded(explorer):
    explorer.n_documents.value = 2
    explorer.start(explorer._record)
    explorer.wait()
    first = explorer.maps.children[0]
    first.selection = {"layer": 5, "expert": 2}
    explorer.n_documents.value = 3
    explorer.start(explorer._record)
    explorer.wait()
    assert explorer.maps.children[0] is first
    assert first.selection == {"layer": 5, "expert": 2}
    explorer.domain.value = explorer.documents[0]["domain"]
    assert first.asked == {"domain": explorer.documents[0]["domain"]}


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on_and_is_scored_and_shown(explorer, model):
    explorer.tasks.value, explorer.limit.value = "demo_0shot::agreement", 12

    def press(change):
        if change["new"] >= 10:
            explorer.buttons["stop"].click()

    explorer.progress.observe(press, "value")
    explorer.start(explorer._evaluate)
    explorer.wait()
    explorer.progress.unobserve(press, "value")
    stopped = explorer.progress.value
    assert explorer.status.value.startswith(f"Stopped after {stopped} requests, which are kept.")
    assert explorer.evaluation is None
    told = []
    explorer.progress.observe(lambda change: told.append(change["new"]), "value")
    explorer.start(explorer._evaluate)
    explorer.wait()
    alone = ml.evaluate(model, explorer.tasks.value, limit=12, settings=ml.evals.EvalSettings(progress=False))
    assert told[0] == 0
    assert told[1] == stopped >= 10  # those answered before were not asked again
    assert told == sorted(told)
    assert explorer.progress.value == explorer.progress.max == alone.meta["counts"]["requests"]
    assert explorer.evaluation.records == alone.records
    assert explorer.status.value == "Evaluated 12 samples."
    assert f"{alone.scores['score'][0]:.3f}" in explorer.scores.value
    header, _ = unpack(explorer.samples.children[0].packed)
    assert [row["response"] for row in header["rows"]] == alone.samples["response"].tolist()
    assert sorted(header["sample_sequence"]) == [*range(12)]
    assert hooks(model) == 0


def test_an_error_is_said_with_names_near_what_was_asked_and_escaped(explorer):
    explorer.tasks.value = "<b>gsm8k_8shot"
    explorer.start(explorer._evaluate)
    explorer.wait()
    assert "&lt;b&gt;gsm8k_8shot" in explorer.status.value
    assert "<b>" not in explorer.status.value
    assert "gsm8k_8shot_maj8" in explorer.status.value
    assert not explorer.buttons["evaluate"].disabled
    explorer.tasks.value = " , "
    explorer.start(explorer._evaluate)
    explorer.wait()
    assert "Cannot evaluate []" in explorer.status.value
    assert explorer.evaluation is None


def test_outputs_are_those_of_the_model_without_an_explorer(explorer, model):
    ids = torch.tensor([[1, 5, 9, 20]])
    before = model(ids).logits
    explorer.prompt.value = "abc"
    explorer.new_tokens.value = 3
    explorer.start(explorer._generate)
    explorer.wait()
    assert torch.equal(model(ids).logits, before)


def failing_at(forward: int, model, monkeypatch):
    """The model's first layer runs out of memory at this forward, counted from 1."""
    layer, count = model.model.layers[0], iter(range(1, 10_000))
    whole = type(layer).forward

    def forward_or_fail(*args, **kwargs):
        if next(count) == forward:
            raise torch.OutOfMemoryError("out of memory")
        return whole(layer, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", forward_or_fail)


def test_a_failure_keeps_what_was_generated(explorer, model, monkeypatch):
    failing_at(6, model, monkeypatch)
    explorer.prompt.value = "Once upon a time"
    explorer.start(explorer._generate)
    explorer.wait()
    assert explorer.status.value == "OutOfMemoryError: out of memory"
    assert explorer.trace.select(phase="generated").n_tokens == 4
    assert unpack(explorer.text.children[0].packed)[0]["starts"][-1] == explorer.trace.n_tokens


def test_a_failure_keeps_what_was_recorded(explorer, model, monkeypatch):
    failing_at(3, model, monkeypatch)
    explorer.n_documents.value = 3
    explorer.start(explorer._record)
    explorer.wait()
    assert len(explorer.trace.sequences) == 2
    assert len(explorer.maps.children) == 2


def test_a_stop_before_the_first_forward_says_so(explorer):
    explorer.prompt.value = "Once"
    explorer.start(lambda: (explorer._stopping.set(), explorer._generate())[1])
    explorer.wait()
    assert numbers(explorer.status.value)[0] == 0
