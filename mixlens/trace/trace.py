"""Trace: the routing of every token, in memory or on disk."""

from __future__ import annotations

import copy
import html
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from mixlens.core.distributed import processes
from mixlens.core.run_dir import open_run
from mixlens.errors import BadInput, MissingSignal, visible
from mixlens.trace import shards
from mixlens.trace.arrays import layer_numbers, part_of_arrays
from mixlens.trace.detokenize import display_pieces
from mixlens.trace.selection import Source, column, conditions, keep_tokens, row_mask, spans
from mixlens.trace.shards import GENERATED, PROMPT, DiskPart, Part

DOCUMENT = "document_id"
PHASES = {"prompt": PROMPT, "generated": GENERATED}


class Trace:
    """The routing of a corpus: one flat token axis in input order, without padding.

    Created by `record`, `Recorder.trace()`, `open`, or `Trace.from_arrays`.

    Parameters
    ----------
    sequences : pandas.DataFrame
        One row per sequence; index = sequence number; columns document_id, length, and the caller's.
    meta : Mapping[str, Any]
        Provenance: model, settings, versions, counts.
    layers : Any
        Int [layer], layer numbers.
    signals
        Names of the columns that `blocks` and `read` return.

    Examples
    --------
    >>> trace.n_layers, trace.n_experts, trace.top_k
    (8, 8, 2)
    """

    def __init__(
        self, sources: Sequence[Source], sequences: pd.DataFrame, meta: Mapping[str, Any], layers: Any
    ) -> None:
        self._sources = tuple(sources)
        self.sequences = self._whole = sequences
        self.meta = dict(meta)
        self.layers = np.asarray(layers, dtype=np.int64)
        self.n_experts: int = int(self.meta["n_experts"])
        alike = [int(self.meta["top_k"])] * len(self.layers)
        self.layer_top_k: tuple[int, ...] = tuple(self.meta.get("layer_top_k") or alike)
        self.top_k: int = max(self.layer_top_k, default=int(self.meta["top_k"]))
        self.path: Path | None = None
        self.reduce: Callable[[np.ndarray], np.ndarray] | None = None
        self.executor: str | None = None  # joblib backend that processes the shards
        self._vocabulary: pd.Series | None = None
        self.cluster = DOCUMENT  # column of `sequences` with independent values

    # ------------------------------------------------------------------ creation

    @classmethod
    def from_arrays(
        cls,
        expert_id: Any,
        *,
        n_experts: int,
        layers: Sequence[int] | None = None,
        weight: Any = None,
        router_logits: Any = None,
        tokens: Mapping[str, Any] | pd.DataFrame | None = None,
        sequences: pd.DataFrame | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> Trace:
        """Create a trace from routing recorded elsewhere.

        Parameters
        ----------
        expert_id : Any
            Integers [token, layer, slot], the strongest expert in slot 0; -1 in the last slots of layers that choose
            fewer experts than others.
        n_experts : int
            Number of experts per layer.
        layers : Sequence[int], optional
            Layer numbers in the model, ascending, if the arrays hold only some layers; None for 0, 1, 2 ...
        weight : Any, optional
            Nonnegative floats [token, layer, slot]; kept in half precision.
        router_logits : Any, optional
            Floats [token, layer, expert], -inf for a masked expert; kept in half precision, or in single if one is out
            of its range.
        tokens : Mapping[str, Any] or pandas.DataFrame, optional
            Arrays [token]: sequence, position, token_id, phase, logprob, each optional.
        sequences : pandas.DataFrame, optional
            One row per sequence, in order: document_id and any other columns.
        meta : Mapping[str, Any], optional
            Provenance, such as {"model": {"name": ...}}.

        Returns
        -------
        Trace

        Raises
        ------
        BadInput
            If shapes, ids, layers or sequences are inconsistent, a token chooses an expert twice, or a number is
            invalid (NaN, infinite, negative or fractional).

        Examples
        --------
        >>> ids = np.array([[[0, 2]], [[1, 3]]])
        >>> ml.Trace.from_arrays(ids, n_experts=4).n_tokens
        2
        """
        part, frame = part_of_arrays(
            expert_id, n_experts, weight, router_logits, {} if tokens is None else tokens, sequences
        )
        ids = part.arrays["expert_id"]
        about = {"source": "arrays", "n_experts": n_experts, **shards.choices_of(ids, n_experts), **(meta or {})}
        return from_parts([part], frame, about, layer_numbers(layers, ids.shape[1]))

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, check: bool = True) -> Trace:
        """Open the trace of a run directory; signals are read lazily.

        Parameters
        ----------
        path : str or os.PathLike
            The folder.
        check : bool, optional
            Verify the checksum of each file when it is first read; False verifies sizes only.

        Raises
        ------
        RunError
            If the run is missing or unfinished, or a file was altered.

        Examples
        --------
        >>> path = trace.save(tmp / "run").path
        >>> ml.Trace.open(path).n_tokens == trace.n_tokens
        True
        """
        run = open_run(path, "trace", check=check)
        parts = [DiskPart(run, index, run.meta["top_k"]) for index in range(run.meta["shards"])]
        frame = shards.read_sequences(run.file("sequences.parquet"))
        trace = from_parts(parts, frame, run.meta, run.meta["layers"])
        trace.path = run.path
        if "vocabulary.parquet" in run.meta["files"]:
            trace._vocabulary = shards.read_vocabulary(run.file("vocabulary.parquet"))
        return trace

    def save(self, path: str | os.PathLike[str]) -> Trace:
        """Write the trace as a run directory and open it there.

        Parameters
        ----------
        path : str or os.PathLike
            The folder.

        Raises
        ------
        RunError
            If the folder holds something else.

        Examples
        --------
        >>> trace.save(tmp / "saved").path.name
        'saved'
        """
        from mixlens.trace.convert import save

        save(self, path)
        return Trace.open(path)

    # ------------------------------------------------------------------ shape

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def n_tokens(self) -> int:
        if self.reduce is None and all(source.whole for source in self._sources):
            return int(self.sequences["length"].sum())
        return sum(len(block["sequence"]) for block in self.blocks("sequence"))

    @property
    def signals(self) -> tuple[str, ...]:
        known = [s.part.names for s in self._sources] or [frozenset(self.meta.get("signals", ()))]
        shared = frozenset.intersection(*known)
        order = [*shards.TOKEN_COLUMNS, *shards.ROUTING, *shards.NEXT_TOKEN]
        return tuple(name for name in order if name in shared)

    @property
    def sites(self) -> dict[str, tuple[int, ...]]:
        """Layer numbers of each recorded activation site."""
        found = [dict(source.part.sites) for source in self._sources]
        return {site: layers for site, layers in (found[0] if found else {}).items() if all(site in f for f in found)}

    @property
    def vocabulary(self) -> pd.Series | None:
        """Raw tokenizer pieces by token id ("▁the", "<0x0A>"); None if the tokenizer is unknown."""
        return self._vocabulary

    def require(self, what: str, *names: str) -> None:
        """Raise MissingSignal unless the trace has every signal in `names`.

        Parameters
        ----------
        what : str
            Name of the operation for the message.
        names : str
            Names of columns.

        Raises
        ------
        BadInput
            If the operation needs expert ids or weights, and layers choose different numbers of experts.
        """
        self._require_signals(what, *names)
        if {"expert_id", "weight"} & set(names) and len(set(self.layer_top_k)) > 1:
            layers = self.layers[np.asarray(self.layer_top_k) == self.top_k].tolist()
            raise BadInput(
                f"Cannot compute {what} over all layers: they choose {sorted(set(self.layer_top_k))} experts a token, "
                "and so their numbers are not comparable. Select layers that choose the same "
                f"number, such as trace.select(layers={layers}).",
                argument="layers",
                value=sorted(set(self.layer_top_k)),
            )

    def _require_signals(self, what: str, *names: str) -> None:
        missing = [name for name in names if name not in self.signals]
        if missing:
            raise MissingSignal(
                f"{what} needs {' and '.join(map(str, missing))}, and this trace has {', '.join(self.signals)} "
                f"(source: {self.meta.get('source', 'unknown')}). {_remedy(missing[0])}",
                argument=str(missing[0]),
                value=what,
            )

    # ------------------------------------------------------------------ reading

    def blocks(self, *names: str, tokens: int = 65_536) -> Iterator[dict[str, np.ndarray]]:
        """Iterate over columns in blocks of whole sequences, in input order.

        sequence, position, token_id  int64 [token]     expert_id      uint8   [token, layer, slot], uint16 above 256
        phase (0 prompt, 1 generated) uint8 [token]     weight         float32 [token, layer, slot]
        Unused slots, in layers that choose fewer experts than others, hold the largest id of the dtype and weight 0.
        logprob  float32 [token], log p(this token | earlier ones); NaN for the first of a sequence
        router_logits  float32 [token, layer, expert]
        top_id, top_logprob [token, 64] and tail_logprob [token]: the next-token distribution after this token

        Parameters
        ----------
        tokens : int, optional
            Approximate number of tokens per block; a sequence is never split.
        names : str
            Names of columns.

        Returns
        -------
        Iterator[dict[str, numpy.ndarray]]

        Examples
        --------
        >>> sum(len(block["token_id"]) for block in trace.blocks("token_id")) == trace.n_tokens
        True
        """
        self._require_signals("Reading a trace", *names)
        selected = np.zeros(int(self.sequences.index.max()) + 1 if len(self.sequences) else 0, bool)
        selected[self.sequences.index] = True
        for source in self._sources:
            first, last = source.part.first_sequence + source.offset, source.part.last_sequence + source.offset
            if not selected[first : last + 1].any():
                continue
            sequence = source.part.read("sequence", 0, source.part.n_tokens)
            for start, stop in spans(sequence, tokens):
                keep = keep_tokens(source, sequence[start:stop], selected, start, stop)
                if keep is None or keep.any():
                    yield {name: column(source, name, start, stop, keep) for name in names}

    def read(self, name: str) -> np.ndarray:
        """Return a whole column in memory; shapes as in `blocks`.

        Parameters
        ----------
        name : str
            Name of the column.

        Examples
        --------
        >>> trace.read("expert_id").shape == (trace.n_tokens, trace.n_layers, trace.top_k)
        True
        """
        pieces = [block[name] for block in self.blocks(name)]
        if pieces:
            return np.concatenate(pieces)
        if self._sources:
            return column(self._sources[0], name, 0, 0, None)
        shapes = {"expert_id": self.top_k, "weight": self.top_k, "router_logits": self.n_experts}
        dtype = (shards.TOKEN_COLUMNS | shards.ROUTING | shards.NEXT_TOKEN)[name]
        dtype = shards.id_dtype(self.n_experts) if name == "expert_id" else dtype
        return np.zeros((0, self.n_layers, shapes[name]) if name in shapes else 0, dtype)

    def activations(self, site: str) -> xr.DataArray:
        """Return recorded activations of a site [token, layer, ...], with coordinates sequence, position and layer.

        Only the tokens that were selected during recording have a row.

        Parameters
        ----------
        site : str
            Name of the site, such as "moe_out".

        Raises
        ------
        MissingSignal
            If the site was not recorded.
        """
        if site not in self.sites:
            raise MissingSignal(
                f"Cannot read the activations of {site!r}: this trace has {', '.join(self.sites) or 'none'}. Record "
                f"with signals=[{site!r}].",
                argument="site",
                value=site,
            )
        wanted = set(self.layers.tolist())
        columns = [i for i, layer in enumerate(self.sites[site]) if layer in wanted]
        values, sequences, positions = [], [], []
        selected = self.sequences.index
        for source in self._sources:
            row, value = source.part.activation(site)
            sequence = source.part.read("sequence", 0, source.part.n_tokens)
            kept = np.isin(sequence + source.offset, selected)
            met = conditions(source, 0, source.part.n_tokens)
            kept = kept if met is None else kept & met
            use = kept[row]
            values.append(value[use][:, columns])
            sequences.append(sequence[row[use]] + source.offset)
            positions.append(source.part.read("position", 0, source.part.n_tokens)[row[use]])
        data = np.concatenate(values)
        layers = [self.sites[site][i] for i in columns]
        inner = {"expert_out": ("slot", "hidden"), "expert_norm": ("slot",), "expert_neurons": ("slot", "neuron")}
        dims = ("token", "layer", *inner.get(site, ("hidden",)))
        coords = {
            "layer": layers,
            "sequence": ("token", np.concatenate(sequences)),
            "position": ("token", np.concatenate(positions)),
        }
        return xr.DataArray(data, dims=dims, coords=coords, name=site)

    # ------------------------------------------------------------------ selecting

    def select(
        self,
        *,
        where: Mapping[str, Any] | pd.Series | None = None,
        layers: Sequence[int] | int | None = None,
        phase: str | None = None,
        tokens: Sequence[int] | None = None,
        positions: tuple[int, int] | None = None,
    ) -> Trace:
        """Return a lazy view of part of the trace. Selections of a view are combined.

        Parameters
        ----------
        where : Mapping[str, Any] or pandas.Series, optional
            {column: value or list of values} or a boolean Series over `sequences`.
        layers : Sequence[int] or int, optional
            Layer number or numbers.
        phase : str, optional
            "prompt" or "generated".
        tokens : Sequence[int], optional
            Token ids.
        positions : tuple[int, int], optional
            (first, stop) within each sequence.

        Returns
        -------
        Trace

        Raises
        ------
        BadInput
            If a column, value, layer or phase does not exist.

        Examples
        --------
        >>> trace.select(layers=[0, 1], positions=(0, 10)).n_layers
        2
        """
        sequences = self.sequences
        if where is not None:
            sequences = sequences[row_mask(sequences, where, self._whole)]
        sources, kept_layers, meta = self._sources, self.layers, self.meta
        if layers is not None:
            asked = np.atleast_1d(np.asarray(layers))
            missing = sorted(set(asked.tolist()) - set(self.layers.tolist()))
            if missing:
                raise BadInput(
                    f"Cannot select layers {missing}: this trace has layers {_ranges(self.layers)}. Pass layer "
                    "numbers of the model, counted from 0.",
                    argument="layers",
                    value=missing,
                )
            index = tuple(int(np.flatnonzero(self.layers == layer)[0]) for layer in asked)
            chosen = [self.layer_top_k[i] for i in index]
            slots = max(chosen, default=self.top_k)
            sources = [
                replace(
                    s,
                    slots=slots,
                    layer_index=index if s.layer_index is None else tuple(s.layer_index[i] for i in index),
                )
                for s in sources
            ]
            kept_layers = asked
            meta = {**meta, "top_k": slots, "layer_top_k": chosen if len(set(chosen)) > 1 else None}
        if phase is not None and phase not in PHASES:
            raise BadInput(
                f"Cannot select the phase {phase!r}: phases are prompt and generated. Pass one of them.",
                argument="phase",
                value=phase,
            )
        sources = [s.narrowed(None if phase is None else PHASES[phase], tokens, positions) for s in sources]
        view = Trace(sources, sequences, meta, kept_layers)
        view.path, view._vocabulary, view.reduce = self.path, self._vocabulary, self.reduce
        view._whole, view.cluster = self._whole, self.cluster
        return view

    def local(self) -> Trace:
        """Return this process's share of the shards, for statistics summed over all processes.

        Every process of `accelerate launch` calls the same statistic on its share and gets the result for the whole
        trace. In a single process, this is the trace itself.
        """
        peers = processes()
        if peers.world == 1:
            return self
        share = Trace(self._sources[peers.rank :: peers.world], self.sequences, self.meta, self.layers)
        share.path, share._vocabulary, share.reduce = self.path, self._vocabulary, peers.sum
        share.cluster = self.cluster
        return share

    def parts(self) -> list[Trace]:
        """Return the trace of each shard, in order."""
        if len(self._sources) < 2:
            return [self]
        parts = []
        for source in self._sources:
            part = copy.copy(self)
            first, last = source.part.first_sequence + source.offset, source.part.last_sequence + source.offset
            numbers = self.sequences.index
            part._sources = (source,)
            part.sequences = part._whole = self.sequences[(numbers >= first) & (numbers <= last)]
            parts += [part] if len(part.sequences) else []
        return parts or [self]

    def pieces(self, token_ids: Sequence[int] | np.ndarray) -> list[str]:
        """Return the text of single tokens, or "#id" if the tokenizer is unknown.

        Parameters
        ----------
        token_ids : Sequence[int] or numpy.ndarray
            Token ids.

        Examples
        --------
        >>> len(trace.pieces([5, 6]))
        2
        """
        return display_pieces(token_ids, self._vocabulary)

    # ------------------------------------------------------------------ conversion

    def to_xarray(self) -> xr.Dataset:
        """Return every signal in memory, with dimensions token, layer, slot and expert.

        Examples
        --------
        >>> trace.to_xarray()["expert_id"].dims
        ('token', 'layer', 'slot')
        """
        from mixlens.trace.convert import to_xarray

        return to_xarray(self)

    def to_pandas(self) -> pd.DataFrame:
        """Return a long table in memory, with one row per token, layer and slot.

        Returns
        -------
        pandas.DataFrame
            sequence, position, token_id, phase, logprob (if recorded); text of the token, layer, slot, expert_id,
            weight; document_id and the caller's columns of the sequence.

        Examples
        --------
        >>> len(trace.to_pandas()) == trace.n_tokens * trace.n_layers * trace.top_k
        True
        """
        from mixlens.trace.convert import long_tables

        return pd.concat(long_tables(self), ignore_index=True)

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write the long table as one Parquet file, block by block, for DuckDB, Polars or Spark.

        Parameters
        ----------
        path : str or os.PathLike
            The file.

        Examples
        --------
        >>> trace.to_parquet(tmp / "long.parquet").name
        'long.parquet'
        """
        from mixlens.trace.convert import to_parquet

        return to_parquet(self, Path(path))

    def export(self, path: str | os.PathLike[str], *, format: str) -> Path:
        """Write the trace in a format that can be read without mixlens.

        safetensors
            Every signal as a tensor; the metadata hold n_experts, layers and the document_id of every sequence as JSON.
        npy
            A folder with a .npy file for every signal, and about.json with the same metadata.
        parquet
            The long table of `to_parquet`, with the same metadata in its schema.
        routed_experts
            One JSON line per sequence: prompt_token_ids, and "routed_experts" and "routed_weights" [token, layer, slot]
            as NumPy files in base64. Servers return this format, and trainers that replay routing (R3) read it.

        `mixlens.open(path, format=)` reads each back.

        Parameters
        ----------
        path : str or os.PathLike
            The file; for "npy" the folder.
        format : {"safetensors", "npy", "parquet", "routed_experts"}
            Output format.

        Raises
        ------
        BadInput
            If the format is unknown, the trace has no tokens, or its layers choose different numbers of experts.

        Examples
        --------
        >>> path = trace.export(tmp / "trace.safetensors", format="safetensors")
        >>> ml.open(path, format="safetensors").n_tokens == trace.n_tokens
        True
        """
        from mixlens.trace.export import export

        return export(self, Path(path), format)

    def __repr__(self) -> str:
        model = self.meta.get("model", {}).get("name", "unknown model")
        n_documents = self.sequences["document_id"].nunique()
        return visible(
            f"Trace of {model}: {self.n_tokens:,} tokens in {n_documents:,} documents, {self.n_layers} layers, "
            f"top-{self.top_k} of {self.n_experts} experts; {', '.join([*self.signals, *self.sites])}"
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>"


def from_parts(parts: Sequence[Part], frame: pd.DataFrame, meta: Mapping[str, Any], layers: Any) -> Trace:
    """Build a trace over `parts`; `frame` needs `length`, and `document_id` defaults to the row number."""
    if "document_id" not in frame:
        frame = frame.assign(document_id=np.arange(len(frame)))
    front = ["document_id", "length"]
    frame = frame[[*front, *(c for c in frame.columns if c not in front)]].rename_axis("sequence")
    return Trace([Source(part) for part in parts], frame, meta, layers)


def concat(traces: Sequence[Trace]) -> Trace:
    """Concatenate traces in order, as views; sequences are renumbered, documents keep their ids.

    Parameters
    ----------
    traces : Sequence[Trace]
        The traces, in order.

    Raises
    ------
    BadInput
        If layers, experts or top-k differ.

    Examples
    --------
    >>> ml.concat([trace, trace]).n_tokens == 2 * trace.n_tokens
    True
    """
    if not isinstance(traces, Sequence) or not all(isinstance(trace, Trace) for trace in traces):
        raise BadInput(
            "Cannot concatenate: not all of the items are traces. Pass a list of traces.",
            argument="traces",
        )
    if not traces:
        raise BadInput(
            "Cannot concatenate an empty list. Pass at least one trace.",
            argument="traces",
            value=0,
        )
    first, offset, sources, frames = traces[0], 0, [], []
    for number, trace in enumerate(traces):
        same = (trace.n_experts, trace.layer_top_k) == (first.n_experts, first.layer_top_k)
        if not same or not np.array_equal(trace.layers, first.layers):
            raise BadInput(
                f"Cannot concatenate trace {number} with trace 0: it has {trace.n_layers} layers, top-{trace.top_k} "
                f"of {trace.n_experts}; trace 0 has {first.n_layers} layers, top-{first.top_k} of {first.n_experts}. "
                "Select the same layers of the same model first.",
                argument="traces",
                value=number,
            )
        sources += [replace(s, offset=s.offset + offset) for s in trace._sources]
        frames.append(trace.sequences.set_index(trace.sequences.index + offset))
        offset += max((s.part.last_sequence + s.offset for s in trace._sources), default=-1) + 1
    joined = Trace(sources, pd.concat(frames).rename_axis("sequence"), first.meta, first.layers)
    joined._vocabulary = first._vocabulary
    return joined


def _ranges(layers: np.ndarray) -> str:
    contiguous = len(layers) > 2 and (np.diff(layers) == 1).all()
    return f"{layers[0]} to {layers[-1]}" if contiguous else ", ".join(map(str, layers))


def _remedy(signal: str) -> str:
    if signal in ("router_logits", "logprob", "weight", *shards.NEXT_TOKEN):
        asked = "top_logprobs" if signal in shards.NEXT_TOKEN else signal
        return f'Record with a local model: ml.record(ml.load(...), ..., signals=["{asked}"]).'
    return f"Give {signal} in tokens= of Trace.from_arrays, or record with a local model."
