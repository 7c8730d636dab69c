"""Bytes and operations by nested loops, the published sizes of Mixtral, and the metrics of known events."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from helpers.refusals import refused

from mixlens import MissingSignal
from mixlens.bench.events import Record
from mixlens.bench.roofline import METRICS, Machine, Measured, Sizes, Weights, _with_device, roofline
from mixlens.endpoints.protocols import TOKEN, Event

EIGHT_7B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
EIGHT_22B = {
    **EIGHT_7B,
    "num_hidden_layers": 56,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_attention_heads": 48,
    "vocab_size": 32768,
}


def test_a_token_of_8x7b_reads_12_75_of_46_70_billion_parameters():
    sizes = Sizes.of(EIGHT_7B)
    assert sizes.total == 46_702_792_704
    assert round(sizes.read_a_token / 1e9, 3) == 12.749
    assert Sizes.of(EIGHT_22B).total == 140_630_071_296
    assert round(4.3e12 / (2 * sizes.read_a_token), 1) == 168.6  # tokens per second at batch 1 and 4.3 TB/s, in bf16


def test_the_sizes_are_those_of_the_modules():
    from tiny import tiny_mixtral

    for changes in ({}, {"tie_word_embeddings": True}, {"num_key_value_heads": 2, "num_local_experts": 4}):
        model = tiny_mixtral(**changes)
        assert Sizes.of(model.config.to_dict()).total == sum(p.numel() for p in model.parameters())


def test_bytes_read_are_counted_by_nested_loops():
    draw = np.random.default_rng(0)
    weights = Weights(1000, draw.integers(10, 99, (3, 5)))
    for tokens in (1, 2, 9):
        ids = np.stack([[draw.permutation(5)[:2] for _ in range(3)] for _ in range(tokens)])
        read, experts = 1000, set()
        for token in ids:
            for layer, slots in enumerate(token):
                for expert in slots:
                    if (layer, expert) not in experts:
                        experts.add((layer, expert))
                        read += weights.expert_bytes[layer, expert]
        assert weights.read(ids) == (read, len(experts))


def test_a_decode_step_at_batch_1_reads_the_active_parameters_and_the_cache():
    sizes = Sizes.of(EIGHT_7B)
    ids = np.tile(np.array([3, 5]), (1, 32, 1))
    read, experts = Weights.of(sizes).read(ids)
    assert experts == 64
    assert read == 2 * sizes.read_a_token
    assert sizes.kept(1000) == 1000 * 2 * 32 * 8 * 128


@pytest.mark.parametrize("past", [0, 11])
def test_operations_are_counted_by_nested_loops(past):
    config = {**EIGHT_7B, "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 10}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}
    pairs, norms = 0, 0
    for length in (3, 5):
        for place in range(length):
            for _ in range(2):
                pairs += 2 * 8 * 4 * 3 + 2 * 8 * 2 * 3 + 8 * 8 + 2 * 3 * 8 * 16
                pairs += 2 * 4 * 3 * (past + place + 1)
                norms += 2 * 8
            norms += 8
        pairs += 8 * 10
    assert Sizes.of(config).flops([3, 5], past) == 2 * (pairs + norms)


MACHINE = Machine("a device", Measured(1000.0, 990, 1010, 10, "copy"), Measured(500.0, 490, 510, 10, "product"))


def call(index: int, start: float, prefill: float, step: float, known: bool = True, **changes) -> Record:
    """A prompt of 5 tokens that reads 100 bytes, then three steps that read 40, 50 and 60."""
    work = [
        {"experts": n, "read_bytes": b, "flops": f} for n, b, f in [(16, 100, 90), (4, 40, 8), (6, 50, 8), (8, 60, 8)]
    ]
    stamps = [start + prefill + step * i for i in range(4)]
    events = [Event(at, TOKEN, **(w if known else {})) for at, w in zip(stamps, work, strict=True)]
    events[-1] = Event(
        stamps[-1], TOKEN, input_tokens=5, output_tokens=4, finish="length", **(work[-1] if known else {})
    )
    times = {"started_s": start, "sent_s": start, "ended_s": stamps[-1]}
    return Record(index, "batch 2", "measured", "ok", tuple(events), rows=2, **times, **changes)


def values(records) -> dict:
    table = roofline(records, MACHINE, layers=2)
    assert set(table["metric"]) == set(METRICS)
    return {(r.phase, r.metric): r for r in table.itertuples()}


def test_metrics_of_known_events():
    found = values([call(0, 0.0, 0.5, 0.1), call(1, 3.0, 0.3, 0.3)])
    expected = {
        ("prefill", "forward_s"): 0.4,
        ("prefill", "tokens_per_s"): 2 * 2 * 5 / 0.8,
        ("prefill", "experts_per_layer"): 8,
        ("prefill", "mfu_frac"): 180 / 0.8 / 500,
        ("prefill", "roof_tokens_per_s"): 20 / (180 / 500),  # the matrix products bind
        ("decode", "forward_s"): 1.2 / 6,
        ("decode", "tokens_per_s"): 2 * 6 / 1.2,
        ("decode", "experts_per_layer"): 3,
        ("decode", "read_bytes"): 50,
        ("decode", "read_bytes_per_s"): 300 / 1.2,
        ("decode", "mbu_frac"): 0.25,
        ("decode", "flops_per_byte"): 48 / 300,
        ("decode", "roof_tokens_per_s"): 12 / (300 / 1000),  # the bytes bind
    }
    for key, value in expected.items():
        assert found[key].estimate == pytest.approx(value), key
        assert found[key].n == 2
    assert found["decode", "mbu_frac"].ci_low < 0.25 < found["decode", "mbu_frac"].ci_high


def test_shares_of_the_device_carry_its_own_interval():
    calls = [call(0, 0.0, 0.5, 0.1), call(1, 3.0, 0.3, 0.3), call(2, 6.0, 0.4, 0.2)]
    exact = replace(
        MACHINE,
        **{
            name: replace(getattr(MACHINE, name), ci_low=rate, ci_high=rate)
            for name, rate in (("bandwidth_bytes_per_s", 1000.0), ("matmul_flops_per_s", 500.0))
        },
    )
    wide = replace(exact, bandwidth_bytes_per_s=Measured(1000.0, 800, 1100, 20, "copy"))
    tables = [roofline(calls, one, layers=2).set_index(["phase", "metric"]) for one in (exact, wide)]
    alone, both = (table.loc[("decode", "mbu_frac")] for table in tables)
    assert both["estimate"] == alone["estimate"]
    m = alone["estimate"]
    low = np.hypot(np.log(m / alone["ci_low"]), np.log(1100 / 1000))
    high = np.hypot(np.log(alone["ci_high"] / m), np.log(1000 / 800))
    assert np.log(m / both["ci_low"]) == pytest.approx(low)
    assert np.log(both["ci_high"] / m) == pytest.approx(high)
    # The bytes bind decode: more bandwidth is more tokens; the matrix products bind prefill, and stay.
    above = [
        np.log(t.loc[("decode", "roof_tokens_per_s"), "ci_high"] / t.loc[("decode", "roof_tokens_per_s"), "estimate"])
        for t in tables
    ]
    assert above[1] == pytest.approx(np.hypot(above[0], np.log(1.1)))
    rest = [table.drop(index=["mbu_frac", "roof_tokens_per_s"], level="metric") for table in tables]
    assert rest[0].equals(rest[1])


def test_the_interval_of_a_share_holds_the_truth_as_often_as_it_says():
    """A rate of 250 with a standard error of 0.5 %, on a device of 1,000 in two bursts of 10, noise 5 %."""
    draw, held, narrow = np.random.default_rng(0), 0, 0
    at = list(METRICS).index("mbu_frac")
    for _ in range(500):
        bursts = 1000 * (1 + 0.05 * draw.standard_normal((2, 10)))
        mean, reach = bursts.mean(), 2.093 * bursts.std(ddof=1) / np.sqrt(20)  # of Student's t with 19 degrees
        device = replace(MACHINE, bandwidth_bytes_per_s=Measured(mean, mean - reach, mean + reach, 20, "copy"))
        share = 250 * (1 + 0.005 * draw.standard_normal()) / mean
        bounds = [np.full(len(METRICS), share * (1 + sign * 0.0098)) for sign in (-1, 1)]
        low, high = _with_device(np.full(len(METRICS), share), *bounds, device)
        held += low[at] <= 0.25 <= high[at]
        narrow += bounds[0][at] <= 0.25 <= bounds[1][at]
    assert narrow < 400
    assert 460 <= held  # 475 are expected


def test_a_rate_is_the_mean_of_all_runs_and_its_interval_holds_every_burst():
    found = Measured.of([[10.0, 12.0], [20.0, 22.0]], "copy")
    reach = 3.182446 * np.std([10, 12, 20, 22], ddof=1) / 2
    assert (found.estimate, found.n, found.bursts) == (16.0, 4, ((10.0, 12.0), (20.0, 22.0)))
    assert (found.ci_low, found.ci_high) == pytest.approx((16 - reach, 16 + reach), rel=1e-4)
    drifted = Measured.of([[10.0] * 10, [20.0] * 10], "copy")
    assert (drifted.ci_low, drifted.ci_high) == (10.0, 20.0)
    assert (
        Machine.of(
            json.loads(json.dumps(asdict(replace(MACHINE, bandwidth_bytes_per_s=found))))
        ).bandwidth_bytes_per_s.n
        == 4
    )


def test_one_call_has_no_interval_and_failures_are_in_no_number():
    failed = Record(1, "batch 2", "measured", "memory", (), 9.0, 9.1, sent_s=9.0, rows=2)
    found = values([call(0, 0.0, 0.5, 0.1), failed])
    assert found["decode", "mbu_frac"].estimate == pytest.approx(0.5)
    assert np.isnan(found["decode", "mbu_frac"].ci_low)


def test_records_that_do_not_know_what_was_read():
    with refused(MissingSignal, "records"):
        roofline([call(0, 0.0, 0.5, 0.1, known=False)], MACHINE, layers=2)
