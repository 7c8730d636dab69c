"""What the views other than the token view carry, against the data they were made from."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from helpers.refusals import refused
from show_samples import HOSTILE, N_EXPERTS, emptied_trace, make_trace
from unpacking import unpack

from mixlens import stats, view
from mixlens.bench.bench import Bench
from mixlens.bench.events import Record
from mixlens.errors import BadInput
from mixlens.evals.log import Log
from mixlens.stats.pareto import COLUMNS, Pareto
from mixlens.trace.trace import Trace

FEW = stats.Bootstrap(replicates=50)


@pytest.fixture(scope="module")
def together(trace) -> xr.Dataset:
    return stats.coactivation(trace, bootstrap=FEW)


@pytest.fixture(scope="module")
def moves(trace) -> list[xr.Dataset]:
    return [stats.transitions(trace, gap=gap, bootstrap=FEW) for gap in (1, 3)]


@pytest.fixture(scope="module")
def changed(trace) -> Trace:
    """The trace with every fifth token's choices swapped at layer 2."""
    ids = trace.read("expert_id").copy()
    ids[::5, 2] = ids[::5, 2, ::-1]
    tokens = {name: trace.read(name) for name in ("sequence", "token_id")}
    return Trace.from_arrays(
        ids, n_experts=N_EXPERTS, tokens=tokens, sequences=trace.sequences[["document_id", "domain"]]
    )


def log_of(n: int, text: str = "Which?") -> Log:
    records = [
        {
            "task": "quiz",
            "sample_id": i,
            "doc_hash": str(i),
            "group": None,
            "prompt": text,
            "target": "B",
            "response": "AB"[i % 2],
            "responses": None,
            "choices": ["A", "B"],
            "logprobs": [-1.0, -2.0],
            "gold": 1,
            "metrics": {"acc": [0.0, 1.0, None][i % 3]},
            "correct": [0.0, 1.0, None][i % 3],
        }
        for i in range(n)
    ]
    about = {
        "benchmark": "quiz",
        "protocol": "p",
        "metrics": {"acc": {"aggregation": "mean"}},
        "primary": "acc",
        "data": {},
    }
    meta = {"model": {"name": "sample"}, "tasks": {"quiz": about}}
    return Log(records, meta | {"created": "today", "versions": {}, "settings": {}})


def test_share_by_domain_layer_and_expert(share):
    header, arrays = unpack(view.share_heatmap(share.assign_attrs(top_k=2, slot="any")).packed)
    np.testing.assert_allclose(arrays["estimate"], share["estimate"], rtol=1e-6)
    assert header["panels"] == ["arxiv", "github", "mathematics", "wikipedia"]
    assert header["centre"] == 1 / N_EXPERTS
    assert header["also"] == [2, "of tokens"]
    assert header["limit"] >= np.quantile(np.abs(share["estimate"] - 1 / 8), 0.99)


def test_a_share_of_first_choices_has_one_denominator(trace):
    first = stats.expert_share(trace, slot="first", bootstrap=FEW)
    assert unpack(view.expert_share(first).packed)[0]["also"] is None
    assert unpack(view.expert_share(stats.expert_share(trace, bootstrap=FEW)).packed)[0]["also"] == [2, "of tokens"]


def test_pairs_that_form_by_chance_are_at_one():
    """Pairs drawn with probability a_i a_j, i != j: observed over expected is 1 up to noise, whatever the shares."""
    rng = np.random.default_rng(0)
    a = np.array([6, 3, 2, 2, 1, 1, 1, 1.0])
    joint = np.outer(a, a) * (1 - np.eye(8))
    drawn = rng.choice(64, size=200_000, p=(joint / joint.sum()).ravel())
    trace = Trace.from_arrays(np.stack([drawn // 8, drawn % 8], -1)[:, None], n_experts=8)
    ratio = unpack(view.coactivation(stats.coactivation(trace, bootstrap=FEW)).packed)[1]["estimate"][0]
    off = ~np.eye(8, dtype=bool)
    np.testing.assert_allclose(ratio[off], 1, atol=0.08)
    assert np.isnan(np.diag(ratio)).all()


def test_expected_counts_keep_every_experts_own(together):
    header, arrays = unpack(view.coactivation(together).packed)
    observed = (together["estimate"] * together["n"]).to_numpy()
    expected = observed / arrays["estimate"]
    np.testing.assert_allclose(np.nansum(expected, -1), np.nansum(observed, -1), rtol=1e-3)
    assert header["centre"] == 1


def test_transitions_of_several_gaps_keep_their_layers(moves):
    header, arrays = unpack(view.transitions(moves).packed)
    assert [pick["values"] for pick in header["picks"]] == [[1, 3], [0, 1, 2]]
    np.testing.assert_allclose(arrays["estimate"][0], moves[0]["estimate"], rtol=1e-6)
    np.testing.assert_allclose(arrays["estimate"][1, 0], moves[1]["estimate"][0], rtol=1e-6)
    assert np.isnan(arrays["estimate"][1, 1:]).all()


def test_a_strip_has_the_tokens_asked_for(trace):
    _, arrays = unpack(view.strip(trace, 7, start=10, count=20).packed)
    ids = trace.read("expert_id")[trace.read("sequence") == 7][10:30]
    np.testing.assert_array_equal(arrays["pair"], (ids @ [8, 1]).T)
    assert arrays["step"].cumsum().tolist() == list(range(10, 30))
    assert unpack(view.strip(trace, 7).packed)[1]["pair"].shape == (4, 40)
    with refused(BadInput, "start", 60):
        view.strip(trace, 7, start=60)


def test_a_diff_carries_both_runs(trace, changed):
    _, arrays = unpack(view.diff(trace, changed, 5, names=("bf16", "nf4")).packed)
    rows = np.flatnonzero(trace.read("sequence") == 5)
    np.testing.assert_array_equal(arrays["nf4/pair"][2] != 0, rows % 5 == 0)
    assert not arrays["nf4/pair"][[0, 1, 3]].any()
    ids = changed.read("expert_id")[rows]
    np.testing.assert_array_equal(arrays["bf16/pair"] + arrays["nf4/pair"], (ids @ [8, 1]).T)
    assert "bf16/weight" in arrays
    assert "nf4/weight" not in arrays
    with refused(BadInput, "names", ("a/b", "c")):
        view.diff(trace, changed, 5, names=("a/b", "c"))


def test_two_runs_of_ten_thousand_tokens_save_in_one_megabyte():
    long = make_trace(domains=("arxiv",), documents=1, tokens=10_000, layers=32)
    logits = long.read("router_logits") + np.random.default_rng(1).normal(0, 0.1, (10_000, 32, N_EXPERTS))
    ids = np.argsort(-logits, -1)[..., :2]
    weight = np.exp(np.take_along_axis(logits, ids, -1))
    tokens = {name: long.read(name) for name in ("sequence", "token_id", "logprob")}
    weight /= weight.sum(-1, keepdims=True)
    noisy = Trace.from_arrays(
        ids, n_experts=N_EXPERTS, weight=weight, tokens=tokens, sequences=long.sequences[["document_id"]]
    )
    noisy._vocabulary = long.vocabulary
    made = view.diff(long, noisy)
    saved = json.dumps({"text/html": made._repr_html_(), "text/plain": repr(made)})
    assert len(saved.encode()) <= 1_000_000
    _, arrays = unpack(made.packed)
    shown = arrays["first run/weight"] + arrays["second run/weight"]
    np.testing.assert_array_equal(shown[0].T, np.rint(100 * noisy.read("weight")[..., 1].astype(float)))


def test_samples_find_their_routing(trace):
    parts = trace.select(where={"domain": "github"})
    frame = parts.sequences.assign(task="quiz", sample_id=range(5, 5 - len(parts.sequences), -1))
    joined = Trace(parts._sources, frame, parts.meta, parts.layers)
    header, arrays = unpack(view.samples(log_of(4), joined).packed)
    assert header["sample_sequence"] == [3, 2, 1, 0]
    ids = trace.read("expert_id")[np.isin(trace.read("sequence"), frame.index[frame["sample_id"] < 4])]
    np.testing.assert_array_equal(arrays["pair"], (ids @ [8, 1]).T)
    assert [row["correct"] for row in header["rows"]] == [0.0, 1.0, None, 0.0]
    with refused(BadInput, "trace", ["task", "sample_id"]):
        view.samples(log_of(4), trace)


def test_a_sample_without_a_recorded_token_leaves_the_others_their_routing():
    header, arrays = unpack(view.samples(log_of(3), emptied_trace()).packed)
    assert header["sample_sequence"] == [2, 1, 0]
    assert header["starts"] == [0, 3, 3, 6]
    assert arrays["pair"][0].tolist() == [1, 1, 1, 11, 11, 11]


def test_latency_leaves_failures_out_and_counts_them():
    failed = Record(0, "concurrency 1", "measured", "timeout", (), 0.0, 9.0)
    header, arrays = unpack(view.latency(Bench([failed], {"model": {"name": "m"}})).packed)
    assert all(len(arrays[curve["array"]]) == 0 for metric in header["metrics"] for curve in metric["curves"])
    assert header["note"].startswith("n = 1 measured requests, 1 failed")
    with refused(BadInput, "bench", 0):
        view.latency(Bench([], {"model": {"name": "m"}}))


def test_latency_of_a_loaded_model_names_it_in_words():
    done = Record(0, "batch 1", "measured", "ok", (), 0.0, 0.1)
    made = view.latency(Bench([done], {"model": {"name": "demo", "dtype": "float32", "experts": 8}}))
    assert '<img alt="Latency of demo. n = 1 measured' in made.static


def test_a_pareto_view_keeps_what_was_not_measured_missing():
    rows = [("bf16", "bytes", 93e9), ("nf4", "bytes", 26e9), ("nf4", "kl", 0.1), ("int8", "bytes", 47e9)]
    table = pd.DataFrame([(*row, np.nan, np.nan, "", 10) for row in rows], columns=COLUMNS)
    header, arrays = unpack(view.pareto(Pareto(table, {"documents": 3})).packed)
    assert header["labels"] == ["bf16", "nf4", "int8"]
    np.testing.assert_allclose(arrays["estimate1"], [np.nan, 0.1, np.nan])
    assert [measure["higher"] for measure in header["measures"]] == [False, False]
    with refused(BadInput, "quantity", "speed"):
        view.pareto(Pareto(table, {"documents": 3}), y="speed")


def test_every_static_form_is_a_picture_with_words_and_a_table_that_a_sanitiser_keeps(
    trace, share, together, moves, changed
):
    views = [
        view.share_heatmap(share),
        view.expert_share(share),
        view.coactivation(together),
        view.transitions(moves),
        view.strip(trace, 1),
        view.diff(trace, changed, 1),
        view.samples(log_of(3, HOSTILE[0])),
    ]
    for made in views:
        assert re.search(r'<img alt="[^"]{40,}" style="[^"]*" src="data:image/png;base64,', made.static), made.title
        assert "<figcaption>" in made.static
        assert made.static.count("<tr>") >= 3
        assert not re.search(r"<(style|svg|script|link|iframe)|\s(on\w+|class|role|aria-\w+)=", made.static)
        assert made._repr_html_().count("<script>") == made._repr_html_().count("</script>") == 1
        assert len(made._repr_html_()) < 120_000


def test_other_dimensions_are_named(share):
    with refused(BadInput, "data", ["domain", "expert"]):
        view.share_heatmap(share.isel(layer=0))
    with refused(BadInput, "data"):
        view.coactivation(share)
    with refused(BadInput, "data", 0):
        view.transitions([])
