"""mixlens bench of a model that it loads here."""

from __future__ import annotations

import json

import pytest

import mixlens as ml
from mixlens.bench.roofline import Machine, Measured
from mixlens.cli import main as cli

FEW = ["--requests", "2", "--prompt-tokens", "16", "--output-tokens", "3"]


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    found = Machine("a device", Measured(1e9, 1e9, 1e9, 10, "copy"), Measured(1e10, 1e10, 1e10, 10, "product"))
    monkeypatch.setattr("mixlens.bench.local.measure", lambda device, dtype, before=None: found)


def test_bench_of_the_demo_model_prints_a_table_and_leaves_a_run(tmp_path, capsys):
    load = ["--concurrency", "1,2", "--experts", "eager,grouped_mm", "--dtype", "bfloat16", "--static-cache"]
    assert cli.main(["bench", "demo", *FEW, *load, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for words in ("batch 2, 16 + 3 tokens, grouped_mm", "decode MBU [%]", "demo in bfloat16", "Static cache"):
        assert words in printed
    assert ml.open(tmp_path / "run").succeeded == 8


def test_for_a_script(tmp_path, capsys):
    assert cli.main(["bench", "demo", *FEW, "--json", "--no-recording", "--out", str(tmp_path / "run")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {row["level"] for row in said["rows"]} == {"batch 1, 16 + 3 tokens"}
    assert "Routing was not recorded: no bytes are known." in said["remarks"]


@pytest.mark.parametrize(
    ("argv", "named", "loads"),
    [
        (["demo", "--device-map", "abacus"], ["'abacus'"], True),
        (["demo", "--model", "m", "--max-dollars", "1"], ["--model", "--max-dollars"], True),
        (["demo", "--output-tokens", "99999"], ["99999"], True),
        (["demo", "--concurrency", "0"], ["0"], False),
        (["demo", "--requests", "0"], ["0"], False),
        (["demo", "--rate", "2"], ["--rate"], True),
    ],
)
def test_mistakes_measure_nothing(argv, named, loads, tmp_path, capsys, monkeypatch):
    if not loads:  # said before the model is loaded
        monkeypatch.setattr("mixlens.models.load.load", None)
    assert cli.main(["bench", *argv, "--out", str(tmp_path / "run")]) == cli.EXIT_USAGE
    said = capsys.readouterr().err
    assert all(name in said for name in named)
    assert not (tmp_path / "run").exists()
