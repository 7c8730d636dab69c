"""Published scores: all that the sources state and nothing else, and no score beside one of another protocol."""

from __future__ import annotations

import re

import pytest

from mixlens.evals.log import Log
from mixlens.evals.published import beside, references

MODELS = [f"mistralai/Mixtral-{size}{form}-v0.1" for form in ("", "-Instruct") for size in ("8x7B", "8x22B")]
SOURCES = {
    "P": "2401.04088",
    "A": "announcement",
    "OC": "OpenCompass",
    "NM": "Neural Magic",
    "M": "Mobius",
    "EP": "EvalPlus",
}
LANGUAGES = {"French": "fr", "German": "de", "Spanish": "es", "Italian": "it"}
STATED = re.compile(r"(?:plus )?(\d+\.\d+)(?: (OC|NM|EP|P|A|M)\b)?(?: \((Table 3|acc_norm|macro|plus (\d+\.\d+))\))?")
BASE = MODELS[0]


def stated_scores(text: str) -> set[tuple[str, str, float | None, float, str]]:
    """(model, benchmark, shots, score, source) of every cell of the table of scores."""
    table = text.partition("## Scores")[2].partition("|---|")[2].partition("\n\n")[0]
    found = set()
    for line in table.splitlines()[1:]:
        head, *cells = line.strip().strip("|").split("|")
        benchmark = re.sub(r"\W", "_", re.split(r"[,;]", head.strip())[0].lower())
        shots = [float(number) for number in re.findall(r"(\d+)-shot", head)]
        for model, cell in zip(MODELS, cells, strict=True):
            parts = cell.split(";") if len(shots) > 1 else [cell]
            for place, part in enumerate(parts):
                of = shots[place] if len(parts) > 1 else shots[-1] if "NM" in part else shots[0]
                for score, source, _, plus in STATED.findall(part):
                    found.add((model, benchmark, of, float(score), source))
                    if plus:
                        found.add((model, benchmark, of, float(plus), source))
    return found


def test_every_score_of_the_table_is_there_under_its_model_shots_and_source(shared):
    frame = references()
    stated = stated_scores((shared / "PUBLISHED.md").read_text("utf-8"))
    assert len(stated) == 43
    for model, benchmark, shots, score, source in stated:
        rows = frame[(frame["model"] == model) & (frame["benchmark"] == benchmark) & (frame["score"] == score)]
        rows = rows[rows["source"].str.contains(SOURCES[source])]
        assert len(rows) == 1, (model, benchmark, shots, score, source)
        assert rows["shots"].isna().all() or (rows["shots"] == shots).all(), (benchmark, shots, score)


def test_every_score_of_the_languages_is_there(shared):
    text = (shared / "PUBLISHED.md").read_text("utf-8").partition("Table 4, 8x7B base,")[2].partition("\n")[0]
    frame = references(BASE).set_index(["benchmark", "page"])["score"]
    for language, code in LANGUAGES.items():
        arc, hellaswag, mmlu = (
            float(x) for x in re.search(rf"{language} (\d+\.\d) / (\d+\.\d) / (\d+\.\d)", text).groups()
        )
        stated = {"arc_challenge": arc, "hellaswag": hellaswag, "mmlu": mmlu}
        assert {name: frame[f"{name}_{code}", "Table 4"] for name in stated} == stated


def test_no_score_is_invented(shared):
    stated = (shared / "PUBLISHED.md").read_text("utf-8")
    numbers = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", stated)}
    assert set(references()["score"]) <= numbers


@pytest.mark.parametrize("source", ["OpenCompass MixtralKit"])
def test_scores_of_another_program_s_settings_have_protocols_of_their_own(source):
    frame = references()
    own = frame[frame["source"] == source].set_index("benchmark")
    others = frame[frame["source"] != source]
    assert own.loc["gsm8k", "shots"] == 4
    assert own.loc["mbpp", "n"] == 500
    for benchmark in ("gsm8k", "math", "mbpp"):
        assert own.loc[benchmark, "protocol"] not in set(others["protocol"])


def test_what_a_protocol_says_of_its_shots_agrees_with_the_entry():
    for entry in references().to_dict("records"):
        named = re.search(r"_(\d+)shot", entry["protocol"])
        assert named is None or entry["shots"] == float(named[1])


INSTRUCT = MODELS[2]
STRICT = "exact_match,strict-match"
HARNESS = {"shots": 5, "split": "test", "scorer": "lm-evaluation-harness"}


def made_up(
    task: str, n: int, right: int, *, metric: str = "passed", limit: int | None = None, model: str = BASE,
    parts: dict | None = None, **endpoint: str,
) -> Log:  # fmt: skip
    """A log with `right` of `n` samples right."""
    records = [
        {"task": task, "sample_id": i, "metrics": {metric: float(i < right)}, "correct": float(i < right)}
        for i in range(n)
    ]
    about = {"benchmark": task.partition("_")[0], "protocol": task, "primary": metric, **(HARNESS | (parts or {}))}
    tasks = {task: about | {"metrics": {metric: {"aggregation": "mean"}}}}
    named = {"name": model} | ({"endpoint": endpoint} if endpoint else {})
    return Log(records, {"model": named, "tasks": tasks, "settings": {"limit": limit}})


def gsm8k(**changed) -> Log:
    return made_up("gsm8k_5shot", 1319, 660, **{"metric": STRICT, "model": INSTRUCT} | changed)


def test_a_score_of_the_same_protocol_has_its_difference_in_points():
    compared = beside(gsm8k()).query("comparable").set_index("published")
    ours = 100 * 660 / 1319
    assert compared["difference"].to_dict() == pytest.approx({64.36: ours - 64.36, 64.06: ours - 64.06})
    assert (compared["n"] == 1319).all()


@pytest.mark.parametrize(("part", "value"), [("shots", 4), ("split", "train"), ("scorer", "mixlens")])
def test_any_part_of_the_protocol_that_differs_or_is_not_known_is_named(part, value):
    differs = beside(gsm8k(parts={part: value})).query("status == 'quantized' and published == 64.06").iloc[0]
    assert not differs["comparable"]
    assert part in differs["why_not"]
    unknown = beside(gsm8k(parts={part: None}))
    assert not unknown["comparable"].any()
    assert unknown["why_not"].str.contains(part).all()


def test_of_no_source_more_is_taken_for_known_than_it_states():
    """The paper names no program that graded, which is noted; of ARC and HellaSwag not even the metric."""
    for log in (made_up("humaneval_0shot", 164, 82, parts={"shots": 0}), made_up("mmlu_5shot", 14042, 9, metric="acc")):
        compared = beside(log)
        paper = compared[compared["source"].str.contains("2401.04088")]
        assert len(paper)
        assert paper["comparable"].all()
        assert paper["note"].str.contains("scorer").all()
    for task, n, split in (("hellaswag_0shot", 10042, "validation"), ("math_4shot_maj4", 5000, "test")):
        unknown = beside(made_up(task, n, 9, parts={"split": split, "shots": int(task.split("_")[1][0])})).iloc[0]
        assert not unknown["comparable"]
        assert "metric" in unknown["why_not"]


@pytest.mark.parametrize(
    "log",
    [
        made_up("gsm8k_5shot", 1318, 82, metric=STRICT, model=INSTRUCT),
        gsm8k(limit=1319),
        gsm8k(metric="exact_match,flexible-extract"),
        gsm8k(protocol="openai-chat"),
        made_up("humaneval_0shot_instruct", 164, 82),
        made_up("math_4shot", 5000, 82, metric="math_equal"),
        made_up("gsm8k_5shot", 1318, 82, metric="exact_match"),
    ],
    ids=["one sample fewer", "limit", "metric", "chat", "protocol", "opencompass", "n"],
)
def test_beside_another_protocol_or_a_part_of_the_questions_is_no_difference(log):
    compared = beside(log)
    assert len(compared) > 0
    assert not compared["comparable"].any()
    assert compared["difference"].isna().all()
    assert (compared["why_not"] != "").all()


def test_a_published_macro_average_stands_beside_ours():
    """9 of 10 and 20 of 100: of all samples 26.4 %, of the two subjects on average 55 %."""
    right = {"mmlu_5shot::a": (9, 10), "mmlu_5shot::b": (20, 100)}
    records = [
        {"task": task, "sample_id": i, "metrics": {"acc": float(i < yes)}, "correct": float(i < yes)}
        for task, (yes, n) in right.items()
        for i in range(n)
    ]
    about = {"benchmark": "mmlu", "protocol": "mmlu_5shot", "primary": "acc"}
    tasks = {task: about | {"metrics": {"acc": {"aggregation": "mean"}}} for task in right}
    log = Log(records, {"model": {"name": BASE}, "tasks": tasks, "settings": {"limit": None}})
    scores = beside(log).query("protocol == 'mmlu_5shot'").set_index("published")["score"]
    assert scores.loc[71.34] == pytest.approx(55.0)
    assert scores.loc[70.6] == pytest.approx(100 * 29 / 110)
