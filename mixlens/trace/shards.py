"""Shard files of a trace: their format on disk, and how they are read back.

A Part is a fixed slice of a trace's tokens. MemoryPart holds arrays, DiskPart reads shard files lazily. Both return the
same dtypes from `read(name, start, stop)`, so a saved trace equals the original.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save as safetensors_bytes

from mixlens.core.run_dir import Run

TOKEN_COLUMNS = {
    "sequence": np.int64,
    "position": np.int64,
    "token_id": np.int64,
    "phase": np.uint8,
    "logprob": np.float32,
}
ROUTING = {"expert_id": np.unsignedinteger, "weight": np.float32, "router_logits": np.float32}  # ids have `id_dtype`
NEXT_TOKEN = {"top_id": np.int64, "top_logprob": np.float32, "tail_logprob": np.float32}
PROMPT, GENERATED = 0, 1
MOST_EXPERTS = 2**15  # ids stay below the largest number of 16 bits, signed or not

# Half precision rounds weights and router logits to a relative 2**-11, finer than bf16 models.
_ON_DISK = {
    "sequence": np.int32,
    "position": np.int32,
    "token_id": np.int32,
    "weight": np.float16,
    "router_logits": np.float16,
    "top_id": np.int32,
}


class Part(Protocol):
    n_tokens: int
    first_sequence: int
    last_sequence: int

    @property
    def names(self) -> frozenset[str]: ...
    @property
    def sites(self) -> Mapping[str, tuple[int, ...]]: ...
    def read(self, name: str, start: int, stop: int) -> np.ndarray: ...
    def activation(self, site: str) -> tuple[np.ndarray, np.ndarray]: ...


def id_dtype(n_experts: int, *, ragged: bool = False) -> type[np.unsignedinteger]:
    """Return the dtype of expert ids: 8 bits up to 256 experts, then 16.

    ragged  True if layers choose different numbers of experts, which needs the extra id `no_expert`
    """
    return np.uint8 if n_experts + ragged <= 256 else np.uint16


def no_expert(dtype: Any) -> int:
    """Return the id in a slot that a layer lacks because other layers choose more experts."""
    return int(np.iinfo(dtype).max)


def choices_of(expert_id: np.ndarray, n_experts: int) -> dict[str, Any]:
    """Return the metadata of slots of ids [token, layer, slot]; layer_top_k only if layers differ."""
    top_k, missing = expert_id.shape[-1], no_expert(expert_id.dtype)
    each = (expert_id[:1] != missing).sum(-1).reshape(-1).tolist() if missing >= n_experts else []
    return {"top_k": top_k, **({"layer_top_k": each} if any(k != top_k for k in each) else {})}


def narrowed(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Cast the array to this dtype if it can hold all values; otherwise return it unchanged."""
    finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
    most = np.finfo(dtype).max if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    fits = finite.size == 0 or (finite.max() <= most and finite.min() >= -most)
    return array.astype(dtype, copy=False) if fits else array


def widened(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Cast the array to this dtype.

    Half precision is widened to single by bit operations, four times as fast as numpy: sign and digits are shifted into
    place, and a multiplication corrects the exponent, also for subnormal numbers.
    """
    if array.dtype != np.float16 or dtype != np.float32:
        return array.astype(dtype, copy=False)
    half = array.view(np.int16)
    if ((half & 0x7C00) == 0x7C00).any():  # NaN or infinite
        return array.astype(np.float32)
    bits = half.astype(np.int32) << 13
    bits &= ~0x70000000  # clear copies of the sign bit
    number = bits.view(np.float32)
    number *= np.float32(2.0**112)  # exponents of half precision begin 112 lower
    return number


def pack_weights(weight: np.ndarray) -> np.ndarray:
    """Return weights [T, L, k] in half precision without the last slot, which is one minus the others.

    Weights that do not sum to one, as in edited routing, keep every slot.
    """
    normalised = weight.size == 0 or np.abs(weight.sum(-1, dtype=np.float32) - 1).max() < 1e-3
    return narrowed(weight[..., :-1] if normalised else weight, np.float16)


def unpack_weights(packed: np.ndarray, top_k: int) -> np.ndarray:
    """Return weights [T, L, k] as float32 from the result of `pack_weights`."""
    weight = widened(packed, np.float32)
    if weight.shape[-1] == top_k:
        return weight
    return np.concatenate([weight, 1 - weight.sum(-1, keepdims=True)], axis=-1)


class MemoryPart:
    """Columns in memory. `arrays` has expert_id and any token, routing and next-token columns; `weight` is packed.

    activations   {site: (row int64 [n], value [n, layer, ...], layer numbers)}; rows are counted within this part
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], activations: Mapping[str, Any] | None = None) -> None:
        self.arrays = dict(arrays)
        self.activations = dict(activations or {})
        self.n_tokens = len(self.arrays["expert_id"])
        sequence = self.arrays["sequence"]
        self.first_sequence, self.last_sequence = (int(sequence[0]), int(sequence[-1])) if self.n_tokens else (0, -1)
        self.left_out: list[tuple[int, int, int]] = []

    def without(self, bad_layer: np.ndarray) -> MemoryPart:
        """Drop tokens whose `bad_layer` is not -1; `left_out` of the result has their sequence, position and layer."""
        good = bad_layer < 0
        if good.all():
            return self
        place = good.cumsum() - 1
        activations = {
            site: (place[row[good[row]]], value[good[row]], layers)
            for site, (row, value, layers) in self.activations.items()
        }
        part = MemoryPart({name: values[good] for name, values in self.arrays.items()}, activations)
        lost = (self.arrays["sequence"][~good], self.arrays["position"][~good], bad_layer[~good])
        part.left_out = list(zip(*(values.tolist() for values in lost), strict=True))
        return part

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.arrays)

    @property
    def sites(self) -> Mapping[str, tuple[int, ...]]:
        return {site: tuple(layers) for site, (_, _, layers) in self.activations.items()}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        values = self.arrays[name][start:stop]
        if name == "weight":
            return unpack_weights(values, self.arrays["expert_id"].shape[-1])
        return widened(values, _dtype(name, values))

    def activation(self, site: str) -> tuple[np.ndarray, np.ndarray]:
        row, value, _ = self.activations[site]
        return row, value

    def files(self, index: int) -> dict[str, Callable[[], bytes | memoryview]]:
        """Return functions that make the files of this part as shard `index`, by file name."""

        def group(columns: Mapping[str, Any]) -> dict[str, np.ndarray]:
            present = {name: self.arrays[name] for name in columns if name in self.arrays}
            return {n: np.ascontiguousarray(narrowed(a, _ON_DISK.get(n, a.dtype))) for n, a in present.items()}

        def tokens() -> memoryview:
            # NaN becomes null, so that averages in SQL leave it out.
            columns = {name: pa.array(column, from_pandas=True) for name, column in group(TOKEN_COLUMNS).items()}
            return parquet_bytes(pa.table(columns))

        files: dict[str, Callable[[], bytes | memoryview]] = {
            f"tokens-{index:05d}.parquet": tokens,
            f"routing-{index:05d}.safetensors": lambda: safetensors_bytes(group(ROUTING)),
        }
        if self.names & NEXT_TOKEN.keys():
            files[f"logprobs-{index:05d}.safetensors"] = lambda: safetensors_bytes(group(NEXT_TOKEN))
        for site, (row, value, layers) in self.activations.items():
            columns = {"row": row, "value": np.ascontiguousarray(value), "layer": np.asarray(layers, np.int64)}
            files[f"activations-{site}-{index:05d}.safetensors"] = partial(safetensors_bytes, columns)
        return files


class DiskPart:
    """One shard of a complete run, read lazily; each file's checksum is verified first."""

    def __init__(self, run: Run, index: int, top_k: int) -> None:
        self.run, self.index, self.top_k = run, index, top_k
        self.counts = run.meta["shard_counts"][index]
        self.n_tokens: int = self.counts["tokens"]
        self.first_sequence: int = self.counts["first_sequence"]
        self.last_sequence: int = self.counts["last_sequence"]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.run.meta["signals"])

    @property
    def sites(self) -> Mapping[str, tuple[int, ...]]:
        return {site: tuple(layers) for site, layers in self.run.meta["sites"].items()}

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        if name in TOKEN_COLUMNS:
            column = pq.read_table(self._path("tokens", "parquet"), columns=[name], memory_map=True).column(name)
            return column.slice(start, stop - start).to_numpy().astype(TOKEN_COLUMNS[name], copy=False)
        values = self._tensors["routing" if name in ROUTING else "logprobs"].get_slice(name)[start:stop]
        return unpack_weights(values, self.top_k) if name == "weight" else widened(values, _dtype(name, values))

    def activation(self, site: str) -> tuple[np.ndarray, np.ndarray]:
        with safe_open(self._path(f"activations-{site}", "safetensors"), framework="numpy") as file:
            return file.get_tensor("row"), file.get_tensor("value")

    @cached_property
    def _tensors(self) -> Mapping[str, Any]:
        return _Lazy(lambda stem: safe_open(self._path(stem, "safetensors"), framework="numpy"))

    def __getstate__(self) -> dict[str, Any]:
        """Omit open files, so that a part can be sent to another process."""
        return {name: value for name, value in vars(self).items() if name != "_tensors"}

    def _path(self, stem: str, suffix: str) -> Path:
        return self.run.file(f"{stem}-{self.index:05d}.{suffix}")


class _Lazy(dict):
    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, key: str) -> Any:
        return self.setdefault(key, self.make(key))


def parquet_bytes(table: pa.Table) -> memoryview:
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getbuffer()


def sequence_bytes(frame: pd.DataFrame) -> memoryview:
    """Return a sequence table as Parquet, with its index as the column `sequence`."""
    return parquet_bytes(pa.Table.from_pandas(frame.rename_axis("sequence").reset_index(), preserve_index=False))


def read_sequences(path: Path) -> pd.DataFrame:
    table = pq.read_table(path)
    frame = table.to_pandas(ignore_metadata=True)
    for field in table.schema:
        column = table.column(field.name)
        if pa.types.is_integer(field.type) and column.null_count:  # else floats, exact up to 2**53 only
            frame[field.name] = pd.array(column.to_pylist(), dtype="Int64")
    return frame.set_index("sequence")


def vocabulary_bytes(pieces: pd.Series) -> memoryview:
    return parquet_bytes(pa.table({"token_id": pieces.index.to_numpy(np.int32), "piece": pieces.to_numpy(object)}))


def read_vocabulary(path: Path) -> pd.Series:
    table = pq.read_table(path)
    return pd.Series(table.column("piece").to_pylist(), index=table.column("token_id").to_numpy(), name="piece")


def _dtype(name: str, stored: np.ndarray) -> Any:
    return stored.dtype if name == "expert_id" else (TOKEN_COLUMNS | ROUTING | NEXT_TOKEN)[name]
