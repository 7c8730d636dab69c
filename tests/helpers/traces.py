"""Small traces with the plain arrays they were made of, for oracles that read the arrays and never the trace.

case = made(lengths=(4, 1, 7), layers=(1, 3))     # by hand
@given(made_traces())                              # or drawn by hypothesis
def test_it(case): ...
case.trace, case.expert_id, case.sequences
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from hypothesis import strategies as st

import mixlens as ml


@dataclass(frozen=True, eq=False)
class Made:
    """A trace as arrays. Every float is exact in half precision, so what a trace gives back is equal, not close.

    layers      numbers of the layers at hand; others that the model has were left out, so a number is not a place
    sequence, position, token_id, phase (0 prompt, then 1 generated), logprob (NaN first in a sequence)    [token]
    expert_id, weight (falling, sums to 1)    [token, layer, slot]
    router_logits (no two alike, so the choice is theirs)    [token, layer, expert]
    sequences   document_id (one document may have several sequences), domain, year, score (NaN where unknown)
    """

    layers: tuple[int, ...]
    n_experts: int
    sequence: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    phase: np.ndarray
    logprob: np.ndarray
    expert_id: np.ndarray
    weight: np.ndarray
    router_logits: np.ndarray
    sequences: pd.DataFrame

    @property
    def top_k(self) -> int:
        return self.expert_id.shape[-1]

    @property
    def n_tokens(self) -> int:
        return len(self.sequence)

    @property
    def lengths(self) -> np.ndarray:
        return np.bincount(self.sequence, minlength=len(self.sequences))

    def of_tokens(self, column: str) -> np.ndarray:
        """A column of the sequences, repeated for every token."""
        return self.sequences[column].to_numpy()[self.sequence]

    @cached_property
    def trace(self) -> ml.Trace:
        weight = self.weight.copy()
        weight[..., 0] += weight.sum(-1) == 0
        tokens = {name: getattr(self, name) for name in ("sequence", "position", "token_id", "phase", "logprob")}
        return ml.Trace.from_arrays(
            self.expert_id,
            n_experts=self.n_experts,
            layers=self.layers,
            weight=weight,
            router_logits=self.router_logits,
            tokens=tokens,
            sequences=self.sequences,
        )


def made(
    lengths: Sequence[int] = (4, 1, 7, 12, 2),
    *,
    layers: Sequence[int] = (0, 1, 2),
    experts: int = 8,
    top_k: int = 2,
    seed: int = 0,
    documents: Sequence[str] | None = None,
    domains: Sequence[str] | None = None,
    vocabulary: int = 20,
) -> Made:
    """A trace of random routing, far from uniform; documents and domains are drawn where they are not given."""
    rng = np.random.default_rng(seed)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    prompt = np.array([rng.integers(1, n + 1) for n in lengths])
    n, n_layers = len(sequence), len(layers)
    favour = rng.integers(-2, 3, (n_layers, experts)) * 4  # some experts are chosen often, some never
    order = rng.permuted(np.tile(np.arange(experts), (n, n_layers, 1)), axis=-1)
    logits = (order + favour) / 4 + order / 64  # multiples of 1/64; equal only where favour differs by whole orders
    logits += np.arange(experts) / 1024 * 4
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
    chosen = np.exp(np.take_along_axis(logits, ids, -1))
    weight = np.round(chosen / chosen.sum(-1, keepdims=True) * 1024) / 1024
    weight[..., -1] = 1 - weight[..., :-1].sum(-1)
    logprob = -np.round(rng.exponential(size=n) * 64) / 64
    logprob[position == 0] = np.nan
    names = [f"d{i}" for i in rng.integers(0, len(lengths), len(lengths))] if documents is None else list(documents)
    domain = {name: "bca"[i % 3] for i, name in enumerate(dict.fromkeys(names))}  # the first is not the first group
    table = pd.DataFrame(
        {
            "document_id": names,
            "domain": [domain[name] for name in names] if domains is None else list(domains),
            "year": 1990 + rng.permutation(len(lengths)),
            "score": np.where(rng.random(len(lengths)) < 0.3, np.nan, rng.integers(0, 9, len(lengths)) / 8),
        }
    )
    return Made(
        layers=tuple(layers),
        n_experts=experts,
        sequence=sequence,
        position=position,
        token_id=rng.integers(0, vocabulary, n),
        phase=(position >= prompt[sequence]).astype(np.uint8),
        logprob=logprob.astype(np.float32),
        expert_id=ids.astype(np.uint8),
        weight=weight.astype(np.float32),
        router_logits=logits.astype(np.float32),
        sequences=table,
    )


@st.composite
def made_traces(
    draw: st.DrawFn, *, min_sequences: int = 1, max_sequences: int = 5, max_length: int = 9, max_layers: int = 3
) -> Made:
    """Traces of uneven lengths, any k of any number of experts, some layers left out, documents in pieces."""
    lengths = draw(st.lists(st.integers(1, max_length), min_size=min_sequences, max_size=max_sequences))
    layers = sorted(draw(st.sets(st.integers(0, 5), min_size=1, max_size=max_layers)))
    experts = draw(st.integers(2, 9))
    return made(
        lengths,
        layers=layers,
        experts=experts,
        top_k=draw(st.integers(1, min(experts, 4))),
        seed=draw(st.integers(0, 2**16)),
        vocabulary=draw(st.sampled_from([3, 20])),
    )
