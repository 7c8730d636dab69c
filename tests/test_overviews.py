"""Overviews of an impact, a comparison and schemes: every number read back from the table that is shown."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.traces import Made, made

import mixlens as ml
from mixlens.stats import Bootstrap
from mixlens.stats.impact import Impact
from mixlens.stats.measured import Measured
from mixlens.stats.pareto import COLUMNS, Pareto

DOCUMENTS, LAYERS, EXPERTS = 6, 3, 4


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Sums of five conditions that differ in everything: a, b, b routed as a, a routed as b, a cast."""
    rng = np.random.default_rng(0)
    tokens = np.array([7, 3, 12, 5, 9, 0])  # the last document predicts nothing, and is routed all the same
    length, each = tokens + 2, tokens[:, None]
    return {
        "loss": rng.uniform(1, 3, (DOCUMENTS, 5)) * each,
        "kl": rng.uniform(0, 1, (DOCUMENTS, 5)) * each * [0, 1, 1, 1, 1],
        "same_top": rng.uniform(0.2, 0.9, (DOCUMENTS, 5)) * each * [0, 1, 1, 1, 1] + each * [1, 0, 0, 0, 0],
        "same_first": rng.uniform(0, 1, (DOCUMENTS, LAYERS)) * length[:, None],
        "shared": rng.uniform(0, 2, (DOCUMENTS, LAYERS)) * length[:, None],
        "error": rng.uniform(0, 1, (DOCUMENTS, LAYERS, EXPERTS)),
        "size": rng.uniform(2, 9, (DOCUMENTS, LAYERS, EXPERTS)),
        "chosen": rng.integers(1, 9, (DOCUMENTS, LAYERS, EXPERTS)).astype(float),
        "tokens": tokens,
        "length": length,
        "weight_error": rng.uniform(0, 1, (1, LAYERS, EXPERTS, 3)),
    }


@pytest.fixture(scope="module")
def impact(arrays) -> Impact:
    columns = {"document_id": [f"d{i}" for i in range(DOCUMENTS)], "domain": list("yxyxyx")}
    meta = {"model": {"name": "x/one"}, "other": {"name": "x/two"}, "top_k": 2, "force_weights": False}
    return Impact(Measured(arrays, pd.DataFrame(columns), meta))


def shown_numbers(text: str) -> list[float]:
    return [
        float(part) for part in text.replace("[", " ").replace("]", " ").replace(",", " ").split() if is_number(part)
    ]


def is_number(part: str) -> bool:
    try:
        float(part)
    except ValueError:
        return False
    return True


def test_the_overview_of_an_impact(impact, arrays):
    n = arrays["tokens"].sum()
    loss, kl, same = (arrays[name].sum(0) / n for name in ("loss", "kl", "same_top"))
    a, b, b_as_a, a_as_b, cast = loss
    expected = [
        math.exp(a), math.exp(b), b - a,
        ((b_as_a - a) + (b - a_as_b)) / 2,  # weights, in the mean of both orders: neither order alone gives it
        ((b - b_as_a) + (a_as_b - a)) / 2, cast - a,
        kl[1], same[1],
    ]  # fmt: skip
    table = impact.overview()
    np.testing.assert_allclose(table["estimate"], expected)
    assert table["n"].tolist() == [n] * 8
    assert table["unit"].tolist() == ["", "", *["nats per token"] * 5, "fraction"]
    assert [name.rsplit(" ", 1)[-1] for name in table.index[:2]] == ["one", "two"]
    lines = repr(impact).splitlines()[-8:]
    for line, name, (_, row) in zip(lines, table.index, table.iterrows(), strict=True):
        scale = 100 if row.unit == "fraction" else 1
        numbers = shown_numbers(line.removeprefix(name))
        np.testing.assert_allclose(
            numbers, [scale * row.estimate, scale * row.ci_low, scale * row.ci_high, n], rtol=1e-3
        )
    page = impact._repr_html_()
    assert all(f"{row.estimate * (100 if row.unit == 'fraction' else 1):.4g}" in page for _, row in table.iterrows())
    assert f"{n:,}" in impact.title()


def test_routing_and_experts_of_an_impact(impact, arrays):
    tokens = arrays["length"].sum()  # every token is routed, also the last of a sequence
    routing = impact.routing(bootstrap=Bootstrap(replicates=20))
    pooled = impact.routing(pooled=True, bootstrap=Bootstrap(replicates=20))
    first, shared = arrays["same_first"].sum(0) / tokens, arrays["shared"].sum(0) / tokens / 2
    np.testing.assert_allclose(routing.estimate, np.stack([first, shared], 1))
    np.testing.assert_allclose(pooled.estimate, [first.mean(), shared.mean()])
    assert int(routing.n) == int(pooled.n) == tokens
    experts = impact.experts(by="domain", bootstrap=Bootstrap(replicates=20))
    for domain, members in {"x": [1, 3, 5], "y": [0, 2, 4]}.items():
        here = experts.sel(domain=domain)
        error = np.sqrt(arrays["error"][members].sum(0) / arrays["size"][members].sum(0))
        np.testing.assert_allclose(here.estimate, error)
        np.testing.assert_array_equal(here.n, arrays["chosen"][members].sum(0))
    np.testing.assert_array_equal(experts.weight_error, arrays["weight_error"][0])
    assert experts.matrix.values.tolist() == ["w1", "w2", "w3"]


@pytest.mark.parametrize("by", [None, "domain"])
def test_quality_and_split_of_every_condition(impact, arrays, by):
    quality, split = (method(by=by, bootstrap=Bootstrap(replicates=20)) for method in (impact.quality, impact.split))
    groups = {"x": [1, 3, 5], "y": [0, 2, 4]} if by else {None: list(range(6))}
    for domain, members in groups.items():
        here, parts = (data.sel(domain=domain) if by else data for data in (quality, split))
        n = arrays["tokens"][members].sum()
        assert int(here.n) == int(parts.n) == n
        loss, kl, same = (arrays[name][members].sum(0) / n for name in ("loss", "kl", "same_top"))
        a, b = loss[:2]
        expected = [a, b, b - a, math.exp(a), math.exp(b), math.exp(b - a), same[1], kl[1]]
        np.testing.assert_allclose(here.estimate, expected)
        for quantity, (aa, bb, ba, ab, cast) in {"loss": loss, "kl": kl, "other_top": 1 - same}.items():
            orders = np.array([[ba - aa, bb - ba], [bb - ab, ab - aa]])
            table = parts.estimate.sel(quantity=quantity, part=["everything else", "routing", "total"]).values
            np.testing.assert_allclose(table[:2, :2], orders)
            np.testing.assert_allclose(table[2, :2], orders.mean(0))
            np.testing.assert_allclose(table[:, 2], bb - aa)
            np.testing.assert_allclose(parts.estimate.sel(quantity=quantity, part="arithmetic"), cast - aa)
        assert np.isfinite(parts.p.sel(quantity="loss")).all()
        assert not parts.survives.sel(quantity=["kl", "other_top"]).any()


@pytest.fixture(scope="module")
def pair() -> tuple[Made, Made]:
    """Flips that differ in every layer: layer 4 has the most, the last layer fewer than all together."""
    case = made((6, 9, 5, 8), layers=(1, 4, 6), experts=6, seed=2)
    ids = case.expert_id.astype(int)
    for place, share in enumerate((0.2, 0.6, 0.3)):
        flip = np.random.default_rng(place).random(case.n_tokens) < share
        for t in np.flatnonzero(flip):
            left = sorted(set(range(6)) - set(case.expert_id[t, place].tolist()))
            ids[t, place, 1] = left[0]
    logprob = (case.logprob * 1.5 - 0.125).astype(np.float32)
    return case, dataclasses.replace(case, expert_id=ids.astype(np.uint8), logprob=logprob)


def test_the_overview_of_a_comparison(pair):
    one, two = pair
    found = ml.compare(one.trace, two.trace, bootstrap=Bootstrap(replicates=20))
    changed = np.array(
        [
            [set(one.expert_id[t, p].tolist()) != set(two.expert_id[t, p].tolist()) for p in range(3)]
            for t in range(one.n_tokens)
        ]
    )
    shares = changed.mean(0)
    assert shares.argmax() == 1
    assert changed.any(1).mean() > shares.max()
    known = one.position > 0
    a, b = (-case.logprob[known].astype(float).mean() for case in (one, two))
    table = found.overview()
    expected = [shares[0], shares[1], changed.any(1).mean(), math.exp(a), math.exp(b), b - a, math.nan, math.nan]
    np.testing.assert_allclose(table["estimate"], expected, rtol=1e-5)
    assert table["n"].tolist() == [one.n_tokens] * 3 + [known.sum()] * 5
    assert table["unit"].tolist() == ["fraction"] * 3 + ["", "", "nats per token", "fraction", "nats per token"]
    assert "layer 4" in table.index[1]  # its number, not its place
    lines = repr(found).splitlines()[-8:]
    for line, name, (_, row) in zip(lines[:6], table.index[:6], table.iloc[:6].iterrows(), strict=True):
        scale = 100 if row.unit == "fraction" else 1
        numbers = shown_numbers(line.removeprefix(name))
        np.testing.assert_allclose(
            numbers, [scale * row[c] for c in ("estimate", "ci_low", "ci_high")] + [row.n], rtol=1e-3
        )
    assert f"{one.n_tokens:,} tokens" in found.title()
    assert f"{one.sequences['document_id'].nunique():,} documents" in found.title()


def schemes_of(**points: dict[str, Any]) -> Pareto:
    rows = [
        {"scheme": s, "quantity": q, "estimate": v, "ci_low": v * 0.9, "ci_high": v * 1.1, "unit": "", "n": 7}
        for s, values in points.items()
        for q, v in values.items()
    ]
    return Pareto(pd.DataFrame(rows, columns=COLUMNS), {"model": {"name": "m"}, "documents": 2})


def test_a_front_wants_less_of_costs_and_more_of_shares():
    found = schemes_of(
        a={"bytes": 10, "kl": 0.1, "same_top": 0.9},
        b={"bytes": 5, "kl": 0.2, "same_top": 0.95},
        c={"bytes": 7, "kl": 0.3, "same_top": 0.7},
    )
    assert found.front() == ["b", "a"]
    assert found.front(y="same_top") == ["b"]
    assert found.front(x="kl", y="same_top") == ["a", "b"]


@pytest.mark.parametrize(
    ("quantity", "factor"),
    [("bytes", 1e-6), ("expert_bits", 1), ("perplexity", 1), ("loss_difference", 1), ("kl", 1),
     ("kl_from_routing", 1), ("same_top", 1), ("overlap", 1), ("ttft_s", 1e3), ("tpot_s", 1e3), ("mmlu acc", 1)],
)  # fmt: skip
def test_the_overview_of_schemes_has_every_number_in_its_unit(quantity, factor):
    value = 123_456_789.0 if quantity == "bytes" else 0.4567891
    decimals = {"bytes": 2, "expert_bits": 2, "ttft_s": 1, "tpot_s": 2, "perplexity": 3, "mmlu acc": 3}.get(quantity, 4)
    found = schemes_of(a={"bytes": 1e6, "kl": 0.0} | {quantity: value}, b={"bytes": 2e6, "kl": 0.5})
    table = found.overview()
    cells = [shown_numbers(cell) for cell in table.loc["a"]]
    assert any(
        len(cell) == 3 and np.allclose(cell, [factor * value * x for x in (1, 0.9, 1.1)], rtol=2e-2) for cell in cells
    )
    assert f"{factor * value:,.{decimals}f}" in " ".join(table.loc["a"]).replace(" [", " ").split()
    assert [scheme for scheme, mark in table["on the front"].items() if mark] == sorted(found.front())
    if quantity not in ("bytes", "kl"):
        assert "n/a" in table.loc["b"].tolist()
