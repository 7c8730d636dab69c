"""Follower: which rows every forward of a model reads, where each token stands, and what is prompt or padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from mixlens.errors import BadInput
from mixlens.models.layout import decoder_of

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")


@dataclass(frozen=True)
class Generation:
    """A call of generate: the mask of its prompt [rows, columns], and the ids that end a row."""

    prompt_mask: torch.Tensor
    stop_ids: frozenset[int]

    @property
    def prompt_columns(self) -> int:
        return self.prompt_mask.shape[1]


@dataclass(eq=False)
class Batch:
    """Rows that are being read or generated together, over one or many forwards.

    first      number of the first row among all rows seen
    position   int64 [rows], tokens of each row that were placed so far
    finished   bool [rows], rows past their end-of-sequence token
    waiting    logits after each row's last token, until the next token is known
    """

    first: int
    rows: int
    columns: int = 0
    cache: Any = None
    generation: Generation | None = None
    position: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    finished: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    waiting: torch.Tensor | None = None


@dataclass(eq=False)
class Call:
    """One forward; `raw` and `logits` are for whoever follows."""

    batch: Batch
    ids: torch.Tensor | None
    mask: torch.Tensor | None
    shape: tuple[int, int]
    start: int
    going_on: bool
    raw: Any = None
    logits: torch.Tensor | None = None


@dataclass(frozen=True)
class Placed:
    """The tokens of one forward. Arrays are [rows, columns] but for `generated` [columns].

    ids        -1 where the forward was given embeddings
    valid      False for padding
    position   place of the token in its own row, padding apart
    generated  True for tokens that the model sampled
    masked     whether the forward said what is padding; without that, all tokens are valid
    """

    batch: Batch
    ids: np.ndarray
    valid: np.ndarray
    position: np.ndarray
    generated: np.ndarray
    masked: bool


class Follower:
    """Calls `before` and `after` round every forward of `model` with a Call that knows what it continues.

    who      how errors name the one who follows
    lengths  tokens of each row, for right-padded batches without an attention mask
    strict   whether a batch of several rows, of which nothing tells the padding, is refused
    ending   called when a generate begins, and when it has ended well

    Raises BadInput for such a batch, for a cache that was cut or filled outside, for beam search, assisted decoding
    and generation without a cache.
    """

    def __init__(
        self,
        model: nn.Module,
        who: str,
        *,
        before: Callable[[Call], None],
        after: Callable[[Call, Any], None] | None = None,
        lengths: Sequence[int] | np.ndarray | None = None,
        strict: bool = True,
        ending: Callable[[], None] = lambda: None,
    ) -> None:
        self.model: Any = model
        self.who, self.strict = who, strict
        self.lengths = None if lengths is None else np.asarray(lengths, np.int64)
        self.n_rows = 0
        self._before, self._after, self._ending = before, after, ending
        self._open = False
        self._handles: list[Any] = []
        self._batch: Batch | None = None
        self._generating: Generation | None = None
        self._call: Call | None = None

    @property
    def generating(self) -> bool:
        return self._generating is not None

    def open(self, *, forwards: bool = True) -> None:
        """Begin to follow. With `forwards=False` only generate is: `follow` is called with every forward."""
        self._open = True
        if forwards:
            decoder = decoder_of(self.model)
            self._handles = [
                decoder.register_forward_pre_hook(self._on_forward, with_kwargs=True, prepend=True),
                decoder.register_forward_hook(self._on_output),
            ]
        if hasattr(self.model, "generate"):
            self._generate, self._outer = self.model.generate, vars(self.model).get("generate")
            self.model.generate = self._wrapped_generate

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        if hasattr(self.model, "generate"):
            del self.model.generate
            if self._outer is not None:  # another Follower is round this one
                self.model.generate = self._outer
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._batch = self._call = None  # they hold the key-value cache

    def restart(self) -> None:
        """Count rows from 0 again; the next forward begins sequences of its own."""
        self.n_rows, self._batch = 0, None

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
                    f"{self.who} was put round generate with {what}. It reads tokens more than once, or takes them "
                    "back, so they cannot be counted. Sample or decode greedily, one beam, with the cache.",
                    argument="generate",
                    value=what,
                )
        inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids", kwargs.get("inputs_embeds")))
        if inputs is None:
            raise BadInput(
                f"{self.who} cannot follow generate without input_ids. Pass the token ids of the prompt.",
                argument="input_ids",
                value=None,
            )
        stop = option("eos_token_id")
        stop = frozenset() if stop is None else frozenset(np.atleast_1d(torch.as_tensor(stop).cpu()).tolist())
        custom = kwargs.get("stopping_criteria") is not None or option("stop_strings") is not None
        prompt_stop = stop
        if custom and len(inputs) > 1 and option("pad_token_id") is not None:
            # Rows that another criterion ended are fed the pad token from then on.
            stop |= {int(option("pad_token_id"))}
        self._ending()
        self._generating, self._batch = Generation(_prompt_mask(inputs, option, prompt_stop), stop), None
        try:
            output = self._generate(*args, **kwargs)
            self._ending()
            return output
        finally:
            self._generating = self._batch = None

    def _on_forward(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        read: torch.Tensor = given["inputs_embeds"] if ids is None else ids
        rows, columns = read.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        if self._call is not None:  # the forward before this one failed half-way
            self._batch = None
        mask = given.get("attention_mask")
        mask = mask[:, -columns:] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        self._call = self.follow(ids, mask, (rows, columns), past, cache)
        self._before(self._call)

    def follow(
        self,
        ids: torch.Tensor | None,
        mask: torch.Tensor | None,
        shape: tuple[int, int],
        past: int,
        cache: Any = None,
    ) -> Call:
        """What a forward continues, from what it is given: the mask of its own columns, and the cache's length."""
        rows, columns = shape
        batch = self._continued(rows, past, cache)
        going_on = batch is not None
        if batch is None:
            batch = Batch(self.n_rows, rows, columns=past, generation=self._generating)
            batch.position, batch.finished = np.full(rows, past), np.zeros(rows, bool)
            self.n_rows += rows
        if mask is None and batch.generation is not None:
            # generate drops a mask of ones, and makes a four-dimensional one for a static cache.
            prompt = batch.generation.prompt_mask[:, batch.columns : batch.columns + columns]
            mask = torch.nn.functional.pad(prompt, (0, columns - prompt.shape[1]), value=1)
        elif mask is None and not going_on and self.lengths is not None:
            mask = self._mask_of_lengths(rows, columns)
        elif mask is None and rows > 1 and not going_on and self.strict:
            raise BadInput(
                f"{self.who} saw a batch of {rows} rows without a two-dimensional attention mask. Padding cannot be "
                "told from text. Pass attention_mask=, or Recorder(model, lengths=[tokens of each row]).",
                argument="attention_mask",
                value=rows,
            )
        self._batch = batch
        call = Call(batch, ids, mask, (rows, columns), batch.columns, going_on)
        batch.columns += columns
        return call

    def _continued(self, rows: int, past: int, cache: Any) -> Batch | None:
        batch = self._batch
        if batch is None or past == 0 or cache is not batch.cache or rows != batch.rows:
            return None
        if past != batch.columns:
            raise BadInput(
                f"{self.who} followed a cached decode of {batch.columns} tokens. The cache now holds {past}: tokens "
                "were taken back or added outside. Start a new cache, or record the two parts separately.",
                argument="past_key_values",
                value=past,
            )
        return batch

    def _mask_of_lengths(self, rows: int, columns: int) -> torch.Tensor:
        assert self.lengths is not None
        if len(self.lengths) != rows or self.lengths.max(initial=0) > columns:
            raise BadInput(
                f"{self.who} cannot use lengths={self.lengths.tolist()}: the batch has {rows} rows of {columns} "
                "tokens. Pass the number of tokens of every row.",
                argument="lengths",
                value=self.lengths.tolist(),
            )
        return torch.arange(columns)[None] < torch.as_tensor(self.lengths)[:, None]

    def _on_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        call, self._call = self._call, None
        if call is None:  # following began inside a forward
            return
        cache = getattr(output, "past_key_values", None)
        call.batch.cache = cache if cache is not None else call.batch.cache
        if self._after is not None:
            self._after(call, output)


def place(call: Call) -> Placed:
    """Where the tokens of this call stand. Counts them, so it is asked once for every call, in order."""
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
    position = batch.position[:, None] + valid.cumsum(1) - 1
    batch.position = batch.position + valid.sum(1)
    return Placed(batch, ids, valid, position, generated, masked=rows == 1 or call.mask is not None)


def _prompt_mask(inputs: torch.Tensor, option: Callable[[str], Any], stop_ids: frozenset[int]) -> torch.Tensor:
    """The prompt's mask as generate itself sees it: given, or told from the pad token, or all ones."""
    if (given := option("attention_mask")) is not None:
        return given
    pad = option("pad_token_id")
    if inputs.ndim == 2 and pad is not None and int(pad) not in stop_ids:
        return (inputs != int(pad)).long()
    return torch.ones(inputs.shape[:2], dtype=torch.long)
