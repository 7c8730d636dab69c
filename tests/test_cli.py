"""The command line, as a script and as a person would use it."""

from __future__ import annotations

import gzip
import json

import pandas as pd
import pytest

from mixlens import Trace, demo_documents
from mixlens.cli import main as cli


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "samples.jsonl.gz"
    kept = [d for d in demo_documents() if d["domain"] in ("french", "github", "mathematics")]
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(document) + "\n" for document in kept)
    return path


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    assert cli.main(["record", "demo", str(corpus), "--out", str(out), "--device-map", "cpu"]) == 0
    return out


def said(capsys, *argv: str) -> tuple[int, dict]:
    code = cli.main([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_record_leaves_a_run_that_opens(run):
    trace = Trace.open(run)
    assert set(trace.sequences["domain"]) == {"french", "github", "mathematics"}
    assert {"router_logits", "logprob"} <= set(trace.signals)


def test_record_again_goes_on_to_the_same_end(run, corpus, capsys):
    code, result = said(capsys, "record", "demo", str(corpus), "--out", str(run), "--device-map", "cpu")
    assert code == 0
    assert result["tokens"] == Trace.open(run).n_tokens


def test_stats_for_a_person_and_as_csv(run, capsys, tmp_path):
    assert cli.main(["stats", str(run), "repetition", "--by", "domain"]) == 0
    text = capsys.readouterr().out
    assert "mathematics" in text
    assert "Jiang et al. 2024" in text
    assert cli.main(["stats", str(run), "expert_share", "--csv", str(tmp_path / "share.csv")]) == 0
    table = pd.read_csv(tmp_path / "share.csv")
    assert table.groupby("layer")["estimate"].sum().tolist() == pytest.approx([1] * 8)


def test_report_and_info(run, capsys, tmp_path):
    assert cli.main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    assert "<html" in (tmp_path / "r.html").read_text("utf-8")[:500]
    capsys.readouterr()
    code, result = said(capsys, "info", str(run), "--verify")
    assert (code, result["kind"], result["verified"]) == (0, "trace", True)
    code, result = said(capsys, "info")
    assert "transformers" in result


def test_info_verify_names_an_altered_file(corpus, tmp_path, capsys):
    cli.main(["record", "demo", str(corpus), "--out", str(tmp_path / "run"), "--limit", "2"])
    victim = tmp_path / "run" / "sequences.parquet"
    victim.write_bytes(victim.read_bytes()[:-1])
    capsys.readouterr()
    code, result = said(capsys, "info", str(tmp_path / "run"), "--verify")
    assert code == cli.EXIT_FAILED
    assert "sequences.parquet" in result["message"]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["info", "nowhere"], ["nowhere"]),
        (["report", "nowhere"], ["nowhere"]),
        (["record", "demo", "nothing.jsonl", "--out", "x"], ["nothing.jsonl"]),
        (["record", "nowhere/model", "BAD", "--out", "x"], ["bad.jsonl", "Line 2"]),
        (["record", "demo", "GOOD", "--out", "x", "--text", "body"], ["body"]),
        (["record", "demo", "GOOD", "--out", "x", "--signals", "moe_ot"], ["moe_ot", "moe_out"]),
        (["record", "demo", "GOOD", "--out", "x", "--max-length", "3"], ["3"]),
        (["stats", "RUN", "repetition", "--by", "topic"], ["topic", "domain"]),
        (["stats", "RUN", "repetition", "--layers", "0,nine"], ["0,nine"]),
        (["stats", "RUN", "repetition", "--layers", "99"], ["99", "0 to 7"]),
        (["stats", "RUN", "repetition", "--csv", "no/such/folder/x.csv"], ["no/such/folder/x.csv"]),
        (["info", "FOREIGN"], ["meta.json"]),
        (["report", "FOREIGN"], ["meta.json"]),
        (["record", "demo", "CUT", "--out", "x"], ["cut.jsonl.gz"]),
        (["record", "demo", "GOOD", "--out", "x", "--device-map", "mars"], ["mars"]),
    ],
)
def test_mistakes_end_with_a_message_and_a_status(argv, named, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text('{"text": "one text of several words"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one text"}\n' * 99)[:-12])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "meta.json").write_text("{}")
    names = {"RUN": str(run), "GOOD": "good.jsonl", "BAD": "bad.jsonl", "CUT": "cut.jsonl.gz", "FOREIGN": "foreign"}
    code = cli.main([names.get(word, word) for word in argv])
    error = capsys.readouterr().err
    assert code == cli.EXIT_FAILED
    assert all(name in error for name in named)
    assert "Traceback" not in error


def test_wrong_usage_is_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["stats", "run", "no_such_statistic"])
    assert stop.value.code == cli.EXIT_USAGE
    assert "expert_share" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("record", "stats", "report", "info", "demo"))
