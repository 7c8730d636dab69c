"""The command line, as a script and as a person would use it."""

from __future__ import annotations

import contextlib
import errno
import gzip
import html
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pandas as pd
import pytest
from helpers.refusals import refused
from helpers.traces import made

import mixlens
from mixlens import Trace, demo_documents
from mixlens.cli import main as cli
from mixlens.core.run_dir import written_by
from mixlens.models.load import skeleton
from mixlens.recording.estimate import estimate
from mixlens.reports.contrast import contrast_findings


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
    return code, json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


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


def test_options_come_from_a_file(corpus, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"out: {tmp_path / 'run'}\nlimit: 3\njson: true\ndry-run: true\nmax-length: 64\n"
    )
    asked = ["record", "demo", str(corpus), "--overlong", "truncate", "--config", str(tmp_path / "run.yaml")]
    assert cli.main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["documents"], told["longest_tokens"]) == (3, 64)
    assert cli.main([*asked, "--limit", "2"]) == 0  # the command line comes first
    assert json.loads(capsys.readouterr().out)["documents"] == 2


def test_a_run_is_repeated_from_its_folder(corpus, capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("limit: 3\nmax-length: 64\nquiet: true\n")
    first, second, third = (tmp_path / name for name in ("run", "run-again", "third"))
    asked = ["record", "demo", str(corpus), "--overlong", "truncate", "--out", str(first)]
    assert cli.main([*asked, "--config", str(tmp_path / "run.yaml")]) == 0
    (tmp_path / "run.yaml").unlink()
    capsys.readouterr()
    code, result = said(capsys, "again", str(first))
    assert code == 0
    assert result["differ"] == []
    assert Trace.open(second).n_tokens == Trace.open(first).n_tokens
    assert said(capsys, "again", str(second), "--out", str(third))[1]["differ"] == []  # and from the repetition
    command = json.loads((third / "meta.json").read_text())["command"]
    assert str(third) in command["words"]
    assert command["options"] == {"limit": 3, "max-length": 64}


def test_a_repetition_writes_to_its_own_folder_alone(corpus, capsys, tmp_path):
    place = tmp_path / "table.csv"
    words = ["record", "demo", str(corpus), "--limit", "1", "--csv", str(place), f"--out={tmp_path / 'other'}"]
    with written_by({"words": words, "options": {"csv": str(place)}}):
        made([3, 4]).trace.save(tmp_path / "run")
    assert said(capsys, "again", str(tmp_path / "run"))[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run-again"}


def test_a_run_from_python_cannot_be_repeated(tmp_path):
    made([3, 4]).trace.save(tmp_path / "run")
    assert cli.main(["again", str(tmp_path / "run")]) == 1


def test_a_command_with_a_key_is_not_kept(monkeypatch):
    kept = []
    monkeypatch.setattr("mixlens.cli.app.written_by", lambda command: kept.append(command) or contextlib.nullcontext())
    words = ["info", "--json"]
    cli.main(words)
    for secret in ("https://me:pass@host/v1", "sk-0123456789abcdefghij", "api_key=abc,seed=1"):
        cli.main(["info", secret])
    assert kept == [{"words": ["info"], "options": {}}, None, None, None]


@pytest.mark.parametrize("content", [None, "limits: 3", "limit: many", "a: [", "word", "limit: 0"])
def test_a_file_of_options_that_is_wrong_is_refused(corpus, capsys, tmp_path, content):
    if content is not None:
        (tmp_path / "run.yaml").write_text(content)
    asked = ["record", "demo", str(corpus), "--out", str(tmp_path / "run"), "--config", str(tmp_path / "run.yaml")]
    assert cli.main([*asked, "--dry-run"]) == cli.EXIT_USAGE
    assert "Traceback" not in capsys.readouterr().err


def test_a_dry_run_says_what_a_run_then_does(run, corpus, capsys, tmp_path, monkeypatch):
    asked = ["record", "demo", str(corpus), "--out", str(tmp_path / "new"), "--device-map", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
        code, told = said(capsys, *asked, "--dry-run")
        assert (code, (tmp_path / "new").exists()) == (0, False)
    trace = Trace.open(run)
    assert {name: told[name] for name in trace.meta["counts"]} == trace.meta["counts"]
    assert told["seconds"] is None
    routing = sum(path.stat().st_size for path in run.glob("routing-*"))
    tokens = sum(path.stat().st_size for path in run.glob("tokens-*"))
    assert routing <= told["disk_bytes"] <= 1.3 * (routing + tokens)
    assert told["weight_bytes"] == trace.meta["model"]["audit"]["bytes"]


def test_the_time_is_told_from_the_rate_of_a_run_of_the_same_model(run):
    made, like, ten_seconds = (
        skeleton("demo"),
        Trace.open(run),
        ("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:10+00:00"),
    )
    like.meta["reading"] = {"started": ten_seconds[0]}
    like.meta["created"] = ten_seconds[1]
    settings = mixlens.RecordSettings(progress=False, batch_tokens=64)
    found = estimate(made, ["A text of words."], signals=(), settings=settings, like=like)
    assert found["seconds"] == pytest.approx(found["tokens"] * 10 / like.n_tokens)
    like.meta["model"] = {"name": "another"}
    with refused(mixlens.BadInput, "like", "another"):
        estimate(made, ["A text of words."], signals=(), settings=settings, like=like)


def test_a_contrast_of_two_conditions(run, capsys, tmp_path):
    asked = ["contrast", str(run), "expert_share", "--by", "domain", "--a", "github", "--b", "french"]
    code, result = said(capsys, *asked, "--out", str(tmp_path / "c.html"))
    assert code == 0
    found = mixlens.stats.contrast(Trace.open(run), mixlens.stats.expert_share, by="domain", a="github", b="french")
    rows = pd.DataFrame(result["rows"])
    for name in ("estimate", "q", "survives"):
        assert rows[name].tolist() == pytest.approx(found[name].values.ravel().tolist())
    page = (tmp_path / "c.html").read_text("utf-8")
    told = int(found["survives"].sum())
    assert f"{told} of {found.attrs['cells']} cells" in page
    findings = [sentence for _, sentence in contrast_findings(found)]
    assert len(findings) == min(told, 5)
    assert all(html.escape(sentence) in page for sentence in findings)
    assert page.count("<figure") == 1
    code, result = said(capsys, *asked[:-1], "klingon")
    assert (code, result["argument"]) == (cli.EXIT_USAGE, "by")


def test_a_condition_is_found_whatever_its_type(tmp_path, capsys):
    trace = mixlens.Trace.from_arrays(
        [[[i % 4, 4]] for i in range(40)],
        n_experts=8,
        tokens={"sequence": [i // 5 for i in range(40)]},
        sequences=pd.DataFrame({"year": [1999, 2001] * 4}),
    )
    trace.save(tmp_path / "run")
    code, result = said(capsys, "contrast", str(tmp_path / "run"), "load_balance", "--by", "year", "--a", "1999")
    assert (code, result["attrs"]["n_a"], result["attrs"]["n_b"]) == (0, 4, 4)


def test_report_and_info(run, capsys, tmp_path):
    assert cli.main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 0
    assert "<html" in (tmp_path / "r.html").read_text("utf-8")[:500]
    capsys.readouterr()
    code, result = said(capsys, "info", str(run), "--verify")
    assert (code, result["kind"], result["verified"]) == (0, "trace", True)
    code, result = said(capsys, "info", str(run))
    assert "verified" not in result
    code, result = said(capsys, "info")
    assert "transformers" in result


def test_info_verify_names_an_altered_file(corpus, tmp_path, capsys):
    cli.main(["record", "demo", str(corpus), "--out", str(tmp_path / "run"), "--limit", "2"])
    victim = tmp_path / "run" / "sequences.parquet"
    victim.write_bytes(victim.read_bytes()[:-1])
    capsys.readouterr()
    code, result = said(capsys, "info", str(tmp_path / "run"), "--verify")
    assert code == 1
    assert "sequences.parquet" in result["message"]


@pytest.mark.parametrize(
    ("argv", "named", "status"),
    [
        (["info", "nowhere"], ["nowhere"], cli.EXIT_FAILED),
        (["report", "nowhere"], ["nowhere"], cli.EXIT_FAILED),
        (["record", "demo", "nothing.jsonl", "--out", "x"], ["nothing.jsonl"], cli.EXIT_USAGE),
        (["record", "nowhere/model", "BAD", "--out", "x"], ["bad.jsonl", "line 2"], cli.EXIT_USAGE),
        (["record", "demo", "GOOD", "--out", "x", "--text", "body"], ["body"], cli.EXIT_USAGE),
        (["record", "demo", "GOOD", "--out", "x", "--signals", "moe_ot"], ["moe_ot", "moe_out"], cli.EXIT_USAGE),
        (["record", "demo", "GOOD", "--out", "x", "--max-length", "3"], ["3"], cli.EXIT_USAGE),
        (["stats", "RUN", "repetition", "--by", "topic"], ["topic", "domain"], cli.EXIT_USAGE),
        (["stats", "RUN", "repetition", "--layers", "0,nine"], ["0,nine"], cli.EXIT_USAGE),
        (["stats", "RUN", "repetition", "--layers", "99"], ["99", "0 to 7"], cli.EXIT_USAGE),
        (["stats", "RUN", "repetition", "--csv", "no/such/folder/x.csv"], ["no/such/folder/x.csv"], cli.EXIT_USAGE),
        (["info", "FOREIGN"], ["meta.json"], cli.EXIT_FAILED),
        (["report", "FOREIGN"], ["meta.json"], cli.EXIT_FAILED),
        (["record", "demo", "CUT", "--out", "x"], ["cut.jsonl.gz"], cli.EXIT_USAGE),
        (["record", "demo", "GOOD", "--out", "x", "--device-map", "mars"], ["mars"], cli.EXIT_USAGE),
    ],
)
def test_mistakes_end_with_a_message_and_a_status(argv, named, status, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text('{"text": "one text of several words"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\nnot json\n')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one text"}\n' * 99)[:-12])
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "meta.json").write_text("{}")
    names = {"RUN": str(run), "GOOD": "good.jsonl", "BAD": "bad.jsonl", "CUT": "cut.jsonl.gz", "FOREIGN": "foreign"}
    code = cli.main([names.get(word, word) for word in argv])
    error = capsys.readouterr().err
    assert code == status
    assert all(name in error for name in named)
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["stats", "run", "no_such_statistic"], "expert_share"),
        (["no_such_command"], "no_such_command"),
        (["stats", "run"], "NAME"),
        (["info", "run", "--verfy"], "--verify"),
        (["stats", "run", "repetition", "--layers", "zero"], "--layers"),
        (["record", "demo", "GOOD", "--out", "x", "--max-length", "-5"], "--max-length"),
        (["record", "demo", "GOOD", "--out", "x", "--limit", "many"], "--limit"),
        (["record", "demo", "GOOD", "--out", "x", "--quantization", "int4"], "--quantization"),
        (["record", "demo", "GOOD", "--out", "x", "--quantization", "experts=int4"], "int4"),
        (["record", "demo", "GOOD", "--out", "x", "--signals", "router_logit"], "--signals"),
        (["record", "demo", "GOOD"], "--out"),
        (["pareto", "demo", "GOOD", "--out", "x", "--schemes", "nf4,int4"], "--schemes"),
        (["pareto", "demo", "GOOD", "--out", "x", "--schemes", "nf4", "--scores", "run"], "--scores"),
        (["topk", "demo", "GOOD", "--out", "x", "--ks", "1,x"], "--ks"),
        (["bench", "demo", "--concurrency", "1,x"], "--concurrency"),
        (["bench", "demo", "--dtype", "int4"], "int4"),
        (["eval", "demo", "mmlu", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_wrong_usage_is_status_2_before_a_model_is_loaded(argv, named, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("mixlens.models.load.load", None)
    (tmp_path / "good.jsonl").write_text('{"text": "one text of several words"}\n')
    monkeypatch.chdir(tmp_path)
    code = cli.main(["good.jsonl" if word == "GOOD" else word for word in argv])
    error = capsys.readouterr().err
    assert code == cli.EXIT_USAGE
    assert named in error
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()


def test_an_interruption_is_status_130(run, monkeypatch):
    monkeypatch.setattr("mixlens.reports.report.report", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["report", str(run)]) == cli.EXIT_INTERRUPTED


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "", "x.py"), OSError(errno.ENOSPC, ""), MemoryError()])
def test_what_runs_out_anywhere_ends_in_words(error, run, monkeypatch, capsys):
    monkeypatch.setattr("mixlens.reports.report.report", lambda *_, **__: (_ for _ in ()).throw(error))
    assert cli.main(["report", str(run), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"] == "RunError"


def test_an_error_of_the_program_is_not_hidden(run, monkeypatch):
    monkeypatch.setattr("mixlens.reports.report.report", lambda *_, **__: (_ for _ in ()).throw(OSError("odd")))
    with pytest.raises(OSError, match="odd"):
        cli.main(["report", str(run)])


def test_a_message_names_options_and_not_arguments_of_python(run, capsys):
    assert cli.main(["record", "demo", __file__, "--out", str(run), "--max-length", "99999999"]) == cli.EXIT_USAGE
    error = capsys.readouterr().err
    assert "--max-length" in error
    assert "max_length" not in error


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("record", "stats", "report", "info", "demo"))


def test_every_command_reports_alike_and_leads_to_a_page_of_the_guide(capsys):
    for name in (name for name in cli.app if not name.startswith("-") and name != "data"):
        assert cli.main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert {"--json", "--quiet", "--config"} <= set(shown.replace(",", " ").split()), name
        [page] = re.findall(r"file://\S+\.md", "".join(shown.split("Guide: ")[1].split()))
        assert Path(url2pathname(urlsplit(page).path)).is_file(), name
        assert cli.main([name, "--no-such-option", "--json"]) == cli.EXIT_USAGE
        told = capsys.readouterr()
        assert page in json.loads(told.out)["guide"]
        assert page in told.err


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert mixlens.__version__ in capsys.readouterr().out


def test_quiet_prints_the_result_alone(corpus, tmp_path, capfd):
    assert cli.main(["record", "demo", str(corpus), "--limit", "2", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    printed = capfd.readouterr()
    assert "tokens" in printed.out
    assert "demo" not in printed.err
    assert "doc" not in printed.err


NOISY = """
import atexit, ctypes, math, os, subprocess, sys
from mixlens.cli.main import app, script
from mixlens.cli.app import Result
from mixlens.cli.options import Output

kept = sys.stdout

@app.command
def noisy(*, fail: bool = False, output: Output = Output()) -> Result:
    print("from Python")
    print("to what a library kept", file=kept)
    os.write(1, b"below Python\\n")
    ctypes.CDLL(None).printf(b"in the buffers of C")
    subprocess.run(["echo", "of a child"])
    atexit.register(print, "at the end")
    atexit.register(ctypes.CDLL(None).puts, b"of C at the end")
    if fail:
        raise __import__("mixlens").BadInput("no", argument="x")
    return Result({"missing": math.nan, "more": [(math.inf, 1)], "deep": {"x": -math.inf}})

sys.argv[1:] = ["noisy", *sys.argv[1:]]
script()
"""


@pytest.mark.parametrize("words", [["--json"], ["--json", "--fail"]])
def test_json_is_one_document_whatever_libraries_print(words):
    command = [sys.executable, "-c", NOISY, *words]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    told = json.loads(done.stdout, parse_constant=pytest.fail)
    assert told == {"missing": None, "more": [[None, 1]], "deep": {"x": None}} or told["error"] == "BadInput"
    assert all(noise in done.stderr for noise in ("from Python", "below", "buffers", "child", "kept", "at the end"))
    other = subprocess.run(command, capture_output=True, text=True, env=alone | {"WORLD_SIZE": "2", "RANK": "1"})
    assert other.stdout == ""


def test_a_reader_who_leaves_ends_the_help_in_silence():
    read, write = os.pipe()
    os.close(read)
    told = subprocess.run(
        [sys.executable, "-m", "mixlens", "stats", "--help"], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (told.returncode, told.stderr) == (cli.EXIT_DONE, b"")


def test_a_remark_is_a_sentence(capsys, monkeypatch):
    def verified(_folder):
        warnings.warn("These files share an author.", UserWarning, stacklevel=1)
        return pd.DataFrame({"file": ["a"], "fault": [""]})

    monkeypatch.setattr("mixlens.evals.verify.verify", verified)
    assert cli.main(["data", "verify", "."]) == cli.EXIT_DONE
    assert capsys.readouterr().err == "mixlens: These files share an author.\n"
