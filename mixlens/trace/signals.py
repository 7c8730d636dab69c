"""Signals and activation sites that can be recorded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mixlens.core.text import numbered
from mixlens.errors import BadInput

SITES = {
    "resid_pre": "residual stream before the layer [token, hidden]",
    "resid_post": "residual stream after the layer [token, hidden]",
    "attn_out": "output of attention, before the residual addition [token, hidden]",
    "moe_in": "input of the router and the experts, after the norm [token, hidden]",
    "moe_out": "output of the experts, before the residual addition [token, hidden]",
    "shared_out": "output of the shared experts, before their gate [token, hidden]",
    "shared_gate": "logit whose sigmoid multiplies the shared experts [token, 1]",
    "expert_out": "output of each chosen expert, before its weight [token, slot, hidden]",
    "expert_norm": "Euclidean norm of each chosen expert's output [token, slot]",
    "expert_neurons": "neurons inside each chosen expert, before down_proj [token, slot, neuron]",
}
SHARED_SITES = ("shared_out", "shared_gate")  # only in layers with shared experts
EXPERT_SITES = ("expert_out", "expert_norm", "expert_neurons")
OPTIONS = ("router_logits", "logprob", "top_logprobs")
TOKENS = ("all", "last", "prompt", "generated")
DEFAULT = ("router_logits", "logprob")
TOP = 64


@dataclass(frozen=True)
class Site:
    """Activation site to record in every layer or some layers.

    Parameters
    ----------
    name : str
        One of SITES.
    layers : tuple[int, ...], optional
        Layer numbers; None for all.
    dtype : str, optional
        "float16" or "float32" on disk.
    tokens : str, optional
        "all", "last" (of each sequence), "prompt" or "generated".

    Examples
    --------
    >>> ml.Site("moe_out", layers=[0, 3]).layers
    [0, 3]
    """

    name: str
    layers: tuple[int, ...] | None = None
    dtype: str = "float16"
    tokens: str = "all"


@dataclass(frozen=True)
class Signals:
    """Signals that a recording keeps besides expert ids and weights."""

    router_logits: bool
    logprob: bool
    top_logprobs: bool
    sites: tuple[Site, ...]

    @property
    def needs_logits(self) -> bool:
        return self.logprob or self.top_logprobs

    def plan(self) -> dict[str, Any]:
        sites = [{"name": s.name, "layers": s.layers, "dtype": s.dtype, "tokens": s.tokens} for s in self.sites]
        options = [name for name in OPTIONS if getattr(self, name)]
        return {"options": options, "sites": sites}


def parse_signals(signals: Iterable[str | Site], layers: Sequence[int]) -> Signals:
    """Parse names and Sites into Signals. Each Site gets explicit layers out of `layers`, those with experts.

    Raises BadInput for an unknown name, layer, dtype or token selection.
    """
    given = [signals] if isinstance(signals, str | Site) else list(signals)
    options = [s for s in given if isinstance(s, str) and s in OPTIONS]
    sites = [_site(s, layers) for s in given if not (isinstance(s, str) and s in OPTIONS)]
    names = [site.name for site in sites]
    if len(set(names)) != len(names):
        raise BadInput(
            f"Cannot record the sites {', '.join(names)}: one is repeated. Pass every site once.",
            argument="signals",
            value=names,
        )
    return Signals(**{name: name in options for name in OPTIONS}, sites=tuple(sites))


def _site(signal: str | Site, known: Sequence[int]) -> Site:
    site = Site(signal) if isinstance(signal, str) else signal
    if not isinstance(site, Site):
        raise BadInput(
            f"Cannot record the signal {site!r}: expected a name or a Site. Names are {', '.join([*OPTIONS, *SITES])}.",
            argument="signals",
            value=site,
        )
    if site.name not in SITES:
        near = difflib.get_close_matches(site.name, [*OPTIONS, *SITES], n=1)
        raise BadInput(
            f"Cannot record the signal {site.name!r}: no such signal{f'; did you mean {near[0]}?' if near else '.'} "
            f"Pass one of {', '.join([*OPTIONS, *SITES])}.",
            argument="signals",
            value=site.name,
        )
    layers = tuple(known) if site.layers is None else tuple(int(layer) for layer in site.layers)
    unknown = [layer for layer in layers if layer not in known]
    if unknown or not layers:
        raise BadInput(
            f"Cannot record site {site.name} in layers {list(layers)}: the model has experts in layers "
            f"{numbered(known)}. Pass numbers among them.",
            argument="layers",
            value=list(layers),
        )
    if site.dtype not in ("float16", "float32") or site.tokens not in TOKENS:
        raise BadInput(
            f"Cannot record site {site.name} with dtype={site.dtype!r} and tokens={site.tokens!r}: dtypes are float16 "
            f"and float32, tokens are {', '.join(TOKENS)}. Pass one of each.",
            argument="tokens" if site.dtype in ("float16", "float32") else "dtype",
            value=site,
        )
    return Site(site.name, tuple(sorted(set(layers))), site.dtype, site.tokens)
