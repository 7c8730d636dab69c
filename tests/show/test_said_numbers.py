"""Sentences of findings: numbers and names in them are those of the arrays, and less is said where less is sure."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import displayed as see
from helpers.inside import Analysis, findings
from helpers.numbers import LAYERS, made_up, shares

import mixlens as ml

PAIRS = {"layer": LAYERS, "expert": range(6), "expert_j": range(6)}


def said(**found) -> list[str]:
    """Findings of these statistics alone."""
    trace = ml.Trace.from_arrays(np.zeros((1, 1, 1), int), n_experts=2)
    return findings(Analysis("made", trace, {name.replace("__", " "): data for name, data in found.items()}, {}))


def furthest(data, centre: float) -> tuple[int, ...]:
    """Among those that survive."""
    return np.unravel_index(np.nanargmax(np.abs(data.estimate - centre).where(data.survives)), data.estimate.shape)


def shown(cell, factor: float = 100, digits: int = 1) -> tuple[float, float, float]:
    return tuple(round(factor * float(cell[name]), digits) for name in ("estimate", "ci_low", "ci_high"))


def counts(cell) -> list[float]:
    return [int(cell.n), int(cell.n_documents)]


@pytest.mark.parametrize("statistic", ["expert_share", "domain_specialization"])
@pytest.mark.parametrize("seed", range(4))
def test_the_share_that_is_named_is_the_one_furthest_from_chance(statistic, seed):
    data = shares(seed=seed, missing=True, statistic=statistic)
    data["estimate"][1, 2, seed] = 0.5 if seed % 2 else -0.3  # the largest, or the smallest
    data["estimate"][0, 1, seed] = 0.6
    data["survives"][1, 2, seed], data["survives"][0, 1, seed] = True, False
    place = furthest(data, 0.125)
    cell = data[dict(zip(data.estimate.dims, place, strict=True))]
    (sentence,) = said(**{statistic: data})
    assert see.intervals(sentence) == [shown(cell)]
    assert f"{cell.domain.item()}, layer {cell.layer.item()}, expert {cell.expert.item()}" in sentence
    assert place == (1, 2, seed)
    assert see.numbers(sentence)[-6:] == [12.5, *counts(cell), int(data.survives.sum()), data.attrs["cells"], 10]


def test_company_names_the_expert_and_its_companion():
    data = made_up(PAIRS, seed=1, statistic="coactivation")
    data["estimate"][1, 4, 2] = 0.9
    data["survives"][1, 4, 2] = True
    (sentence,) = said(coactivation=data)
    assert see.numbers(sentence)[:3] == [5, 4, 2]
    assert see.intervals(sentence) == [shown(data.isel(layer=1, expert=4, expert_j=2))]


def test_the_layers_of_most_and_least_are_told_with_their_own_intervals():
    balance = made_up(
        {"measure": ["cv", "switch_loss"], "layer": LAYERS}, statistic="load_balance", unit="1", uniform=None
    )
    (sentence,) = said(load_balance=balance)
    cv = balance.sel(measure="cv")
    worst, best = (cv.isel(layer=int(getattr(cv.estimate.to_numpy(), f"arg{way}")())) for way in ("max", "min"))
    assert see.intervals(sentence) == [shown(worst, 1, 3), shown(best, 1, 3)]
    found = see.numbers(sentence)
    assert (found[0], found[4]) == (worst.layer.item(), best.layer.item())
    assert found[-2:] == counts(worst)
    entropy = made_up({"layer": LAYERS}, seed=3, statistic="routing_entropy", unit="bits", uniform=3.0)
    (sentence,) = said(routing_entropy=entropy)
    low, high = (entropy.isel(layer=int(getattr(entropy.estimate.to_numpy(), f"arg{way}")())) for way in ("min", "max"))
    assert see.intervals(sentence) == [shown(low, 1, 3), shown(high, 1, 3)]
    assert see.numbers(sentence)[-3:] == [3, *counts(low)]


def test_information_is_counted_sure_only_where_it_survives():
    data = made_up({"measure": ["excess"], "layer": LAYERS}, statistic="domain_information", unit="bits", uniform=None)
    data["estimate"][:] = [[0.01, 0.5, 0.3, 0.2]]
    data["ci_low"][:] = [[-0.01, 0.4, -0.001, 0.1]]
    data["ci_high"][:] = [[0.02, 0.6, 0.5, 0.3]]
    data["survives"][:] = [[False, True, False, True]]
    (sentence,) = said(domain_information=data)
    assert see.intervals(sentence) == [(0.5, 0.4, 0.6)]
    assert see.numbers(sentence)[0] == 5
    assert see.numbers(sentence)[-2:] == [2, 4]
    data["survives"][:] = False
    (sentence,) = said(domain_information=data)
    assert see.intervals(sentence) == []


def test_less_is_said_of_layers_that_do_not_survive():
    data = made_up({"layer": LAYERS, "choice": ["first", "either"]}, statistic="repetition", uniform=[0.125, 0.46])
    data["estimate"][:, 0] = [0.2, 0.13, 0.1, 0.126]
    data["ci_low"][:, 0] = [0.15, 0.11, 0.09, 0.12]
    data["ci_high"][:, 0] = [0.25, 0.15, 0.12, 0.2]
    data["estimate"][:, 1] = [0.7, 0.47, np.nan, 0.3]
    data["ci_low"][:, 1] = [0.4, 0.465, np.nan, 0.2]
    data["ci_high"][:, 1] = [0.8, 0.48, np.nan, 0.459]
    data["survives"][:] = [[True, False], [False, True], [True, False], [False, True]]
    data["p"][2, 1] = np.nan
    first, either = said(repetition=data)
    assert see.numbers(first)[:6] == [12.5, 2, 4, 1, 1, 2]  # chance; different, of, above, below; layer
    assert see.intervals(first) == [(20, 15, 25)]
    assert see.numbers(either)[:6] == [46, 2, 3, 1, 1, 2]
    assert see.intervals(either) == [(70, 40, 80)]


def test_transitions_name_the_layers_between_which_most_is_known():
    data = made_up({"layer": LAYERS, "expert": range(6), "expert_j": range(6)}, statistic="transitions", gap=3)
    per_row = data.n.isel(expert_j=0)
    data = data.assign(n=per_row, n_documents=data.n_documents.isel(expert=0, expert_j=0))
    bits = [0.1, 0.4, np.nan, 0.3]
    data = data.assign({f"mi_{end}": ("layer", np.add(bits, by)) for end, by in
                        {"bits": 0, "ci_low": -0.05, "ci_high": 0.07}.items()})  # fmt: skip
    (sentence,) = said(transitions=data)
    n = int(per_row.isel(layer=1).sum())
    assert see.numbers(sentence)[:5] == [5, 8, 0.4, 0.35, 0.47]
    assert see.numbers(sentence)[-2:] == [n, int(data.n_documents[1])]


def test_prediction_is_told_beside_its_chance_at_the_same_layer():
    measures = ["majority", "token", "token_and_previous"]
    data = made_up({"measure": measures, "layer": LAYERS}, statistic="predictability", uniform=None)
    best = int(data.estimate.sel(measure="token").to_numpy().argmax())
    there = data.isel(layer=best)
    (sentence,) = said(predictability=data)
    order = ["token", "majority", "token_and_previous"]
    assert see.intervals(sentence) == [shown(there.sel(measure=measure)) for measure in order]
    assert see.numbers(sentence)[0] == LAYERS[best]
    vocabulary = made_up({"layer": LAYERS}, seed=9, statistic="vocabulary_specialization", uniform=None)
    cell = vocabulary.isel(layer=int(vocabulary.estimate.to_numpy().argmax()))
    (sentence,) = said(vocabulary_specialization=vocabulary)
    assert see.intervals(sentence) == [shown(cell)]
    assert see.numbers(sentence)[0] == cell.layer.item()


def test_nothing_is_said_of_numbers_that_are_all_missing():
    nothing = shares().where(False)
    entropy = made_up({"layer": LAYERS}, statistic="routing_entropy").where(False)
    assert said(expert_share=nothing, domain_specialization=nothing, routing_entropy=entropy) == []


def test_no_interval_is_invented_for_a_single_document():
    data = shares()
    data["ci_low"][:] = data["ci_high"][:] = data["p"][:] = np.nan
    data["survives"][:] = False
    (sentence,) = said(expert_share=data.assign_attrs(cells=0))
    assert see.numbers(sentence) == []  # and nothing is told apart
