"""CompiledRecorder: a Recorder whose hooks are part of the compiled graph, and write into memory set aside for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from mixlens.errors import BadInput, RecordingError
from mixlens.interventions.forward_tracker import ForwardTracker, by_name
from mixlens.interventions.masks import Seen, seen_by, seen_by_columns
from mixlens.interventions.places import Batch, Call
from mixlens.interventions.transforms import refuse_without_values
from mixlens.models.layout import cache_in, decoder_of, input_device, moe_layers, n_experts, top_k
from mixlens.recording.hooks import Raw, Tap, widened
from mixlens.recording.recorder import Recorder
from mixlens.trace.signals import Site

# What is written beside the routing of a token: its id, forward, row, column in the cache, position id, and what the
# mask says.
_PLACE = ("token_id", "forward", "row", "column", "position", *Seen._fields)
_NO_MASK = 2
_MARK = 4  # numbers of a key
_NOT_ROUTING = ("place", "mark", "count", "listening")


class CompiledRecorder(Recorder):
    """Record forwards under ``torch.compile(model.forward, fullgraph=True)``, with a static cache too.

    ::

        with ml.CompiledRecorder(model, tokens=4096) as rec:
            model.generate(ids, cache_implementation="static", max_new_tokens=512)
        trace = rec.trace()

    No Python runs between two kernels of a forward, and nothing waits for the device until a generate has ended or the
    trace is requested. The trace equals that of a Recorder, for eager forwards too. While `paused` is True nothing is
    recorded; the compiled graph stays the same, so pausing changes no token. Entering resets torch.compile for the
    process: code compiled earlier has no hooks and is compiled again at its next call.

    Parameters
    ----------
    model : torch.nn.Module
        Any Mixtral, whoever loaded it.
    tokens : int
        Room for so many: rows times columns of all forwards of one generate, or between two calls of `trace`.
    signals : Iterable[str or Site], optional
        "router_logits", or nothing beside expert ids and weights.
    lengths : Sequence[int], optional
        Tokens of each row, for right-padded batches that are passed without an attention mask.

    Raises
    ------
    BadInput
        As a Recorder does, for other signals, and when more tokens were read than there is room for.

    Examples
    --------
    >>> recorder = ml.CompiledRecorder(model, tokens=512)
    >>> type(recorder).__name__
    'CompiledRecorder'
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokens: int,
        signals: Iterable[str | Site] = ("router_logits",),
        lengths: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, signals=signals, lengths=lengths)
        if self.signals.needs_logits or self.signals.sites or tokens < 1:
            raise BadInput(
                f"Cannot make a CompiledRecorder for {tokens} tokens with "
                f"{', '.join(_named(self.signals.plan())) or 'no signals'}: it needs room for at least 1 token, and "
                'records expert ids, weights and router_logits only. Pass signals=("router_logits",) or (), or use '
                "a Recorder without compiling.",
                argument="tokens" if tokens < 1 else "signals",
                value=tokens if tokens < 1 else _named(self.signals.plan()),
            )
        self._tracker = ForwardTracker(
            self.model,
            "A CompiledRecorder",
            before=lambda call: None,
            lengths=lengths,
            ending=self._flush,
            withdrawn=self._withdraw,
        )
        self._room = tokens
        self._paused = False
        self._buffers: dict[str, torch.Tensor] = {}
        self._marks: dict[Batch, torch.Tensor] = {}  # the keys at the end of every cache seen

    @property
    def paused(self) -> bool:
        """Whether forwards pass unrecorded."""
        return self._paused

    @paused.setter
    def paused(self, value: bool) -> None:
        self._paused = bool(value)
        if self._buffers:
            self._buffers["listening"].fill_(not self._paused)

    def __enter__(self) -> CompiledRecorder:
        self._tracker.refuse_open()
        torch.compiler.reset()
        self._buffers = self._allocated()
        self.paused = self._paused
        with ExitStack() as stack:
            self._tap = Tap(self.model, self.signals, threads=False, into=self._of_a_forward())
            stack.callback(self._tap.close)
            decoder = decoder_of(self.model)
            stack.callback(decoder.register_forward_pre_hook(self._listen).remove)
            stack.callback(decoder.register_forward_hook(self._write, with_kwargs=True).remove)
            self._tracker.open(forwards=False)
            stack.callback(self._tracker.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            super().__exit__(*exception)
        finally:
            self._buffers, self._marks = {}, {}

    def clear(self) -> None:
        super().clear()
        self._marks = {}
        if self._buffers:
            self._buffers["count"].zero_()

    @torch.inference_mode(False)
    def _allocated(self) -> dict[str, torch.Tensor]:
        # One place more than asked for: what finds no room, or is paused, is written there, one over the other.
        rows, layers, device = self._room + 1, len(moe_layers(self.model)), input_device(self.model)
        self._slots = list(top_k(self.model).values())
        slots = max(self._slots)
        shapes = {
            "expert_id": ((rows, layers, slots), torch.uint8 if n_experts(self.model) <= 256 else torch.int16),
            "weight": ((rows, layers, slots), torch.float32),
            "place": ((rows, len(_PLACE)), torch.int64),
            "mark": ((rows, 2 * _MARK), torch.float32),  # keys at the end of the cache, before and after the forward
            "count": ((2,), torch.int64),  # tokens, forwards
            # On the device: a flag in Python would be compiled into a second graph, whose kernels may round otherwise.
            "listening": ((1,), torch.int64),
        }
        if self.signals.router_logits:
            shapes["router_logits"] = ((rows, layers, n_experts(self.model)), torch.float32)
        buffers = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
        for buffer in buffers.values():
            torch._dynamo.mark_static_address(buffer)  # else CUDA graphs are given up, as for any input that changes
        return buffers

    @torch.inference_mode(False)
    def _of_a_forward(self) -> Raw:
        """Where compiled layers write what their routers put out, one tensor each, on their own device."""
        made: Raw = {}
        for name in ("expert_id", "weight", *(["router_logits"] if self.signals.router_logits else [])):
            dtype = self._buffers[name].dtype
            made[name] = {
                layer.index: torch.zeros(
                    (self._room, n_experts(self.model) if name == "router_logits" else layer.top_k),
                    dtype=dtype,
                    device=layer.router_weight.device,
                )
                for layer in moe_layers(self.model)
            }
            for rows in made[name].values():
                torch._dynamo.mark_static_address(rows)
        return made

    # ------------------------------------------------------------------ inside the graph

    def _listen(self, module: nn.Module, _args: Any) -> None:
        assert self._tap is not None
        compiled = torch.compiler.is_compiling()
        if compiled:
            self._tap.now.listening = True
        elif not self._tracker.passes_over(module):
            self._tap.check_strays()
            self._tap.begin(decoding=False)
        self._tap.now.compiled = compiled

    def _write(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], _output: Any) -> None:
        """One write for all layers: a kernel or two for each would cost more than all that they copy."""
        assert self._tap is not None
        if self._tracker.passes_over(module):
            return
        self._tap.now.listening = False
        given = by_name(args, kwargs)
        ids, cache = given.get("input_ids"), cache_in(given)
        read = given["inputs_embeds"] if ids is None else ids
        rows, columns = read.shape[:2]
        past = 0 if cache is None else cache.get_seq_length() - columns
        if not torch.compiler.is_compiling():
            refuse_without_values("A CompiledRecorder", read)
            self._tracker.check(given, (rows, columns), int(past))
        count, places = self._buffers["count"], rows * columns
        compiled = self._tap.now.compiled
        raw = self._tap.taken_into(places) if compiled else self._tap.take()
        self._tap.check(raw, places)
        if (found := [raw["expert_id"][layer].shape[-1] for layer in self._layers]) != self._slots:
            raise self._another_top_k(max(found), max(self._slots))
        device = count.device
        number = torch.arange(places, device=device)
        listening = self._buffers["listening"]
        where = torch.where(listening > 0, number + count[0], self._room).clamp(max=self._room)
        for name, layers in raw.items():
            layers = layers if name == "router_logits" else widened(layers, max(self._slots), 0)
            stacked = torch.stack([layers[index].to(device) for index in sorted(layers)], 1)
            self._buffers[name].index_copy_(0, where, stacked.to(self._buffers[name].dtype))
        if cache is not None:
            # Keys of late layers depend on all that a row has read, so that they tell caches apart.
            keys = _last_keys(cache)[:, 0, :, :_MARK]
            ends = (torch.arange(2, device=keys.device) * columns + past - 1).clamp(min=0, max=keys.shape[1] - 1)
            marks = keys.index_select(1, ends).float().flatten(1).to(device)
            self._buffers["mark"].index_copy_(0, where, marks[number // columns])
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        token, position = (torch.tensor(-1) if part is None else part for part in (ids, positions))
        seen = Seen(*torch.tensor([_NO_MASK, 0, 0, 0]))
        if mask is not None:
            seen = (seen_by if mask.ndim == 4 else seen_by_columns)(mask, past, columns)
        row = torch.arange(rows, device=device)[:, None]
        placed = (token, count[1], row, past + torch.arange(columns, device=device), position, *seen)
        place = [part.to(device).long().expand(rows, columns).reshape(-1) for part in placed]
        self._buffers["place"].index_copy_(0, where, torch.stack(place, 1))
        self._buffers["count"].add_(torch.where(torch.arange(2, device=device) == 0, places, 1) * listening)

    # ------------------------------------------------------------------ after it

    def _flush(self, *, whole: bool = False) -> None:
        for call in self._calls():
            self._sort_out(call)

    def _calls(self) -> Iterator[Call]:
        """Every forward since the last time, as a ForwardTracker of its own would have seen it."""
        if not self._buffers:
            return
        n = int(self._buffers["count"][0])
        if n > self._room:
            self._buffers["count"].zero_()
            raise BadInput(
                f"This CompiledRecorder has room for {self._room} tokens, but {n} were read, padding included. Pass "
                f"tokens={n} or more, or take the trace in between.",
                argument="tokens",
                value=n,
            )
        read_now = {name: buffer[:n].to("cpu", copy=True) for name, buffer in self._buffers.items()}
        place = dict(zip(_PLACE, read_now["place"].unbind(1), strict=True))
        mark, routing = read_now["mark"], {name: read_now[name] for name in read_now if name not in _NOT_ROUTING}
        self._buffers["count"].zero_()
        _, sizes = place["forward"].unique_consecutive(return_counts=True)
        generation = self._tracker.running
        start = 0
        shapes = []
        for size in sizes.tolist():
            rows = int(place["row"][start : start + size][-1]) + 1
            shapes.append((rows, size // rows))
            start += size
        # Every sampled column is read but the last: what was read before them is the prompt.
        sampled = 0 if generation is None else len(generation.ended) - 1
        prompt = sum(columns for _, columns in shapes) - max(sampled, 0)
        start = read = 0
        for shape in shapes:
            part = slice(start, start + shape[0] * shape[1])
            start = part.stop
            step = read - prompt if generation is not None and read >= prompt else None
            read += shape[1]
            past, marks = int(place["column"][part][0]), mark[part].reshape(*shape, 2, _MARK)[:, 0]
            told = {name: place[name][part].reshape(shape) for name in ("token_id", "position", *Seen._fields)}
            ids, position = (None if told[name][0, 0] < 0 else told[name] for name in ("token_id", "position"))
            mask = None if told["own"][0, 0] == _NO_MASK else told["own"]
            call = self._tracker.follow(ids, mask, shape, past, step=step, batch=self._continued(past, marks[:, 0]))
            call.positions = position
            if mask is not None:
                call.mask, call.masked_by_caller = None, generation is None
                call.seen = Seen(*(told[name] for name in Seen._fields))
            self._marks[call.batch] = marks[:, 1]
            call.raw = self._by_layer(routing, part)
            if self._tap is not None:
                self._tap.look(call.raw)
            yield call

    def _by_layer(self, routing: dict[str, torch.Tensor], part: slice) -> Raw:
        raw: Raw = {}
        for name, values in routing.items():
            values = values[part].long() if name == "expert_id" else values[part]
            layers = zip(self._layers, values.unbind(1), self._slots, strict=True)
            raw[name] = {index: value if name == "router_logits" else value[:, :k] for index, value, k in layers}
        return raw

    def _continued(self, past: int, marks: torch.Tensor) -> Batch | None:
        """The rows whose cache a forward found: as long, and with the same keys at its end.

        Raises RecordingError where caches were seen, and this is none of them.
        """
        if not past:
            return None
        alike = [batch for batch in self._marks if batch.rows == len(marks)]
        for batch in alike:
            if batch.columns == past and torch.equal(self._marks[batch], marks):
                return batch
        if alike:
            raise RecordingError(
                f"A CompiledRecorder cannot follow a cache of {past} tokens that no forward before left so: tokens "
                "were taken back, added or reordered outside. Start a new cache, or record the two parts separately.",
                argument="past_key_values",
                value=past,
            )
        return None


def _last_keys(cache: Any) -> torch.Tensor:
    """[row, head, token, width] of the last layer that keeps all tokens; of the last with a window where none does."""
    with_keys = [
        layer for layer in getattr(cache, "layers", ()) if isinstance(getattr(layer, "keys", None), torch.Tensor)
    ]
    attending = [layer for layer in with_keys if layer.keys.numel()]
    whole = [layer for layer in attending if getattr(layer, "sliding_window", None) is None]
    if not attending:
        raise RecordingError(
            f"A CompiledRecorder cannot follow a cache of type {type(cache).__name__}, whose keys it does not find. "
            "Use a Recorder, or a dynamic or static cache.",
            argument="past_key_values",
            value=type(cache).__name__,
        )
    return (whole or attending)[-1].keys


def _named(plan: dict[str, Any]) -> list[str]:
    return [*plan["options"], *(site["name"] for site in plan["sites"])]
