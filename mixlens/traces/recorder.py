"""Recorder: a context manager that records routing round anybody's forward or generate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from mixlens.errors import BadInput
from mixlens.models.layout import decoder_of, describe, moe_layers, n_experts
from mixlens.runs import now, versions
from mixlens.traces import store
from mixlens.traces.hooks import Raw, Tap, routing_arrays, site_array
from mixlens.traces.logprobs import score
from mixlens.traces.signals import DEFAULT, Signals, Site, parse_signals
from mixlens.traces.trace import Trace, from_parts

PACKAGES = ("mixlens", "torch", "transformers", "accelerate", "numpy", "pyarrow", "safetensors")
_PENDING_TOKENS = 4096
_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")


@dataclass(frozen=True)
class _Generation:
    """A call of generate: the mask of its prompt [rows, columns], and the ids that end a row."""

    prompt_mask: torch.Tensor
    stop_ids: frozenset[int]

    @property
    def prompt_columns(self) -> int:
        return self.prompt_mask.shape[1]


@dataclass
class _Batch:
    """Rows that are being read or generated together, over one or many forwards."""

    first: int
    rows: int
    columns: int = 0
    cache: Any = None
    generation: _Generation | None = None
    position: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    finished: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    waiting: torch.Tensor | None = None  # logits after each row's last token, until the next token is known


@dataclass
class _Call:
    """One forward, with everything that is needed to sort its tokens out later."""

    batch: _Batch
    ids: torch.Tensor | None
    mask: torch.Tensor | None
    shape: tuple[int, int]
    start: int
    raw: Raw
    logits: torch.Tensor | None


class Recorder:
    """Records every forward of `model` inside the `with`, and leaves outputs bit for bit as they are.

    model    any Mixtral, whoever loaded it
    signals  names and Sites beside expert ids and weights (router_logits, logprob, top_logprobs, sites)
    lengths  tokens of each row, for right-padded batches that are passed without an attention mask

    Rows of a batch become sequences, in order. Padding is never recorded; nor is the last sampled token of a row,
    since no forward saw it, nor anything after its end-of-sequence token. A cached decode continues its sequences.

    Raises BadInput for a batch of several rows with neither mask nor lengths, for beam search, assisted decoding and
    generation without a cache.
    """

    def __init__(
        self, model: nn.Module, *, signals: Iterable[str | Site] = DEFAULT, lengths: Sequence[int] | None = None
    ) -> None:
        self.model: Any = model
        self.signals: Signals = parse_signals(signals, len(moe_layers(model)))
        self.lengths = None if lengths is None else np.asarray(lengths, np.int64)
        self._tap: Tap | None = None
        self._handles: list[Any] = []
        self._batch: _Batch | None = None
        self._generating: _Generation | None = None
        self._pending: list[_Call] = []
        self._columns: dict[str, list[np.ndarray]] = {}
        self._sites: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._n_sequences = 0
        self._n_recorded = 0
        self._call: _Call | None = None

    # ------------------------------------------------------------------ in and out

    def __enter__(self) -> Recorder:
        decoder = decoder_of(self.model)
        self._tap = Tap(self.model, self.signals)
        self._handles = [
            decoder.register_forward_pre_hook(self._before, with_kwargs=True),
            decoder.register_forward_hook(self._after),
        ]
        if self.signals.needs_logits and hasattr(self.model, "lm_head"):
            self._handles.append(self.model.lm_head.register_forward_hook(self._on_logits))
        if hasattr(self.model, "generate"):
            self._generate, self._outer = self.model.generate, vars(self.model).get("generate")
            self.model.generate = self._wrapped_generate
        return self

    def __exit__(self, *exception: object) -> None:
        if hasattr(self.model, "generate"):
            del self.model.generate
            if self._outer is not None:  # another Recorder is round this one
                self.model.generate = self._outer
        for handle in self._handles:
            handle.remove()
        if self._tap is not None:
            self._tap.close()
        if exception[0] is None:
            self._flush()

    def trace(self, sequences: pd.DataFrame | None = None) -> Trace:
        """What was recorded so far.

        sequences  optional columns, one row a sequence in order (domain, document_id ...)
        """
        self._flush()
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        if not columns:
            raise BadInput(
                "A trace of a Recorder was asked for. No forward ran inside it. Call the model inside the with block."
            )
        order = np.argsort(columns["sequence"], kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        present, columns["sequence"] = np.unique(columns["sequence"], return_inverse=True)
        table = pd.DataFrame(index=pd.RangeIndex(self._n_sequences)) if sequences is None else sequences
        if len(table) != self._n_sequences:
            raise BadInput(
                f"A table of {len(table)} sequences was given. The Recorder saw {self._n_sequences}. "
                "Give one row for every row of every batch, in order."
            )
        frame = table.reset_index(drop=True).iloc[present].reset_index(drop=True)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        activations = {site.name: self._activations(site, rank) for site in self.signals.sites}
        part = store.MemoryPart(columns, activations)
        meta = {
            "source": "recorder",
            "created": now(),
            "model": describe(self.model),
            "versions": versions(*PACKAGES),
            "settings": {"signals": self.signals.plan()},
            "n_experts": n_experts(self.model),
            "top_k": columns["expert_id"].shape[-1],
        }
        layers = range(columns["expert_id"].shape[1])
        return from_parts([part], frame.assign(length=np.bincount(columns["sequence"])), meta, layers)

    def _activations(self, site: Site, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        parts = self._sites[site.name]
        row, value = np.concatenate([r for r, _ in parts]), np.concatenate([v for _, v in parts])
        row = rank[row]
        order = np.argsort(row, kind="stable")
        row, value = row[order], value[order]
        if site.tokens == "last":
            sequence = np.sort(np.concatenate(self._columns["sequence"]), kind="stable")
            last = np.append(np.flatnonzero(np.diff(sequence)), len(sequence) - 1)
            kept = np.isin(row, last)
            row, value = row[kept], value[kept]
        return row, value, site.layers or ()

    # ------------------------------------------------------------------ generate

    def _wrapped_generate(self, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("generation_config") or self.model.generation_config

        def option(name: str) -> Any:
            return kwargs[name] if name in kwargs else getattr(config, name, None)

        refused = {
            "beam search": (option("num_beams") or 1) > 1,
            "assisted decoding": kwargs.get("assistant_model") is not None or bool(option("prompt_lookup_num_tokens")),
            "generation without a cache": option("use_cache") is False,
        }
        for what, asked in refused.items():
            if asked:
                raise BadInput(
                    f"A Recorder was put round generate with {what}. It reads tokens more than once, or takes them "
                    "back, so they cannot be counted. Sample or decode greedily, one beam, with the cache."
                )
        inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids", kwargs.get("inputs_embeds")))
        if inputs is None:
            raise BadInput("A Recorder was put round generate. No input_ids were given. Pass the prompt's token ids.")
        stop = option("eos_token_id")
        stop = frozenset() if stop is None else frozenset(np.atleast_1d(torch.as_tensor(stop).cpu()).tolist())
        custom = kwargs.get("stopping_criteria") is not None or option("stop_strings") is not None
        prompt_stop = stop
        if custom and len(inputs) > 1 and option("pad_token_id") is not None:
            # Rows that another criterion ended are fed the pad token from then on.
            stop |= {int(option("pad_token_id"))}
        self._generating, self._batch = _Generation(_prompt_mask(inputs, option, prompt_stop), stop), None
        try:
            return self._generate(*args, **kwargs)
        finally:
            self._generating = self._batch = None

    # ------------------------------------------------------------------ one forward

    def _before(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        assert self._tap is not None
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        ids, embeds, cache = given.get("input_ids"), given.get("inputs_embeds"), given.get("past_key_values")
        rows, columns = (ids if ids is not None else embeds).shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        if self._call is not None:  # the forward before this one failed half-way
            self._tap.take()
            self._batch = None
        batch = self._batch
        going_on = batch is not None and past > 0 and cache is batch.cache and rows == batch.rows
        if going_on and past != batch.columns:
            raise BadInput(
                f"A Recorder followed a cached decode of {batch.columns} tokens. The cache now holds {past}: tokens "
                "were taken back or added outside. Start a new cache, or record the two parts separately."
            )
        if not going_on:
            batch = self._new_batch(rows, past)
        mask = given.get("attention_mask")
        mask = mask[:, -columns:] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        if mask is None and batch.generation is not None:
            # generate drops a mask of ones, and makes a four-dimensional one for a static cache.
            prompt = batch.generation.prompt_mask[:, batch.columns : batch.columns + columns]
            mask = torch.nn.functional.pad(prompt, (0, columns - prompt.shape[1]), value=1)
        elif mask is None and rows > 1 and not going_on and self.lengths is None:
            raise BadInput(
                f"A Recorder saw a batch of {rows} rows without a two-dimensional attention mask. Padding cannot be "
                "told from text. Pass attention_mask=, or Recorder(model, lengths=[tokens of each row])."
            )
        elif mask is None and not going_on and self.lengths is not None:
            mask = self._mask_of_lengths(rows, columns)
        self._batch = batch
        self._call = _Call(batch, ids, mask, (rows, columns), batch.columns, {}, None)
        batch.columns += columns
        self._listen(True, decoding=self._generating is not None and going_on)

    def _new_batch(self, rows: int, past: int) -> _Batch:
        batch = _Batch(self._n_sequences, rows, columns=past, generation=self._generating)
        batch.position, batch.finished = np.full(rows, past), np.zeros(rows, bool)
        self._n_sequences += rows
        return batch

    def _mask_of_lengths(self, rows: int, columns: int) -> torch.Tensor:
        assert self.lengths is not None
        if len(self.lengths) != rows or self.lengths.max(initial=0) > columns:
            raise BadInput(
                f"A Recorder was given lengths={self.lengths.tolist()}. The batch has {rows} rows of {columns} tokens. "
                "Give the number of tokens of every row."
            )
        return torch.arange(columns)[None] < torch.as_tensor(self.lengths)[:, None]

    def _on_logits(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if self._pending and self._pending[-1].logits is None:
            self._pending[-1].logits = output.detach()

    def _after(self, _module: nn.Module, _args: Any, output: Any) -> None:
        call, self._call = self._call, None
        assert call is not None
        assert self._tap is not None
        self._listen(False)
        call.raw = self._tap.take()
        cache = getattr(output, "past_key_values", None)
        call.batch.cache = cache if cache is not None else call.batch.cache
        # Before this call is added: the logits of the one before have arrived by now.
        if sum(c.shape[0] * c.shape[1] for c in self._pending) >= _PENDING_TOKENS:
            self._flush()
        self._pending.append(call)

    def _listen(self, on: bool, *, decoding: bool = False) -> None:
        assert self._tap is not None
        self._tap.listening, self._tap.decoding = on, decoding

    # ------------------------------------------------------------------ sorting tokens out

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        for call in pending:
            self._sort_out(call)

    def _sort_out(self, call: _Call) -> None:
        batch, (rows, columns) = call.batch, call.shape
        ids = np.full((rows, columns), -1) if call.ids is None else call.ids.cpu().numpy()
        valid = np.ones((rows, columns), bool) if call.mask is None else call.mask.cpu().numpy().astype(bool)
        generated = np.zeros(columns, bool)
        stop_ids: frozenset[int] = frozenset()
        if batch.generation is not None:
            generated = call.start + np.arange(columns) >= batch.generation.prompt_columns
            stop_ids = batch.generation.stop_ids
        elif call.start > 0 and columns == 1:
            generated[:] = True
        for column in np.flatnonzero(generated):
            batch.finished |= np.isin(ids[:, column], list(stop_ids))
            valid[:, column] &= ~batch.finished
        flat = np.flatnonzero(valid)
        row, column = np.divmod(flat, columns)
        position = batch.position[:, None] + valid.cumsum(1) - 1
        batch.position = batch.position + valid.sum(1)
        arrays = {
            "sequence": batch.first + row,
            "position": position[row, column],
            "token_id": ids[row, column].astype(np.int64),
            "phase": generated[column].astype(np.uint8),
            **self._scores(call, ids, valid),
        }
        picked = torch.from_numpy(flat)
        arrays |= routing_arrays(call.raw, picked)
        for site in self.signals.sites:
            self._keep_site(site, call.raw, flat, arrays["phase"])
        for name, values in arrays.items():
            self._columns.setdefault(name, []).append(values)
        self._n_recorded += len(flat)

    def _keep_site(self, site: Site, raw: Raw, flat: np.ndarray, phase: np.ndarray) -> None:
        wanted = np.ones(len(flat), bool)
        if site.tokens in ("prompt", "generated"):
            wanted = phase == (store.GENERATED if site.tokens == "generated" else store.PROMPT)
        value = site_array(raw, site.name, site.dtype, torch.from_numpy(flat[wanted]))
        self._sites.setdefault(site.name, []).append((self._n_recorded + np.flatnonzero(wanted), value))

    def _scores(self, call: _Call, ids: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
        """logprob of each valid token from the logits before it, and the distribution after it."""
        if not self.signals.needs_logits:
            return {}
        rows, columns = valid.shape
        logprob = np.full((rows, columns), np.nan, np.float32)
        batch = call.batch
        if call.logits is None and self.signals.top_logprobs:
            raise BadInput(
                "A Recorder was to keep top_logprobs. The forward ran without the language-model head. Call the model "
                "itself, not its decoder, or record without top_logprobs."
            )
        if batch.waiting is not None:
            first = score(lambda x: x, batch.waiting, torch.from_numpy(ids[:, 0]), top=False)
            logprob[:, 0] = np.where(call.start > 0, first["logprob"], np.nan)
        known = 0 if call.logits is None else call.logits.shape[1]
        top: dict[str, np.ndarray] = {}
        if call.logits is not None:
            target = np.full((rows, known), -1)
            tail_ids, tail_valid = ids[:, columns - known :], valid[:, columns - known :]
            target[:, :-1] = np.where(tail_valid[:, :-1] & tail_valid[:, 1:], tail_ids[:, 1:], -1)
            flat = call.logits.reshape(rows * known, -1)
            top = score(lambda x: x, flat, torch.from_numpy(target.reshape(-1)), top=self.signals.top_logprobs)
            logprob[:, columns - known + 1 :] = top.pop("logprob").reshape(rows, known)[:, :-1]
            batch.waiting = call.logits[:, -1].clone()
        result = {"logprob": logprob[valid]} if self.signals.logprob else {}
        if self.signals.top_logprobs:
            result |= {name: _padded(values, rows, columns, known)[valid] for name, values in top.items()}
        return result


def _padded(values: np.ndarray, rows: int, columns: int, known: int) -> np.ndarray:
    """[rows, columns, ...] with values for the last `known` columns; NaN, or id -1, before them."""
    full = np.full((rows, columns, *values.shape[1:]), np.nan if values.dtype.kind == "f" else -1, values.dtype)
    full[:, columns - known :] = values.reshape(rows, known, *values.shape[1:])
    return full


def _prompt_mask(inputs: torch.Tensor, option: Callable[[str], Any], stop_ids: frozenset[int]) -> torch.Tensor:
    """The prompt's mask as generate itself sees it: given, or told from the pad token, or all ones."""
    if (given := option("attention_mask")) is not None:
        return given
    pad = option("pad_token_id")
    if inputs.ndim == 2 and pad is not None and int(pad) not in stop_ids:
        return (inputs != int(pad)).long()
    return torch.ones(inputs.shape[:2], dtype=torch.long)
