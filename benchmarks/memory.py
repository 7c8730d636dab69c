"""Whether memory grows with the corpus, and how many bytes a recorded token takes on disk.

    python benchmarks/memory.py --out benchmarks/results/memory.json

A random Mixtral of 32 layers, 8 experts and top-2, as in 8x7B but thin, records a corpus of N and of 8 N documents with
out=, each in a fresh process. The documents are made when they are asked for, so that only what mixlens keeps counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import header, write

GROWTH = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=128, help="N")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a document")
    parser.add_argument("--shard-tokens", type=int, default=65_536)
    parser.add_argument("--out", help="result file; printed when it is not given")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(record_and_measure(options.documents, options.length, options.shard_tokens)))
        return
    measured_on = header()
    settings = ["--length", str(options.length), "--shard-tokens", str(options.shard_tokens)]
    small, large = (in_fresh_process(n, settings) for n in (options.documents, GROWTH * options.documents))
    results = {"small": small, "large": large, "peak_ratio": round(large["peak_bytes"] / small["peak_bytes"], 4)}
    for run in (small, large):
        peak, growth = run["peak_bytes"] / 2**20, run["growth_bytes"] / 2**20
        print(f"{run['tokens']:,} tokens: peak {peak:.0f} MiB, of which {growth:.0f} MiB while recording")
        print(f"    {run['routing_bytes_a_token']} bytes a token in routing files, {run['all_bytes_a_token']} in all")
    settings = {"documents": options.documents, "length": options.length, "shard_tokens": options.shard_tokens}
    write(options.out, "memory", measured_on, {"settings": settings, "results": results})


def in_fresh_process(documents: int, settings: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", "--documents", str(documents), *settings]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


class Texts:
    """Texts of `length` letters, made when asked for."""

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length = count, length

    def __getitem__(self, number: int) -> str:
        if number >= self.count:
            raise IndexError(number)
        step = 1 + number % 25
        return "".join(LETTERS[(number + step * place) % len(LETTERS)] for place in range(self.length))


def tokenize(text: str) -> dict[str, list[int]]:
    return {"input_ids": [ord(letter) for letter in text]}


def record_and_measure(documents: int, length: int, shard_tokens: int) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, MixtralConfig

    import mixlens as ml

    torch.manual_seed(0)
    thin = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MixtralConfig(num_hidden_layers=32, vocab_size=128, sliding_window=None, **thin)
    model = AutoModelForCausalLM.from_config(config).eval()
    settings = ml.RecordSettings(shard_tokens=shard_tokens, progress=False)
    texts = Texts(documents, length)
    with tempfile.TemporaryDirectory() as folder:
        ml.record(model, ["warm up"], out=f"{folder}/first", tokenizer=tokenize, signals=(), settings=settings)
        before = peak_bytes()
        trace = ml.record(model, texts, out=f"{folder}/run", tokenizer=tokenize, signals=(), settings=settings)
        after = peak_bytes()
        sizes = {path.name: path.stat().st_size for path in Path(folder, "run").iterdir()}
    routing = sum(size for name, size in sizes.items() if name.startswith("routing-"))
    return {
        "documents": documents,
        "tokens": trace.n_tokens,
        "shards": sum(name.startswith("routing-") for name in sizes),
        "peak_bytes": after,
        "growth_bytes": after - before,
        "routing_bytes_a_token": round(routing / trace.n_tokens, 2),
        "all_bytes_a_token": round(sum(sizes.values()) / trace.n_tokens, 2),
    }


def peak_bytes() -> int:
    """Largest resident size of this process so far; Linux counts it in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
