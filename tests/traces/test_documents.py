"""Documents: what their digest tells apart, and what becomes of texts that are too long."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.refusals import refused
from helpers.ways import Numbers, net
from tiny import tiny_mixtral

import mixlens as ml

ROWS = [
    {"text": "5 6 7 8 9 10 11", "id": "a", "domain": "x", "year": 1999},
    {"text": "7 8", "id": "b", "domain": "y", "year": 2001},
    {"text": "9 10 11 12 13", "id": "c", "domain": "x", "year": 2003},
]


class Sliced:
    """What has places and a length, and nothing else."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return self.rows[place]


def record(rows=ROWS, **settings):
    settings = ml.RecordSettings(progress=False, **settings)
    return ml.record(net(), rows, tokenizer=Numbers(), signals=(), settings=settings)


def digest(rows) -> str:
    return record(rows).meta["settings"]["input_sha256"]


def changed(place, **columns):
    return [row | columns if i == place else row for i, row in enumerate(ROWS)]


def test_the_digest_is_of_every_id_text_and_column_in_order():
    by_hand = hashlib.sha256()
    for row in ROWS:
        columns = {name: row[name] for name in ("domain", "year")}
        by_hand.update(json.dumps([row["id"], row["text"], columns]).encode())
    assert digest(ROWS) == by_hand.hexdigest()


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("columns", [{"text": "5"}, {"id": "d"}, {"domain": "z"}, {"year": 1}], ids=str)
def test_a_change_of_any_column_of_any_document_changes_the_digest(place, columns):
    assert digest(changed(place, **columns)) != digest(ROWS)


def test_order_and_number_of_documents_change_the_digest():
    assert len({digest(ROWS), digest(ROWS[::-1]), digest(ROWS[:2]), digest([{**r, "more": 1} for r in ROWS])}) == 4


@pytest.mark.parametrize("columns", [{"domain": "z"}, {"text": "7 9"}, {"year": 7}], ids=str)
def test_a_run_of_other_documents_is_not_gone_on_with(tmp_path, columns):
    options = {"tokenizer": Numbers(), "signals": (), "settings": ml.RecordSettings(progress=False)}
    ml.record(net(), ROWS, out=tmp_path / "run", **options)
    with pytest.raises(ml.RunError):
        ml.record(net(), changed(1, **columns), out=tmp_path / "run", **options)
    assert ml.record(net(), ROWS, out=tmp_path / "run", **options).n_tokens == 14


@pytest.mark.parametrize(("name", "kept"), [("document_id", "document_id"), ("id", "document_id")])
def test_the_callers_id_names_documents(name, kept):
    trace = record([{"text": "5 6", name: 7}, {"text": "5", name: 3}])
    assert trace.sequences[kept].tolist() == [7, 3]


def test_without_an_id_documents_are_numbered():
    assert record([{"text": "5 6"}, {"text": "5"}]).sequences["document_id"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("overlong", "pieces", "counted"),
    [
        ("truncate", [("a", "5 6 7"), ("b", "7 8"), ("c", "9 10 11")], (2, 4 + 2, 0)),
        (
            "split",
            [("a", "5 6 7"), ("a", "8 9 10"), ("a", "11"), ("b", "7 8"), ("c", "9 10 11"), ("c", "12 13")],
            (0, 0, 2),
        ),
    ],
)
def test_longer_documents_are_cut_and_counted(tmp_path, overlong, pieces, counted):
    settings = ml.RecordSettings(max_length=3, overlong=overlong, progress=False)
    trace = ml.record(net(), ROWS, tokenizer=Numbers(), signals=(), settings=settings, out=tmp_path / "run")
    number, ids = trace.read("sequence"), trace.read("token_id")
    found = [
        (trace.sequences.loc[s, "document_id"], " ".join(map(str, ids[number == s]))) for s in trace.sequences.index
    ]
    assert found == pieces
    names = ("truncated_documents", "truncated_tokens", "split_documents")
    assert tuple(trace.meta["reading"][name] for name in names) == counted
    assert trace.meta["counts"]["documents"] == 3
    assert trace.meta["counts"]["sequences"] == len(pieces)
    np.testing.assert_array_equal(trace.read("position"), np.concatenate([range(len(t.split())) for _, t in pieces]))


def test_a_document_as_long_as_the_limit_is_whole():
    assert record([{"text": "5 6 7"}], max_length=3).sequences["length"].tolist() == [3]
    with pytest.raises(ml.BadInput):
        record([{"text": "5 6 7 8"}], max_length=3)


@pytest.mark.parametrize("kind", [iter, tuple, pd.DataFrame, Dataset.from_list, Sliced], ids=lambda kind: kind.__name__)
def test_documents_come_in_any_iterable(kind):
    found = record(kind(ROWS))
    assert found.meta["settings"]["input_sha256"] == digest(ROWS)
    assert found.sequences["document_id"].tolist() == ["a", "b", "c"]


def test_a_number_is_no_documents():
    with refused(ml.BadInput, "documents"):
        record(7)


class _Fixed:
    """A tokenizer that gives the same ids for every text, with `<s>` for BOS."""

    name_or_path, bos_token, bos_token_id = "fixed", "<s>", 1

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._ids}

    def get_vocab(self) -> dict[str, int]:
        return {}


def _quiet() -> ml.RecordSettings:
    return ml.RecordSettings(progress=False)


@pytest.mark.parametrize("text", ["before \ud800 after", "\udfff"])
def test_half_a_surrogate_pair_is_refused_with_the_number_of_its_document(letters, text):
    with refused(ml.BadInput, "text", 1):
        ml.record(tiny_mixtral(), ["fine", text], tokenizer=letters, settings=_quiet())


@pytest.mark.parametrize("column", ["domain", "id"])
def test_half_a_surrogate_pair_in_a_column_is_refused_too(letters, column):
    documents = [{"text": "fine", column: "a"}, {"text": "fine", column: "b\ud800"}]
    with refused(ml.BadInput, column, 1):
        ml.record(tiny_mixtral(), documents, tokenizer=letters, settings=_quiet())


def test_an_id_beyond_the_vocabulary_of_the_model_is_refused():
    with refused(ml.BadInput, "tokenizer", 128):
        ml.record(tiny_mixtral(), ["a"], tokenizer=_Fixed([1, 128]), settings=_quiet())


def test_a_second_bos_is_refused_where_the_text_brings_one():
    with refused(ml.BadInput, "text", 0):
        ml.record(tiny_mixtral(), ["<s>a"], tokenizer=_Fixed([1, 1, 5]), settings=_quiet())
    assert ml.record(tiny_mixtral(), ["<s>a"], tokenizer=_Fixed([1, 5]), settings=_quiet()).n_tokens == 2


def test_whole_numbers_beside_none_stay_exact_in_memory_and_on_disk(letters, tmp_path):
    given = [1760000000000000001, None, 1760000000000000003]
    documents = [
        {"text": "ab", "post": post, "score": score} for post, score in zip(given, [0.5, None, 1], strict=True)
    ]
    model = tiny_mixtral()
    ml.record(model, documents, out=tmp_path / "run", tokenizer=letters, settings=_quiet())
    for trace in (ml.record(model, documents, tokenizer=letters, settings=_quiet()), ml.open(tmp_path / "run")):
        assert trace.sequences["post"][[0, 2]].tolist() == [given[0], given[2]]
        assert trace.sequences["post"].isna().tolist() == [False, True, False]
        assert trace.sequences["score"].isna().tolist() == [False, True, False]


def test_every_module_has_its_mode_again_after_record(letters):
    model = tiny_mixtral().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    ml.record(model, ["abc"], tokenizer=letters, settings=_quiet())
    assert {name: module.training for name, module in model.named_modules()} == before


def test_as_many_choices_are_recorded_as_the_routers_make():
    model, ids = tiny_mixtral(), torch.randint(3, 128, (1, 9))
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 3
    expected = tiny_mixtral(num_experts_per_tok=3)
    traces = []
    for one in (model, expected):
        with torch.no_grad(), ml.Recorder(one) as recorder:
            one(input_ids=ids)
        traces.append(recorder.trace())
    assert traces[0].top_k == 3
    np.testing.assert_array_equal(traces[0].read("expert_id"), traces[1].read("expert_id"))
    np.testing.assert_array_equal(
        ml.stats.coactivation(traces[0])["estimate"], ml.stats.coactivation(traces[1])["estimate"]
    )


def test_documents_without_the_models_beginning_are_remarked():
    class Bare(Numbers):
        bos_token_id, bos_token = 1, "<s>"

    quiet = ml.RecordSettings(progress=False)
    with pytest.warns(UserWarning, match="<s>"):
        ml.record(net(), ["5 6 7"], tokenizer=Bare(), signals=(), settings=quiet)
    ml.record(net(), ["1 5 6 7"], tokenizer=Bare(), signals=(), settings=quiet)
