"""ForwardTracker: which sequences every forward of a model reads or continues."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from mixlens.errors import BadInput, RecordingError
from mixlens.interventions.caches import Caches
from mixlens.interventions.generation import Generation, watch_generate
from mixlens.interventions.masks import check_mask, seen_by, without_window
from mixlens.interventions.places import Batch, Call, Placed, Places
from mixlens.interventions.transforms import refuse_without_values
from mixlens.models.layout import cache_in, config_of, decoder_of

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")
_KNOWN = {*_ARGUMENTS, "cache"}
_SEAMS = "cu_seq_lens_q"  # where documents begin in a row, for attention that reads them off it


class _Thread(threading.local):
    call: Call | None = None
    generation: Generation | None = None


class ForwardTracker:
    """Calls `before` and `after` round every forward of `model` with a Call that knows what it continues.

    What a forward continues is read from what the decoder receives: the cache object and how far it has grown, the
    mask, the position ids. Options of generate decide nothing.

    who       how errors name the one who follows
    lengths   tokens of each row, for right-padded batches without an attention mask
    strict    whether a batch of several rows, of which nothing tells the padding, is refused
    ending    called when a generate begins, and when it has ended well
    withdrawn called with the sequences of a generate that turned out not to be followable

    Raises RecordingError for a forward that cannot be attributed.
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
        withdrawn: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self.model: Any = model
        self.who, self.strict = who, strict
        self.lengths = None if lengths is None else np.asarray(lengths, np.int64)
        self.places = Places(who)
        self._before, self._after, self._ending, self._withdrawn = before, after, ending, withdrawn
        self._decoder: Any = None
        self._handles: list[Any] = []
        self._first: Any = None
        self._leave: Callable[[], None] | None = None
        self._caches = Caches(self.places.refusal)
        self._thread = _Thread()
        self._entered = threading.get_ident()
        self._unheard: RecordingError | None = None

    @property
    def n_sequences(self) -> int:
        return self.places.n_sequences

    def place(self, call: Call) -> Placed:
        """Where the tokens of this call stand. Counts them, so it is asked once for every call, in order."""
        return self.places.place(call)

    @property
    def following(self) -> bool:
        """Whether this thread is inside a forward."""
        return self._thread.call is not None

    @property
    def running(self) -> Generation | None:
        """The call of generate that this thread is in."""
        return self._thread.generation

    def open(self, *, forwards: bool = True) -> None:
        """Begin to follow. With `forwards=False` only generate is: `follow` is called with every forward."""
        self._entered = threading.get_ident()
        self._decoder = decoder_of(self.model)
        if forwards:
            self._handles = [
                self._decoder.register_forward_pre_hook(self._on_forward, with_kwargs=True, prepend=True),
                self._decoder.register_forward_hook(self._on_output),
            ]
            self.hook_first()
        self._leave = watch_generate(self.model, self)

    def refuse_open(self) -> None:
        """Raises BadInput while forwards are followed."""
        if self._leave is not None:
            raise BadInput(
                f"{self.who} cannot be entered while it records. Make another for a block within its own.",
                argument="Recorder",
                value=self.who,
            )

    def hook_first(self) -> None:
        """Look at the first layer's input before any other hook, which may rely on what `before` does."""
        if self._first is not None:
            self._first.remove()
        layer = decoder_of(self.model).layers[0]
        self._first = layer.register_forward_pre_hook(self._on_first_layer, with_kwargs=True, prepend=True)

    def close(self) -> None:
        if self._leave is None:
            return
        self._leave()
        self._leave = None
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._first is not None:
            self._first.remove()
            self._first = None
        self._caches.clear()
        self._thread = _Thread()

    def check_threads(self) -> None:
        """Raises what was refused in another thread, whose caller may not have passed it on."""
        if self._unheard is not None:
            raise self._unheard

    def restart(self) -> None:
        """Count sequences from 0 again; the next forward begins sequences of its own."""
        self.places.n_sequences = 0
        self._caches.clear()

    # ------------------------------------------------------------------ generate

    @contextmanager
    def generation(self, options: dict[str, Any]) -> Iterator[None]:
        """One call of generate."""
        parent = self._thread.generation
        self._ending()
        generation = Generation(
            mask_given=options.get("attention_mask") is not None,
            assistant=options.get("assistant_model"),
            parent=parent,
        )
        self._thread.generation = generation
        try:
            yield
            self._check_end(generation)
            self._ending()
        except RecordingError:
            if generation.batch is not None:
                generation.batch.failed = True
                self._withdrawn(generation.batch)
            raise
        finally:
            self._thread.generation = parent

    def _check_end(self, generation: Generation) -> None:
        batch = generation.batch
        if batch is None or generation.parent is not None:
            return
        if not generation.ended and hasattr(self.model, "_get_stopping_criteria"):
            raise self._refusal(
                "a generate whose decoding never asked its stopping criteria: which tokens were sampled cannot be "
                "told. Use a decoding method that does, or call the model step by step",
                "custom_generate",
            )

    # ------------------------------------------------------------------ one forward

    def __deepcopy__(self, _memo: dict[int, Any]) -> ForwardTracker:
        return self  # hooks of a copied model come here too, and are passed over

    def passes_over(self, module: nn.Module) -> bool:
        """Whether a hook runs in a copy of the model, which nobody follows.

        Raises RecordingError for one that nn.DataParallel made.
        """
        if getattr(module, "_is_replica", False):
            raise self._refusal(
                "a model that is spread over devices with nn.DataParallel, whose parts run in no fixed order. Use one "
                "process for each device, or device_map",
                "model",
                "nn.DataParallel",
            )
        return module is not self._decoder

    def _on_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        thread = self._thread
        if self.passes_over(module):
            return
        if thread.call is not None:  # the forward before this one failed half-way
            thread.call.batch.failed = True
            thread.call = None
        with self._heard():
            thread.call = self._follow_given(by_name(args, kwargs))

    def check(self, given: Mapping[str, Any], shape: tuple[int, int], past: int) -> None:
        """Raises RecordingError for what a forward was given and nobody can say what it does with."""
        unknown = [name for name, value in given.items() if name not in _KNOWN and _may_hold_keys(value)]
        if unknown:
            raise self._refusal(
                f"a forward that was given {', '.join(unknown)}, which may change what its tokens attend to. "
                "Continuous batching does so; generate one batch at a time instead",
                ", ".join(unknown),
            )
        if not shape[1]:
            raise self._refusal("a forward of no tokens", "input_ids")
        check_mask(given.get("attention_mask"), shape, past, self._attention, self._refusal)
        positions = given.get("position_ids")
        if positions is not None and (positions.ndim != 2 or len(positions) not in (1, shape[0])):
            raise self._refusal(
                f"a forward with position_ids of shape {list(positions.shape)}. Pass [rows, columns]", "position_ids"
            )

    def _follow_given(self, given: dict[str, Any]) -> Call:
        ids, cache = given.get("input_ids"), cache_in(given)
        read: torch.Tensor = given["inputs_embeds"] if ids is None else ids
        refuse_without_values(self.who, read)
        rows, columns = read.shape[:2]
        past = self._length(cache)
        mask: torch.Tensor | None = given.get("attention_mask")
        positions = given.get("position_ids")
        self.check(given, (rows, columns), past)
        full = mask is not None and mask.ndim == 4
        call = self.follow(ids, None if full else mask, (rows, columns), past, cache, told=full, embeds=read)
        call.positions = positions
        if mask is not None and full:
            call.seen, call.masked_by_caller = seen_by(mask, past, columns), True
        call.isolated = mask is None and cache is None and self._attention.startswith("flash")
        call.seams = given.get(_SEAMS)
        return call

    def _length(self, cache: Any) -> int:
        """How many columns a cache holds."""
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise self._refusal(
                f"a cache of type {type(cache).__name__}, which does not say how many tokens it holds. Continuous "
                "batching has such a cache; generate one batch at a time instead",
                "past_key_values",
                type(cache).__name__,
            )
        return 0 if cache is None else int(cache.get_seq_length())

    def _on_first_layer(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Only here is the mask known that attention uses."""
        call = self._thread.call
        if call is None or call.begun:  # following began inside a forward, or a backward recomputes the layer
            return
        call.begun = True
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        packed = call.positions is not None and not call.start and not call.told
        with self._heard():
            if packed and isinstance(mask, torch.Tensor) and mask.ndim == 4:
                call.seen = without_window(seen_by(mask, 0, call.shape[1]), call.shape[1])
            self._before(call)

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """A refusal in another thread is kept for the one who entered, as that thread may keep it to itself."""
        try:
            yield
        except RecordingError as error:
            self._thread.call = None
            if threading.get_ident() != self._entered:
                self._unheard = error
            raise

    def follow(
        self,
        ids: torch.Tensor | None,
        mask: torch.Tensor | None,
        shape: tuple[int, int],
        past: int,
        cache: Any = None,
        *,
        told: bool = False,
        embeds: torch.Tensor | None = None,
        step: int | None = None,
        batch: Batch | None = None,
    ) -> Call:
        """What a forward continues: from its mask [rows, columns of the cache and its own], its cache and its length.

        told  whether a four-dimensional mask says what is padding
        step  as of Call, and
        batch the rows that are continued, where they are known already, as without a cache to look at
        """
        rows, columns = shape
        generation = self._thread.generation
        batch = batch if cache is None else self._caches.continued(cache, rows, past, masked=mask is not None or told)
        going_on = batch is not None
        if batch is None:
            batch = Batch(rows, columns=past)
        self._claim(generation, batch)
        if cache is not None and generation is not None and generation.ended:
            step = generation.read
            generation.read += columns
            if generation.read > len(generation.ended):
                raise self._refusal(
                    f"a generate that reads {generation.read} tokens after it has sampled {len(generation.ended)}: "
                    "some of them are guesses that it may take back. Generate without speculation",
                    "generate",
                )
        if mask is None and not told and not going_on and self.lengths is not None and generation is None:
            mask = self._mask_of_lengths(rows, columns)
        elif self.strict and rows > 1 and not going_on:
            self._check_told(ids if ids is not None else embeds, mask, told, generation)
        if cache is not None:
            self._caches.note(cache, batch)
        call = Call(batch, ids, mask, (rows, columns), batch.columns, going_on, generation, step)
        batch.columns += columns
        return call

    def _check_told(
        self, read: torch.Tensor | None, mask: torch.Tensor | None, told: bool, generation: Generation | None
    ) -> None:
        """Raises RecordingError where rows differ, and nothing says which of their columns are padding."""
        if generation is None:
            known = told or mask is not None
        else:  # a mask of ones may be one that generate made up
            known = generation.mask_given or (generation.pad_tells and read is not None and read.ndim == 2)
            known = known or (mask is not None and not bool(mask.all()))
            known = known or (read is not None and bool((read == read[:1]).all()))
        if not known:
            rows = len(read) if read is not None else None
            raise RecordingError(
                f"{self.who} saw a batch of {rows} rows without an attention mask. Padding cannot be told from text. "
                "Pass attention_mask=, or Recorder(model, lengths=[tokens of each row]).",
                argument="attention_mask",
                value=rows,
            )

    def _claim(self, generation: Generation | None, batch: Batch) -> None:
        """A generate has one batch, with those that it calls: another would read its tokens per second time."""
        while generation is not None:
            if generation.batch not in (None, batch):
                raise self._refusal(
                    "a generate that reads its tokens with more than one cache, as guidance, token healing and "
                    "generation without a cache do. Sample or decode greedily, with the cache",
                    "generate",
                )
            generation.batch = batch
            generation = generation.parent

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

    def _on_output(self, module: nn.Module, _args: Any, output: Any) -> None:
        if self.passes_over(module):
            return
        call, self._thread.call = self._thread.call, None
        if call is None:  # following began inside a forward
            return
        parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
        cache = next((part for part in parts if hasattr(part, "get_seq_length")), None)
        if cache is not None:
            self._caches.note(cache, call.batch, read=True)
        call.hidden = next((part for part in parts if isinstance(part, torch.Tensor)), None)
        if self._after is not None:
            with self._heard():
                self._after(call, output)

    @property
    def _attention(self) -> str:
        return str(config_of(self.model)._attn_implementation)

    def _refusal(self, what: str, value: object, found: object = None) -> RecordingError:
        return self.places.refusal(what, value, found)


def by_name(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a decoder was given, those without a name included."""
    return {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}


def _may_hold_keys(value: Any) -> bool:
    """Whether an argument may be a cache, or say where in one to read."""
    if isinstance(value, list | tuple):
        return any(isinstance(part, torch.Tensor) for part in value)
    return callable(getattr(value, "update", None))
