"""Benchmarks of a loaded model: known times from a fake device, then the real thing on a tiny model."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.displayed import intervals, numbers
from helpers.refusals import refused
from tiny import tiny_mixtral

import mixlens as ml
from mixlens import BadInput, RunError, benchmark
from mixlens.bench import LocalSettings, Workload, bytes_and_flops
from mixlens.bench import hardware as machine
from mixlens.bench.bytes_and_flops import Work, sizes_of, weights_of
from mixlens.bench.events import read_records
from mixlens.bench.hardware import Device
from mixlens.bench.local import benchmark_model
from mixlens.bench.local_tables import LOOP, in_a_loop
from mixlens.bench.record_sink import PARTIAL
from mixlens.bench.roofline import Machine, Measured, Sizes
from mixlens.models import provenance
from mixlens.pricing.forms import forms_of

QUIET = LocalSettings(progress=False)
WORK = Workload(16, 5)


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """A device whose rates are given, for they take seconds to measure."""
    found = Machine("a device", Measured(1e9, 1e9, 1e9, 10, "copy"), Measured(1e10, 1e10, 1e10, 10, "product"))
    monkeypatch.setattr("mixlens.bench.local.measure", lambda device, dtype, before=None: found)


class FakeDevice(Device):
    """Waiting for it takes 10 ms, and every forward of the model 100 ms, or as said, for each row and column."""

    def __init__(self, model):
        super().__init__(model)
        self.seconds, self.free = 0.0, None
        self.forward_s, self.speed = 0.1, 1.0
        model.model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def _forward(self, _module, _args, kwargs):
        self.seconds += self.forward_s * self.speed * kwargs["input_ids"].numel()

    def now(self):
        self.seconds += 0.01
        return self.seconds

    def leave_out(self, since_s):
        """Nothing is done between calls on this clock."""

    def peak(self):
        return {"peak_vram_bytes": 12345}

    def room(self):
        return self.free


def run(model, device, **changes):
    options = {"batch": 2, "requests": 2, "out": None, "workload": WORK, "settings": QUIET} | changes
    return benchmark_model(model, **options, device=device)


def test_times_are_the_devices():
    model = tiny_mixtral()
    bench = run(model, FakeDevice(model))
    rows = bench.requests()
    assert rows["phase"].tolist() == ["warm-up", "measured", "measured"]
    assert (rows["outcome"] == "ok").all()
    np.testing.assert_allclose(rows["ttft_s"], 2 * 16 * 0.1 + 0.01)
    np.testing.assert_allclose(rows["tpot_s"], 2 * 0.1 + 0.01)
    assert rows["input_tokens"].tolist() == [16] * 3
    assert rows["output_tokens"].tolist() == [5] * 3
    assert {record.rows for record in bench.records} == {2}
    assert {record.peak_vram_bytes for record in bench.records} == {12345}
    system = bench.throughput().set_index("metric").loc["output_tokens_per_s"]
    call_s = 3.2 + 0.01 + 4 * 0.21
    assert system["estimate"] == pytest.approx(2 * 2 * 5 / (2 * call_s + 2 * 0.01), rel=1e-3)


def test_bookkeeping_between_calls_is_in_no_time(monkeypatch):
    model = tiny_mixtral()
    device = Device(model)
    clock = {"s": 0.0}
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock["s"])
    device._zero = 0.0
    model.model.register_forward_pre_hook(lambda *_: clock.update(s=clock["s"] + 1.0))
    monkeypatch.setattr(Work, "of_call", slow(Work.of_call, clock))
    bench = run(model, device, batch=1, requests=12, settings=replace(QUIET, max_seconds=13 * 5 + 11 * 100))
    assert len(bench.records) == 12  # a cap is on all seconds: the last warm-up and calls
    assert bench.meta["stopped"] == "the cap of 1165 seconds"
    calls = bench.records[1:]
    assert [record.ended_s - record.sent_s for record in calls] == [5.0] * 11
    assert [b.sent_s - a.ended_s for a, b in pairwise(calls)] == [0.0] * 10
    assert bench.throughput().iloc[0]["estimate"] == pytest.approx(1.0)


def slow(function, clock):
    def slowed(*arguments, **options):
        clock["s"] += 100.0
        return function(*arguments, **options)

    return slowed


def routed(model, ids):
    """Distinct experts of every forward of a greedy decode, by hooks written out here."""
    seen = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out, at=at: seen.append((at, out[2])))
        for at, layer in enumerate(model.model.layers)
    ]
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    for handle in handles:
        handle.remove()
    layers = len(model.model.layers)
    forwards = [seen[i : i + layers] for i in range(0, len(seen), layers)]
    return [sum(len(set(chosen.flatten().tolist())) for _, chosen in forward) for forward in forwards]


@pytest.mark.parametrize("static", [False, True])
def test_every_forward_knows_the_experts_it_read(static):
    model = tiny_mixtral()
    prompts = []
    model.register_forward_pre_hook(
        lambda _m, _a, kwargs: prompts.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    bench = run(model, None, requests=1, settings=replace(QUIET, static_cache=static))
    ids = next(p for p in reversed(prompts) if p.shape[1] == 16)
    events = bench.records[-1].events
    assert [event.experts for event in events] == routed(model, ids)
    sizes = Sizes.of(model.config.to_dict())
    for number, event in enumerate(events):
        read = sizes.dense + event.experts * sizes.expert + 2 * sizes.kept(16 + number)
        assert event.read_bytes == 4 * read
    assert bench.roofline().query("metric == 'mbu_frac'")["estimate"].notna().all()


def test_the_first_call_is_the_cold_one_and_stands_apart():
    model = tiny_mixtral()
    device = FakeDevice(model)
    forwards = iter(range(10**6))

    def compiling(_module, _args):
        device.seconds += 5.0 if next(forwards) == 0 else 0.0

    model.model.layers[0].register_forward_pre_hook(compiling)
    bench = run(model, device, settings=replace(QUIET, warmup=2), requests=3)
    table = bench.cold_and_warm().set_index(["state", "metric"])
    prefill = 2 * 16 * 0.1 + 0.01
    assert table.loc[("cold", "ttft_s"), "estimate"] == pytest.approx(prefill + 5.0)
    assert np.isnan(table.loc[("cold", "ttft_s"), "ci_low"])
    warm = table.loc[("warm", "ttft_s")]
    assert (warm["estimate"], warm["n"]) == (pytest.approx(prefill), 3)
    assert (warm["ci_low"], warm["ci_high"]) == pytest.approx((prefill, prefill))
    assert table.loc[("warm", "tpot_s"), "estimate"] == pytest.approx(0.21)
    [peak] = bench.peak_memory().to_dict("records")
    assert (peak["memory"], peak["bytes"], peak["n"]) == ("peak_vram_bytes", 12345, 5)


def test_without_recording_bytes_are_missing_and_not_zero():
    bench = run(tiny_mixtral(), None, settings=replace(QUIET, recording=False))
    assert {event.read_bytes for record in bench.records for event in record.events} == {None}
    table = bench.roofline().set_index(["phase", "metric"])["estimate"]
    assert np.isnan(table["decode", "mbu_frac"])
    assert table["decode", "mfu_frac"] > 0


def test_experts_and_lengths_are_loads_of_their_own_and_the_model_is_left_as_it_was():
    model = tiny_mixtral()
    model.set_experts_implementation("grouped_mm")
    before = model.generation_config
    bench = benchmark(
        model,
        concurrency=(1, 2),
        requests=1,
        workload=[Workload(16, 2), Workload(20, 3)],
        settings=replace(QUIET, experts=("eager", "batched_mm"), warmup=0),
    )
    names = [record.level for record in bench.records]
    assert len(names) == 8
    assert names[0] == "batch 1, 16 + 2 tokens, eager"
    assert names[-1] == "batch 2, 20 + 3 tokens, batched_mm"
    assert model.config._experts_implementation == "grouped_mm"
    assert model.generation_config is before
    assert not model.model._forward_hooks


def test_a_run_on_disk_opens_as_what_was_measured(tmp_path):
    model = tiny_mixtral()
    bench = run(model, None, out=tmp_path / "run")
    opened = ml.open(tmp_path / "run")
    assert opened.records == bench.records
    assert not (tmp_path / "run" / PARTIAL).exists()
    assert opened.roofline().equals(bench.roofline())
    assert run(model, None, out=tmp_path / "run").meta == opened.meta
    assert "cpu" in json.dumps(opened.meta["model"]["devices"])
    assert "Routing was recorded in every call" in repr(opened)
    (said,) = (remark for remark in bench.remarks() if "GB/s" in remark)
    rates = [bench.meta["machine"][name] for name in ("bandwidth_bytes_per_s", "matmul_flops_per_s")]
    for found, rate in zip(intervals(said.replace(" GB/s", "").replace(" GFLOP/s", "")), rates, strict=True):
        assert found == pytest.approx([rate[name] / 1e9 for name in ("estimate", "ci_low", "ci_high")], abs=0.051)
    with refused(RunError, "out", ["requests"]):
        run(model, None, out=tmp_path / "run", requests=3)


def failing(model, error, at):
    """The model fails in its forward number `at`."""
    count = iter(range(10**6))

    def fail(_module, _args):
        if next(count) == at:
            raise error

    model.model.layers[1].register_forward_pre_hook(fail)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        MemoryError("no memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    ],
)
def test_a_batch_that_does_not_fit_is_an_outcome_and_the_next_load_runs(error):
    model = tiny_mixtral()
    failing(model, error, at=5 + 2)  # in the second call, after its prompt and a token
    bench = run(model, None, batch=(2, 1))
    ended = [(record.rows, record.phase, record.outcome) for record in bench.records]
    assert ended == [
        (2, "warm-up", "ok"),
        (2, "measured", "memory"),
        (1, "warm-up", "ok"),
        (1, "measured", "ok"),
        (1, "measured", "ok"),
    ]
    assert len(bench.records[1].events) == 2
    assert str(error).split("\n")[0] in bench.records[1].detail
    assert bench.records[-1].events[-1].experts == 2 * 4


def test_a_cache_larger_than_free_memory_is_never_allocated():
    model = tiny_mixtral()
    device = FakeDevice(model)
    device.free = 100
    bench = run(model, device)
    assert [record.outcome for record in bench.records] == ["memory"]
    assert 100 in numbers(bench.records[0].detail)


def test_any_other_fault_of_the_model_is_not_hidden():
    model = tiny_mixtral()
    failing(model, RuntimeError("mat1 and mat2 shapes cannot be multiplied"), at=0)
    with pytest.raises(RuntimeError):
        run(model, None)


def test_an_interrupt_loses_nothing(tmp_path):
    model = tiny_mixtral()
    failing(model, KeyboardInterrupt(), at=5 + 5 + 3)
    with pytest.raises(KeyboardInterrupt):
        run(model, None, out=tmp_path / "run")
    bench = ml.open(tmp_path / "run")
    assert [record.outcome for record in bench.records] == ["ok", "ok", "interrupted"]
    assert bench.records[-1].detail == "after 3 tokens"
    assert bench.meta["stopped"] == "an interrupt"
    assert "Stopped early by an interrupt" in repr(bench)


def test_a_killed_run_keeps_its_calls(tmp_path):
    model = tiny_mixtral()
    failing(model, SystemExit(), at=5 + 5 + 3)
    with pytest.raises(SystemExit):
        run(model, None, out=tmp_path / "run")
    assert len(list(read_records(tmp_path / "run" / PARTIAL))) == 2


def test_no_call_starts_after_the_cap():
    model = tiny_mixtral()
    bench = run(model, FakeDevice(model), settings=replace(QUIET, max_seconds=7.0))
    assert len(bench.records) == 2
    assert bench.meta["stopped"] == "the cap of 7 seconds"


def test_given_prompts_are_read_as_they_are():
    model = ml.load("demo", verbose=False)
    texts = ["A short one.", "One that is rather longer than the other, by far."]
    bench = run(model, None, requests=1, workload=Workload(output_tokens=3, prompts=texts))
    from transformers import AutoTokenizer

    lengths = [len(AutoTokenizer.from_pretrained(model.name_or_path)(text)["input_ids"]) for text in texts]
    assert bench.records[0].events[-1].input_tokens == round(sum(lengths) / 2)
    sizes, event = Sizes.of(model.config.to_dict()), bench.records[0].events[1]
    weights = weights_of(model)
    read = weights.dense_bytes + event.experts * int(weights.expert_bytes[0, 0])
    assert event.read_bytes == read + 4 * sum(sizes.kept(length + 1) for length in lengths)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_the_bytes_of_the_tensors(tied):
    model = tiny_mixtral(tie_word_embeddings=tied).to(torch.bfloat16)
    sizes, weights = Sizes.of(model.config.to_dict()), weights_of(model)
    assert sizes_of(model) == sizes
    assert (weights.expert_bytes == 2 * sizes.expert).all()
    assert weights.dense_bytes == 2 * sizes.dense


def test_offloaded_layers_are_counted_by_their_shape_and_it_is_said(tmp_path):
    from accelerate import dispatch_model

    whole = run(tiny_mixtral(), None, requests=1)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    net = dispatch_model(tiny_mixtral(), places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(parameter.is_meta for parameter in net.parameters())
    bench = run(net, None, requests=1)
    for one, other in zip(whole.records, bench.records, strict=True):
        assert [event.experts for event in one.events] == [event.experts for event in other.events]
        assert [event.read_bytes for event in one.events] == [event.read_bytes for event in other.events]
    assert bench.roofline().query("metric == 'mbu_frac'")["estimate"].notna().all()
    assert "bytes are offloaded" in repr(bench)
    assert "offloaded" not in repr(whole)


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("a fault")])
def test_a_device_is_measured_before_and_after_the_loads(error, monkeypatch):
    def measure(device, dtype, before=None):
        if before is not None and error is not None:
            raise error
        earlier = before.bandwidth_bytes_per_s.bursts if before else ()
        found = Measured.of([*earlier, [1e9 + len(earlier), 1.1e9]], "copy")
        return Machine("a device", found, found)

    monkeypatch.setattr("mixlens.bench.local.measure", measure)
    made = run(tiny_mixtral(), None, requests=1)
    bursts = made.meta["machine"]["bandwidth_bytes_per_s"]["bursts"]
    assert bursts == (((1e9, 1.1e9),) if error else ((1e9, 1.1e9), (1e9 + 1, 1.1e9)))
    assert f"n = {2 if error else 4}" in repr(made)


def test_quantized_weights_count_what_they_hold():
    pytest.importorskip("torchao")
    plain, small = (ml.load("demo", quantization=q, verbose=False) for q in (None, "int8wo"))
    before, after = weights_of(plain), weights_of(small)
    ratio = after.expert_bytes.sum() / before.expert_bytes.sum()
    assert 0.25 < ratio < 0.3  # float32 to 8 bits and scales
    bench = run(small, None, requests=1)
    assert bench.records[-1].events[-1].read_bytes < 0.6 * (before.dense_bytes + before.expert_bytes[:, :4].sum())
    assert LOOP in bench.remarks()
    assert not in_a_loop(provenance.describe(plain))
    [form], remarks = forms_of([(None, bench)])
    assert {column.kind for column in form.cells} == {"size"}
    assert len(remarks) == 1
    bench.meta["local"]["decode"][bench.records[0].level]["compiled"] = True
    [form], remarks = forms_of([(None, bench)])
    assert {column.kind for column in form.cells} == {"size", "speed"}
    assert not remarks
    assert LOOP not in bench.remarks()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batch": 0}, ("batch", [0])),
        ({"batch": (2, 2)}, ("batch", [2, 2])),
        ({"requests": 0}, ("requests", (0, 1, 600.0))),
        ({"settings": replace(QUIET, max_seconds=0.0)}, ("requests", (2, 1, 0.0))),
        ({"workload": Workload(500, 13)}, ("prompt_tokens", 500)),
        ({"workload": Workload(output_tokens=2, prompts=["a"])}, ("tokenizer",)),
        ({"settings": ml.bench.BenchSettings()}, ("model", "MixtralForCausalLM")),
        ({"settings": replace(QUIET, experts=("eager", ""))}, ("experts", "")),
        (
            {"settings": replace(QUIET, experts="fastest")},
            ("experts", "fastest"),
        ),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_runs(changes, named):
    model = tiny_mixtral()
    failing(model, AssertionError("a forward ran"), at=0)
    with refused(BadInput, *named):
        run(model, None, **changes)


def test_neither_a_model_nor_an_endpoint():
    with refused(BadInput, "model", "str"):
        benchmark("demo")
    with refused(BadInput, "rate", 2.0):
        benchmark(tiny_mixtral(), rate=2.0)


@pytest.fixture
def graph(monkeypatch):
    """A compiled path on the fake clock: a forward takes a tenth, and the first 40 s; or raises."""

    @contextmanager
    def entered(model):
        if graph.fault is not None:
            raise graph.fault
        graph.device.seconds += 40.0
        graph.device.speed = graph.speed
        yield
        graph.device.speed = 1.0

    graph = SimpleNamespace(fault=None, speed=0.1, device=None)
    monkeypatch.setattr("mixlens.bench.local.one_graph", entered)
    monkeypatch.setattr("mixlens.bench.local.compile_config", lambda: None)
    return graph


@pytest.mark.parametrize(
    ("seconds", "speed", "fault", "compiled", "tpot_s", "calls"),
    [
        (0.1, 0.1, None, False, 0.1, 3),  # a second in all, which no compiling makes shorter
        (20.0, 0.1, None, True, 2.0, 5),
        (20.0, 1.5, None, False, 20.0, 5),
        (20.0, 0.1, RuntimeError("no compiler\nand a trace"), False, 20.0, 3),
    ],
    ids=["short", "faster", "slower", "cannot be compiled"],
)
def test_decode_is_compiled_where_the_clock_says_that_it_pays(graph, seconds, speed, fault, compiled, tpot_s, calls):
    model = tiny_mixtral(num_hidden_layers=1)
    device = graph.device = FakeDevice(model)
    device.forward_s, graph.speed, graph.fault = seconds, speed, fault
    bench = run(model, device, batch=1, settings=replace(QUIET, max_seconds=None))
    assert len(bench.records) == calls
    measured = bench.requests().query("phase == 'measured'")
    np.testing.assert_allclose(measured["tpot_s"], tpot_s + 0.01)
    [chosen] = bench.meta["local"]["decode"].values()
    assert chosen["compiled"] is compiled
    assert any(chosen["why"] in remark for remark in bench.remarks())
    assert ("no compiler" in chosen["why"]) == (fault is not None)
    assert model.generation_config.cache_implementation is None


def test_a_model_is_audited_and_summed_up_once(monkeypatch):
    model = tiny_mixtral(num_hidden_layers=2)
    counted = {"audits": 0, "checksums": 0}

    def counting(what, function):
        def called(asked):
            counted[what] += asked is model
            return function(asked)

        return called

    audited = counting("audits", provenance.audit)
    for module in (provenance, bytes_and_flops):
        monkeypatch.setattr(module, "audit", audited)
    monkeypatch.setattr(provenance, "weights_checksum", counting("checksums", provenance.weights_checksum))
    run(model, FakeDevice(model), batch=(1, 2), requests=3)
    assert counted == {"audits": 1, "checksums": 1}


@pytest.mark.slow
def test_compiled_decode_routes_and_answers_as_eager_does():
    model = tiny_mixtral(num_hidden_layers=2)
    model.set_experts_implementation("batched_mm")
    eager = run(model, None, requests=1)
    compiled = run(model, None, requests=1, settings=replace(QUIET, compiled=True))
    for one, other in zip(eager.records, compiled.records, strict=True):
        assert [e.experts for e in one.events] == [e.experts for e in other.events]
        assert [e.read_bytes for e in one.events] == [e.read_bytes for e in other.events]
