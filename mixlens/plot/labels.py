"""Titles, units, sample sizes, intervals and other text that describes the numbers of a statistic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import xarray as xr

from mixlens.core.text import NO_INTERVAL
from mixlens.errors import BadInput
from mixlens.trace.trace import Trace

TITLES = {
    "expert_share": "Expert share",
    "load_balance": "Load balance",
    "routing_entropy": "Routing entropy",
    "router_confidence": "Router confidence",
    "repetition": "Repetition of consecutive choices",
    "coactivation": "Co-activation",
    "transitions": "Transitions between layers",
    "position_profile": "Expert share by position",
    "domain_specialization": "Domain specialization",
    "domain_information": "Information between expert and domain",
    "vocabulary_specialization": "Vocabulary specialization",
    "predictability": "Predictability of the first choice",
    "agreement": "Agreement of two traces",
    "flips": "Tokens that choose other experts",
    "flips_by_margin": "Other experts by the router's margin",
    "next_tokens": "Predictions of the next token",
    "quality": "Predictions of the next token",
    "split": "Change by what was changed",
    "expert_errors": "Error of every expert's output",
    "mutual_information_between_layers": "Mutual information between layers",
}
DENOMINATORS = {
    "expert_share": "of assignments",
    "position_profile": "of assignments",
    "domain_specialization": "of the domain's tokens",
    "repetition": "of consecutive tokens",
    "coactivation": "of tokens that chose i",
    "transitions": "of tokens that chose i first",
    "vocabulary_specialization": "of a type's occurrences",
    "predictability": "of held-out tokens",
    "agreement": "of tokens",
    "flips": "of tokens",
    "flips_by_margin": "of choices in the bin",
}
MEASURES = {
    "cv": "CV of expert loads",
    "max_over_mean": "largest load / mean load",
    "switch_loss": "Switch loss (balanced = k)",
    "p1": "p1, probability of the first choice",
    "p1_minus_p2": "p1 − p2",
    "w2_over_w1": "w2 / w1",
    "mutual_information": "mutual information",
    "permuted": "domain labels permuted",
    "excess": "above permuted",
    "majority": "most frequent expert (chance)",
    "token": "token identity",
    "token_and_previous": "token and the one before",
    "top1": "same first choice",
    "overlap": "shared experts, |S ∩ S′| / k",
    "jensen_shannon": "Jensen-Shannon divergence, bits",
    "changed": "other experts in this layer",
    "first_flip": "for the first time in this layer",
    "so_far": "in this layer or an earlier one",
    "after_flip": "of tokens that flipped before",
    "without_flip": "of tokens that did not",
    "more_after": "more of tokens that flipped before",
    "first": "first choice repeats",
    "either": "first or second choice repeats",
}
OURS = ("measure", "choice")  # dimensions whose values are defined by mixlens
_LABELS = {
    "repetition": ("choice", ("first", "either")),
    "load_balance": ("measure", ("cv", "max_over_mean", "switch_loss")),
    "router_confidence": ("measure", ("p1", "p1_minus_p2", "w2_over_w1")),
    "agreement": ("measure", ("top1", "overlap", "jensen_shannon")),
}
_UNITS = {"jensen_shannon": "bits", "same_top": "fraction"}
_FRACTIONS = ("fraction", "share")


def statistic(data: xr.Dataset) -> str:
    return str(data.attrs.get("statistic", ""))


def title(data: xr.Dataset) -> str:
    name = statistic(data)
    return TITLES.get(name, name.replace("_", " ").capitalize())


def denominator(data: xr.Dataset) -> str:
    """Return the denominator of a share, as "of assignments"; empty if the number is not a share."""
    return DENOMINATORS.get(statistic(data), "") if is_fraction(data) else ""


def unit(data: xr.Dataset) -> str:
    """Return the unit of the numbers, or of the selected measure if it has its own."""
    measure = data.coords.get("measure")
    own = _UNITS.get(str(measure.item())) if measure is not None and measure.ndim == 0 else None
    return own or str(data.attrs.get("unit", ""))


def is_fraction(data: xr.Dataset) -> bool:
    return unit(data) in _FRACTIONS


def number(value: float, data: xr.Dataset) -> str:
    """Format a value with its unit, as "12.3 %" or "1.234 bits"; NaN is "not available"."""
    if not math.isfinite(value):
        return "not available"
    if is_fraction(data):
        return f"{plain(value, data)} %"
    return f"{plain(value, data)} bits" if unit(data) == "bits" else plain(value, data)


def plain(value: float, data: xr.Dataset) -> str:
    """Format a value without its unit; shares are in per cent."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f}" if is_fraction(data) else f"{value:.3f}"


def with_interval(cell: xr.Dataset) -> str:
    """Format a Dataset without dimensions as "12.3 % [11.9, 12.8]"."""
    low, high = (plain(float(cell[name]), cell) for name in ("ci_low", "ci_high"))
    interval = NO_INTERVAL if low == "–" else f"{low}, {high}"
    return f"{number(float(cell['estimate']), cell)} [{interval}]"


def sample(data: xr.Dataset) -> str:
    """Return the smallest and largest n of `data`, as "n = 9,876 to 12,003 tokens, 30 documents"."""
    thing = "token pair" if statistic(data) == "repetition" else "token"
    text = f"n = {counted(span(data['n']), thing)}{_per(data['n'])}"
    if "n_documents" not in data:
        return text
    return f"{text}, {counted(span(data['n_documents']), independent(data))}{_per(data['n_documents'])}"


def independent(data: xr.Dataset) -> str:
    """Return the unit that intervals treat as independent: "document", or "author cluster"."""
    return f"{data.attrs['cluster']} cluster" if "cluster" in data.attrs else "document"


def counted(count: str, thing: str) -> str:
    return f"{count} {thing}" if count == "1" else f"{count} {thing}s"


def _per(counts: xr.DataArray) -> str:
    """Return " per domain" if every domain has a count of its own."""
    owners = [str(d) for d in counts.dims if d not in ("layer", "measure", "choice") and counts.sizes[d] > 1]
    return f" per {' and '.join(owners)}".replace("_", " ") if owners else ""


def span(counts: xr.DataArray) -> str:
    values = np.asarray(counts, float)
    values = values[np.isfinite(values)]
    if not values.size:
        return "0"
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def level(data: xr.Dataset) -> str:
    return f"{100 * float(data.attrs['level']):g} % interval"


def over(data: xr.Dataset, drawn: str = "") -> str:
    """Describe the intervals, as "whiskers: 95 % interval over documents", and why some values have none."""
    text = f"{drawn}: {level(data)} over {independent(data)}s".removeprefix(": ")
    lacking = np.isfinite(data["estimate"].to_numpy()) & ~np.isfinite(data["ci_low"].to_numpy())
    if not lacking.any():
        return text
    why = data.attrs.get("no_interval", f"fewer than two {independent(data)}s")
    return f"{NO_INTERVAL} ({why})" if lacking.all() else f"{text}; {NO_INTERVAL} of {why}"


def survivors(data: xr.Dataset) -> str:
    """Describe the test behind a mark, as "survives among 64 cells at a false discovery rate of 5 %"."""
    rate = 100 * (1 - float(data.attrs["level"]))
    cells = int(data.attrs["cells"])
    null = f", against {data.attrs['null']}" if "null" in data.attrs else ""
    return f"survives among {counted(f'{cells:,}', 'cell')} at a false discovery rate of {rate:.3g} %{null}"


def surviving(data: xr.Dataset) -> np.ndarray:
    """Return whether each number survives, in the shape of the estimate; none of a Dataset that was not tested."""
    return data["survives"].to_numpy() if "survives" in data else np.zeros(data["estimate"].shape, bool)


def marked(data: xr.Dataset, mark: str, what: str = "") -> str:
    """Return the note on a `mark` of survivors, as "dot: survives among ..."; empty if nothing was tested."""
    return f"{mark}: {what}{survivors(data)}" if data.attrs.get("cells") else ""


def none_survives(data: xr.Dataset, what: str, against: str) -> str:
    """Return the sentence for a statistic without surviving or without testable cells."""
    if not data.attrs["cells"]:
        return f"No {what} is tested against {against}: that takes two documents or more that differ."
    return f"No {what} differs significantly from {against}: none {survivors(data)}."


def uniform(data: xr.Dataset) -> xr.DataArray | None:
    """Return the value under uniform routing, with the dimensions it depends on, or None if there is none."""
    value = data.attrs.get("uniform")
    if value is None:
        return None
    array = xr.DataArray(np.asarray(value, float))
    if array.ndim:  # one value per label of the statistic; `data` may hold only some of them
        dim, labels = _LABELS[statistic(data)]
        array = xr.DataArray(array.to_numpy(), {dim: list(labels)}).sel({dim: data[dim]})
    return array if np.isfinite(array).any() else None


def uniform_text(data: xr.Dataset) -> str:
    """Format the value under uniform routing, as "12.5 % of assignments"; empty if there is none."""
    value = uniform(data)
    if value is None:
        return ""
    scale, sign = (100, " %") if is_fraction(data) else (1, f" {unit(data)}" if unit(data) == "bits" else "")
    numbers = list(dict.fromkeys(f"{scale * v:.4g}{sign}" for v in np.ravel(value) if math.isfinite(v)))
    return f"{', '.join(numbers)} {denominator(data)}".rstrip()


def uniform_note(data: xr.Dataset) -> str:
    text = uniform_text(data)
    return f"uniform routing: {text}" if text else ""


def note(data: xr.Dataset, *, drawn: str, line: str = "dashed") -> str:
    """Return the small print of a figure: n, what the interval is `drawn` as, and the uniform level."""
    parts = [sample(data), over(data, drawn)]
    if expected := uniform_note(data):
        parts.append(f"{line}: {expected}" if line else expected)
    if "expected" in data:
        shuffles = f"{data.attrs['permutations']} shuffles, band: {level(data)}"
        parts.append(f"dotted: {data.attrs['null']} ({shuffles})")
    return "; ".join(parts)


def label(value: object, dim: str = "measure") -> str:
    """Return the label of a value of `dim`: a description for measures and choices, else the value itself."""
    text = str(value.item() if isinstance(value, np.generic) else value)
    return MEASURES.get(text, text) if dim in OURS else text


def chosen(data: xr.Dataset) -> str:
    """Return the selection made before drawing, as "domain github, layer 3"; empty if there is none."""
    names = [n for n, c in data.coords.items() if c.ndim == 0 and n not in ("slot",)]
    return ", ".join(label(data[n].item(), str(n)) if n in OURS else f"{n} {data[n].item()}" for n in names)


def groups(data: xr.Dataset, *own: str) -> Iterator[tuple[str, xr.Dataset]]:
    """Iterate over every combination of the dimensions other than `own`, with its label."""
    others = [d for d in data["estimate"].dims if d not in own]
    for place in itertools.product(*(range(data.sizes[d]) for d in others)):
        part = data.isel(dict(zip(others, place, strict=True)))
        yield " / ".join(label(part[d].item(), str(d)) for d in others), part


def at_layer(data: xr.Dataset, layer: int | None) -> xr.Dataset:
    """Select one layer, by default the middle one; raise BadInput if the data does not have it."""
    if "layer" not in data.dims:
        return data
    layers = data["layer"].to_numpy()
    if layer is None:
        layer = int(layers[len(layers) // 2])
    if layer not in layers:
        raise BadInput(
            f"Cannot draw layer {layer}: the data has layers {', '.join(map(str, layers))}. Pass one of them.",
            argument="layer",
            value=layer,
        )
    return data.sel(layer=layer)


def only(data: xr.Dataset, what: str, *own: str) -> xr.Dataset:
    """Return `data` reduced to the dimensions `own`, dropping others of length one.

    Raises BadInput that names the dimension to select from if others remain.
    """
    data = data.squeeze([d for d in data["estimate"].dims if d not in own and data.sizes[d] == 1])
    if extra := [str(d) for d in data["estimate"].dims if d not in own]:
        first = data[extra[0]].to_numpy()
        raise BadInput(
            f"Cannot draw {what}: it shows {' x '.join(own)}, but the data also has {', '.join(extra)} "
            f"({len(first)} values). Select one with data.sel({extra[0]}={first.tolist()[0]!r}), or draw all with "
            "show.facet.",
            argument="data",
            value=extra,
        )
    return data


def model_name(trace: Trace) -> str:
    """Return the model's name on the Hub, or the last part of its folder."""
    model = trace.meta.get("model", {})
    name = str(model.get("name", "a model") if isinstance(model, Mapping) else model)
    return Path(name).name if Path(name).is_absolute() else name
