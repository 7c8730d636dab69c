"""cluster=: a column of the sequences varies independently in the place of documents."""

from __future__ import annotations

import inspect
from html import unescape

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from helpers.refusals import refused

import mixlens as ml
from mixlens.errors import BadInput
from mixlens.trace.clusters import columns_above, remark_on_clusters
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


def measured(kind: str, author: np.ndarray) -> xr.Dataset:
    """Sums over documents as experiments measure them."""
    rng, n = np.random.default_rng(0), len(author)
    length = rng.integers(5, 30, n)
    layered, swept = ("document", "layer", "expert"), ("document", "k")
    data = {"tokens": ("document", length - 1), "length": ("document", length), "value": ("document", 3.0 * length)}
    coords = {
        "author": ("document", author),
        "layer": [0, 1],
        "expert": range(4),
        "document_id": ("document", range(n)),
    }
    if kind == "importance":
        data |= {"change": (layered, rng.normal(size=(n, 2, 4))), "chosen": (layered, rng.integers(1, 9, (n, 2, 4)))}
        return xr.Dataset(data, coords, {"kind": kind, "model": "", "metric": "", "unit": "", "how": "", "top_k": 2})
    of_k = {"chosen": (("document", "k", "layer", "expert"), rng.integers(1, 9, (n, 2, 2, 4)))}
    of_k |= {
        "loss": (swept, rng.gamma(2, size=(n, 2))),
        "first_weight": (("document", "k", "layer"), np.ones((n, 2, 2))),
    }
    return xr.Dataset(data | of_k, coords | {"k": [1, 2]}, {"kind": kind, "model": "", "own_k": 2})


@pytest.mark.parametrize(("kind", "statistic"), [("importance", "expert_importance"), ("topk", "topk_sweep")])
def test_documents_of_one_author_are_measured_as_one(kind, statistic):
    """The oracle: the same sums, of which those of an author were added up before."""
    documents = measured(kind, np.arange(N) % AUTHORS)
    together = documents.groupby("author").sum().rename(author="document")
    compute = getattr(ml.stats, statistic)
    found = compute(documents, cluster="author")
    xr.testing.assert_allclose(found.drop_attrs(), compute(together).drop_attrs())
    assert found.attrs["cluster"] == "author"
    wide, narrow = (float((one.ci_high - one.ci_low).mean()) for one in (found, compute(documents)))
    assert wide != pytest.approx(narrow)
    with refused(BadInput, "cluster", "writer"):
        compute(documents, cluster="writer")


def test_an_author_of_two_domains_counts_in_each():
    documents = measured("importance", np.arange(N) % AUTHORS).assign_coords(domain=("document", np.arange(N) // 12))
    found = ml.stats.expert_importance(documents, by="domain", cluster="author")
    assert found.n_documents.values.tolist() == [AUTHORS, AUTHORS]
    np.testing.assert_allclose(found.estimate, ml.stats.expert_importance(documents, by="domain").estimate)


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"author": np.arange(12) % 4}, ["author"]),
        ({"repository": [f"r{i // 3}" for i in range(12)], "template": ["a", "b"] * 6}, ["repository", "template"]),
        ({"domain": ["x", "y"] * 6}, []),  # groups, which are compared
        ({"title": [f"t{i}" for i in range(12)]}, []),  # a document's own
        ({"language": ["en"] * 12}, []),
        ({"score": np.linspace(0, 1, 12).round(0)}, []),  # no name of anything
        ({"right": [True, False] * 6}, []),
        ({"author": [*range(6), *range(6)], "document_id": np.arange(12) // 2}, []),  # differs within a document
    ],
)
def test_columns_that_documents_share_are_found(columns, named):
    assert columns_above(pd.DataFrame({"document_id": np.arange(12), "length": 5} | columns)) == named


def test_recording_remarks_on_them_once_and_the_report_does(tmp_path):
    model = ml.load("demo", verbose=False)
    settings = ml.RecordSettings(max_length=16, overlong="truncate", progress=False)
    documents = [one | {"author": f"writer {i % 3}"} for i, one in enumerate(ml.demo_documents()[:6])]
    with pytest.warns(UserWarning, match="author"):
        trace = ml.record(model, documents, out=tmp_path / "run", settings=settings)
    assert remark_on_clusters(trace.sequences) in unescape(ml.report(trace, tmp_path / "r.html").read_text("utf-8"))


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
