"""Placement of experts on devices, judged by the busiest device of a step on held-out documents."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.files import write_file
from mixlens.core.intervals import Difference, Mean, leaving_out, said
from mixlens.decisions.verdict import DECISION, Documents, bounded, check_found, check_whole, judged
from mixlens.errors import BadInput
from mixlens.stats.expert_balance import eplb, every_placement, shares
from mixlens.stats.inputs import clustered, require
from mixlens.stats.summaries import described

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


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
    """Compute the load imbalance between devices for several placements of the experts.

    A step is `step` consecutive tokens of a sequence, or the remaining ones, and takes as long as its busiest device.
    The estimate is sum of max load / sum of mean load over steps and layers, which is 1 if all devices always have the
    same load. Copies of an expert share its tokens. Placements:

    - contiguous: the experts of a layer in order, equally many per device; no copies
    - packed: experts by descending load, each on the least loaded device with room; no copies
    - uninformed: copies and places that `eplb` chooses from as many tokens with random experts; only with copies
    - eplb: DeepSeek's Expert Parallelism Load Balancer: the expert with the largest load per copy gets the next copy,
      and copies are packed; if `nodes` divides `groups`, groups are assigned to nodes first, then experts within nodes

    All are fitted on one half of the documents and judged on the other. The verdict says whether eplb is worth a trial:
    "do it" if it is more balanced than uninformed, or than contiguous without copies; "do not" if it is less balanced.

    Parameters
    ----------
    trace : Trace
        Recording with ``expert_id``, uint8 or uint16 [token, layer, slot].
    ranks : int
        Number of devices that share the experts of a layer; must divide the number of experts and copies together.
    redundant : int, optional
        Number of additional copies of experts.
    step : int, optional
        Tokens per step.
    nodes : int, optional
        Number of machines with equally many devices each.
    groups : int, optional
        Number of expert groups that the router chooses among, such as 8 in DeepSeek-V3; 1 for Mixtral.
    hidden_bytes : float, optional
        Bytes of a token's hidden state, to compute the traffic between nodes.
    cluster, bootstrap
        As for `distinct_experts`; the seed also draws the halves.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (max over mean), ci_low, ci_high ``[placement]``; by_layer, by_layer_low, by_layer_high
        ``[placement, layer]``; physical ``[layer, physical]``, the expert of each place under eplb, device by device;
        load ``[layer, expert]``, tokens of the fitting half; regret ``[placement]``, excess over the best placement in
        hindsight by exhaustive search, NaN if there are more than 5000 placements, or copies. With several nodes remote
        ``[placement]``, number of nodes other than its own (any node) that a token is sent to, summed over layers;
        moves ``[placement]``, how often its first choice is on another node than in the previous layer; with
        `hidden_bytes` bytes_per_token, both ways. n (steps), n_documents; attrs verdict, gain, judged_on.

    Raises
    ------
    BadInput
        If ranks, copies, nodes or groups do not divide the experts or devices.

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
    documents = Documents.of(trace, bootstrap)
    ids, judging = trace.read("expert_id").astype(np.int64), documents.judging
    opens = (np.arange(len(ids)) - documents.first) % step == 0
    of_step, n_steps = np.cumsum(opens) - 1, int(opens.sum())
    steps = replace(documents, starts=of_step[documents.starts])
    fits = ~judging[documents.of_token]

    load = np.stack([np.bincount(ids[fits, i].ravel(), minlength=e) for i in range(n_layers)]).astype(float)
    placed = _placements(load, ranks, redundant, nodes, groups, bootstrap.seed)
    names = list(placed)
    most, best = np.zeros((len(names), len(judging), n_layers)), np.full(n_layers, np.nan)
    for i in range(n_layers):
        counts = np.zeros((n_steps, e))
        np.add.at(counts, (of_step[:, None], ids[:, i]), 1.0)
        for at, physical in enumerate(placed.values()):
            most[at, :, i] = steps.sum((counts @ shares(physical[i], e, ranks)).max(-1))
        if not redundant:
            judges = counts[np.repeat(judging[steps.unit], np.diff(np.append(steps.starts, n_steps)))]
            best[i] = min(((judges @ on_rank).max(-1).sum() for on_rank in every_placement(e, ranks)), default=np.nan)
    tokens, most = documents.tokens[judging], most[:, judging]
    mean = leaving_out(tokens * trace.top_k / ranks)
    estimates = Mean(leaving_out(most.sum(-1).T), n_layers * mean)
    by_layer = Mean(leaving_out(most.transpose(1, 0, 2)), mean)
    data = {
        **bounded("estimate", ("placement",), estimates, tokens, bootstrap),
        **bounded("by_layer", ("placement", "layer"), by_layer, tokens, bootstrap),
        "physical": (("layer", "physical"), placed["eplb"]),
        "load": (("layer", "expert"), load),
        "regret": ("placement", (estimates.top[:, 0] - best.sum()) / estimates.bottom[0]),
        "n": n_steps,
        "n_documents": len(judging),
    }
    if nodes > 1:
        traffic = np.array([_between_nodes(ids[~fits], physical, e, nodes) for physical in placed.values()])
        data |= {"remote": ("placement", traffic[:, 0]), "moves": ("placement", traffic[:, 1])}
        if hidden_bytes is not None:
            data["bytes_per_token"] = ("placement", 2 * hidden_bytes * traffic[:, 0])
    against = "uninformed" if redundant else "contiguous"
    ahead = (most[names.index(against)] - most[names.index("eplb")]).sum(-1)
    return described(
        xr.Dataset(data, coords={"placement": names, "layer": trace.layers, "expert": range(e)}), trace, bootstrap,
        statistic="placement", unit="ratio", ranks=ranks, redundant=redundant, step=step, nodes=nodes, groups=groups,
        against=against, judged_on=int(judging.sum()), interval=said(estimates),
        **judged(Difference(leaving_out(ahead), n_layers * mean), tokens, bootstrap),
        source="EPLB, DeepSeek-AI 2025, github.com/deepseek-ai/EPLB",
    )  # fmt: skip


def save_placement(
    found: xr.Dataset, path: str | os.PathLike[str], *, engine: Literal["sglang", "vllm-ascend"] = "sglang"
) -> Path:
    """Write the eplb placement as the JSON that an inference engine loads at startup.

    Parameters
    ----------
    found : xarray.Dataset
        Result of `placement`.
    path : str or os.PathLike
        File name, ending in .json.
    engine : str, optional
        "sglang" for ``--init-expert-location``, with ``--ep-num-redundant-experts`` for the copies; "vllm-ascend" for
        its ``expert_map_path``. SGLang counts all layers; those without experts, or missing in the trace, get their
        experts in order. vLLM-Ascend counts only layers with experts.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    BadInput
        If `found` is not a result of `placement`, or the engine is unknown.

    Examples
    --------
    >>> found = ml.decisions.placement(trace, ranks=4)
    >>> ml.decisions.save_placement(found, tmp / "experts.json").name
    'experts.json'
    """
    check_found(found, "placement")
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
            f"Cannot save a placement for {engine!r}: its format is unknown. Pass sglang or vllm-ascend.",
            argument="engine",
            value=engine,
        )
    return write_file(path, json.dumps(plain, indent=1))


def _placements(
    load: np.ndarray, ranks: int, redundant: int, nodes: int, groups: int, seed: int
) -> dict[str, np.ndarray]:
    """Return the expert of each place [layer, place], device by device, for each placement."""

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


def _between_nodes(ids: np.ndarray, physical: np.ndarray, n_experts: int, nodes: int) -> tuple[float, float]:
    """Return remote nodes per token, and moves of its first choice between nodes, both summed over layers."""
    remote = moves = 0.0
    before: np.ndarray | None = None
    for layer, row in enumerate(physical):
        on_node = shares(row, n_experts, nodes)[ids[:, layer]]
        reached = 1 - (1 - on_node).prod(1)
        remote += float(reached.sum(-1).mean()) * (1 - 1 / nodes)
        if before is not None:
            moves += 1 - float((before * on_node[:, 0]).sum(-1).mean())
        before = on_node[:, 0]
    return remote, moves


def _check(n_experts: int, ranks: int, redundant: int, step: int, nodes: int, groups: int) -> None:
    """Raise BadInput for numbers that do not divide what they share."""
    check_whole("a placement", ranks=ranks, step=step, nodes=nodes, groups=groups)
    check_whole("a placement", 0, redundant=redundant)
    for name, value, whole, of, shared in (
        ("ranks", ranks, (n_experts + redundant) % ranks == 0, ranks, f"{n_experts} experts and {redundant} copies"),
        ("nodes", nodes, ranks % nodes == 0, nodes, f"{ranks} devices"),
        ("groups", groups, n_experts % groups == 0, groups, f"{n_experts} experts"),
        ("redundant", redundant, groups % nodes != 0 or redundant % nodes == 0, nodes, f"{redundant} copies"),
    ):
        if not whole:
            raise BadInput(
                f"Cannot place experts with {name}={value}: {of} does not divide {shared}. Pass numbers that do.",
                argument=name,
                value=value,
            )
