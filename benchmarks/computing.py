"""What each statistic costs, with its intervals, at 1M and at 250k tokens x 32 layers x top-2; and the same in pandas.

    python benchmarks/computing.py --out benchmarks/results/computing.json

The trace is synthetic: documents of random length in 12 domains, router logits that depend on the token, the domain
and chance. It is in memory. pandas computes the estimates alone, without intervals, on the long table of the smaller
trace (one row for every token, layer and slot), and is checked to find the same numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from measuring import header, seconds, write

import mixlens as ml

LAYERS, EXPERTS, TOP_K, DOMAINS, TYPES, TOKENS_A_DOCUMENT = 32, 8, 2, 12, 8192, 800
STATISTICS = (
    "expert_share",
    "load_balance",
    "routing_entropy",
    "router_confidence",
    "repetition",
    "coactivation",
    "transitions",
    "position_profile",
    "domain_specialization",
    "domain_information",
    "vocabulary_specialization",
    "predictability",
    "agreement",
)
ONLY_BY_DOMAIN = ("domain_specialization", "domain_information")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3, help="median of so many runs")
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    measured_on = header()
    small, large = synthetic(options.tokens // 4), synthetic(options.tokens)
    statistics = {}
    for name in STATISTICS:
        for by in ("domain",) if name in ONLY_BY_DOMAIN else (None, "domain"):
            large_s, small_s = (median(times(name, trace, by, options.repeats)) for trace in (large, small))
            statistics[f"{name}, by {by}" if by else name] = {
                "large_s": round(large_s, 3),
                "small_s": round(small_s, 3),
                "growth": round(large_s / small_s, 2),
            }
            print(f"{name:26} by {by!s:6} {large_s:7.2f} s {small_s:7.2f} s   x{large_s / small_s:.2f}", flush=True)
    sizes = {"large_tokens": large.n_tokens, "small_tokens": small.n_tokens, "large_documents": len(large.sequences)}
    del large
    settings = {**sizes, "layers": LAYERS, "top_k": TOP_K, "experts": EXPERTS, "repeats": options.repeats}
    results = {"statistics": statistics, "pandas_on_small": in_pandas(small, options.repeats)}
    write(options.out, "computing", measured_on, {"settings": settings, "results": results})


def times(name: str, trace: ml.Trace, by: str | None, repeats: int) -> list[float]:
    traces = (trace, trace) if name == "agreement" else (trace,)
    return [seconds(partial(getattr(ml.stats, name), *traces, by=by)) for _ in range(repeats)]


def synthetic(n_tokens: int) -> ml.Trace:
    rng = np.random.default_rng(0)
    documents = max(2 * DOMAINS, n_tokens // TOKENS_A_DOCUMENT)
    cuts = np.sort(rng.choice(np.arange(1, n_tokens), documents - 1, replace=False))
    sequence = np.repeat(np.arange(documents), np.diff(cuts, prepend=0, append=n_tokens))
    frequency = 1 / np.arange(1, TYPES + 1)
    token_id = rng.choice(TYPES, n_tokens, p=frequency / frequency.sum())
    of_token, of_domain = (rng.standard_normal((n, LAYERS, EXPERTS), np.float32) for n in (TYPES, DOMAINS))
    logits = np.empty((n_tokens, LAYERS, EXPERTS), np.float16)
    expert_id = np.empty((n_tokens, LAYERS, TOP_K), np.uint8)
    weight = np.empty((n_tokens, LAYERS, TOP_K), np.float32)
    for start in range(0, n_tokens, 16_384):
        part = slice(start, start + 16_384)
        chance = rng.standard_normal((len(token_id[part]), LAYERS, EXPERTS), np.float32)
        logits[part] = of_token[token_id[part]] + 0.3 * of_domain[sequence[part] % DOMAINS] + chance
        left = logits[part].astype(np.float32)
        for slot in range(TOP_K):
            expert_id[part, :, slot] = left.argmax(-1)
            weight[part, :, slot] = np.exp(left.max(-1))
            np.put_along_axis(left, expert_id[part, :, slot, None].astype(np.int64), -np.inf, axis=-1)
        weight[part] /= weight[part].sum(-1, keepdims=True)
    names = np.array([f"domain {number:02}" for number in range(DOMAINS)])
    table = pd.DataFrame({"document_id": np.arange(documents), "domain": names[np.arange(documents) % DOMAINS]})
    tokens = {"sequence": sequence, "token_id": token_id}
    return ml.Trace.from_arrays(
        expert_id, n_experts=EXPERTS, weight=weight, router_logits=logits, tokens=tokens, sequences=table
    )


def in_pandas(trace: ml.Trace, repeats: int) -> dict[str, Any]:
    """Times in pandas beside the times of mixlens on the same trace, and whether the estimates are the same."""
    table = trace.to_pandas()
    table["domain"] = table["sequence"].map(trace.sequences["domain"]).astype("category")
    found = {}
    for name, (by, compute) in PANDAS.items():
        ours = getattr(ml.stats, name)(trace, by=by)["estimate"].to_numpy()
        same = bool(np.allclose(ours, compute(table), equal_nan=True, atol=1e-6))
        pandas_s = median(seconds(partial(compute, table)) for _ in range(repeats))
        mixlens_s = median(times(name, trace, by, repeats))
        found[name] = {"by": by, "pandas_s": round(pandas_s, 3), "mixlens_s": round(mixlens_s, 3), "same": same}
        print(f"{name:26} pandas {pandas_s:7.2f} s, mixlens {mixlens_s:7.2f} s, same numbers: {same}", flush=True)
    return found


def share(table: pd.DataFrame) -> np.ndarray:
    groups = table.groupby(["domain", "layer"], observed=True)["expert_id"].value_counts(normalize=True)
    return groups.unstack().to_numpy().reshape(DOMAINS, LAYERS, EXPERTS)


def coactivated(table: pd.DataFrame) -> np.ndarray:
    first, second = (table[table["slot"] == slot].reset_index(drop=True) for slot in range(TOP_K))
    joint = joint_counts(first["layer"], first["expert_id"], second["expert_id"])
    joint = joint + joint.transpose(0, 2, 1)
    joint[:, np.arange(EXPERTS), np.arange(EXPERTS)] = np.nan
    return joint / np.nansum(joint, axis=-1, keepdims=True)


def repeated(table: pd.DataFrame) -> np.ndarray:
    wide = table[table["slot"] == 0].reset_index(drop=True)
    wide["second"] = table.loc[table["slot"] == 1, "expert_id"].to_numpy()
    before = wide.groupby(["sequence", "layer"])[["expert_id", "second"]].shift()
    wide["first"] = wide["expert_id"] == before["expert_id"]
    wide["either"] = wide["first"]
    for now, then in (("expert_id", "second"), ("second", "expert_id"), ("second", "second")):
        wide["either"] |= wide[now] == before[then]
    return wide[before["expert_id"].notna()].groupby("layer")[["first", "either"]].mean().to_numpy()


def moved(table: pd.DataFrame) -> np.ndarray:
    first = table[table["slot"] == 0]
    after = first.groupby(["sequence", "position"])["expert_id"].shift(-1)
    known = after.notna()
    joint = joint_counts(first["layer"][known], first["expert_id"][known], after[known])
    return joint / joint.sum(-1, keepdims=True)


def joint_counts(layer: pd.Series, i: pd.Series, j: pd.Series) -> np.ndarray:
    found = pd.crosstab([layer.rename("layer"), i.rename("i")], j.rename("j"))
    every = pd.MultiIndex.from_product([sorted(layer.unique()), range(EXPERTS)])
    return found.reindex(every, fill_value=0).to_numpy(float).reshape(-1, EXPERTS, EXPERTS)


PANDAS: dict[str, tuple[str | None, Callable[[pd.DataFrame], np.ndarray]]] = {
    "expert_share": ("domain", share),
    "coactivation": (None, coactivated),
    "repetition": (None, repeated),
    "transitions": (None, moved),
}

if __name__ == "__main__":
    main()
