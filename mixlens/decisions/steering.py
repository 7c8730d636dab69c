"""steer: push the experts that differ between two sets of documents, and verify what that does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.intervals import Difference, leaving_out, with_bounds
from mixlens.decisions.gate import losses
from mixlens.decisions.verdict import DECISION, DO, DO_NOT, UNKNOWN, fewest_units, verdict
from mixlens.errors import BadInput
from mixlens.interventions.edits import add, edit
from mixlens.interventions.hooks import Edit
from mixlens.models.layout import moe_layers, n_experts
from mixlens.recording.corpus import Corpus, RecordSettings, lengths_of, sum_documents
from mixlens.recording.record import record
from mixlens.stats.routing import expert_share

SETTINGS = RecordSettings()
TEXTS = ("behaviour", "held_out")
ARMS = ("chosen", "random", "chosen_less_random")
_NEAREST = 3  # experts of about the same frequency, among which a random one is drawn

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
    """Push the experts that differ between two sets of documents, and see what it does to behaviour and to other text.

    Of the cells that survive the contrast, the `experts` with the largest differences are pushed: a dose is added to
    their router logits where the first set uses them more, and subtracted where it uses them less (edits.add). Each
    dose is measured on documents of the first set and on other text, and so is the same push of random experts: of the
    same layers, and each of about the frequency of the one that it stands for.

    The verdict is "do it" where, at the dose that is best on one half of the documents, the other half shows that the
    behaviour's loss falls, that it falls further than with random experts, and that the other text's loss rises by no
    more than `limit`; "do not" where one of these is refuted; else "not enough evidence", as where no expert differs.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    contrast : xarray.Dataset
        What ``stats.contrast(trace, stats.expert_share, ...)`` gives, by documents of which none is used here.
    behaviour : Iterable[Any]
        Documents of the first set, as for record: text that shows the behaviour asked for.
    held_out : Iterable[Any]
        Other text, which should not get worse.
    limit : float
        How far the loss of the other text may rise, nats a token.
    doses : Sequence[float], optional
        What is added to router logits.
    experts : int, optional
        How many are pushed at most, over all layers.
    draws : int, optional
        Sets of random experts, over which their effect is averaged.
    tokenizer : Any, optional
        None for the one that belongs to the model.
    bootstrap : Bootstrap, optional
        How intervals are computed; its seed draws the random experts and the halves.
    settings : RecordSettings, optional
        How documents are read.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (change in loss, nats a token), ci_low, ci_high ``[text, arm, dose]``, paired over documents, of
        all of them; n (documents) ``[text]``; chosen ``[layer, expert]``, the sign of the push; attrs verdict, and
        dose, the one that was judged. NaN throughout where no expert differs.

    Raises
    ------
    BadInput
        For anything else than a contrast of [layer, expert], and doses that are not above 0.

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
    texts = [_Text.of(model, documents, tokenizer, settings) for documents in (behaviour, held_out)]
    change = [np.full((len(ARMS), len(doses), len(text.tokens)), np.nan) for text in texts]
    if chosen:
        trace = record(model, held_out, tokenizer=tokenizer, settings=settings)
        others = [_matched(chosen, expert_share(trace)["estimate"], rng) for _ in range(draws)]
        for text, found in zip(texts, change, strict=True):
            whole = text.losses(model)
            for column, dose in enumerate(doses):
                found[0, column] = text.losses(model, _edits(chosen, dose)) - whole
                found[1, column] = np.mean([text.losses(model, _edits(each, dose)) - whole for each in others], axis=0)
            found[2] = found[0] - found[1]
    rows = [_numbers(found, text.tokens, bootstrap) for found, text in zip(change, texts, strict=True)]
    dims, pushed = ("text", "arm", "dose"), xr.zeros_like(contrast["estimate"])
    for (layer, expert), sign in chosen.items():
        pushed.loc[{"layer": layer, "expert": expert}] = sign
    dose, found = _judged(change, [text.tokens for text in texts], limit, rng, bootstrap)
    return xr.Dataset(
        {name: (dims, np.stack([row[i] for row in rows])) for i, name in enumerate(("estimate", "ci_low", "ci_high"))}
        | {"n": ("text", [len(text.tokens) for text in texts]), "chosen": pushed.drop_attrs()},
        {"text": list(TEXTS), "arm": list(ARMS), "dose": list(doses)},
        {
            "statistic": "steer",
            "unit": "nats a token",
            "model": contrast.attrs.get("model", "unknown"),
            "contrast": f"{contrast.attrs.get('a')} less {contrast.attrs.get('b')}",
            "limit": limit,
            "draws": draws,
            "level": bootstrap.level,
            "interval": Difference.how,
            "dose": float("nan") if dose is None else float(doses[dose]),
            "verdict": found,
        },
    )


class _Text:
    """Documents that are read again and again: their sequences, and predicted tokens [document]."""

    def __init__(self, corpus: Corpus) -> None:
        self._batch_tokens = corpus.batch_tokens
        self._shards = list(corpus.shards())
        self.tokens = np.concatenate([sum_documents(s, lengths_of(s) - 1) for s in self._shards]).astype(float)

    @classmethod
    def of(cls, model: nn.Module, documents: Iterable[Any], tokenizer: Any, settings: RecordSettings) -> _Text:
        return cls(Corpus.of(model, documents, tokenizer, settings))

    def losses(self, model: nn.Module, edits: Sequence[Edit] = ()) -> np.ndarray:
        """[document] summed over its tokens."""
        if edits:
            with edit(model, *edits):
                return self.losses(model)
        parts = [
            sum_documents(shard, losses(model, [piece.ids for piece in shard.pieces], self._batch_tokens))
            for shard in self._shards
        ]
        return np.concatenate(parts)


def _check(contrast: xr.Dataset, doses: Sequence[float], model: nn.Module) -> None:
    found = contrast.attrs.get("statistic") if isinstance(contrast, xr.Dataset) else type(contrast).__name__
    if found != "contrast" or set(contrast["estimate"].dims) != {"layer", "expert"}:
        raise BadInput(
            f"Cannot steer by {found}: expected a contrast of [layer, expert]. Pass what ml.stats.contrast(trace, "
            "ml.stats.expert_share, by=...) gives.",
            argument="contrast",
            value=found,
        )
    known = [layer.index for layer in moe_layers(model)]
    if not set(contrast.layer.values.tolist()) <= set(known) or contrast.sizes["expert"] != n_experts(model):
        raise BadInput(
            f"Cannot steer by this contrast: it is of layers {contrast.layer.values.tolist()} with "
            f"{contrast.sizes['expert']} experts, the model has layers {known} with {n_experts(model)}. Pass one of "
            "this model.",
            argument="contrast",
            value=(contrast.layer.values.tolist(), contrast.sizes["expert"]),
        )
    if not len(doses) or not all(dose > 0 for dose in doses):
        raise BadInput(
            f"Cannot push experts by {list(doses)}: a dose is above 0. Pass numbers such as [0.5, 1, 2].",
            argument="doses",
            value=list(doses),
        )


def _chosen(contrast: xr.Dataset, experts: int) -> dict[Place, float]:
    """{(layer, expert): sign} of the surviving cells with the largest differences."""
    cells = contrast["estimate"].where(contrast["survives"]).stack(place=("layer", "expert")).dropna("place")
    order = np.argsort(-np.abs(cells.values), kind="stable")[:experts]
    return {tuple(map(int, cells.place.values[i])): float(np.sign(cells.values[i])) for i in order}  # type: ignore[misc]


def _matched(chosen: dict[Place, float], share: xr.DataArray, rng: np.random.Generator) -> dict[Place, float]:
    """For every expert another of its layer that is used about as often, drawn at random; none twice."""
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


def _numbers(change: np.ndarray, tokens: np.ndarray, bootstrap: Bootstrap) -> tuple[np.ndarray, ...]:
    """Estimate and bounds [arm, dose] of changes summed over documents [arm, dose, document]."""
    mean = Difference(leaving_out(np.moveaxis(change, -1, 0)), leaving_out(tokens))
    return with_bounds(mean, tokens, bootstrap.level)


def _judged(
    change: list[np.ndarray], tokens: list[np.ndarray], limit: float, rng: np.random.Generator, bootstrap: Bootstrap
) -> tuple[int | None, str]:
    """(the dose that is best on one half, what the other half says of it)."""
    halves = [rng.permutation(len(own)) % 2 == 0 for own in tokens]
    if np.isnan(change[0]).all() or min(half.sum() for half in halves) < 2:
        return None, UNKNOWN
    fitted = [of[:2][..., half].sum(-1) / own[half].sum() for of, own, half in zip(change, tokens, halves, strict=True)]
    allowed = np.where(fitted[1][0] <= limit, fitted[0][0], np.inf)
    dose = int(allowed.argmin()) if np.isfinite(allowed).any() else 0
    each = replace(bootstrap, level=1 - (1 - bootstrap.level) / 3)  # three claims, which hold at once
    ways = []
    for text, arm, needed in ((0, 0, 0.0), (0, 2, 0.0), (1, 0, -limit)):
        own = ~halves[text]
        _, low, high = _numbers(-change[text][arm : arm + 1, dose : dose + 1, own], tokens[text][own], each)
        enough = own.sum() >= fewest_units(each.level)
        ways.append(verdict(float(low[0, 0]), float(high[0, 0]), needed=needed) if enough else UNKNOWN)
    return dose, DO_NOT if DO_NOT in ways else UNKNOWN if UNKNOWN in ways else DO
