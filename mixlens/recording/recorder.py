"""Recorder: a context manager that records routing round anybody's forward or generate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from mixlens.core.run_dir import now, versions
from mixlens.errors import BadInput
from mixlens.interventions.forward_tracker import Call, Follower, place
from mixlens.interventions.hooks import edits_of
from mixlens.models.layout import moe_layers, n_experts
from mixlens.models.provenance import describe
from mixlens.recording.hooks import Raw, Tap, routing_arrays, site_array
from mixlens.recording.logprobs import score
from mixlens.trace import shards
from mixlens.trace.signals import DEFAULT, Signals, Site, parse_signals
from mixlens.trace.trace import Trace, from_parts

PACKAGES = ("mixlens", "torch", "transformers", "accelerate", "numpy", "pyarrow", "safetensors")
_PENDING_TOKENS = 4096


class Recorder:
    """Record every forward of a model inside a with block; its outputs stay bit for bit the same.

    Rows of a batch become sequences, in order. Padding is never recorded; nor is the last sampled token of a row,
    since no forward saw it, nor anything after its end-of-sequence token. A cached decode continues its sequences.

    Parameters
    ----------
    model : torch.nn.Module
        Any Mixtral, whoever loaded it.
    signals : Iterable[str or Site], optional
        Names and Sites beside expert ids and weights (router_logits, logprob, top_logprobs, sites).
    lengths : Sequence[int], optional
        Tokens of each row, for right-padded batches that are passed without an attention mask.

    Raises
    ------
    BadInput
        For a batch of several rows with neither mask nor lengths, for beam search, assisted decoding and
        generation without a cache.

    Examples
    --------
    >>> import torch
    >>> with ml.Recorder(model) as recorder:
    ...     _ = model(torch.arange(10)[None])
    >>> recorder.trace().n_tokens
    10
    """

    def __init__(
        self, model: nn.Module, *, signals: Iterable[str | Site] = DEFAULT, lengths: Sequence[int] | None = None
    ) -> None:
        self.model: Any = model
        self.signals: Signals = parse_signals(signals, len(moe_layers(model)))
        self._follower = Follower(model, "A Recorder", before=self._before, after=self._after, lengths=lengths)
        self._tap: Tap | None = None
        self._handle: Any = None
        self._pending: list[Call] = []
        self._columns: dict[str, list[np.ndarray]] = {}
        self._sites: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._n_recorded = 0
        self._edits: dict[str, None] = {}

    # ------------------------------------------------------------------ in and out

    def __enter__(self) -> Recorder:
        self._tap = Tap(self.model, self.signals)
        self._follower.open()
        if self.signals.needs_logits and hasattr(self.model, "lm_head"):
            self._handle = self.model.lm_head.register_forward_hook(self._on_logits)
        return self

    def __exit__(self, *exception: object) -> None:
        self._follower.close()
        if self._handle is not None:
            self._handle.remove()
        if self._tap is not None:
            self._tap.close()
        if exception[0] is None:
            self._flush()

    def trace(self, sequences: pd.DataFrame | None = None) -> Trace:
        """Return what was recorded so far.

        Parameters
        ----------
        sequences : pandas.DataFrame, optional
            Optional columns, one row a sequence in order (domain, document_id ...).

        Returns
        -------
        Trace
        """
        self._flush()
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        if not columns:
            raise BadInput(
                "Cannot make a trace: no forward ran inside the Recorder. Call the model inside the with block.",
                argument="Recorder",
                value=0,
            )
        order = np.argsort(columns["sequence"], kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        present, columns["sequence"] = np.unique(columns["sequence"], return_inverse=True)
        table = pd.DataFrame(index=pd.RangeIndex(self._follower.n_rows)) if sequences is None else sequences
        if len(table) != self._follower.n_rows:
            raise BadInput(
                f"Cannot use a table of {len(table)} sequences: the Recorder saw {self._follower.n_rows}. Pass one "
                "row for every row of every batch, in order.",
                argument="sequences",
                value=len(table),
            )
        frame = table.reset_index(drop=True).iloc[present].reset_index(drop=True)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        activations = {site.name: self._activations(site, rank) for site in self.signals.sites}
        part = shards.MemoryPart(columns, activations)
        meta = {
            "source": "recorder",
            "created": now(),
            "model": describe(self.model),
            "versions": versions(*PACKAGES),
            "settings": {"signals": self.signals.plan(), **({"edits": list(self._edits)} if self._edits else {})},
            "n_experts": n_experts(self.model),
            "top_k": columns["expert_id"].shape[-1],
        }
        layers = range(columns["expert_id"].shape[1])
        return from_parts([part], frame.assign(length=np.bincount(columns["sequence"])), meta, layers)

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens recorded so far, in all sequences."""
        self._flush()
        return sum(len(part) for part in self._columns.get("sequence", ()))

    def clear(self) -> None:
        """Forget what was recorded so far, as after a warm-up; call it between sequences, not within one."""
        self._pending, self._columns, self._sites, self._n_recorded = [], {}, {}, 0
        self._follower.restart()

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

    # ------------------------------------------------------------------ one forward

    def _before(self, call: Call) -> None:
        assert self._tap is not None
        self._edits |= dict.fromkeys(edits_of(self.model))
        self._tap.take()  # of a forward that failed half-way
        self._listen(True, decoding=self._follower.generating and call.going_on)

    def _on_logits(self, _module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if self._pending and self._pending[-1].logits is None:
            self._pending[-1].logits = output.detach()

    def _after(self, call: Call, _output: Any) -> None:
        assert self._tap is not None
        self._listen(False)
        call.raw = self._tap.take()
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

    def _sort_out(self, call: Call) -> None:
        placed = place(call)
        flat = np.flatnonzero(placed.valid)
        row, column = np.divmod(flat, call.shape[1])
        arrays = {
            "sequence": call.batch.first + row,
            "position": placed.position[row, column],
            "token_id": placed.ids[row, column].astype(np.int64),
            "phase": placed.generated[column].astype(np.uint8),
            **self._scores(call, placed.ids, placed.valid),
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
            wanted = phase == (shards.GENERATED if site.tokens == "generated" else shards.PROMPT)
        value = site_array(raw, site.name, site.dtype, torch.from_numpy(flat[wanted]))
        self._sites.setdefault(site.name, []).append((self._n_recorded + np.flatnonzero(wanted), value))

    def _scores(self, call: Call, ids: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
        """logprob of each valid token from the logits before it, and the distribution after it."""
        if not self.signals.needs_logits:
            return {}
        rows, columns = valid.shape
        logprob = np.full((rows, columns), np.nan, np.float32)
        batch = call.batch
        if call.logits is None and self.signals.top_logprobs:
            raise BadInput(
                "A Recorder was to keep top_logprobs. The forward ran without the language-model head. Call the model "
                "itself, not its decoder, or record without top_logprobs.",
                argument="top_logprobs",
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
            batch.waiting = _last_of_rows(call.logits, tail_valid)
        result = {"logprob": logprob[valid]} if self.signals.logprob else {}
        if self.signals.top_logprobs:
            result |= {name: _padded(values, rows, columns, known)[valid] for name, values in top.items()}
        return result


def _last_of_rows(logits: torch.Tensor, valid: np.ndarray) -> torch.Tensor:
    """Logits [rows, vocabulary] after each row's last token, padding on either side; NaN for a row without one."""
    last = valid.shape[1] - 1 - valid[:, ::-1].argmax(1)
    chosen = logits[torch.arange(len(logits)), torch.from_numpy(last)]
    return chosen.masked_fill(torch.from_numpy(~valid.any(1))[:, None].to(chosen.device), torch.nan)


def _padded(values: np.ndarray, rows: int, columns: int, known: int) -> np.ndarray:
    """[rows, columns, ...] with values for the last `known` columns; NaN, or id -1, before them."""
    full = np.full((rows, columns, *values.shape[1:]), np.nan if values.dtype.kind == "f" else -1, values.dtype)
    full[:, columns - known :] = values.reshape(rows, known, *values.shape[1:])
    return full
