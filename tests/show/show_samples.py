"""A small trace whose domains are routed differently, and statistics of it with the layout that mixlens.stats gives."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from mixlens.trace.trace import Trace

DOMAINS = ("arxiv", "github", "mathematics", "wikipedia")
N_LAYERS, N_EXPERTS, TOP_K = 4, 8, 2

HOSTILE = [
    "▁<script>alert(1)</script>",
    "</script>",
    "<img src=x onerror=alert(2)>",
    "▁🙂",
    "▁שלום",
    "<0xE2>",
    "▁$x_1$",
    "w" * 10_000,
    '▁"quoted"&amp;',
    "\n",
]
WORDS = ["▁the", "▁router", "▁chooses", "▁an", "▁expert", ",", "▁and", "▁token", "s", ".", "▁layer", "▁of"]


def make_trace(domains=DOMAINS, documents=6, tokens=60, layers=N_LAYERS, seed=0, column="domain") -> Trace:
    rng = np.random.default_rng(seed)
    n_sequences = len(domains) * documents
    n = n_sequences * tokens
    domain = np.repeat(np.arange(len(domains)), documents * tokens)
    logits = rng.normal(size=(n, layers, N_EXPERTS)) * 1.5
    for layer in range(layers):
        favourite = (domain * 3 + layer) % N_EXPERTS
        logits[np.arange(n), layer, favourite] += 1.2 * layer / max(layers - 1, 1) + 0.2
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.argsort(-logits, -1)[..., :TOP_K]
    weight = np.take_along_axis(probability, chosen, -1)
    words = len(WORDS)
    token_id = rng.integers(words, size=n)
    token_id[: len(HOSTILE)] = words + np.arange(len(HOSTILE))
    logprob = -rng.exponential(2.0, size=n).astype(np.float32)
    position = np.tile(np.arange(tokens), n_sequences)
    logprob[position == 0] = np.nan
    made = Trace.from_arrays(
        chosen,
        n_experts=N_EXPERTS,
        weight=weight / weight.sum(-1, keepdims=True),
        router_logits=logits,
        tokens={"sequence": np.repeat(np.arange(n_sequences), tokens), "token_id": token_id, "logprob": logprob},
        sequences=pd.DataFrame(
            {
                "document_id": [f"{domains[i // documents]}-{i}" for i in range(n_sequences)],
                column: [domains[i // documents] for i in range(n_sequences)],
            }
        ),
        meta={"model": {"name": "sample"}, "settings": {"dtype": "float32"}, "versions": {"numpy": np.__version__}},
    )
    made._vocabulary = pd.Series([*WORDS, *HOSTILE])
    return made


def emptied_trace() -> Trace:
    """Three sequences, each with words and experts of its own, of which a selection left 3, 0 and 3 tokens."""
    of_token = np.repeat([0, 1, 2], [6, 1, 6])
    made = Trace.from_arrays(
        np.tile(of_token[:, None, None] + [0, 1], (1, 2, 1)),
        n_experts=4,
        tokens={"sequence": of_token, "token_id": of_token},
        sequences=pd.DataFrame({"document_id": ["a", "b", "c"], "task": "quiz", "sample_id": [2, 1, 0]}),
    )
    made._vocabulary = pd.Series(["alpha", "beta", "gamma"])
    return made.select(positions=(3, 100))


def share_of(trace: Trace) -> xr.Dataset:
    """Expert share by domain, by nested loops, with a made-up interval of ±2 %."""
    ids, sequence = trace.read("expert_id"), trace.read("sequence")
    domains = list(dict.fromkeys(trace.sequences["domain"]))
    of_token = trace.sequences["domain"].to_numpy()[sequence]
    estimate = np.stack(
        [
            [np.bincount(ids[of_token == d, layer].ravel(), minlength=N_EXPERTS) for layer in range(trace.n_layers)]
            for d in domains
        ]
    ).astype(float)
    estimate /= estimate.sum(-1, keepdims=True)
    data = dataset(
        estimate,
        {"domain": domains, "layer": trace.layers, "expert": np.arange(N_EXPERTS)},
        n=("domain", [int((of_token == d).sum()) for d in domains]),
        n_documents=("domain", [int((trace.sequences["domain"] == d).sum()) for d in domains]),
        statistic="expert_share",
        unit="fraction",
        uniform=1 / N_EXPERTS,
        cells=estimate.size,
    )
    return data.assign(survives=np.abs(data["estimate"] - 1 / N_EXPERTS) > 0.05)


def dataset(estimate, coords, *, n, n_documents, half=0.02, **attrs) -> xr.Dataset:
    """A statistic as mixlens.stats would return it, around a given estimate."""
    dims = tuple(coords)
    variables = {
        "estimate": (dims, estimate),
        "ci_low": (dims, estimate - half),
        "ci_high": (dims, estimate + half),
        "n": n,
        "n_documents": n_documents,
    }
    defaults = {"level": 0.95, "replicates": 1000, "seed": 0, "model": "sample", "formula": "f", "source": "s"}
    return xr.Dataset(variables, coords, attrs={**defaults, **attrs})
