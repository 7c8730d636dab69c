"""Text that is not kind: in files of documents, in a terminal, and in tables for spreadsheets."""

from __future__ import annotations

import csv
import gzip
import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
from helpers.hostile import NAMES, plain_in_a_terminal
from helpers.refusals import refused

import mixlens as ml
from mixlens.bench.bench import Bench
from mixlens.cli import main as cli
from mixlens.cli.tables import written

GOOD = '{"text": "one"}'
BAD = {
    "cut": '{"text": "a"',
    "no JSON": "not json",
    "NaN": '{"n": NaN}',
    "infinity": '{"n": -Infinity}',
    "half a surrogate": '{"text": "\\ud83d"}',
    "deep": "[" * 100_000,
    "5001 digits": '{"n": 1' + "0" * 5000 + "}",
}
STEERING = "\x1b[2J\x1b]0;owned\x07 \u202etxt.exe \x9b31m \x00 \ufeff"


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".jsonl.gz"])
@pytest.mark.parametrize("bad", BAD, ids=BAD)
def test_a_line_that_is_no_document_is_named(tmp_path, suffix, bad):
    path = tmp_path / f"documents{suffix}"
    text = "\n".join([GOOD, "", BAD[bad], GOOD])
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    with refused(ml.BadInput, "source", 3):
        list(ml.documents(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv.gz", ".txt.gz"])
def test_what_would_fill_the_memory_is_refused_before_it_does(tmp_path, suffix):
    path = tmp_path / f"documents{suffix}"
    start = b'{"text": "' if "json" in suffix else b"text\n"
    opens = gzip.open if suffix.endswith("gz") else open
    with opens(path, "wb") as file:
        file.write(start)
        for _ in range(96):
            file.write(b"x" * (1 << 20))
    tracemalloc.start()
    with pytest.raises(ml.BadInput):
        ml.documents(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300 << 20


def test_a_meta_json_that_would_fill_the_memory_is_refused_before_it_does(tmp_path):
    run = hostile_trace().save(tmp_path / "run").path
    for content in (b"{" + b" " * (40 << 20) + b"}", b'{"a": [' + b"[]," * 600_000 + b"1]}"):
        (run / "meta.json").write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ml.RunError):
            ml.open(run)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 300 << 20


def test_large_whole_numbers_and_pairs_of_surrogates_stay_what_they_are(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text(f'{GOOD}\n{{"text": "\\ud83d\\ude00", "n": {2**63 - 1}}}\n', "utf-8")
    assert [(row["text"], row.get("n")) for row in ml.documents(path)] == [("one", None), ("\U0001f600", 2**63 - 1)]


def hostile_trace() -> ml.Trace:
    sequences = pd.DataFrame({"document_id": [STEERING, "b"], "domain": [STEERING, "b"]})
    tokens = {"sequence": [0, 0, 1], "token_id": [5, 6, 7]}
    ids = np.array([[[0, 2]], [[1, 3]], [[2, 3]]])
    meta = {"model": {"name": STEERING}}
    return ml.Trace.from_arrays(ids, n_experts=4, tokens=tokens, sequences=sequences, meta=meta)


def test_nothing_that_is_printed_steers_a_terminal(tmp_path):
    trace = hostile_trace()
    bench = Bench([], {"endpoint": {"model": STEERING, "url": STEERING}, "created": STEERING})
    for shown in (trace, bench):
        assert plain_in_a_terminal(repr(shown))
    with pytest.raises(ml.RunError) as caught:
        ml.open(tmp_path / STEERING.replace("\x00", "").replace("/", ""))
    assert plain_in_a_terminal(str(caught.value))
    assert "\\x1b[2J" in str(caught.value)


def test_a_command_shows_hostile_names_of_files_and_domains_as_escapes(tmp_path, capsys):
    run = hostile_trace().save(tmp_path / "run\x1b[31m").path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main(["stats", str(run), "expert_share", "--by", "domain"]) == 0
        assert cli.main(["info", str(run), "--verify"]) == 0
        (run / "stray\x1b[2K\r").write_text("")
        assert cli.main(["info", str(run), "--verify"]) != 0
    told = capsys.readouterr()
    assert plain_in_a_terminal(told.out + told.err)
    assert "stray\\x1b[2K\\r" in told.err


def test_a_cell_of_a_spreadsheet_is_no_formula(tmp_path):
    hostile = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "a\r=1", *NAMES.values(), "plain", 'a"b,c']
    frame = pd.DataFrame({"=cmd|' /C calc'!A0": hostile, "n": range(len(hostile)), "low": -0.5})
    written(frame, str(tmp_path / "table.csv"))
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    for cell in (*header, *(row[0] for row in rows)):
        assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert [row[0].removeprefix("'") for row in rows] == [cell.replace("\r", "\n") for cell in hostile]
    assert {row[2] for row in rows} == {"-0.5"}
