"""Null models, in which routing depends only on the token, its position or the previous layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.errors import BadInput
from mixlens.stats.inputs import clustered, require, with_ids
from mixlens.stats.multiplicity import p_against, with_survivors
from mixlens.trace.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Iterator

_GIVEN = {
    "token": "routing by token identity alone",
    "position": "routing by position alone",
    "layer": "routing by the experts of the previous layer only",
}
_ROUTED = ("expert_id", "weight", "router_logits")


def null_model(
    trace: Trace,
    statistic: Callable[..., xr.Dataset],
    *,
    given: str = "token",
    permutations: int = 199,
    cluster: str | None = None,
    bootstrap: Bootstrap = DEFAULT,
) -> xr.Dataset:
    """Compare a statistic with its values if routing depended on only one thing.

    The text stays, and the routing of tokens is shuffled among tokens with

    token
        the same token id, so that only a token's identity matters;
    position
        the same position in their sequence;
    layer
        the same experts in the previous layer, in the same order, layer by layer: a Markov chain over layers.

    The difference (`excess`) is due to something else, such as context. p is the share of shuffles, including the trace
    itself, that are at least as far from the mean of the shuffles; or p of the statistic's interval over documents
    against that mean, if larger, because a pattern shared by few documents may be specific to them.

    Parameters
    ----------
    trace : Trace
        The recording. Needs ``expert_id``; token_id for "token", position for "position". Read into memory.
    statistic : Callable
        Function of `ml.stats` that takes a trace, such as ``ml.stats.repetition``; wrap one with options in a lambda.
    given : {"token", "position", "layer"}, optional
        What routing depends on.
    permutations : int, optional
        Number of shuffles n; the smallest p is 1 / (n + 1).
    cluster : str, optional
        Column of the sequences to cluster by, such as "author", if documents are not independent.
    bootstrap : Bootstrap, optional
        How intervals are computed; its seed is also that of the shuffles.

    Returns
    -------
    xarray.Dataset
        Result of the statistic; expected (mean of the shuffles), null_low and null_high (their middle 95 %, the level),
        excess (estimate minus expected), and p, q, survives against this null, of the shape of the estimate. Figures by
        layer draw expected as a dotted line.

    Raises
    ------
    BadInput
        If `given` is unknown, or there are fewer than 19 shuffles.
    MissingSignal
        If no token has an id, for "token".

    Examples
    --------
    >>> found = ml.stats.null_model(trace.select(layers=[3]), ml.stats.repetition, given="token", permutations=19)
    >>> found["excess"].dims
    ('layer', 'choice')
    """
    needed = {"token": ["token_id"], "position": ["position"]}.get(given, [])
    trace = clustered(trace, cluster)
    require(trace, "null_model", "expert_id", *needed, bootstrap=bootstrap)
    if given not in _GIVEN:
        raise BadInput(
            f"Cannot compute a null model given {given!r}: routing may be given {', '.join(_GIVEN)}. Pass one of them.",
            argument="given",
            value=given,
        )
    if permutations < 19:
        raise BadInput(
            f"Cannot test with {permutations} shuffles: their least p is above 0.05. Pass 19 or more.",
            argument="permutations",
            value=permutations,
        )
    trace = with_ids(trace, "null_model") if given == "token" else trace
    data, quick = statistic(trace, bootstrap=bootstrap), Bootstrap(replicates=10)
    shuffles = _shuffles(trace, given, permutations, bootstrap.seed)
    shuffled = np.stack([statistic(one, bootstrap=quick)["estimate"].to_numpy() for one in shuffles])
    estimate, level = data["estimate"], float(data.attrs["level"])
    expected = shuffled.mean(0)
    far = np.abs(shuffled - expected) >= np.abs(estimate.to_numpy() - expected) - 1e-12
    p = np.where(np.isfinite(estimate), (1 + far.sum(0)) / (1 + permutations), np.nan)
    p = np.maximum(p, _p_of_documents(data, expected))
    low, high = np.quantile(shuffled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    numbers = {"expected": expected, "null_low": low, "null_high": high, "excess": estimate.to_numpy() - expected}
    data = data.assign({name: (estimate.dims, values) for name, values in numbers.items()})
    return with_survivors(data, estimate.copy(data=p), level).assign_attrs(
        given=given, null=_GIVEN[given], permutations=permutations
    )


def _p_of_documents(data: xr.Dataset, expected: np.ndarray) -> np.ndarray:
    """Return p of the interval over documents against the mean of the shuffles; 0 without intervals."""
    estimate, units = data["estimate"], data.get("n_effective")
    if units is None or (data["ci_low"].isnull() & (units >= 2)).all():
        return np.zeros(estimate.shape)
    low, high, n = (
        data[name].broadcast_like(estimate).transpose(*estimate.dims).to_numpy()
        for name in ("ci_low", "ci_high", "n_effective")
    )
    return p_against(estimate.to_numpy(), low, high, expected, n, float(data.attrs["level"]))


def _shuffles(trace: Trace, given: str, permutations: int, seed: int) -> Iterator[Trace]:
    rng = np.random.default_rng(seed)
    names = [name for name in _ROUTED if name in trace.signals]
    routed = {name: trace.read(name) for name in names}
    tokens = {name: trace.read(name) for name in ("token_id", "position", "phase") if name in trace.signals}
    sequence = np.unique(trace.read("sequence"), return_inverse=True)[1]
    seen = np.unique(trace.read("sequence"))
    sequences = trace.sequences.loc[seen].drop(columns="length").reset_index(drop=True)
    draw = _markov(routed["expert_id"], rng) if given == "layer" else _within(tokens[_KEY[given]], rng, trace.n_layers)
    columns = np.arange(trace.n_layers)
    for _, source in zip(range(permutations), draw, strict=False):
        ids, *others = (values[source, columns] for values in routed.values())
        yield Trace.from_arrays(
            ids, n_experts=trace.n_experts, layers=trace.layers.tolist(), tokens={**tokens, "sequence": sequence},
            sequences=sequences, meta=trace.meta, **dict(zip(names[1:], others, strict=True)),
        )  # fmt: skip


_KEY = {"token": "token_id", "position": "position"}


def _within(keys: np.ndarray, rng: np.random.Generator, n_layers: int) -> Iterator[np.ndarray]:
    """Yield source tokens of the routing [token, layer]: a random token with the same key, the same for all layers."""
    into = np.argsort(keys, kind="stable")
    while True:
        source = np.empty(len(keys), np.int64)
        source[into] = np.lexsort((rng.random(len(keys)), keys))
        yield np.repeat(source[:, None], n_layers, axis=1)


def _markov(ids: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield source tokens of the routing [token, layer]: a random one whose previous layer has the current experts."""
    chosen = [np.unique(ids[:, layer], axis=0, return_inverse=True)[1].reshape(-1) for layer in range(ids.shape[1])]
    while True:
        source = np.tile(np.arange(len(ids))[:, None], (1, ids.shape[1]))
        for layer in range(1, ids.shape[1]):
            before = chosen[layer - 1]
            into = np.argsort(before[source[:, layer - 1]], kind="stable")
            source[into, layer] = np.lexsort((rng.random(len(ids)), before))
        yield source
