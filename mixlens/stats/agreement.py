"""Agreement of the routing of two runs on the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.core.intervals import Mean, Quantity, Share
from mixlens.errors import BadInput
from mixlens.stats.clusters import By
from mixlens.stats.counts import Block, count
from mixlens.stats.inputs import clustered, require
from mixlens.stats.published import OLMOE
from mixlens.stats.softmax import BLOCK_OF_LOGITS, entropy_bits, softmax_tiles
from mixlens.stats.summaries import described, summarise

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


def agreement(
    a: Trace, b: Trace, *, by: By = None, cluster: str | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """Measure the agreement in routing of two traces of the same tokens, as means over tokens.

    top1
        the strongest expert is the same; 1/E for independent uniform routing.
    overlap
        ``|S and S'| / k``; k/E for independent uniform routing. Between checkpoints of one training run, this is router
        saturation (Muennighoff et al. 2024, eq. 5).
    jensen_shannon
        divergence of the router distributions, H((p + q) / 2) - (H(p) + H(q)) / 2, in bits, 0 to 1; NaN, with a note in
        attrs["missing"], unless both traces have router_logits.

    Parameters
    ----------
    a : Trace
        The first trace. Needs ``expert_id``, uint8 or uint16 [token, layer, slot] in both; router_logits [token, layer,
        expert] for jensen_shannon.
    b : Trace
        The second trace, of the same tokens.
    by : By, optional
        Column or columns of the sequences to group by.
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        Settings of the intervals.

    Returns
    -------
    xarray.Dataset
        ``estimate`` (fraction), ci_low, ci_high ``[*by, layer, measure]`` (jensen_shannon: bits); n (tokens)
        ``[*by]``; `by` takes the sequence columns of the first trace.

    Raises
    ------
    BadInput
        If layers, experts or tokens differ (the message names the first difference), or `by` names an unknown column.

    Examples
    --------
    >>> ml.stats.agreement(trace, trace)["measure"].values.tolist()
    ['top1', 'overlap', 'jensen_shannon']
    """
    a = clustered(a, cluster)
    require(a, "agreement", "expert_id", bootstrap=bootstrap)
    require(b, "agreement", "expert_id")
    same_shape(a, b)
    has_logits = "router_logits" in a.signals and "router_logits" in b.signals
    names = ("expert_id", "router_logits") if has_logits else ("expert_id",)
    shapes = {"measures": (a.n_layers, 3)}

    def add(block: Block, totals: dict[str, np.ndarray]) -> None:
        measures = np.full((a.n_layers, 3, block.n_tokens), np.nan, np.float32)
        measures[:, 1] = 0
        ids, others = block.by_layer("expert_id"), block.by_layer("other expert_id")
        measures[:, 0] = ids[:, 0] == others[:, 0]
        for i, j in product(range(a.top_k), repeat=2):
            measures[:, 1] += ids[:, i] == others[:, j]

        def diverge(tokens: slice, *parts: np.ndarray) -> None:
            measures[:, 2, tokens] = _jensen_shannon_bits(parts[:3], parts[3:])

        if has_logits:
            softmax_tiles(diverge, block["router_logits"], block["other router_logits"])
        totals["measures"][block.clusters] += block.sums(measures)

    def measures(sums: dict[str, np.ndarray]) -> dict[str, Quantity]:
        same, shared, divergence = np.moveaxis(sums["measures"], 1, 0)
        n = sums["n"]
        return {
            "top1": Share(same, n),
            "overlap": Share(shared, a.top_k * n),
            "jensen_shannon": Mean(divergence, n),
        }

    counts = count(a, by, shapes, side_by_side(a, b, names), add)
    data = summarise(counts, measures, {}, bootstrap)
    missing = {} if has_logits else {"missing": "jensen_shannon needs router_logits in both traces"}
    return described(
        data, a, bootstrap,
        statistic="agreement", unit="fraction", uniform=[1 / a.n_experts, a.top_k / a.n_experts, float("nan")],
        formula="mean_t 1[e1 = e1']; mean_t |S and S'| / k; mean_t JS(p, p')", source=f"{OLMOE}, eq. 5; Lin 1991",
        **missing,
    )  # fmt: skip


def _jensen_shannon_bits(p: Sequence[np.ndarray], q: Sequence[np.ndarray]) -> np.ndarray:
    """Compute the divergence [layer, token] from z, exp z and Z of both models."""
    middle = (p[1] / p[2][:, None] + q[1] / q[2][:, None]) / 2
    logarithm = np.log2(np.maximum(middle, np.finfo(np.float32).tiny))
    divergence = -(middle * logarithm).sum(1) - (entropy_bits(*p) + entropy_bits(*q)) / 2
    return np.maximum(divergence, 0)


def same_shape(a: Trace, b: Trace) -> None:
    for what, of_a, of_b in (
        ("layers", a.layers.tolist(), b.layers.tolist()),
        ("experts a layer", a.n_experts, b.n_experts),
        ("experts a token", a.top_k, b.top_k),
    ):
        if of_a != of_b:
            raise BadInput(
                f"Cannot compute the agreement of the traces: the first has {what} {of_a}, the second {of_b}. Select "
                "the same layers, and compare runs of one architecture.",
                argument=what,
                value=(of_a, of_b),
            )


def side_by_side(
    a: Trace, b: Trace, names: tuple[str, ...], of_the_first: tuple[str, ...] = ()
) -> Iterator[dict[str, np.ndarray]]:
    """Yield columns of both traces for the same tokens, those of `b` as "other ...", and some columns of `a` only."""
    keys = ("sequence", "position", *(["token_id"] if "token_id" in a.signals and "token_id" in b.signals else []))
    left = a.blocks(*keys, *names, *of_the_first, tokens=BLOCK_OF_LOGITS)
    right = b.blocks(*keys, *names, tokens=BLOCK_OF_LOGITS)
    of_a, of_b = next(left, None), next(right, None)
    while of_a is not None and of_b is not None:
        n = min(len(of_a["sequence"]), len(of_b["sequence"]))
        differs = np.zeros(n, bool)
        for key in keys:
            differs |= of_a[key][:n] != of_b[key][:n]
        if differs.any():
            at = int(differs.argmax())
            raise _different_tokens({key: (int(of_a[key][at]), int(of_b[key][at])) for key in keys})
        yield {
            **{name: of_a[name][:n] for name in dict.fromkeys(("sequence", *names, *of_the_first))},
            **{f"other {name}": of_b[name][:n] for name in names},
        }
        of_a, of_b = _rest(of_a, n, left), _rest(of_b, n, right)
    if of_a is not None or of_b is not None:
        which = "first" if of_a is not None else "second"
        longer = of_a or of_b or {}
        raise BadInput(
            f"Cannot compute the agreement of the traces: the {which} continues at sequence {longer['sequence'][0]}, "
            f"position {longer['position'][0]}, where the other ends. Select the same sequences, phase and positions.",
            argument="a" if which == "first" else "b",
            value=(int(longer["sequence"][0]), int(longer["position"][0])),
        )


def _rest(
    block: dict[str, np.ndarray], n: int, following: Iterator[dict[str, np.ndarray]]
) -> dict[str, np.ndarray] | None:
    """Return the rest of a block after n tokens, or the next nonempty block; None at the end."""
    rest: dict[str, np.ndarray] | None = {name: values[n:] for name, values in block.items()}
    while rest is not None and len(rest["sequence"]) == 0:
        rest = next(following, None)
    return rest


def _different_tokens(found: dict[str, tuple[int, int]]) -> BadInput:
    (sequence, other_sequence), (position, other_position) = found["sequence"], found["position"]
    place = f"sequence {sequence}, position {position}"
    if (sequence, position) != (other_sequence, other_position):
        what = f"At {place} of the first, the second has sequence {other_sequence}, position {other_position}"
    else:
        what = f"They differ first at {place}: token {found['token_id'][0]} and token {found['token_id'][1]}"
    return BadInput(
        f"Cannot compute the agreement of the traces: {what}. Record both runs on the same documents with the same "
        "tokenizer, or select the tokens that they share.",
        argument="token_id" if (sequence, position) == (other_sequence, other_position) else "position",
        value=found,
    )
