"""Recorder: a context manager that records routing round anybody's forward or generate."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from mixlens.core.run_dir import now, versions
from mixlens.errors import BadInput, RecordingError
from mixlens.interventions.eager import eagerly
from mixlens.interventions.forward_tracker import ForwardTracker
from mixlens.interventions.hooks import edits_of
from mixlens.interventions.places import Batch, Call, Placed
from mixlens.models.layout import moe_layers, n_experts, unwrapped
from mixlens.models.provenance import describe
from mixlens.recording.hooks import (
    BAD_LAYER,
    LeftOut,
    Raw,
    Tap,
    routing_arrays,
    site_array,
    warn_of_left_out,
    warn_of_unscored,
)
from mixlens.recording.logprobs import score
from mixlens.trace import shards
from mixlens.trace.signals import DEFAULT, Signals, Site, parse_signals
from mixlens.trace.trace import Trace, from_parts

PACKAGES = ("mixlens", "torch", "transformers", "accelerate", "numpy", "pyarrow", "safetensors")
_PENDING_TOKENS = 4096


class Recorder:
    """Record every forward of a model inside a with block; its outputs stay bit for bit the same.

    Rows of a batch become sequences, in order; so do the documents packed into one row, where attention keeps them
    apart. A forward with a cache continues the sequences of that cache. Padding is never recorded; nor is the last
    sampled token of a row, since no forward saw it, nor anything after its end-of-sequence token. Code that
    torch.compile made runs eagerly inside the block; a CompiledRecorder leaves it compiled.

    A forward whose tokens cannot be attributed raises a RecordingError; what was recorded before stays in `trace()`.

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
    RecordingError
        For a batch of several rows with neither mask nor lengths, for generation that reads tokens more than once or
        takes them back (beam search, assisted decoding, guidance, no cache), for a cache that was cut or reordered.

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
        self.model: Any = (model := unwrapped(model))
        self._layers = [layer.index for layer in moe_layers(model)]
        self.signals: Signals = parse_signals(signals, self._layers)
        self._tracker = ForwardTracker(
            model,
            "A Recorder",
            before=self._before,
            after=self._after,
            lengths=lengths,
            ending=self._flush,
            withdrawn=self._withdraw,
        )
        self._tap: Tap | None = None
        self._stack = ExitStack()
        self._latest: dict[int, Call] = {}  # of each thread
        self._lock = threading.RLock()
        self._pending: list[Call] = []
        self._columns: dict[str, list[np.ndarray]] = {}
        self._sites: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._n_recorded = 0
        self._about: dict[str, Any] = {}  # the model as it was entered; a later cast is none of these tokens' matter
        self._edits: dict[str, None] = {}
        self._choices: list[int] = []  # experts that a token of each layer chooses
        self._left_out: list[LeftOut] = []
        self._unscored = 0

    # ------------------------------------------------------------------ in and out

    def __deepcopy__(self, _memo: dict[int, Any]) -> Recorder:
        return self  # the hooks of a copied model lead to it, and it passes over that model

    def __enter__(self) -> Recorder:
        self._tracker.refuse_open()
        with ExitStack() as stack:
            stack.enter_context(eagerly())
            self._about = describe(self.model)
            self._tap = Tap(self.model, self.signals)
            stack.callback(self._tap.close)
            self._tracker.open()
            stack.callback(self._tracker.close)
            if self.signals.needs_logits and hasattr(self.model, "lm_head"):
                stack.callback(self.model.lm_head.register_forward_hook(self._on_logits).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        if exception[0] is None:
            self._flush(whole=True)
            self._tracker.check_threads()
            if self._tap is not None:
                self._tap.check_strays()

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
        columns = self.columns()
        warn_of_left_out(self._left_out)
        warn_of_unscored(self._unscored)
        if columns["weight"].shape[-1] == columns["expert_id"].shape[-1]:
            columns["weight"] = shards.pack_weights(columns["weight"])
        order = np.argsort(columns["sequence"], kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        present, columns["sequence"] = np.unique(columns["sequence"], return_inverse=True)
        table = pd.DataFrame(index=pd.RangeIndex(self._tracker.n_sequences)) if sequences is None else sequences
        if len(table) != self._tracker.n_sequences:
            raise BadInput(
                f"Cannot use a table of {len(table)} sequences: the Recorder saw {self._tracker.n_sequences}. Pass one "
                "row for every sequence, in order.",
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
            "model": self._about or describe(self.model),  # a CompiledRecorder may never be asked for it
            "versions": versions(*PACKAGES),
            "settings": {"signals": self.signals.plan(), **({"edits": list(self._edits)} if self._edits else {})},
            "n_experts": n_experts(self.model),
            **shards.choices_of(columns["expert_id"], n_experts(self.model)),
            "rule": self._tap.rule(edited=bool(self._edits)) if self._tap is not None else "unchecked",
            "left_out": self._left_out,
            "unscored": self._unscored,
        }
        return from_parts([part], frame.assign(length=np.bincount(columns["sequence"])), meta, self._layers)

    def columns(self) -> dict[str, np.ndarray]:
        """Return what was recorded so far by name, one row a token in the order of recording.

        Returns
        -------
        dict[str, numpy.ndarray]

        Raises
        ------
        BadInput
            When nothing was recorded.
        """
        self._flush(whole=True)
        if not self._columns:
            raise BadInput(
                "Cannot make a trace: no forward ran inside the Recorder. Call the model inside the with block.",
                argument="Recorder",
                value=0,
            )
        return self._joined()

    def _joined(self) -> dict[str, np.ndarray]:
        columns = self._columns
        if columns and len({part.shape[-1] for part in columns["weight"]}) > 1:  # an edit was entered in between
            k = columns["expert_id"][0].shape[-1]
            columns = columns | {"weight": [shards.unpack_weights(part, k) for part in columns["weight"]]}
        return {name: np.concatenate(parts) for name, parts in columns.items()}

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens recorded so far, in all sequences."""
        self._flush(whole=True)
        return sum(len(part) for part in self._columns.get("sequence", ()))

    def clear(self) -> None:
        """Forget what was recorded so far, as after a warm-up; call it between sequences, not within one."""
        self._pending, self._columns, self._sites, self._n_recorded = [], {}, {}, 0
        self._left_out, self._unscored, self._choices = [], 0, []
        self._latest = {}
        self._tracker.restart()

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
        call.packed = self._tap.sums_to_one  # now, since its tokens may be sorted out after an edit has ended
        self._tap.check_strays()
        if call.ids is None or call.ids.device.type == "cpu":  # elsewhere this would wait for the device
            call.placed = self._tracker.place(call)
        self._tap.begin(decoding=call.generation is not None and call.going_on)

    def _on_logits(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        call = self._latest.pop(threading.get_ident(), None) if module is self.model.lm_head else None
        if call is not None:
            call.head_input, call.logits = args[0].detach() if args else None, output.detach()

    def _after(self, call: Call, _output: Any) -> None:
        assert self._tap is not None
        self._tap.now.listening = False
        call.raw = self._tap.take()
        try:
            self._tap.check(call.raw, call.shape[0] * call.shape[1])
            self._check_choices(call)
        except RecordingError:
            call.batch.failed = True
            raise
        with self._lock:
            # Before this call is added: the logits of this thread's call before have arrived by now, or never will.
            self._latest.pop(threading.get_ident(), None)
            if sum(c.shape[0] * c.shape[1] for c in self._pending) >= _PENDING_TOKENS:
                self._flush()
            if self.signals.needs_logits:
                self._latest[threading.get_ident()] = call
            self._pending.append(call)

    def _check_choices(self, call: Call) -> None:
        """Raises RecordingError for another top-k than before."""
        choices = [call.raw["expert_id"][layer].shape[-1] for layer in self._layers]
        self._choices = self._choices or choices
        if choices != self._choices:
            raise self._another_top_k(max(choices), max(self._choices))

    def _another_top_k(self, found: int, before: int) -> RecordingError:
        return RecordingError(
            f"A {type(self).__name__} saw a forward whose tokens choose {found} experts, after others that chose "
            f"{before}. Record forwards of different top-k in Recorders of their own.",
            argument="top_k",
            value=found,
        )

    # ------------------------------------------------------------------ sorting tokens out

    def _flush(self, *, whole: bool = False) -> None:
        """Sort out the forwards that are complete; with `whole` also those whose logits may still come."""
        with self._lock:
            waiting = [] if whole else list(self._latest.values())
            pending, self._pending = self._pending, []
            failure: RecordingError | None = None
            for call in pending:
                if any(call is one for one in waiting):
                    self._pending.append(call)
                elif not call.batch.failed or call.placed is not None:
                    try:
                        self._sort_out(call)
                    except RecordingError as error:
                        call.batch.failed = True
                        failure = failure or error
            if failure is not None:
                raise failure

    def _withdraw(self, batch: Batch) -> None:
        """Forget the sequences of a batch that could not be followed to its end."""
        with self._lock:
            self._latest = {thread: call for thread, call in self._latest.items() if call.batch is not batch}
            self._pending = [call for call in self._pending if call.batch is not batch]
            if not self._columns:
                return
            columns = self._joined()
            kept = ~np.isin(columns["sequence"], batch.sequence)
            place = kept.cumsum() - 1
            self._columns = {name: [values[kept]] for name, values in columns.items()}
            for name, parts in self._sites.items():
                row, value = np.concatenate([r for r, _ in parts]), np.concatenate([v for _, v in parts])
                self._sites[name] = [(place[row[kept[row]]], value[kept[row]])]
            self._n_recorded = int(kept.sum())
            if not self._n_recorded:
                self._columns, self._sites = {}, {}

    def _sort_out(self, call: Call) -> None:
        placed = call.placed or self._tracker.place(call)
        flat = np.flatnonzero(placed.valid)
        row, column = np.divmod(flat, call.shape[1])
        arrays = {
            "sequence": placed.sequence[row, column],
            "position": placed.position[row, column],
            "token_id": placed.ids[row, column].astype(np.int64),
            "phase": placed.generated[column].astype(np.uint8),
            **self._scores(call, placed),
        }
        assert self._tap is not None
        picked = torch.from_numpy(flat)
        arrays |= routing_arrays(call.raw, picked, self._tap.n_experts, packed=call.packed)
        bad = arrays.pop(BAD_LAYER)
        if (bad >= 0).any():
            self._left_out += [
                (f"sequence {sequence}", int(position), int(layer))
                for sequence, position, layer in zip(arrays["sequence"], arrays["position"], bad, strict=True)
                if layer >= 0
            ]
            flat, arrays = flat[bad < 0], {name: values[bad < 0] for name, values in arrays.items()}
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

    def _scores(self, call: Call, placed: Placed) -> dict[str, np.ndarray]:
        """logprob of each valid token from the logits before it, and the distribution after it."""
        if not self.signals.needs_logits:
            return {}
        if call.logits is None and self.signals.top_logprobs:
            raise BadInput(
                "Cannot record top_logprobs: the forward ran without the language-model head. Call the model itself, "
                "not its decoder, or record without top_logprobs.",
                argument="top_logprobs",
            )
        ids, valid, batch, (rows, columns) = placed.ids, placed.valid, call.batch, call.shape
        logprob = np.full((rows, columns), np.nan, np.float32)
        first = valid.argmax(1)
        every = np.arange(rows)
        if batch.waiting is not None:
            goes_on = valid.any(1) & (placed.position[every, first] > 0)
            target = np.where(goes_on, ids[every, first], -1)
            logprob[every, first] = score(lambda x: x, batch.waiting, torch.from_numpy(target), top=False)["logprob"]
        batch.waiting = None
        top: dict[str, np.ndarray] = {}
        if call.logits is not None:
            known = _columns_of(call)
            following = np.minimum(known + 1, columns - 1)
            scored = (known >= 0) & (known + 1 < columns) & valid[:, known] & valid[:, following]
            scored &= placed.sequence[:, known] == placed.sequence[:, following]
            target = np.where(scored, ids[:, following], -1)
            flat = call.logits.reshape(rows * len(known), -1)
            top = score(lambda x: x, flat, torch.from_numpy(target.reshape(-1)), top=self.signals.top_logprobs)
            found = top.pop("logprob").reshape(rows, -1)
            row, at = np.nonzero(scored)
            logprob[row, following[at]] = found[row, at]
            self._unscored += int(np.isnan(found[row, at]).sum())
            batch.waiting = _last_of_rows(call.logits, known, valid)
            top = {name: _spread(values, rows, columns, known)[valid] for name, values in top.items()}
        return ({"logprob": logprob[valid]} if self.signals.logprob else {}) | top


def _columns_of(call: Call) -> np.ndarray:
    """The column of the forward that each column of the logits belongs to, -1 where that is not known."""
    assert call.logits is not None
    width, (rows, columns) = call.logits.shape[1], call.shape
    given, hidden = call.head_input, call.hidden
    if given is None or hidden is None or given.shape[:2] != (rows, width) or hidden.shape[:2] != (rows, columns):
        return np.full(width, -1)
    same_memory = given.untyped_storage().data_ptr() == hidden.untyped_storage().data_ptr()
    if (
        same_memory
        and given.stride()[::2] == hidden.stride()[::2]
        and (width < 2 or not given.stride(1) % hidden.stride(1))
    ):
        start, step = int(given.storage_offset() - hidden.storage_offset()), int(given.stride(1)) // hidden.stride(1)
        return start // hidden.stride(1) + step * np.arange(width)
    found = np.full(width, -1)
    for at in range(width):  # indices were picked, which copies
        equal = (given[:, at, None] == hidden).all(-1).all(0).nonzero()
        if len(equal):
            found[at] = int(equal[0])
    return found


def _last_of_rows(logits: torch.Tensor, known: np.ndarray, valid: np.ndarray) -> torch.Tensor:
    """Logits [rows, vocabulary] after each row's last token, padding on either side; NaN where they are not known."""
    last = valid.shape[1] - 1 - valid[:, ::-1].argmax(1)
    at = np.full(valid.shape[1], -1)
    at[known[known >= 0]] = np.flatnonzero(known >= 0)
    chosen = logits[torch.arange(len(logits)), torch.from_numpy(np.maximum(at[last], 0))]
    missing = torch.from_numpy(~valid.any(1) | (at[last] < 0))
    return chosen.masked_fill(missing[:, None].to(chosen.device), torch.nan)


def _spread(values: np.ndarray, rows: int, columns: int, known: np.ndarray) -> np.ndarray:
    """[rows, columns, ...] with the values of the columns known; NaN, or id -1, in the others."""
    full = np.full((rows, columns, *values.shape[1:]), np.nan if values.dtype.kind == "f" else -1, values.dtype)
    full[:, known[known >= 0]] = values.reshape(rows, len(known), *values.shape[1:])[:, known >= 0]
    return full
