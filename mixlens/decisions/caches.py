"""Expert caches: hit rates by policy and size, and the cost of misses."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.files import write_file
from mixlens.core.intervals import Difference, Mean, Quantity, Share, leaving_out, said
from mixlens.decisions.verdict import DECISION, Documents, bounded, check_found, check_positive, judged
from mixlens.errors import BadInput, MissingSignal
from mixlens.stats import cache_replay
from mixlens.stats.inputs import clustered, require
from mixlens.stats.summaries import described
from mixlens.stats.verdicts import DO, UNKNOWN

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

Policy = Literal["lru", "lfu", "fixed", "least-stale", "prefetch", "optimum"]


def cache(
    trace: Trace,
    *,
    slots: int | Sequence[int] | None = None,
    policy: Policy = "lru",
    model: Any = None,
    expert_bytes: float | None = None,
    link_bytes_per_s: float | None = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DECISION,
) -> xr.Dataset:
    """Compute the hit rate of a cache that holds a number of experts per layer.

    Every sequence begins with an empty cache. The experts of a token are looked up and loaded together, and none of
    them evicts another. Policies:

    - lru: evicts the least recently used expert
    - lfu: evicts the expert used least often since it was loaded, and among equals the least recently used
    - fixed: holds the most frequent experts of one half of the documents from the start
    - least-stale: one pool of slots x layers; evicts experts that the current token did not use first, among these one
      of the layer whose turn comes last, then the least recently used (after Hoang et al. 2026, arXiv:2602.03921)
    - prefetch: lru that, while a layer computes, also loads the experts that the next layer's router would choose for
      this layer's input (Eliseev and Mazur 2023, arXiv:2312.17238)
    - optimum: evicts the expert needed last; no policy that loads on demand has more hits (Belady 1966)

    The verdict says whether the policy has more hits than the fixed set ("do it") or fewer ("do not"), on average over
    the sizes, on the half of the documents on which nothing was fitted. The fixed set is compared with an arbitrary set
    of its size, whose hit rate is slots / experts. The optimum is a bound, not a policy, and never gets "do it".
    Prefetch gains hits by useless loads, which `loads` includes and the verdict ignores. Only tokens that find the
    cache full count for the verdict, since a fixed set does not need filling.

    Parameters
    ----------
    trace : Trace
        Recording with ``expert_id``, uint8 or uint16 [token, layer, slot]; for prefetch also the activations of
        ``moe_in`` of all tokens.
    slots : int or Sequence[int], optional
        Number of experts that the cache holds per layer; None for all numbers from top-k to all experts. The runtime of
        lru and prefetch hardly depends on the number of sizes.
    policy : str, optional
        One of the policies above.
    model : transformers.PreTrainedModel, optional
        The recorded model, for its routers (prefetch) and the bytes of its experts.
    expert_bytes : float, optional
        Bytes per expert; by default those of `model`, if given.
    link_bytes_per_s : float, optional
        Bandwidth of the link that loads experts, such as 25e9 for PCIe 4.0 with 16 lanes.
    cluster, bootstrap
        As for `distinct_experts`; the seed also draws the halves.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (hit rate), ci_low, ci_high ``[slots]``; by_layer, by_layer_low, by_layer_high ``[slots, layer]``;
        loads (experts loaded per token, over all layers), loads_low, loads_high; gain, gain_low, gain_high (in hit
        rate); fixed (hit rate of the fixed set on the judging half), in_sample (the same set fitted and judged on all
        documents) and chance ``[slots]``; kept ``[slots, layer, expert]``, the fixed set. With expert bytes also
        bytes_per_token, and with a link tokens_per_s, tokens_per_s_low, tokens_per_s_high: predictions if only the link
        takes time. n (tokens), n_documents; attrs verdict, gain, gain_low, gain_high.

    Raises
    ------
    BadInput
        If the policy is unknown, slots are fewer than top-k or more than the experts of a layer, or bytes and rates
        are not above 0.
    MissingSignal
        If prefetch lacks a model or ``moe_in``.

    Examples
    --------
    >>> found = ml.decisions.cache(trace, slots=4)
    >>> found.attrs["verdict"], found.attrs["policy"]
    ('do it', 'lru')
    """
    trace = clustered(trace, cluster)
    require(trace, "cache", "expert_id", bootstrap=bootstrap)
    check_positive("a cache", expert_bytes=expert_bytes, link_bytes_per_s=link_bytes_per_s)
    sizes = _sizes(trace, slots, policy)
    e, k, n_layers = trace.n_experts, trace.top_k, trace.n_layers
    documents = Documents.of(trace, bootstrap)
    tokens, judging, of_token = documents.tokens, documents.judging, documents.of_token
    # Layers are read one by one, because each is contiguous in memory.
    ids = np.ascontiguousarray(trace.read("expert_id").swapaxes(0, 1), np.int64).swapaxes(0, 1)

    codes = (of_token[:, None] * e + ids[:, i] for i in range(n_layers))
    used = np.stack([np.bincount(code.ravel(), minlength=len(tokens) * e).reshape(-1, e) for code in codes], axis=1)
    kept, best = (_most_used(used[of].sum(0), sizes) for of in (~judging, slice(None)))
    found, loaded = _replay(trace, ids, documents.first, sizes, policy, kept, model)
    full = cache_replay.filled(ids, documents.first, e, sizes, pooled=policy == "least-stale")
    hits, loads, ahead, counted = _tallied(documents, ids, found, loaded, full, kept)
    chance = np.asarray(sizes) / e
    if policy == "fixed":
        counted = np.broadcast_to(k * tokens[:, None, None], hits.shape)
        ahead = hits - counted * chance[:, None]

    whole = judging if policy == "fixed" else np.ones_like(judging)
    of_whole, of_judging = leaving_out(tokens[whole]), tokens[judging]
    per_slots: dict[str, Quantity] = {
        "estimate": Share(leaving_out(hits[whole].sum(-1)), n_layers * k * of_whole),
        "loads": Mean(leaving_out(loads[whole].sum(-1)), of_whole),
    }
    if (of_expert := _bytes(trace, model, expert_bytes)) is not None:
        per_slots["bytes_per_token"] = Mean(leaving_out((loads * of_expert)[whole].sum(-1)), of_whole)
    by_layer = Share(leaving_out(hits[whole]), k * of_whole)
    gain = Difference(leaving_out(ahead[judging].sum(-1)), leaving_out(counted[judging].sum(-1)))
    data = {
        **bounded("by_layer", ("slots", "layer"), by_layer, tokens[whole], bootstrap),
        **bounded("gain", ("slots",), gain, of_judging, bootstrap),
    }
    for name, quantity in per_slots.items():
        data |= bounded(name, ("slots",), quantity, tokens[whole], bootstrap)
    if of_expert is not None and link_bytes_per_s is not None:
        for name, moved in (("", ""), ("_low", "_high"), ("_high", "_low")):
            with np.errstate(divide="ignore"):
                data[f"tokens_per_s{name}"] = ("slots", link_bytes_per_s / data[f"bytes_per_token{moved}"][1])
    with np.errstate(invalid="ignore"):
        held_out = np.einsum("ule,sle->s", used[judging], kept) / (n_layers * k * of_judging.sum())
    data |= {
        "fixed": ("slots", held_out),
        "in_sample": ("slots", np.einsum("ule,sle->s", used, best) / (n_layers * k * tokens.sum())),
        "chance": ("slots", chance),
        "kept": (("slots", "layer", "expert"), kept),
        "n": int(tokens.sum()),
        "n_documents": len(tokens),
    }
    overall = Difference(leaving_out(ahead[judging].sum((1, 2))), leaving_out(counted[judging].sum((1, 2))))
    about = judged(overall, of_judging, bootstrap)
    if policy == "optimum" and about["verdict"] == DO:
        about["verdict"] = UNKNOWN
    return described(
        xr.Dataset(data, coords={"slots": list(sizes), "layer": trace.layers, "expert": range(e)}), trace, bootstrap,
        statistic="cache", unit="fraction", policy=policy, against="any set" if policy == "fixed" else "fixed set",
        judged_on=int(judging.sum()), interval=said(per_slots | {"by_layer": by_layer}), **about,
        **({"predicted": "tokens_per_s"} if "tokens_per_s" in data else {}),
    )  # fmt: skip


def save_fixed_set(found: xr.Dataset, path: str | os.PathLike[str], *, slots: int) -> Path:
    """Write the fixed set as the activation counts by which KTransformers chooses the experts that stay on the GPU.

    The set's experts count 1 and all others 0. KTransformers keeps the highest counts of all layers together, so that
    it keeps the set that was judged: ``sglang.launch_server --kt-expert-placement-strategy frequency
    --init-expert-location PATH --kt-num-gpu-experts SLOTS``. This command is from its documentation and has not been
    run. The trace has to have all layers with experts.

    KTransformers reads the file with ``torch.load``, so it is a pickle. mixlens itself reads none.

    Parameters
    ----------
    found : xarray.Dataset
        From `cache`.
    path : str or os.PathLike
        The file, ending in .pt, as KTransformers asks.
    slots : int
        Experts of a layer.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    BadInput
        If `found` is no cache or has no such size, or for another ending.

    Examples
    --------
    >>> found = ml.decisions.cache(trace, policy="fixed")
    >>> ml.decisions.save_fixed_set(found, tmp / "on_gpu.pt", slots=4).name
    'on_gpu.pt'
    """
    import torch

    check_found(found, "cache")
    if slots not in (known := found["slots"].values.tolist()):
        raise BadInput(
            f"Cannot save a fixed set of {slots!r} experts: the result has {known}. Pass one of these.",
            argument="slots",
            value=slots,
        )
    if Path(path).suffix != ".pt":
        raise BadInput(
            f"Cannot save a fixed set as {Path(path).name}: KTransformers reads counts from .pt alone. Name it so.",
            argument="path",
            value=str(path),
        )
    layers = found["layer"].values.tolist()
    counts = torch.zeros(1, max(layers) + 1, found.sizes["expert"], dtype=torch.int32)
    counts[0, layers] = torch.from_numpy(found["kept"].sel(slots=slots).values.astype(np.int32))
    content = io.BytesIO()
    torch.save({"logical_count": counts}, content)
    return write_file(path, content.getvalue())


def _tallied(
    documents: Documents,
    ids: np.ndarray,
    found: np.ndarray,
    loaded: np.ndarray,
    full: Callable[[int], np.ndarray],
    kept: np.ndarray,
) -> np.ndarray:
    """Return hits, loads, extra hits over the fixed set and the choices behind them [4, document, size, layer].

    The last two count only tokens that find the cache full.
    """
    each = []
    for layer, (hits, loads) in enumerate(zip(found, loaded, strict=True)):
        filled = full(layer)
        ahead = (hits.astype(np.int16) - _of_set(kept[:, layer], ids[:, layer])) * filled
        each.append([documents.sum(values) for values in (hits, loads, ahead, filled * np.uint8(ids.shape[2]))])
    return np.stack([np.stack(of_layer) for of_layer in each], axis=-1)


def _replay(
    trace: Trace, ids: np.ndarray, first: np.ndarray, sizes: Sequence[int], policy: Policy, kept: np.ndarray, model: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of cached experts and of loaded experts [layer, size, token]."""
    e, layers = trace.n_experts, range(trace.n_layers)
    if policy == "prefetch":
        each = [
            cache_replay.prefetched(ids[:, i], ahead, first, e, sizes)
            for i, ahead in enumerate(_predicted(trace, model))
        ]
        found, loads = (np.stack(parts) for parts in zip(*each, strict=True))
        return found, loads
    if policy == "lru":
        found = np.stack([cache_replay.lru(ids[:, i], first, e, sizes) for i in layers])
    elif policy == "fixed":
        found = np.stack([_of_set(kept[:, i], ids[:, i]) for i in layers])
    else:
        of_all = cache_replay.least_stale if policy == "least-stale" else partial(cache_replay.replayed, policy=policy)
        found = np.ascontiguousarray(of_all(ids, first, e, sizes).transpose(2, 0, 1))
    return found, trace.top_k - found


def _of_set(kept: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Count the experts of each token [token, slot] in a set of each size [size, expert]; uint8 [size, token]."""
    found = np.zeros((len(kept), len(ids)), np.uint8)
    for chosen in ids.T:
        found += kept[:, chosen]
    return found


def _predicted(trace: Trace, model: Any) -> list[np.ndarray | None]:
    """Return by layer the experts [token, slot] that its router chooses for the previous layer's input, or None."""
    import torch

    from mixlens.models.layout import moe_layers

    if model is None or "moe_in" not in trace.sites:
        raise MissingSignal(
            "Cannot replay a cache with prefetch: it needs the model's routers and the layers' inputs. Record with "
            'signals=["moe_in"], and pass the model as model=.',
            argument="model" if model is None else "moe_in",
        )
    inputs = trace.activations("moe_in")
    if len(inputs) != trace.n_tokens:
        raise MissingSignal(
            f"Cannot replay a cache with prefetch: moe_in was recorded of {len(inputs)} of {trace.n_tokens} tokens. "
            'Record ml.Site("moe_in") with tokens="all".',
            argument="moe_in",
            value=len(inputs),
        )
    found: dict[int, np.ndarray] = {}
    for router in moe_layers(model):
        if router.index - 1 in inputs["layer"]:
            before = torch.from_numpy(inputs.sel(layer=router.index - 1).values)
            with torch.inference_mode():
                state = before.to(next(router.gate.parameters()))
                found[router.index] = router.read(router.gate(state))[2].cpu().numpy()
    return [found.get(number) for number in trace.layers.tolist()]


def _most_used(used: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Return the most used experts [size, layer, expert] by their counts [layer, expert]."""
    rank = np.argsort(np.argsort(-used, axis=-1, kind="stable"), axis=-1, kind="stable")
    return rank < np.asarray(sizes)[:, None, None]


def _bytes(trace: Trace, model: Any, expert_bytes: float | None) -> np.ndarray | float | None:
    """Return the bytes of one expert, per layer if a model is given."""
    if expert_bytes is not None or model is None:
        return expert_bytes
    from mixlens.models.layout import moe_layers
    from mixlens.models.provenance import audit

    of = {layer.index: int(audit(layer.experts).table["bytes"].sum()) / trace.n_experts for layer in moe_layers(model)}
    return np.array([of[number] for number in trace.layers.tolist()])


def _sizes(trace: Trace, slots: int | Sequence[int] | None, policy: str) -> list[int]:
    """Return the requested cache sizes. Raises BadInput for invalid sizes or an unknown policy."""
    if policy not in get_args(Policy):
        raise BadInput(
            f"Cannot replay the cache policy {policy!r}: policies are {', '.join(get_args(Policy))}. Pass one of them.",
            argument="policy",
            value=policy,
        )
    asked = range(trace.top_k, trace.n_experts + 1) if slots is None else np.atleast_1d(np.asarray(slots)).tolist()
    if not asked or any(not isinstance(n, int) or not trace.top_k <= n <= trace.n_experts for n in asked):
        raise BadInput(
            f"Cannot replay a cache of {slots} slots: it holds the {trace.top_k} experts of a token at least, and the "
            f"{trace.n_experts} of a layer at most. Pass whole numbers between.",
            argument="slots",
            value=slots,
        )
    return sorted(set(asked))
