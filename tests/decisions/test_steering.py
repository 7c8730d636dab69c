"""Steering: curves against edits made by hand, random experts of the same layer and frequency, and verdicts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from tiny import Letters, tiny_mixtral

import mixlens as ml
from mixlens.decisions.steering import _judged, _Losses, _matched
from mixlens.decisions.verdict import DECISION
from mixlens.errors import BadInput
from mixlens.stats.verdicts import DO, DO_NOT, UNKNOWN

QUIET = ml.RecordSettings(progress=False)
SAID = {"tokenizer": Letters(), "settings": QUIET}
BEHAVIOUR = [f"if x{number}: y = [{number}] * {number % 7}" for number in range(16)]
DOCUMENTS = _Losses(None, np.zeros(40), np.ones(40), np.arange(40) % 2 == 0)
OTHER = [f"plain words about number {number} in a row" for number in range(16)]


@pytest.fixture(scope="module")
def model():
    return tiny_mixtral()


def contrast_of(survivors: dict[tuple[int, int], float]) -> xr.Dataset:
    estimate = xr.DataArray(np.full((4, 8), 0.001), {"layer": range(4), "expert": range(8)}, ("layer", "expert"))
    survives = xr.zeros_like(estimate, bool)
    for (layer, expert), difference in survivors.items():
        estimate[layer, expert], survives[layer, expert] = difference, True
    return xr.Dataset({"estimate": estimate, "survives": survives}, attrs={"statistic": "contrast", "a": "a", "b": "b"})


def loss_by_hand(model, texts, edits=()) -> np.ndarray:
    found = []
    for text in texts:
        ids = torch.tensor([Letters()(text)["input_ids"]])
        with torch.no_grad():
            if edits:
                with ml.edit(model, *edits):
                    logits = model(ids).logits
            else:
                logits = model(ids).logits
        found.append(float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")))
    return np.array(found)


def test_a_curve_is_the_change_in_loss_under_edits_of_the_experts_that_differ(model):
    contrast = contrast_of({(0, 3): 0.2, (2, 5): -0.3, (3, 1): 0.05})
    found = ml.decisions.steer(model, contrast, BEHAVIOUR, OTHER, limit=1.0, doses=[1, 3], experts=2, draws=2, **SAID)
    assert {tuple(cell): float(found["chosen"][tuple(cell)]) for cell in np.argwhere(found["chosen"].values)} == {
        (0, 3): 1.0,
        (2, 5): -1.0,
    }
    for name, texts in (("behaviour", BEHAVIOUR), ("held_out", OTHER)):
        tokens = sum(len(text) for text in texts)
        whole = loss_by_hand(model, texts)
        for dose in (1, 3):
            edits = [ml.edits.add(dose, layers=0, experts=3), ml.edits.add(-dose, layers=2, experts=5)]
            wanted = (loss_by_hand(model, texts, edits) - whole).sum() / tokens
            cell = found.sel(text=name, dose=dose)
            assert float(cell["estimate"].sel(arm="chosen")) == pytest.approx(wanted, rel=1e-3, abs=1e-5)
            difference = cell["estimate"].sel(arm="chosen") - cell["estimate"].sel(arm="random")
            assert float(cell["estimate"].sel(arm="chosen_less_random")) == pytest.approx(float(difference))
            assert (cell["ci_low"] <= cell["estimate"]).all()
            assert (cell["ci_high"] >= cell["estimate"]).all()


def test_random_experts_are_others_of_the_layer_that_are_used_about_as_often():
    share = xr.DataArray([[0.3, 0.29, 0.28, 0.02, 0.04, 0.07]] * 2, {"layer": [0, 1]}, ("layer", "expert"))
    drawn = set()
    for seed in range(60):
        found = _matched({(0, 0): 1.0, (0, 3): -1.0}, share, np.random.default_rng(seed))
        (_, first), (_, second) = found
        drawn |= {(first, "first"), (second, "second")}
        assert first != second
        assert list(found.values()) == [1.0, -1.0]
    assert {expert for expert, of in drawn if of == "first"} == {1, 2, 5}
    assert {expert for expert, of in drawn if of == "second"} <= {2, 4, 5, 1}


def test_without_an_expert_that_differs_there_is_no_verdict_and_nothing_is_invented(model):
    found = ml.decisions.steer(model, contrast_of({}), BEHAVIOUR, OTHER, limit=1.0, **SAID)
    assert found.attrs["verdict"] == UNKNOWN
    assert np.isnan(found["estimate"]).all()
    assert np.isnan(found.attrs["dose"])


@pytest.mark.parametrize(
    ("behaviour", "beyond_random", "other", "wanted"),
    [
        (-0.5, -0.4, 0.01, DO),
        (-0.5, -0.4, 0.5, DO_NOT),  # other text gets worse than allowed
        (0.5, -0.4, 0.01, DO_NOT),  # the behaviour gets rarer
        (-0.5, 0.0, 0.01, UNKNOWN),  # random experts do as well
    ],
)
def test_each_of_three_claims_must_hold(behaviour, beyond_random, other, wanted):
    rng = np.random.default_rng(0)
    means = ((behaviour, behaviour - beyond_random, beyond_random), (other, 0.0, other))
    change = [np.array(of)[:, None, None] + rng.normal(0, 0.05, (3, 1, 40)) for of in means]
    _, found = _judged(change, [DOCUMENTS] * 2, 0.1, DECISION)
    assert found == wanted


def test_the_dose_is_chosen_on_one_half_and_within_the_limit():
    rng = np.random.default_rng(0)
    means = (-0.1, -0.2, -0.4), (0.0, 0.05, 0.3)
    behaviour, other = (np.array(of)[None, :, None] + rng.normal(0, 0.01, (3, 3, 40)) for of in means)
    assert _judged([behaviour, other], [DOCUMENTS] * 2, 0.1, DECISION) == (1, DO)


def test_documents_that_are_shuffled_between_the_groups_give_no_verdict(model):
    documents = [{"text": text, "kind": kind} for kind, texts in (("a", BEHAVIOUR), ("b", OTHER)) for text in texts]
    trace = ml.record(model, documents, **SAID)
    unknown = 0
    for seed in range(20):
        mixed = np.random.default_rng(seed).permutation(len(documents)) < len(BEHAVIOUR)
        found = ml.stats.contrast(trace, ml.stats.expert_share, by=pd.Series(mixed))
        if not found["survives"].any():
            unknown += 1
        else:
            steered = ml.decisions.steer(model, found, BEHAVIOUR, OTHER, limit=0.5, doses=[1], draws=1, **SAID)
            unknown += steered.attrs["verdict"] == UNKNOWN
    assert unknown >= 19


def test_what_is_no_contrast_of_this_model_is_refused(model):
    trace = ml.record(model, OTHER[:2], **SAID)
    wide = contrast_of({}).isel(expert=range(4))
    for contrast in (ml.stats.expert_share(trace), None, wide):
        with pytest.raises(BadInput) as refused:
            ml.decisions.steer(model, contrast, BEHAVIOUR, OTHER, limit=1.0, **SAID)
        assert refused.value.argument == "contrast"
    for doses in ([], [0.0], [-1.0]):
        with pytest.raises(BadInput):
            ml.decisions.steer(model, contrast_of({}), BEHAVIOUR, OTHER, limit=1.0, doses=doses, **SAID)
