"""Findings of a report as sentences: each number with its interval, its n, and its value under chance."""

from __future__ import annotations

import numpy as np
import xarray as xr

from mixlens.plot import labels
from mixlens.reports.analysis import Analysis


def findings(analysis: Analysis) -> list[str]:
    """Return sentences on every statistic that was computed, the most informative first."""
    sentences = []
    for statistic, say in _SAY.items():
        if statistic in analysis.found:
            sentences += say(analysis.found[statistic])
    return sentences


def furthest(data: xr.Dataset) -> xr.Dataset | None:
    """Return the number furthest from uniform, or the largest if there is no uniform value; None if all are missing."""
    expected = labels.uniform(data)
    return _at(data, data["estimate"] if expected is None else abs(data["estimate"] - expected))


def largest(data: xr.Dataset) -> xr.Dataset | None:
    return _at(data, data["estimate"])


def smallest(data: xr.Dataset) -> xr.Dataset | None:
    return _at(data, -data["estimate"])


def _at(data: xr.Dataset, score: xr.DataArray) -> xr.Dataset | None:
    score = score.transpose(*data["estimate"].dims)
    if not np.isfinite(score).any():
        return None
    place = np.unravel_index(int(np.nanargmax(score.to_numpy())), score.shape)
    return data.isel({d: int(i) for d, i in zip(score.dims, place, strict=True)})


def place(cell: xr.Dataset) -> str:
    """Describe the place of a number, as "github, layer 3, expert 5"."""
    words = []
    for name, coord in cell.coords.items():
        if coord.ndim == 0 and name in cell["estimate"].coords:
            value = labels.label(coord.item(), str(name))
            words.append(f"{name} {value}" if name in ("layer", "expert", "position_bin") else value)
    return ", ".join(words)


def compared(data: xr.Dataset) -> str:
    """Describe how many numbers are above and below uniform, by their intervals."""
    expected = labels.uniform(data)
    if expected is None:
        return ""
    known = np.isfinite(data["estimate"])
    above = int(((data["ci_low"] > expected) & known).sum())
    below = int(((data["ci_high"] < expected) & known).sum())
    total = int(known.sum())
    held = total - above - below
    return f"its interval lies above that in {above} of {total}, below it in {below}, and holds it in {held}"


def _n(cell: xr.Dataset) -> str:
    return f"({labels.sample(cell)})"


def _of_many(data: xr.Dataset) -> str:
    return f"It is the most extreme of {int(np.isfinite(data['estimate']).sum()):,} values, which flatters it."


def _share(data: xr.Dataset) -> list[str]:
    cell = furthest(data)
    if cell is None:
        return []
    return [
        f"Expert share furthest from uniform: {place(cell)}, {labels.with_interval(cell)} of assignments, where "
        f"uniform routing gives {labels.uniform_text(data)} {_n(cell)}. {_of_many(data)}"
    ]


def _balance(data: xr.Dataset) -> list[str]:
    cv = data.sel(measure="cv")
    worst, best = largest(cv), smallest(cv)
    if worst is None or best is None:
        return []
    return [
        f"Load is least even at layer {int(worst['layer'])}: coefficient of variation of the experts' loads "
        f"{labels.with_interval(worst)}; most even at layer {int(best['layer'])}: {labels.with_interval(best)}; "
        f"perfect balance is 0 {_n(worst)}."
    ]


def _specialization(data: xr.Dataset) -> list[str]:
    cell = furthest(data)
    if cell is None:
        return []
    return [
        f"Most specialised: {place(cell)}, chosen by {labels.with_interval(cell)} of the domain's tokens, where "
        f"uniform routing gives {labels.uniform_text(data)} {_n(cell)}. {_of_many(data)}"
    ]


def _information(data: xr.Dataset) -> list[str]:
    excess = data.sel(measure="excess")
    cell = largest(excess)
    if cell is None:
        return []
    sure = int((excess["ci_low"] > 0).sum())
    return [
        f"Expert and domain share the most information at layer {int(cell['layer'])}: {labels.with_interval(cell)} "
        f"above permuted domain labels {_n(cell)}. "
        f"The interval lies above 0 in {sure} of {excess.sizes['layer']} layers."
    ]


def _repetition(data: xr.Dataset) -> list[str]:
    sentences = []
    for choice, name in (("first", "First choices"), ("either", "First or second choices")):
        part = data.sel(choice=choice)
        cell = furthest(part)
        expected = labels.uniform(part)
        if cell is None or expected is None:
            continue
        chance = labels.number(float(expected), part)
        sentences.append(
            f"{name} of consecutive tokens repeat by chance in {chance}; measured {compared(part)} layers; furthest "
            f"from it at layer {int(cell['layer'])}: {labels.with_interval(cell)} {_n(cell)}."
        )
    return sentences


def _entropy(data: xr.Dataset) -> list[str]:
    low, high = smallest(data), largest(data)
    if low is None or high is None:
        return []
    return [
        f"The router is most decided at layer {int(low['layer'])}, with an entropy of {labels.with_interval(low)}, "
        f"and least at layer {int(high['layer'])}, with {labels.with_interval(high)}; "
        f"uniform routing gives {labels.uniform_text(data)} {_n(low)}."
    ]


def _coactivation(data: xr.Dataset) -> list[str]:
    cell = furthest(data)
    if cell is None:
        return []
    i, j = int(cell["expert"]), int(cell["expert_j"])
    return [
        f"Company furthest from uniform: at layer {int(cell['layer'])} tokens of expert {i} also go to expert {j} in "
        f"{labels.with_interval(cell)}, where uniform routing gives {labels.uniform_text(data)} {_n(cell)}. "
        f"{_of_many(data)}"
    ]


def _transitions(data: xr.Dataset) -> list[str]:
    if not np.isfinite(data["mi_bits"]).any():
        return []
    best = data.isel(layer=int(data["mi_bits"].argmax("layer")))
    layer, gap = int(best["layer"]), int(data.attrs.get("gap", 1))
    low, high = float(best["mi_ci_low"]), float(best["mi_ci_high"])
    n = int(best["n"].sum())
    return [
        f"First choices of neighbouring layers hang together most between layers {layer} and {layer + gap}: mutual "
        f"information {float(best['mi_bits']):.3f} bits [{low:.3f}, {high:.3f}], independent layers give 0 "
        f"(n = {n:,} tokens, {labels.counted(labels.span(best['n_documents']), 'document')})."
    ]


def _vocabulary(data: xr.Dataset) -> list[str]:
    cell = largest(data)
    if cell is None:
        return []
    return [
        f"Token types keep to one expert most at layer {int(cell['layer'])}: on average "
        f"{labels.with_interval(cell)} of a type's occurrences choose its most frequent expert {_n(cell)}."
    ]


def _predictability(data: xr.Dataset) -> list[str]:
    token = data.sel(measure="token")
    cell = largest(token)
    if cell is None:
        return []
    there = data.sel(layer=int(cell["layer"]))
    chance, context = there.sel(measure="majority"), there.sel(measure="token_and_previous")
    return [
        f"A token's identity predicts its first expert best at layer {int(cell['layer'])}: "
        f"{labels.with_interval(cell)} of held-out tokens, against {labels.with_interval(chance)} from the most "
        f"frequent expert alone and {labels.with_interval(context)} with the token before it known too {_n(cell)}."
    ]


_SAY = {
    "domain_specialization": _specialization,
    "domain_information": _information,
    "repetition": _repetition,
    "expert_share": _share,
    "load_balance": _balance,
    "routing_entropy": _entropy,
    "coactivation": _coactivation,
    "transitions": _transitions,
    "vocabulary_specialization": _vocabulary,
    "predictability": _predictability,
}
