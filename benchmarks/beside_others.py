"""mixlens, aiperf and guidellm against one scripted server in the same minutes, in turns: TTFT, ITL, throughput.

Each of the others is installed by hand in an environment of its own (pip install aiperf==0.13.0, guidellm==0.8.1).

python benchmarks/beside_others.py --aiperf AIPERF --guidellm GUIDELLM --out benchmarks/results/beside-others.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import header, write
from scripted_server import Served

import mixlens

Found = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", help="its command; left out when it is not given")
    parser.add_argument("--guidellm", help="its command; left out when it is not given")
    parser.add_argument("--requests", type=int, default=16, help="of each tool in a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    tools: dict[str, Callable[[str, Path], Found]] = {"mixlens": lambda url, _: ours(url, options.requests)}
    if options.aiperf:
        tools["aiperf"] = lambda url, folder: aiperf(url, folder, options)
    if options.guidellm:
        tools["guidellm"] = lambda url, folder: guidellm(url, folder, options)
    measured_on = header()
    found: dict[str, list[Found]] = {name: [] for name in tools}
    with Served(None) as url, tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer"
        tokenizer.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(mixlens.__file__).parent / "_demo" / name, tokenizer)
        for turn in range(options.turns):
            for name, tool in tools.items():
                found[name].append(tool(url, Path(folder)))
                print(turn, name, found[name][-1], flush=True)
    medians = {
        name: {metric: round(float(np.median([one[metric] for one in turns])), 3) for metric in turns[0]}
        for name, turns in found.items()
    }
    settings = {"requests": options.requests, "turns": options.turns, "concurrency": 1}
    write(options.out, "beside_others", measured_on, {"settings": settings, "medians": medians, "turns": found})


def ours(url: str, requests: int) -> Found:
    bench = mixlens.benchmark(
        mixlens.Endpoint(url, model="scripted"),
        requests=requests,
        workload=mixlens.bench.Workload(prompt_tokens=16, output_tokens=64),
        settings=mixlens.bench.BenchSettings(progress=False),
    )
    table = bench.table().set_index(["metric", "statistic"])["estimate"]
    return {
        "ttft_ms": 1e3 * float(table["ttft_s", "p50"]),
        "itl_ms": 1e3 * float(table["tpot_s", "p50"]),
        "latency_ms": 1e3 * float(table["e2e_stream_s", "p50"]),
        "output_tokens_per_s": float(table["system_output_tokens_per_s", "rate"]),
    }


def aiperf(url: str, folder: Path, options: argparse.Namespace) -> Found:
    out = folder / "aiperf"
    shutil.rmtree(out, ignore_errors=True)
    asked = ["--endpoint-type", "chat", "--streaming", "--use-server-token-count", "--concurrency", "1"]
    asked += ["--request-count", str(options.requests), "--warmup-request-count", "1", "--isl", "16", "--osl", "64"]
    asked += ["--tokenizer", str(folder / "tokenizer"), "--ui", "none", "--artifact-dir", str(out)]
    run([options.aiperf, "profile", "-m", "scripted", "--url", url.removesuffix("/v1"), *asked])
    told = json.loads(next(out.rglob("profile_export_aiperf.json")).read_text("utf-8"))
    return {
        "ttft_ms": told["time_to_first_token"]["p50"],
        "itl_ms": told["inter_token_latency"]["p50"],
        "latency_ms": told["request_latency"]["p50"],
        "output_tokens_per_s": told["output_token_throughput"]["avg"],
    }


def guidellm(url: str, folder: Path, options: argparse.Namespace) -> Found:
    out = folder / "guidellm.json"
    out.unlink(missing_ok=True)
    asked = ["--backend", f"kind=openai_http,target={url.removesuffix('/v1')},model=scripted"]
    asked += ["--profile", "kind=synchronous", "--constraint", f"kind=max_requests,count={options.requests}"]
    asked += ["--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=64"]
    asked += ["--tokenizer", f"kind=huggingface_auto,model={folder / 'tokenizer'}"]
    run([options.guidellm, "run", *asked, "--output", f"kind=json,path={out}", "--disable-console"])
    [told] = json.loads(out.read_text("utf-8"))["benchmarks"]
    good: dict[str, Any] = {name: value["successful"] for name, value in told["metrics"].items() if name in GUIDELLM}
    return {
        "ttft_ms": good["time_to_first_token_ms"]["median"],
        "itl_ms": good["inter_token_latency_ms"]["median"],
        "latency_ms": 1e3 * good["request_latency"]["median"],
        "output_tokens_per_s": good["output_tokens_per_second"]["mean"],
    }


GUIDELLM = ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency", "output_tokens_per_second")


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
