"""Expert shares, load balance, and confidence of the router."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Largest, Mean, Quantity, Share, Smooth
from mixlens.errors import BadInput, MissingSignal
from mixlens.stats.clusters import By
from mixlens.stats.counts import Block, Reading, add_choices, count
from mixlens.stats.inputs import clustered, require
from mixlens.stats.published import JIANG
from mixlens.stats.softmax import BLOCK_OF_LOGITS, entropy_bits, second_largest, softmax_tiles
from mixlens.stats.summaries import described, summarise

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


def expert_share(
    trace: Trace, *, by: By = None, slot: str = "any", cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute each expert's share of the choices.

    sum over tokens of 1[e in S] / (k N); with slot="first", the share of tokens whose strongest expert is e. 1/E for
    uniform routing (Jiang et al. 2024, Fig. 7).

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot].
    by : By, optional
        Column or columns of the sequences to group by.
    slot : str, optional
        "any" counts all chosen experts, "first" only the strongest.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high, and p, q, survives against uniform routing ``[*by, layer, expert]``;
        n (tokens) ``[*by]``; shares sum to 1 over experts.

    Raises
    ------
    BadInput
        If `by` names an unknown column, or slot is not "any" or "first".

    Examples
    --------
    >>> ml.stats.expert_share(trace, by="domain")["estimate"].dims
    ('domain', 'layer', 'expert')
    """
    if slot not in ("any", "first"):
        raise BadInput(
            f"Cannot compute the expert share of slot {slot!r}: slots are any and first. Pass one of them.",
            argument="slot",
            value=slot,
        )
    trace = clustered(trace, cluster)
    require(trace, "expert_share", "expert_id", bootstrap=bootstrap)
    n_slots = trace.top_k if slot == "any" else 1

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        add_choices(block, totals["chosen"], n_slots)

    shapes = {"chosen": (trace.n_layers, trace.n_experts)}
    counts = count(trace, by, shapes, Reading(("sequence", "expert_id")), add)
    data = summarise(
        counts,
        lambda sums: Share(sums["chosen"], n_slots * sums["n"]),
        {"expert": range(trace.n_experts)},
        bootstrap,
        null=1 / trace.n_experts,
    )
    return described(
        data, trace, bootstrap,
        statistic="expert_share", unit="fraction", uniform=1 / trace.n_experts, slot=slot,
        formula="sum_t 1[e in S_t] / (k N)" if slot == "any" else "sum_t 1[e = first choice of t] / N",
        source=f"{JIANG}, Fig. 7",
    )  # fmt: skip


def load_balance(
    trace: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Measure how evenly tokens are spread over the experts of each layer, in three measures.

    cv
        standard deviation over mean of the experts' token counts; balanced 0.
    max_over_mean
        tokens of the busiest expert over the mean; balanced 1.
    switch_loss
        E * sum_e f_e P_e, with f_e the share of tokens that choose e (they sum to k) and P_e the mean router
        probability; balanced k, collapsed onto k experts at most E (Fedus et al. 2021, eq. 4, per layer). NaN, with a
        note in attrs["missing"], without router_logits.

    All three are biased upwards in small samples. The estimate is the plain one; the interval is for the true value,
    and is extended to the estimate if necessary. The interval of cv is that of its square, which behaves better near
    balance; that of max_over_mean comes from the bounds of the shares that may be the largest.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot]; for switch_loss router_logits,
        float [token, layer, expert].
    by : By, optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        Ratio, ci_low, ci_high ``[*by, layer, measure]``; n (tokens) ``[*by]``.

    Raises
    ------
    BadInput
        If `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.load_balance(trace)["measure"].values.tolist()
    ['cv', 'max_over_mean', 'switch_loss']
    """
    trace = clustered(trace, cluster)
    require(trace, "load_balance", "expert_id", bootstrap=bootstrap)
    has_logits = "router_logits" in trace.signals
    names = ("sequence", "expert_id", *(["router_logits"] if has_logits else []))
    shape = (trace.n_layers, trace.n_experts)

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        add_choices(block, totals["chosen"])
        if not has_logits:
            totals["probability"] += np.nan
            return
        probability = np.empty((*shape, block.n_tokens), np.float32)

        def divide(tokens: slice, _: np.ndarray, exponential: np.ndarray, total: np.ndarray) -> None:
            np.divide(exponential, total[:, None], out=probability[..., tokens])

        softmax_tiles(divide, block["router_logits"])
        totals["probability"][block.clusters] += block.sums(probability)

    def measures(sums: dict[str, np.ndarray]) -> dict[str, Quantity]:
        chosen, tokens = sums["chosen"], sums["n"]
        return {
            "cv": Smooth((chosen.std(-2) / chosen.mean(-2)) ** 2, floor=0.0, through=np.sqrt),
            "max_over_mean": Largest(
                chosen, trace.top_k * tokens, through=lambda share: np.maximum(share * trace.n_experts, 1)
            ),
            "switch_loss": Smooth(trace.n_experts * (chosen * sums["probability"]).sum(-2) / tokens**2, floor=0.0),
        }

    shapes = {"chosen": shape, "probability": shape}
    blocks = Reading(tuple(names), BLOCK_OF_LOGITS)
    counts = count(trace, by, shapes, blocks, add)
    data = summarise(counts, measures, {}, bootstrap)
    missing = {} if has_logits else {"missing": "switch_loss needs router_logits"}
    return described(
        data, trace, bootstrap,
        statistic="load_balance", unit="ratio", uniform=[0.0, 1.0, float(trace.top_k)],
        formula="cv = sd(N_e) / mean(N_e); max_over_mean = max(N_e) / mean(N_e); switch_loss = E sum_e f_e P_e",
        source="Fedus et al. 2021, Switch Transformers, arXiv 2101.03961, eq. 4, for each layer", **missing,
    )  # fmt: skip


def load_entropy(
    trace: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute the entropy of the expert shares in each layer, in bits.

    -sum_e f_e log2 f_e, with f the expert share. log2(E) for equal shares, 0 if one expert takes everything. This is
    the entropy of the mean choice; `routing_entropy` is the mean entropy of single choices.

    The plain entropy is too small for few documents. The estimate is the plain one; the interval is corrected for the
    bias and reaches at most log2(E).

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot].
    by : By, optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (bits), ci_low, ci_high ``[*by, layer]``; n (tokens) ``[*by]``.

    Raises
    ------
    BadInput
        If `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.load_entropy(trace)["estimate"].dims
    ('layer',)
    """
    trace = clustered(trace, cluster)
    require(trace, "load_entropy", "expert_id", bootstrap=bootstrap)

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        add_choices(block, totals["chosen"])

    def entropy(sums: dict[str, np.ndarray]) -> Smooth:
        share = sums["chosen"] / sums["chosen"].sum(-2, keepdims=True)
        return Smooth(-(share * np.log2(np.where(share > 0, share, 1))).sum(-2), floor=0.0)

    shapes = {"chosen": (trace.n_layers, trace.n_experts)}
    counts = count(trace, by, shapes, Reading(("sequence", "expert_id")), add)
    data = summarise(counts, entropy, {}, bootstrap)
    most = float(np.log2(trace.n_experts))
    data["ci_high"] = data["ci_high"].clip(max=most)
    return described(
        data, trace, bootstrap,
        statistic="load_entropy", unit="bits", uniform=most, formula="-sum_e f_e log2 f_e, f_e = N_e / sum N",
        source="Shannon 1948",
    )  # fmt: skip


def routing_entropy(
    trace: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Compute the mean entropy of the router's distribution over experts, in bits.

    mean over tokens of -sum_e p_e log2 p_e, p = softmax(router_logits). At most log2(E), for uniform routing.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``router_logits``, float [token, layer, expert].
    by : By, optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (bits), ci_low, ci_high ``[*by, layer]``; n (tokens) ``[*by]``.

    Raises
    ------
    MissingSignal
        If the trace has no router logits.
    BadInput
        If `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.routing_entropy(trace)["estimate"].dims
    ('layer',)
    """
    trace = clustered(trace, cluster)
    require(trace, "routing_entropy", "router_logits", bootstrap=bootstrap)
    n_layers = trace.n_layers

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        bits = np.empty((n_layers, block.n_tokens), np.float32)

        def compute(tokens: slice, *parts: np.ndarray) -> None:
            bits[:, tokens] = entropy_bits(*parts)

        softmax_tiles(compute, block["router_logits"])
        totals["bits"][block.clusters] += block.sums(bits)

    shapes = {"bits": (trace.n_layers,)}
    blocks = Reading(("sequence", "router_logits"), BLOCK_OF_LOGITS)
    counts = count(trace, by, shapes, blocks, add)
    data = summarise(counts, lambda sums: Mean(sums["bits"], sums["n"]), {}, bootstrap)
    return described(
        data, trace, bootstrap,
        statistic="routing_entropy", unit="bits", uniform=float(np.log2(trace.n_experts)),
        formula="mean_t -sum_e p_e log2 p_e, p = softmax(router_logits)", source="Shannon 1948",
    )  # fmt: skip


def router_confidence(
    trace: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Measure how strongly the router prefers its first expert, as means over tokens.

    p1
        probability of the most probable expert under softmax(router_logits).
    p1_minus_p2
        its lead over the second.
    w2_over_w1
        weight of the second chosen expert over that of the first.

    Measures whose signal is missing are NaN, with a note in attrs["missing"].

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``router_logits``, float [token, layer, expert] for p1, p1_minus_p2; weight [token,
        layer, slot] for w2_over_w1.
    by : By, optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high ``[*by, layer, measure]``; n (tokens) ``[*by]``.

    Raises
    ------
    MissingSignal
        If the trace has neither signal.
    BadInput
        If `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.router_confidence(trace)["measure"].values.tolist()
    ['p1', 'p1_minus_p2', 'w2_over_w1']
    """
    trace = clustered(trace, cluster)
    require(trace, "router_confidence", bootstrap=bootstrap)
    signals = [name for name in ("router_logits", "weight") if name in trace.signals]
    if not signals:
        raise MissingSignal(
            f"Cannot compute router_confidence: the trace has neither router_logits nor weight, only "
            f"{', '.join(trace.signals)}. Record with a local model, or give them to Trace.from_arrays.",
            argument="signals",
            value=("router_logits", "weight"),
        )
    has_second, n_layers = "weight" in signals and trace.top_k >= 2, trace.n_layers
    shapes = {"measures": (n_layers, 3)}

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        measures = np.full((n_layers, 3, block.n_tokens), np.nan, np.float32)

        def compute(tokens: slice, z: np.ndarray, _: np.ndarray, total: np.ndarray) -> None:
            measures[:, 0, tokens] = 1 / total
            measures[:, 1, tokens] = (1 - np.exp(second_largest(z))) / total

        if "router_logits" in signals:
            softmax_tiles(compute, block["router_logits"])
        if has_second:
            first, second = block.by_layer("weight")[:, :2].swapaxes(0, 1)
            np.divide(second, first, out=measures[:, 2], where=first > 0)
        totals["measures"][block.clusters] += block.sums(measures)

    blocks = Reading(("sequence", *signals), BLOCK_OF_LOGITS)
    counts = count(trace, by, shapes, blocks, add)
    data = summarise(
        counts,
        lambda sums: Mean(sums["measures"], sums["n"]),
        {"measure": ["p1", "p1_minus_p2", "w2_over_w1"]},
        bootstrap,
    )
    lacking = []
    if "router_logits" not in signals:
        lacking.append("p1 and p1_minus_p2 need router_logits")
    if not has_second:
        lacking.append("w2_over_w1 needs the weights of two experts a token")
    missing = {"missing": "; ".join(lacking)} if lacking else {}
    return described(
        data, trace, bootstrap,
        statistic="router_confidence", unit="fraction", uniform=[1 / trace.n_experts, 0.0, 1.0],
        formula="mean_t p_(1); mean_t p_(1) - p_(2); mean_t w_2 / w_1; p = softmax(router_logits), sorted",
        source=f"{JIANG}, section 2.1 (the gate)", **missing,
    )  # fmt: skip


def position_profile(
    trace: Trace,
    *,
    by: By = None,
    edges: Sequence[int] | None = None,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> xr.Dataset:
    """Compute the expert share as a function of the position in the sequence.

    sum over tokens of the bin of 1[e in S] / (k N_bin); bin i holds the positions edges[i] <= p < edges[i + 1], and the
    last one all from its edge on.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``, uint8 or uint16 [token, layer, slot]; position.
    by : By, optional
        Column or columns of the sequences to group by.
    edges : Sequence[int], optional
        First positions of the bins, ascending; None for 0, 1, 2, 4, 8 ... up to the longest sequence.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high, and p, q, survives against uniform routing ``[*by, position_bin,
        layer, expert]``; n (tokens) ``[*by, position_bin]``; coordinate position_start [position_bin]; NaN for a bin
        without tokens.

    Raises
    ------
    BadInput
        If edges do not ascend from 0 or more, or `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.position_profile(trace)["estimate"].dims
    ('position_bin', 'layer', 'expert')
    """
    trace = clustered(trace, cluster)
    require(trace, "position_profile", "expert_id", "position", bootstrap=bootstrap)
    longest = int(trace.sequences["length"].max()) if len(trace.sequences) else 1
    starts = np.array([0, *(2**i for i in range(max(1, longest - 1).bit_length()))] if edges is None else list(edges))
    if len(starts) == 0 or starts.dtype.kind not in "iu" or starts[0] < 0 or (np.diff(starts) <= 0).any():
        raise BadInput(
            f"Cannot compute position_profile with edges {starts.tolist()}: they must ascend from 0 or more. Pass "
            "the first position of every bin, such as edges=(0, 1, 16, 256).",
            argument="edges",
            value=starts.tolist(),
        )
    n_bins, e = len(starts), trace.n_experts

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        bins = np.searchsorted(starts, block["position"], side="right") - 1
        inside = np.flatnonzero(bins >= 0)
        totals["tokens"][block.clusters] += block.count(bins[inside], n_bins, inside)
        offset = (bins[inside] * e).astype(np.int32)

        def add_layer(layer: int, ids: np.ndarray) -> None:
            found = block.count(offset + ids[:, inside], n_bins * e, inside)
            totals["chosen"][block.clusters, layer] += found.reshape(-1, n_bins, e)

        block.each_layer("expert_id", add_layer)

    shapes = {"chosen": (trace.n_layers, n_bins, e), "tokens": (n_bins,)}
    counts = count(trace, by, shapes, Reading(("sequence", "position", "expert_id")), add)
    data = summarise(
        counts,
        lambda sums: Share(sums["chosen"], sums["chosen"].sum(-2, keepdims=True)),
        {"position_bin": _bin_names(starts), "expert": range(trace.n_experts)},
        bootstrap,
        size=(counts.totals.pop("tokens"), ("position_bin",)),
        null=1 / trace.n_experts,
    )
    data = data.transpose(*counts.clusters.by, "position_bin", "layer", "expert").assign_coords(
        position_start=("position_bin", starts)
    )
    return described(
        data, trace, bootstrap,
        statistic="position_profile", unit="fraction", uniform=1 / trace.n_experts,
        formula="sum_{t in bin} 1[e in S_t] / (k N_bin)", source=f"{JIANG}, Fig. 7, split by position",
    )  # fmt: skip


def _bin_names(starts: np.ndarray) -> list[str]:
    names = [str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in pairwise(starts)]
    return [*names, f"{starts[-1]}+"]
