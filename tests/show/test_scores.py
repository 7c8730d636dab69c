"""Pictures and tables of evaluations: what is drawn is what the log holds, and only what can be compared."""

from __future__ import annotations

import re

import numpy as np
import pytest

import mixlens as ml
from mixlens import show
from mixlens.evals.log import Log
from mixlens.evals.paired import compare_logs
from mixlens.evals.published import beside
from mixlens.evals.report import score_sections
from mixlens.plot.style import note_of

N = {"mmlu_5shot": 14042, "arc_challenge_25shot": 1172}


def log(share: float, name: str = "mistralai/Mixtral-8x7B-v0.1", limit: int | None = None) -> Log:
    """A log of made-up samples, of which the first part of every task is right."""
    metric = {"mmlu_5shot": "acc", "arc_challenge_25shot": "acc_norm"}
    records = [
        {
            "task": task, "sample_id": i, "doc_hash": f"{i}", "group": None, "prompt": f"<b>{i}</b> | $x$",
            "target": "A", "response": "A", "responses": None, "choices": ["A", "B", "C", "D"],
            "logprobs": [0.0] * 4, "gold": 0, "metrics": {metric[task]: value}, "correct": value,
        }
        for task, n in N.items()
        for i, value in enumerate((np.arange(limit or n) < share * (limit or n)).astype(float).tolist())
    ]  # fmt: skip
    tasks = {
        task: {
            "benchmark": task.rsplit("_", 1)[0], "protocol": task, "version": "1", "primary": metric[task],
            "metrics": {metric[task]: {"aggregation": "mean"}}, "shots": int(task.split("_")[-1].removesuffix("shot")),
            "split": "test", "scorer": "lm-evaluation-harness",
        }
        for task in N
    }  # fmt: skip
    meta = {"model": {"name": name}, "tasks": tasks, "settings": {"limit": limit}, "versions": {}}
    return Log(records, meta | {"created": "2026-01-02T00:00:00+00:00"})


@pytest.fixture(scope="module")
def whole() -> Log:
    return log(0.7)


def marks(ax, label: str) -> set[float]:
    return {round(float(x), 1) for line in ax.lines if line.get_label() == label for x in line.get_xdata()}


def test_scores_intervals_chance_and_comparable_references_are_drawn(whole):
    ax = show.scores(whole)
    assert marks(ax, "Mixtral-8x7B-v0.1") == {70.0, 70.1}
    assert marks(ax, "chance") == {25.0}
    published = beside(whole)
    comparable = published[published["comparable"]]
    assert set(comparable["status"]) == {"official"}
    for status, rows in comparable.groupby("status"):
        assert marks(ax, f"published: {status}") == set(rows["published"].round(1))
    assert f"{int((~published['comparable']).sum())} published scores by other protocols" in note_of(ax)
    low, high = ax.get_xlim()
    assert low < comparable["published"].min() <= comparable["published"].max() < high


def test_a_part_of_a_benchmark_has_no_reference_and_says_so():
    ax = show.scores(log(0.7, limit=40))
    assert not [line for line in ax.lines if str(line.get_label()).startswith("published")]
    assert "no scores of the benchmarks" in note_of(ax).replace("\n", " ")


def test_several_models_have_rows_side_by_side(whole):
    ax = show.scores({"one": whole, "two": log(0.5)}, subjects=True)
    assert marks(ax, "two") == {50.0}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["mmlu 5shot", "arc challenge 25shot"]


def test_differences_are_filled_where_the_data_tells_two_apart():
    one, other = log(0.7, limit=100), log(0.5, "other", limit=100)
    ax = show.paired_differences(compare_logs(one, other))
    points = [line for line in ax.lines if line.get_marker() == "o"]
    assert [round(float(p.get_xdata()[0])) for p in points] == [-20, -20]
    assert all(p.get_markerfacecolor() == p.get_color() for p in points)
    assert "20 lost, 0 gained of 100" in [t.get_text() for t in ax.texts]
    same = show.paired_differences(compare_logs(one, log(0.69, "other", limit=100)))
    assert {p.get_markerfacecolor() for p in same.lines if p.get_marker() == "o"} == {"white"}


def test_tables_say_why_a_published_score_is_not_beside(whole):
    table = ml.evals.score_table(whole)
    other = table[table["difference"] == "not comparable"]
    assert other["source or reason"].str.contains("published|not stated").all()
    compared = table[table["difference"].str.match(r"[+-]\d")]
    assert len(compared) + len(other) == len(table)
    assert "70.0 [69.2, 70.8]" in set(table["score, %"])


def test_the_report_has_scores_samples_and_comparison(tmp_path):
    one, other = log(0.7, limit=30), log(0.5, "other", limit=30)
    page = ml.report([one, compare_logs(one, other)], tmp_path / "report.html").read_text("utf-8")
    for heading in ("Benchmark scores", "Samples", "How it was evaluated", "Paired comparison", "Flipped samples"):
        assert f"{heading}</h2>" in page
    assert "is better than" in page
    assert "60 samples whose two likeliest choices lie within 1e-4" in page
    assert "<b>0</b>" not in page
    assert "&lt;b&gt;0&lt;/b&gt;" in page


def test_what_a_chat_endpoint_answered_is_beside_no_published_score(whole):
    asked = Log(whole.records, whole.meta | {"model": {**whole.meta["model"], "endpoint": {"protocol": "openai-chat"}}})
    table = beside(asked)
    assert not table["comparable"].any()
    assert table["why_not"].str.contains("asked by openai-chat: the server's chat template").all()


def test_the_wrong_samples_of_every_task_stand_first():
    some = log(0.7, limit=100)
    table = score_sections(some)["Samples"]
    assert "the wrong ones of every task first" in table
    numbers = [int(n) for n in re.findall(r"<td>&lt;b&gt;(\d+)&lt;/b&gt;", table)]
    assert numbers[:40] == [*range(70, 90), *range(70, 90)]
