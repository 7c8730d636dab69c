"""Paired comparison of two evaluations: against scipy, nested loops, and by its own symmetry."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from helpers.displayed import numbers
from helpers.refusals import refused
from scipy import stats
from scipy.stats import binom, binomtest, false_discovery_control

from mixlens import compare
from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.evals.paired import compare_logs, mcnemar, paired_difference
from mixlens.evals.published import beside
from mixlens.evals.scoring import near_ties, primary_rows


def log(correct: dict[str, list[float | None]], name: str = "one", **task) -> Log:
    """A log of made-up samples: by task, whether each was right."""
    about = {"benchmark": "quiz", "protocol": "quiz_0shot", "version": "1", "primary": "acc", "metrics": {}}
    about["metrics"] = {"acc": {"aggregation": "mean"}}
    records = [
        {
            "task": of, "sample_id": i, "doc_hash": f"{of}{i}", "group": None, "prompt": f"question {i}",
            "target": "A", "response": "A" if value else "B", "responses": None, "choices": ["A", "B"],
            "logprobs": [-1.0, -2.0], "gold": 0, "metrics": {"acc": value}, "correct": value,
        }
        for of, values in correct.items()
        for i, value in enumerate(values)
    ]  # fmt: skip
    meta = {"model": {"name": name}, "tasks": {of: {**about, **task} for of in correct}}
    return Log(records, meta)


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (0, 5), (3, 9), (10, 10), (40, 61), (900, 1040)])
def test_mcnemar_is_scipys_binomial_test(only_a, only_b):
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_without_a_difference_mcnemars_test_is_wrong_in_at_most_5_per_cent_however_few_samples_flip():
    """As docs/evaluate.md says."""
    for n in range(1, 80):
        wrong = sum(binom.pmf(k, n, 0.5) for k in range(n + 1) if mcnemar(k, n - k) <= 0.05)
        assert wrong <= 0.05


def test_counts_and_scores_are_those_of_nested_loops():
    rng = np.random.default_rng(0)
    a = {task: list(map(float, rng.integers(0, 2, 40))) for task in ("x", "y")}
    b = {task: [v if rng.random() < 0.7 else 1 - v for v in values] for task, values in a.items()}
    compared = compare_logs(log(a), log(b, "two"))
    table = compared.table.set_index("task")
    for task in ("x", "y"):
        only_a = sum(1 for p, q in zip(a[task], b[task], strict=True) if p == 1 and q == 0)
        only_b = sum(1 for p, q in zip(a[task], b[task], strict=True) if p == 0 and q == 1)
        assert (table.only_a[task], table.only_b[task], table.n[task]) == (only_a, only_b, 40)
        assert table.difference[task] == pytest.approx((only_b - only_a) / 40)
        flipped = {(f.task, f.sample_id, f.change) for f in compared.flips.itertuples() if f.task == task}
        expected = {
            (task, i, "gained" if q > p else "lost")
            for i, (p, q) in enumerate(zip(a[task], b[task], strict=True))
            if p != q
        }
        assert flipped == expected
    assert table.only_a["quiz"] == table.only_a["x"] + table.only_a["y"]
    assert table.n["quiz"] == 80


def test_the_interval_of_right_and_wrong_is_that_of_bonett_and_price():
    rng = np.random.default_rng(1)
    a = rng.integers(0, 2, 40).astype(float)
    b = np.where(rng.random(40) < 0.2, 1 - a, a)
    gained, lost = ((b > a).sum() + 1) / 42, ((a > b).sum() + 1) / 42
    half = stats.norm.ppf(0.95) * np.sqrt((gained + lost - (gained - lost) ** 2) / 42)
    _, low, high = paired_difference(a, b, np.zeros(40), 0.9)
    assert (low, high) == pytest.approx((gained - lost - half, gained - lost + half))


def test_the_interval_of_other_scores_is_that_of_t_within_tasks():
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 60))
    task = np.repeat(["x", "y", "z"], 20)
    within = sum(((d := (b - a)[task == name]) - d.mean()) @ (d - d.mean()) for name in "xyz")
    half = stats.t.ppf(0.975, 57) * np.sqrt(within / 57 / 60)
    _, low, high = paired_difference(a, b, task, 0.95)
    assert (low, high) == pytest.approx(((b - a).mean() - half, (b - a).mean() + half))


@pytest.mark.parametrize("n", [3, 8, 20, 100])
@pytest.mark.parametrize("flips", [(0.05, 0.05), (0.3, 0.1)])
def test_the_interval_covers_the_truth_as_often_as_it_says(n, flips):
    """Every outcome by its probability: exact."""
    covered, gained, lost = 0.0, *flips
    outcomes = [(g, w) for g in range(n + 1) for w in range(n + 1 - g)]
    for g, w in outcomes:
        a, b = np.repeat([0.0, 1.0, 1.0], [g, w, n - g - w]), np.repeat([1.0, 0.0, 1.0], [g, w, n - g - w])
        chance = stats.multinomial.pmf([g, w, n - g - w], n, [gained, lost, 1 - gained - lost])
        if chance > 1e-7:
            _, low, high = paired_difference(a, b, np.zeros(n), 0.95)
            covered += chance * (low <= gained - lost <= high)
    assert 0.94 <= covered
    assert covered <= 0.97 or n * (gained + lost) < 10


def test_swapping_the_logs_turns_everything_round():
    a, b = log({"x": [1.0] * 30 + [0.0] * 10}), log({"x": [0.0] * 12 + [1.0] * 28}, "two")
    one, other = compare_logs(a, b).table.iloc[0], compare_logs(b, a).table.iloc[0]
    assert (one.only_a, one.only_b, one.difference) == (other.only_b, other.only_a, -other.difference)
    assert one.p_value == other.p_value
    assert one.ci_low == pytest.approx(-other.ci_high, abs=0.03)


def test_what_the_data_says_in_a_sentence():
    right, wrong = [1.0] * 50, [0.0] * 50
    better = compare_logs(log({"x": wrong}), log({"x": right}, "two"))
    assert better.verdicts() == [
        "x: one 0.000, two 1.000 on the same 50 samples. two is better than one: +1.000 [+0.887, +1.000] "
        "(0 right in one only, 50 in two only; p < 0.0001)."
    ]
    mixed = compare_logs(log({"x": [1.0, 0.0, *right]}), log({"x": [0.0, 1.0, *right]}, "two"))
    assert "The data cannot tell them apart: +0.000 [" in mixed.verdicts()[0]
    assert "(1 right in one only, 1 in two only; p = 1.00)" in mixed.verdicts()[0]
    same = compare_logs(log({"x": right}), log({"x": right}))
    assert same.names == ("one (first)", "one (second)")
    assert "right in both or wrong in both; the data cannot tell them apart" in same.verdicts()[0]
    assert len(same.flips) == 0


@pytest.mark.parametrize(
    ("n", "only_a", "only_b", "said"),
    [
        (40, 0, 5, "The data cannot tell them apart: +0.125 [+0.001, +0.237] (0 right in one only, 5 in two only; "
                   "p = 0.0625). The interval alone leaves out 0; the exact test leads, since at any number"),
        (300, 36, 56, "two is better than one: +0.067 [+0.004, +0.129] (36 right in one only, 56 in two only; "
                      "p = 0.0470)."),
        (40, 0, 6, "two is better than one: "),
        (40, 3, 4, "The data cannot tell them apart: "),
    ],
)  # fmt: skip
def test_where_test_and_interval_disagree_the_sentence_says_which_leads(n, only_a, only_b, said):
    same = [1.0] * (n - only_a - only_b)
    one = log({"x": [1.0] * only_a + [0.0] * only_b + same})
    row = compare_logs(one, log({"x": [0.0] * only_a + [1.0] * only_b + same}, "two"))
    assert said in row.verdicts()[0]
    assert ("the exact test leads" in row.verdicts()[0]) == ("leads" in said)


def test_samples_between_whose_choices_rounding_decides_are_listed():
    one = log({"x": [1.0, 1.0, 0.0, 1.0], "y": [1.0]})
    for record, logprobs in zip(
        one.records, [[-1.0, -1.00005], [-2.0, -2.0], [-1.0, -1.0002], [-3.0, -1.0]], strict=False
    ):
        record["logprobs"] = logprobs
    one.records[4] |= {"choices": None, "logprobs": None}
    one.meta |= {"settings": {"limit": None}, "created": "", "versions": {}}
    near = one.near_ties
    assert near[["task", "sample_id", "first", "second"]].to_numpy().tolist() == [
        ["x", 0, "A", "B"],
        ["x", 1, "A", "B"],
    ]
    assert near["gap"].tolist() == pytest.approx([5e-5, 0.0])
    assert "In 2 the two likeliest choices lie within 1e-4." in one.remarks()[1]
    generated = log({"x": [1.0]})
    generated.records[0] |= {"choices": None, "logprobs": [-7.0]}  # a perplexity has one value and no choices
    assert generated.near_ties.empty


def test_a_metric_that_is_no_yes_or_no_has_an_interval_and_no_mcnemar():
    rng = np.random.default_rng(3)
    a = list(rng.random(60))
    row = compare_logs(log({"x": a}), log({"x": [v + 0.2 for v in a]}, "two"))
    assert np.isnan(row.table.only_a[0])
    assert row.table.p_value[0] == row.table.q[0] < 1e-6
    assert row.table.ci_low[0] == pytest.approx(0.2)
    assert "two is better than one" in row.verdicts()[0]


def subjects(seed: int, better: int = 0) -> pd.DataFrame:
    """The rows of 57 subjects of 60 questions that two models answer alike but for noise, but for the first ones."""
    rng = np.random.default_rng(seed)
    a = {f"s{i}": rng.integers(0, 2, 60).astype(float) for i in range(57)}
    b = {task: np.where(rng.random(60) < 0.2, rng.integers(0, 2, 60), right) for task, right in a.items()}
    b |= {f"s{i}": np.where(rng.random(60) < 0.8, 1.0, b[f"s{i}"]) for i in range(better)}
    sides = (log({t: v.tolist() for t, v in x.items()}, name) for x, name in ((a, "one"), (b, "two")))
    compared = compare_logs(*sides)
    return compared.table.set_index("task")


def test_of_57_subjects_of_equal_models_hardly_ever_one_is_better():
    tables = [subjects(seed).drop(index="quiz") for seed in range(12)]
    assert sum(table["survives"].any() for table in tables) <= 2  # 5 %, and more than two standard errors
    assert sum((table["p_value"] <= 0.05).any() for table in tables) >= 4  # which is why


def test_subjects_that_differ_survive_and_the_benchmark_is_no_part_of_their_family():
    table = subjects(0, better=5)
    assert table["survives"][[f"s{i}" for i in range(5)]].all()
    parts = table.drop(index="quiz")
    np.testing.assert_allclose(parts["q"], false_discovery_control(parts["p_value"]))
    assert table.q["quiz"] == table.p_value["quiz"]


def test_what_could_not_be_scored_is_left_out_and_counted():
    compared = compare_logs(log({"x": [1.0, None, 1.0, 0.0]}), log({"x": [1.0, 1.0, 0.0]}, "two"))
    row = compared.table.iloc[0]
    assert (row.n, row.left_out, row.only_a) == (2, 2, 1)
    nothing = compare_logs(log({"x": [None, None]}), log({"x": [1.0, 1.0]}))
    assert np.isnan(nothing.table.difference[0])
    assert nothing.verdicts() == ["x: no sample that both could score."]


def test_tasks_that_one_log_alone_has_are_named():
    compared = compare_logs(log({"x": [1.0, 0.0], "y": [1.0, 1.0]}), log({"x": [1.0, 0.0]}, "two"))
    assert compared.alone == ["y"]
    assert "not compared: y." in compared.remarks()[-1]


def test_other_prompts_are_said():
    b = log({"x": [1.0, 0.0, 0.0]}, "two")
    b.records[1]["prompt"] = "[INST] question 1"
    b.records[2]["prompt"] = "[INST] question 2"
    assert numbers(compare_logs(log({"x": [1.0, 0.0, 0.0]}), b).remarks()[1])[0] == 2


def test_what_cannot_be_compared_is_refused_with_the_reason():
    a = log({"x": [1.0, 0.0]})
    with refused(BadInput, "protocol", ("quiz_0shot", "quiz_5shot")):
        compare_logs(a, log({"y": [1.0, 0.0]}, protocol="quiz_5shot"))
    with refused(BadInput, "version", ("1", "2")):
        compare_logs(a, log({"x": [1.0, 0.0]}, version="2"))
    with refused(BadInput, "tasks", (["x"], ["z"])):
        compare_logs(a, log({"z": [1.0]}, benchmark="other"))
    a, other = log({"x": [1.0, 0.0, 1.0]}), log({"x": [1.0, 0.0, 1.0]})
    for record in other.records[1:]:
        record["doc_hash"] = "changed"
    with refused(BadInput, "samples", ("x", 1, 2)):
        compare_logs(a, other)
    empty = log({"x": [1.0]})
    empty.records[0]["sample_id"] = 7
    with refused(BadInput, "samples", 0):
        compare_logs(a, empty)


def test_compare_takes_two_logs_and_shows_them():
    compared = compare(log({"x": [1.0, 0.0, 1.0]}), log({"x": [1.0, 1.0, 1.0]}, "<b>"))
    assert repr(compared).startswith("x: one 0.667, <b> 1.000")
    shown = compared._repr_html_()
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown


@pytest.mark.parametrize("n", [1, 2])
def test_every_pattern_of_few_samples_has_an_interval_that_holds_its_difference(n):
    for a, b in itertools.product(itertools.product((0.0, 1.0), repeat=n), repeat=2):
        difference, low, high = paired_difference(np.array(a), np.array(b), np.zeros(n), 0.95)
        assert np.isnan(low) if n == 1 else low <= difference <= high


def test_protocols_of_one_benchmark_are_never_pooled():
    def two(right: float) -> Log:
        both = log({"zero": [0.0, 0.0], "few::x": [right, 1.0], "few::y": [1.0, 1.0]})
        both.meta["tasks"] = {
            task: {**about, "protocol": f"quiz_{task[:3]}"} for task, about in both.meta["tasks"].items()
        }
        both.meta |= {"settings": {"limit": None}, "created": "", "versions": {}}
        return both

    one = two(1.0)
    averages = one.scores[one.scores["average"] != ""]
    assert averages[["protocol", "average", "score"]].to_numpy().tolist() == [
        ["quiz_few", "micro", 1.0],
        ["quiz_few", "macro", 1.0],
    ]
    rows = primary_rows(one.scores, one.meta["tasks"])
    assert [(row["protocol"], row["score"], row["n"]) for row in rows] == [("quiz_zer", 0.0, 2), ("quiz_few", 1.0, 4)]
    assert beside(one)["protocol"].tolist() == ["quiz_zer", "quiz_few"]
    assert repr(one).count("quiz_zer") == 1
    compared = compare_logs(one, two(0.0)).table.set_index("task")
    assert compared["n"].to_dict() == {"zero": 2, "quiz_few": 4, "few::x": 2, "few::y": 2}


def test_behind_a_chat_template_is_not_compared_with_without():
    with refused(BadInput, "chat", (False, True)):
        compare_logs(log({"x": [1.0]}, chat=False), log({"x": [1.0]}, chat=True))


def test_a_value_that_could_not_be_scored_is_counted_once():
    one = log({"x": [1.0, None], "y": [1.0, 0.0]})
    one.meta |= {"settings": {"limit": None}, "created": "", "versions": {}}
    assert " 1 values could not be scored" in one.remarks()[1]


def test_near_ties_of_accuracy_by_length_are_a_characters():
    samples = pd.DataFrame(
        {
            "task": "arc",
            "sample_id": [0, 1, 2],
            "choices": [[" four", " eight ch"]] * 3,
            # Alike in all and not by length; alike by length; one that could not be scored.
            "logprobs": [[-4.0, -4.0], [-4.0, -8.0001], [-4.0, None]],
        }
    )
    assert near_ties(samples)["sample_id"].tolist() == [0]
    by_length = near_ties(samples, {"arc"})
    assert by_length["sample_id"].tolist() == [1]
    assert by_length["gap"].tolist() == pytest.approx([5e-5])


def test_samples_vary_within_their_task_and_not_over_all():
    """All of one task gained, most of another not: within tasks nearly nothing varies, over all a third does."""
    a = np.zeros(120)
    b = np.concatenate([np.ones(40), np.zeros(78), np.ones(2)])
    task = np.repeat([0, 1], [40, 80])
    difference, low, high = paired_difference(a, b, task, 0.95)
    within = np.sqrt(80 * (2 / 80) * (78 / 80)) / 120
    over_all = np.sqrt(0.35 * 0.65 / 120)
    assert difference == pytest.approx(42 / 120)
    assert (high - low) / 2 == pytest.approx(1.96 * within, rel=0.45)  # one more gained and one lost
    assert (high - low) / 2 < over_all


def test_what_either_could_not_score_is_left_out_of_everything_and_counted():
    a = log({"x": [1.0, None, 0.0, 1.0, 1.0], "y": [1.0]})
    b = log({"x": [0.0, 1.0, None, 1.0, 0.0], "y": [1.0]}, "two")
    row = compare_logs(a, b).table.set_index("task").loc["x"]
    assert (row.score_a, row.score_b, row.difference) == (1.0, pytest.approx(1 / 3), pytest.approx(-2 / 3))
    assert (row.only_a, row.only_b, row.n, row.left_out) == (2, 0, 3, 2)
    assert row.p_value == 0.5  # two-sided; one side alone gives 0.25
    assert [*compare_logs(a, b).flips.sample_id] == [0, 4]
