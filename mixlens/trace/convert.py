"""Convert traces to run directories, long tables and xarray."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr

from mixlens.core.files import written_whole
from mixlens.core.names import beside
from mixlens.core.run_dir import RunWriter, now, versions
from mixlens.errors import BadInput
from mixlens.trace import shards

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace

_DATA_PACKAGES = ("mixlens", "numpy", "pandas", "pyarrow", "safetensors")


def save(trace: Trace, path: str | os.PathLike[str]) -> None:
    if trace.sites:
        raise BadInput(
            f"Cannot save a trace with activations ({', '.join(trace.sites)}): only recording writes them. Record "
            "with out= to have them on disk.",
            argument="sites",
            value=list(trace.sites),
        )
    digest = hashlib.sha256()
    for block in trace.blocks("sequence", "position", "expert_id"):
        for column in block.values():
            digest.update(np.ascontiguousarray(column).tobytes())
    plan = {"source": trace.meta.get("source"), "input_sha256": digest.hexdigest()}
    with RunWriter(path, "trace", plan) as writer:
        if writer.complete:
            return
        renumber = pd.Series(np.arange(len(trace.sequences)), index=trace.sequences.index)
        counts = []
        lengths = np.zeros(len(trace.sequences), np.int64)
        for index, block in enumerate(trace.blocks(*trace.signals)):
            block["sequence"] = renumber.loc[block["sequence"]].to_numpy()
            if "weight" in block:
                block["weight"] = shards.pack_weights(block["weight"])
            lengths += np.bincount(block["sequence"], minlength=len(lengths))
            part = shards.MemoryPart(block)
            counts.append(shard_counts(part))
            writer.commit_shard(index, part.files(index), counts[-1])
        frame = trace.sequences.reset_index(drop=True).assign(length=lengths)
        finish(writer, frame, trace.vocabulary, run_meta(trace, counts, {"created": now(), **_kept(trace.meta)}))


def shard_counts(part: shards.MemoryPart) -> dict[str, int]:
    return {"tokens": part.n_tokens, "first_sequence": part.first_sequence, "last_sequence": part.last_sequence}


def run_meta(trace: Trace, counts: list[dict[str, int]], provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of `meta.json` for a trace, except the file list."""
    return {
        "versions": versions(*_DATA_PACKAGES),
        **provenance,
        "n_experts": trace.n_experts,
        "top_k": trace.top_k,
        "layer_top_k": list(trace.layer_top_k) if len(set(trace.layer_top_k)) > 1 else None,
        "layers": trace.layers.tolist(),
        "signals": list(trace.signals),
        "sites": {site: list(layers) for site, layers in trace.sites.items()},
        "counts": {
            "tokens": sum(c["tokens"] for c in counts),
            "sequences": len(trace.sequences),
            "documents": int(trace.sequences["document_id"].nunique()),
        },
        "shard_counts": counts,
    }


def finish(writer: RunWriter, frame: pd.DataFrame, vocabulary: pd.Series | None, meta: dict[str, Any]) -> None:
    files = {"sequences.parquet": shards.sequence_bytes(frame)}
    if vocabulary is not None:
        files["vocabulary.parquet"] = shards.vocabulary_bytes(vocabulary)
    writer.finish(meta, files)


# Columns of a long table, apart from the caller's.
_LONG = {*shards.TOKEN_COLUMNS, "text", "layer", "slot", "expert_id", "weight"}


def long_tables(trace: Trace) -> Iterator[pd.DataFrame]:
    """Yield tables with one row per token, layer and slot, repeating the columns, text and document of the token."""
    token_names = [name for name in trace.signals if name in shards.TOKEN_COLUMNS]
    routing = [name for name in trace.signals if name in ("expert_id", "weight")]
    columns = _columns(trace, _LONG)
    for block in trace.blocks(*token_names, *routing):
        shape = block["expert_id"].shape
        repeats = shape[1] * shape[2]
        table: dict[str, Any] = {name: np.repeat(block[name], repeats) for name in token_names}
        if "token_id" in block:
            table["text"] = np.repeat(np.array(trace.pieces(block["token_id"]), object), repeats)
        table["layer"] = np.tile(np.repeat(trace.layers, shape[2]), shape[0])
        table["slot"] = np.tile(np.arange(shape[2], dtype=np.uint8), shape[0] * shape[1])
        table |= {name: block[name].reshape(-1) for name in routing}
        for name, values in columns.items():
            table[name] = values.reindex(np.repeat(block["sequence"], repeats)).reset_index(drop=True)
        frame = pd.DataFrame(table)
        chosen = np.arange(shape[2]) < np.asarray(trace.layer_top_k)[:, None]
        yield frame if chosen.all() else frame[np.tile(chosen.reshape(-1), shape[0])]


def _columns(trace: Trace, own: Collection[str]) -> dict[str, pd.Series]:
    """Return the caller's columns of the sequences, renamed where they collide with `own`."""
    return {beside(str(c), own): trace.sequences[c] for c in trace.sequences if c != "length"}


def to_parquet(trace: Trace, path: Path, about: Mapping[str, str] | None = None) -> Path:
    """Implement Trace.to_parquet; `about` becomes the metadata of the schema."""
    tables = long_tables(trace)
    if (first := next(tables, None)) is None:
        raise BadInput(
            f"Cannot write an empty trace to {path}. Select tokens to write.",
            argument="trace",
            value=0,
        )
    schema = pa.Schema.from_pandas(first, preserve_index=False).remove_metadata()
    for name, values in _columns(trace, _LONG).items():
        # Use the type of the whole column, because a block may hold only missing values.
        whole = pa.Schema.from_pandas(values.rename(name).to_frame(), preserve_index=False).field(name)
        schema = schema.set(schema.get_field_index(name), whole)
    schema = schema.with_metadata(about) if about else schema
    with written_whole(path) as unfinished, pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
        for table in chain([first], tables):
            writer.write_table(pa.Table.from_pandas(table, schema=schema, preserve_index=False))
    return path


def to_xarray(trace: Trace) -> xr.Dataset:
    inner = {"expert_id": "slot", "weight": "slot", "router_logits": "expert"}
    data: dict[str, Any] = {}
    for name in trace.signals:
        values = trace.read(name)
        if name == "expert_id" and len(set(trace.layer_top_k)) > 1:
            values = np.where(values == shards.no_expert(values.dtype), -1, values.astype(np.int32))
        if name in inner:
            data[name] = (("token", "layer", inner[name]), values)
        elif values.ndim == 2:
            data[name] = (("token", "rank"), values)
        else:
            data[name] = ("token", values)
    sequence = data["sequence"][1]
    own = {*data, "token", "layer", "slot", "expert", "rank"}
    columns = {name: ("token", values.reindex(sequence).to_numpy()) for name, values in _columns(trace, own).items()}
    attrs = {"model": trace.meta.get("model", {}).get("name", ""), "source": str(trace.meta.get("source", ""))}
    return xr.Dataset(data, coords={"layer": trace.layers, **columns}, attrs=attrs)


def _kept(meta: dict[str, Any]) -> dict[str, Any]:
    computed = ("format", "kind", "files", "shards", "shard_counts", "counts", "layers", "signals", "sites")
    return {key: value for key, value in meta.items() if key not in computed}
