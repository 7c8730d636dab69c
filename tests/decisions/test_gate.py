"""The gate: losses by hand, the worst first, verdicts against limits, and no verdict where there is nothing to tell."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import Letters, tiny_mixtral

import mixlens as ml
from mixlens.core.bootstrap import Bootstrap
from mixlens.core.intervals import Difference, leaving_out, with_bounds
from mixlens.decisions.gate import table_of
from mixlens.decisions.verdict import DECISION
from mixlens.errors import BadInput
from mixlens.stats.judgement import Judgement
from mixlens.stats.verdicts import DO, DO_NOT, UNKNOWN

QUIET = ml.RecordSettings(progress=False)
EVALUATION = ml.evals.EvalSettings(progress=False)
WORDS = ("the router sends", "each token", "of a text", "to two experts", "and adds up", "what they", "put out")
DOCUMENTS = [
    {"text": " ".join(np.random.default_rng(number).permutation(WORDS)[: 3 + number % 4]), "domain": f"d{number % 3}"}
    for number in range(36)
]


@pytest.fixture(scope="module")
def pair():
    model = tiny_mixtral()
    return model, ml.decisions.prune(model, {layer: range(5) for layer in range(4)})


def document_losses(model, documents) -> np.ndarray:
    """[document] summed over predicted tokens, one document at a time."""
    found = []
    for document in documents:
        ids = torch.tensor([Letters()(document["text"])["input_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        found.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
    return np.array(found)


def test_each_row_is_the_paired_difference_of_its_documents_and_the_worst_leads(pair):
    found = ml.decisions.judge(*pair, documents=DOCUMENTS, limits={"loss": 0.1}, tokenizer=Letters(), settings=QUIET)
    table = found.table
    before, after = (document_losses(model, DOCUMENTS) for model in pair)
    tokens = np.array([len(document["text"]) for document in DOCUMENTS], float)
    domain = np.array([document["domain"] for document in DOCUMENTS])
    each = 1 - (1 - DECISION.level) / len(table)
    for row in table.to_dict("records"):
        own = np.ones(36, bool) if row["mean"] else domain == row["group"]
        change = Difference(leaving_out((after - before)[own]), leaving_out(tokens[own]))
        wanted = [float(x) for x in with_bounds(change, tokens[own], each)]
        np.testing.assert_allclose([row[name] for name in ("estimate", "ci_low", "ci_high")], wanted, rtol=1e-4)
        assert row["n"] == own.sum()
        np.testing.assert_allclose(row["after"], after[own].sum() / tokens[own].sum(), rtol=1e-5)
    assert table["mean"].tolist() == [False, False, False, True]
    assert table["estimate"].iloc[:3].is_monotonic_decreasing
    assert found.data.attrs["verdict"] == found.verdict


def judgement_of(rows: list[tuple[str, float, float, float]], limits) -> Judgement:
    columns = ["kind", "estimate", "ci_low", "ci_high"]
    table = pd.DataFrame(rows, columns=columns).assign(
        group=[f"g{number}" for number in range(len(rows))], before=1.0, after=1.0, n=10, mean=False
    )
    return Judgement(table, limits, {"level": 0.99, "before": {}, "after": {}})


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([("loss", 0.01, -0.01, 0.04), ("score", -0.01, -0.019, 0.0)], DO),
        ([("loss", 0.01, -0.01, 0.06), ("score", 0.0, -0.01, 0.01)], UNKNOWN),
        ([("loss", 0.01, -0.01, 0.04), ("score", -0.2, -0.3, -0.03)], DO_NOT),
        ([("loss", 0.2, 0.1, 0.3), ("score", 0.0, -0.5, 0.5)], DO_NOT),
        ([("loss", 0.01, np.nan, np.nan)], UNKNOWN),
    ],
)
def test_the_verdict_is_that_of_the_worst_row_against_its_limit(rows, wanted):
    judgement = judgement_of(rows, {"loss": 0.05, "score": 0.02})
    assert judgement.verdict == wanted
    decides = next(group for group, found in zip(judgement.table["group"], judgement.verdicts, strict=True)
                   if found == wanted)  # fmt: skip
    assert decides in judgement.reason


def test_other_limits_give_another_verdict_of_the_same_measurement():
    judgement = judgement_of([("loss", 0.03, 0.02, 0.04)], {"loss": 0.05})
    assert [judgement.within({"loss": limit}).verdict for limit in (0.05, 0.03, 0.01)] == [DO, UNKNOWN, DO_NOT]
    for limits in ({}, {"loss": -1.0}, {"loss": np.nan}, {"score": 0.1}):
        with pytest.raises(BadInput):
            judgement.within(limits)


def test_a_run_holds_what_was_judged_and_is_opened_again(pair, tmp_path):
    said = {"limits": {"loss": 0.1}, "tokenizer": Letters(), "settings": QUIET, "out": tmp_path / "gate"}
    first = ml.decisions.judge(*pair, documents=DOCUMENTS, **said)
    opened = ml.open(tmp_path / "gate")
    pd.testing.assert_frame_equal(opened.table, first.table)
    assert (opened.verdict, opened.reason) == (first.verdict, first.reason)
    assert opened.meta["verdict"] == first.verdict
    again = ml.decisions.judge(*pair, documents=DOCUMENTS, **said)
    assert again.meta["created"] == first.meta["created"]
    with pytest.raises(ml.RunError):
        ml.decisions.judge(*pair, documents=DOCUMENTS[:9], **said)
    other = tiny_mixtral(seed=1)
    with pytest.raises(BadInput):
        ml.decisions.save(other, tmp_path / "other", judgement=first)
    card = (ml.decisions.save(pair[1], tmp_path / "five", judgement=first) / "README.md").read_text("utf-8")
    assert first.reason in card


def test_suites_are_judged_by_their_worst_subject(tmp_path):
    demo = ml.load("demo", verbose=False)
    pruned = ml.decisions.prune(demo, {layer: range(4) for layer in range(8)})
    logs = tuple(ml.evaluate(model, ["demo"], limit=4, settings=EVALUATION) for model in (demo, pruned))
    found = ml.decisions.judge(demo, pruned, logs, limits={"score": 0.1})
    each = Bootstrap(level=1 - (1 - DECISION.level) / len(found.table))
    wanted = ml.compare(*logs, bootstrap=each).table.set_index("task")
    assert found.table["mean"].tolist() == [False] * 6 + [True]
    assert found.table["estimate"].iloc[:6].is_monotonic_increasing
    for row in found.table.to_dict("records"):
        assert row["n"] == (24 if row["mean"] else 4)
        if not row["mean"]:  # all of so few may be answered otherwise by chance
            assert np.isnan([row["ci_low"], row["ci_high"]]).all()
            continue
        for ours, theirs in (("estimate", "difference"), ("ci_low", "ci_low"), ("ci_high", "ci_high")):
            assert row[ours] == wanted.loc[row["group"], theirs]


@pytest.mark.slow
def test_evaluations_lie_in_the_run(tmp_path):
    demo = ml.load("demo", verbose=False)
    pruned = ml.decisions.prune(demo, {layer: range(4) for layer in range(8)})
    found = ml.decisions.judge(
        demo, pruned, "demo", limits={"score": 0.1}, out=tmp_path / "gate", evaluation=EVALUATION
    )
    assert len(ml.open(tmp_path / "gate" / "before").records) == 340
    assert found.verdict == ml.open(tmp_path / "gate").verdict == DO_NOT


def test_nothing_to_judge_and_models_that_do_not_go_together_are_refused(pair):
    for wrong in ({"limits": {"loss": 0.1}}, {"documents": DOCUMENTS, "limits": {"score": 0.1}}):
        with pytest.raises(BadInput):
            ml.decisions.judge(*pair, tokenizer=Letters(), settings=QUIET, **wrong)
    with pytest.raises(BadInput):
        ml.decisions.judge(pair[0], tiny_mixtral(vocab_size=130), documents=DOCUMENTS, limits={"loss": 0.1})
    nameless = [{"text": document["text"]} for document in DOCUMENTS]
    with pytest.raises(BadInput) as refused:
        ml.decisions.judge(*pair, documents=nameless, limits={"loss": 0.1}, tokenizer=Letters(), settings=QUIET)
    assert refused.value.argument == "by"


def draws_without_a_verdict(count: int, pair) -> int:
    """How often nothing is said of two models whose parts in each document were exchanged at random."""
    losses = [document_losses(model, DOCUMENTS) for model in pair]
    length = np.array([len(document["text"]) + 1 for document in DOCUMENTS])
    ids = np.tile([0, 1], (length.sum(), 1, 1))
    frame = pd.DataFrame(DOCUMENTS)[["domain"]].assign(document_id=[f"d{i}" for i in range(len(DOCUMENTS))])
    unknown = 0
    for seed in range(count):
        swapped = np.random.default_rng(seed).integers(2, size=len(length)).astype(bool)
        traces = []
        for own, other in (losses, losses[::-1]):
            logprob = np.repeat(-np.where(swapped, other, own) / (length - 1), length)
            tokens = {"sequence": np.repeat(np.arange(len(length)), length), "logprob": logprob}
            traces.append(ml.Trace.from_arrays(ids, n_experts=8, tokens=tokens, sequences=frame))
        table = table_of((traces[0], traces[1]), [], "domain", DECISION)
        unknown += Judgement(table, {"loss": 0.0}, {"level": DECISION.level}).verdict == UNKNOWN
    return unknown


def test_models_that_differ_by_chance_get_no_verdict(pair):
    assert draws_without_a_verdict(12, pair) >= 11


@pytest.mark.slow
def test_models_that_differ_by_chance_get_no_verdict_in_a_hundred_draws(pair):
    assert draws_without_a_verdict(100, pair) >= 95
