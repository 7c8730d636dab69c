"""The roofline drawn from records whose numbers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from helpers.refusals import refused

from mixlens import MissingSignal, report
from mixlens.bench.bench import Bench
from mixlens.bench.events import Record
from mixlens.endpoints.protocols import TOKEN, Event
from mixlens.show import roofline

RATE = {"ci_low": 0.0, "ci_high": 2e9, "n": 10, "how": "copy"}
META = {
    "model": {"name": "a model", "dtype": "bfloat16"},
    "machine": {
        "name": "a device",
        "bandwidth_bytes_per_s": {"estimate": 1e9, **RATE},
        "matmul_flops_per_s": {"estimate": 4e9, **RATE},
    },
    "local": {"layers": 2},
}
MODEL = META["model"] | {"experts_implementation": "eager", "audit": {"label": "nf4"}}


def bench(known: bool = True) -> Bench:
    records = []
    for rows in (1, 4):
        for index in range(3):
            work = [{"experts": 4, "read_bytes": 10_000 if known else None, "flops": 3000 * rows}] * 3
            events = [Event(1.0 + 0.1 * i * (1 + 0.01 * index), TOKEN, **w) for i, w in enumerate(work)]
            record = Record(index, f"batch {rows}", "measured", "ok", tuple(events), 0.0, 2.0, sent_s=0.5, rows=rows)
            record = replace(record, peak_rss_bytes=5_000_000)
            records.append(record)
    return Bench(records, META)


def test_marks_lie_where_the_table_says_and_lines_where_the_device_does():
    ax = roofline(bench())
    table = bench().roofline().set_index(["level", "phase", "metric"])["estimate"]
    marks = [(c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in ax.containers]
    keys = [(level, phase) for level in ("batch 1", "batch 4") for phase in ("prefill", "decode")]
    expected = [(table[(*key, "flops_per_byte")], table[(*key, "flops_per_s")]) for key in keys]
    np.testing.assert_allclose(marks, expected)
    x, y = next(line for line in ax.lines if len(line.get_xdata()) > 2).get_data()
    np.testing.assert_allclose(y, np.minimum(np.asarray(x) * 1e9, 4e9))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["batch 1", "batch 4"]


def test_without_bytes_there_is_no_roofline():
    with refused(MissingSignal, "bench"):
        roofline(bench(known=False))
    with refused(MissingSignal, "model"):
        roofline(Bench([], {"endpoint": {"model": "m", "url": "u"}}))


def test_a_report_tells_the_roofline_and_where_it_ran(tmp_path):
    measured = bench()
    local = {
        "layers": 2,
        "experts": None,
        "static_cache": False,
        "compiled": True,
        "recording": True,
        "prompts": "random",
    }
    measured.meta = META | {"local": local, "created": "2026-01-01T00:00:00+00:00", "model": MODEL}
    page = report(measured, tmp_path / "page.html").read_text("utf-8")
    where = "a model in bfloat16 (weights: nf4), experts by eager, on a device, 2026-01-01"
    for words in ("Roofline", where, "mbu_frac", "decode compiled", "peak_rss_bytes"):
        assert words in page
    unknown = bench(known=False)
    unknown.meta = measured.meta | {"local": local | {"recording": False}}
    page = report(unknown, tmp_path / "page.html").read_text("utf-8")
    assert "Not drawn: " in page
