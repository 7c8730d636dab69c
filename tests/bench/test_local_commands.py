"""mixlens bench of a model that it loads here."""

from __future__ import annotations

import json

import pytest

import mixlens as ml
from mixlens import cli
from mixlens.bench.roofline import Machine, Measured

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
    ("argv", "message"),
    [
        (["demo", "--device-map", "abacus"], "measured on 'abacus'. torch knows no such device. Give auto"),
        (["demo", "--model", "m", "--max-dollars", "1"], "with --model, --max-dollars. That is for an endpoint"),
        (["demo", "--output-tokens", "99999"], "answers of 99999 were to be generated. The model's context is"),
        (["demo", "--concurrency", "0"], "That is no load"),
        (["demo", "--requests", "0"], "A benchmark of 0 calls"),
        (["demo", "--rate", "2"], "with --rate. That is for an endpoint"),
    ],
)
def test_mistakes_measure_nothing(argv, message, tmp_path, capsys, monkeypatch):
    if "no load" in message or "0 calls" in message:  # said before the model is loaded
        monkeypatch.setattr("mixlens.models.load.load", None)
    assert cli.main(["bench", *argv, "--out", str(tmp_path / "run")]) == cli.EXIT_FAILED
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
