"""Every way to record: each gives the traces, and the rows that were read, told from the model's output alone."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from tiny import tiny_mixtral
from transformers import StoppingCriteria

import mixlens as ml
from helpers.bare import EXPERTS, STREAM
from helpers.told import Told, told

OPTIONS = ("router_logits", "logprob", "top_logprobs")
# Layer 1 is left out, so that the number of a layer is not its place.
PLANS: dict[str, tuple] = {
    "all": (*OPTIONS, *(ml.Site(name, (0, 2), "float32") for name in (*STREAM, *EXPERTS))),
    "options": OPTIONS,
    **{
        tokens: (ml.Site("attn_out", None, "float32", tokens), ml.Site("expert_norm", (1, 2), "float32", tokens))
        for tokens in ("prompt", "generated", "last")
    },
}
STEPS = 7


@functools.cache
def net() -> Any:
    """A model whose every dimension is another number, and with dropout and jitter, which must be off."""
    return tiny_mixtral(
        num_hidden_layers=3,
        num_local_experts=5,
        hidden_size=16,
        intermediate_size=24,
        vocab_size=100,
        num_attention_heads=2,
        attention_dropout=0.5,
        router_jitter_noise=0.5,
    )


@dataclass(frozen=True, eq=False)
class Way:
    """traces by plan; rows without padding, of which the first prompts[i] tokens are prompt; the caller's table."""

    traces: dict[str, ml.Trace]
    rows: list[list[int]]
    prompts: list[int]
    table: pd.DataFrame
    scores_prompts: bool = True  # generate runs the head on the last token of a prompt alone


def texts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 100, n).tolist() for n in lengths]


def padded(rows: list[list[int]], side: str, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [row, column]."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, part], mask[i, part] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


def table_of(n: int) -> pd.DataFrame:
    """Columns of a caller whose index is no row number."""
    documents = [f"d{i // 2}" for i in range(n)]
    return pd.DataFrame(
        {"domain": ["xyz"[i % 3] for i in range(n)], "document_id": documents}, index=range(n + 5, 5, -1)
    )


class Recorders:
    """A Recorder for every plan, one inside the other, and edits inside them all."""

    def __init__(self, edits: Sequence[Any] = (), plans: Mapping[str, tuple] = PLANS, **options: Any) -> None:
        self.edits, self.plans, self.options = edits, plans, options

    def __enter__(self) -> Recorders:
        self._stack = ExitStack()
        self._stack.enter_context(torch.no_grad())
        self.of = {
            plan: self._stack.enter_context(ml.Recorder(net(), signals=signals, **self.options))
            for plan, signals in self.plans.items()
        }
        if self.edits:
            self._stack.enter_context(ml.edit(net(), *self.edits))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def way(
        self, rows: list[list[int]], prompts: list[int], silent: tuple[int, ...] = (), scores_prompts: bool = True
    ) -> Way:
        """`silent` are rows of the batches, among all, that had no token."""
        table = table_of(len(rows) + len(silent))
        heard = table.drop(table.index[list(silent)])
        return Way(
            {plan: rec.trace(table.set_index(table.index + 7)) for plan, rec in self.of.items()},  # of no meaning to us
            rows,
            prompts,
            heard,
            scores_prompts,
        )


def one_batch(side: str, **options: Any) -> Way:
    rows = texts((5, 11, 1, 8))
    rows[1][4] = 0  # the pad token as a word of the text
    ids, mask = padded(rows, side)
    with Recorders(**options) as recorders:
        net()(ids, attention_mask=mask)
    return recorders.way(rows, [len(row) for row in rows])


def lengths_for_a_mask() -> Way:
    rows = texts((5, 0, 8, 1))
    ids, _ = padded(rows, "right")
    with Recorders(lengths=[5, 0, 8, 1]) as recorders:
        net()(ids)
    heard = [row for row in rows if row]
    return recorders.way(heard, [len(row) for row in heard], silent=(1,))


def several_batches(
    batches: Sequence[tuple[int, ...]] = ((4, 9, 2), (7,), (3, 6)), seed: int = 1, **options: Any
) -> Way:
    rows = []
    with Recorders(**options) as recorders:
        for number, lengths in enumerate(batches):
            rows.append(texts(lengths, seed + number))
            ids, mask = padded(rows[-1], "left" if number else "right")
            net()(ids, attention_mask=mask)
    rows = [row for batch in rows for row in batch]
    return recorders.way(rows, [len(row) for row in rows])


def chunks_with_a_cache(**options: Any) -> Way:
    rows = texts((12, 12), 4)
    ids, cache = torch.tensor(rows), None
    with Recorders(**options) as recorders:
        for start, stop in ((0, 5), (5, 10), (10, 12)):
            mask = torch.ones(2, stop, dtype=torch.long)
            cache = net()(
                ids[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=True
            ).past_key_values
    return recorders.way(rows, [12, 12])


def decoding_by_hand(**options: Any) -> Way:
    """A right-padded prompt, then token by token."""
    prompts, following = texts((5, 2, 7), 5), texts((3, 3, 3), 6)
    ids, mask = padded(prompts, "right")
    with Recorders(**options) as recorders:
        cache = net()(ids, attention_mask=mask, use_cache=True).past_key_values
        for step in range(3):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            places = torch.tensor([[len(row) + step] for row in prompts])
            token = torch.tensor([[row[step]] for row in following])
            net()(token, attention_mask=mask, position_ids=places, past_key_values=cache)
    rows = [one + other for one, other in zip(prompts, following, strict=True)]
    return recorders.way(rows, [len(row) for row in prompts])


def generated(
    prompts: list[list[int]],
    *,
    pad: int,
    stop: int | None,
    masked: bool = True,
    recording: Mapping[str, Any] = MappingProxyType({}),
    **options: Any,
) -> Way:
    """Left-padded prompts through generate; a row ends before `stop`, and its last token no forward has read."""
    ids, mask = padded(prompts, "left", pad)
    given = {"attention_mask": mask} if masked else {}
    with Recorders(**recording) as recorders:
        output = net().generate(
            ids, **given, max_new_tokens=STEPS, do_sample=False, eos_token_id=stop, pad_token_id=pad, **options
        )
    rows = read_rows(prompts, output[:, ids.shape[1] :], stop)
    return recorders.way(rows, [len(row) for row in prompts], scores_prompts=False)


def read_rows(prompts: list[list[int]], output: torch.Tensor, stop: int | None) -> list[list[int]]:
    rows = []
    for prompt, new in zip(prompts, output.tolist(), strict=True):
        rows.append(prompt + (new[: new.index(stop)] if stop in new else new[:-1]))
    return rows


def said_by(prompt: list[int], place: int) -> int:
    """The token that the model says in this place after a prompt."""
    output = net().generate(torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False, eos_token_id=None)
    return int(output[0, len(prompt) + place])


def generated_padded(**options: Any) -> Way:
    """The pad token is the end token, and a word of one prompt; a row ends early, others go on."""
    prompts = texts((6, 3, 9), 7)
    stop = said_by(prompts[0], 3)
    prompts[1][1] = stop
    way = generated(prompts, pad=stop, stop=stop, **options)
    lengths = [len(row) - prompt for row, prompt in zip(way.rows, way.prompts, strict=True)]
    assert min(lengths) < STEPS - 1 == max(lengths)
    return way


def generated_without_a_mask() -> Way:
    """generate tells padding from the pad token."""
    prompts = texts((6, 3, 9), 8)
    return generated(prompts, pad=0, stop=said_by(prompts[2], 4), masked=False)


class Says(StoppingCriteria):
    """Ends a row that says a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


def generated_until_a_criterion() -> Way:
    """A row that another criterion ends is fed the pad token from then on; the token it ended with was read."""
    prompts = texts((6, 3, 9), 10)
    last = said_by(prompts[1], 2)
    ids, mask = padded(prompts, "left")
    with Recorders() as recorders:
        output = net().generate(
            ids,
            attention_mask=mask,
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=1,  # without one, generate feeds no pad; no row says it
            pad_token_id=0,
            stopping_criteria=[Says(last)],
        )
    rows = read_rows(prompts, output[:, ids.shape[1] :], stop=0)
    assert rows[1][-1] == last
    return recorders.way(rows, [len(row) for row in prompts], scores_prompts=False)


def generated_twice() -> Way:
    prompts = texts((4, 6), 11)
    rows = []
    with Recorders() as recorders:
        for part in (prompts[:1], prompts):
            ids, mask = padded(part, "left")
            output = net().generate(
                ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            rows += read_rows(part, output[:, ids.shape[1] :], None)
    return recorders.way(rows, [len(row) for row in (prompts[0], *prompts)], scores_prompts=False)


def compiled() -> Way:
    """A CompiledRecorder round forwards and a generate with a static cache; it keeps routing alone."""
    batch, prompts = texts((5, 2), 12), texts((6, 3), 13)
    ids, mask = padded(batch, "left")
    with torch.no_grad(), ml.CompiledRecorder(net(), tokens=40) as recorder:
        net()(ids, attention_mask=mask)
        ids, mask = padded(prompts, "left")
        stop = int(net().generation_config.eos_token_id)
        output = net().generate(
            ids,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=stop,
            cache_implementation="static",
        )
    rows = [*batch, *read_rows(prompts, output[:, ids.shape[1] :], stop)]
    table = table_of(len(rows))
    trace = recorder.trace(table)
    return Way({"all": trace, "options": trace}, rows, [5, 2, 6, 3], table)


class Numbers:
    """A tokenizer of texts that are token ids already."""

    name_or_path = "numbers"

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


DOCUMENTS = texts((9, 3, 14, 1, 6, 26, 4), 14)


def documents() -> list[dict[str, Any]]:
    return [{"text": " ".join(map(str, row)), "domain": "xyz"[i % 3], "id": f"d{i}"} for i, row in enumerate(DOCUMENTS)]


def read(documents: Any, signals: tuple, **options: Any) -> ml.Trace:
    """Small batches and shards: padding on the right, one document in chunks, three shards, the model in training."""
    settings = ml.RecordSettings(batch_tokens=16, shard_tokens=15, max_length=30, progress=False)
    net().train()
    try:
        return ml.record(net(), documents, tokenizer=Numbers(), signals=signals, settings=settings, **options)
    finally:
        assert net().training
        net().eval()


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="mixlens-ways-")  # gone when the tests have ended


def recorded(on_disk: bool = False, stopped: bool = False) -> Way:
    traces = {}
    for plan, signals in PLANS.items():
        out = {"out": tempfile.mkdtemp(dir=_folder().name)} if on_disk else {}
        if stopped:
            with suppress(KeyboardInterrupt):
                read(Stopping(documents()), signals, **out)
            assert (Path(out["out"]) / "unfinished" / "shard-00001.json").exists()
            assert not (Path(out["out"]) / "meta.json").exists()
        traces[plan] = read(documents(), signals, **out)
    frame = pd.DataFrame(documents()).rename(columns={"id": "document_id"})[["document_id", "domain"]]
    return Way(traces, DOCUMENTS, [len(row) for row in DOCUMENTS], frame)


class Stopping(list):
    """Documents whose reader is interrupted on their second round, in the third shard."""

    rounds = 0

    def __iter__(self):
        self.rounds += 1
        for number, document in enumerate(list.__iter__(self)):
            if self.rounds == 2 and number == 6:
                raise KeyboardInterrupt
            yield document


WAYS = {
    "right padding": lambda: one_batch("right"),
    "left padding": lambda: one_batch("left"),
    "lengths": lengths_for_a_mask,
    "several batches": several_batches,
    "chunks": chunks_with_a_cache,
    "decoding by hand": decoding_by_hand,
    "generate": generated_padded,
    "static cache": lambda: generated_padded(cache_implementation="static"),
    "generate without mask": generated_without_a_mask,
    "criterion": generated_until_a_criterion,
    "generate twice": generated_twice,
    "compiled": compiled,
    "record": recorded,
    "record to disk": lambda: recorded(on_disk=True),
    "resumed": lambda: recorded(on_disk=True, stopped=True),
}


@functools.cache
def way_of(name: str) -> Way:
    return WAYS[name]()


@functools.cache
def truth_of(name: str, plan: str = "all") -> Told:
    """What the traces of a way must tell, from its rows run alone."""
    way, sites = way_of(name), [signal for signal in PLANS[plan] if isinstance(signal, ml.Site)]
    return told(net(), way.rows, way.prompts, sites=sites, table=way.table, scores_prompts=way.scores_prompts)
