"""cluster=: a column of the sequences varies independently in the place of documents."""

from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from helpers.refusals import refused

import mixlens as ml
from mixlens.errors import BadInput
from mixlens.trace.trace import Trace

N, AUTHORS = 24, 6


def trace_of(seed: int = 0, **columns) -> Trace:
    """Chunks of a few works: every author prefers an expert, in all of the author's documents."""
    rng = np.random.default_rng(seed)
    author = np.arange(N) % AUTHORS
    sequence = np.repeat(np.arange(N), 20)
    logits = rng.normal(size=(AUTHORS, 2, 4))[author[sequence]] + rng.normal(size=(len(sequence), 2, 4)) / 2
    ids = np.argsort(-logits, axis=-1)[..., :2]
    weight = np.full(ids.shape, 0.5)
    tokens = {"sequence": sequence, "token_id": np.random.default_rng(9).integers(5, 30, len(sequence))}
    tokens |= {"logprob": rng.normal(-2, 1, len(sequence))}
    table = {"author": author, "domain": np.where(author % 2, "a", "b")} | columns
    return Trace.from_arrays(
        expert_id=ids, n_experts=4, weight=weight, router_logits=logits, tokens=tokens, sequences=pd.DataFrame(table)
    )


ONE = [
    *("domain_information", "domain_specialization", "domain_distance", "expert_share", "load_balance", "load_entropy"),
    *("routing_entropy", "router_confidence", "position_profile", "repetition", "coactivation", "transitions"),
    *("vocabulary_specialization", "predictability"),
]
TWO = ["agreement", "flips", "flips_by_margin", "moved"]


def numbers(data: xr.Dataset) -> xr.Dataset:
    data = data[[name for name in ("estimate", "ci_low", "ci_high", "n", "n_documents") if name in data]]
    return data.drop_attrs()


@pytest.mark.parametrize("name", ONE + TWO)
def test_a_cluster_is_what_a_document_would_be(name):
    """The oracle: the same recording, whose documents are the authors."""
    statistic = getattr(ml.stats, name)
    given, other = ([trace_of(seed, **ids) for seed in (0, 1)] for ids in ({}, {"document_id": np.arange(N) % AUTHORS}))
    count = 2 if name in TWO else 1
    found = statistic(*given[:count], cluster="author")
    xr.testing.assert_allclose(numbers(found), numbers(statistic(*other[:count])))
    assert found.attrs["cluster"] == "author"
    assert "cluster" not in statistic(*given[:count]).attrs


def test_contrasts_permute_clusters():
    found = ml.stats.contrast(trace_of(), ml.stats.expert_share, by="domain", a="a", cluster="author")
    assert (found.attrs["n_a"], found.attrs["n_b"]) == (AUTHORS // 2, AUTHORS // 2)
    two = ml.stats.contrast(trace_of(), trace_of(1), ml.stats.expert_share, cluster="author")
    assert (two.attrs["n_a"], two.attrs["paired"]) == (AUTHORS, 1)


def test_a_figure_says_what_was_independent():
    share = ml.stats.expert_share(trace_of(), cluster="author")
    assert "author clusters" in ml.show.expert_share(share).texts[-1].get_text().replace("\n", " ")


@pytest.mark.parametrize("cluster", ["writer", "author"])
def test_a_column_that_is_not_there_or_has_gaps_is_refused(cluster):
    gaps = trace_of(author=[None, *range(N - 1)])
    with refused(BadInput, *(("cluster", "writer") if cluster == "writer" else ("author", 1))):
        ml.stats.expert_share(gaps, cluster=cluster)


def test_every_statistic_of_a_trace_takes_clusters():
    for name in ml.stats.__all__ if hasattr(ml.stats, "__all__") else dir(ml.stats):
        statistic = getattr(ml.stats, name)
        first = next(iter(inspect.signature(statistic).parameters), "") if inspect.isfunction(statistic) else ""
        if first in ("trace", "a"):
            assert "cluster" in inspect.signature(statistic).parameters, name
