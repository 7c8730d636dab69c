"""What experts matter for: the change in loss without each of them, from sums over every document."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import xarray as xr
from safetensors.numpy import load_file

from mixlens.errors import BadInput
from mixlens.runs import Run, open_run
from mixlens.stats.bootstrap import DEFAULT, Bootstrap, effective_documents

KIND = "importance"


def expert_importance(
    measured: xr.Dataset, *, by: str | Sequence[str] | None = None, bootstrap: Bootstrap = DEFAULT
) -> xr.Dataset:
    """How much worse a token is predicted when an expert is taken out of a layer.

    sum_d (v_d without the expert - v_d) / sum_d n_d, v_d the loss (or metric) of document d summed over its n_d
    predicted tokens. Both runs read the same tokens, and the bootstrap draws documents with both their values, so the
    interval is that of the paired difference.

    Needs    measured   as measure_importance or open gives it
    Returns  Dataset    nats a token (or the metric's own unit), ci_low, ci_high [*by, layer, expert]; share [*by,
                        layer, expert], the expert share on the same tokens; value [*by], of the whole model;
                        n (predicted tokens), n_documents [*by]
    Raises   BadInput   for an unknown column in `by`
    """
    columns = [by] if isinstance(by, str) else list(by or [])
    labels, group = groups_of(measured, columns)
    shape = tuple(len(values) for values in labels.values())
    n_groups = int(np.prod(shape, dtype=int))
    inner = (measured.sizes["layer"], measured.sizes["expert"])
    estimate, low, high, share = np.full((4, n_groups, *inner), np.nan)
    value = np.full(n_groups, np.nan)
    n, n_documents = np.zeros((2, n_groups), np.int64)
    for one in range(n_groups):
        members = np.flatnonzero((group == one) & (measured.tokens.values > 0))
        if not len(members):
            continue
        here = measured.isel(document=members)
        tokens = here.tokens.values.astype(float)
        estimate[one], low[one], high[one] = per_token(here.change.values, tokens, bootstrap, one)
        share[one] = here.chosen.values.sum(0) / (measured.attrs["top_k"] * here.length.values.sum())
        value[one] = here.value.values.sum() / tokens.sum()
        n[one], n_documents[one] = int(tokens.sum()), len(members)
    kept = {name: measured.attrs[name] for name in ("model", "metric", "unit", "how")}
    numbers = {"estimate": estimate, "ci_low": low, "ci_high": high, "share": share}
    single = {"value": value, "n": n, "n_documents": n_documents}
    return xr.Dataset(
        {name: ((*labels, "layer", "expert"), array.reshape(*shape, *inner)) for name, array in numbers.items()}
        | {name: (tuple(labels), array.reshape(shape)) for name, array in single.items()},
        coords={**labels, "layer": measured.layer.values, "expert": measured.expert.values},
        attrs={
            **kept,
            "statistic": "expert_importance",
            "formula": "sum_d (v_d without the expert - v_d) / sum_d n_d",
            "source": "paired ablation, measured by mixlens",
            "level": bootstrap.level,
            "replicates": bootstrap.replicates,
            "seed": bootstrap.seed,
        },
    )


def per_token(
    sums: np.ndarray, tokens: np.ndarray, bootstrap: Bootstrap, stream: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(estimate, ci_low, ci_high) [...] of sums over documents [document, ...] for each of their tokens [document]."""
    resamples = bootstrap.resample(len(tokens), stream)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = resamples.sums(sums) / resamples.sums(tokens)
    reach = np.broadcast_to(bootstrap.reach(effective_documents(tokens[:, None]))[0], sums.shape[1:])
    return values[..., 0], *resamples.interval(values, reach)


def open_importance(path: str | os.PathLike, *, check: bool = True) -> xr.Dataset:
    """The sums over documents that an importance run holds; `expert_importance` makes the map of them.

    Raises RunError when the run is not there, unfinished, altered or of another kind.
    """
    run = open_run(path, check=check)
    if run.kind != KIND:
        raise BadInput(f"An importance run was to be opened at {path}. It is a {run.kind}. Use mixlens.open(path).")
    return measured_dataset(_arrays(run), _documents(run), run.meta)


def measured_dataset(
    arrays: Mapping[str, np.ndarray], documents: Mapping[str, Any], meta: Mapping[str, Any]
) -> xr.Dataset:
    """Sums over documents: change, chosen [document, layer, expert]; value, tokens, length [document]."""
    inner = ("document", "layer", "expert")
    data = {name: (inner[: array.ndim], array) for name, array in arrays.items()}
    coords = {name: ("document", np.asarray(values, dtype=object)) for name, values in documents.items()}
    attrs = {"kind": KIND, "model": meta["model"]["name"], "top_k": meta["top_k"], **meta["ablation"]}
    return xr.Dataset(data, {**coords, "layer": meta["layers"], "expert": np.arange(meta["n_experts"])}, attrs)


def _arrays(run: Run) -> dict[str, np.ndarray]:
    names = sorted(name for name in run.meta["files"] if name.startswith("importance-"))
    shards = [load_file(run.file(name)) for name in names]
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def _documents(run: Run) -> dict[str, Any]:
    return pq.read_table(Path(run.file("documents.parquet"))).to_pydict()


def groups_of(measured: xr.Dataset, columns: list[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({column: its labels}, group of each document, counted over the product of the labels).

    Raises BadInput for a column that is not there, or that some documents lack.
    """
    there = [str(name) for name in measured.coords if measured[name].dims == ("document",)]
    labels: dict[str, np.ndarray] = {}
    group = np.zeros(measured.sizes["document"], np.int64)
    for name in columns:
        if name not in there:
            raise BadInput(
                f"Importance by {name!r} was asked for. The documents have the columns {', '.join(there)}. "
                "Give one of them, or measure documents that have the column."
            )
        values = measured[name].values
        if any(value is None for value in values):
            raise BadInput(
                f"Importance by {name!r} was asked for. Some documents have no {name}. Give every document one, or "
                "leave those out: measured.isel(document=...)."
            )
        labels[name], code = np.unique(values, return_inverse=True)
        group = group * len(labels[name]) + code
    return labels, group
