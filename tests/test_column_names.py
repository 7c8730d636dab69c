"""Columns of the caller's may have any name: the numbers are those of the same column under a name of no meaning."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from tiny import Letters, tiny_mixtral

import mixlens as ml
from mixlens.core.names import OF_STATISTICS

SETTINGS = ml.RecordSettings(progress=False)
QUICK = ml.stats.Bootstrap(replicates=20)
MEASURED = {
    "change", "chosen", "condition", "document", "error", "expert", "expert_id", "first_weight", "k", "kl", "layer",
    "logit", "loss", "matrix", "next_id", "norm", "peak", "piece", "position", "same_first", "same_top", "sequence",
    "shared", "size", "slot", "token", "token_id", "tokens", "value", "weight", "weight_error",
}  # fmt: skip
NAMES = sorted(MEASURED | OF_STATISTICS | {"phase", "logprob", "router_logits", "rank", "text_", "name", "index"})
GROUPS = ("left", "right", "left", "right")
DOCUMENTS = [
    {"text": text, "plain": group, "length": number, **dict.fromkeys(NAMES, group)}
    for number, (text, group) in enumerate(zip(("abcdefg", "bcd", "hello", "worlds"), GROUPS, strict=True))
]
pytestmark = pytest.mark.filterwarnings("ignore:The column sequence and length")


@pytest.fixture(scope="module")
def net():
    return tiny_mixtral(num_hidden_layers=2)


@pytest.fixture(scope="module")
def runs(net, tmp_path_factory):
    """A trace and all four measurements of documents that have every name, opened from their folders."""
    folder = tmp_path_factory.mktemp("runs")
    how = {"tokenizer": Letters(), "settings": SETTINGS}
    ml.record(net, DOCUMENTS, out=folder / "trace", **how)
    ml.experiments.measure_importance(net, DOCUMENTS, out=folder / "importance", **how)
    ml.experiments.measure_topk(net, DOCUMENTS, out=folder / "topk", **how)
    ml.experiments.measure_contributions(net, DOCUMENTS, out=folder / "contributions", **how)
    other = tiny_mixtral(num_hidden_layers=2, seed=1)
    ml.experiments.measure_impact(net, other, DOCUMENTS, out=folder / "impact", **how)
    return {path.name: ml.open(path) for path in folder.iterdir()}


STATISTICS = {
    "share": lambda runs, by: ml.stats.expert_share(runs["trace"], by=by, bootstrap=QUICK),
    "transitions": lambda runs, by: ml.stats.transitions(runs["trace"], by=by, bootstrap=QUICK),
    "positions": lambda runs, by: ml.stats.position_profile(runs["trace"], by=by, bootstrap=QUICK),
    "balance": lambda runs, by: ml.stats.load_balance(runs["trace"], by=by, bootstrap=QUICK),
    "confidence": lambda runs, by: ml.stats.router_confidence(runs["trace"], by=by, bootstrap=QUICK),
    "repetition": lambda runs, by: ml.stats.repetition(runs["trace"], by=by, bootstrap=QUICK),
    "coactivation": lambda runs, by: ml.stats.coactivation(runs["trace"], by=by, bootstrap=QUICK),
    "importance": lambda runs, by: ml.stats.expert_importance(runs["importance"], by=by, bootstrap=QUICK),
    "topk": lambda runs, by: ml.stats.topk_sweep(runs["topk"], by=by, bootstrap=QUICK),
    "contribution": lambda runs, by: ml.stats.expert_contribution(runs["contributions"], by=by, bootstrap=QUICK),
    "quality": lambda runs, by: runs["impact"].quality(by=by, bootstrap=QUICK),
    "split": lambda runs, by: runs["impact"].split(by=by, bootstrap=QUICK),
    "errors": lambda runs, by: runs["impact"].experts(by=by, bootstrap=QUICK),
}


@pytest.mark.parametrize("statistic", STATISTICS)
def test_every_name_groups_as_a_plain_one_does(runs, statistic):
    expected = STATISTICS[statistic](runs, "plain")["estimate"]
    assert expected.dims[0] == "plain"
    assert expected["plain"].values.tolist() == ["left", "right"]
    named = STATISTICS[statistic](runs, "plain")
    assert {*map(str, named.variables), *map(str, named.dims)} <= OF_STATISTICS | {"plain"}
    for name in NAMES:
        of_trace = statistic in list(STATISTICS)[:7]
        by = "document_sequence" if name == "sequence" and of_trace else name
        found = STATISTICS[statistic](runs, by)["estimate"]
        assert found.dims[0] in (by, f"document_{by}"), name
        np.testing.assert_array_equal(found.values, expected.values, err_msg=name)
        assert ml.show.tables.tidy(STATISTICS[statistic](runs, by)).shape[1] >= 4


def test_columns_that_a_trace_has_itself_stand_beside_its_own(net):
    with pytest.warns(UserWarning, match="document_length"):
        trace = ml.record(net, DOCUMENTS, tokenizer=Letters(), settings=SETTINGS)
    assert trace.sequences["length"].tolist() == [8, 4, 6, 7]
    assert trace.sequences["document_length"].tolist() == [0, 1, 2, 3]
    assert trace.sequences["document_sequence"].tolist() == list(GROUPS)


def test_other_forms_of_a_trace_hold_both(runs):
    data = runs["trace"].to_xarray()
    assert isinstance(data, xr.Dataset)
    assert data["weight"].dims == ("token", "layer", "slot")
    assert set(data["document_weight"].values) == {"left", "right"}


def test_a_contrast_by_a_column_called_condition(runs):
    found = ml.stats.contrast(runs["trace"], ml.stats.expert_share, by="condition", a="left", b="right")
    same = ml.stats.contrast(runs["trace"], ml.stats.expert_share, by="plain", a="left", b="right")
    np.testing.assert_array_equal(found["estimate"], same["estimate"])
