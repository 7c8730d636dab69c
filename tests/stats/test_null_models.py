"""Null models keep what they say they keep, and tell what is beyond it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers.refusals import refused

import mixlens as ml
from mixlens.errors import BadInput

STATS = ml.stats


def routed(seed: int, by: str, *, n: int = 1200, layers: int = 3) -> ml.Trace:
    """Text of 12 token types in 30 sequences, whose routing follows the token, the position or the token before."""
    rng = np.random.default_rng(seed)
    sequence, position = np.divmod(np.arange(n), n // 30)
    token = rng.integers(12, size=n)
    cause = {"token": token, "position": position % 8, "before": np.roll(token, 1), "nothing": 0 * token}[by]
    loud = rng.random((n, layers)) < 0.6
    first = np.where(loud, (cause[:, None] + np.arange(layers)) % 8, rng.integers(8, size=(n, layers)))
    second = (first + rng.integers(1, 8, size=first.shape)) % 8
    return ml.Trace.from_arrays(
        np.stack([first, second], -1), n_experts=8, layers=list(range(4, 4 + layers)),
        tokens={"sequence": sequence, "token_id": token, "position": position},
        sequences=pd.DataFrame({"document_id": np.arange(30) // 2}),
    )  # fmt: skip


def null(trace, statistic, given, **more):
    return STATS.null_model(trace, statistic, given=given, permutations=39, **more)


def lag2(trace, **how):
    return STATS.transitions(trace, gap=2, **how)


@pytest.mark.parametrize(
    ("given", "statistic"),
    [("token", STATS.vocabulary_specialization), ("position", STATS.position_profile), ("layer", STATS.transitions)],
)
def test_what_is_given_is_kept_to_the_last_digit(given, statistic):
    found = null(routed(0, "before"), statistic, given)
    np.testing.assert_allclose(found.expected, found.estimate, rtol=1e-9)
    np.testing.assert_allclose(found.excess, 0, atol=1e-12)
    assert not found.survives.any()
    shares = null(routed(0, "before"), STATS.expert_share, given)  # nothing changes how often each is chosen
    np.testing.assert_allclose(shares.expected, shares.estimate, rtol=1e-9)


@pytest.mark.parametrize(("given", "by"), [("token", "token"), ("position", "position")])
def test_nothing_is_beyond_the_cause_where_there_is_no_other(given, by):
    alarms = [null(routed(seed, by), STATS.repetition, given).survives.any() for seed in range(5)]
    assert sum(map(bool, alarms)) <= 1


def test_a_position_explains_no_routing_by_token_and_the_other_way_round():
    by_position = routed(1, "position")
    profile = null(by_position, STATS.position_profile, "token")
    beyond = (profile.estimate > profile.null_high) | (profile.estimate < profile.null_low)
    assert beyond.mean() > 0.2  # 0.05 by chance
    assert (profile.p <= 0.05).mean() > 0.1
    specialized = null(routed(1, "token"), STATS.vocabulary_specialization, "position")
    assert specialized.survives.all()
    assert (specialized.excess > 0.1).all()
    assert (specialized.null_high < specialized.estimate).all()


def test_a_chain_over_layers_forgets_what_lies_two_layers_back():
    found = null(routed(2, "token"), lag2, "layer")  # all layers follow the token, not one another
    stays = [float(found.excess.sel(layer=4, expert=e, expert_j=(e + 2) % 8)) for e in range(8)]
    assert min(stays) > 0.1
    chain = null(routed(2, "nothing"), lag2, "layer")
    assert float(abs(chain.excess).max()) < 0.08


def test_the_same_seed_gives_the_same_shuffles_and_lines_are_dotted():
    trace = routed(3, "token")
    one, two, other = (
        null(trace, STATS.repetition, "position", bootstrap=STATS.Bootstrap(seed=seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.expected, two.expected)
    assert (one.expected != other.expected).any()
    ax = ml.show.repetition(one, choice="either")
    dotted = [line for line in ax.lines if line.get_linestyle() == ":"]
    np.testing.assert_array_equal(dotted[0].get_ydata(), one.expected.sel(choice="either"))


def test_wrong_input():
    trace = routed(0, "token")
    with refused(BadInput, "given", "topic"):
        STATS.null_model(trace, STATS.repetition, given="topic")
    with refused(BadInput, "permutations", 5):
        STATS.null_model(trace, STATS.repetition, permutations=5)


def test_what_one_document_has_is_no_finding_however_often_it_is_recorded():
    for seed in range(3):
        trace = routed(seed, "nothing")
        one = trace.select(where=trace.sequences["document_id"] == 0)
        found = null(ml.concat([one] * 8), STATS.repetition, "token")
        assert (np.abs(found.excess) > 0).any()
        assert not found.survives.any()
