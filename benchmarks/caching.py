"""What each cache policy costs to replay, all sizes at once, over 1M tokens x 32 layers x top-2.

    python benchmarks/caching.py --out benchmarks/results/caching.json

The trace is synthetic, in memory, and its routing random: no policy does worse there, so that replays that work
eviction by eviction have most to do. Each policy runs once, as `ml.decisions.cache`, in a process of its own. Prefetch
needs the inputs of all layers beside the trace: its replay alone is measured, with guesses that are random, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pandas as pd
from computing import apart
from measuring import header, seconds, write

import mixlens as ml
from mixlens.stats import cache_replay

POLICIES = ("lru", "lfu", "fixed", "least-stale", "optimum")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--tokens-a-document", type=int, default=2_000)
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    measured_on = header()
    trace = ml.Trace.from_arrays(
        random_ids(options, seed=0),
        n_experts=options.experts,
        tokens={"sequence": np.arange(options.tokens) // options.tokens_a_document},
        sequences=pd.DataFrame({"document_id": np.arange(-(-options.tokens // options.tokens_a_document))}),
    )
    runs: dict[str, Callable[[], object]] = {
        policy: lambda policy=policy: ml.decisions.cache(trace, policy=policy) for policy in POLICIES
    }
    runs["prefetch, replay alone"] = lambda: prefetched(trace, random_ids(options, seed=1))
    results = {}
    for name, run in runs.items():
        results[name] = apart(lambda run=run: [seconds(run)])
        print(f"{name:24} {results[name]}", flush=True)
    sizes = options.experts - options.top_k + 1
    settings = {**vars(options), "sizes": sizes, "documents": len(trace.sequences)}
    settings.pop("out")
    write(options.out, "caching", measured_on, {"settings": settings, "results": results})


def random_ids(options: argparse.Namespace, seed: int) -> np.ndarray:
    """uint8 or uint16 [token, layer, slot]"""
    rng = np.random.default_rng(seed)
    shape = options.tokens, options.layers, options.top_k
    ids = np.empty(shape, np.uint8 if options.experts <= 256 else np.uint16)
    for layer in range(options.layers):
        drawn = rng.random((options.tokens, options.experts), np.float32)
        ids[:, layer] = np.argpartition(drawn, options.top_k, axis=1)[:, : options.top_k]
    return ids


def prefetched(trace: ml.Trace, ahead: np.ndarray) -> None:
    ids, sequence = trace.read("expert_id"), trace.read("sequence")
    first, sizes = np.searchsorted(sequence, sequence), range(trace.top_k, trace.n_experts + 1)
    for layer in range(trace.n_layers):
        guess = ahead[:, layer] if layer else None
        cache_replay.prefetched(np.ascontiguousarray(ids[:, layer]), guess, first, trace.n_experts, sizes)


if __name__ == "__main__":
    main()
