"""decide: against nested loops over raw runs; what a limit says of an interval; and what does not belong together."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from bench_samples import bench
from helpers.refusals import refused

import mixlens as ml
from mixlens.cli import main as cli
from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.stats.judgement import Judgement
from mixlens.stats.pareto import COLUMNS, Pareto

HELD = {"name": "m", "revision": "abc", "audit": {"label": "float32", "bytes": 400}, "weights_checksum": "1a"}
SMALL = HELD | {"audit": {"label": "nf4", "bytes": 100}, "weights_checksum": "2b"}


def pareto(**kl: tuple[float, float, float]) -> Pareto:
    """The original and one scheme, so many bytes and nats large."""
    rows = []
    for scheme, size in (("float32", 400), ("nf4", 100)):
        rows.append({"scheme": scheme, "quantity": "bytes", "estimate": size, "n": 1, "unit": "bytes"})
        for quantity, default in (("kl", (0.2, 0.1, 0.3)), ("ttft_s", (0.5, 0.4, math.nan))):
            numbers = (0.0, math.nan, math.nan) if (scheme, quantity) == ("float32", "kl") else kl.get(scheme, default)
            named = dict(zip(("estimate", "ci_low", "ci_high"), numbers, strict=True))
            rows.append({"scheme": scheme, "quantity": quantity, "n": 50, "unit": "", **named})
    meta = {"model": HELD, "schemes": {"float32": HELD, "nf4": SMALL}, "machine": "machine"}
    return Pareto(pd.DataFrame(rows, columns=COLUMNS), meta)


def log(held: dict, correct: list[float], *, task: str = "demo_0shot", document: str = "d") -> Log:
    texts = dict.fromkeys(("prompt", "target", "response"), "x")
    rest = dict.fromkeys(("group", "responses", "choices", "logprobs", "gold"))
    records = [
        {"task": task, "sample_id": i, "metrics": {"acc": v}, "correct": v, "doc_hash": f"{document}{i}"} | texts | rest
        for i, v in enumerate(correct)
    ]
    about = {"benchmark": "demo", "protocol": task, "version": "1", "primary": "acc", "chat": False}
    metrics = {"acc": {"aggregation": "mean", "higher_is_better": True}}
    return Log(records, {"model": held, "tasks": {task: about | {"metrics": metrics}}})


# -- what a limit says


@pytest.mark.parametrize(
    ("limit", "answer"),
    [(0.3, "meets"), (0.29, "too uncertain to say"), (0.1, "too uncertain to say"), (0.09, "fails")],
)
def test_an_interval_that_straddles_a_limit_is_uncertain(limit, answer):
    found = ml.decide([pareto()], at_most={"kl": limit})
    assert found.answers.loc["nf4"].tolist() == [answer]
    assert found.answers.loc["float32"].tolist() == ["meets"]  # exactly 0
    assert found.recommended == ("nf4" if answer == "meets" else "float32")


def test_a_bound_that_is_not_known_meets_nothing():
    found = ml.decide([pareto()], at_most={"ttft_s": 9.0})
    assert found.answers.loc["nf4"].tolist() == ["too uncertain to say"]
    assert found.recommended is None
    assert ml.decide([pareto()], at_least={"ttft_s": 0.3}).answers.loc["nf4"].tolist() == ["meets"]


def test_unmeasured_is_unmeasured():
    found = ml.decide([pareto(), log(SMALL, [1.0] * 40)], at_least={"demo": 0.5})
    assert found.answers["demo at least 0.5"].to_dict() == {"float32": "unmeasured", "nf4": "meets"}
    assert found.recommended == "nf4"
    assert found.overview().loc["float32", "demo"] == "n/a"


def test_a_change_is_paired_where_both_read_the_same():
    right = [1.0] * 50 + [0.0] * 50
    found = ml.decide([log(HELD, right), log(SMALL, right)], at_least={"demo": "-5%"})
    row = found.table[(found.table["form"] == "nf4") & (found.table["quantity"] == "demo")].iloc[0]
    # Bonett and Price with no flip in 100: 1.96 sqrt(2) / 102 each way; unpaired it would be 0.14
    assert row["change"] == 0
    assert row["change_high"] == pytest.approx(1.96 * math.sqrt(2) / 102, rel=1e-3)
    assert found.answers.loc["nf4"].tolist() == ["meets"]
    other = ml.decide([log(HELD, right), log(SMALL, right[::-1])], at_least={"demo": "-5%"})
    assert other.answers.loc["nf4"].tolist() == ["too uncertain to say"]


def test_a_score_of_other_samples_is_another_column():
    runs = [log(HELD, [1.0] * 40), log(SMALL, [1.0] * 40, document="e")]
    found = ml.decide(runs, at_least={"demo": 0.1})
    assert set(found.answers.iloc[:, 0]) == {"unmeasured"}
    measured = found.overview().loc["float32"]
    [one] = [label for label in measured.index if label.startswith("demo (") and measured[label] != "n/a"]
    answers = ml.decide(runs, at_least={one: 0.1}).answers.iloc[:, 0]
    assert answers.to_dict() == {"float32": "meets", "nf4": "unmeasured"}


@pytest.mark.parametrize(
    ("name", "text", "number"),
    [("weight_bytes", "0.2kB", 200), ("weight_bytes", "1KiB", 1024), ("ttft_s", "1500ms", 1.5), ("kl", "0.3", 0.3)],
)
def test_units_are_of_the_quantity(name, text, number):
    asked = [ml.decide([pareto()], at_most={name: value}).answers.to_numpy().tolist() for value in (text, number)]
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"at_most": {"usd_per_mtok": 0.6}}, ("at_most", "usd_per_mtok")),
        ({"at_least": {"mmlu": "-1%"}}, ("at_least", "mmlu")),
        ({"at_most": {"kl": "3GB"}}, ("at_most", "3GB")),
        ({"at_most": {"weight_bytes": "24 parsec"}}, ("at_most", "24 parsec")),
        ({"at_most": {"kl": "few"}}, ("at_most", "few")),
        ({"at_most": {"kl": math.nan}}, ("at_most",)),
        ({"prefer": "beauty"}, ("prefer", "beauty")),
        ({"baseline": "bf16"}, ("baseline", "bf16")),
    ],
)
def test_what_nobody_measured_is_refused(limits, named):
    with refused(BadInput, *named):
        ml.decide([pareto()], **limits)


def judged(low: float, high: float, limit: float) -> Judgement:
    rows = [("a", 0.5 * (low + high), low, high, False), ("all documents", 0.0, -0.01, 0.01, True)]
    table = pd.DataFrame(rows, columns=["group", "estimate", "ci_low", "ci_high", "mean"])
    table = table.assign(kind="loss", before=1.0, after=1.0, n=40)
    pruned = HELD | {"audit": {"label": "float32", "bytes": 300}, "weights_checksum": "9f", "experts": 6}
    meta = {"before": HELD | {"experts": 8}, "after": pruned, "documents": {"input_sha256": "e"}, "level": 0.99}
    return Judgement(table, {"loss": limit}, meta)


@pytest.mark.parametrize(("limit", "answer"), [(0.25, "meets"), (0.15, "too uncertain to say"), (0.05, "fails")])
def test_a_judgement_disqualifies_the_form_that_it_was_about_and_no_other(limit, answer):
    form = "float32, 6 of 8 experts"
    found = ml.decide([pareto(), judged(0.1, 0.2, limit)], prefer="weight_bytes")
    assert found.answers.iloc[:, -1].to_dict() == {"float32": "meets", "nf4": "n/a", form: answer}
    assert (form in found.qualifying) == (answer == "meets")
    assert found.recommended == "nf4"
    row = found.table.query("quantity == 'worst_loss_change'").set_index("form").loc[form]
    assert row[["estimate", "ci_low", "ci_high"]].tolist() == pytest.approx([0.15, 0.1, 0.2])
    alone = ml.decide({"six": judged(0.1, 0.2, limit), None: log(HELD, [1.0] * 40)})
    assert alone.answers.iloc[:, 0].to_dict() == {"float32": "n/a", "six": answer}


# -- what does not belong together


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"name": "n"}, "model"),
        ({"revision": "def"}, "revision"),
        ({"audit": {"label": "int8", "bytes": 100}, "weights_checksum": "3c"}, "quantization"),
        ({"weights_checksum": "3c"}, "checksum of the weights"),
        ({"adapters": ["lora"]}, "adapters"),
        ({"edits": ["forbid"]}, "edits"),
    ],
    ids=str,
)
def test_a_run_given_to_a_form_of_other_weights_is_refused(changed, what):
    changed = changed if changed.keys() & {"adapters", "edits"} else {"weights_checksum": "3c", **changed}
    with refused(BadInput, "runs", what):
        ml.decide({None: pareto(), "nf4": log(SMALL | changed, [1.0])})


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"name": "n"}, "model"),
        ({"revision": "def"}, "revision"),
        ({"weights_checksum": "3c"}, "checksum of the weights"),
    ],
    ids=str,
)
def test_runs_that_are_no_forms_of_one_model_are_refused(changed, what):
    with refused(BadInput, "runs", what):
        ml.decide([pareto(), log(SMALL | {"weights_checksum": "3c"} | changed, [1.0])])


def test_a_run_that_does_not_tell_its_weights_is_refused():
    with refused(BadInput, "runs"):
        ml.decide([pareto(), log(SMALL | {"weights_checksum": None}, [1.0])])


def test_a_label_is_earned():
    with refused(BadInput, "runs", "quantization"):
        ml.decide({"nf4": log(HELD, [1.0])})


def test_a_name_vouches_for_a_pruning():
    pruned = HELD | {"name": "folder", "revision": None, "audit": {"label": "float32", "bytes": 300}}
    pruned["weights_checksum"] = "9f"
    found = ml.decide({None: pareto(), "6 experts": log(pruned, [1.0] * 40)}, at_least={"demo": 0.8})
    assert found.recommended == "6 experts"
    assert found.table["form"].unique().tolist() == ["float32", "nf4", "6 experts"]


def test_an_edited_model_is_a_form_of_its_own():
    found = ml.decide([log(HELD, [1.0] * 9), log(HELD | {"edits": ["forbid(3, 5)"]}, [0.0] * 9)])
    assert found.table["form"].unique().tolist() == ["float32", "float32, forbid(3, 5)"]
    assert found.recommended == "float32"


def test_a_number_counts_once_and_the_other_is_named():
    first, again = log(HELD, [1.0] * 9), log(HELD, [0.0] * 9)
    found = ml.decide([first, again])
    assert found.table.loc[found.table["quantity"] == "demo", "estimate"].tolist() == [1.0]
    assert any("demo" in remark for remark in found.remarks)


def test_providers_have_prices_and_no_weights():
    url, name = "https://api.deepinfra.com/v1/openai", "mistralai/mixtral-8x7b-instruct"
    served = {"endpoint": {"url": url, "model": name}, "model": {"name": name}}
    workload = {"prompt_tokens": 1000, "output_tokens": 500}
    measured = bench({"concurrency 1": [1.0] * 9}, **served, workload=workload)
    scored = log({"name": name, "endpoint": {"url": url, "model": name}}, [1.0] * 9)
    found = ml.decide([measured, scored], at_most={"usd_per_mtok": 1e6, "ttft_s": 1e3})
    [form] = found.table["form"].unique()
    assert found.recommended == form
    assert "weight_bytes" not in found.table["quantity"].tolist()
    usd = found.table.set_index("quantity").loc["usd_per_mtok"]
    stated = ml.pricing.cost(1000, 500, table=ml.pricing.prices(name).query("provider == 'DeepInfra'"))
    assert usd["estimate"] == pytest.approx(stated["usd_per_request"].max() * 1e6 / 1500)
    assert usd["ci_low"] == pytest.approx(stated["usd_per_request"].min() * 1e6 / 1500)


SERVER = "http://127.0.0.1:1/v1"


def test_a_price_by_the_hour_follows_from_throughput():
    """By loops over the requests: one load is twice as slow as the other, and the faster one sets the price."""
    measured = bench({"concurrency 1": [2.0] * 12, "concurrency 4": [1.0] * 12})
    cell = ml.decide([measured], usd_per_hour=3.0).table.set_index("quantity").loc["usd_per_mtok"]
    fast = [record for record in measured.records if record.level == "concurrency 4"]
    seconds = max(record.ended_s for record in fast) - min(record.sent_s for record in fast)
    tokens = 0
    for record in fast:
        told = [event for event in record.events if event.input_tokens]
        tokens += told[-1].input_tokens + told[-1].output_tokens
    assert cell["estimate"] == pytest.approx(3.0 / 3600 * seconds / tokens * 1e6)
    assert cell["ci_low"] < cell["estimate"] < cell["ci_high"] < math.inf
    assert (cell["n"], cell["unit"]) == (12, "$/Mtok")
    by_address = ml.decide([measured], usd_per_hour={SERVER: 6.0}).table.set_index("quantity").loc["usd_per_mtok"]
    assert by_address["estimate"] == pytest.approx(2 * cell["estimate"])


def test_without_price_requests_or_tokens_there_is_no_price():
    failed = bench({"concurrency 1": [1.0] * 3})
    failed.records = [replace(record, outcome="http", events=()) for record in failed.records]
    uncounted = bench({"concurrency 1": [1.0] * 3})
    uncounted.records = [
        replace(r, events=tuple(replace(e, input_tokens=None) for e in r.events)) for r in uncounted.records
    ]
    for measured, usd in ((bench({"concurrency 1": [1.0]}), None), (failed, 3.0), (uncounted, 3.0)):
        assert "usd_per_mtok" not in ml.decide([measured], usd_per_hour=usd).table.get("quantity", pd.Series()).tolist()
    few = ml.decide([bench({"concurrency 1": [1.0] * 3})], usd_per_hour=3.0, at_most={"usd_per_mtok": 1e9})
    assert few.answers.to_numpy().tolist() == [["too uncertain to say"]]  # three requests bound no throughput


@pytest.mark.parametrize("usd", [0, -1, math.nan, math.inf, "2.5", True, {SERVER: 0}, {"H200": 3.0}], ids=str)
def test_what_is_no_price_by_the_hour_is_refused(usd):
    with refused(BadInput, "usd_per_hour"):
        ml.decide([bench({"concurrency 1": [1.0]})], usd_per_hour=usd)


@pytest.mark.parametrize(
    "others", [[], [bench({"concurrency 1": [1.0]}, endpoint={"url": "http://[::1]/v1", "model": "m"})]]
)
def test_one_price_is_of_one_machine(others):
    first = bench({"concurrency 1": [1.0]}) if others else pareto()
    with refused(BadInput, "usd_per_hour"):
        ml.decide([first, *others], usd_per_hour=2.5)


@pytest.mark.parametrize("words", ["x", "1 2", "a=1 a=2", "a=1 2", "a="])
def test_the_command_refuses_what_is_no_price_by_the_hour(words, capsys):
    options = [part for word in words.split() for part in ("--usd-per-hour", word)]
    assert cli.main(["decide", "nowhere", *options, "--json"]) == cli.EXIT_USAGE
    assert json.loads(capsys.readouterr().out)["argument"] == "--usd-per-hour"


# -- measured runs of the demo model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Five schemes with quality and speed, and evaluations of three of them."""
    folder = tmp_path_factory.mktemp("forms")
    settings = ml.RecordSettings(progress=False, max_length=32, overlong="truncate")
    schemes = ["bfloat16", "nf4", "hqq3-g32", "hqq2-g32"]
    ml.experiments.measure_pareto(
        "demo", ml.demo_documents()[::7], schemes=schemes, out=folder / "pareto", settings=settings,
        speed=ml.experiments.Speed(7, 16, 3),
    )  # fmt: skip
    for scheme in (None, "nf4", "hqq2-g32"):
        loaded = ml.load("demo", quantization=scheme, verbose=False)
        ml.evaluate(
            loaded, ["demo"], limit=6, out=folder / f"eval-{scheme}", settings=ml.evals.EvalSettings(progress=False)
        )
    return folder


def _raw(folder):
    """[form][quantity] = estimate, low, high, read from the files of the runs; and right answers by form and sample."""
    facts, right = {}, {}
    for row in pq.read_table(folder / "pareto" / "table.parquet").to_pylist():
        name = {"bytes": "weight_bytes"}.get(row["quantity"], row["quantity"])
        if name in ("ttft_s", "tpot_s") and row["scheme"] not in ("float32", "bfloat16"):
            continue  # quantized experts ran one by one in Python, whose speed it is
        low, high = row["ci_low"], row["ci_high"]
        exact = name == "weight_bytes" or (
            row["scheme"] == "float32" and name not in ("ttft_s", "tpot_s", "perplexity")
        )
        low = row["estimate"] if exact else -math.inf if low is None or math.isnan(low) else low
        high = row["estimate"] if exact else math.inf if high is None or math.isnan(high) else high
        facts.setdefault(row["scheme"], {})[name] = row["estimate"], low, high
    for scheme, run in (("float32", "eval-None"), ("nf4", "eval-nf4"), ("hqq2-g32", "eval-hqq2-g32")):
        with (folder / run / "results.jsonl").open() as file:
            for record in map(json.loads, file):
                right.setdefault(scheme, {})[record["task"], record["sample_id"]] = record["correct"]
        k, n, z = sum(right[scheme].values()), len(right[scheme]), 1.959964
        centre, spread = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
        facts[scheme]["demo"] = k / n, centre - spread, centre + spread
    return facts, right


def _paired(one, other):
    """Bonett and Price within tasks: one more gained and one lost, in the first of the largest tasks."""
    tasks = sorted({task for task, _ in one})
    differences = {task: [other[key] - one[key] for key in one if key[0] == task] for task in tasks}
    largest = max(tasks, key=lambda task: len(differences[task]))
    mean = sum(sum(values) for values in differences.values()) / len(one)
    differences[largest] += [1, -1]
    n, squares = len(one) + 2, 0.0
    for values in differences.values():
        for value in values:
            squares += (value - sum(values) / len(values)) ** 2
    half = 1.959964 * math.sqrt(squares / n**2 * (n / (n - len(tasks) + 1)))
    middle = sum(sum(values) for values in differences.values()) / n
    return min(middle - half, mean), max(middle + half, mean)


def _oracle(facts, right, limits):
    qualifying = []
    for form in facts:
        good = True
        for name, most, value, relative in limits:
            if name not in facts[form]:
                good = False
                continue
            _, low, high = facts[form][name]
            if relative and form == "float32":
                low = high = 0.0
            elif relative:
                low, high = _paired(right["float32"], right[form])
            if most and not high <= value:
                good = False
            if not most and not low >= value:
                good = False
        if good:
            qualifying.append(form)
    kinds = [["demo", "kl", "loss_difference", "perplexity", "same_top"], ["weight_bytes"], ["tpot_s", "ttft_s"]]
    limited = [name for name, *_ in limits]
    order = []
    for names in kinds:
        usable = [name for name in names if all(name in facts[form] for form in qualifying)]
        first = [name for name in usable if name in limited] or usable
        if first:
            order.append(first[0])
    order = [name for name in order if name not in limited] + [name for name in order if name in limited]
    best = None
    for form in qualifying:
        costs = [-facts[form][n][0] if n in ("demo", "same_top") else facts[form][n][0] for n in order]
        if best is None or costs < best[0]:
            best = costs, form
    return qualifying, None if best is None else best[1]


@pytest.mark.slow
def test_the_recommended_scheme_is_the_one_that_nested_loops_pick(runs):
    facts, right = _raw(runs)
    opened = [ml.open(path) for path in sorted(runs.iterdir(), key=lambda path: path.name != "pareto")]
    rng, picked = np.random.default_rng(0), set()
    quantities = ["kl", "weight_bytes", "perplexity", "ttft_s", "tpot_s", "same_top", "demo"]
    for _ in range(200):
        limits = []
        for name in map(str, rng.choice(quantities, 3, replace=False)[: rng.integers(0, 4)]):
            finite = [x for form in facts for x in facts[form].get(name, ()) if math.isfinite(x)]
            value = float(rng.uniform(min(finite), max(finite)))
            limits.append((name, name not in ("same_top", "demo"), value, False))
            if name == "demo" and rng.random() < 0.5:
                limits[-1] = (name, False, -round(float(rng.uniform(0.0, 0.4)), 3), True)
        bounds = {True: {}, False: {}}
        for name, most, value, relative in limits:
            bounds[most][name] = f"{value:+}" if relative else value
        found = ml.decide(opened, at_most=bounds[True], at_least=bounds[False])
        qualifying, recommended = _oracle(facts, right, limits)
        assert found.qualifying == qualifying, limits
        assert found.recommended == recommended, limits
        picked.add(recommended)
    assert len(picked) >= 4  # the limits were no formality


@pytest.mark.slow
def test_the_command(runs, capsys, tmp_path):
    paths = [str(runs / "pareto"), str(runs / "eval-None"), str(runs / "eval-nf4")]
    table = tmp_path / "table.csv"
    assert cli.main(["decide", *paths, "--max", "weight_bytes=9MB", "--csv", str(table), "--json"]) == cli.EXIT_DONE
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"] in found["qualifying"]
    assert "float32" not in found["qualifying"]
    assert set(pd.read_csv(table)["form"]) == {"float32", "bfloat16", "nf4", "hqq3-g32", "hqq2-g32"}
    assert cli.main(["decide", *paths, "--max", "weight_bytes=1kB"]) == cli.EXIT_FAILED
    assert cli.main(["decide", paths[0], f"nf4={paths[1]}"]) == cli.EXIT_USAGE
    assert cli.main(["decide", *paths, "--max-memory", "24GB"]) == cli.EXIT_USAGE
