"""One model in several dtypes, quantizations and experts implementations, in one benchmark."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.refusals import refused

import mixlens as ml
from mixlens import BadInput, show
from mixlens.bench import LocalSettings, Workload, benchmark_configurations
from mixlens.bench import configurations as module
from mixlens.bench.roofline import Machine, Measured
from mixlens.cli import main as cli
from mixlens.plot.style import note_of, own_figure

QUIET = LocalSettings(progress=False)
WORK = Workload(16, 3)
SCHEMES = [{"dtype": "float32"}, {"quantization": "nf5"}, {"dtype": "bfloat16"}]


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """A device whose rates are given by dtype, for they take seconds to measure."""

    def found(device, dtype, before=None):
        rate = 1e9 * dtype.itemsize
        return Machine("a device", Measured(rate, rate, rate, 10, "copy"), Measured(9e9, 9e9, 9e9, 10, "product"))

    monkeypatch.setattr("mixlens.bench.local.measure", found)


def run(configurations, **changes):
    fields = {"requests": 2, "workload": WORK, "settings": QUIET} | changes
    return benchmark_configurations("demo", configurations, **fields)


def test_each_configuration_is_a_row_and_a_failure_of_one_is_named(tmp_path):
    bench = run(SCHEMES, concurrency=(1, 2), out=tmp_path / "run")
    loads = [f"batch {rows}, 16 + 3 tokens" for rows in (1, 2)]
    table = bench.overview()
    assert list(table.index) == [f"{name}: {load}" for name in ("float32", "nf5", "bfloat16") for load in loads]
    assert table["succeeded"].tolist() == ["2 of 2", "2 of 2", "0 of 1", "0 of 1", "2 of 2", "2 of 2"]
    assert (table.loc[f"nf5: {loads[0]}"].drop("succeeded") == "n/a").all()
    assert set(bench.outcomes()["outcome"]) == {"ok", "failed"}
    assert "Failed: nf5: batch 1, 16 + 3 tokens; nf5: batch 2, 16 + 3 tokens. Cannot quantize to 'nf5'" in repr(bench)
    assert "bfloat16: demo in bfloat16" in repr(bench)
    parts = bench.configurations()
    assert list(parts) == ["float32", "bfloat16"]
    assert parts["bfloat16"].meta["model"]["dtype"] == "bfloat16"
    assert [r.level for r in parts["bfloat16"].records][:2] == [loads[0]] * 2
    # Each against the device as measured in its dtype.
    roof = bench.roofline().set_index(["level", "phase", "metric"])["estimate"]
    for name, bandwidth in (("float32", 4e9), ("bfloat16", 2e9)):
        at = (f"{name}: {loads[0]}", "decode")
        assert roof[(*at, "mbu_frac")] == pytest.approx(roof[(*at, "read_bytes_per_s")] / bandwidth)
    weights = [parts[name].meta["model"]["audit"]["bytes"] for name in parts]
    assert weights[1] < 0.6 * weights[0]
    again = run(SCHEMES, concurrency=(1, 2), out=tmp_path / "run")
    assert again.records == bench.records
    assert ml.open(tmp_path / "run").overview().equals(table)


def test_figures_and_the_report_take_it(tmp_path):
    bench = run(SCHEMES, concurrency=(1, 2), requests=1)
    ax = show.throughput_latency_curve(bench)
    assert [len(line.get_xdata()) for line in ax.lines] == [2, 2]
    assert ax.get_legend_handles_labels()[1] == ["float32", "bfloat16"]
    assert [text.get_text() for text in ax.texts][:2] == ["batch 1", "batch 2"]
    assert "2 of 6 requests failed" in note_of(ax)
    roof = show.roofline(bench)
    assert [t.get_text() for t in roof.get_legend().get_texts()][:2] == [
        "4 GB/s measured, 9 GFLOP/s measured, float32", "2 GB/s measured, 9 GFLOP/s measured, bfloat16",
    ]  # fmt: skip
    assert own_figure(roof).png()[:4] == b"\x89PNG"
    page = ml.report(bench, tmp_path / "r.html").read_text()
    assert "nf5: batch 2, 16 + 3 tokens" in page
    assert page.count("<figure") == 4
    assert "nf5: batch 2, 16 + 3 tokens" in bench._repr_html_()
    assert "float32: batch 1, 16 + 3 tokens" in ml.compare(bench, bench).overview()["load"].tolist()


def test_an_experts_implementation_that_one_cannot_have_costs_that_row_alone():
    pytest.importorskip("torchao")
    both = replace(QUIET, experts=("eager", "grouped_mm"))
    bench = run([{}, {"quantization": "int8wo"}], requests=1, settings=both)
    ended = {r.level: r.outcome for r in bench.records if r.phase == "measured"}
    assert ended == {
        "as it is: batch 1, 16 + 3 tokens, eager": "ok",
        "as it is: batch 1, 16 + 3 tokens, grouped_mm": "ok",
        "int8wo: batch 1, 16 + 3 tokens, eager": "ok",
        "int8wo: batch 1, 16 + 3 tokens, grouped_mm": "failed",
    }
    [detail] = [r.detail for r in bench.records if r.outcome == "failed"]
    assert "experts" in detail


def test_what_a_load_raises_is_an_outcome_and_the_next_is_measured(monkeypatch):
    real = module.load

    def broken(name, **options):
        model = real(name, **options)
        if options.get("dtype") == "float16":
            model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
        return model

    monkeypatch.setattr(module, "load", broken)
    bench = run([{"dtype": "float16"}, {"dtype": "float32"}], requests=1, concurrency=(1, 2))
    ended = [(r.level, r.outcome, r.detail) for r in bench.records if r.phase == "measured"]
    reason = "ZeroDivisionError: division by zero"
    assert ended == [
        ("float16: batch 1, 16 + 3 tokens", "failed", reason),
        ("float16: batch 2, 16 + 3 tokens", "failed", reason),
        ("float32: batch 1, 16 + 3 tokens", "ok", ""),
        ("float32: batch 2, 16 + 3 tokens", "ok", ""),
    ]


def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    real = module.load

    def interrupted(name, **options):
        if options["dtype"] == "bfloat16":
            raise KeyboardInterrupt
        return real(name, **options)

    monkeypatch.setattr(module, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([{"dtype": "float32"}, {"dtype": "bfloat16"}], out=tmp_path / "run")
    bench = ml.open(tmp_path / "run")
    assert bench.succeeded == 2
    assert "Stopped early by an interrupt" in repr(bench)


@pytest.mark.parametrize("wrong", [[], [{"dtype": "float32"}, {"dtype": "float32"}]])
def test_no_configuration_or_one_twice_is_refused(wrong):
    with refused(BadInput, "configurations"):
        run(wrong)


def test_nothing_that_ran_is_said_and_fails_the_command(tmp_path, capsys):
    few = ["--requests", "1", "--prompt-tokens", "16", "--output-tokens", "3", "--out", str(tmp_path / "run")]
    assert cli.main(["bench", "demo", *few, "--dtype", "bfloat16,float16", "--quantization", "fp8"]) == cli.EXIT_FAILED
    said = capsys.readouterr().err
    assert "2 failed" in said
    assert "fp8" in said
    page = ml.report(tmp_path / "run", tmp_path / "r.html").read_text()
    assert "Not drawn: " in page


def test_one_command_measures_all_combinations(tmp_path, capsys):
    few = ["--requests", "1", "--warmup", "0", "--prompt-tokens", "16", "--output-tokens", "3", "--json"]
    schemes = ["--dtype", "float32,bfloat16", "--quantization", "none;attention=int8wo,experts=int8wo"]
    assert cli.main(["bench", "demo", *few, *schemes, "--out", str(tmp_path / "run")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [*dict.fromkeys(row["level"].partition(": ")[0] for row in said["rows"])] == [
        "float32", "float32, attention=int8wo,experts=int8wo",
        "bfloat16", "bfloat16, attention=int8wo,experts=int8wo",
    ]  # fmt: skip
