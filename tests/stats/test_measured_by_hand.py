"""Statistics of measurements against loops over their sums: every number, and intervals document by document."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr
from helpers import loops
from helpers.traces import made
from scipy import stats as scipy_stats

import mixlens as ml
from mixlens.stats import Bootstrap

QUICK = Bootstrap(seed=5, level=0.9)
INNER = ("document", "layer", "expert")
DOMAIN = np.array(["y", "x", "y", "x", "x", "y", "y", "x", "y", "x"], object)
TOKENS = np.array([9, 4, 0, 12, 7, 5, 21, 6, 3, 8])  # of which one document predicts nothing
LENGTH = TOKENS + np.array([1, 2, 1, 1, 3, 1, 1, 1, 2, 1])
RANDOM = np.random.default_rng(0)


def columns() -> dict:
    return {"document_id": ("document", np.arange(10).astype(object)), "domain": ("document", DOMAIN)}


def assert_interval(low, high, expected) -> None:
    np.testing.assert_allclose([float(low), float(high)], expected, rtol=2e-3, atol=2e-4)


def ratio_by_hand(sums: np.ndarray, counts: np.ndarray, members: np.ndarray, kind: str) -> tuple[float, float]:
    rows = [np.array([sums[d], counts[d]]) for d in members]
    with np.errstate(invalid="ignore", divide="ignore"):
        return loops.interval(rows, lambda s: s[0] / s[1], counts[members], QUICK.level, kind)


def members_of(domain: str) -> np.ndarray:
    return np.array([d for d in range(10) if DOMAIN[d] == domain and TOKENS[d] > 0])


def test_importance():
    change, chosen = RANDOM.normal(size=(10, 2, 3)) * TOKENS[:, None, None], RANDOM.integers(0, 9, (10, 2, 3))
    value = RANDOM.uniform(1, 4, 10) * TOKENS
    measured = xr.Dataset(
        {"change": (INNER, change), "chosen": (INNER, chosen), "value": ("document", value),
         "tokens": ("document", TOKENS), "length": ("document", LENGTH)},
        {**columns(), "layer": [2, 5], "expert": range(3)},
        {"kind": "importance", "model": "m", "metric": "loss", "unit": "nats", "how": "zero", "top_k": 2},
    )  # fmt: skip
    found = ml.stats.expert_importance(measured, by="domain", bootstrap=QUICK)
    assert found.layer.values.tolist() == [2, 5]
    assert (found.attrs["unit"], found.attrs["how"], found.attrs["model"]) == ("nats", "zero", "m")
    assert found.attrs["level"] == 0.9
    for domain in "xy":
        members = members_of(domain)
        here = found.sel(domain=domain)
        assert (int(here.n), int(here.n_documents)) == (TOKENS[members].sum(), len(members))
        assert float(here.value) == pytest.approx(value[members].sum() / TOKENS[members].sum())
        for i, layer in enumerate((2, 5)):
            for e in range(3):
                cell = here.sel(layer=layer, expert=e)
                assert float(cell.estimate) == pytest.approx(change[members, i, e].sum() / TOKENS[members].sum())
                assert float(cell.share) == pytest.approx(chosen[members, i, e].sum() / (2 * LENGTH[members].sum()))
                assert_interval(
                    cell.ci_low, cell.ci_high, ratio_by_hand(change[:, i, e], TOKENS, members, "difference")
                )


def test_topk():
    ks, shape = [1, 2, 4], (10, 3, 2, 5)
    loss = RANDOM.uniform(1, 3, (10, 3)) * TOKENS[:, None]
    chosen, first = RANDOM.integers(0, 9, shape), RANDOM.uniform(0.2, 1, shape[:3]) * LENGTH[:, None, None]
    measured = xr.Dataset(
        {"loss": (("document", "k"), loss), "first_weight": (("document", "k", "layer"), first),
         "chosen": (("document", "k", "layer", "expert"), chosen),
         "tokens": ("document", TOKENS), "length": ("document", LENGTH)},
        {**columns(), "k": ks, "layer": range(2), "expert": range(5)},
        {"kind": "topk", "model": "m", "own_k": 2},
    )  # fmt: skip
    found = ml.stats.topk_sweep(measured, by="domain", bootstrap=QUICK)
    assert found.k.values.tolist() == ks
    assert (found.attrs["own_k"], found.attrs["unit"]) == (2, "nats")
    for domain in "xy":
        members = members_of(domain)
        n, length = TOKENS[members].sum(), LENGTH[members].sum()
        assert (int(found.n.sel(domain=domain)), int(found.n_documents.sel(domain=domain))) == (n, len(members))
        for i, k in enumerate(ks):
            cell, change = found.sel(domain=domain, k=k), loss[:, i] - loss[:, 1]
            assert float(cell.estimate) == pytest.approx(loss[members, i].sum() / n)
            assert float(cell.change) == pytest.approx(change[members].sum() / n)
            assert_interval(cell.ci_low, cell.ci_high, ratio_by_hand(loss[:, i], TOKENS, members, "mean"))
            assert_interval(cell.change_low, cell.change_high, ratio_by_hand(change, TOKENS, members, "difference"))
            np.testing.assert_allclose(cell.share, chosen[members, i].sum(0) / (length * k))
            np.testing.assert_allclose(cell.first_weight, first[members, i].sum(0) / length)


@pytest.mark.parametrize("measure", ["logit", "norm"])
def test_contributions(measure):
    number = np.repeat(np.arange(10), LENGTH)
    shape = (len(number), 2, 2)
    ids = np.stack([RANDOM.permuted(np.tile(np.arange(4), (*shape[:2], 1)), axis=-1)[..., i] for i in (0, 1)], -1)
    data = {name: RANDOM.normal(size=shape).astype(np.float32) for name in ("logit", "norm", "peak", "weight")}
    data["peak"], data["norm"] = abs(data["peak"]), abs(data["norm"])
    kind = {"logit": "difference", "norm": "mean"}[measure]
    data["logit"][np.cumsum(LENGTH) - 1] = np.nan
    contributions = xr.Dataset(
        {name: (("token", "layer", "slot"), values) for name, values in (data | {"expert_id": ids}).items()},
        {"document_id": ("token", number.astype(object)), "domain": ("token", DOMAIN[number]), "layer": range(2)},
        {"kind": "contributions", "model": "m", "n_experts": 4},
    )
    found = ml.stats.expert_contribution(contributions, measure=measure, by="domain", bootstrap=QUICK)
    assert found.attrs["measure"] == measure
    assert found.attrs["unit"] == {"logit": "logits", "norm": "norm"}[measure]
    for domain in "xy":
        members = np.flatnonzero(DOMAIN == domain)
        assert int(found.n_documents.sel(domain=domain)) == 5
        for layer in range(2):
            for expert in range(4):
                hits = (ids[:, layer] == expert) & np.isfinite(data[measure][:, layer])
                values = np.where(hits, data[measure][:, layer], 0).sum(1)
                sums = np.array([values[number == d].sum() for d in range(10)])
                counts = np.array([hits[number == d].sum() for d in range(10)])
                cell = found.sel(domain=domain, layer=layer, expert=expert)
                assert int(cell.n) == counts[members].sum()
                assert float(cell.estimate) == pytest.approx(sums[members].sum() / counts[members].sum(), abs=1e-6)
                here = hits & np.isin(number, members)[:, None]
                assert float(cell.max_abs) == pytest.approx(float(data["peak"][:, layer][here].max()))
                assert_interval(cell.ci_low, cell.ci_high, ratio_by_hand(sums, counts, members, kind))


def test_groups_without_a_document_have_no_contribution():
    """Of four pairs of domain and language two have documents, and not the first."""
    pairs = np.array([("x", "fr"), ("y", "en")], object)[[0, 1, 0]]
    document, shape = np.array([0, 0, 1, 2]), (4, 1, 1)
    contributions = xr.Dataset(
        {name: (("token", "layer", "slot"), np.ones(shape)) for name in ("logit", "norm", "peak", "weight")}
        | {"expert_id": (("token", "layer", "slot"), np.zeros(shape, int))},
        {"document_id": ("token", document.astype(object)), "domain": ("token", pairs[document, 0]),
         "language": ("token", pairs[document, 1]), "layer": [0]},
        {"kind": "contributions", "model": "m", "n_experts": 1},
    )  # fmt: skip
    found = ml.stats.expert_contribution(contributions, by=["domain", "language"], bootstrap=QUICK)
    assert found.n_documents.to_series().to_dict() == {("x", "en"): 0, ("x", "fr"): 2, ("y", "en"): 1, ("y", "fr"): 0}
    assert found.n.squeeze().values.tolist() == [[0, 3], [1, 0]]
    assert np.isnan(found.estimate.squeeze().values).tolist() == [[True, False], [False, True]]


def test_a_super_expert_is_above_a_percentile_and_above_a_tenth():
    """Of 400 experts the 99.5th percentile lies between the second and third largest; not at 95 or 99."""
    sizes = np.linspace(1, 2, 400)
    sizes[-4:] = [30, 40, 50, 60]
    rng = np.random.default_rng(1)
    sizes = rng.permutation(sizes).reshape(20, 20)
    found = ml.stats.super_experts(xr.Dataset({"max_abs": (("layer", "expert"), sizes)}))
    ordered = np.sort(sizes.ravel())
    at = 0.995 * 399
    limit = ordered[int(at)] + (at - int(at)) * (ordered[int(at) + 1] - ordered[int(at)])
    assert found.attrs["limit"] == pytest.approx(limit)
    assert set(sizes[found.is_super.values]) == {50, 60}
    np.testing.assert_allclose(found.over_median, sizes / ((ordered[199] + ordered[200]) / 2))
    sizes[sizes == 60] = 600  # then a tenth of the largest is the higher bar, not a hundredth
    higher = ml.stats.super_experts(xr.Dataset({"max_abs": (("layer", "expert"), sizes)}))
    assert higher.attrs["limit"] == 60
    assert set(sizes[higher.is_super.values]) == {600}


def test_similarity_and_coactivation_permutation_by_permutation():
    """Two-sided, the observed order counted in, both directions of a pair in the mean."""
    rng, n = np.random.default_rng(4), 5
    alike = rng.normal(size=(1, n, n))
    alike += alike.swapaxes(1, 2)
    together = rng.uniform(size=(1, n, n)) - 0.3 * alike
    together[0, range(n), range(n)] = np.nan
    dims = ("layer", "expert", "expert_j")
    found = ml.stats.similarity_and_coactivation(
        xr.DataArray(alike, {"layer": [3]}, dims),
        xr.Dataset({"estimate": (dims, together)}, {"layer": [3]}),
        permutations=60,
        seed=9,
    ).sel(layer=3)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    other = [(together[0, i, j] + together[0, j, i]) / 2 for i, j in pairs]
    r = np.corrcoef([alike[0, i, j] for i, j in pairs], other)[0, 1]
    assert r < 0
    orders = np.random.default_rng(9)
    null = []
    for _ in range(60):
        order = orders.permutation(n)
        null.append(np.corrcoef([alike[0, order[i], order[j]] for i, j in pairs], other)[0, 1])
    assert float(found.r) == pytest.approx(r)
    assert float(found.p) == pytest.approx((sum(abs(x) >= abs(r) - 1e-9 for x in null) + 1) / 61)
    np.testing.assert_allclose([found.null_low, found.null_high], np.quantile(null, [0.025, 0.975]))
    assert int(found.n) == len(pairs)


def test_chance_and_excess_of_information_about_domains():
    """Chance is bounded by the middle of its own values; documents are drawn within their domain."""
    names = [f"d{i}" for i in range(12)]
    case = made((6, 9, 4, 12, 7, 5, 8, 10, 3, 6, 9, 5), layers=(1,), experts=4, documents=names, domains="xxxyyyxyxyxy")
    found = ml.stats.domain_information(case.trace, bootstrap=QUICK).sel(layer=1)
    table = np.zeros((12, 4))
    for t in range(case.n_tokens):
        for expert in loops.of_experts(case, 0, t):
            table[case.sequence[t], expert] += 1
    group = np.array([0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1])

    def information(weights, labels=group):
        joint = np.stack([(weights * (labels == g)) @ table for g in (0, 1)])
        return loops.information_bits(joint)

    rng = np.random.default_rng([QUICK.seed, 2**31])
    chance = [information(np.ones(12), rng.permutation(group)) for _ in range(1000)]
    permuted = found.sel(measure="permuted")
    assert float(permuted.estimate) == pytest.approx(np.mean(chance), rel=0.02)  # other permutations
    np.testing.assert_allclose([permuted.ci_low, permuted.ci_high], np.quantile(chance, [0.05, 0.95]), rtol=0.1)
    whole, variances, freedoms, bias = information(np.ones(12)), [], [], 0.0
    for one in (0, 1):
        members = np.flatnonzero(group == one)
        left_out = np.array([information(np.arange(12) != d) for d in members])
        sizes = case.lengths[members]
        effective = sizes.sum() ** 2 / (sizes**2).sum()
        squares = (left_out - left_out.mean()) ** 2
        variances.append((5 / 6) ** 2 * effective / (effective - 1) * squares.sum())
        kurtosis = 6 * (squares**2).sum() / squares.sum() ** 2
        freedoms.append(min(effective - 1, 12 / (max(kurtosis - 3, 0) + 12 / 5)))
        bias += 5 * (left_out.mean() - whole)
    welch = sum(variances) ** 2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
    reach = scipy_stats.t.ppf(0.95, welch) * math.sqrt(sum(variances))
    plain, excess = found.sel(measure="mutual_information"), found.sel(measure="excess")
    expected = min(max(whole - bias - reach, 0), whole), max(whole - bias + reach, whole)
    np.testing.assert_allclose([plain.ci_low, plain.ci_high], expected, rtol=1e-6)
    beside = whole - np.mean(chance)
    expected = min(whole - bias - reach, beside), max(whole - bias + reach, beside)
    np.testing.assert_allclose([excess.ci_low, excess.ci_high], expected, rtol=1e-6)
