"""Trace: built from arrays, selected, joined, saved, opened, and read without mixlens."""

from __future__ import annotations

import re

import duckdb
import numpy as np
import pandas as pd
import pytest
from helpers.inside import from_parts
from helpers.refusals import refused

from mixlens import BadInput, MissingSignal, RunError, Trace, concat
from mixlens.trace.detokenize import display_pieces
from mixlens.trace.shards import widened

LENGTHS = [4, 1, 7, 30, 2]
SEQUENCES = pd.DataFrame({"document_id": ["a", "b", "b", "c", "d"], "domain": ["x", "y", "y", "x", "y"]})


def make(lengths=LENGTHS, sequences=SEQUENCES, seed=0, layers=3, experts=8, top_k=2) -> Trace:
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    logits = rng.normal(size=(n, layers, experts)).astype(np.float32)
    ids = np.argsort(-logits, -1)[..., :top_k]
    weight = np.exp(np.take_along_axis(logits, ids, -1))
    tokens = {
        "sequence": np.repeat(np.arange(len(lengths)), lengths),
        "token_id": rng.integers(0, 20, n),
        "phase": rng.integers(0, 2, n),
        "logprob": np.where(np.isin(np.arange(n), np.cumsum([0, *lengths])), np.nan, rng.normal(size=n)),
    }
    weight /= weight.sum(-1, keepdims=True)
    return Trace.from_arrays(
        ids, n_experts=experts, weight=weight, router_logits=logits, tokens=tokens, sequences=sequences
    )


def assert_equal(a: Trace, b: Trace) -> None:
    assert a.signals == b.signals
    for name in a.signals:
        np.testing.assert_array_equal(a.read(name), b.read(name), err_msg=name)
        assert a.read(name).dtype == b.read(name).dtype
    pd.testing.assert_frame_equal(a.sequences, b.sequences, check_index_type=False)


def test_arrays_of_some_layers_keep_their_numbers(tmp_path):
    ids = np.random.default_rng(0).integers(0, 8, (9, 3, 1))
    given = Trace.from_arrays(ids, n_experts=8, layers=[2, 15, 31])
    given.save(tmp_path / "run")
    for trace in (given, Trace.open(tmp_path / "run")):
        assert trace.layers.tolist() == [2, 15, 31]
        np.testing.assert_array_equal(trace.select(layers=[15]).read("expert_id")[:, 0], ids[:, 1])
    for wrong in ([0, 1], [3, 2, 9], [-1, 0, 1], [0.5, 1.0, 2.0]):
        with refused(BadInput, "layers", wrong):
            Trace.from_arrays(ids, n_experts=8, layers=wrong)


def test_positions_count_within_each_sequence():
    np.testing.assert_array_equal(make().read("position"), np.concatenate([np.arange(n) for n in LENGTHS]))


def test_weights_come_back_within_half_precision():
    rng = np.random.default_rng(1)
    weight = rng.dirichlet(np.ones(3), size=(50, 4))
    ids = rng.permuted(np.tile(np.arange(8), (50, 4, 1)), axis=-1)[..., :3]
    found = Trace.from_arrays(ids, n_experts=8, weight=weight).read("weight")
    np.testing.assert_allclose(found, weight, atol=1e-3)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)
    unnormalised = weight * 0.5
    np.testing.assert_allclose(
        Trace.from_arrays(ids, n_experts=8, weight=unnormalised).read("weight"), unnormalised, atol=1e-3
    )


def test_every_number_of_half_precision_is_widened_to_itself():
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = half[np.isfinite(half)]
    for values in (half, finite, finite[::3], finite[:60_000].reshape(100, 6, 100)[:, ::2, ::-1], finite[:0]):
        np.testing.assert_array_equal(widened(values, np.float32), values.astype(np.float32), strict=True)
    zeros = widened(np.array([0.0, -0.0], np.float16), np.float32)
    assert np.signbit(zeros).tolist() == [False, True]


@pytest.mark.parametrize("tokens", [1, 5, 1000])
def test_blocks_never_split_a_sequence_and_keep_the_order(tokens):
    trace = make()
    blocks = list(trace.blocks("sequence", "expert_id", tokens=tokens))
    np.testing.assert_array_equal(np.concatenate([b["expert_id"] for b in blocks]), trace.read("expert_id"))
    owners = [set(b["sequence"].tolist()) for b in blocks]
    assert sum(map(len, owners)) == len(LENGTHS)
    assert all(len(b["sequence"]) <= max(tokens, max(LENGTHS)) for b in blocks)


def test_saved_and_opened_it_is_the_same(tmp_path):
    trace = make()
    assert_equal(trace, trace.save(tmp_path / "run"))
    assert_equal(trace, Trace.open(tmp_path / "run"))
    assert trace.save(tmp_path / "run").n_tokens == trace.n_tokens  # the same again: nothing to do
    with refused(RunError, "out", ["input_sha256"]):
        make(seed=1).save(tmp_path / "run")


def test_selection_is_what_a_boolean_mask_over_everything_gives(tmp_path):
    for trace in (make(), make().save(tmp_path / "run")):
        view = trace.select(
            where={"domain": "x"}, layers=[2, 0], phase="generated", tokens=range(10), positions=(1, 20)
        )
        owner, position = trace.read("sequence"), trace.read("position")
        mask = np.isin(owner, [0, 3]) & (trace.read("phase") == 1) & (trace.read("token_id") < 10)
        mask &= (position >= 1) & (position < 20)
        assert 0 < mask.sum() < trace.n_tokens
        assert view.n_tokens == mask.sum()
        for name in ("expert_id", "weight", "router_logits"):
            np.testing.assert_array_equal(view.read(name), trace.read(name)[mask][:, [2, 0]])
        np.testing.assert_array_equal(view.read("sequence"), owner[mask])
        assert view.layers.tolist() == [2, 0]
        again = view.select(layers=0)
        np.testing.assert_array_equal(again.read("expert_id"), trace.read("expert_id")[mask][:, [0]])


def test_a_selection_can_be_saved(tmp_path):
    view = make().select(where=SEQUENCES["domain"] == "y", layers=[1])
    saved = view.save(tmp_path / "run")
    assert saved.sequences["document_id"].tolist() == ["b", "b", "d"]
    np.testing.assert_array_equal(saved.read("expert_id"), view.read("expert_id"))


def test_joined_traces_keep_documents_and_renumber_sequences():
    a, b = make(), make(seed=1)
    joined = concat([a.select(where={"domain": "y"}), b])
    assert joined.n_tokens == 10 + sum(LENGTHS)
    np.testing.assert_array_equal(
        joined.read("expert_id"),
        np.concatenate([a.select(where={"domain": "y"}).read("expert_id"), b.read("expert_id")]),
    )
    assert joined.sequences["document_id"].tolist() == ["b", "b", "d", *SEQUENCES["document_id"]]
    assert set(joined.read("sequence")) == set(joined.sequences.index)
    with refused(BadInput, "traces", 1):
        concat([a, make(layers=2)])


def test_other_forms_say_the_same(tmp_path):
    trace = make()
    table = trace.to_pandas()
    assert len(table) == trace.n_tokens * 3 * 2
    row = table.iloc[17]
    token, layer, slot = np.unravel_index(17, (trace.n_tokens, 3, 2))
    assert row["expert_id"] == trace.read("expert_id")[token, layer, slot]
    assert (row["layer"], row["slot"], row["token_id"]) == (layer, slot, trace.read("token_id")[token])
    of_token = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[token]
    assert (row["document_id"], row["domain"]) == tuple(SEQUENCES[["document_id", "domain"]].iloc[of_token])
    assert row["text"] == trace.pieces(trace.read("token_id")[token : token + 1])[0]
    data = trace.to_xarray()
    assert data["expert_id"].dims == ("token", "layer", "slot")
    assert data["domain"].values.tolist() == SEQUENCES["domain"].repeat(LENGTHS).tolist()
    path = trace.to_parquet(tmp_path / "long.parquet")
    counted = duckdb.sql(f"select layer, count(*) from '{path}' where expert_id = 3 group by layer order by layer")
    assert counted.fetchall() == [(i, int((trace.read("expert_id")[:, i] == 3).sum())) for i in range(3)]


def test_a_long_file_has_the_columns_of_the_caller_whatever_they_are_called(tmp_path):
    trace = make()
    trace.sequences["text"] = ["mine"] + [None] * (len(LENGTHS) - 1)
    trace.sequences["size"] = pd.array([None] * (len(LENGTHS) - 1) + [7], "Int64")
    table = pd.read_parquet(trace.to_parquet(tmp_path / "long.parquet"))
    own = table.groupby("sequence").first()
    [renamed] = [name for name in table if name.endswith("text") and name != "text"]
    assert own[renamed].dropna().tolist() == ["mine"]
    assert own["size"].dropna().tolist() == [7]


def test_run_files_are_read_without_mixlens(tmp_path):
    from safetensors.numpy import load_file

    trace = make().save(tmp_path / "run")
    tokens = duckdb.sql(f"select token_id, phase from '{tmp_path}/run/tokens-*.parquet'").df()
    np.testing.assert_array_equal(tokens["token_id"], trace.read("token_id"))
    joined = duckdb.sql(
        f"select domain, count(*) n from '{tmp_path}/run/tokens-*.parquet' join '{tmp_path}/run/sequences.parquet' "
        "using (sequence) group by domain order by domain"
    ).fetchall()
    assert joined == [("x", 34), ("y", 10)]
    averages = duckdb.sql(f"select avg(logprob), count(logprob) from '{tmp_path}/run/tokens-*.parquet'").fetchall()
    known = trace.read("logprob")[~np.isnan(trace.read("logprob"))]
    assert averages == [(pytest.approx(known.mean(dtype=float)), len(known))]
    assert 0 < len(known) < trace.n_tokens
    routing = load_file(tmp_path / "run" / "routing-00000.safetensors")
    assert routing["expert_id"].dtype == np.uint8
    assert routing["weight"].shape == (sum(LENGTHS), 3, 1)


def test_a_missing_signal_says_what_there_is_and_how_to_get_it():
    bare = Trace.from_arrays(np.zeros((3, 2, 1), int), n_experts=8, meta={"source": "a vLLM server"})
    with refused(MissingSignal, "router_logits", "routing_entropy"):
        bare.require("routing_entropy", "router_logits")
    with refused(MissingSignal, "site", "moe_out"):
        bare.activations("moe_out")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"expert_id": np.zeros((3, 2))}, ("expert_id", (3, 2))),
        ({"expert_id": np.full((3, 2, 2), 8)}, ("n_experts", 8)),
        ({"expert_id": np.zeros((3, 2, 2), int), "weight": np.zeros((3, 2))}, ("weight", (3, 2))),
        ({"expert_id": np.zeros((3, 2, 2), int), "tokens": {"sequence": [1, 0, 2]}}, ("sequence",)),
        ({"expert_id": np.zeros((3, 2, 2), int), "tokens": {"word": [1, 0, 2]}}, ("tokens", "word")),
        ({"expert_id": np.zeros((3, 2, 2), int), "sequences": SEQUENCES}, ("sequences", 5)),
        ({"expert_id": np.zeros((3, 2, 2), int), "sequences": ["a"]}, ("sequences", "list")),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arguments, named):
    with refused(BadInput, *named):
        Trace.from_arrays(n_experts=8, **arguments)


def test_selections_that_cannot_be_made_say_why():
    with refused(BadInput, "where", "topic"):
        make().select(where={"topic": "x"})
    with refused(BadInput, "where", "xy"):
        make().select(where={"domain": ["x", "xy"]})
    with refused(BadInput, "layers", [5]):
        make().select(layers=[5])
    with refused(BadInput, "layers", [2]) as caught:
        make(layers=5).select(layers=[0, 1, 3]).select(layers=[2])
    assert "0, 1, 3" in str(caught.value)
    with refused(BadInput, "phase", "answer"):
        make().select(phase="answer")


def test_opening_what_is_no_run(tmp_path):
    with refused(RunError, "path", str(tmp_path / "nowhere")):
        Trace.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with refused(RunError, "path", str(tmp_path / "empty")):
        Trace.open(tmp_path / "empty")


def test_an_empty_selection_reads_as_empty_columns():
    empty = make().select(tokens=[999])
    assert empty.n_tokens == 0
    assert empty.read("expert_id").shape == (0, 3, 2)


def test_a_process_without_a_part_reads_empty_columns_of_the_same_shapes():
    whole = make()
    none = from_parts([], whole.sequences[:0], whole.meta | {"signals": list(whole.signals)}, whole.layers)
    assert (none.n_tokens, none.signals) == (0, whole.signals)
    for name in whole.signals:
        found, wanted = none.read(name), whole.read(name)
        assert (found.shape, found.dtype) == ((0, *wanted.shape[1:]), wanted.dtype), name


def test_display_rich_and_plain_are_escaped():
    trace = Trace.from_arrays(
        np.zeros((1, 2, 1), int), n_experts=8, sequences=pd.DataFrame({"document_id": ["<script>alert(1)</script>"]})
    )
    assert "<script>alert" not in trace._repr_html_()
    assert re.findall(r"\d+", repr(trace)) == ["1", "1", "2", "1", "8"]


def test_pieces_show_bytes_as_the_character_they_make():
    pieces = ["▁the", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0xE2>", "a", "</s>"]
    vocabulary = pd.Series(pieces)
    shown = display_pieces([*range(8), 99], vocabulary)
    assert shown == [" the", "", "", "", "😀", "⟨E2⟩", "a", "</s>", "#99"]
    assert display_pieces([5], None) == ["#5"]
