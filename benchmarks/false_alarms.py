"""How often a family of cells has a survivor where nothing is to be found, of few documents and many.

``make false-alarms`` writes benchmarks/results/false-alarms.json and prints its rows. A row is a family of cells, such
as the shares of eight experts in four layers, under data whose documents differ but have no effect: the share of drawn
families in which any cell survives, and its 95 % interval (Clopper and Pearson). The aim is at most 5 %. Options draw
some of the rows, which take the place of the same rows in the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from coverage_of_intervals import CLUSTERING, DOCUMENTS, EXPERTS, importance, lengths
from measuring import header
from scipy.special import betaincinv

import mixlens as ml
from mixlens.evals.log import Log

LAYERS = 4
Random = np.random.Generator
Family = Callable[[Random, int, float], xr.Dataset]


def routed(rng: Random, n: int, spread: float, *, domains: int = 1, longer: float = 1.0) -> ml.Trace:
    """Uniform routing but for what each document prefers; documents of the second domain are `longer` times as long."""
    domain = np.arange(n) % domains
    long = (lengths(rng, n) * np.where(domain == 1, longer, 1)).astype(int)
    document = np.repeat(np.arange(n), long)
    logits = rng.normal(0, spread, (n, LAYERS, EXPERTS))[document] + rng.gumbel(size=(len(document), LAYERS, EXPERTS))
    return traced(logits, document, domain)


def traced(logits: np.ndarray, document: np.ndarray, domain: np.ndarray) -> ml.Trace:
    return ml.Trace.from_arrays(
        np.argpartition(-logits, (0, 1), axis=-1)[..., :2],
        n_experts=EXPERTS,
        tokens={"sequence": document},
        sequences=pd.DataFrame({"domain": domain}),
    )


def disturbed(rng: Random, n: int, spread: float) -> tuple[ml.Trace, ml.Trace]:
    """Two traces of the same tokens, of which neither is more disturbed than the other."""
    document = np.repeat(np.arange(n), lengths(rng, n))
    logits = rng.normal(0, spread, (n, LAYERS, EXPERTS))[document] + rng.gumbel(size=(len(document), LAYERS, EXPERTS))
    changes = rng.normal(0, 0.3 * spread, (2, n, LAYERS, EXPERTS))[:, document]
    a, b = (
        traced(logits + change + 0.2 * rng.normal(size=logits.shape), document, np.zeros(n, int)) for change in changes
    )
    return a, b


def changes(rng: Random, n: int, spread: float) -> xr.Dataset:
    """Losses without each expert, no worse on average: alike up and down, or (strong) few documents far up."""
    shape, long = (n, LAYERS, EXPERTS), lengths(rng, n)
    change = rng.laplace(size=shape) if spread < 1 else rng.exponential(size=shape) - 1
    sums = {"effect": change * long[:, None, None], "chosen": np.ones(shape), "long": long, "loss": long[:, None]}
    return ml.stats.expert_importance(importance(sums, pd.DataFrame(index=range(n))))


def subjects(rng: Random, n: int, spread: float) -> xr.Dataset:
    """57 subjects of n questions each, answered by two equal models whose answers flip seldom or (strong) often."""
    right = rng.random((57, n)) < rng.beta(4, 2, (57, 1))
    logs = []
    for name in "ab":
        answers = right ^ (rng.random(right.shape) < 0.2 * spread)
        samples = [
            {
                "task": f"mmlu_{task}",
                "sample_id": i,
                "doc_hash": f"{task} {i}",
                "correct": float(answer),
                "metrics": {"acc": float(answer)},
                **NOT_READ,
            }
            for task, of_task in enumerate(answers)
            for i, answer in enumerate(of_task)
        ]
        tasks = {f"mmlu_{task}": OF_MMLU for task in range(57)}
        logs.append(Log(samples, {"model": {"name": name}, "tasks": tasks}))
    return ml.compare(*logs).table.query("task != 'mmlu'").to_xarray()


OF_MMLU = {
    "benchmark": "mmlu", "protocol": "mmlu_5shot", "version": "1", "primary": "acc", "chat": False,
    "metrics": {"acc": {"aggregation": "mean", "higher_is_better": True}},
}  # fmt: skip
NOT_READ = dict.fromkeys(("prompt", "target", "response"), "") | dict.fromkeys(
    ("group", "responses", "choices", "logprobs", "gold")
)


def few_and_short(rng: Random, n: int, spread: float) -> ml.Trace:
    return routed(rng, n, spread, domains=4, longer=1 / 6)


def against_others(trace: ml.Trace) -> ml.Trace:
    """With two domains: the second one, and all others."""
    table = trace.sequences.assign(domain=trace.sequences["domain"] == 1)
    return ml.Trace.from_arrays(
        trace.read("expert_id"), n_experts=EXPERTS, tokens={"sequence": trace.read("sequence")}, sequences=table
    )


FAMILIES: dict[str, Family] = {
    "expert_share": lambda rng, n, s: ml.stats.expert_share(routed(rng, n, s)),
    "domain_specialization": lambda rng, n, s: ml.stats.domain_specialization(routed(rng, n, s, domains=2)),
    "domain_information": lambda rng, n, s: ml.stats.domain_information(routed(rng, n, s, domains=2)),
    "domain_distance": lambda rng, n, s: ml.stats.domain_distance(routed(rng, n, s, domains=3)),
    "contrast": lambda rng, n, s: ml.stats.contrast(
        routed(rng, n, s, domains=2), ml.stats.expert_share, by="domain", a=0
    ),
    "contrast, few and long against many": lambda rng, n, s: ml.stats.contrast(
        routed(rng, n, s, domains=4, longer=8), ml.stats.expert_share, by="domain", a=1
    ),
    "contrast, few and short against many": lambda rng, n, s: ml.stats.contrast(
        few_and_short(rng, n, s), ml.stats.expert_share, by="domain", a=1
    ),
    "domain_information, few and short against many": lambda rng, n, s: ml.stats.domain_information(
        against_others(few_and_short(rng, n, s))
    ),
    "domain_distance, few and short against many": lambda rng, n, s: ml.stats.domain_distance(
        against_others(few_and_short(rng, n, s))
    ),
    "contrast of two traces": lambda rng, n, s: ml.stats.contrast(*disturbed(rng, n, s), ml.stats.expert_share),
    "moved": lambda rng, n, s: ml.stats.moved(*disturbed(rng, n, s))[["survives"]].sel(measure="share_change"),
    "expert_importance": changes,
    "repetition": lambda rng, n, s: ml.stats.repetition(routed(rng, n, s))[["survives"]].sel(choice="either"),
    "coactivation": lambda rng, n, s: ml.stats.coactivation(routed(rng, n, s)),
    "transitions": lambda rng, n, s: ml.stats.transitions(routed(rng, n, s)),
    "flips": lambda rng, n, s: ml.stats.flips(*disturbed(rng, n, s)),
    "MMLU subjects": subjects,
}
ALIKE = ("repetition", "coactivation", "transitions", "flips")  # which documents that prefer experts do have


def alarms(family: str, n: int, spread: float, drawn: int) -> dict:
    """The numbers of a row; null where so few documents are refused."""
    rng, found = np.random.default_rng([n, int(100 * spread)]), 0
    for _ in range(drawn):
        try:
            found += bool(FAMILIES[family](rng, n, spread)["survives"].any())
        except ml.BadInput:
            return {"alarms": None}
    low = betaincinv(found, drawn - found + 1, 0.025) if found else 0.0
    high = betaincinv(found + 1, drawn - found, 0.975) if found < drawn else 1.0
    return {"alarms": found / drawn, "ci_low": round(float(low), 4), "ci_high": round(float(high), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", type=int, default=1000, help="drawn for every row of the table")
    parser.add_argument("--documents", type=int, nargs="*", default=DOCUMENTS)
    parser.add_argument("--only", nargs="*", default=list(FAMILIES), help="names of families")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "false-alarms.json")
    options = parser.parse_args()
    measured_on = header()
    before = json.loads(options.out.read_text("utf-8"))["false_alarms"] if options.out.exists() else []
    rows = {(row["family"], row["clustering"], row["documents"]): row for row in before}
    for n in options.documents:
        for family in options.only:
            for clustering, spread in clusterings(family).items():
                row = {"family": family, "clustering": clustering, "documents": n, "families": options.families}
                rows[family, clustering, n] = row | alarms(family, n, spread, options.families)
                print(json.dumps(rows[family, clustering, n]), flush=True)
                write(options.out, rows, measured_on)


def clusterings(family: str) -> dict[str, float]:
    if family in ALIKE:
        return {"none": 0.0}
    return {"none": 0.0, **CLUSTERING} if "few and short" in family else CLUSTERING


def write(out: Path, rows: dict[tuple[str, str, int], dict], about: dict) -> None:
    """The table in order, row by row; what takes long may be stopped."""
    ordered = [rows[key] for family in FAMILIES for key in sorted(rows, key=lambda key: key[1:]) if key[0] == family]
    text = ",\n  ".join(map(json.dumps, ordered))
    head = json.dumps({**about, "level": 0.95}, indent=1)[:-2]
    out.write_text(f'{head},\n "false_alarms": [\n  {text}\n ]\n}}\n', "utf-8")


if __name__ == "__main__":
    main()
