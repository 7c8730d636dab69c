"""Prints the committed results as the Markdown tables of README.md.

python benchmarks/summary.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    tables = {
        "recording": recording,
        "memory": memory,
        "computing": computing,
        "caching": caching,
        "watching": watching,
        "importing": importing,
        "generating": generating,
        "viewing": viewing,
        "decode-steps": decode_steps,
        "decoding": decoding,
    }
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        if result.get("benchmark") in tables:
            print(f"### {path.name}\n\n{where(result['measured_on'])}\n")
            print("\n".join(tables[result["benchmark"]](result)), end="\n\n")


def where(on: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    threads = f", {on['threads']} threads" if "threads" in on else ""
    ends = [on[f"load_average_at_{when}"][0] if f"load_average_at_{when}" in on else None for when in ("start", "end")]
    load = "not noted" if None in ends else f"{ends[0]} at the start, {ends[1]} at the end"
    machine = f"{on['gpu'] or 'no GPU'}; CPU {on['cpu']}, {on['cores']} cores{threads}"
    return f"{on['date']}; {machine}; load {load}; {versions}."


def recording(result: dict[str, Any]) -> Iterator[str]:
    settings = result["settings"]
    rows, columns = settings["batch"]
    yield f"{settings['parameters'] / 1e6:,.0f}M parameters, {settings['dtype']}, batch of {rows} x {columns} tokens.\n"
    yield "| against the bare forward | ratio | 95 % interval | in processor time | bare, s | pairs |"
    yield "|---|---|---|---|---|---|"
    for name, r in result["results"].items():
        interval = f"{r['ci_low']:.3f} to {r['ci_high']:.3f}"
        work = "{ratio:.3f} ({ci_low:.3f} to {ci_high:.3f})".format(**r["processor_time"])
        yield f"| {name} | {r['ratio']:.3f} | {interval} | {work} | {r['bare_s']:.2f} | {r['pairs']} |"
    for name, reason in result["skipped"].items():
        yield f"| {name} | | {reason} | | | |"


def decode_steps(result: dict[str, Any]) -> Iterator[str]:
    settings = result["settings"]
    reads, bandwidth = settings["read_bytes_a_step"] / 1e9, settings["bandwidth_bytes_per_s"] / 1e12
    yield f"{settings['layers']} layers, batch 1, bfloat16; {reads:.2f} GB a step; roof at {bandwidth:.2f} TB/s."
    if "note" in settings:
        yield settings["note"]
    yield "\n| step | fastest, ms | tok/s | share of the roof | recording, ratio | same tokens | repeats |"
    yield "|---|---|---|---|---|---|---|"
    for name, r in result["results"].items():
        if isinstance(r, str):
            yield f"| {name} | {r} | | | | | |"
            continue
        step, without = r["step_s"], r.get("step_s_without_recording")
        ratio = f"{np.median(np.divide(step, without)):.4f}" if without else ""
        same = "" if without is None else "yes" if r["same_tokens"] else "no"
        shown = f"{min(step) * 1e3:.3f} | {r['tokens_per_s']:.1f} | {r['share_of_the_roof']:.3f}"
        yield f"| {name} | {shown} | {ratio} | {same} | {len(step)} |"


def decoding(result: dict[str, Any]) -> Iterator[str]:
    settings = result["settings"]
    yield (
        f"{settings['shape']}, {settings['dtype']}, prompt of {settings['prompt']}, {settings['output']} new tokens; "
        "bytes are computed from the experts that were chosen, all else is measured.\n"
    )
    yield (
        "| decode | ms a step | recording | tok/s, recording | MB a step (computed) | GB/s of the device | share | "
        "share, recording | recording, ratio | 95 % interval | first call, s more | same logits | pairs |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    for name, r in result["results"]["decode"].items():
        if "skipped" in r:
            yield f"| {name} | {r['skipped']} |" + " |" * 11
            continue
        cost = r["recording"]
        yield (
            f"| {name} | {1e3 * r['step_s']:.2f} | {1e3 * r['step_s_recording']:.2f} | "
            f"{r['tokens_per_s_recording']:.1f} | {r['read_bytes_a_step'] / 1e6:,.0f} | "
            f"{r['bandwidth_bytes_per_s'] / 1e9:,.1f} | {r['share_of_bandwidth']:.3f} | "
            f"{r['share_of_bandwidth_recording']:.3f} | {cost['ratio']:.3f} | "
            f"{cost['ci_low']:.3f} to {cost['ci_high']:.3f} | {r['first_call_beyond_a_later_one_s']:.1f} | "
            f"{'yes' if r['logits_identical'] else 'no'} | {cost['pairs']} |"
        )


def memory(result: dict[str, Any]) -> Iterator[str]:
    yield "| tokens | shards | peak, MiB | of which recording | routing files, bytes a token | all files |"
    yield "|---|---|---|---|---|---|"
    for run in (result["results"]["small"], result["results"]["large"]):
        peak, growth = (f"{run[key] / 2**20:.0f}" for key in ("peak_bytes", "growth_bytes"))
        routing, every = run["routing_bytes_a_token"], run["all_bytes_a_token"]
        yield f"| {run['tokens']:,} | {run['shards']} | {peak} | {growth} | {routing} | {every} |"


def computing(result: dict[str, Any]) -> Iterator[str]:
    settings = result["settings"]
    large, small = (f"{settings[key]:,} tokens, s" for key in ("large_tokens", "small_tokens"))
    yield f"| statistic, with intervals | {large} | {small} | growth |\n|---|---|---|---|"
    for name, times in result["results"]["statistics"].items():
        yield f"| {name} | {times['large_s']:.2f} | {times['small_s']:.2f} | {times['growth']:.2f} |"
    yield f"\n| {settings['small_tokens']:,} tokens | mixlens with intervals, s | pandas without, s | same estimates |"
    yield "|---|---|---|---|"
    for name, times in result["results"]["pandas_on_small"].items():
        same = "yes" if times["same"] else "no"
        yield f"| {name} | {times['mixlens_s']:.2f} | {times['pandas_s']:.2f} | {same} |"


def caching(result: dict[str, Any]) -> Iterator[str]:
    settings = result["settings"]
    yield "{tokens:,} tokens, {layers} layers, top-{top_k} of {experts}, {sizes} sizes at once.\n".format(**settings)
    yield "| policy | s | processor, s | peak, MiB |\n|---|---|---|---|"
    for name, r in result["results"].items():
        yield f"| {name} | {r['s']:.1f} | {r['cpu_s']:.1f} | {r['peak_bytes'] / 2**20:,.0f} |"


def watching(result: dict[str, Any]) -> Iterator[str]:
    r, probe, every = result["check_against_training_step"], result["probe"], result["every"]
    call = result["call_without_a_check_s"]
    of = f"a probe of {probe['documents']} x {probe['columns']} tokens, every {every} steps"
    yield f"A check of {of}; {call * 1e6:.1f} µs at a step without one.\n"
    yield "| a check against a training step | 95 % interval | step, s | pairs | of the training time |"
    yield "|---|---|---|---|---|"
    interval = f"{r['ci_low']:.3f} to {r['ci_high']:.3f}"
    yield f"| {r['ratio']:.3f} | {interval} | {r['bare_s']:.2f} | {r['pairs']} | {r['ratio'] / every:.2%} |"


def importing(result: dict[str, Any]) -> Iterator[str]:
    r = result["results"]
    yield "| median, s | fastest | slowest | processes | imports torch |\n|---|---|---|---|---|"
    torch = "yes" if r["imports_torch"] else "no"
    yield f"| {r['median_s']} | {r['fastest_s']} | {r['slowest_s']} | {r['processes']} | {torch} |"


def generating(result: dict[str, Any]) -> Iterator[str]:
    found = {(row["level"], row["phase"], row["metric"]): row for row in result["roofline"]}
    yield f"{result['settings']['parameters'] / 1e6:,.0f}M parameters. {result['remarks'][2]}\n"
    yield "| load | phase | tok/s | 95 % interval | roof, tok/s | MBU, % | MFU, % | calls |"
    yield "|---|---|---|---|---|---|---|---|"
    for level, phase in dict.fromkeys((level, phase) for level, phase, _ in found):
        speed, roof, mbu, mfu = (
            found[level, phase, name] for name in ("tokens_per_s", "roof_tokens_per_s", "mbu_frac", "mfu_frac")
        )
        rate = f"{speed['estimate']:.2f} | {speed['ci_low']:.2f} to {speed['ci_high']:.2f} | {roof['estimate']:.1f}"
        shares = f"{100 * mbu['estimate']:.1f} | {100 * mfu['estimate']:.1f}"
        yield f"| {level} | {phase} | {rate} | {shares} | {speed['n']} |"


def viewing(result: dict[str, Any]) -> Iterator[str]:
    yield "| view | tokens | output, MB | first paint, s | state | laid out, ms | painted, ms | painted, p95 | steps |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for r in result["results"]:
        for state, step in r["step"].items():
            laid, painted = step["laid_out_ms"], step["painted_ms"]
            about = f"{r['view']} | {r['tokens']:,} | {r['output_bytes'] / 1e6:.2f} | {r['first_paint_ms'] / 1e3:.2f}"
            yield f"| {about} | {state} | {laid['median']} | {painted['median']} | {painted['p95']} | {step['n']} |"


if __name__ == "__main__":
    main()
