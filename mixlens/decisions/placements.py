"""Placement: on which device each expert belongs, judged by the busiest device of a step on held-out documents."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from math import comb, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.files import write_file
from mixlens.core.intervals import Difference, Mean, Quantity, leaving_out, said, with_bounds
from mixlens.decisions.documents import Documents
from mixlens.decisions.verdict import DECISION, judged
from mixlens.errors import BadInput
from mixlens.stats.counts import clustered, described, require

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

_MOST_PLACEMENTS = 5000  # of a layer's experts, tried one by one


def placement(
    trace: Trace,
    *,
    ranks: int,
    redundant: int = 0,
    step: int = 256,
    nodes: int = 1,
    groups: int = 1,
    hidden_bytes: float | None = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DECISION,
) -> xr.Dataset:
    """Compute how much busier than the mean the busiest device of a step is, for several placements of the experts.

    A step is so many consecutive tokens of a sequence, or what is left of it, and its time that of the device with
    most tokens: the estimate is sum of max load / sum of mean load over steps and layers, 1 where all devices always
    have as much to do. An expert with several copies has its tokens shared between them. Placements:

    - contiguous: the experts of a layer in order, as many on each device; no copies
    - packed: the most loaded expert first, each to the least loaded device that has room; no copies
    - uninformed: copies and places as `eplb` chooses from as many tokens that go to experts by chance; only with copies
    - eplb: DeepSeek's Expert Parallelism Load Balancer: the expert with the largest load per copy gets the next copy,
      and copies are packed; where `nodes` divides `groups`, groups to nodes first, then within nodes

    All are fitted on one half of the documents and judged on the other. The verdict says whether eplb is worth a trial:
    "do it" where it is more even than uninformed, or than contiguous without copies; "do not" where it is less even.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot].
    ranks : int
        Devices that share the experts of a layer; divides experts and copies together.
    redundant : int, optional
        Copies of experts beside the one that each has.
    step : int, optional
        Tokens of a step.
    nodes : int, optional
        Machines that the devices stand in, as many in each.
    groups : int, optional
        Groups of experts that a router chooses among, such as 8 of DeepSeek-V3; 1 for a Mixtral.
    hidden_bytes : float, optional
        Bytes of a token's hidden state, for what travels between nodes.
    cluster : str, optional
        Column of the sequences, such as "author", whose values vary independently where documents do not.
    bootstrap : Bootstrap, optional
        How intervals are computed, and the seed of the halves.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (max over mean), ci_low, ci_high ``[placement]``; by_layer, by_layer_low, by_layer_high
        ``[placement, layer]``; physical ``[layer, physical]``, the expert of each place under eplb, device by device;
        load ``[layer, expert]``, tokens of the fitting half; regret ``[placement]``, what a placement is worse than the
        best one without copies that is known afterwards, by trying all of them, NaN where they are more than 5000 or
        there are copies. With several nodes remote ``[placement]``, nodes other than its own that a token is sent to,
        added up over layers, if its own is any of them, and moves ``[placement]``, how often its first choice of a
        layer is on another node than that of the layer before; with `hidden_bytes` also bytes_per_token, there and
        back. n (steps), n_documents; attrs verdict, gain, gain_low, gain_high, judged_on.

    Raises
    ------
    BadInput
        For ranks, copies, nodes or groups that do not divide what they share.

    Examples
    --------
    >>> found = ml.decisions.placement(trace, ranks=4)
    >>> found["placement"].values.tolist()
    ['contiguous', 'packed', 'eplb']
    """
    trace = clustered(trace, cluster)
    require(trace, "placement", "expert_id", bootstrap=bootstrap)
    e, n_layers = trace.n_experts, trace.n_layers
    _check(e, ranks, redundant, step, nodes, groups)
    ids, sequence = trace.read("expert_id").astype(np.int64), trace.read("sequence")
    first = np.searchsorted(sequence, sequence)
    documents = Documents.of(trace, first, sequence, bootstrap)
    opens = (np.arange(len(ids)) - first) % step == 0
    of_step = np.cumsum(opens) - 1
    steps = replace(documents, starts=of_step[documents.starts])
    fits = ~documents.judging[documents.of_token(first)]

    n_steps = int(opens.sum())
    load = np.stack([np.bincount(ids[fits, i].ravel(), minlength=e) for i in range(n_layers)]).astype(float)
    placed = _placements(load, ranks, redundant, nodes, groups, bootstrap.seed)
    names, judging = list(placed), documents.judging
    most, best = np.zeros((len(names), len(judging), n_layers)), np.full(n_layers, np.nan)
    for i in range(n_layers):
        counts = np.zeros((n_steps, e))
        np.add.at(counts, (of_step[:, None], ids[:, i]), 1.0)
        for at, physical in enumerate(placed.values()):
            most[at, :, i] = steps.sum((counts @ _shares(physical[i], e, ranks)).max(-1))
        if not redundant:
            judges = counts[np.repeat(judging[steps.unit], np.diff(np.append(steps.starts, n_steps)))]
            best[i] = min(((judges @ on_rank).max(-1).sum() for on_rank in _every_placement(e, ranks)), default=np.nan)
    mean = documents.sum(np.full((1, len(ids)), trace.top_k / ranks))[:, 0][judging]
    tokens, most = mean / mean.sum(), most[:, judging]

    def over_mean(kind: type[Mean] | type[Difference], top: np.ndarray, times: int) -> Quantity:
        return kind(leaving_out(top), leaving_out(mean * times))

    estimates = over_mean(Mean, most.sum(-1).T, n_layers)
    by_layer = over_mean(Mean, most.transpose(1, 0, 2), 1)
    data: dict[str, Any] = {
        name: (dims, values)
        for names_, dims, quantity in (
            (("estimate", "ci_low", "ci_high"), ("placement",), estimates),
            (("by_layer", "by_layer_low", "by_layer_high"), ("placement", "layer"), by_layer),
        )
        for name, values in zip(names_, with_bounds(quantity, tokens, bootstrap.level), strict=True)
    }
    data |= {
        "physical": (("layer", "physical"), placed["eplb"]),
        "load": (("layer", "expert"), load),
        "regret": ("placement", data["estimate"][1] - best.sum() / (n_layers * mean.sum())),
        "n": n_steps,
        "n_documents": len(judging),
    }
    if nodes > 1:
        judged_ids = ids[~fits]
        traffic = np.array([_between_nodes(judged_ids, physical, e, nodes) for physical in placed.values()])
        data |= {"remote": ("placement", traffic[:, 0]), "moves": ("placement", traffic[:, 1])}
        if hidden_bytes is not None:
            data["bytes_per_token"] = ("placement", 2 * hidden_bytes * traffic[:, 0])
    against = "uninformed" if redundant else "contiguous"
    ahead = (most[names.index(against)] - most[names.index("eplb")]).sum(-1)
    gain = over_mean(Difference, ahead, n_layers)
    return described(
        xr.Dataset(data, coords={"placement": names, "layer": trace.layers, "expert": range(e)}), trace, bootstrap,
        statistic="placement", unit="ratio", ranks=ranks, redundant=redundant, step=step, nodes=nodes, groups=groups,
        against=against, judged_on=int(judging.sum()), interval=said(estimates),
        **judged(gain, tokens, bootstrap),
        source="EPLB, DeepSeek-AI 2025, github.com/deepseek-ai/EPLB",
    )  # fmt: skip


def save_placement(
    found: xr.Dataset, path: str | os.PathLike[str], *, engine: Literal["sglang", "vllm-ascend"] = "sglang"
) -> Path:
    """Write the eplb placement as the JSON that an engine loads when it starts.

    Parameters
    ----------
    found : xarray.Dataset
        From `placement`.
    path : str or os.PathLike
        The file, ending in .json.
    engine : str, optional
        "sglang" for ``--init-expert-location``, with ``--ep-num-redundant-experts`` for the copies; "vllm-ascend" for
        its ``expert_map_path``. Layers without experts, or left out of the trace, have their experts in order for
        SGLang, which counts all layers; vLLM-Ascend counts those with experts.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    BadInput
        If `found` is no placement, or for an unknown engine.

    Examples
    --------
    >>> found = ml.decisions.placement(trace, ranks=4)
    >>> ml.decisions.save_placement(found, tmp / "experts.json").name
    'experts.json'
    """
    if not isinstance(found, xr.Dataset) or found.attrs.get("statistic") != "placement":
        raise BadInput(
            f"Cannot save a {type(found).__name__} as a placement. Pass what ml.decisions.placement returns.",
            argument="found",
            value=type(found).__name__,
        )
    ranks, physical = int(found.attrs["ranks"]), found["physical"].values
    if engine == "sglang":
        n_experts, layers = found.sizes["expert"], found["layer"].values
        rows = np.tile(np.arange(physical.shape[1]) % n_experts, (int(layers.max()) + 1, 1))
        rows[layers] = physical
        plain: dict[str, Any] = {"physical_to_logical_map": rows.tolist()}
    elif engine == "vllm-ascend":
        plain = {"moe_layer_count": len(physical), "layer_list": [
            {"layer_id": i, "device_count": ranks, "device_list": [
                {"device_id": device, "device_expert": experts} for device, experts in enumerate(of_layer)
            ]} for i, of_layer in enumerate(physical.reshape(len(physical), ranks, -1).tolist())
        ]}  # fmt: skip
    else:
        raise BadInput(
            f"Cannot save a placement for {engine!r}: its format is not known. Pass sglang or vllm-ascend.",
            argument="engine",
            value=engine,
        )
    return write_file(path, json.dumps(plain, indent=1))


def eplb(load: np.ndarray, ranks: int, redundant: int, nodes: int = 1, groups: int = 1) -> np.ndarray:
    """The expert of each place, device by device [expert + copy], from the load of each expert of a layer [expert]."""
    if groups % nodes:
        nodes = groups = 1
    size = len(load) // groups
    node, rank = _packed(load.reshape(groups, size).sum(-1), nodes)
    places = (len(load) + redundant) // nodes
    found = []
    for at in range(nodes):
        inside = np.flatnonzero(node == at)
        experts = (inside[np.argsort(rank[inside])][:, None] * size + np.arange(size)).ravel()
        of, copies = list(range(len(experts))), np.ones(len(experts), np.int64)
        while len(of) < places:
            of.append(int(np.argmax(load[experts] / copies)))
            copies[of[-1]] += 1
        device, place = _packed((load[experts] / copies)[of], ranks // nodes)
        found.append(experts[np.array(of)[np.lexsort((place, device))]])
    return np.concatenate(found)


def _packed(load: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack and place within it of each item, as many in each: the largest first, to the lightest pack with room."""
    room = len(load) // packs
    if room == 1:
        return np.arange(packs), np.zeros(packs, np.int64)
    pack, place = np.zeros((2, len(load)), np.int64)
    weight, items = np.zeros(packs), np.zeros(packs, np.int64)
    for item in np.argsort(-load, kind="stable"):
        pack[item] = lightest = int(np.argmin(np.where(items < room, weight, np.inf)))
        place[item] = items[lightest]
        weight[lightest] += load[item]
        items[lightest] += 1
    return pack, place


def _placements(
    load: np.ndarray, ranks: int, redundant: int, nodes: int, groups: int, seed: int
) -> dict[str, np.ndarray]:
    """The expert of each place [layer, place], device by device, of each placement."""

    def each(of: np.ndarray, copies: int, *hierarchy: int) -> np.ndarray:
        return np.stack([eplb(row, ranks, copies, *hierarchy) for row in of])

    found = {}
    if load.shape[1] % ranks == 0:
        found |= {"contiguous": np.tile(np.arange(load.shape[1]), (len(load), 1)), "packed": each(load, 0)}
    if redundant:
        alike = np.full(load.shape[1], 1 / load.shape[1])
        by_chance = [np.random.default_rng([seed, i]).multinomial(int(row.sum()), alike) for i, row in enumerate(load)]
        found["uninformed"] = each(np.array(by_chance, float), redundant, nodes, groups)
    return found | {"eplb": each(load, redundant, nodes, groups)}


def _shares(physical: np.ndarray, n_experts: int, devices: int) -> np.ndarray:
    """Which part of each expert's tokens each device has [expert, device], from the expert of each place."""
    found = np.zeros((n_experts, devices))
    np.add.at(found, (physical, np.arange(len(physical)) * devices // len(physical)), 1.0)
    return found / found.sum(-1, keepdims=True)


def _every_placement(n_experts: int, ranks: int) -> Iterator[np.ndarray]:
    """Which device has each expert [expert, device], all ways to share them out; none where there are too many."""
    size = n_experts // ranks
    ways = prod(comb(size * (i + 1) - 1, size - 1) for i in range(ranks))
    if ways > _MOST_PLACEMENTS:
        return

    def shared_out(left: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if not left:
            yield ()
        for others in combinations(left[1:], size - 1) if left else ():
            inside = (left[0], *others)
            for rest in shared_out(tuple(one for one in left if one not in inside)):
                yield (*inside, *rest)

    for physical in shared_out(tuple(range(n_experts))):
        yield _shares(np.array(physical), n_experts, ranks)


def _between_nodes(ids: np.ndarray, physical: np.ndarray, n_experts: int, nodes: int) -> tuple[float, float]:
    """Other nodes that a token is sent to, and moves of its first choice between nodes, both added up over layers."""
    remote = moves = 0.0
    before: np.ndarray | None = None
    for layer, row in enumerate(physical):
        on_node = _shares(row, n_experts, nodes)[ids[:, layer]]
        reached = 1 - (1 - on_node).prod(1)
        remote += float(reached.sum(-1).mean()) * (1 - 1 / nodes)
        if before is not None:
            moves += 1 - float((before * on_node[:, 0]).sum(-1).mean())
        before = on_node[:, 0]
    return remote, moves


def _check(n_experts: int, ranks: int, redundant: int, step: int, nodes: int, groups: int) -> None:
    """Raises BadInput for numbers that do not divide what they share."""
    least = {"ranks": ranks, "redundant": redundant, "step": step, "nodes": nodes, "groups": groups}
    for name, value in least.items():
        if not isinstance(value, int | np.integer) or value < (0 if name == "redundant" else 1):
            raise BadInput(
                f"Cannot place experts with {name}={value!r}: it is no whole number from "
                f"{0 if name == 'redundant' else 1}. Pass one.",
                argument=name,
                value=value,
            )
    for name, whole, of, shared in (
        ("ranks", (n_experts + redundant) % ranks == 0, ranks, f"{n_experts} experts and {redundant} copies"),
        ("nodes", ranks % nodes == 0, nodes, f"{ranks} devices"),
        ("groups", n_experts % groups == 0, groups, f"{n_experts} experts"),
        ("redundant", groups % nodes != 0 or redundant % nodes == 0, nodes, f"{redundant} copies"),
    ):
        if not whole:
            raise BadInput(
                f"Cannot place experts with {name}={least[name]}: {of} does not divide {shared}. Pass numbers that do.",
                argument=name,
                value=least[name],
            )
