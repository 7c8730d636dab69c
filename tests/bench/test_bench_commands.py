"""mixlens bench and mixlens cost, as a script and as a person would use them."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest
from bench_server import Script, answer, serving

from mixlens.cli import main as cli

FEW = ["--requests", "2", "--prompt-tokens", "16", "--output-tokens", "4"]


def test_bench_prints_a_table_and_leaves_a_run(tmp_path, capsys):
    with serving(Script(answer())) as url:
        assert cli.main(["bench", url, "--model", "m", *FEW, "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "TTFT p50 [ms]" in text
    assert "2 of 2" in text
    assert cli.main(["info", str(tmp_path / "run"), "--verify"]) == 0


def test_bench_for_a_script(tmp_path, capsys):
    with serving(Script(answer())) as url:
        load = ["--rate", "50", "--arrivals", "constant", "--out", str(tmp_path / "run"), "--json"]
        assert cli.main(["bench", url, "--model", "m", *FEW, *load]) == 0
    result = json.loads(capsys.readouterr().out)
    [ttft] = [row for row in result["rows"] if (row["metric"], row["statistic"]) == ("ttft_s", "p50")]
    assert (ttft["n"], ttft["level"]) == (2, "constant 50/s")
    assert next(row for row in result["rows"] if row["statistic"] == "p99")["estimate"] is None


@pytest.mark.parametrize(("slo", "status"), [("ttft=60,e2e=60", 0), ("ttft=60,tpot=1e-9", 1)])
def test_an_objective_decides_the_exit_status(tmp_path, capsys, slo, status):
    with serving(Script(answer())) as url:
        asked = ["bench", url, "--model", "m", *FEW, "--out", str(tmp_path / "run"), "--slo", slo, "--json"]
        assert cli.main([*asked, "--csv", str(tmp_path / "t.csv")]) == status
    result = json.loads(capsys.readouterr().out)
    assert [row["n"] for row in result["slo"]] == [2]
    table = pd.read_csv(tmp_path / "t.csv")
    assert table["estimate"].tolist() == pytest.approx(
        [float("nan") if row["estimate"] is None else row["estimate"] for row in result["rows"]], nan_ok=True
    )
    assert cli.main(["bench", "http://127.0.0.1:9/v1", "--model", "m", "--slo", "ttft<1"]) == cli.EXIT_USAGE


def test_bench_asks_the_prompts_of_a_file(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    script = Script(answer())
    with serving(script) as url:
        given = ["--prompts", str(tmp_path / "p.jsonl"), "--text", "body", "--requests", "3", "--warmup", "0"]
        assert cli.main(["bench", url, "--model", "m", *given, "--out", str(tmp_path / "run")]) == 0
    assert [body["messages"][0]["content"] for _, body in script.requests] == ["one", "two", "one"]
    assert "3 given prompts" not in (text := capsys.readouterr().out)
    assert "2 given prompts (2 distinct" in text


def test_a_sweep_names_the_knee(tmp_path, capsys):
    with serving(Script(answer())) as url:
        few = [*FEW, "--sweep", "2", "--out", str(tmp_path / "run")]
        assert cli.main(["bench", url, "--model", "m", *few, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["knee"]
    assert [row["level"] for row in found] == ["concurrency 1", "concurrency 2"]
    assert sum(row["knee"] for row in found) == 1


def test_no_success_is_a_failure_and_its_requests_stay(tmp_path, capsys):
    refusal = Script([b'{"error":{"message":"no credit"}}'], status=402)
    with serving(refusal) as url:
        assert cli.main(["bench", url, "--model", "m", *FEW, "--out", str(tmp_path / "run")]) == cli.EXIT_FAILED
    said = capsys.readouterr().err
    assert "3 http (no credit)" in said
    assert len((tmp_path / "run" / "results.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["http://127.0.0.1:9/v1"], ["--model"]),
        (["nowhere", "--model", "m"], ["'nowhere'"]),
        (["http://127.0.0.1:9/v1", "--model", "m", "--provider", "x"], ["'x'", "OpenRouter"]),
        (["http://127.0.0.1:9/v1", "--model", "m", "--concurrency", "one"], ["'one'"]),
        (["http://127.0.0.1:9/v1", "--model", "m", "--prompts", "nothing.txt"], ["nothing.txt"]),
        (["http://127.0.0.1:9/v1", "--model", "m", "--dtype", "bfloat16", "--static-cache"],
         ["--dtype", "--static-cache"]),
        (["http://127.0.0.1:9/v1", "--model", "m", "--max-dollars", "1"], ["$1", "--price"]),
        (["http://127.0.0.1:9/v1", "--model", "m", "--price", "x"], ["'x'"]),
        (["http://127.0.0.1:9/v1", "--model", "m", "--price", "1"], ["(1.0,)"]),
        (["openrouter", "--provider", "deepinfra"], ["OPENROUTER_API_KEY"]),
    ],
)  # fmt: skip
def test_mistakes_of_bench_send_nothing(argv, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    assert cli.main(["bench", *argv]) == cli.EXIT_USAGE
    said = capsys.readouterr().err
    assert all(name in said for name in named)
    assert not list(tmp_path.iterdir())


def test_a_price_by_hand_is_what_a_cap_reckons_with(tmp_path, capsys):
    script = Script(answer())
    with serving(script) as url:
        # 20 tokens in at $1 and 6 out at $10 a million make 80 millionths, and at worst 0.4 thousandths.
        capped = ["--price", "1,10", "--max-dollars", "0.0006", "--requests", "50", "--warmup", "0", "--json"]
        assert cli.main(["bench", url, "--model", "m", *FEW[2:], *capped, "--out", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["stopped"] == "the cap of $0.0006"
    assert 1 <= len(script.requests) < 8


def test_cost_says_what_and_when(capsys):
    assert cli.main(["cost", "--input-tokens", "1000", "--output-tokens", "500"]) == 0
    text = capsys.readouterr().out
    assert all(dollars in text for dollars in ("0.00020", "0.00100", "0.00081"))
    assert "gathered 20" in text
    assert text.count("OpenRouter's page of mistralai/mixtral-8x7b-instruct") == 1
    grown = ["--requests", "100000", "--months", "3", "--growth", "0.1"]
    assert cli.main(["cost", "--input-tokens", "1000", "--output-tokens", "500", *grown]) == 0
    assert "0.00020      $20.00      $22.00      $24.20       $66.20" in capsys.readouterr().out
    assert cli.main(["cost", "--input-tokens", "1000", "--output-tokens", "500", "--months", "2", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 14


def test_bench_starts_without_torch():
    heavy = "{'torch', 'transformers', 'matplotlib'}"
    script = f"import sys, mixlens.bench.run, mixlens.cli.main; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
