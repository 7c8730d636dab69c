"""Tables and remarks for benchmarks of a loaded model: cold and warm calls, memory, roofline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from mixlens.bench.events import Record
from mixlens.bench.metrics import request_table
from mixlens.bench.roofline import Machine, roofline
from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Mean, leaving_out, with_bounds
from mixlens.core.text import interval_of
from mixlens.errors import MissingSignal

TIMES = {"ttft_s": "prefill and the first token", "tpot_s": "a decode step", "e2e_token_s": "the whole call"}
_PEAKS = {"peak_vram_bytes": "peak VRAM [MB]", "peak_rss_bytes": "peak RSS [MB]"}


_FLOATS = ("float32", "bfloat16", "float16")
LOOP = "Experts are separate Linears called in a Python loop: speeds are those of the loop, not of the scheme."


def in_a_loop(model: Mapping[str, Any]) -> bool:
    """Return whether a model's experts run one by one in Python, as quantized experts do without compilation."""
    rows = (model.get("audit") or {}).get("rows", [])
    quantized = any(row["kind"] == "experts" and row["scheme"] not in _FLOATS for row in rows)
    return quantized and model.get("experts_implementation") == "eager"


def compiled_at(level: str, local: Mapping[str, Any]) -> bool:
    """Return whether a load was decoded through a compiled graph."""
    chosen = local.get("decode", {}).get(level)
    return bool(local.get("compiled")) if chosen is None else chosen["compiled"]


def in_configuration(configuration: str, load: str) -> str:
    """Return the name of a load, prefixed by its configuration unless that is empty."""
    return f"{configuration}: {load}" if configuration else load


def parts(records: Sequence[Record], meta: Mapping[str, Any]) -> dict[str, tuple[list[Record], dict[str, Any]]]:
    """Return records and metadata of each configuration that ran, as if it had been measured alone."""
    if "configurations" not in meta:
        return {"": (list(records), dict(meta))}
    rest = {name: value for name, value in meta.items() if name != "configurations"}
    found = {}
    for label, about in meta["configurations"].items():
        head = in_configuration(label, "")
        own = [replace(r, level=r.level.removeprefix(head)) for r in records if r.level.startswith(head)]
        if about:
            found[label] = (own, rest | about)
    return found


def rooflines(records: Sequence[Record], meta: Mapping[str, Any], *, bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
    """Compute `roofline` of every configuration against the rates of the device measured with it."""
    tables, missing = [], None
    for label, (own, about) in parts(records, meta).items():
        try:
            table = roofline(own, machine_of(about), layers=about["local"]["layers"], bootstrap=bootstrap)
        except MissingSignal as error:
            missing = error
            continue
        tables.append(table.assign(level=[in_configuration(label, level) for level in table["level"]]))
    if not tables:
        raise missing or MissingSignal(
            "Cannot compute a roofline: no configuration of the benchmark ran. See bench.outcomes() and "
            "bench.remarks().",
            argument="configurations",
            value=0,
        )
    return pd.concat(tables, ignore_index=True)


def cold_and_warm(records: Iterable[Record], *, bootstrap: Bootstrap = DEFAULT) -> pd.DataFrame:
    """Compare the first call of each load, including one-time work and compilation, with its measured calls.

    Returns
    -------
    DataFrame
        level, state (cold, warm), metric (ttft_s, tpot_s, e2e_token_s), estimate (mean), ci_low, ci_high, n (calls);
        NaN without successful calls, and NaN bounds for a single one.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.level, record.phase), []).append(record)
    rows = []
    for level in dict.fromkeys(level for level, _ in groups):
        first, measured = groups.get((level, "warm-up"), [])[:1], groups.get((level, "measured"), [])
        for state, part in (("cold", first), ("warm", measured)):
            table = request_table(part)
            for metric in TIMES:
                values = table[metric].dropna().to_numpy(float)
                rows.append((level, state, metric, *_mean(values, bootstrap), len(values)))
    return pd.DataFrame(rows, columns=["level", "state", "metric", "estimate", "ci_low", "ci_high", "n"])


def peak_memory(records: Iterable[Record]) -> pd.DataFrame:
    """Return the peak memory of each load: level, memory (peak_vram_bytes, peak_rss_bytes), bytes, n (calls)."""
    found: dict[tuple[str, str], list[int]] = {}
    for record in records:
        for name in _PEAKS:
            if (value := getattr(record, name)) is not None:
                found.setdefault((record.level, name), []).append(value)
    rows = [(level, name, max(values), len(values)) for (level, name), values in found.items()]
    return pd.DataFrame(rows, columns=["level", "memory", "bytes", "n"])


def machine_of(meta: Mapping[str, Any]) -> Machine:
    """Return the device of a benchmark. Raises MissingSignal for an endpoint, whose device is unknown."""
    if "machine" not in meta:
        raise MissingSignal(
            "Cannot compute a roofline: the device behind an endpoint is unknown. Benchmark a loaded model, as in "
            "ml.benchmark(ml.load(...)).",
            argument="model",
        )
    return Machine.of(meta["machine"])


def columns(records: Sequence[Record], meta: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return extra columns of an overview, by level and heading, with n/a for no value; empty for an endpoint."""
    told: dict[str, dict[str, str]] = {}
    try:
        table = rooflines(records, meta).to_dict("records")
    except MissingSignal:
        return told
    wanted = (
        ("prefill [tok/s]", "prefill", "tokens_per_s", 1),
        ("decode [tok/s]", "decode", "tokens_per_s", 1),
        ("decode, roof [tok/s]", "decode", "roof_tokens_per_s", 1),
        ("prefill MFU [%]", "prefill", "mfu_frac", 100),
        ("decode MBU [%]", "decode", "mbu_frac", 100),
    )
    rows = {(row["level"], row["phase"], row["metric"]): row for row in table}
    for level in dict.fromkeys(level for level, _, _ in rows):
        told[level] = {
            heading: interval_of(rows[level, phase, metric], factor, 1) for heading, phase, metric, factor in wanted
        }
    for level, memory, peak, _ in peak_memory(records).itertuples(index=False, name=None):
        if level in told:
            told[level][_PEAKS[memory]] = f"{peak / 1e6:,.0f}"
    return told


def remarks(meta: Mapping[str, Any]) -> list[str]:
    """Describe model, settings and device of a benchmark, for each configuration."""
    if "configurations" not in meta:
        return _remarks(meta)
    rest = {name: value for name, value in meta.items() if name != "configurations"}
    told = [f"{meta['model']['name']} in {len(meta['configurations'])} configurations, {meta['created']}."]
    for label, about in meta["configurations"].items():
        told += [f"{label}: {remark}" for remark in _remarks(rest | about)] if about else []
    return told


def failures(records: Iterable[Record]) -> list[str]:
    """Describe the loads that failed on this machine, with the reasons."""
    by_reason: dict[str, list[str]] = {}
    for record in records:
        if record.outcome == "failed":
            by_reason.setdefault(record.detail, []).append(record.level)
    return [f"Failed: {'; '.join(levels)}. {reason}" for reason, levels in by_reason.items()]


def _remarks(meta: Mapping[str, Any]) -> list[str]:
    model, local, machine = meta["model"], meta["local"], machine_of(meta)
    chosen = local.get("decode", {})
    static = local["static_cache"] or local["compiled"] or (chosen and all(one["compiled"] for one in chosen.values()))
    cache = "static cache" if static else "growing cache"
    experts = "" if local["experts"] else f", experts by {model['experts_implementation']}"
    audit = model.get("audit", {})
    label = audit.get("label", model["dtype"])
    held = "" if label == model["dtype"] else f" (weights: {label})"
    rates = (machine.bandwidth_bytes_per_s, 1e9, "GB/s"), (machine.matmul_flops_per_s, 1e9, "GFLOP/s")
    said = "; ".join(
        f"{rate.estimate / unit:,.1f} {name} [{rate.ci_low / unit:,.1f}, {rate.ci_high / unit:,.1f}], {rate.how}, "
        f"n = {rate.n}"
        for rate, unit, name in rates
    )
    decode = "decode compiled" if local["compiled"] else "decode not compiled"
    decode = "" if chosen else f", {decode}"
    recorded = "was recorded in every call" if local["recording"] else "was not recorded: no bytes are known"
    offloaded = [remark for remark in audit.get("remarks", []) if "offloaded" in remark]
    return [
        f"{model['name']} in {model['dtype']}{held}{experts}, on {machine.name}, {meta['created']}.",
        f"{cache[0].upper()}{cache[1:]}{decode}; prompts: {local['prompts']}.",
        *[f"{level}: {one['why']}." for level, one in chosen.items()],
        *([LOOP] if in_a_loop(model) and not static else []),
        f"Measured rates of the device: {said}. MBU and MFU are shares of these; their intervals include both errors.",
        *[
            f"{remark} They are copied to the device for every forward pass, over a link slower than its memory."
            for remark in offloaded
        ],
        f"Routing {recorded}.",
    ]


def _mean(values: np.ndarray, bootstrap: Bootstrap) -> tuple[float, float, float]:
    each = np.ones(len(values))
    estimate, low, high = with_bounds(Mean(leaving_out(values), leaving_out(each)), each, bootstrap.level)
    return float(estimate), float(low), float(high)
