from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mixlens.trace.trace import Trace


@pytest.fixture
def make_trace() -> Callable[..., Trace]:
    """A random trace with documents of several sequences and unequal lengths, two domains and two sources."""

    def make(
        *, seed=0, n_documents=9, n_layers=4, n_experts=8, top_k=2, logits=True, weight=True, vocabulary=12, repeat=1
    ) -> Trace:
        rng = np.random.default_rng(seed)
        rows = [
            {"document_id": f"d{d}", "domain": "yx"[d % 2], "source": "ab"[d % 4 // 2]}
            for d in range(n_documents)
            for _ in range(rng.integers(1, 4))
        ]
        lengths = rng.integers(1, 30, len(rows))
        arrays = _random_arrays(rng, rows, lengths, n_layers, n_experts, top_k, vocabulary)
        # The same documents again, under other names.
        rows = [{**row, "document_id": f"{row['document_id']}-{i}"} for i in range(repeat) for row in rows]
        lengths = np.tile(lengths, repeat)
        arrays = {name: np.concatenate([values] * repeat) for name, values in arrays.items()}
        return Trace.from_arrays(
            arrays["expert_id"],
            n_experts=n_experts,
            weight=arrays["weight"] if weight else None,
            router_logits=arrays["router_logits"] if logits else None,
            tokens={"sequence": np.repeat(np.arange(len(lengths)), lengths), "token_id": arrays["token_id"]},
            sequences=pd.DataFrame(rows),
            meta={"model": {"name": "random"}},
        )

    return make


def _random_arrays(rng, rows, lengths, n_layers, n_experts, top_k, vocabulary):
    """Routing that depends on the domain, on the token and on the layer before, so that no statistic is trivial."""
    n = int(lengths.sum())
    token_id = rng.integers(0, vocabulary, n)
    domain = np.repeat([row["domain"] == "x" for row in rows], lengths)
    of_token = rng.normal(size=(vocabulary, n_layers, n_experts))
    of_domain = rng.normal(size=(2, n_layers, n_experts))
    logits = rng.normal(size=(n, n_layers, n_experts)) + of_token[token_id] + of_domain[domain.astype(int)]
    for layer in range(1, n_layers):
        logits[:, layer] += 0.5 * logits[:, layer - 1]
    logits = logits.astype(np.float16).astype(np.float32)
    expert_id = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
    chosen = np.take_along_axis(np.exp(logits), expert_id, -1)
    return {
        "token_id": token_id,
        "router_logits": logits,
        "expert_id": expert_id,
        "weight": chosen / chosen.sum(-1, keepdims=True),
    }


@pytest.fixture
def tokens_of() -> Callable[[Trace], list[SimpleNamespace]]:
    """Every token of a trace as an object with plain Python values, for oracles in nested loops."""

    def tokens(trace: Trace) -> list[SimpleNamespace]:
        names = ("sequence", "position", "token_id", "expert_id", "weight", "router_logits")
        columns = {name: trace.read(name).tolist() for name in names if name in trace.signals}
        out = []
        for values in zip(*columns.values(), strict=True):
            token = SimpleNamespace(**dict(zip(columns, values, strict=True)))
            token.row = trace.sequences.loc[token.sequence]
            out.append(token)
        return out

    return tokens


@pytest.fixture
def in_small_blocks() -> Callable[[Trace], Trace]:
    """The same trace, read a few tokens at a time."""

    def shrink(trace: Trace) -> Trace:
        whole = trace.blocks
        trace.blocks = lambda *names, tokens=0: whole(*names, tokens=40)  # type: ignore[method-assign]
        return trace

    return shrink
