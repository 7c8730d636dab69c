"""Routing in files: what is written is read back without mixlens, and what others wrote is read in pieces."""

import base64
import io
import json

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.refusals import refused
from helpers.routing_server import FORMS
from safetensors import safe_open
from safetensors.numpy import save_file

import mixlens as ml
from mixlens.engines import columns

QUIET = ml.RecordSettings(progress=False, max_length=50, overlong="truncate")
ROUTING = ("expert_id", "weight", "token_id", "position", "phase", "sequence")


@pytest.fixture(scope="module")
def trace(demo):
    documents = [{"id": f"d{n}", "text": d["text"]} for n, d in enumerate(ml.demo_documents()[:5])]
    return ml.record(demo, documents, settings=QUIET)


def unpacked(text):
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def alike(one, other, names=ROUTING):
    for name in names:
        assert np.allclose(one.read(name), other.read(name), atol=2e-3), name
    assert one.sequences["document_id"].tolist() == other.sequences["document_id"].tolist()


def test_safetensors_are_read_without_mixlens_and_back(trace, tmp_path):
    path = trace.export(tmp_path / "trace.safetensors", format="safetensors")
    with safe_open(path, framework="numpy") as file:
        assert np.array_equal(file.get_tensor("expert_id"), trace.read("expert_id"))
        assert np.array_equal(file.get_tensor("router_logits"), trace.read("router_logits"))
        assert json.loads(file.metadata()["document_id"]) == ["d0", "d1", "d2", "d3", "d4"]
    back = ml.open(path, format="safetensors")
    alike(back, trace)
    share, own = (ml.stats.expert_share(one) for one in (back, trace))
    assert np.allclose(share["ci_low"], own["ci_low"])
    assert back.meta["not_known"] == ["text"]


def test_npy_is_read_without_mixlens_and_back(trace, tmp_path):
    folder = trace.export(tmp_path / "arrays", format="npy")
    assert np.array_equal(np.load(folder / "expert_id.npy"), trace.read("expert_id"))
    assert json.loads(json.loads((folder / "about.json").read_text())["n_experts"]) == 8
    alike(ml.open(folder, format="npy"), trace)


def test_parquet_is_read_without_mixlens_and_back(trace, tmp_path):
    path = trace.export(tmp_path / "trace.parquet", format="parquet")
    counts = duckdb.sql(f"SELECT expert_id, count(*) FROM '{path}' WHERE layer = 3 GROUP BY 1 ORDER BY 1").fetchall()
    assert [n for _, n in counts] == np.bincount(trace.read("expert_id")[:, 3].ravel(), minlength=8).tolist()
    alike(ml.open(path, format="parquet"), trace)


def test_the_form_of_trainers_is_read_without_mixlens_and_back(trace, tmp_path, demo):
    path = trace.export(tmp_path / "replay.jsonl", format="routed_experts")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert np.array_equal(np.concatenate([unpacked(line["routed_experts"]) for line in lines]), trace.read("expert_id"))
    assert np.array_equal(np.concatenate([unpacked(line["routed_weights"]) for line in lines]), trace.read("weight"))
    assert np.array_equal(np.concatenate([line["prompt_token_ids"] for line in lines]), trace.read("token_id"))
    back = ml.open(path, format="routed_experts", model="demo")
    alike(back, trace)
    with ml.edit(demo, ml.edits.replay(back, weights=True)):  # as a trainer replays it
        again = ml.record(demo, [d["text"] for d in ml.demo_documents()[:5]], settings=QUIET)
    assert np.array_equal(np.sort(again.read("expert_id"), -1), np.sort(trace.read("expert_id"), -1))


@pytest.mark.parametrize("form", FORMS)
def test_answers_of_servers_that_were_kept(form, trace, tmp_path):
    lines = []
    for number in trace.sequences.index:
        one = trace.select(where={"document_id": f"d{number}"})
        tokens, ids = one.read("token_id").tolist(), one.read("expert_id")
        answer = FORMS[form](ids[:-1], tokens[:30], tokens[30:])
        usage = {"prompt_tokens": 30, "completion_tokens": len(tokens) - 30}
        lines.append(json.dumps({"id": f"d{number}", **answer, "usage": usage}))
    (tmp_path / "answers.jsonl").write_text("\n".join(lines))
    back = ml.open(tmp_path / "answers.jsonl", format=form.partition("_")[0], model="demo")
    kept = trace.select(positions=(0, 49))
    assert np.array_equal(back.read("expert_id"), kept.read("expert_id"))
    assert back.select(phase="generated").n_tokens == 5 * 19
    assert ("token_id" in back.signals) == form.startswith("vllm")


@pytest.fixture
def flame(trace, tmp_path):
    """A checkpoint in the layout of FLAME-MoE-Traces, in several files and row groups."""
    ids, weight, tokens = (trace.read(name) for name in ("expert_id", "weight", "token_id"))
    folder = tmp_path / "flame-moe-tiny"
    (folder / "samples").mkdir(parents=True)
    for number, some in enumerate(np.array_split(tokens, 3)):
        pq.write_table(pa.table({"token_id": some.astype(np.int32)}), folder / f"samples/{number:03d}.parquet")
    for iteration, shift in ((540, 1), (5473, 0)):
        (folder / f"actives/iter_{iteration:04d}").mkdir(parents=True)
        for layer in range(8):
            table = pa.table(
                {
                    "scores": pa.array(list(weight[:, layer].astype(np.float16)), pa.list_(pa.float16())),
                    "indices": pa.array(list((ids[:, layer] + shift).astype(np.int16)), pa.list_(pa.int16())),
                }
            )
            pq.write_table(
                table, folder / f"actives/iter_{iteration:04d}/layer_{layer + 2:02d}.parquet", row_group_size=64
            )
    return folder


def test_flame_is_read_in_pieces_and_has_no_intervals_without_a_cluster(flame, trace, monkeypatch):
    monkeypatch.setattr(columns, "_PART", 100)
    found = ml.open(flame, format="flame", tokens_a_sequence=40)
    assert found.layers.tolist() == list(range(1, 9))
    for name in ("expert_id", "token_id"):
        assert np.array_equal(found.read(name), trace.read(name)), name
    assert np.allclose(found.read("weight"), trace.read("weight"), atol=1e-3)
    assert found.read("position").max() == 39
    share = ml.stats.expert_share(found)
    assert np.isnan(share["ci_low"]).all()
    assert np.isfinite(ml.stats.expert_share(found, cluster="window")["ci_low"]).all()
    assert "documents" in found.meta["not_known"]
    earlier = ml.open(flame, format="flame", iteration=540)
    assert np.array_equal(earlier.read("expert_id"), trace.read("expert_id") + 1)


def test_plain_arrays_need_the_number_of_experts_and_are_checked(trace, tmp_path):
    ids = trace.read("expert_id")
    np.save(tmp_path / "ids.npy", ids)
    with refused(ml.BadInput, "n_experts", None):
        ml.open(tmp_path / "ids.npy", format="npy")
    bare = ml.open(tmp_path / "ids.npy", format="npy", n_experts=8, tokens_a_sequence=50)
    assert np.array_equal(bare.read("expert_id"), ids)
    with refused(ml.MissingSignal, "router_logits"):
        ml.stats.routing_entropy(bare)
    for spoilt, name in ((np.where(ids == 3, 9, ids), "physical_ids"), (0 * ids, "duplicates")):
        save_file({"expert_id": spoilt}, tmp_path / "spoilt.safetensors")
        with refused(ml.SourceError, name):
            ml.open(tmp_path / "spoilt.safetensors", format="safetensors", n_experts=8)


@pytest.mark.parametrize(
    ("content", "format", "known", "error", "argument"),
    [
        (b"", "gguf", {}, ml.BadInput, "format"),
        (b"nonsense", "safetensors", {"n_experts": 8}, ml.SourceError, "path"),
        (b"nonsense", "parquet", {"n_experts": 8}, ml.SourceError, "path"),
        (b"nonsense", "npy", {"n_experts": 8}, ml.SourceError, "path"),
        (b"nonsense", "vllm", {"model": "demo"}, ml.SourceError, "path"),
        (b"{}", "vllm", {}, ml.BadInput, "model"),
        (b"{}", "sglang", {"model": "demo"}, ml.SourceError, "routing"),
        (b"", "flame", {}, ml.BadInput, "path"),
        (b"", "npy", {"model": "demo"}, ml.BadInput, "model"),
        (b"", None, {"n_experts": 8}, ml.BadInput, "n_experts"),
        (b'{"choices": [{"routed_experts": "????"}]}', "vllm", {"model": "demo"}, ml.SourceError, "shape"),
    ],
)
def test_files_that_are_no_routing_are_refused_by_name(content, format, known, error, argument, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(error) as caught:
        ml.open(tmp_path / "file", format=format, **known)
    assert caught.value.argument == argument


STRANGE = {
    "numbers": lambda ids: ids.astype(float),
    "truths": lambda ids: ids > 3,
    "two axes": lambda ids: ids[:, 0],
    "no axis": lambda ids: np.array(5),
    "no tokens": lambda ids: ids[:0],
    "no layers": lambda ids: ids[:, :0],
    "few tokens": lambda ids: ids[:3],
    "negative": lambda ids: -ids.astype(int),
    "large": lambda ids: ids.astype(np.int64) + 2**40,
    "not a number": lambda ids: np.full(len(ids), np.nan),
    "infinite": lambda ids: np.full(ids.shape, np.inf),
    "text": lambda ids: ids.astype("U3"),
    "dates": lambda ids: ids.astype("M8[s]"),
}
HEADERS = [b"", b"5", b"[]", b"\xff", b"[" * 100_000] + [
    json.dumps({name: text}).encode()
    for name in ("n_experts", "layers", "document_id", "model")
    for text in (8, "x", "5", "[1]", "[NaN, 1]", "[-5, 99999999999999999999]", "[[" * 50_000, "{}", "true", "1e999")
]


def read_or_refused(path, format, **known):
    """Everything in a file, or an error of mixlens; True where it was read."""
    try:
        found = ml.open(path, format=format, **known)
        for name in found.signals:
            assert len(found.read(name)) == found.n_tokens
        assert np.isfinite(ml.stats.expert_share(found)["estimate"]).all()
        assert repr(found)
    except ml.MixlensError:
        return False
    return True


def test_whatever_the_columns_of_a_file_are_it_is_read_or_refused(trace, tmp_path):
    ids, read = np.ascontiguousarray(trace.read("expert_id")[:40]), 0
    for column in ("expert_id", "weight", "router_logits", "token_id", "sequence", "position", "phase", "logprob"):
        for make in STRANGE.values():
            arrays = {"expert_id": ids, column: np.ascontiguousarray(make(ids))}
            for name, array in arrays.items():
                np.save(tmp_path / f"{name}.npy", array)
            read += read_or_refused(tmp_path, "npy", n_experts=8)
            (tmp_path / f"{column}.npy").unlink()
            rows = {name: array.tolist() for name, array in arrays.items()}
            if all(isinstance(row, list) and len(row) == len(ids) for row in rows.values()):
                pq.write_table(pa.table(rows), tmp_path / "table.parquet")
                read += read_or_refused(tmp_path / "table.parquet", "parquet", n_experts=8)
    assert 0 < read < 30


def test_whatever_a_file_says_of_itself_it_is_read_or_refused(trace, tmp_path):
    np.save(tmp_path / "expert_id.npy", trace.read("expert_id"))
    (tmp_path / "about.json").write_text('{"n_experts": "8"}')
    assert read_or_refused(tmp_path, "npy")
    for about in HEADERS:
        (tmp_path / "about.json").write_bytes(about)
        read_or_refused(tmp_path, "npy")
    for known in (
        {"n_experts": True},
        {"n_experts": 10**30},
        {"layers": 5},
        {"layers": "ab"},
        {"tokens_a_sequence": 0},
    ):
        assert not read_or_refused(tmp_path / "expert_id.npy", "npy", **{"n_experts": 8, **known})


@pytest.mark.parametrize("format", ["npy", "safetensors", "parquet", "routed_experts"])
def test_wherever_a_file_is_damaged_it_is_read_or_refused(format, trace, tmp_path):
    path = tmp_path / "whole"
    trace.select(positions=(0, 5)).export(path, format=format)
    path = path / "expert_id.npy" if path.is_dir() else path
    whole, draw = path.read_bytes(), np.random.default_rng(0)
    known = {"model": "demo"} if format == "routed_experts" else {"n_experts": 8}
    assert read_or_refused(path, format, **known)
    ends = [*range(0, 160, 9), *(len(whole) - 1 - at for at in range(0, 300, 13))]
    for at in [*ends, *draw.integers(len(whole), size=15).tolist()]:
        for bad in (whole[:at], whole[:at] + b"\xff" * 8 + whole[at + 8 :], whole[:at] + b"(" + whole[at:]):
            path.write_bytes(bad)
            read_or_refused(path, format, **known)


def test_a_format_that_is_not_there_is_refused(trace, tmp_path):
    with refused(ml.BadInput, "format", "pickle"):
        trace.export(tmp_path / "trace", format="pickle")
