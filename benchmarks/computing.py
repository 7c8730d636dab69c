"""What each statistic costs, with its intervals, at 1M and at 250k tokens x 32 layers x top-2; and the same in pandas.

    python benchmarks/computing.py --out benchmarks/results/computing.json
    python benchmarks/computing.py --experts 128 --top-k 8 --layers 48 --out benchmarks/results/computing-128.json
    python benchmarks/computing.py --experts 64 --top-k 6 --layers 8 --tokens 5240000 --out ...   # a tenth of FLAME-MoE

The trace is synthetic: documents of random length in 12 domains, router logits that depend on the token, the domain
and chance. It is in memory, above 8 experts without its logits. Each statistic is computed in a process of its own,
whose peak is told with the trace that it reads; processor seconds beside those of the clock tell whether others took
part of the machine. pandas computes the estimates alone, without intervals, on the long table of the smaller
trace (one row for every token, layer and slot), and is checked to find the same numbers.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from measuring import header, seconds, write

import mixlens as ml

DOMAINS, TOKENS_A_DOCUMENT, VALUES_AT_A_TIME = 12, 800, 2**22
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
OF_LOGITS = ("routing_entropy", "router_confidence", "load_balance")


@dataclass(frozen=True)
class Shape:
    layers: int
    experts: int
    top_k: int

    @property
    def logits(self) -> bool:
        return self.experts <= 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="median of so many runs")
    parser.add_argument("--out", help="result file; printed when it is not given")
    options = parser.parse_args()
    measured_on = header()
    shape = Shape(options.layers, options.experts, options.top_k)
    small, large = synthetic(options.tokens // 4, shape), synthetic(options.tokens, shape)
    statistics = {}
    for name in (*STATISTICS, "all in one pass"):
        if name in OF_LOGITS and not shape.logits:
            continue
        for by in ("domain",) if name in ONLY_BY_DOMAIN else (None, "domain"):
            found, less = (apart(partial(times, name, trace, by, options.repeats)) for trace in (large, small))
            growth = found["cpu_s"] / less["cpu_s"]
            statistics[f"{name}, by {by}" if by else name] = {
                **{f"large_{key}": value for key, value in found.items()},
                **{f"small_{key}": value for key, value in less.items()},
                "growth": round(growth, 2),
            }
            print(f"{name:26} by {by!s:6} {found} x{growth:.2f}", flush=True)
    sizes = {"large_tokens": large.n_tokens, "small_tokens": small.n_tokens, "large_documents": len(large.sequences)}
    del large
    settings = {**sizes, **asdict(shape), "repeats": options.repeats}
    beside = {"pandas_on_small": in_pandas(small, options.repeats)} if shape.logits else {}
    results = {"statistics": statistics, **beside}
    write(options.out, "computing", measured_on, {"settings": settings, "results": results})


def apart(measured: Callable[[], list[float]]) -> dict[str, float]:
    """Median seconds, processor seconds of a run, and peak memory of a process that does nothing else."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        began = time.process_time()
        found = measured()
        spent = (time.process_time() - began) / len(found)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        theirs.send({"s": round(median(found), 3), "cpu_s": round(spent, 3), "peak_bytes": peak})

    process = context.Process(target=run)
    process.start()
    found = ours.recv()
    process.join()
    return found


def times(name: str, trace: ml.Trace, by: str | None, repeats: int) -> list[float]:
    if name == "all in one pass":
        lacking = () if "router_logits" in trace.signals else OF_LOGITS
        names = [one for one in STATISTICS if one not in ("agreement", *lacking, *(() if by else ONLY_BY_DOMAIN))]
        return [seconds(partial(ml.stats.compute, trace, names, by=by)) for _ in range(repeats)]
    traces = (trace, trace) if name == "agreement" else (trace,)
    return [seconds(partial(getattr(ml.stats, name), *traces, by=by)) for _ in range(repeats)]


def synthetic(n_tokens: int, shape: Shape) -> ml.Trace:
    values = shape.layers * shape.experts
    types, step = 2**21 // values, max(1, VALUES_AT_A_TIME // values)
    rng = np.random.default_rng(0)
    documents = max(2 * DOMAINS, n_tokens // TOKENS_A_DOCUMENT)
    cuts = np.sort(rng.choice(np.arange(1, n_tokens), documents - 1, replace=False))
    sequence = np.repeat(np.arange(documents), np.diff(cuts, prepend=0, append=n_tokens))
    frequency = 1 / np.arange(1, types + 1)
    token_id = rng.choice(types, n_tokens, p=frequency / frequency.sum())
    of_token, of_domain = (rng.standard_normal((n, shape.layers, shape.experts), np.float32) for n in (types, DOMAINS))
    logits = np.empty((n_tokens if shape.logits else 0, shape.layers, shape.experts), np.float16)
    expert_id = np.empty((n_tokens, shape.layers, shape.top_k), np.uint8 if shape.experts <= 256 else np.uint16)
    weight = np.empty((n_tokens if shape.logits else 0, shape.layers, shape.top_k), np.float32)
    for start in range(0, n_tokens, step):
        part = slice(start, start + step)
        left = rng.standard_normal((len(token_id[part]), shape.layers, shape.experts), np.float32)
        left += of_token[token_id[part]] + 0.3 * of_domain[sequence[part] % DOMAINS]
        if shape.logits:
            logits[part] = left
            left = logits[part].astype(np.float32)
        best = np.argpartition(-left, shape.top_k - 1, axis=-1)[..., : shape.top_k]
        chosen = np.take_along_axis(left, best, -1)
        order = np.argsort(-chosen, axis=-1, kind="stable")
        expert_id[part] = np.take_along_axis(best, order, -1)
        if shape.logits:
            weight[part] = np.exp(np.take_along_axis(chosen, order, -1))
            weight[part] /= weight[part].sum(-1, keepdims=True)
    names = np.array([f"domain {number:02}" for number in range(DOMAINS)])
    table = pd.DataFrame({"document_id": np.arange(documents), "domain": names[np.arange(documents) % DOMAINS]})
    tokens = {"sequence": sequence, "token_id": token_id}
    return ml.Trace.from_arrays(
        expert_id,
        n_experts=shape.experts,
        weight=weight if shape.logits else None,
        router_logits=logits if shape.logits else None,
        tokens=tokens,
        sequences=table,
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
    return groups.unstack().to_numpy().reshape(DOMAINS, -1, table["expert_id"].max() + 1)


def coactivated(table: pd.DataFrame) -> np.ndarray:
    first, second = (table[table["slot"] == slot].reset_index(drop=True) for slot in (0, 1))
    joint = joint_counts(first["layer"], first["expert_id"], second["expert_id"])
    joint = joint + joint.transpose(0, 2, 1)
    same = np.arange(joint.shape[-1])
    joint[:, same, same] = np.nan
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
    experts = len(found.columns)
    every = pd.MultiIndex.from_product([sorted(layer.unique()), range(experts)])
    return found.reindex(every, fill_value=0).to_numpy(float).reshape(-1, experts, experts)


PANDAS: dict[str, tuple[str | None, Callable[[pd.DataFrame], np.ndarray]]] = {
    "expert_share": ("domain", share),
    "coactivation": (None, coactivated),
    "repetition": (None, repeated),
    "transitions": (None, moved),
}

if __name__ == "__main__":
    main()
