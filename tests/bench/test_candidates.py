"""Evaluations and benchmarks of the same models put together: scores, prices and speeds, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from bench_samples import bench
from helpers.refusals import refused

import mixlens as ml
from mixlens import show
from mixlens.bench.bench import Bench
from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.evals.scoring import wilson
from mixlens.plot.style import note_of
from mixlens.pricing.report import tradeoff_sections
from mixlens.pricing.tradeoff import Candidate, candidates, frontier

SMALL, LARGE = "mistralai/mixtral-8x7b-instruct", "mistralai/mixtral-8x22b-instruct"
OPENROUTER, DEEPINFRA = "https://openrouter.ai/api/v1", "https://api.deepinfra.com/v1/openai"


def log(right: int, name: str = "mistralai/Mixtral-8x7B-Instruct-v0.1", *, n: int = 50, **changes) -> Log:
    """An evaluation on a benchmark of one task, so many right."""
    task, metric, limit = (changes.pop(key, None) for key in ("task", "metric", "limit"))
    task, better = task or "mmlu_5shot", changes.pop("better", True)
    metric = metric or "acc"
    texts = dict.fromkeys(("prompt", "target", "response", "doc_hash"), "x")
    rest = dict.fromkeys(("group", "responses", "choices", "logprobs", "gold"))
    records = [
        {"task": task, "sample_id": i, "metrics": {metric: v}, "correct": v, **texts, **rest}
        for i, v in enumerate([1.0] * right + [0.0] * (n - right))
    ]
    how = {"aggregation": "mean", "higher_is_better": better}
    about = {"benchmark": task.split("_")[0], "protocol": task, "primary": metric, "metrics": {metric: how}}
    meta = {
        "tasks": {task: about},
        "settings": {"limit": limit},
        "versions": {},
        "created": "2026-01-02T00:00:00+00:00",
    }
    return Log(records, meta | {"model": {"name": name} | changes})


def speeds(name: str = SMALL, url: str = OPENROUTER, loads: dict | None = None, **model) -> Bench:
    """31.1 tokens per second at concurrency 1; half of it at concurrency 4."""
    loads = loads or {"concurrency 1": [1.0, 1.0], "concurrency 4": [2.0, 2.0]}
    return bench(loads, model={"name": name} | model, endpoint={"url": url, "model": name})


def test_score_price_and_speed_of_one_model_under_its_names():
    first, second = candidates([log(35), speeds()])
    assert first.score == pytest.approx((70.0, *(100 * bound for bound in wilson(35, 50))))
    assert first.usd_per_mtok == pytest.approx((1000 * 0.08 + 500 * 0.24) / 1500)
    assert first.tokens_per_s[0] == pytest.approx(28 / 0.9)
    assert second.tokens_per_s[0] == pytest.approx(14 / 0.9)
    assert first.tokens_per_s[1] <= first.tokens_per_s[0] <= first.tokens_per_s[2]
    assert (first.name, second.name) == tuple(f"mixtral-8x7b-instruct, OpenRouter, concurrency {n}" for n in (1, 4))
    assert first.benchmark == "mmlu, mmlu_5shot: acc [%]"
    for words in ("50 samples", "concurrency 1 over 2 requests, 2026-01-01", "OpenRouter's page", "1,000 in, 500 out"):
        assert words in first.source
    assert frontier([first, second])["frontier"].tolist() == [True, False]


def test_statements_of_a_price_that_contradict_each_other_are_candidates_of_their_own():
    found = candidates([log(40, LARGE), speeds(LARGE, loads={"concurrency 1": [1.0, 1.0]})], tokens=(1, 1))
    assert [one.usd_per_mtok for one in found] == pytest.approx([0.8, 4.0])
    assert [one.name.rpartition(", ")[2] for one in found] == ["$0.8/Mtok", "$4/Mtok"]


def test_without_a_price_a_candidate_is_kept_and_not_drawn():
    local = speeds("mixtral", "http://127.0.0.1:8000/v1", {"concurrency 1": [1.0, 1.0]})
    runs = [log(35), local, log(30, LARGE), speeds(LARGE)]
    names = {"mixtral": "mistralai/Mixtral-8x7B-Instruct-v0.1"}
    first, *others = candidates(runs, names=names)
    assert (first.name, len(others)) == ("mixtral-8x7b-instruct, 127.0.0.1", 4)
    assert np.isnan(first.usd_per_mtok)
    assert "no price known" in first.source
    mine = pd.DataFrame(
        [{"provider": "127.0.0.1", "model": SMALL, "input_usd_per_mtok": 1.0, "output_usd_per_mtok": 1.0}]
    )
    mine = mine.assign(source="an electricity bill")
    assert candidates(runs[:2], names=names, table=mine)[0].usd_per_mtok == pytest.approx(1.0)


def test_two_models_in_one_picture_and_in_the_report(tmp_path):
    runs = [log(35), log(40, LARGE), speeds(LARGE), speeds(), speeds(url=DEEPINFRA)]
    ax = show.quality_cost_speed(runs)
    assert ax.get_ylabel() == "mmlu, mmlu_5shot: acc [%]"
    assert "8 candidates" in note_of(ax)
    ours = show.quality_cost_speed(
        [*runs[:1], runs[3], Candidate("by hand", (70, 60, 80), 1.0, (5, 5, 5), "", ax.get_ylabel())]
    )
    assert "3 candidates" in note_of(ours)
    page = ml.report([runs[1], runs[2]], tmp_path / "r.html").read_text()
    assert "mixtral-8x22b-instruct, OpenRouter, concurrency 1, $0.667/Mtok" in page
    assert page.count("Quality, cost and speed</h2>") == 1


def test_the_section_says_why_there_is_no_picture():
    [text] = tradeoff_sections([log(35), speeds("another")]).values()
    assert "Not compared: " in text
    [text] = tradeoff_sections([log(1, "demo"), speeds("demo", "http://127.0.0.1:1/v1")]).values()
    assert "Not drawn: " in text
    assert "demo, 127.0.0.1, concurrency 4" in text
    assert not tradeoff_sections([speeds(), speeds()])


NF4, BF16 = ({"audit": {"label": label}} for label in ("nf4", "bfloat16"))


@pytest.mark.parametrize(
    ("runs", "argument", "named"),
    [
        ([log(1), speeds(LARGE)], "runs", (LARGE, SMALL)),
        ([log(1), speeds(), log(1, "mistralai/Mixtral-8x7B-v0.1")], "runs", ("Mixtral-8x7B-v0.1",)),
        ([log(1), log(2), speeds()], "runs", (SMALL, "2")),
        ([log(1, **NF4), speeds(**BF16)], "runs", ("nf4", "bfloat16")),
        ([log(1, revision="a1b2"), speeds(revision="c3d4")], "runs", ("a1b2", "c3d4")),
        ([log(1, router_sha256="a"), speeds(router_sha256="b")], "runs", ("routers",)),
        ([log(1, edits=["ablate"]), speeds()], "runs", ("edits",)),
        (
            [log(1), speeds(), log(1, LARGE, task="gsm8k_8shot"), speeds(LARGE)],
            "score",
            ("mmlu_5shot: acc", "gsm8k_8shot: acc"),
        ),
        ([log(1), speeds(), log(1, LARGE, limit=20), speeds(LARGE)], "score", ("20",)),
        ([log(1), speeds(), log(1, LARGE, n=20), speeds(LARGE)], "limit", ("20", "50")),
        ([log(1, better=False), speeds()], "score", ("mmlu_5shot: acc",)),
        ([log(1)], "runs", ("Log",)),
        ([], "runs", ()),
        ([log(1), speeds(), "run"], "runs", ("Log", "Bench", "str")),
    ],
)
def test_what_does_not_belong_together_is_refused_by_name(runs, argument, named):
    with refused(BadInput, argument) as caught:
        candidates(runs)
    assert all(name in str(caught.value) for name in named)


def test_the_same_weights_need_no_name():
    found = candidates([log(1, "here", router_sha256="a", **BF16), speeds("there", router_sha256="a", **BF16)])
    assert len(found) == 2


def test_a_score_is_chosen_by_benchmark_or_protocol():
    both = log(35)
    other = log(10, task="arc_25shot")
    both.meta["tasks"] |= other.meta["tasks"]
    both.records += other.records
    runs = [both, speeds()]
    with refused(BadInput, "score", 2):
        candidates(runs)
    assert candidates(runs, score="arc")[0].score[0] == pytest.approx(20.0)
    assert candidates(runs, score="mmlu_5shot")[0].score[0] == pytest.approx(70.0)
    with refused(BadInput, "score", 0):
        candidates(runs, score="gsm8k")


def test_scores_of_two_benchmarks_are_not_laid_side_by_side():
    one, other = (Candidate(str(i), (1, 1, 1), 1.0, (1, 1, 1), benchmark=str(i)) for i in range(2))
    with refused(BadInput, "score"):
        frontier([one, other])


def test_where_one_side_does_not_know_its_routers_names_decide():
    """A server shows no routers."""
    assert len(candidates([log(1, router_sha256="a"), speeds()])) == len(candidates([log(1), speeds()])) > 0
