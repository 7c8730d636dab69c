"""Importance on the command line and in the report."""

from __future__ import annotations

import json

import pandas as pd
import pytest

import mixlens as ml
from mixlens import cli, demo_documents


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
    for words in ("Importance of experts", "Importance by domain", "never chosen", "nats a token"):
        assert words in html
    with_trace = ml.report([ml.open(run), run], tmp_path / "two.html").read_text("utf-8")
    assert "importance 1: Importance of experts" in with_trace
    assert "map: Importance of experts" in with_trace


def test_info_on_an_importance_run(run, capsys):
    assert cli.main(["info", str(run), "--verify", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["kind"] == "importance"
    assert said["verified"] is True


def test_one_layer_too_many_is_said(corpus, tmp_path, capsys):
    command = ["importance", "demo", str(corpus), "--out", str(tmp_path / "x"), "--device-map", "cpu", "--layers", "8"]
    assert cli.main(command) == 1
    assert "layers 0 to 7" in capsys.readouterr().err
