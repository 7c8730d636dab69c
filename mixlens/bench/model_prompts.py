"""Prompts for a loaded model, as token ids of an exact length."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mixlens.bench.prompts import Workload
from mixlens.errors import BadInput
from mixlens.models.hub import tokenizer_beside
from mixlens.models.layout import context_length


class Prompts:
    """The prompts of a workload for one model.

    Generated prompts are common words, tokenized by the model's tokenizer and cut to the requested length, or random
    tokens if the model has no tokenizer. The caller's prompts are padded on the left.

    Raises BadInput if prompt and answer together exceed the model's context, or if the caller passes prompts and the
    model has no tokenizer.
    """

    def __init__(self, model: Any, workload: Workload) -> None:
        self._workload = workload
        self._tokenizer = _tokenizer(model)
        self._vocabulary = int(model.config.vocab_size)
        given = workload.prompts or ()
        if given and self._tokenizer is None:
            raise BadInput(
                "Cannot benchmark the given prompts: the model has no tokenizer. Load the model from a folder with a "
                "tokenizer, or use generated prompts.",
                argument="tokenizer",
                value=None,
            )
        self._given = [self._tokenizer(text)["input_ids"] for text in given] if self._tokenizer else []
        self.columns = max(map(len, self._given), default=workload.prompt_tokens)
        if self.columns + workload.output_tokens > context_length(model):
            raise BadInput(
                f"Cannot generate answers of {workload.output_tokens} tokens to prompts of {self.columns}: the "
                f"context of the model is {context_length(model)} tokens. Use shorter prompts or answers.",
                argument="prompt_tokens",
                value=self.columns,
            )

    def plan(self) -> dict[str, Any]:
        """Return the parameters that determine the prompts, as plain JSON values."""
        made = "words in the model's tokens" if self._tokenizer else "random tokens"
        return {**self._workload.plan(), "ids": "given" if self._given else made}

    def batch(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and mask [rows, columns] of the prompts with these numbers."""
        rows = [self._ids(number) for number in numbers]
        width = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        for at, row in enumerate(rows):
            ids[at, width - len(row) :], mask[at, width - len(row) :] = torch.tensor(row), 1
        return ids, mask

    def _ids(self, number: int) -> list[int]:
        if self._given:
            return self._given[number % len(self._given)]
        length = self._workload.prompt_tokens
        if self._tokenizer is None:
            draw = np.random.default_rng([self._workload.seed, number])
            return draw.integers(min(3, self._vocabulary - 1), self._vocabulary, length).tolist()
        ids: list[int] = []
        text = self._workload.prompt(number)
        while len(ids) < length:
            ids += self._tokenizer(text)["input_ids"]
        return ids[:length]


def _tokenizer(model: Any) -> Any:
    if not getattr(model, "name_or_path", ""):
        return None
    try:
        return tokenizer_beside(model)
    except (OSError, ValueError):
        return None
