"""Routing of an evaluation's own samples: that of the rows themselves, whatever the batch, prefix or resumption."""

from __future__ import annotations

import pytest
from helpers.refusals import refused

import mixlens as ml
from mixlens.core.run_dir import RunWriter
from mixlens.errors import BadInput, MissingSignal
from mixlens.evals.response_cache import Answers
from mixlens.evals.routing import flipped_routing, sample_share, samples_of
from mixlens.evals.runner import EvalSettings

LIMIT = 3
TASKS = ["demo_0shot::languages", "demo_0shot::agreement"]


def settings(**changed) -> EvalSettings:
    return EvalSettings(progress=False, routing=True, **{"batch_size": 4, **changed})


@pytest.fixture(scope="module")
def demo():
    return ml.load("demo", verbose=False)


@pytest.fixture(scope="module")
def log(demo):
    return ml.evaluate(demo, TASKS, limit=LIMIT, settings=settings())


def rows(trace) -> dict:
    """Token ids and expert ids of every row, by what it is of."""
    frame, ids = trace.to_pandas(), {}
    for sequence, about in trace.sequences.iterrows():
        tokens = frame[frame["sequence"] == sequence].drop_duplicates("position").sort_values("position")
        key = (about["task"], about["sample_id"], about["choice"])
        chosen = frame[frame["sequence"] == sequence]["expert_id"].tolist()
        ids[key] = (tuple(tokens["position"]), tuple(tokens["token_id"]), tuple(chosen))
    return ids


def test_every_row_is_routed_as_when_it_is_read_alone(demo, log):
    alone = rows(ml.evaluate(demo, TASKS, limit=LIMIT, settings=settings(batch_size=1)).routing)
    batched = rows(log.routing)
    assert {key: row[:2] for key, row in batched.items()} == {key: row[:2] for key, row in alone.items()}
    pairs = [pair for key in alone for pair in zip(alone[key][2], batched[key][2], strict=True)]
    assert sum(a == b for a, b in pairs) / len(pairs) > 0.999  # a margin below rounding may turn


def test_tokens_have_their_text(log):
    kept = samples_of(log)
    prompts = {(record["task"], record["sample_id"]): record["prompt"] for record in log.records}
    for number, about in kept.sequences.iterrows():
        pieces = kept.pieces(kept.read("token_id")[kept.read("sequence") == number])
        assert prompts[about["task"], about["sample_id"]].strip() in "".join(pieces)


def test_no_padding_is_counted_and_every_sample_has_one_row(log):
    kept = samples_of(log)
    assert sorted(zip(kept.sequences["task"], kept.sequences["sample_id"], strict=True)) == sorted(
        (record["task"], record["sample_id"]) for record in log.records
    )
    assert log.routing.n_tokens == int(log.routing.sequences["length"].sum())
    # One row a choice where choices have several tokens, one row in all where they have one.
    by_task = log.routing.sequences.groupby("task").size()
    assert by_task["demo_0shot::languages"] == 5 * LIMIT
    assert by_task["demo_0shot::agreement"] == LIMIT


def test_scores_are_those_without_recording(demo, log):
    plain = ml.evaluate(demo, TASKS, limit=LIMIT, settings=EvalSettings(progress=False, batch_size=4))
    assert plain.records == log.records
    with refused(MissingSignal, "routing"):
        sample_share(plain)


def test_shots_that_are_read_once_are_rows_of_their_own(demo, shared):
    asked = {"data": shared / "data", "limit": 4}
    task = "mmlu_5shot::anatomy"
    once = ml.evaluate(demo, task, settings=settings(), **asked)
    each = ml.evaluate(demo, task, settings=settings(share_prefix=False), **asked)
    shots = once.routing.select(where={"role": "shots"})
    assert len(shots.sequences) == 1
    prefix = shots.n_tokens
    whole, rest = rows(each.routing), rows(samples_of(once))
    same, total = 0, 0
    for key, (positions, tokens, chosen) in rest.items():
        assert positions[0] == prefix
        assert tokens == whole[key][1][prefix:]
        behind = whole[key][2][-len(chosen) :]
        same, total = same + sum(a == b for a, b in zip(chosen, behind, strict=True)), total + len(chosen)
    assert same / total > 0.999  # a margin below rounding may turn


def test_a_resumed_run_has_the_routing_of_all(demo, tmp_path, monkeypatch):
    whole = ml.evaluate(demo, TASKS, limit=LIMIT, settings=settings(), out=tmp_path / "whole")
    add, calls = Answers.add, []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(Answers, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        ml.evaluate(demo, TASKS, limit=LIMIT, settings=settings(), out=tmp_path / "killed")
    resumed = ml.evaluate(demo, TASKS, limit=LIMIT, settings=settings(), out=tmp_path / "killed")
    assert rows(resumed.routing) == rows(whole.routing)
    assert resumed.routing.sequences.equals(whole.routing.sequences)
    assert sorted(p.name for p in (tmp_path / "killed").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    assert rows(ml.open(tmp_path / "killed").routing) == rows(whole.routing)


def test_a_run_that_was_killed_while_it_was_finished_loses_no_routing(demo, log, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunWriter, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            ml.evaluate(demo, TASKS, limit=LIMIT, settings=settings(), out=tmp_path)
    assert rows(ml.evaluate(demo, TASKS, limit=LIMIT, settings=settings(), out=tmp_path).routing) == rows(log.routing)
    assert not (tmp_path / "unfinished").exists()


def test_shares_by_subject_and_by_outcome(log):
    by_subject = sample_share(log)
    assert by_subject["group"].values.tolist() == ["agreement", "languages"]
    assert by_subject.estimate.sum("expert").values == pytest.approx(1)
    outcomes = set(sample_share(log, by="outcome")["outcome"].values)
    assert outcomes == {"right" if record["correct"] else "wrong" for record in log.records}


def test_routing_of_flipped_samples(demo, log):
    same = flipped_routing(log, log)
    assert same["change"].values.tolist() == ["same"]
    assert (same.estimate.sel(measure="overlap") == 1).all()
    with ml.edit(demo, ml.edits.forbid(None, [0, 1, 2, 3, 4, 5])):
        worse = ml.evaluate(demo, TASKS, limit=LIMIT, settings=settings())
    compared = flipped_routing(log, worse)
    changes = {record["change"] for record in ml.compare(log, worse).flips.to_dict("records")}
    assert set(compared["change"].values) == changes | {"same"}
    assert (compared.estimate.sel(measure="overlap") < 1).all()


def test_other_samples_are_refused(demo, log):
    fewer = ml.evaluate(demo, TASKS, limit=LIMIT - 1, settings=settings())
    with refused(BadInput, "samples"):
        flipped_routing(log, fewer)


def test_a_model_elsewhere_shows_no_routing():
    from mixlens.evals.routing import SampleRecorder

    with refused(BadInput, "routing"):
        SampleRecorder(object(), None)
