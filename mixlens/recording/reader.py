"""Reader: token ids of whole sequences through the model, in batches without waste, results in input order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mixlens.interventions.hooks import edits_of, refuse_rows
from mixlens.models.layout import CACHE, decoder_of, input_device
from mixlens.recording.hooks import BAD_LAYER, Raw, Tap, routing_arrays, site_array
from mixlens.recording.logprobs import score
from mixlens.trace import shards
from mixlens.trace.signals import Signals, Site


class Reader:
    """Reads sequences with `model` and keeps `signals`. Used as a context manager; the hooks are gone after it.

    batch_tokens  rows x columns of a forward. Rows are bucketed by length and padded on the right, where causal
                  attention cannot see padding, so no mask is needed. A longer sequence is read in chunks
    """

    def __init__(self, model: nn.Module, signals: Signals, batch_tokens: int) -> None:
        self.model: Any = model
        self.signals = signals
        self.batch_tokens = batch_tokens
        self._tap: Tap | None = None

    def __enter__(self) -> Reader:
        refuse_rows(self.model)
        self._tap = Tap(self.model, self.signals)
        self._were_training = {module: module.training for module in self.model.modules()}
        self.model.eval()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._tap is not None
        self._tap.close()
        for module, training in self._were_training.items():  # a training model may hold frozen layers
            module.training = training

    @property
    def rule(self) -> str:
        """As `Tap.rule`, of what was read so far."""
        assert self._tap is not None
        return self._tap.rule(edited=bool(edits_of(self.model)))

    @torch.inference_mode()
    def read(
        self, sequences: list[np.ndarray], first_sequence: int = 0, phases: Sequence[np.ndarray | None] | None = None
    ) -> shards.MemoryPart:
        """The part of a trace that these sequences make, in their order; all tokens are prompt without `phases`."""
        tap = self._tap
        assert tap is not None
        lengths = np.array([len(ids) for ids in sequences])
        start = np.concatenate([[0], np.cumsum(lengths)])
        tokens = _Gathered(int(start[-1]))
        sites = {site.name: _SiteRows(site) for site in self.signals.sites}
        for target, picked, raw, states in self.placed(sequences):
            tokens.put(target, routing_arrays(raw, picked, tap.n_experts, packed=tap.sums_to_one))
            if self.signals.needs_logits:
                self._score(tokens, target, states, picked, start, sequences)
            for rows_of_site in sites.values():
                rows_of_site.add(raw, picked, target, np.isin(target, start[1:] - 1))
        arrays = {
            "sequence": np.repeat(np.arange(len(sequences)), lengths) + first_sequence,
            "position": np.arange(start[-1]) - np.repeat(start[:-1], lengths),
            "token_id": np.concatenate(sequences),
            "phase": np.concatenate(
                [
                    np.full(n, shards.PROMPT, np.uint8) if phase is None else phase
                    for n, phase in zip(lengths, phases or [None] * len(sequences), strict=True)
                ]
            ),
            **tokens.arrays,
        }
        bad_layer = arrays.pop(BAD_LAYER)
        part = shards.MemoryPart(arrays, {name: rows.sorted() for name, rows in sites.items()})
        return part.without(bad_layer)

    def placed(self, sequences: list[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor, Raw, torch.Tensor]]:
        """(tokens, counted through all sequences [n]; their rows in the batch [n]; raw signals; last hidden states).

        One for every forward that reading the sequences takes, whatever the order of batches; padding is left out.
        """
        lengths = np.array([len(ids) for ids in sequences])
        start = np.concatenate([[0], np.cumsum(lengths)])
        for rows in batches(lengths, self.batch_tokens):
            for offset, ids, raw, states in self.forwards([sequences[row] for row in rows]):
                valid = offset + np.arange(ids.shape[1])[None] < lengths[rows][:, None]
                row, column = np.nonzero(valid)
                yield start[rows][row] + offset + column, torch.from_numpy(np.flatnonzero(valid)), raw, states

    def forwards(self, sequences: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray, Raw, torch.Tensor]]:
        """(offset, ids [rows, columns], raw signals, last hidden states [rows x columns, H]) of each forward."""
        assert self._tap is not None
        longest = max(len(ids) for ids in sequences)
        padded = np.zeros((len(sequences), longest), np.int64)
        for row, ids in enumerate(sequences):
            padded[row, : len(ids)] = ids
        decoder, device, cache = decoder_of(self.model), input_device(self.model), None
        for offset in range(0, longest, self.batch_tokens):
            ids = padded[:, offset : offset + self.batch_tokens]
            self._tap.begin(decoding=False)
            try:
                output = decoder(
                    input_ids=torch.from_numpy(ids).to(device),
                    use_cache=longest > self.batch_tokens,
                    **{CACHE: cache},
                )
            finally:
                self._tap.now.listening = False
            cache, raw = getattr(output, CACHE), self._tap.take()
            self._tap.check(raw, ids.size)
            yield offset, ids, raw, output.last_hidden_state.flatten(0, 1)

    def _score(
        self,
        tokens: _Gathered,
        target: np.ndarray,
        states: torch.Tensor,
        picked: torch.Tensor,
        start: np.ndarray,
        sequences: list[np.ndarray],
    ) -> None:
        ends = np.isin(target, start[1:] - 1)
        following = np.where(ends, -1, np.concatenate([*sequences, [-1]])[target + 1])
        found = score(
            self.model.lm_head,
            states[picked.to(states.device)],
            torch.from_numpy(following),
            top=self.signals.top_logprobs,
        )
        logprob = found.pop("logprob")
        if self.signals.logprob:
            tokens.put(target[~ends] + 1, {"logprob": logprob[~ends]})
        tokens.put(target, found)


class _Gathered:
    """Arrays over all tokens, filled in whatever order the batches come."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.arrays: dict[str, np.ndarray] = {}

    def put(self, rows: np.ndarray, values: dict[str, np.ndarray]) -> None:
        for name, value in values.items():
            if name not in self.arrays:
                missing = np.nan if value.dtype.kind == "f" else 0
                self.arrays[name] = np.full((self.n_tokens, *value.shape[1:]), missing, value.dtype)
            self.arrays[name][rows] = value


class _SiteRows:
    """Activations of one site, with the row of the token that each belongs to."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.rows: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def add(self, raw: Raw, picked: torch.Tensor, target: np.ndarray, last: np.ndarray) -> None:
        wanted = {"all": np.ones_like(last), "last": last, "prompt": np.ones_like(last)}.get(
            self.site.tokens, np.zeros_like(last)
        )
        self.rows.append(target[wanted])
        self.values.append(site_array(raw, self.site.name, self.site.dtype, picked[torch.from_numpy(wanted)]))

    def sorted(self) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
        row, value = np.concatenate(self.rows), np.concatenate(self.values)
        order = np.argsort(row, kind="stable")
        return row[order], value[order], self.site.layers or ()


def batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Rows of each batch: neighbours in length, rows x longest within the budget, the longest batch first."""
    order = np.argsort(-lengths, kind="stable")
    begin = 0
    while begin < len(order):
        rows = max(1, batch_tokens // int(lengths[order[begin]]))
        yield order[begin : begin + rows]
        begin += rows
