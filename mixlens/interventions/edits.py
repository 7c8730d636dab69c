"""Interventions: edits of routing and activations, as a context manager round anybody's forward or generate.

    with ml.edit(model, ml.edits.ablate(3, 5), ml.edits.temperature(0.5)):
        model(**inputs)

Edits of routing act in the order given, each on what those before it left; an edit inside another comes after it.
Then follow edits of expert outputs and of sites, where those sites are. A Recorder, inside or outside, sees what the
model used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from mixlens.errors import BadInput
from mixlens.interventions.activations import PATCHED_EXPERTS, Output, Patch, values_of
from mixlens.interventions.hooks import Edit, check_fired, editing_of, release
from mixlens.interventions.replay import Replay
from mixlens.interventions.routing import Forbid, Force, Reroute, Rescale, TopK
from mixlens.interventions.where import EVERYWHERE, Where, whole_numbers
from mixlens.trace.signals import SITES
from mixlens.trace.trace import Trace

__all__ = [
    "Where",
    "ablate",
    "add",
    "edit",
    "forbid",
    "force",
    "patch",
    "replay",
    "reroute",
    "scale",
    "temperature",
    "top_k",
]

Numbers = int | Iterable[int]


@contextmanager
def edit(model: nn.Module, *edits: Edit) -> Iterator[None]:
    """Run everything inside a with block under edits of a model's routing or activations.

    The hooks are gone afterwards, whatever happened.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    edits : Edit
        Edits, made by the functions of ml.edits.

    Raises
    ------
    BadInput
        For an unknown layer or expert, where fewer experts than a token chooses would remain, for values whose
        shape does not fit, for a replay of other tokens, and, at the end, for an edit that met no token.
    RecordingError
        At the end, for layers that ran without the router or experts that an edit hooks.

    Examples
    --------
    >>> with ml.edit(model, ml.edits.forbid(layers=3, experts=5)):
    ...     edited = ml.record(model, documents[:2], settings=quiet)
    >>> bool((edited.select(layers=[3]).read("expert_id") == 5).any())
    False
    """
    if not edits:
        raise BadInput(
            "Cannot edit a model without an edit. Pass one or several, such as edits.ablate(3, 5).",
            argument="edits",
            value=(),
        )
    for one in edits:
        if not isinstance(one, Edit) or not isinstance(one.where, Where):
            found = f"{one!r}" if not isinstance(one, Edit) else f"where={one.where!r}"
            raise BadInput(
                f"Cannot edit a model with {found}, which is not {'a Where' if isinstance(one, Edit) else 'an edit'}. "
                "Make edits with the functions of mixlens.edits, such as edits.ablate(3, 5), and conditions with "
                "edits.Where(...).",
                argument="where" if isinstance(one, Edit) else "edits",
                value=one.where if isinstance(one, Edit) else one,
            )
    editing = editing_of(model)
    try:
        active = editing.enter(edits)
    except BaseException:
        release(model)
        raise
    try:
        yield
    finally:
        rows = editing.n_rows
        editing.leave(active)
        release(model)
    check_fired(active)
    for one in active:
        if rows and not one.everywhere and not one.matched:
            raise BadInput(
                f"Cannot apply {one.edit!r}: none of the tokens in {rows} rows meets its conditions. Check its where=.",
                argument="where",
                value=one.edit,
            )


def ablate(
    layers: Numbers | None,
    experts: Numbers,
    *,
    how: str = "reroute",
    mean: Any = None,
    where: Where = EVERYWHERE,
) -> Edit:
    """Remove experts from layers.

    Parameters
    ----------
    layers : Numbers or None
        Layer numbers; None for all.
    experts : Numbers
        Expert number, or several; None for all.
    how : str, optional
        "reroute": never chosen, the next best in their place, weights renormalised "zero": chosen as ever, but
        what they put out is zero, and the other weights stay "mean": chosen as ever, but they put out `mean`.
    mean : Any, optional
        [hidden] for one expert of one layer, or an xarray [layer, expert, hidden], such as expert_means gives.
    where : Where, optional
        Condition on the tokens that are edited; None for all.

    Returns
    -------
    Edit

    Examples
    --------
    >>> ml.edits.ablate(3, 5, how="zero")
    Output(layers=(3,), experts=(5,), where=Where(), how='zero')
    """
    if how == "reroute" and mean is None:
        return forbid(layers, experts, where=where)
    if how == "zero" and mean is None:
        return Output(_layers(layers), _numbers(experts), None, where)
    if how == "mean" and mean is not None:
        return Output(_layers(layers), _numbers(experts), _means(mean, _layers(layers), _numbers(experts)), where)
    raise BadInput(
        f'Cannot ablate an expert with how={how!r} and {"no " if mean is None else "a "}mean. Pass how="reroute" or '
        '"zero" without mean=, or how="mean" with it.',
        argument="how",
        value=how,
    )


def forbid(layers: Numbers | None, experts: Numbers, *, where: Where = EVERYWHERE) -> Edit:
    """Forbid experts: their router logits are -inf, and the next best are chosen instead.

    A token that would not have chosen them keeps the model's own routing, bit for bit.

    Parameters
    ----------
    layers : Numbers or None
        Layer number, or several; None for all.
    experts : Numbers
        Expert number, or several; None for all.
    where : Where, optional
        Condition on the tokens that are edited; None for all.

    Examples
    --------
    >>> with ml.edit(model, ml.edits.forbid(layers=0, experts=[1, 2])):
    ...     pass
    """
    return Forbid(_layers(layers), _numbers(experts), where)


def force(layers: Numbers | None, experts: Numbers, *, weight: float | None = None, where: Where = EVERYWHERE) -> Edit:
    """Force experts, in place of the weakest ones chosen.

    Parameters
    ----------
    layers : Numbers or None
        Layer number, or several; None for all.
    experts : Numbers
        Expert number, or several; None for all.
    weight : float, optional
        The weight of each, the others sharing what is left; None for what the router gives among those chosen.
    where : Where, optional
        Condition on the tokens that are edited; None for all.

    Returns
    -------
    Edit

    Examples
    --------
    >>> with ml.edit(model, ml.edits.force(layers=0, experts=2)):
    ...     pass
    """
    experts = _numbers(experts)
    if weight is not None and not 0 < weight * len(experts) <= 1:
        raise BadInput(
            f"Cannot force {len(experts)} experts with a weight of {weight} each: the weights of a token sum to 1. "
            f"Pass a weight above 0 and at most {1 / len(experts):.3g}.",
            argument="weight",
            value=weight,
        )
    return Force(_layers(layers), experts, weight, where)


def scale(
    factor: float, *, layers: Numbers | None = None, experts: Numbers | None = None, where: Where = EVERYWHERE
) -> Edit:
    """Multiply the router logits of some experts or of all.

    Parameters
    ----------
    factor : float
        The factor.
    layers : Numbers, optional
        Layer number, or several; None for all.
    experts : Numbers, optional
        Expert number, or several; None for all.
    where : Where, optional
        Condition on the tokens that are edited; None for all.

    Examples
    --------
    >>> with ml.edit(model, ml.edits.scale(0.5, layers=0, experts=2)):
    ...     pass
    """
    _finite("factor", factor)
    return Rescale(_layers(layers), None if experts is None else _numbers(experts), factor=factor, where=where)


def add(
    bias: float, *, layers: Numbers | None = None, experts: Numbers | None = None, where: Where = EVERYWHERE
) -> Edit:
    """Add a number to the router logits of some experts or of all.

    Parameters
    ----------
    bias : float
        The number added to the logits.
    layers : Numbers, optional
        Layer number, or several; None for all.
    experts : Numbers, optional
        Expert number, or several; None for all.
    where : Where, optional
        Condition on the tokens that are edited; None for all.

    Examples
    --------
    >>> with ml.edit(model, ml.edits.add(1.0, layers=0, experts=2)):
    ...     pass
    """
    _finite("bias", bias)
    return Rescale(_layers(layers), None if experts is None else _numbers(experts), bias=bias, where=where)


def temperature(value: float, *, layers: Numbers | None = None, where: Where = EVERYWHERE) -> Edit:
    """Divide router logits by a temperature: below 1 sharper, above 1 flatter; the same experts are chosen.

    Parameters
    ----------
    value : float
        The number.
    layers : Numbers, optional
        Layer number, or several; None for all.
    where : Where, optional
        Condition on the tokens that are edited; None for all.

    Examples
    --------
    >>> with ml.edit(model, ml.edits.temperature(2.0)):
    ...     pass
    """
    _finite("temperature", value)
    if value <= 0:
        raise BadInput(
            f"Cannot set the router temperature to {value}: it must be above 0. Pass a positive number.",
            argument="temperature",
            value=value,
        )
    return Rescale(_layers(layers), None, factor=1 / value, where=where)


def top_k(k: int, *, layers: Numbers | None = None) -> Edit:
    """Let every token choose k experts, with renormalised weights. A Recorder needs the same k in all layers.

    Parameters
    ----------
    k : int
        Number of experts.
    layers : Numbers, optional
        Layer number, or several; None for all.

    Examples
    --------
    >>> with ml.edit(model, ml.edits.top_k(1)):
    ...     one = ml.record(model, documents[:1], settings=quiet)
    >>> one.top_k
    1
    """
    return TopK(_layers(layers), _number(k, "k"))


def reroute(layers: Numbers | None, source: int, target: int, *, where: Where = EVERYWHERE) -> Edit:
    """Send tokens that would choose `source` to `target` instead, with its router logit and so its weight.

    A token that would choose both keeps `target`, with the larger of the two logits, and the next best comes in.

    Parameters
    ----------
    layers : Numbers or None
        Layer number, or several; None for all.
    source : int
        Expert that would be chosen.
    target : int
        Expert that is chosen instead.
    where : Where, optional
        Condition on the tokens that are edited; None for all.

    Examples
    --------
    >>> with ml.edit(model, ml.edits.reroute(layers=0, source=1, target=2)):
    ...     pass
    """
    if source == target:
        raise BadInput(
            f"Cannot reroute expert {source} to itself. Pass another target, or leave this edit out.",
            argument="target",
            value=target,
        )
    return Reroute(_layers(layers), _number(source, "source"), _number(target, "target"), where)


def replay(trace: Trace, *, weights: bool = False, layers: Numbers | None = None, where: Where = EVERYWHERE) -> Edit:
    """Let tokens choose the experts that a trace recorded for them.

    Rows are matched to sequences by their tokens, in any order. In a batch without an attention mask, what follows the
    end of a recorded sequence is taken for padding and keeps its routing.

    Parameters
    ----------
    trace : Trace
        The recording.
    weights : bool, optional
        Whether the recorded weights come too (kept in half precision); else the router weighs the experts.
    layers : Numbers, optional
        Layers to replay; None for all, and then the trace must have all.
    where : Where, optional
        Condition on the tokens that are edited; None for all.

    Returns
    -------
    Edit

    Examples
    --------
    >>> with ml.edit(model, ml.edits.replay(trace)):
    ...     pass
    """
    if not isinstance(trace, Trace):
        raise BadInput(
            f"Cannot replay {trace!r}: it is not a trace. Pass a recorded trace, or open it first: mixlens.open(path).",
            argument="trace",
            value=trace,
        )
    return Replay(trace, weights, _layers(layers), where)


def patch(site: str, values: Any, *, layer: int, expert: int | None = None, where: Where = EVERYWHERE) -> Edit:
    """Put activations in place of the model's own: activation patching, also of single experts.

    Parameters
    ----------
    site : str
        Resid_pre, resid_post, attn_out, moe_in, moe_out, expert_out (before the weight), or expert_neurons.
    values : Any
        [hidden]: the same for every token meant. [n, hidden]: one for each of where.positions, in any row. An
        xarray as Trace.activations(site) gives it: to each row, as a Recorder would number it, and position its
        own; positions without a value are left as they are. For sites of experts without `expert`, [slot, hidden]
        in place of [hidden]; neurons instead of hidden for expert_neurons.
    layer : int
        Layer number, or several; None for all.
    expert : int, optional
        For sites of experts: only the slots that chose this expert.
    where : Where, optional
        Condition on the tokens that are edited; None for all.

    Returns
    -------
    Edit

    Raises
    ------
    BadInput
        If site or shapes do not fit.
    """
    known = [name for name in SITES if name != "expert_norm"]
    if site == "expert_norm":
        raise BadInput(
            "Cannot patch expert_norm: many outputs have the same norm. Patch expert_out instead, for example with "
            "recorded outputs scaled to that norm.",
            argument="site",
            value=site,
        )
    if site not in known:
        raise BadInput(
            f"Cannot patch {site!r}: sites to patch are {', '.join(known)}. Pass one of them.",
            argument="site",
            value=site,
        )
    if expert is not None and site not in PATCHED_EXPERTS:
        raise BadInput(
            f"Cannot patch {site} of expert {expert}: only expert_out and expert_neurons belong to an expert. Leave "
            "expert out.",
            argument="expert",
            value=expert,
        )
    number = _number(layer, "layer")
    found, sequences, positions = values_of(site, values, number, expert, where)
    return Patch(
        site, found, (number,), None if expert is None else _number(expert, "expert"), sequences, positions, where
    )


def _layers(layers: Numbers | None) -> tuple[int, ...] | None:
    return None if layers is None else _numbers(layers, "layers")


def _numbers(numbers: Numbers, name: str = "experts") -> tuple[int, ...]:
    if found := whole_numbers(numbers):
        return found
    raise BadInput(
        f"Cannot make an edit with {name}={numbers!r}. Pass a whole number, or several.", argument=name, value=numbers
    )


def _number(number: int, name: str) -> int:
    found, *others = _numbers(number, name)
    if others:
        raise BadInput(
            f"Cannot make an edit with {name}={number!r}. Pass one whole number; for several, make several edits.",
            argument=name,
            value=number,
        )
    return found


def _finite(name: str, value: float) -> None:
    if not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise BadInput(
            f"Cannot change router logits with a {name} of {value!r}: it is not finite. Pass a finite number.",
            argument=name,
            value=value,
        )


def _means(mean: Any, layers: tuple[int, ...] | None, experts: tuple[int, ...]) -> dict[int, torch.Tensor]:
    if isinstance(mean, xr.DataArray):
        wanted = mean.transpose("layer", "expert", "hidden")
        numbers = wanted.layer.values.tolist()
        if not 0 <= min(experts) <= max(experts) < (count := wanted.sizes["expert"]):
            raise BadInput(
                f"Cannot set experts {list(experts)} to their means: the means have experts 0 to {count - 1}. Pass "
                "numbers among them.",
                argument="experts",
                value=list(experts),
            )
        missing = sorted(set(numbers if layers is None else layers) - set(numbers))
        if not missing:
            chosen = numbers if layers is None else layers
            means = {layer: torch.as_tensor(wanted.sel(layer=layer).values).float() for layer in chosen}
            empty = [layer for layer, value in means.items() if value[list(experts)].isnan().any()]
            if not empty:
                return means
            raise BadInput(
                f"Cannot set experts {list(experts)} to their means in layers {empty}: one of them was never chosen "
                "where the means were taken, so it has none. Take the means over more text.",
                argument="mean",
                value=empty,
            )
        raise BadInput(
            f"Cannot set experts to their means in layers {missing}: the means have layers {numbers}. Pass means of "
            "all edited layers.",
            argument="layers",
            value=missing,
        )
    value = torch.as_tensor(mean).float()
    if value.ndim != 1 or layers is None or len(layers) != 1 or len(experts) != 1:
        raise BadInput(
            f"Cannot set experts to a mean of shape {list(value.shape)}: a vector [hidden] holds for one expert of "
            "one layer. Pass one layer and one expert, or an xarray [layer, expert, hidden].",
            argument="mean",
            value=tuple(value.shape),
        )
    return {layers[0]: value.expand(experts[0] + 1, -1)}
