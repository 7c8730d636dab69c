"""Nested-loop oracles for flips and for the next tokens of two runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers.refusals import refused

from mixlens.errors import BadInput, MissingSignal
from mixlens.stats import Bootstrap, agreement, flips, flips_by_margin, next_tokens
from mixlens.stats.flips import MARGINS
from mixlens.stats.next_tokens import coarse_divergence
from mixlens.trace.trace import Trace

QUICK = Bootstrap(replicates=20)


def rerouted(trace: Trace, scale: float = 0.4) -> Trace:
    noise = np.random.default_rng(3).normal(size=(trace.n_tokens, trace.n_layers, trace.n_experts))
    noisy = trace.read("router_logits") + scale * noise
    return Trace.from_arrays(
        np.argsort(-noisy, axis=-1)[..., : trace.top_k],
        n_experts=trace.n_experts,
        tokens={"sequence": trace.read("sequence"), "token_id": trace.read("token_id")},
    )


def share(hits, of):
    return sum(hits) / of if of else math.nan


def test_flips_by_hand(make_trace, tokens_of, in_small_blocks):
    a = make_trace()
    b = rerouted(a)
    pairs = list(zip(tokens_of(a), tokens_of(b), strict=True))
    found = flips(in_small_blocks(a), b, by="domain", bootstrap=QUICK)
    for domain in "xy":
        here = [
            [set(s.expert_id[layer]) != set(t.expert_id[layer]) for layer in range(a.n_layers)]
            for s, t in pairs
            if s.row.domain == domain
        ]
        for layer in range(a.n_layers):
            before = [any(token[:layer]) for token in here]
            expected = {
                "changed": share([token[layer] for token in here], len(here)),
                "first_flip": share([token[layer] and not x for token, x in zip(here, before, strict=True)], len(here)),
                "so_far": share([any(token[: layer + 1]) for token in here], len(here)),
                "after_flip": share([token[layer] for token, x in zip(here, before, strict=True) if x], sum(before)),
                "without_flip": share(
                    [token[layer] for token, x in zip(here, before, strict=True) if not x], len(here) - sum(before)
                ),
            }
            for measure, value in expected.items():
                cell = found.sel(domain=domain, layer=layer, measure=measure)
                assert float(cell.estimate) == pytest.approx(value, nan_ok=True), (layer, measure)
        assert int(found.n.sel(domain=domain)) == len(here)


def test_first_flips_add_up_to_those_so_far(make_trace):
    a = make_trace()
    found = flips(a, rerouted(a), bootstrap=QUICK).estimate
    np.testing.assert_allclose(found.sel(measure="first_flip").cumsum("layer"), found.sel(measure="so_far"))


def test_the_order_of_a_set_does_not_matter(make_trace):
    a = make_trace()
    b = Trace.from_arrays(
        a.read("expert_id")[..., ::-1],
        n_experts=8,
        tokens={"sequence": a.read("sequence"), "token_id": a.read("token_id")},
    )
    assert float(flips(a, b, bootstrap=QUICK).estimate.sel(measure="so_far").max()) == 0
    assert float(agreement(a, b, bootstrap=QUICK).estimate.sel(measure="overlap").min()) == 1


def test_flips_by_margin_by_hand(make_trace, tokens_of, in_small_blocks):
    a = make_trace()
    b = rerouted(a)
    choices: dict[tuple[int, int], list[bool]] = {}
    for s, t in zip(tokens_of(a), tokens_of(b), strict=True):
        for layer in range(a.n_layers):
            ordered = sorted(s.router_logits[layer], reverse=True)
            margin = ordered[1] - ordered[2]
            upper = next(i for i, edge in enumerate(MARGINS) if margin < edge)
            choices.setdefault((layer, upper), []).append(set(s.expert_id[layer]) != set(t.expert_id[layer]))
    found = flips_by_margin(in_small_blocks(a), b, pooled=False, bootstrap=QUICK)
    together = flips_by_margin(a, b, bootstrap=QUICK)
    for upper in range(len(MARGINS)):
        every = []
        for layer in range(a.n_layers):
            hits = choices.get((layer, upper), [])
            every += hits
            assert int(found.n[layer, upper]) == len(hits)
            assert float(found.estimate[layer, upper]) == pytest.approx(share(hits, len(hits)), nan_ok=True)
        assert int(together.n[upper]) == len(every)
        assert float(together.estimate[upper]) == pytest.approx(share(every, len(every)), nan_ok=True)
    assert together.margin_from.values.tolist() == [0.0, *MARGINS[:-1]]


def test_an_expert_left_out_for_good_is_beyond_every_margin():
    """A forbidden expert has the logit -inf, so the margin is infinite."""
    logits = np.array([[[2.0, 1.0, -np.inf]], [[2.0, 1.0, 0.5]]], np.float32)
    a, b = (Trace.from_arrays(np.tile([0, 1], (2, 1, 1)), n_experts=3, router_logits=logits) for _ in range(2))
    found = flips_by_margin(a, b, bootstrap=QUICK)
    assert dict(zip(MARGINS, found.n.values.tolist(), strict=True)) == dict.fromkeys(MARGINS, 0) | {1.0: 1, np.inf: 1}


def test_margins_need_logits_and_an_expert_left_out(make_trace):
    with refused(MissingSignal, "router_logits", "flips_by_margin"):
        flips_by_margin(make_trace(logits=False), make_trace())
    with refused(BadInput, "top_k", 2):
        flips_by_margin(make_trace(n_experts=2), make_trace(n_experts=2))


VOCABULARY = 90


def predicted(rng, lengths, sharpness, base=None):
    """A trace with next-token distributions, and those distributions whole [token, vocabulary]."""
    n = sum(lengths)
    logits = rng.normal(size=(n, VOCABULARY)) * sharpness if base is None else base + 0.7 * rng.normal(size=base.shape)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits, logp


def trace_of(logp, token_id, lengths, top=True):
    order = np.argsort(-logp, axis=-1)
    kept = order[:, :64]
    rest = np.take_along_axis(logp, order[:, 64:], 1)
    starts = np.cumsum([0, *lengths[:-1]])
    logprob = np.full(len(logp), np.nan, np.float32)
    for start, length in zip(starts, lengths, strict=True):
        for t in range(start + 1, start + length):
            logprob[t] = logp[t - 1, token_id[t]]
    columns = {
        "sequence": np.repeat(np.arange(len(lengths)), lengths),
        "token_id": token_id,
        "logprob": logprob,
    }
    trace = Trace.from_arrays(np.zeros((len(logp), 1, 1), int), n_experts=2, tokens=columns)
    if top:
        trace._sources[0].part.arrays |= {
            "top_id": kept.astype(np.int32),
            "top_logprob": np.take_along_axis(logp, kept, 1).astype(np.float32),
            "tail_logprob": np.log(np.exp(rest).sum(1)).astype(np.float32),
        }
    return trace


def two_runs(top=True):
    rng, lengths = np.random.default_rng(5), [7, 1, 12, 9]
    token_id = rng.integers(0, VOCABULARY, sum(lengths))
    logits, first = predicted(rng, lengths, 2.0)
    _, second = predicted(rng, lengths, 2.0, logits)
    return trace_of(first, token_id, lengths, top), trace_of(second, token_id, lengths, top), first, second, lengths


def test_next_tokens_by_hand():
    a, b, p, q, lengths = two_runs()
    found = next_tokens(a, b, bootstrap=QUICK)
    token_id = a.read("token_id")
    losses, same, bound, exact, row = [], [], [], [], 0
    for length in lengths:
        for t in range(row + 1, row + length):
            losses.append((-p[t - 1, token_id[t]], -q[t - 1, token_id[t]]))
            same.append(p[t - 1].argmax() == q[t - 1].argmax())
            shared = set(np.argsort(-p[t - 1])[:64].tolist()) & set(np.argsort(-q[t - 1])[:64].tolist())
            kl, rest_p, rest_q = 0.0, 0.0, 0.0
            for v in range(VOCABULARY):
                if v in shared:
                    kl += math.exp(p[t - 1, v]) * (p[t - 1, v] - q[t - 1, v])
                else:
                    rest_p, rest_q = rest_p + math.exp(p[t - 1, v]), rest_q + math.exp(q[t - 1, v])
            bound.append(kl + rest_p * math.log(rest_p / rest_q))
            exact.append(sum(math.exp(p[t - 1, v]) * (p[t - 1, v] - q[t - 1, v]) for v in range(VOCABULARY)))
        row += length
    of_a, of_b = (sum(pair[i] for pair in losses) / len(losses) for i in (0, 1))
    expected = {
        "loss_a": of_a,
        "loss_b": of_b,
        "loss_difference": of_b - of_a,
        "perplexity_a": math.exp(of_a),
        "perplexity_b": math.exp(of_b),
        "perplexity_ratio": math.exp(of_b - of_a),
        "same_top": sum(same) / len(same),
        "kl_at_least": sum(bound) / len(bound),
    }
    for measure, value in expected.items():
        assert float(found.estimate.sel(measure=measure)) == pytest.approx(value, rel=1e-5), measure
    assert int(found.n) == len(losses) == sum(length - 1 for length in lengths)
    assert expected["kl_at_least"] < sum(exact) / len(exact)


def test_the_bound_never_exceeds_the_divergence():
    a, b, p, q, _ = two_runs()
    sides = [tuple(t.read(name) for name in ("top_id", "top_logprob", "tail_logprob")) for t in (a, b)]
    bound = coarse_divergence(*sides)
    exact = (np.exp(p) * (p - q)).sum(1)
    assert (bound <= exact + 1e-6).all()
    assert (bound > 0.1 * exact).all()  # and it tells something
    assert (coarse_divergence(sides[0], sides[0]) == 0).all()


def test_without_top_logprobs_the_losses_are_there():
    a, b, *_ = two_runs(top=False)
    found = next_tokens(a, b, bootstrap=QUICK)
    assert np.isfinite(found.estimate.sel(measure="perplexity_ratio"))
    assert np.isnan(found.estimate.sel(measure=["same_top", "kl_at_least"])).all()
    assert found.attrs["missing"] == "same_top and kl_at_least need top_logprobs in both traces"
