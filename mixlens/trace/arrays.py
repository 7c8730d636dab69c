"""Validate foreign arrays and convert them to a trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mixlens.errors import BadInput
from mixlens.trace import shards


def part_of_arrays(
    expert_id: Any,
    n_experts: int,
    weight: Any,
    router_logits: Any,
    tokens: Mapping[Any, Any] | pd.DataFrame,
    sequences: pd.DataFrame | None,
) -> tuple[shards.MemoryPart, pd.DataFrame]:
    """Build the part and the sequence table for `Trace.from_arrays`, whose docstring has the shapes and errors."""
    ids = np.asarray(expert_id)
    if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
        raise BadInput(
            f"Cannot make a trace from expert ids of shape {ids.shape} and dtype {ids.dtype}. Pass integers of shape "
            "[token, layer, slot].",
            argument="expert_id",
            value=ids.shape,
        )
    lacking = (ids == -1).all(0) & (len(ids) > 0)  # slots absent from a layer
    known = ids[:, ~lacking]
    if known.size and not (0 <= known.min() and known.max() < n_experts <= shards.MOST_EXPERTS):
        raise BadInput(
            f"Cannot make a trace with n_experts={n_experts}: the expert ids run from {known.min()} to {known.max()}. "
            f"Ids count from 0 to n_experts - 1, and at most {shards.MOST_EXPERTS} experts fit.",
            argument="n_experts",
            value=n_experts,
        )
    n, n_layers, top_k = ids.shape
    if lacking.all(1).any() or (lacking[:, :-1] > lacking[:, 1:]).any():
        raise BadInput(
            "Cannot make a trace of layers that choose no expert, or whose first slots are -1. Pass layers with "
            "experts only, and -1 in the last slots of those that choose fewer.",
            argument="expert_id",
            value=-1,
        )
    dtype = shards.id_dtype(n_experts, ragged=bool(lacking.any()))
    arrays: dict[str, np.ndarray] = {"expert_id": np.where(lacking, shards.no_expert(dtype), ids).astype(dtype)}
    if weight is not None:
        arrays["weight"] = shards.pack_weights(column("weight", weight, (n, n_layers, top_k)))
    if router_logits is not None:
        logits = column("router_logits", router_logits, (n, n_layers, n_experts))
        arrays["router_logits"] = shards.narrowed(logits, np.float16)
    given = {str(name): np.asarray(values) for name, values in dict(tokens).items()}
    for name, values in given.items():
        if name not in shards.TOKEN_COLUMNS:
            raise BadInput(
                f"Cannot make a trace with the token column {name!r}: tokens have the columns "
                f"{', '.join(shards.TOKEN_COLUMNS)}. Put the columns of a whole sequence into sequences=.",
                argument="tokens",
                value=name,
            )
        arrays[name] = column(name, values, (n,))
    sequence = arrays.setdefault("sequence", np.zeros(n, np.int64))
    if n and (sequence[0] != 0 or not np.isin(np.diff(sequence), (0, 1)).all()):
        raise BadInput(
            "Cannot make a trace: the sequence numbers of the tokens are not 0, 1, 2 ... in order. Sort the "
            "tokens by sequence and number the sequences from 0.",
            argument="sequence",
        )
    length = np.bincount(sequence)
    starts = np.concatenate([[0], np.cumsum(length)])
    arrays.setdefault("position", np.arange(n) - starts[sequence])
    arrays.setdefault("phase", np.full(n, shards.PROMPT, np.uint8))
    if sequences is not None and not isinstance(sequences, pd.DataFrame):
        raise BadInput(
            f"Cannot make a trace: sequences= takes a DataFrame, got {type(sequences).__name__}. Pass one row for "
            "every sequence, in order.",
            argument="sequences",
            value=type(sequences).__name__,
        )
    table = pd.DataFrame(index=pd.RangeIndex(len(length))) if sequences is None else sequences
    if len(table) != len(length):
        raise BadInput(
            f"Cannot make a trace with a table of {len(table)} sequences: the tokens belong to {len(length)}. Pass "
            "one row for every sequence, in order.",
            argument="sequences",
            value=len(table),
        )
    ordered = np.sort(ids, axis=-1)
    repeated = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if repeated.any():
        token, layer, _ = (int(index) for index in np.argwhere(repeated)[0])
        raise BadInput(
            f"Cannot make a trace: token {token} chooses an expert twice in layer {layer} "
            f"({', '.join(map(str, ids[token, layer]))}). Pass the ids of distinct experts, the strongest first.",
            argument="expert_id",
            value=(token, layer),
        )
    return shards.MemoryPart(arrays), table.reset_index(drop=True).assign(length=length)


def layer_numbers(layers: Sequence[int] | None, n_layers: int) -> np.ndarray:
    """Return the layer numbers for `Trace.from_arrays`."""
    numbers = np.asarray(
        range(n_layers) if layers is None else list(layers) if isinstance(layers, Iterable) else layers
    )
    whole = numbers.shape == (n_layers,) and numbers.dtype.kind in "iu"
    if not whole or (numbers < 0).any() or (np.diff(numbers) <= 0).any():
        raise BadInput(
            f"Cannot make a trace of {n_layers} layers with the numbers {numbers.tolist()}. Pass one number of 0 or "
            "more for every layer of the expert ids, ascending.",
            argument="layers",
            value=numbers.tolist(),
        )
    return numbers


def column(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Convert a column other than the ids to its dtype. Raises BadInput for values that do not fit."""
    dtype = (shards.TOKEN_COLUMNS | shards.ROUTING | shards.NEXT_TOKEN)[name]
    if np.issubdtype(dtype, np.integer):
        return _whole(name, values, shape).astype(dtype)
    least = 0.0 if name == "weight" else -np.inf
    return _numbers(name, values, shape, least=least, missing=name not in shards.ROUTING).astype(dtype)


def _numbers(name: str, values: Any, shape: tuple[int, ...], *, least: float, missing: bool = False) -> np.ndarray:
    """Return numbers from `least` to below infinity; NaN only if values may be missing."""
    array = _shaped(name, values, shape)
    if array.dtype.kind not in "fiub":
        raise _unfit(name, array.dtype, "is not a number")
    inside = (array >= least) & (array < np.inf)
    if not (good := inside | np.isnan(array) if missing else inside).all():
        place = tuple(int(index) for index in np.argwhere(~good)[0])
        raise _unfit(name, array[place], f"at {place} cannot be")
    return array


def _whole(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return nonnegative integers that fit into 64 bits."""
    array = _numbers(name, values, shape, least=0)
    most = 2**53 if array.dtype.kind == "f" else 2**63 - 1  # floats beyond it are rounded already
    wrong = (array > (shards.GENERATED if name == "phase" else most)) | (array != np.floor(array))
    if wrong.any():
        raise _unfit(name, array[wrong][0], "is not whole, or too large")
    return array


def _unfit(name: str, value: Any, why: str) -> BadInput:
    return BadInput(
        f"Cannot make a trace with this {name}: {value} {why}. Leave such tokens out, or correct them at their source.",
        argument=name,
        value=value.item() if isinstance(value, np.generic) else str(value),
    )


def _shaped(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != shape:
        raise BadInput(
            f"Cannot make a trace with {name} of shape {array.shape}: expected {shape}.",
            argument=name,
            value=array.shape,
        )
    return array
