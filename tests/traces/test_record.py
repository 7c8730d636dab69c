"""record: documents to a trace, killed and resumed, in one process and in two."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.refusals import refused
from tiny import Letters, tiny_mixtral

from mixlens import BadInput, Recorder, RecordSettings, RunError, Site, Trace, record
from mixlens import open as open_run
from mixlens.trace.signals import SHARED_SITES, SITES

TEXTS = ["one", "two and more words", "a", "the fourth document is rather longer than the others " * 3, "five"]
DOCUMENTS = [{"text": text, "domain": "ab"[i % 2], "id": f"d{i}"} for i, text in enumerate(TEXTS)]
EVERYTHING = ("router_logits", "logprob", "top_logprobs", *(name for name in SITES if name not in SHARED_SITES))
QUIET = RecordSettings(progress=False)
SMALL = RecordSettings(shard_tokens=20, batch_tokens=40, progress=False)


def assert_equal_traces(a: Trace, b: Trace, atol: float = 2e-3) -> None:
    assert a.signals == b.signals
    assert a.n_tokens == b.n_tokens
    for name in a.signals:
        if name == "top_id" and atol > 0:
            continue  # ids of equal probability come in either order
        left, right = a.read(name).astype(float), b.read(name).astype(float)
        np.testing.assert_allclose(left, right, atol=0 if name in ("expert_id", "token_id") else atol, err_msg=name)
    for site in a.sites:
        np.testing.assert_allclose(a.activations(site), b.activations(site), atol=0.02, rtol=2e-3, err_msg=site)


@pytest.mark.parametrize("batch_tokens", [8, 64, 4096])
def test_batching_and_chunking_change_nothing(model, letters, batch_tokens):
    settings = RecordSettings(batch_tokens=batch_tokens, progress=False)
    trace = record(model, DOCUMENTS, tokenizer=letters, signals=EVERYTHING, settings=settings)
    rows = [torch.tensor(letters(text)["input_ids"]) for text in TEXTS]
    with torch.no_grad(), Recorder(model, signals=EVERYTHING) as recorder:
        for row in rows:
            model(row[None])
    alone = recorder.trace(trace.sequences[["document_id", "domain"]])
    assert_equal_traces(trace, alone)
    assert trace.sequences["document_id"].tolist() == ["d0", "d1", "d2", "d3", "d4"]


def test_disk_and_memory_hold_the_same(model, letters, tmp_path):
    in_memory = record(model, DOCUMENTS, tokenizer=letters, signals=EVERYTHING, settings=SMALL)
    on_disk = record(model, DOCUMENTS, tokenizer=letters, signals=EVERYTHING, settings=SMALL, out=tmp_path / "run")
    assert on_disk.meta["shards"] > 1
    assert_equal_traces(in_memory, on_disk, atol=0)
    pd.testing.assert_frame_equal(in_memory.sequences, on_disk.sequences, check_dtype=False, check_index_type=False)


def test_strings_and_datasets_are_documents_too(model, letters):
    from_dicts = record(model, DOCUMENTS, tokenizer=letters, settings=QUIET)
    from_dataset = record(model, Dataset.from_list(DOCUMENTS), tokenizer=letters, settings=QUIET)
    from_frame = record(model, pd.DataFrame(DOCUMENTS), tokenizer=letters, settings=QUIET)
    from_strings = record(model, TEXTS, tokenizer=letters, settings=QUIET)
    assert_equal_traces(from_dicts, from_dataset, atol=0)
    assert_equal_traces(from_dicts, from_frame, atol=0)
    assert_equal_traces(from_dicts, from_strings, atol=0)
    assert from_dataset.sequences["domain"].tolist() == ["a", "b", "a", "b", "a"]


def test_a_complete_run_is_opened_and_not_computed_again(model, letters, tmp_path):
    record(model, DOCUMENTS, tokenizer=letters, settings=QUIET, out=tmp_path / "run")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}
    record(model, DOCUMENTS, tokenizer=letters, settings=QUIET, out=tmp_path / "run")
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}


RUN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from tiny import Letters, tiny_mixtral
from test_record import DOCUMENTS, SMALL
import mixlens as ml

class Deadly(list):
    gone_through = 0
    def __iter__(self):
        Deadly.gone_through += 1
        for i, document in enumerate(list.__iter__(self)):
            if Deadly.gone_through == 2 and i == {fatal}:
                os.kill(os.getpid(), signal.SIGKILL)
            yield document

trace = ml.record(tiny_mixtral(), Deadly(DOCUMENTS), tokenizer=Letters(), out={out!r}, settings=SMALL)
if "WORLD_SIZE" in os.environ:
    share = trace.local()
    assert share.n_tokens < trace.n_tokens
    assert ml.stats.repetition(share, by="domain").equals(ml.stats.repetition(trace, by="domain"))
    assert ml.stats.expert_share(share).equals(ml.stats.expert_share(trace))
"""


def run_script(out: Path, *, fatal: int = -1, launcher: tuple[str, ...] = ()) -> int:
    script = out.parent / f"{out.name}.py"
    script.write_text(
        RUN.format(tests=str(Path(__file__).parent.parent), out=str(out), fatal=fatal).replace(
            "from test_record", f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_record"
        )
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, str(script)], env=environment, capture_output=True, timeout=300
    ).returncode


def contents(run: Path) -> dict[str, bytes]:
    """Bytes of every file, times in meta.json aside."""
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    meta = json.loads(files["meta.json"])
    del meta["created"], meta["reading"]["started"], meta["checksums"], meta["sha256"]
    return {**files, "meta.json": json.dumps(meta).encode()}


def test_a_killed_run_resumes_to_the_same_bytes(letters, tmp_path):
    """Killed in a process of its own; an interrupted one is among the ways of test_every_signal."""
    options = {"tokenizer": letters, "settings": SMALL}
    record(tiny_mixtral(), DOCUMENTS, out=tmp_path / "whole", **options)
    assert run_script(tmp_path / "killed", fatal=4) != 0
    left = {path.name for path in (tmp_path / "killed").rglob("*")}
    assert "shard-00000.json" in left
    assert "meta.json" not in left
    with pytest.raises(RunError):
        Trace.open(tmp_path / "killed")
    kept = (tmp_path / "killed" / "routing-00000.safetensors").stat().st_mtime_ns
    record(tiny_mixtral(), DOCUMENTS, out=tmp_path / "killed", **options)
    assert (tmp_path / "killed" / "routing-00000.safetensors").stat().st_mtime_ns == kept
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_write_the_run_of_one_and_add_their_statistics_up(tmp_path):
    assert run_script(tmp_path / "one") == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert run_script(tmp_path / "two", launcher=launcher) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_layers_on_cpu_and_disk_record_the_same(model, letters, tmp_path):
    from accelerate import dispatch_model

    model.save_pretrained(tmp_path / "model")
    expected = record(model, DOCUMENTS, tokenizer=letters, signals=EVERYTHING, settings=QUIET)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(len(model.model.layers))}
    split = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "offload")
    assert split.model.layers[1].mlp.experts.gate_up_proj.device.type == "meta"
    found = record(split, DOCUMENTS, tokenizer=letters, signals=EVERYTHING, settings=QUIET)
    assert_equal_traces(expected, found, atol=0)


def test_truncating_and_splitting_are_said_and_counted(model, letters, tmp_path):
    cut = RecordSettings(max_length=20, overlong="truncate", progress=False)
    trace = record(model, DOCUMENTS, tokenizer=letters, settings=cut, out=tmp_path / "cut")
    long = len(letters(TEXTS[3])["input_ids"])
    assert trace.meta["reading"]["truncated_documents"] == 1
    assert trace.meta["reading"]["truncated_tokens"] == long - 20
    split = RecordSettings(max_length=20, overlong="split", progress=False)
    trace = record(model, DOCUMENTS, tokenizer=letters, settings=split, out=tmp_path / "split")
    assert (trace.sequences["document_id"] == "d3").sum() == -(-long // 20)
    assert trace.sequences.loc[trace.sequences["document_id"] == "d3", "length"].sum() == long
    assert trace.meta["counts"]["documents"] == 5


@pytest.mark.parametrize(
    ("documents", "settings", "named"),
    [
        ([], QUIET, ("documents", 0)),
        ("one text", QUIET, ("documents", "str")),
        ([{"text": "a"}, {"text": 7}], QUIET, ("text", 1)),
        (["a", ""], QUIET, ("text", 1)),
        ([{"body": "a"}], QUIET, ("text", 0)),
        ([{"text": "a", "domain": "x"}, {"text": "b"}], QUIET, ("domain", 1)),
        ([{"text": "a", "id": 1}, {"text": "b", "id": 1}], QUIET, ("id", 1)),
        (
            [{"text": "a", "year": 1}, {"text": "b", "year": "two"}],
            QUIET,
            ("year", 1),
        ),
        ([{"text": "a", "id": 1}, {"text": "b", "id": "b"}], QUIET, ("id", 1)),
        ({"train": TEXTS}, QUIET, ("documents", "dict")),
        (["abc" * 500], QUIET, ("overlong", 1501)),
        (["a"], RecordSettings(max_length=1000), ("max_length", 1000)),
        (["a"], RecordSettings(overlong="drop"), ("overlong", "drop")),
        (["a"], RecordSettings(batch_tokens=0), ("batch_tokens", 0)),
    ],
)
def test_bad_documents_are_named(model, letters, documents, settings, named):
    with refused(BadInput, *named):
        record(model, documents, tokenizer=letters, settings=settings)


def test_columns_of_any_plain_value_come_back(model, letters, tmp_path):
    rows = [
        {"text": "a", "year": 1999, "score": None, "tags": ["x", "y"]},
        {"text": "b", "year": 2001.5, "score": 0.5, "tags": None},
        {"text": "c", "year": 7, "score": 1, "tags": {"k": 1}},
    ]
    settings = RecordSettings(shard_tokens=1, progress=False)
    trace = record(model, rows, tokenizer=letters, settings=settings, out=tmp_path / "run")
    assert trace.meta["shards"] == 3
    assert trace.sequences["year"].tolist() == [1999, 2001.5, 7]
    assert trace.sequences["score"].isna().tolist() == [True, False, False]
    assert trace.sequences["tags"].tolist()[::2] == ['["x", "y"]', '{"k": 1}']


def test_columns_keep_their_types_and_values(model, letters, tmp_path):
    columns = {
        "date": [datetime.date(2020, 2, 29), None, datetime.date(1, 1, 1)],
        "moment": [datetime.datetime(2020, 1, 1, 12, tzinfo=datetime.UTC), None, None],
        "clock": [datetime.time(23, 59), None, None],
        "price": [decimal.Decimal("1.10"), decimal.Decimal("2.00"), None],
        "raw": [b"\x00\xff", None, b""],
        "whole": [2**63 - 1, None, -(2**63)],
        "scalar": [torch.tensor(3), np.int64(4), 5],
        "row": [torch.tensor([1, 2]), np.arange(2), [1]],
    }
    rows = [{"text": "a", **{name: values[i] for name, values in columns.items()}} for i in range(3)]
    plain = columns | {"scalar": [3, 4, 5], "row": ["[1, 2]", "[0, 1]", "[1]"]}
    for settings in (QUIET, RecordSettings(shard_tokens=1, progress=False)):
        out = tmp_path / str(settings.shard_tokens)
        for trace in (record(model, rows, tokenizer=letters, settings=settings, out=out), open_run(out)):
            for name, values in plain.items():
                found = [None if pd.isna(value) else value for value in trace.sequences[name]]
                assert found == values, name
                if name in ("date", "clock", "price", "raw"):
                    assert [type(value) for value in found] == [type(value) for value in values], name


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**70])
def test_whole_numbers_that_no_table_holds_are_refused(model, letters, value):
    with refused(BadInput, "big", 1):
        record(model, [{"text": "a", "big": 1}, {"text": "b", "big": value}], tokenizer=letters, settings=QUIET)


def test_a_model_of_no_known_place_needs_its_tokenizer_named(model):
    with refused(BadInput, "tokenizer", "the model"):
        record(model, TEXTS, settings=QUIET)


def test_a_document_that_fails_late_keeps_the_shards_before_it(model, letters, tmp_path):
    documents = [*DOCUMENTS, {"text": "x" * 600, "domain": "a", "id": "long"}]
    with refused(BadInput, "overlong", 601):
        record(model, documents, tokenizer=letters, settings=SMALL, out=tmp_path / "run")
    assert (tmp_path / "run" / "unfinished" / "shard-00000.json").exists()


def test_another_run_in_the_folder_is_left_alone(model, letters, tmp_path):
    record(model, DOCUMENTS, tokenizer=letters, settings=QUIET, out=tmp_path / "run")
    with refused(RunError, "out", ["documents", "input_sha256"]):
        record(model, DOCUMENTS[:4], tokenizer=letters, settings=QUIET, out=tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with refused(RunError, "out", ["thesis.tex"]):
        record(model, DOCUMENTS, tokenizer=letters, settings=QUIET, out=tmp_path / "mine")


def test_a_folder_that_cannot_be_made_is_an_error_of_ours(model, letters, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with refused(RunError, "path", str(tmp_path / "file" / "run")):
        record(model, DOCUMENTS, tokenizer=letters, settings=QUIET, out=tmp_path / "file" / "run")


FULL_DISK = """
import resource, signal, sys
sys.path[:0] = [{tests!r}, {here!r}]
from tiny import Letters, tiny_mixtral
from test_record import DOCUMENTS, SMALL
import mixlens as ml
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model, limit = tiny_mixtral(), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit))
try:
    ml.record(model, DOCUMENTS, tokenizer=Letters(), out={out!r}, settings=SMALL, signals=["router_logits"])
except ml.RunError as error:
    print(error.argument, error.value)
"""


def test_a_disk_that_takes_no_more_leaves_what_was_complete(letters, tmp_path):
    here = Path(__file__).parent
    script = FULL_DISK.format(tests=str(here.parent), here=str(here), out=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["path", str(tmp_path / "run")], done.stderr
    names = {path.relative_to(tmp_path / "run").as_posix() for path in (tmp_path / "run").rglob("*")}
    assert "unfinished/shard-00000.json" in names
    assert not [name for name in names if name.endswith(".partial")]
    trace = record(
        tiny_mixtral(), DOCUMENTS, tokenizer=letters, out=tmp_path / "run", settings=SMALL, signals=["router_logits"]
    )
    assert trace.n_tokens == sum(len(letters(t)["input_ids"]) for t in TEXTS)


def test_an_altered_shard_is_named(model, letters, tmp_path):
    trace = record(model, DOCUMENTS, tokenizer=letters, settings=SMALL, out=tmp_path / "run")
    victim = tmp_path / "run" / "routing-00001.safetensors"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with refused(RunError, "routing-00001.safetensors", len(whole)):
        Trace.open(trace.path).read("expert_id")
    victim.write_bytes(whole[:-10])
    with refused(RunError, "routing-00001.safetensors", len(whole) - 10):
        Trace.open(trace.path).read("expert_id")
    victim.unlink()
    with refused(RunError, "routing-00001.safetensors", None):
        Trace.open(trace.path).read("expert_id")


def test_bytes_on_disk_for_the_shape_of_8x7b(tmp_path):
    rng = np.random.default_rng(0)
    tokens, layers = 20_000, 32
    weight = rng.uniform(0.5, 1, (tokens, layers, 1))
    first = rng.integers(0, 8, (tokens, layers))
    ids = np.stack([first, (first + rng.integers(1, 8, first.shape)) % 8], axis=-1)
    trace = Trace.from_arrays(ids, n_experts=8, weight=np.concatenate([weight, 1 - weight], -1))
    trace.save(tmp_path / "run")
    routing = sum(path.stat().st_size for path in (tmp_path / "run").glob("routing-*"))
    assert routing / tokens < 130


def test_the_signals_are_those_that_were_asked_for(model, letters):
    bare = record(model, DOCUMENTS, tokenizer=letters, signals=(), settings=QUIET)
    assert bare.signals == ("sequence", "position", "token_id", "phase", "expert_id", "weight")
    one = record(model, DOCUMENTS, tokenizer=letters, signals=[Site("moe_out", layers=(2,))], settings=QUIET)
    assert one.sites == {"moe_out": (2,)}


def test_an_interrupt_says_how_to_go_on(model, tmp_path, capsys):
    class Interrupting(Letters):
        calls = 0

        def __call__(self, text: str) -> dict[str, list[int]]:
            Interrupting.calls += 1
            if Interrupting.calls == 4:
                signal.raise_signal(signal.SIGINT)
            return super().__call__(text)

    with pytest.raises(KeyboardInterrupt):
        record(model, DOCUMENTS, tokenizer=Interrupting(), out=tmp_path / "run", settings=SMALL)
    shown = capsys.readouterr().err.replace(str(tmp_path / "run"), "RUN")
    complete = len(list((tmp_path / "run" / "unfinished").glob("shard-*.json")))
    assert re.search(rf"\b{complete} .*RUN", shown)


def test_a_start_that_failed_leaves_nothing_behind(letters, tmp_path):
    model = tiny_mixtral()
    settings = RecordSettings(progress=False, max_length=8, shard_tokens=4)
    for out in (tmp_path / "new" / "run", tmp_path):
        with refused(BadInput, "overlong", 10):
            record(model, ["too long."], out=out, tokenizer=letters, settings=settings)
        assert not list(tmp_path.iterdir())
    with refused(BadInput, "overlong", 10):
        record(model, ["short", "too long."], out=tmp_path / "run", tokenizer=letters, settings=settings)
    assert (tmp_path / "run" / "unfinished" / "shard-00000.json").exists()  # what is complete is kept
