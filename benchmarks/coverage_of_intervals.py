"""How often intervals hold the truth: every statistic, of few documents and many, weakly and strongly clustered.

``make coverage-of-intervals`` writes benchmarks/results/coverage-of-intervals.json and prints its rows. A row has the
share of the 95 % intervals shown that hold the truth, and null where none is shown; its standard error; and the share
for the cell, such as an expert, that is held least often. A layer of a drawn trace, or a group of documents, is an
experiment of its own. The truth is exact, or that of a sample of 24,000 documents; for what is learnt from as many
documents as there are (``vocabulary_specialization``) it is the mean of all experiments.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from measuring import header

import mixlens as ml
from mixlens.core.bootstrap import DEFAULT
from mixlens.core.intervals import Difference, Mean
from mixlens.stats import impact as impacts
from mixlens.stats.measured import Measured, summarised

SHARES = np.array([0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04])
EXPERTS, LAYERS, TYPES = 8, 16, 16
DOCUMENTS = (3, 5, 8, 20, 100)
MANY = 24_000
CLUSTERING = {"weak": 0.25, "strong": 1.0}  # standard deviation of what is a document's own, in logits

Random = np.random.Generator
Statistic = Callable[..., xr.Dataset]
_fixed = np.random.default_rng(1)
# The population: logits of experts, of token types, and of domains.
OF_EXPERT, OF_TYPE = np.log(SHARES), _fixed.normal(0, 0.7, (TYPES, EXPERTS))
OF_DOMAIN = 0.5 * _fixed.normal(0, 1, (2, EXPERTS))
TYPE_SHARES = (1 / np.arange(1, TYPES + 1)) / (1 / np.arange(1, TYPES + 1)).sum()


def lengths(rng: Random, n: int) -> np.ndarray:
    return np.maximum(10, rng.lognormal(-0.125, 0.5, n) * 60).astype(int)


def documents_of(n: int, groups: int) -> pd.DataFrame:
    return pd.DataFrame({"document_id": np.arange(n * groups), "group": np.arange(n * groups) % groups})


def routed(rng: Random, n: int, spread: float, layers: int, *, by_domain: float = 0.0, groups: int = 1) -> ml.Trace:
    """Tokens choose the two largest logits: of the expert, the token, the document and chance."""
    long = lengths(rng, n * groups)
    document = np.repeat(np.arange(n * groups), long)
    own_types = rng.standard_gamma(np.broadcast_to(TYPE_SHARES * 4 / spread, (n * groups, TYPES)))
    edges = (own_types / own_types.sum(-1, keepdims=True)).cumsum(-1)[document, :-1]
    token_id = (rng.random(len(document))[:, None] > edges).sum(-1)
    of_document = rng.normal(0, spread, (n * groups, layers, EXPERTS)) + OF_EXPERT
    of_document += by_domain * OF_DOMAIN[np.arange(n * groups) % 2][:, None]
    logits = of_document[document] + OF_TYPE[token_id][:, None] + rng.gumbel(size=(len(document), layers, EXPERTS))
    return traced(logits, document, token_id, n, groups)


def traced(logits: np.ndarray, document: np.ndarray, token_id: np.ndarray, n: int, groups: int) -> ml.Trace:
    order = np.argpartition(-logits, (0, 1), axis=-1)[..., :2]
    chosen = np.exp(np.take_along_axis(logits, order, -1))
    table = documents_of(n, groups).assign(domain=np.arange(n * groups) % 2)
    return ml.Trace.from_arrays(
        order,
        n_experts=EXPERTS,
        router_logits=logits,
        weight=chosen / chosen.sum(-1, keepdims=True),
        tokens={"sequence": document, "token_id": token_id},
        sequences=table,
    )


def routed_twice(rng: Random, n: int, spread: float, layers: int, groups: int) -> tuple[ml.Trace, ml.Trace]:
    """A trace, and one of the same tokens whose logits are disturbed, in some documents more than in others."""
    one = routed(rng, n, spread, layers, groups=groups)
    document, logits = one.read("sequence"), one.read("router_logits")
    size = 0.4 * np.exp(rng.normal(0, spread / 2, (n * groups, layers)))[document]
    disturbed = logits + size[..., None] * rng.normal(size=logits.shape)
    return one, traced(disturbed, document, one.read("token_id"), n, groups)


def predicted_twice(rng: Random, n: int, spread: float, groups: int) -> tuple[ml.Trace, ml.Trace]:
    """Losses of two runs that a document makes larger for both, and for one of them."""
    document = np.repeat(np.arange(n * groups), lengths(rng, n * groups))
    ids = np.zeros((len(document), 1, 1), int)
    of_both, of_one = rng.gamma(2 / spread, spread, n * groups), rng.normal(0.05, 0.1 * spread, n * groups)
    loss = rng.exponential(of_both[document])
    other = np.maximum(loss + of_one[document] + rng.normal(0, 0.1, len(document)), 0)
    return tuple(
        ml.Trace.from_arrays(
            ids, n_experts=2, tokens={"sequence": document, "logprob": -value}, sequences=documents_of(n, groups)
        )
        for value in (loss, other)
    )  # type: ignore[return-value]


def by_document(rng: Random, n: int, spread: float, layers: int, groups: int) -> dict[str, np.ndarray]:
    """Sums over each document, as experiments measure them: of what grows with a document, and of changes."""
    long = lengths(rng, n * groups).astype(np.int64)
    inner = (n * groups, layers, EXPERTS)
    own = rng.standard_gamma(np.broadcast_to(SHARES * 8 / spread, inner))
    chosen = rng.multinomial(long[:, None], own / own.sum(-1, keepdims=True))
    effect = rng.normal(SHARES, 0.5 * spread * SHARES, inner) * chosen + 0.05 * rng.normal(size=inner) * np.sqrt(chosen)
    size = rng.gamma(4 / spread, spread / 4, inner)
    return {
        "long": long,
        "chosen": chosen,
        "effect": effect,
        "norm": size * chosen,
        "error": 0.01 * rng.gamma(2 / spread, spread, inner) * size * chosen,
        "loss": 2 * rng.gamma(4 / spread, spread / 4, (n * groups, 5)).cumsum(1) * long[:, None],
        "same": rng.binomial(long[:, None], rng.beta(9 / spread, 1 / spread, (n * groups, 5))),
        "shared": rng.binomial(long[:, None], rng.beta(9 / spread, 1 / spread, (n * groups, layers))),
    }


def importance(of: dict[str, np.ndarray], columns: pd.DataFrame) -> xr.Dataset:
    inner = ("document", "layer", "expert")
    data = {"change": (inner, of["effect"]), "chosen": (inner, of["chosen"]), "value": ("document", of["loss"][:, 0])}
    data |= dict.fromkeys(("tokens", "length"), ("document", of["long"]))
    coords = {"layer": range(of["effect"].shape[1]), "expert": range(EXPERTS)}
    attrs = {"kind": "importance", "model": "", "metric": "loss", "unit": "nats", "how": "", "top_k": 1}
    return xr.Dataset(data, coords | {str(n): ("document", columns[n]) for n in columns}, attrs)  # type: ignore[arg-type]


def swept(of: dict[str, np.ndarray], columns: pd.DataFrame) -> xr.Dataset:
    chosen = np.broadcast_to(of["chosen"][:, None], (len(columns), 4, *of["chosen"].shape[1:]))
    data = {"loss": (("document", "k"), of["loss"][:, :4]), "chosen": (("document", "k", "layer", "expert"), chosen)}
    data |= {"first_weight": (("document", "k", "layer"), chosen[..., 0].astype(float))}
    data |= dict.fromkeys(("tokens", "length"), ("document", of["long"]))
    coords = {"k": [1, 2, 3, 4], "layer": range(chosen.shape[2]), "expert": range(EXPERTS)}
    attrs = {"kind": "topk", "model": "", "own_k": 2}
    return xr.Dataset(data, coords | {str(n): ("document", columns[n]) for n in columns}, attrs)  # type: ignore[arg-type]


def changed(of: dict[str, np.ndarray], columns: pd.DataFrame) -> impacts.Impact:
    arrays = dict.fromkeys(("tokens", "length"), of["long"])
    arrays |= {"loss": of["loss"], "kl": 0.1 * of["loss"], "same_top": 1.0 * of["same"], "chosen": of["chosen"]}
    arrays |= {"same_first": of["shared"], "shared": of["shared"], "error": of["error"], "size": of["norm"]}
    arrays["weight_error"] = np.zeros((1, of["chosen"].shape[1], EXPERTS, 3))
    names = {"model": {"name": "a"}, "other": {"name": "b"}, "top_k": 1, "force_weights": "own"}
    return impacts.Impact(Measured(arrays, columns, names))


def contributed(of: dict[str, np.ndarray], columns: pd.DataFrame, measure: str) -> xr.Dataset:
    """One token for each choice would be slow: the sums are handed over where they are added up."""
    kind, sums = (Difference, of["effect"]) if measure == "logit" else (Mean, of["norm"])
    inner = ("document", "layer", "expert")
    documents = xr.Dataset(
        {"sum": (inner, sums), "chosen": (inner, of["chosen"]), "length": ("document", of["long"])},
        {"layer": range(sums.shape[1]), "expert": range(EXPERTS), "group": ("document", columns["group"])},
    )
    experts = {"expert": range(EXPERTS)}
    return summarised(
        documents,
        ("sum", "chosen"),
        lambda sums: kind(sums["sum"], sums["chosen"]),
        experts,
        "group",
        DEFAULT,
        tokens="chosen",
    )


def found(rng: Random, n: int, spread: float, layers: int, groups: int, names: set[str]) -> Iterator[tuple[str, Any]]:
    """Name and Dataset of every statistic of one drawing, with the dimension of its experiments first."""
    stats = ml.stats

    def wanted(*of: str) -> bool:
        return not names or bool(names & set(of))

    trace = routed(rng, n, spread, layers)
    for name in (
        "expert_share", "load_balance", "routing_entropy", "router_confidence", "repetition", "coactivation",
        "transitions",
    ):  # fmt: skip
        if wanted(name):
            yield name, getattr(stats, name)(trace)
    if wanted("position_profile"):
        yield "position_profile", stats.position_profile(trace, edges=(0, 4, 16))
    for name in ("vocabulary_specialization", "predictability"):
        if wanted(name) and layers == LAYERS:
            yield name, getattr(stats, name)(trace)
    if wanted("domain_specialization", "domain_information") and n >= 4:
        split = routed(rng, n, spread, layers, by_domain=1.0)
        yield "domain_specialization", stats.domain_specialization(split)
        yield "domain_information", stats.domain_information(split)
    if wanted("agreement", "flips", "flips_by_margin", "moved"):
        pair = routed_twice(rng, n, spread, 2, groups)
        yield "flips", stats.flips(*pair, by="group").isel(layer=1)
        for name in ("agreement", "flips_by_margin", "moved"):
            yield name, getattr(stats, name)(*pair, by="group")
    if wanted("next_tokens"):
        yield "next_tokens", stats.next_tokens(*predicted_twice(rng, n, spread, groups), by="group")
    if wanted("expert_importance", "topk_sweep", "expert_contribution", "impact"):
        of, columns = by_document(rng, n, spread, 1, groups), documents_of(n, groups)
        yield "expert_importance", stats.expert_importance(importance(of, columns), by="group")
        sweep = stats.topk_sweep(swept(of, columns), by="group")
        yield "topk_sweep", sweep
        yield "topk_sweep change", _renamed(sweep, "change", "change_low", "change_high")
        for measure in ("logit", "norm"):
            yield f"expert_contribution {measure}", contributed(of, columns, measure)
        impact = changed(of, columns)
        for name in ("quality", "split", "routing", "experts"):
            yield f"impact {name}", getattr(impact, name)(by="group")


def _renamed(data: xr.Dataset, *names: str) -> xr.Dataset:
    return xr.Dataset({to: data[name] for to, name in zip(("estimate", "ci_low", "ci_high"), names, strict=True)})


def joint() -> np.ndarray:
    """Shares of pairs of choices that depend on each other."""
    pairs = np.outer(SHARES, SHARES[::-1]) * np.exp(np.random.default_rng(1).normal(0, 0.6, (8, 8)))
    return pairs / pairs.sum()


def information(rng: Random, n: int, spread: float, truth: np.ndarray) -> np.ndarray:
    """Intervals of the mutual information of two layers' choices [bound, experiment], drawn in documents."""
    document = np.repeat(np.arange(n), lengths(rng, n))
    pairs = np.empty((len(document), LAYERS), int)
    for layer in range(LAYERS):
        own = rng.standard_gamma(np.broadcast_to(truth.ravel() * 8 / spread**2, (n, 64)))
        edges = (own / own.sum(-1, keepdims=True)).cumsum(-1)[document, :-1]
        pairs[:, layer] = (rng.random(len(document))[:, None] > edges).sum(-1)
    both = np.stack([pairs // 8, pairs % 8], axis=-1).reshape(len(pairs), 2 * LAYERS, 1)
    data = ml.stats.transitions(ml.Trace.from_arrays(both, n_experts=8, tokens={"sequence": document}))
    return np.stack([data[name].to_numpy()[::2] for name in ("mi_ci_low", "mi_ci_high")])


def cells(name: str, data: xr.Dataset) -> Iterator[tuple[str, np.ndarray]]:
    """(statistic or its measure, [estimate, low, high; experiment, cell])."""
    along = next((dim for dim in ("measure", "choice", "part") if dim in data["estimate"].dims), None)
    parts = [(name, data)] if along is None else [(f"{name} {m}", data.sel({along: m})) for m in data[along].values]
    for called, part in parts:
        if called in ("domain_information permuted", "next_tokens same_top", "next_tokens kl_at_least"):
            continue
        first = next(dim for dim in ("group", "layer") if dim in part["estimate"].dims)
        arrays = [part[v].transpose(first, ...).to_numpy() for v in ("estimate", "ci_low", "ci_high")]
        yield called, np.stack([array.reshape(len(array), -1) for array in arrays])


def coverage(n: int, spread: float, experiments: int, truths: dict[str, np.ndarray], names: set[str]) -> list[dict]:
    """Rows of one number of documents."""
    rng, drawn = np.random.default_rng([n, int(100 * spread)]), {}
    for _ in range(-(-experiments // LAYERS)):
        for name, data in found(rng, n, spread, LAYERS, LAYERS, names):
            for called, arrays in cells(name, data):
                drawn.setdefault(called, []).append(arrays)
        if not names or "mutual_information" in names:
            low, high = information(rng, n, spread, joint())
            arrays = np.stack([low, low, high])[..., None]
            drawn.setdefault("transitions mutual_information", []).append(arrays)
    rows = []
    for called, parts in drawn.items():
        estimate, low, high = np.concatenate(parts, axis=1)
        truth = truths.get(called, np.nanmean(estimate, axis=0))
        shown = np.isfinite(low) & np.isfinite(truth)
        held = np.where(shown, (low <= truth) & (truth <= high), np.nan)
        row = {"statistic": called, "documents": n, "experiments": int(shown.any(1).sum()), "coverage": None}
        if shown.any():
            of_each = np.nanmean(held[shown.any(1)], axis=1)
            enough = shown.mean(0) > 0.5
            row |= {
                "coverage": round(float(of_each.mean()), 4),
                "error": round(float(of_each.std() / np.sqrt(len(of_each))), 4),
                "least": round(float(np.nanmean(held[:, enough], axis=0).min()), 4) if enough.any() else None,
            }
        rows.append(row)
    return rows


def truths_of(spread: float, names: set[str]) -> dict[str, np.ndarray]:
    """True values by statistic [cell], from one very large experiment."""
    rng = np.random.default_rng(7)
    true = {}
    for name, data in found(rng, MANY, spread, 2, 1, names):
        for called, arrays in cells(name, data):
            true[called] = arrays[0, 0]
    pairs = joint()
    bits = (pairs * np.log2(pairs / np.outer(pairs.sum(1), pairs.sum(0)))).sum()
    true["transitions mutual_information"] = np.array([bits])
    return true


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=2000, help="of every row of the table")
    parser.add_argument("--documents", type=int, nargs="*", default=DOCUMENTS)
    parser.add_argument("--only", nargs="*", default=[], help="names of statistics")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "coverage-of-intervals.json")
    options = parser.parse_args()
    measured_on, rows = header(), []
    for clustering, spread in CLUSTERING.items():
        truths = truths_of(spread, set(options.only))
        for n in options.documents:
            for row in coverage(n, spread, options.experiments, truths, set(options.only)):
                rows.append({"clustering": clustering, **row})
                print(json.dumps(rows[-1]), flush=True)
    text = ",\n  ".join(json.dumps(row) for row in rows)
    about = json.dumps({**measured_on, "level": 0.95, "experiments": options.experiments}, indent=1)[:-2]
    options.out.write_text(f'{about},\n "coverage": [\n  {text}\n ]\n}}\n', "utf-8")


if __name__ == "__main__":
    main()
