"""Importance, contributions and the sweep over k on the command line and in the report."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pandas as pd
import pytest
from helpers.refusals import refused

import mixlens as ml
from mixlens import demo_documents
from mixlens.cli import main as cli


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "few.jsonl"
    documents = [d for d in demo_documents() if d["domain"] in ("french", "mathematics")]
    with path.open("w", encoding="utf-8") as file:
        for document in documents[:2] + documents[-2:]:
            file.write(json.dumps({**document, "text": document["text"][:120]}) + "\n")
    return path


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "map"
    command = ["importance", "demo", str(corpus), "--out", str(out), "--device-map", "cpu", "--layers", "0,7"]
    assert cli.main(command) == 0
    return out


def test_the_command_prints_the_map_of_its_run(run, corpus, capsys, tmp_path):
    again = ["importance", "demo", str(corpus), "--out", str(run), "--device-map", "cpu", "--layers", "0,7"]
    assert cli.main([*again, "--by", "domain", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["statistic"] == "expert_importance"
    expected = ml.stats.expert_importance(ml.open(run), by="domain")
    assert len(result["rows"]) == expected.estimate.size
    row = result["rows"][5]
    cell = expected.sel(domain=row["domain"], layer=row["layer"], expert=row["expert"])
    assert row["estimate"] == pytest.approx(float(cell.estimate))
    assert cli.main([*again, "--csv", str(tmp_path / "map.csv")]) == 0
    assert set(pd.read_csv(tmp_path / "map.csv")["layer"]) == {0, 7}


def test_a_report_of_an_importance_run(run, tmp_path):
    html = ml.report(run, tmp_path / "map.html").read_text("utf-8")
    for words in ("Importance of experts", "Importance by domain", "never chosen", "nats per token"):
        assert words in html
    with_trace = ml.report([ml.open(run), run], tmp_path / "two.html").read_text("utf-8")
    assert "importance 1: Importance of experts" in with_trace
    assert "map: Importance of experts" in with_trace


@pytest.fixture(scope="module")
def others(corpus, tmp_path_factory):
    """Runs of contributions and of a sweep over k."""
    folder = tmp_path_factory.mktemp("others")
    for name, more in {"contributions": [], "topk": ["--ks", "1,3"]}.items():
        command = [name, "demo", str(corpus), "--out", str(folder / name), "--device-map", "cpu", *more]
        assert cli.main(command) == 0
    return folder


def test_contributions_and_the_sweep_print_what_their_runs_hold(others, corpus, capsys):
    command = ["contributions", "demo", str(corpus), "--out", str(others / "contributions"), "--device-map", "cpu"]
    assert cli.main([*command, "--measure", "norm", "--by", "domain", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][70]
    data = ml.stats.expert_contribution(ml.open(others / "contributions"), measure="norm", by="domain")
    cell = data.sel(domain=row["domain"], layer=row["layer"], expert=row["expert"])
    assert row["estimate"] == pytest.approx(float(cell.estimate), nan_ok=True)
    command = ["topk", "demo", str(corpus), "--out", str(others / "topk"), "--device-map", "cpu", "--ks", "1,3"]
    assert cli.main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    data = ml.stats.topk_sweep(ml.open(others / "topk"))
    assert [row["k"] for row in rows] == [1, 2, 3]
    assert [row["change"] for row in rows] == pytest.approx(data.change.values.tolist())
    assert cli.main([*command[:-1], "1,x"]) == 2
    assert "1,x" in capsys.readouterr().err


def test_a_report_of_contributions_and_of_a_sweep(others, run, tmp_path):
    html = ml.report([others / "contributions", others / "topk", run], tmp_path / "all.html").read_text("utf-8")
    for words in (
        "contributions: Contribution of experts",
        "contributions: Contribution by domain",
        "contributions: Contribution along a text",
        "topk: Number of experts a token chooses",
        "nats per token against k = 2",
        "map: Importance of experts",
    ):
        assert words in html
    with refused(ml.BadInput, "runs", "int"):
        ml.report([3], tmp_path / "x.html")


def test_info_on_an_importance_run(run, capsys):
    assert cli.main(["info", str(run), "--verify", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "importance"
    assert said["verified"] is True


def test_means_are_those_of_the_same_documents(corpus, tmp_path, capsys):
    command = ["importance", "demo", str(corpus), "--device-map", "cpu", "--layers", "7", "--how", "mean", "--json"]
    assert cli.main([*command, "--out", str(tmp_path / "mean")]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    documents = [json.loads(line) for line in corpus.read_text("utf-8").splitlines()]
    model, quiet = ml.load("demo", device_map="cpu", verbose=False), ml.RecordSettings(progress=False)
    means = ml.experiments.expert_outputs(model, documents, settings=quiet)["mean"]
    expert = max(rows, key=lambda row: row["share"])["expert"]
    loss = []
    for edits in ([], [ml.edits.ablate(7, expert, how="mean", mean=means)]):
        with ml.edit(model, *edits) if edits else contextlib.nullcontext():
            loss.append(-np.nanmean(ml.record(model, documents, settings=quiet).read("logprob")))
    assert rows[expert]["estimate"] == pytest.approx(loss[1] - loss[0], abs=1e-4)


def test_one_layer_too_many_is_said(corpus, tmp_path, capsys):
    command = ["importance", "demo", str(corpus), "--out", str(tmp_path / "x"), "--device-map", "cpu", "--layers", "8"]
    assert cli.main(command) == 2
    assert "layers 0 to 7" in capsys.readouterr().err
