"""What is given in the place of a model, documents, a run or settings is refused in words, by every door."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from helpers.refusals import refused

import mixlens as ml

GIVEN = {"nothing": None, "number": 3, "dataset": xr.Dataset()}


@pytest.fixture(scope="module")
def model():
    return ml.load("demo", verbose=False)


@pytest.fixture(scope="module")
def trace(model):
    return ml.record(model, ["One text of several words."], settings=ml.RecordSettings(progress=False))


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize(
    "door",
    [
        lambda model, given: ml.load(given),
        lambda model, given: ml.audit(given),
        lambda model, given: ml.open(given),
        lambda model, given: ml.report(given, "never.html"),
        lambda model, given: ml.compare(given, given),
        lambda model, given: ml.concat([given]),
        lambda model, given: ml.Recorder(given).__enter__(),
        lambda model, given: ml.edit(given, ml.edits.forbid(0, 1)).__enter__(),
        lambda model, given: ml.record(given, ["A text."]),
        lambda model, given: ml.record(model, ["A text."], settings=given),
        lambda model, given: ml.experiments.measure_importance(model, ["A text."], settings=given),
        lambda model, given: ml.experiments.measure_pareto("demo", ["A text."], schemes=given, out="never"),
        lambda model, given: ml.show.tables.tidy(given),
        lambda model, given: ml.show.tables.to_latex(given),
    ],
)
def test_what_is_no_model_document_run_or_setting_is_refused(door, given, model):
    with pytest.raises(ml.MixlensError) as said:
        door(model, given)
    assert type(said.value) is not ml.MixlensError


@pytest.mark.parametrize("given", [None, 3])
def test_documents_are_texts(model, given):
    with refused(ml.BadInput, "documents"):
        ml.record(model, given)


def test_numbers_that_are_none(model):
    wrong: Any
    for wrong in (float("nan"), 0, "eight"):
        with refused(ml.BadInput, "max_length"):
            ml.record(model, ["A text."], settings=ml.RecordSettings(max_length=wrong))
    counted: Any = np.int64(2)
    cut = ml.RecordSettings(max_length=counted, overlong="truncate", progress=False)
    assert ml.record(model, ["A text of words."], settings=cut).n_tokens == 2
    for wrong in (float("nan"), "many", 9):
        with pytest.raises(ml.BadInput) as refusal:
            ml.stats.Bootstrap(replicates=wrong)
        assert (refusal.value.argument, refusal.value.value) == ("replicates", wrong)


def test_sequences_are_selected_by_columns(trace):
    with refused(ml.BadInput, "where", "str"):
        trace.select(where="github")
    with refused(ml.BadInput, "where", "twenty"):
        trace.select(where={"length": [int(trace.sequences["length"].iloc[0]), "twenty"]})
    for series in (pd.Series([True], [99]), trace.sequences["length"]):
        with refused(ml.BadInput, "where"):
            trace.select(where=series)
