"""Documents from files of every format, recognised by their contents, and what is refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from helpers.refusals import refused

import mixlens as ml

ROWS = [
    {"text": 'One, "quoted" text', "condition": "NA", "n": 1, "good": True},
    {"text": "Two\nlines", "condition": "007", "n": None, "good": False},
    {"text": "12", "condition": "x", "n": 3, "good": True},
]
LINES = "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n"
TABLE = pd.DataFrame(ROWS).astype({"n": "Int64"})
ARROW = pa.Table.from_pylist(ROWS)


def arrow(writer) -> bytes:
    with io.BytesIO() as buffer:
        with writer(buffer, ARROW.schema) as file:
            file.write_table(ARROW)
        return buffer.getvalue()


def parquet() -> bytes:
    with io.BytesIO() as buffer:
        pq.write_table(ARROW, buffer)
        return buffer.getvalue()


FILES = {
    "lines.jsonl": LINES.encode(),
    "lines.ndjson": LINES.encode(),
    "lines": LINES.encode(),
    "lines.txt": LINES.encode(),
    "list.json": json.dumps(ROWS).encode(),
    "list": json.dumps(ROWS, indent=2).encode(),
    "lines.json": LINES.encode(),
    "lines.jsonl.gz": gzip.compress(LINES.encode()),
    "lines.jsonl.bz2": bz2.compress(LINES.encode()),
    "lines.xz": lzma.compress(LINES.encode()),
    "lines.zst": pa.compress(LINES.encode(), "zstd", asbytes=True),
    "table.csv": TABLE.to_csv(index=False).encode("utf-8-sig"),
    "table.csv.gz": gzip.compress(TABLE.to_csv(index=False).encode()),
    "table.tsv": TABLE.to_csv(index=False, sep="\t").encode(),
    "semicolons.csv": TABLE.to_csv(index=False, sep=";").encode(),
    "table": TABLE.to_csv(index=False).encode(),
    "table.parquet": parquet(),
    "data": parquet(),
    "file.arrow": arrow(pa.ipc.new_file),
    "stream.arrow": arrow(pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_documents(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    assert ml.documents(path) == ROWS
    assert ml.documents(path, limit=2) == ROWS[:2]
    assert ml.documents(path, text="condition", columns=["n"]) == [
        {"text": row["condition"], "n": row["n"]} for row in ROWS
    ]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(FILES[name])))
    if Path(name).suffix != ".tsv":
        assert ml.documents("-") == ROWS


def test_objects_at_hand():
    assert ml.documents(ROWS, limit=1) == ROWS[:1]
    assert ml.documents(["a", "b"]) == [{"text": "a"}, {"text": "b"}]
    assert ml.documents(TABLE) == ROWS
    assert ml.documents(Dataset.from_list(ROWS)) == ROWS
    assert ml.documents(DatasetDict(only=Dataset.from_list(ROWS))) == ROWS


def test_a_folder_of_texts_and_one_that_datasets_saved(tmp_path):
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for name, text in {"b.md": "# B", "a.txt": "[a] first", "deep/c.txt": "{c", ".hidden": "h"}.items():
        (tmp_path / "texts" / name).write_text(text)
    expected = [("a.txt", "[a] first"), ("b.md", "# B"), ("deep/c.txt", "{c")]
    assert [(d["document_id"], d["text"]) for d in ml.documents(tmp_path / "texts")] == expected
    assert len(ml.documents(tmp_path / "texts", limit=2)) == 2
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert ml.documents(tmp_path / "saved") == ROWS
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "both")
    assert ml.documents(tmp_path / "both", split="test") == ROWS[:1]
    for split in (None, "dev"):
        with refused(ml.BadInput, "split", split):
            ml.documents(tmp_path / "both", split=split)


REFUSED = {
    "a.pdf": (b"%PDF-1.7\n", "source"),
    "a.docx": (b"PK\x03\x04", "source"),
    "wide.txt": ("wide".encode("utf-16"), "source"),
    "latin.txt": ("Grüße".encode("latin-1"), "source"),
    "late.txt": (b"a" * 200_000 + b"\xff", "source"),
    "binary": (b"ab\0", "source"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 99)[:-12], "source"),
    "cut.parquet": (parquet()[:-9], "source"),
    "long.csv": (b"text,n\na,1\nb,2,3\n", "source"),
    "longer.csv": (b"text,n\na,1,1\nb,2,3\n", "source"),
    "empty.csv": (b"", "source"),
    "empty.jsonl": (b"\n\n", "source"),
    "no.json": (b"{'text': 'a'}", "source"),
    "other.csv": (b"body,n\na,1\n", "text"),
    "other.jsonl": (b'{"body": "a"}\n', "text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_document_is_refused_by_name(tmp_path, name):
    content, argument = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with refused(ml.BadInput, argument) as caught:
        ml.documents(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("prose", ["text, more text\nand more", "[text], (text)\n", "text\nof lines", '{"text": 1\n'])
def test_prose_stays_prose(tmp_path, prose):
    (tmp_path / "a.txt").write_text(prose)
    for text in ("text", "body"):
        assert [document["text"] for document in ml.documents(tmp_path / "a.txt", text=text)] == [prose]


def test_a_bad_line_is_named_among_blank_ones(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\nnot json\n')
    with refused(ml.BadInput, "source", 4):
        ml.documents(tmp_path / "a.jsonl")
    assert len(ml.documents(tmp_path / "a.jsonl", limit=2)) == 2  # no further than it is asked to


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"source": "no/such/file.csv"}, ("source", "no/such/file.csv")),
        ({"source": "nowhere"}, ("source", "nowhere")),
        ({"source": 7}, ("source", "int")),
        ({"source": []}, ("source",)),
        ({"source": ROWS, "columns": ["condition", "m"]}, ("columns", "m")),
        ({"source": ROWS, "text": "condition"}, ("columns", "text")),
        ({"source": ROWS, "limit": 0}, ("limit", 0)),
    ],
    ids=str,
)
def test_mistakes_are_named(asked, named):
    with refused(ml.BadInput, *named):
        ml.documents(**asked)


def test_the_hub_is_asked_for_names_alone(monkeypatch):
    asked = []

    def load(name, **how):
        asked.append((name, how))
        if name == "some/other":
            raise ConnectionError("no network")
        return DatasetDict(train=Dataset.from_list(ROWS))

    monkeypatch.setattr("datasets.load_dataset", load)
    assert ml.documents("some/data", limit=1) == ROWS[:1]
    assert asked == [("some/data", {"split": None, "streaming": True})]
    with refused(ml.BadInput, "source", "some/other"):
        ml.documents("some/other")
    for path in ("corpus", "data/corpus.jsonl", "../data", "/data/corpus"):
        with refused(ml.BadInput, "source", path):
            ml.documents(path)
    assert len(asked) == 2
