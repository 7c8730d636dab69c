"""steer: push the experts that differ between two sets of documents, and measure the effect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.intervals import Difference, leaving_out, with_bounds
from mixlens.decisions.verdict import DECISION, Documents, bounded, check_positive, groups_compared
from mixlens.errors import BadInput
from mixlens.interventions.edits import add, edit
from mixlens.interventions.hooks import Edit
from mixlens.models.layout import moe_layers, n_experts
from mixlens.recording.corpus import RecordSettings
from mixlens.recording.record import record
from mixlens.stats.routing import expert_share
from mixlens.stats.verdicts import UNKNOWN, fewest_units, level_of_each, of_all, verdict
from mixlens.trace.trace import Trace

SETTINGS = RecordSettings()
TEXTS = ("behaviour", "held_out")
ARMS = ("chosen", "random", "chosen_less_random")
_NEAREST = 3  # number of experts with similar frequency from which a random one is drawn

Place = tuple[int, int]


def steer(
    model: nn.Module,
    contrast: xr.Dataset,
    behaviour: Iterable[Any],
    held_out: Iterable[Any],
    *,
    limit: float,
    doses: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    experts: int = 8,
    draws: int = 5,
    tokenizer: Any = None,
    bootstrap: Bootstrap = DECISION,
    settings: RecordSettings = SETTINGS,
) -> xr.Dataset:
    """Push the experts that differ between two sets of documents, and measure the effect on behaviour and other text.

    Of the cells that survive the contrast, the `experts` with the largest differences are pushed: a dose is added to
    their router logits if the first set uses them more, and subtracted if it uses them less (edits.add). As a control,
    random experts of the same layers with similar frequencies are pushed in the same way.

    The verdict uses the dose that is best on one half of the documents. It is "do it" if the other half shows that the
    behaviour's loss falls, that it falls further than with random experts, and that the other text's loss rises by at
    most `limit`; "do not" if any of these is refuted; otherwise, or if no expert differs, "not enough evidence".

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    contrast : xarray.Dataset
        Result of ``stats.contrast(trace, stats.expert_share, ...)`` on documents that are not used here.
    behaviour : Iterable[Any]
        Documents that show the desired behaviour, like those of the first set, as for record.
    held_out : Iterable[Any]
        Other text, which should not get worse.
    limit : float
        Maximum rise of the loss of the other text, nats per token.
    doses : Sequence[float], optional
        Values to add to router logits.
    experts : int, optional
        Maximum number of experts to push, over all layers.
    draws : int, optional
        Number of sets of random experts, over which their effect is averaged.
    tokenizer, settings
        As for record.
    bootstrap : Bootstrap, optional
        Settings of the intervals; its seed draws the random experts and the halves.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (change in loss, nats per token), ci_low, ci_high ``[text, arm, dose]``, paired over all documents;
        n (documents) ``[text]``; chosen ``[layer, expert]``, the sign of the push; attrs verdict, and dose, the dose
        that was judged. NaN throughout if no expert differs.

    Raises
    ------
    BadInput
        If `contrast` is not a contrast of [layer, expert], or a dose is not above 0.

    Examples
    --------
    >>> found = ml.stats.contrast(trace, ml.stats.expert_share, by="domain", a="github")
    >>> steered = ml.decisions.steer(
    ...     model, found, documents[:2], documents[4:6], limit=0.05, doses=[1.0], draws=1, settings=quiet
    ... )
    >>> steered["estimate"].dims
    ('text', 'arm', 'dose')
    """
    _check(contrast, doses, model)
    rng = np.random.default_rng(bootstrap.seed)
    chosen = _chosen(contrast, experts)

    def losses(documents: Iterable[Any], *edits: Edit) -> _Losses:
        with groups_compared(), edit(model, *edits) if edits else nullcontext():
            trace = record(model, documents, signals=["logprob"], tokenizer=tokenizer, settings=settings)
        return _Losses.of(trace, bootstrap)

    texts = [text if isinstance(text, str) else list(text) for text in (behaviour, held_out)]
    whole = [losses(text) for text in texts]
    change = [np.full((len(ARMS), len(doses), len(one.loss)), np.nan) for one in whole]
    if chosen:
        share = expert_share(whole[1].trace)["estimate"]
        others = [_matched(chosen, share, rng) for _ in range(draws)]
        for text, own, found in zip(texts, whole, change, strict=True):
            for column, dose in enumerate(doses):
                of_random = [losses(text, *_edits(each, dose)).loss for each in others]
                found[0, column] = losses(text, *_edits(chosen, dose)).loss - own.loss
                found[1, column] = np.mean(of_random, axis=0) - own.loss
            found[2] = found[0] - found[1]
    coords = {"arm": list(ARMS), "dose": list(doses)}
    rows = [
        xr.Dataset(bounded("estimate", ("arm", "dose"), _mean(one, own.tokens), own.tokens, bootstrap), coords)
        for one, own in zip(change, whole, strict=True)
    ]
    pushed = xr.zeros_like(contrast["estimate"]).drop_attrs()
    for (layer, expert), sign in chosen.items():
        pushed.loc[{"layer": layer, "expert": expert}] = sign
    dose, found = _judged(change, whole, limit, bootstrap)
    data = xr.concat(rows, xr.IndexVariable("text", list(TEXTS)))
    return data.assign(n=("text", [len(own.loss) for own in whole]), chosen=pushed).assign_attrs(
        statistic="steer", unit="nats per token", model=contrast.attrs.get("model", "unknown"),
        contrast=f"{contrast.attrs.get('a')} less {contrast.attrs.get('b')}", limit=limit, draws=draws,
        level=bootstrap.level, interval=Difference.how, dose=float("nan") if dose is None else float(doses[dose]),
        verdict=found,
    )  # fmt: skip


@dataclass(frozen=True)
class _Losses:
    """Return loss and predicted tokens of each document, and whether it is a judging one [document]."""

    trace: Trace
    loss: np.ndarray
    tokens: np.ndarray
    judging: np.ndarray

    @classmethod
    def of(cls, trace: Trace, bootstrap: Bootstrap) -> _Losses:
        documents, logprob = Documents.of(trace, bootstrap), trace.read("logprob").astype(np.float64)
        known = np.isfinite(logprob)
        loss, tokens = documents.sum(np.stack([np.where(known, -logprob, 0.0), known])).T
        return cls(trace, loss, tokens, documents.judging)


def _check(contrast: xr.Dataset, doses: Sequence[float], model: nn.Module) -> None:
    layers, count = [layer.index for layer in moe_layers(model)], n_experts(model)
    found = contrast.attrs.get("statistic") if isinstance(contrast, xr.Dataset) else type(contrast).__name__
    fits = found == "contrast" and set(contrast["estimate"].dims) == {"layer", "expert"}
    if not fits or contrast.sizes["expert"] != count or not set(contrast.layer.values.tolist()) <= set(layers):
        raise BadInput(
            f"Cannot steer by {found}: expected a contrast of [layer, expert] with layers among {layers} and {count} "
            "experts. Pass what ml.stats.contrast(trace, ml.stats.expert_share, by=...) gives for this model.",
            argument="contrast",
            value=found,
        )
    check_positive("a push of experts", doses=min(doses, default=0.0))


def _chosen(contrast: xr.Dataset, experts: int) -> dict[Place, float]:
    """Return {(layer, expert): sign} of the surviving cells with the largest differences."""
    cells = contrast["estimate"].where(contrast["survives"]).stack(place=("layer", "expert")).dropna("place")
    order = np.argsort(-np.abs(cells.values), kind="stable")[:experts]
    return {tuple(map(int, cells.place.values[i])): float(np.sign(cells.values[i])) for i in order}  # type: ignore[misc]


def _matched(chosen: dict[Place, float], share: xr.DataArray, rng: np.random.Generator) -> dict[Place, float]:
    """Draw for every expert another of its layer with a similar frequency, without repetition."""
    found: dict[Place, float] = {}
    for (layer, expert), sign in chosen.items():
        own = share.sel(layer=layer).values
        free = [e for e in range(len(own)) if (layer, e) not in chosen and (layer, e) not in found]
        nearest = sorted(free, key=lambda e: abs(own[e] - own[expert]))[:_NEAREST]
        if nearest:
            found[layer, int(rng.choice(nearest))] = sign
    return found


def _edits(places: dict[Place, float], dose: float) -> list[Edit]:
    return [add(sign * dose, layers=layer, experts=expert) for (layer, expert), sign in places.items()]


def _mean(change: np.ndarray, tokens: np.ndarray) -> Difference:
    """Return the change per token [arm, dose] from sums over documents [arm, dose, document]."""
    return Difference(leaving_out(np.moveaxis(change, -1, 0)), leaving_out(tokens))


def _judged(
    change: Sequence[np.ndarray], whole: Sequence[_Losses], limit: float, bootstrap: Bootstrap
) -> tuple[int | None, str]:
    """Return the best dose on one half, and the judgement of the other half on it."""
    if np.isnan(change[0]).all() or min((~of.judging).sum() for of in whole) < 1:
        return None, UNKNOWN
    behaviour, other = (
        found[0][:, ~of.judging].sum(-1) / of.tokens[~of.judging].sum() for found, of in zip(change, whole, strict=True)
    )
    allowed = np.where(other <= limit, behaviour, np.inf)
    dose = int(allowed.argmin()) if np.isfinite(allowed).any() else 0
    level = level_of_each(bootstrap.level, 3)  # three claims must hold simultaneously
    ways = []
    for text, arm, needed in ((0, 0, 0.0), (0, 2, 0.0), (1, 0, -limit)):
        judges, tokens = whole[text].judging, whole[text].tokens
        gain = _mean(-change[text][arm, dose, judges], tokens[judges])
        _, low, high = with_bounds(gain, tokens[judges], level)
        enough = judges.sum() >= fewest_units(level)
        ways.append(verdict(float(low), float(high), needed=needed) if enough else UNKNOWN)
    return dose, of_all(ways)
