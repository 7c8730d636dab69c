"""Scores against numpy, scipy and closed forms, on tasks of unequal size."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers.inside import near_ties, primary_rows, score_table, wilson
from scipy.optimize import brentq
from scipy.stats import binomtest, norm

MEAN = {"aggregation": "mean"}
RIGHT = {"small": [1, 1, 1, 0], "large": [0, 0, 1, 0, 0, 1, 0, 0, 0, 0], "unscored": [1, np.nan, 0]}


def about(**changes) -> dict:
    return {"benchmark": "b", "protocol": "p", "primary": "acc", "metrics": {"acc": MEAN, "len": MEAN}} | changes


def samples(right: dict[str, list[float]], length: float = 7) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"task": task, "sample_id": i, "acc": value, "len": length + i**2}
            for task, values in right.items()
            for i, value in enumerate(values)
        ]
    )


def one(table: pd.DataFrame, task: str, metric: str = "acc", average: str = "") -> pd.Series:
    (row,) = table[(table.task == task) & (table.metric == metric) & (table.average == average)].to_dict("records")
    return row


def test_every_task_has_its_own_mean_of_what_was_scored():
    table = score_table(samples(RIGHT), {name: about() for name in RIGHT})
    for name, values in RIGHT.items():
        known = [value for value in values if value == value]
        row = one(table, name)
        assert row["score"] == pytest.approx(sum(known) / len(known))
        assert (row["n"], row["unscored"]) == (len(known), len(values) - len(known))
        low, high = binomtest(int(sum(known)), len(known)).proportion_ci(0.95, "wilson")
        assert (row["ci_low"], row["ci_high"]) == pytest.approx((low, high))
    assert one(table, "unscored")["unscored"] == 1


def test_micro_weighs_samples_and_macro_tasks_and_the_benchmark_s_score_is_micro():
    tasks = {name: about() for name in RIGHT}
    table = score_table(samples(RIGHT), tasks)
    everything = [v for values in RIGHT.values() for v in values if v == v]
    micro, macro = one(table, "b", average="micro"), one(table, "b", average="macro")
    assert micro["score"] == pytest.approx(6 / 16) == np.mean(everything)
    assert macro["score"] == pytest.approx((3 / 4 + 2 / 10 + 1 / 2) / 3)
    assert micro["score"] != pytest.approx(macro["score"])
    assert micro["n"] == macro["n"] == 16
    (primary,) = primary_rows(table, tasks)
    assert (primary["average"], primary["metric"]) == ("micro", "acc")
    assert primary["score"] == micro["score"]


def test_one_task_alone_stands_for_its_benchmark_and_protocols_are_never_averaged():
    tasks = {"small": about(), "large": about(protocol="q", primary="len")}
    table = score_table(samples(RIGHT), tasks)
    assert set(table.average) == {""}
    rows = {row["protocol"]: row for row in primary_rows(table, tasks)}
    assert rows["p"]["score"] == pytest.approx(3 / 4)
    assert rows["q"]["metric"] == "len"
    assert rows["q"]["score"] == pytest.approx(7 + np.mean(np.arange(10) ** 2))


def test_macro_and_means_of_other_numbers_have_an_interval_of_the_right_width():
    rng = np.random.default_rng(0)
    right = {f"t{i}": (rng.random(n) < p).astype(float).tolist() for i, (n, p) in enumerate([(60, 0.2), (300, 0.7)])}
    table = score_table(samples(right), {name: about() for name in right})
    macro = one(table, "b", average="macro")
    error = np.sqrt(sum(np.mean(v) * (1 - np.mean(v)) / len(v) for v in right.values())) / 2
    assert (macro["ci_high"] - macro["ci_low"]) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert macro["ci_low"] < macro["score"] < macro["ci_high"]
    values = samples(right).query("task == 't1'")["len"]
    row = one(table, "t1", "len")
    assert (row["ci_high"] - row["ci_low"]) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(len(values)), rel=0.1)
    assert row["score"] == pytest.approx(values.mean())


def test_lm_eval_s_own_aggregations_keep_its_number_and_its_error():
    own = {"aggregation": "f1", "score": 0.4, "stderr": 0.05}
    table = score_table(samples({"small": RIGHT["small"]}), {"small": about(metrics={"acc": own})})
    row = one(table, "small")
    assert row["score"] == 0.4
    z = norm.ppf(0.975)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((0.4 - z * 0.05, 0.4 + z * 0.05))


def test_a_task_without_a_scored_sample_is_missing_and_not_zero():
    table = score_table(samples({"small": [np.nan, np.nan]}), {"small": about(), "absent": about()})
    for task, unscored in (("small", 2), ("absent", 0)):
        row = one(table, task)
        assert np.isnan([row["score"], row["ci_low"], row["ci_high"]]).all()
        assert (row["n"], row["unscored"]) == (0, unscored)


@pytest.mark.parametrize(("successes", "n", "level"), [(0, 5, 0.95), (5, 5, 0.95), (3, 20, 0.9), (250, 1000, 0.99)])
def test_wilson_s_interval_solves_its_equation(successes, n, level):
    """Its ends are the p at which the observed fraction lies z standard errors away: two-sided, of p and not of the
    fraction."""
    z, seen = norm.ppf((1 + level) / 2), successes / n

    def away(p: float) -> float:
        return (seen - p) ** 2 - z**2 * p * (1 - p) / n

    low, high = wilson(successes, n, level)
    assert low == pytest.approx(0.0 if seen == 0 else brentq(away, 1e-12, min(seen, 1 - 1e-6)), abs=1e-9)
    assert high == pytest.approx(1.0 if seen == 1 else brentq(away, max(seen, 1e-6), 1 - 1e-12), abs=1e-9)
    assert np.isnan(wilson(0, 0)).all()


def test_near_ties_are_of_the_two_likeliest_and_by_length_where_accuracy_is():
    frame = pd.DataFrame(
        {
            "task": ["t", "t", "n", "n", "t", "t", "t", "t"],
            "sample_id": range(8),
            "choices": [
                [" a", " b", " c"],
                [" a", " b", " c"],
                [" ab", " abcd"],
                [" ab", " abcd"],
                None,
                [" a"],
                None,
                [" a", " b"],
            ],
            "logprobs": [
                [-3, -1.00005, -1.0],
                [-1.0, -1.0002, -3],
                [-1.0, -2.00001],
                [-1.0, -1.00001],
                None,
                [-1.0],
                [-1.0, -1.0],
                None,
            ],
        }
    )
    ties = near_ties(frame, by_length={"n"}).set_index("sample_id")
    assert list(ties.index) == [0, 2]
    assert ties.loc[0, ["first", "second"]].tolist() == [" c", " b"]
    assert ties.loc[0, "gap"] == pytest.approx(5e-5)
    assert ties.loc[2, "gap"] == pytest.approx(1e-5 / 4 * 2)  # a character, times the shorter choice
