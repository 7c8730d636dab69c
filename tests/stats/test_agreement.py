"""Nested-loop oracle for the agreement of two traces, and what it refuses to compare."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from helpers.refusals import refused

from mixlens.errors import BadInput
from mixlens.stats import Bootstrap, agreement
from mixlens.trace.trace import Trace

QUICK = Bootstrap(replicates=20)


def softmax(logits):
    exponentials = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exponentials) for x in exponentials]


def rerouted(trace: Trace, logits: bool = True) -> Trace:
    """The same tokens, routed a little differently."""
    noisy = trace.read("router_logits") + np.random.default_rng(3).normal(size=(trace.n_tokens, trace.n_layers, 8))
    noisy = noisy.astype(np.float16).astype(np.float32)
    return Trace.from_arrays(
        np.argsort(-noisy, axis=-1)[..., :2],
        n_experts=8,
        router_logits=noisy if logits else None,
        tokens={"sequence": trace.read("sequence"), "token_id": trace.read("token_id")},
    )


def test_agreement_by_hand(make_trace, tokens_of, in_small_blocks):
    a = make_trace()
    b = in_small_blocks(rerouted(a))
    found = agreement(a, b, by="domain", bootstrap=QUICK)
    pairs = list(zip(tokens_of(a), tokens_of(b), strict=True))
    for domain in "xy":
        here = [(s, t) for s, t in pairs if s.row.domain == domain]
        for layer in range(a.n_layers):
            sums = np.zeros(3)
            for s, t in here:
                p, q = softmax(s.router_logits[layer]), softmax(t.router_logits[layer])
                divergence = 0.0
                for x, y in zip(p, q, strict=True):
                    divergence += (x * math.log2(2 * x / (x + y)) + y * math.log2(2 * y / (x + y))) / 2
                same = s.expert_id[layer][0] == t.expert_id[layer][0]
                sums += [same, len(set(s.expert_id[layer]) & set(t.expert_id[layer])) / 2, divergence]
            found_here = found["estimate"].sel(domain=domain, layer=layer)
            np.testing.assert_allclose(found_here, sums / len(here), rtol=1e-4)


@pytest.mark.parametrize("without", ["first", "second"])
def test_token_ids_need_not_be_in_both(make_trace, without):
    a = make_trace()
    b = rerouted(a)
    sequence = {"sequence": a.read("sequence")}
    bare = Trace.from_arrays(
        (a if without == "first" else b).read("expert_id"), n_experts=8, tokens=sequence, sequences=a.sequences
    )
    with_ids, found = (
        agreement(*pair, bootstrap=QUICK) for pair in ((a, b), (bare, b) if without == "first" else (a, bare))
    )
    shared = ["top1", "overlap"]
    assert found["estimate"].sel(measure=shared).equals(with_ids["estimate"].sel(measure=shared))


def test_a_trace_agrees_with_itself(make_trace):
    found = agreement(make_trace(), make_trace(), bootstrap=QUICK)["estimate"]
    np.testing.assert_allclose(found.sel(measure=["top1", "overlap"]), 1)
    np.testing.assert_allclose(found.sel(measure="jensen_shannon"), 0, atol=1e-6)


def test_without_logits_the_divergence_is_missing(make_trace):
    trace = make_trace()
    found = agreement(trace, rerouted(trace, logits=False), bootstrap=QUICK)
    assert np.isnan(found["estimate"].sel(measure="jensen_shannon")).all()
    assert found.attrs["missing"] == "jensen_shannon needs router_logits in both traces"


def small(token_id, sequence, n_layers=2, n_experts=4):
    ids = np.zeros((len(token_id), n_layers, 2), int)
    ids[..., 1] = 1
    tokens = {"token_id": token_id, "sequence": sequence}
    return Trace.from_arrays(ids, n_experts=n_experts, tokens=tokens)


@pytest.mark.parametrize(
    ("other", "what", "value"),
    [
        (small([5, 6, 7, 9], [0, 0, 1, 1]), "token_id", {"sequence": (1, 1), "position": (1, 1), "token_id": (8, 9)}),
        (small([5, 6, 7, 8], [0, 0, 0, 1]), "position", {"sequence": (1, 0), "position": (0, 2), "token_id": (7, 7)}),
        (small([5, 6, 7], [0, 0, 1]), "a", (1, 1)),
        (small([5, 6, 7, 8, 1], [0, 0, 1, 1, 1]), "b", (1, 2)),
        (small([5, 6, 7, 8], [0, 0, 1, 1], n_layers=1), "layers", ([0, 1], [0])),
        (small([5, 6, 7, 8], [0, 0, 1, 1], n_experts=8), "experts a layer", (4, 8)),
    ],
)
def test_other_tokens_are_refused(other, what, value):
    with refused(BadInput, what, value):
        agreement(small([5, 6, 7, 8], [0, 0, 1, 1]), other)


def test_by_takes_columns_of_the_first(make_trace):
    a = make_trace()
    b = rerouted(a)
    b.sequences = pd.DataFrame(b.sequences).assign(domain="elsewhere")
    assert list(agreement(a, b, by="domain", bootstrap=QUICK)["domain"].values) == ["x", "y"]
