"""How often intervals hold the truth: statistics of documents drawn around known shares, few and many, alike and not.

``make coverage-of-intervals`` writes benchmarks/results/coverage-of-intervals.json and prints its rows. Every cell is
the share of the 95 % intervals shown that hold the truth, and null where none is shown; a layer of a drawn trace is an
experiment of its own.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import numpy as np

import mixlens as ml
from mixlens.core.run_dir import now, versions

SHARES = np.array([0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04])
DOCUMENTS = (2, 3, 5, 8, 20, 40, 100)
CLUSTERING = {"strong": 8.0, "weak": 100.0}  # concentration of the Dirichlet that a document's shares are drawn from
LAYERS = 16


def joint() -> np.ndarray:
    """Shares of pairs of choices that depend on each other."""
    pairs = np.outer(SHARES, SHARES[::-1]) * np.exp(np.random.default_rng(1).normal(0, 0.6, (8, 8)))
    return pairs / pairs.sum()


def drawn(rng: np.random.Generator, shares: np.ndarray, n: int, concentration: float) -> tuple[np.ndarray, np.ndarray]:
    """Choices [token, layer], and the document of each token; lengths are lognormal around 60."""
    lengths = np.maximum(10, rng.lognormal(-0.125, 0.5, n) * 60).astype(int)
    document = np.repeat(np.arange(n), lengths)
    layers = []
    for _ in range(LAYERS):
        own = rng.standard_gamma(np.broadcast_to(shares * concentration, (n, len(shares))))
        edges = (own / own.sum(-1, keepdims=True)).cumsum(-1)[document, :-1]
        layers.append((rng.random(len(document))[:, None] > edges).sum(-1))
    return np.stack(layers, axis=1), document


def covered(rng: np.random.Generator, n: int, concentration: float, seed: int) -> dict[str, np.ndarray]:
    """For each statistic whether the interval of every layer holds the truth."""
    bootstrap = ml.stats.Bootstrap(seed=seed, replicates=400)
    ids, document = drawn(rng, SHARES, n, concentration)
    trace = ml.Trace.from_arrays(ids[..., None], n_experts=8, tokens={"sequence": document})
    balance = ml.stats.load_balance(trace, bootstrap=bootstrap)
    pairs, document = drawn(rng, (truth := joint()).ravel(), n, concentration)
    both = np.stack([pairs // 8, pairs % 8], axis=-1).reshape(len(pairs), 2 * LAYERS, 1)
    moves = ml.stats.transitions(
        ml.Trace.from_arrays(both, n_experts=8, tokens={"sequence": document}), bootstrap=bootstrap
    ).isel(layer=slice(None, None, 2))
    information = (truth * np.log2(truth / np.outer(truth.sum(1), truth.sum(0)))).sum()
    return {
        "expert_share": _holds(ml.stats.expert_share(trace, bootstrap=bootstrap), SHARES),
        "load_balance cv": _holds(balance.sel(measure="cv"), SHARES.std() * 8),
        "load_balance max_over_mean": _holds(balance.sel(measure="max_over_mean"), SHARES.max() * 8),
        "transitions": _holds(moves, truth / truth.sum(1, keepdims=True)),
        "transitions mutual information": _holds(moves, information, "mi_ci_low", "mi_ci_high"),
    }


def _holds(data, truth, low: str = "ci_low", high: str = "ci_high") -> np.ndarray:
    """Whether the intervals that are shown hold the truth."""
    held = ((data[low] <= truth) & (truth <= data[high])).to_numpy()
    return held[np.isfinite(data[low].to_numpy())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", type=int, default=2000, help="of every cell of the table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "coverage-of-intervals.json")
    options = parser.parse_args()
    rows = []
    for clustering, concentration in CLUSTERING.items():
        for n in DOCUMENTS:
            rng, found = np.random.default_rng(n), {}
            for seed in range(-(-options.experiments // LAYERS)):
                for name, hits in covered(rng, n, concentration, seed).items():
                    found.setdefault(name, []).append(hits)
            shown = {name: np.concatenate(hits) for name, hits in found.items()}
            row = {name: round(float(hits.mean()), 4) if len(hits) else None for name, hits in shown.items()}
            rows.append({"clustering": clustering, "documents": n, **row})
            print(json.dumps(rows[-1]), flush=True)
    about = {
        "created": now(),
        "machine": platform.machine(),
        "level": 0.95,
        "experiments": options.experiments,
        "versions": versions("mixlens", "numpy", "scipy"),
    }
    options.out.write_text(json.dumps({**about, "coverage": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
