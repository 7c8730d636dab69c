"""Findings of a report as sentences, each number with its interval, n, and chance value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from mixlens.plot import labels
from mixlens.plot.messages import at_largest, furthest, furthest_surviving, message
from mixlens.reports.analysis import Analysis

_HEADLINES = ("domain_specialization", "domain_information", "expert_share", "coactivation", "transitions")
_UNTESTED = "Layers are ranked as measured, and not tested against each other."


def findings(analysis: Analysis) -> list[str]:
    """Return sentences on every statistic that was computed, the most informative first."""
    return [sentence for statistic in _SAY for sentence in said_of(analysis, statistic)]


def said_of(analysis: Analysis, statistic: str) -> list[str]:
    """Return the sentences on one statistic; none if it was not computed."""
    return _SAY[statistic](analysis.found[statistic]) if statistic in analysis.found else []


def headline(analysis: Analysis) -> str:
    """Return the most informative message of what differs significantly from chance; empty if nothing was."""
    for statistic in _SAY:
        data = analysis.found.get(statistic)
        if data is not None and "survives" in data and bool(data["survives"].any()) and statistic in _HEADLINES:
            return message(data)
    return ""


def largest(data: xr.Dataset) -> xr.Dataset | None:
    return at_largest(data, data["estimate"])


def smallest(data: xr.Dataset) -> xr.Dataset | None:
    return at_largest(data, -data["estimate"])


def place(cell: xr.Dataset) -> str:
    """Describe the place of a number, as "github, layer 3, expert 5"."""
    words = []
    for name, coord in cell.coords.items():
        if coord.ndim == 0 and name in cell["estimate"].coords:
            value = labels.label(coord.item(), str(name))
            words.append(f"{name} {value}" if name in ("layer", "expert", "position_bin") else value)
    return ", ".join(words)


def compared(data: xr.Dataset) -> str:
    """Describe how many numbers are above and below uniform, by the adjusted test."""
    uniform = labels.uniform(data)
    assert uniform is not None  # or there were no p
    above = data["survives"] & (data["estimate"] > uniform)
    total, n_above, n_below = (int(x.sum()) for x in (np.isfinite(data["p"]), above, data["survives"] & ~above))
    return f"differ significantly from that in {n_above + n_below} of {total} ({n_above} above, {n_below} below)"


def _grouped_by(data: xr.Dataset) -> str:
    return str(data.attrs.get("group", "domain"))


def _n(cell: xr.Dataset) -> str:
    return f"({labels.sample(cell)})"


def _significant(data: xr.Dataset, what: str, say: Callable[[xr.Dataset], str]) -> list[str]:
    """`say` of the number furthest from uniform among those that differ significantly from it, and how many do."""
    cell = furthest_surviving(data)
    if not np.isfinite(data["estimate"]).any():
        return []
    if cell is None:
        return [labels.none_survives(data, what, "uniform routing")]
    n = int(data["survives"].sum())
    which = "This is the only cell that differs" if n == 1 else f"This is the furthest of {n:,} cells that differ"
    return [
        f"{say(cell)}, where uniform routing gives {labels.uniform_text(data)} {_n(cell)}. {which} significantly "
        f"from uniform: {'it' if n == 1 else 'each'} {labels.survivors(data)}."
    ]


def _share(data: xr.Dataset) -> list[str]:
    def say(cell: xr.Dataset) -> str:
        return f"Expert share furthest from uniform: {place(cell)}, {labels.with_interval(cell)} of assignments"

    return _significant(data, "expert share", say)


def _balance(data: xr.Dataset) -> list[str]:
    cv = data.sel(measure="cv")
    worst, best = largest(cv), smallest(cv)
    if worst is None or best is None:
        return []
    return [
        f"Measured load is least even at layer {int(worst['layer'])}: coefficient of variation of the experts' loads "
        f"{labels.with_interval(worst)}; most even at layer {int(best['layer'])}: {labels.with_interval(best)}; "
        f"perfect balance is 0 {_n(worst)}. {_UNTESTED}"
    ]


def _specialization(data: xr.Dataset) -> list[str]:
    def say(cell: xr.Dataset) -> str:
        chosen = f"chosen by {labels.with_interval(cell)} of the {_grouped_by(data)}'s tokens"
        return f"Most specialised: {place(cell)}, {chosen}"

    return _significant(data, f"expert's share of a {_grouped_by(data)}", say)


def _information(data: xr.Dataset) -> list[str]:
    excess = data.sel(measure="excess")
    cell = largest(excess)
    if cell is None:
        return []
    sure = int(excess["survives"].sum())
    if not sure:
        what = f"say more about the {_grouped_by(data)} than permuted labels do"
        return [f"In no layer do experts {what}: none {labels.survivors(data)}."]
    return [
        f"Expert and {_grouped_by(data)} share the most information at layer {int(cell['layer'])}: "
        f"{labels.with_interval(cell)} above permuted labels {_n(cell)}. {sure} of {excess.sizes['layer']} layers "
        "differ significantly from those."
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
            f"{name} of consecutive tokens repeat in {chance} by chance. Layers {compared(part)}. Layer "
            f"{int(cell['layer'])} is furthest from it: {labels.with_interval(cell)} {_n(cell)}."
        )
    return sentences


def _beyond_tokens(data: xr.Dataset) -> list[str]:
    first = data.sel(choice="first")
    cell = at_largest(first, abs(first["excess"]))
    if cell is None:
        return []
    told, of = int(first["survives"].sum()), int(np.isfinite(first["p"]).sum())
    return [
        "If routing depended on the token alone, first choices of consecutive tokens would repeat in "
        f"{labels.number(float(cell['expected']), cell)} at layer {int(cell['layer'])}; the measured share is "
        f"{labels.with_interval(cell)} {_n(cell)}. {told} of {of} layers differ significantly from that, by "
        f"{data.attrs['permutations']} shuffles of routing among the occurrences of each token."
    ]


def _entropy(data: xr.Dataset) -> list[str]:
    low, high = smallest(data), largest(data)
    if low is None or high is None:
        return []
    return [
        f"The router is most decided at layer {int(low['layer'])}, with an entropy of {labels.with_interval(low)}, "
        f"and least at layer {int(high['layer'])}, with {labels.with_interval(high)}; "
        f"uniform routing gives {labels.uniform_text(data)} {_n(low)}. {_UNTESTED}"
    ]


def _coactivation(data: xr.Dataset) -> list[str]:
    def say(cell: xr.Dataset) -> str:
        return (
            f"Pair of experts furthest from uniform: at layer {int(cell['layer'])}, tokens that choose expert "
            f"{int(cell['expert'])} also choose expert {int(cell['expert_j'])} in {labels.with_interval(cell)}"
        )

    return _significant(data, "pair of experts", say)


def _transitions(data: xr.Dataset) -> list[str]:
    if not np.isfinite(data["mi_bits"]).any():
        return []
    best = data.isel(layer=int(data["mi_bits"].argmax("layer")))
    layer, gap = int(best["layer"]), int(data.attrs.get("gap", 1))
    low, high = float(best["mi_ci_low"]), float(best["mi_ci_high"])
    interval = f"[{low:.3f}, {high:.3f}]" if np.isfinite(low) else "[no interval]"
    n = int(best["n"].sum())
    return [
        f"The mutual information of first choices in neighbouring layers is largest between layers {layer} and "
        f"{layer + gap}: {float(best['mi_bits']):.3f} bits {interval}, independent layers give 0 "
        f"(n = {n:,} tokens, {labels.counted(labels.span(best['n_documents']), 'document')}). {_UNTESTED}"
    ]


def _vocabulary(data: xr.Dataset) -> list[str]:
    cell = largest(data)
    if cell is None:
        return []
    return [
        f"Token types keep to one expert most at layer {int(cell['layer'])}: on average "
        f"{labels.with_interval(cell)} of a type's occurrences choose its most frequent expert {_n(cell)}. {_UNTESTED}"
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
        f"frequent expert alone and {labels.with_interval(context)} with the token before it known too {_n(cell)}. "
        f"{_UNTESTED}"
    ]


_SAY = {
    "domain_specialization": _specialization,
    "domain_information": _information,
    "repetition": _repetition,
    "repetition beyond tokens": _beyond_tokens,
    "expert_share": _share,
    "load_balance": _balance,
    "routing_entropy": _entropy,
    "coactivation": _coactivation,
    "transitions": _transitions,
    "vocabulary_specialization": _vocabulary,
    "predictability": _predictability,
}
