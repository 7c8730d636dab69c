"""allocate_bits: the quantization scheme of every expert within a budget of bytes, from measured costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import Bootstrap
from mixlens.core.intervals import Difference, leaving_out
from mixlens.decisions.verdict import DECISION, judged
from mixlens.errors import BadInput
from mixlens.stats.importance import KIND
from mixlens.stats.measured import check_kind

WHOLE = "none"


def allocate_bits(
    importance: Mapping[str, xr.Dataset], *, budget_bytes: float, bootstrap: Bootstrap = DECISION
) -> xr.Dataset:
    """Choose a quantization scheme for every expert that minimizes the loss within a budget of bytes.

    The sum of the individual costs of the experts is minimal within the budget: a knapsack with one class per expert,
    solved exactly. The joint cost of experts is not the sum of their costs, so the total loss is only predicted: load
    the model in the mixed scheme, and `judge` it.

    The verdict compares the mixed scheme with the best single scheme that fits. Both are chosen on one half of the
    documents and judged on the other, and vice versa; the returned scheme is chosen on all documents.

    Parameters
    ----------
    importance : Mapping[str, xarray.Dataset]
        Results of measure_importance for ``Ablation(how=scheme)`` by scheme, on the same documents. "none" need not be
        measured: the original weights cost nothing.
    budget_bytes : float
        Bytes for all experts together, excluding attention, embeddings and routers.
    bootstrap : Bootstrap, optional
        Settings of the intervals, and the seed of the halves.

    Returns
    -------
    xarray.Dataset
        ``scheme``, ``estimate`` (loss due to the expert in its scheme, nats per token) and ``bytes``
        ``[layer, expert]``; attrs quantization, for ``ml.load(quantization=)``; single, the best single scheme that
        fits; predicted_loss; verdict, and gain with gain_low and gain_high: loss of the single scheme minus that of the
        mixed one, nats per token.

    Raises
    ------
    BadInput
        If measurements differ in model, documents or layers, the budget is below that of the smallest schemes, or
        there are fewer than two documents.

    Examples
    --------
    >>> short, layers = [d["text"][:80] for d in documents[:4]], [0]
    >>> costs = {
    ...     how: ml.experiments.measure_importance(
    ...         model, short, ablation=ml.experiments.Ablation(how=how, layers=layers), settings=quiet
    ...     )
    ...     for how in ("hqq2", "hqq4")
    ... }
    >>> found = ml.decisions.allocate_bits(costs, budget_bytes=8 * 45_000)
    >>> sorted(set(found["scheme"].values.ravel().tolist()))
    ['hqq2', 'hqq4']
    """
    names, change, sizes, tokens = _measured(importance)
    first = next(iter(importance.values()))
    shape = (first.sizes["layer"], first.sizes["expert"])
    n_experts = shape[0] * shape[1]
    if budget_bytes < min(sizes) * n_experts:
        raise BadInput(
            f"Cannot hold {n_experts} experts in {budget_bytes:,.0f} bytes: in {names[int(np.argmin(sizes))]} they "
            f"take {min(sizes) * n_experts:,}. Raise the budget, or measure a scheme of fewer bits.",
            argument="budget_bytes",
            value=budget_bytes,
        )
    half = np.random.default_rng(bootstrap.seed).permutation(len(tokens)) % 2 == 0
    gain = np.zeros(len(tokens))
    for fit in (half, ~half):
        costs = change[:, fit].sum(1)
        mixed, single = allocated(costs, sizes, budget_bytes), _single(costs, sizes, budget_bytes)
        spent = np.take_along_axis(change[:, ~fit], mixed[None, None], 0)[0].sum(-1)
        gain[~fit] = change[single][~fit].sum(-1) - spent
    costs = change.sum(1)
    chosen = allocated(costs, sizes, budget_bytes)
    loss = np.take_along_axis(costs, chosen[None], 0)[0] / tokens.sum()
    of_experts = {
        "scheme": np.array(names, object)[chosen],
        "estimate": loss,
        "bytes": np.array(sizes)[chosen],
    }
    data = xr.Dataset(
        {name: (("layer", "expert"), values.reshape(shape)) for name, values in of_experts.items()},
        {"layer": first.layer.values, "expert": first.expert.values},
    )
    return data.assign_attrs(
        statistic="allocate_bits", model=first.attrs["model"], unit="nats per token", budget_bytes=float(budget_bytes),
        quantization=_quantization(data["scheme"].values, first.layer.values), level=bootstrap.level,
        single=names[_single(costs, sizes, budget_bytes)], predicted_loss=float(loss.sum()),
        formula="min sum_e loss_e(s_e) with sum_e bytes(s_e) <= budget",
        **judged(Difference(leaving_out(gain), leaving_out(tokens)), tokens, bootstrap),
    )  # fmt: skip


def _measured(importance: Mapping[str, xr.Dataset]) -> tuple[list[str], np.ndarray, list[int], np.ndarray]:
    """Return schemes, loss [scheme, document, expert of all layers], bytes per expert in each, tokens [document]."""
    if not isinstance(importance, Mapping) or not importance:
        raise BadInput(
            "Cannot allocate bits without measurements. Pass a mapping from schemes to what measure_importance found, "
            'such as {"hqq2": ..., "hqq4": ...}.',
            argument="importance",
            value=type(importance).__name__,
        )
    first = next(iter(importance.values()))
    for scheme, one in importance.items():
        check_kind(one, KIND, "measure_importance")
        same = one.sizes == first.sizes and all(
            np.array_equal(one[name].values, first[name].values) for name in ("value", "tokens", "layer")
        )
        known = np.isfinite(one.change.values).all()
        if one.attrs.get("how") != scheme or not same or one.attrs["model"] != first.attrs["model"] or not known:
            raise BadInput(
                f"Cannot allocate bits: what is given for {scheme} was measured with how={one.attrs.get('how')!r}, "
                "for another model, other documents or other layers than the first, or is not finite. Measure every "
                f"scheme alike, with Ablation(how={scheme!r}).",
                argument="importance",
                value=scheme,
            )
    if first.sizes["document"] < 2:
        raise BadInput(
            "Cannot allocate bits by one document: schemes fitted on some are judged on others. Measure more.",
            argument="documents",
            value=first.sizes["document"],
        )
    change = np.stack([one.change.values.reshape(first.sizes["document"], -1) for one in importance.values()])
    names, sizes = list(importance), [int(one.attrs["expert_bytes"]) for one in importance.values()]
    return (
        [*names, WHOLE],
        np.concatenate([change, np.zeros((1, *change.shape[1:]))]),
        [*sizes, int(first.attrs["whole_bytes"])],
        first.tokens.values.astype(float),
    )


def allocated(costs: np.ndarray, sizes: list[int], budget: float) -> np.ndarray:
    """Return the scheme of each expert [expert] that minimizes total costs [scheme, expert] within a budget of bytes.

    Solves an integer program to optimality with HiGHS.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, kron

    n_schemes, n_experts = costs.shape
    each = kron(np.ones((1, n_schemes)), csr_array(np.eye(n_experts)))
    held = np.repeat(np.array(sizes, float), n_experts)[None] / max(sizes)
    scale = np.abs(costs).max() or 1.0
    found = milp(
        costs.ravel() / scale,
        integrality=np.ones(costs.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(each, 1, 1), LinearConstraint(held, -np.inf, budget / max(sizes))],
        options={"mip_rel_gap": 0},
    )
    return found.x.reshape(costs.shape).argmax(0)


def _single(costs: np.ndarray, sizes: list[int], budget: float) -> int:
    """Return the cheapest single scheme in which all experts fit the budget."""
    total = np.where(np.array(sizes) * costs.shape[1] <= budget, costs.sum(1), np.inf)
    return int(total.argmin())


def _quantization(scheme: np.ndarray, layers: np.ndarray) -> dict[str, Any]:
    """Return the most common scheme for all experts, then the exceptions, as patterns for load."""
    common = Counter(scheme.ravel().tolist()).most_common(1)[0][0]
    others = {
        f"*.layers.{layer}.mlp.experts.{expert}.*": scheme[row, expert]
        for row, layer in enumerate(layers.tolist())
        for expert in range(scheme.shape[1])
        if scheme[row, expert] != common
    }
    return {"experts": common, **others}
