"""pareto: rows of every scheme, a process killed between two, and what is refused before anything is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers.refusals import refused
from tiny import tiny_mixtral

import mixlens as ml
from mixlens.cli import main as cli
from mixlens.errors import BadInput, ModelError, RunError
from mixlens.experiments import pareto as schemes
from mixlens.experiments.pareto import Speed
from mixlens.stats.pareto import COLUMNS, Pareto

DEMO = Path(ml.__file__).parent / "_demo"
SETTINGS = ml.RecordSettings(progress=False, max_length=24, overlong="truncate")
DOCUMENTS = [{"text": f"The {word} of the river {i}", "domain": word} for i in range(3) for word in ("bank", "bend")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a tiny random Mixtral with the demo model's tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_mixtral(vocab_size=4096, num_hidden_layers=2).save_pretrained(path)
    for file in DEMO.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


KILLED = """
import os, sys
import mixlens as ml
from mixlens.experiments import pareto as schemes

load = schemes.load
def killed(model, **options):
    if options.get("quantization") == "hqq2-g16":
        os.kill(os.getpid(), 9)
    return load(model, **options)

schemes.load = killed
documents = [{"text": f"The {word} of the river {i}", "domain": word} for i in range(3) for word in ("bank", "bend")]
settings = ml.RecordSettings(progress=False, max_length=24, overlong="truncate")
schemes.measure_pareto(sys.argv[1], documents, schemes=["bfloat16", "hqq4-g16", "hqq2-g16"], out=sys.argv[2],
               speed=schemes.Speed(2, 16, 2), settings=settings)
"""


@pytest.fixture(scope="module")
def resumed(folder, tmp_path_factory):
    """A run without speed that was stopped while its third scheme was loaded, run again; and what was loaded then."""
    out, loaded, load = tmp_path_factory.mktemp("pareto") / "run", [], schemes.load

    def stopped(model, **options):
        if options.get("quantization") == "hqq2-g16":
            raise KeyboardInterrupt
        return load(model, **options)

    def seen(model, **options):
        loaded.append(options.get("quantization"))
        return load(model, **options)

    asked = {"schemes": ["bfloat16", "hqq4-g16", "hqq2-g16"], "out": out, "speed": Speed(0), "settings": SETTINGS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schemes, "load", stopped)
        with pytest.raises(KeyboardInterrupt):
            schemes.measure_pareto(folder, DOCUMENTS, **asked)
        with refused(RunError, "shards", 3):
            ml.open(out)
        patch.setattr(schemes, "load", seen)
        return schemes.measure_pareto(folder, DOCUMENTS, **asked), loaded


def test_a_stopped_run_goes_on_at_the_scheme_where_it_stopped(resumed):
    found, loaded = resumed
    assert loaded == [None, "hqq2-g16"]
    assert found.schemes == ["float32", "bfloat16", "hqq4-g16", "hqq2-g16"]
    pd.testing.assert_frame_equal(ml.open(found.path).table, found.table)


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_that_goes_on(folder, tmp_path):
    out = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out)], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr.decode()
    before = {path: path.read_bytes() for path in out.rglob("meta.json")}
    assert {path.parent.name for path in before} == {"impact", "speed"}
    found = schemes.measure_pareto(
        folder,
        DOCUMENTS,
        schemes=["bfloat16", "hqq4-g16", "hqq2-g16"],
        out=out,
        speed=Speed(2, 16, 2),
        settings=SETTINGS,
    )
    assert all(path.read_bytes() == content for path, content in before.items())
    for quantity in ("ttft_s", "tpot_s"):
        assert (found.of(quantity).estimate > 0).all()
        assert len(found.of(quantity)) == 4
    assert "time per output token" in ml.report(found, tmp_path / "report.html").read_text("utf-8")


def test_every_scheme_has_every_number(resumed):
    found, _ = resumed
    for quantity in ("bytes", "expert_bits", "perplexity", "kl", "same_top", "overlap", "kl_from_routing"):
        assert sorted(found.of(quantity).index) == sorted(found.schemes), quantity
        assert found.of(quantity).estimate.notna().all(), quantity
    assert (found.path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert (found.path / "pareto.pdf").read_bytes()[:4] == b"%PDF"
    assert found.of("bytes").estimate["float32"] == 2 * found.of("bytes").estimate["bfloat16"]
    for quantity in ("kl", "same_top"):
        assert found.of(quantity).unit.nunique() == 1
    kl = found.of("kl").estimate
    assert kl["float32"] == 0 < kl["bfloat16"] < kl["hqq4-g16"] < kl["hqq2-g16"]
    impact = ml.open(found.path / "02-hqq4-g16" / "impact")
    assert float(impact.quality().estimate.sel(measure="kl")) == pytest.approx(kl["hqq4-g16"])
    assert "hqq4-g16" in repr(found)
    assert "on the front" in found._repr_html_()


def test_the_figure_and_the_report(resumed, tmp_path):
    found, _ = resumed
    ax = ml.show.pareto(found, x="expert_bits")
    drawn = {line.get_label(): line.get_xydata()[0] for line in ax.lines if line.get_label() in found.schemes}
    for scheme, (x, y) in drawn.items():
        assert x == pytest.approx(found.of("expert_bits").estimate[scheme])
        assert y == pytest.approx(found.of("kl").estimate[scheme])
    assert len(drawn) == 4
    page = ml.report(found, tmp_path / "report.html").read_text("utf-8")
    for words in ("Schemes side by side", "hqq2-g16", "bits an expert weight"):
        assert words in page


def table(**points):
    rows = [
        {"scheme": scheme, "quantity": name, "estimate": value, "unit": "", "n": 5}
        for scheme, values in points.items()
        for name, value in zip(("bytes", "kl"), values, strict=True)
    ]
    return Pareto(pd.DataFrame(rows, columns=COLUMNS), {"model": {"name": "m"}, "documents": 2})


def test_the_front_is_of_those_that_none_beats():
    found = table(a=(10, 0.0), b=(5, 0.2), c=(4, 0.5), worse=(6, 0.3), equal=(5, 0.2), unknown=(1, np.nan))
    assert found.front() == ["c", "b", "a"]


HELD = {"name": "m", "revision": "abc", "audit": {"label": "nf4"}, "weights_checksum": "1f", "adapters": []}


def log_of(model: dict, *rows: dict) -> SimpleNamespace:
    shared = {"ci_low": 0.3, "ci_high": 0.5, "n": 9, "metric": "acc", "average": "", "protocol": "mmlu_5shot"}
    rows = rows or ({"task": "mmlu", "score": 0.4},)
    return SimpleNamespace(kind="eval", scores=pd.DataFrame([shared | row for row in rows]), meta={"model": model})


def test_scores_are_added_by_scheme():
    measured = table(a=(10, 0.0), b=(5, 0.2))
    measured.meta["schemes"] = {"a": HELD | {"weights_checksum": "2e"}, "b": HELD}
    found = measured.with_scores({"b": log_of(HELD | {"backend": "transformers", "devices": ["cpu"]})})
    assert found.of("mmlu acc").loc["b", "estimate"] == 0.4
    assert found.overview()["mmlu acc"].to_dict() == {"a": "n/a", "b": "0.400 [0.300, 0.500]"}
    with refused(BadInput, "logs", ["z"]):
        measured.with_scores({"z": log_of(HELD)})


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"name": "n"}, "model"),
        ({"revision": "def"}, "revision"),
        ({"audit": {"label": "bfloat16"}}, "quantization"),
        ({"weights_checksum": "2e"}, "checksum of the weights"),
        ({"weights_checksum": None}, "checksum of the weights"),
        ({"adapters": ["lora"]}, "adapters"),
        ({"edits": ["forbid"]}, "edits"),
    ],
    ids=str,
)
def test_a_score_of_other_weights_is_refused(changed, what):
    measured = table(a=(10, 0.0), b=(5, 0.2))
    measured.meta["schemes"] = {"b": HELD}
    with refused(BadInput, "logs", what):
        measured.with_scores({"b": log_of(HELD | changed)})
    assert not measured.table["quantity"].str.contains("acc").any()


def test_where_no_weights_are_known_no_score_is_taken():
    with refused(BadInput, "logs", "checksum of the weights"):
        table(a=(10, 0.0), b=(5, 0.2)).with_scores({"b": log_of({})})


def test_every_score_has_a_name_of_its_own():
    averages = [{"task": "demo", "average": name, "score": 0.4} for name in ("micro", "macro")]
    tasks = [{"task": f"demo_{name}", "score": 0.4} for name in ("x", "y")]
    other = [row | {"protocol": "demo_cot"} for row in averages]
    measured = table(b=(5, 0.2))
    measured.meta["schemes"] = {"b": HELD}
    names = measured.with_scores({"b": log_of(HELD, *tasks, *averages, *other)}).table["quantity"]
    assert names.is_unique


def test_a_real_score_belongs_to_its_scheme_alone(resumed):
    found, _ = resumed
    settings = ml.evals.EvalSettings(progress=False)
    rounded = ml.load(found.meta["model"]["name"], dtype="bfloat16", verbose=False)
    log = ml.evaluate(rounded, ["demo"], limit=1, settings=settings)
    scored = found.with_scores({"bfloat16": log})
    assert (scored.table["unit"] == "score").sum() == len(log.scores)
    with refused(BadInput, "logs", "quantization"):
        found.with_scores({"hqq2-g16": log})


@pytest.mark.parametrize(
    ("asked", "error", "named"),
    [
        ([], BadInput, ("schemes", [])),
        (["nf4", "nf4"], BadInput, ("schemes", ["nf4", "nf4"])),
        (["nf5"], BadInput, ("quantization", "nf5")),
        (["fp8"], ModelError, ("quantization", ["cpu"])),
        (["bfloat16", "hqq4-g48"], BadInput, ("model.layers.0.self_attn.q_proj", 48)),
        ([{"*.layers.9.*": "nf4"}], BadInput, ("quantization", "*.layers.9.*")),
        (["bfloat16", "float32"], BadInput, ("schemes", "float32")),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_measured(folder, tmp_path, asked, error, named):
    with refused(error, *named):
        ml.experiments.measure_pareto(folder, DOCUMENTS, schemes=asked, out=tmp_path / "run", settings=SETTINGS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("documents", "named"), [(pd.DataFrame({"title": ["a"], "body": ["b"]}), "text"), ("a text", "documents")]
)
def test_what_is_no_list_of_documents_is_refused_as_everywhere(folder, tmp_path, documents, named):
    with refused(BadInput, named):
        ml.experiments.measure_pareto(folder, documents, schemes=["bfloat16"], out=tmp_path / "run", settings=SETTINGS)


def test_a_speed_says_on_what_machine(folder, tmp_path):
    found = schemes.measure_pareto(
        folder, DOCUMENTS[:2], schemes=["bfloat16"], out=tmp_path / "run", speed=Speed(2, 16, 2), settings=SETTINGS
    )
    speed = ml.open(tmp_path / "run").of("ttft_s")
    assert np.isinf(speed["ci_high"]).all(), "two calls bound no median from above"
    machine = ml.open(tmp_path / "run" / "01-bfloat16" / "speed").meta["machine"]["name"]
    assert found.title().endswith(f"; speed on {machine}")


def test_the_commands(folder, resumed, tmp_path, capsys):
    corpus = tmp_path / "few.jsonl"
    corpus.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS[:3]), "utf-8")
    reading = [str(folder), str(corpus), "--max-length", "24", "--overlong", "truncate", "--device-map", "cpu"]
    command = ["pareto", *reading, "--out", str(tmp_path / "p"), "--schemes", "hqq3-g16", "--calls", "0", "--json"]
    assert cli.main([*command, "--csv", str(tmp_path / "t.csv")]) == 0
    assert json.loads(capsys.readouterr().out)["front"] == ["hqq3-g16", "float32"]
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "t.csv")[["scheme", "n"]], ml.open(tmp_path / "p").table[["scheme", "n"]]
    )
    command = ["impact", *reading, "--out", str(tmp_path / "i"), "--quantization", "hqq3-g16", "--by", "domain"]
    assert cli.main(command) == 0
    assert "of it from other routing" in capsys.readouterr().out
    for name in ("a", "b"):
        assert cli.main(["record", *reading, "--out", str(tmp_path / name), "--signals", "logprob"]) == 0
    capsys.readouterr()
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    rows = {row["what"]: row["estimate"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["other experts in some layer"] == 0
    assert rows["loss, second less first"] == 0
    assert cli.main(["impact", *reading, "--out", str(tmp_path / "i")]) == 2
    assert "--quantization" in capsys.readouterr().err


def test_more_bits_of_one_method_are_never_worse_on_the_demo_model():
    original = ml.load("demo", verbose=False)
    documents = ml.demo_documents()[::6]
    settings = ml.RecordSettings(progress=False, max_length=64, overlong="truncate")
    found = [
        ml.experiments.measure_impact(
            original, ml.load("demo", quantization=f"hqq{bits}-g32", verbose=False), documents, settings=settings
        )
        for bits in (4, 3, 2)
    ]
    kl, difference = (
        [impact.quality().sel(measure=measure) for impact in found] for measure in ("kl", "loss_difference")
    )
    for better, worse in ((0, 1), (1, 2)):
        assert float(kl[better].estimate) < float(kl[worse].estimate)
        assert float(difference[better].ci_low) < float(difference[worse].ci_high)
    errors = [float(impact.experts().weight_error.mean()) for impact in found]
    assert errors == sorted(errors)
