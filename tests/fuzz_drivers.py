"""Ways of driving a small random Mixtral, drawn from a seed, recorded, and compared with each row run alone.

``python tests/fuzz_drivers.py --n 2000 --seed 0`` prints the ways that were recorded otherwise, by seed, and how many
were refused and why. The oracle knows nothing of the Recorder: plain forwards with bare hooks on the gates.
"""

from __future__ import annotations

import argparse
import collections
import copy
import functools
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tiny import CACHE, tiny_mixtral
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    QuantizedCache,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextGenerationPipeline,
)
from transformers.generation.streamers import BaseStreamer

import mixlens as ml
from mixlens.errors import BadInput

PAD, MARGIN = 0, 1e-4


@dataclass
class Row:
    """A row as it ought to be recorded.

    tokens     every token that the model read of it, those before the recording too
    start      how many of these came before the recording
    prompt     how many of all are prompt
    expert_id  [token, layer, slot], where the row alone would run otherwise
    """

    tokens: list[int]
    prompt: int
    start: int = 0
    expert_id: np.ndarray | None = None


@dataclass
class Drawn:
    """One way of driving: `run` is called inside a Recorder and gives the rows to expect, in order."""

    seed: int
    name: str
    rng: np.random.Generator
    model: Any
    compare: dict[str, Any] = field(default_factory=dict)

    def whole(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def one(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def coin(self) -> bool:
        return bool(self.rng.integers(2))

    def rows(self, n: int | None = None, low: int = 1, high: int = 14) -> list[list[int]]:
        return [self.rng.integers(3, 100, self.whole(low, high)).tolist() for _ in range(n or self.whole(1, 4))]


@functools.cache
def models() -> list[Any]:
    made = []
    for number, (experts, k, attention) in enumerate(
        [(6, 2, "sdpa"), (5, 1, "sdpa"), (7, 3, "eager"), (8, 2, "eager")]
    ):
        torch.manual_seed(number)
        model = tiny_mixtral(
            num_hidden_layers=2,
            num_local_experts=experts,
            num_experts_per_tok=k,
            hidden_size=16,
            intermediate_size=24,
            vocab_size=100,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        model.set_attn_implementation(attention)
        made.append(model)
    return made


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, part], mask[i, part] = torch.tensor(row), 1
    return ids, mask


# ---------------------------------------------------------------------- ways


def forward(d: Drawn) -> list[Row]:
    """One forward of a padded batch; without its mask it may be refused."""
    rows = d.rows()
    ids, mask = padded(rows, d.one("left", "right"))
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if d.whole(0, 9) == 0:
        del given["attention_mask"]
        if len(rows) == 1:
            return _run(d, given, rows)
        d.compare["must_refuse"] = True
    if d.coin():
        given["inputs_embeds"] = d.model.get_input_embeddings()(given.pop("input_ids")).detach()
        d.compare["ids_unknown"] = True
    if d.coin():
        given["use_cache"] = d.coin()
    if d.coin() and "inputs_embeds" not in given:
        given["labels"] = ids
    if d.coin() and "attention_mask" in given:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    if d.coin() and "labels" not in given:
        given["logits_to_keep"] = d.one(1, 2, torch.tensor([0, ids.shape[1] - 1]))
    return _run(d, given, rows)


def _run(d: Drawn, given: dict[str, Any], rows: list[list[int]]) -> list[Row]:
    call = d.one(d.model, d.model.forward)
    call(**given)
    return [Row(row, len(row)) for row in rows]


def training(d: Drawn) -> list[Row]:
    rows = d.rows()
    ids, mask = padded(rows, "right")
    d.model.train()
    try:
        with torch.enable_grad():
            d.model(ids, attention_mask=mask, labels=ids, use_cache=d.coin()).loss.backward()
    finally:
        d.model.eval()
        d.model.zero_grad()
    return [Row(row, len(row)) for row in rows]


def packed(d: Drawn) -> list[Row]:
    """Documents in one row, kept apart by position ids or by a mask of blocks."""
    rows = d.rows(d.whole(2, 4))
    lengths = [len(row) for row in rows]
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    how = d.whole(0, 3)
    if how == 0:
        d.model(ids, position_ids=positions)  # attention reaches over the seams
        d.compare["must_refuse"] = True
    elif how == 1:
        d.compare["must_refuse"] = min(lengths) == 1  # or padding that attends to itself
        block = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()[None, None]
        if d.coin() or d.model.config._attn_implementation == "eager":
            floats = torch.zeros(block.shape).masked_fill(~block, torch.finfo(torch.float32).min)
            d.model(ids, attention_mask=floats, position_ids=d.one(positions, None))
        else:
            d.model(ids, attention_mask=block, position_ids=d.one(positions, None))
    else:
        d.model(ids, position_ids=positions, use_cache=False)
    return [Row(row, len(row)) for row in rows]


def _cache(d: Drawn) -> Any:
    return StaticCache(d.model.config, max_cache_len=64) if d.coin() else DynamicCache(config=d.model.config)


class Decode:
    """Somebody's own loop, one call of `step` at a time."""

    def __init__(self, d: Drawn, rows: list[list[int]], cache: Any, side: str = "left") -> None:
        self.d, self.rows, self.cache = d, [list(row) for row in rows], cache
        self.prompts = [len(row) for row in rows]
        self.ids, self.mask = padded(rows, side)
        self.bare = len(rows) == 1 and d.coin()  # without a mask
        self.placed = d.coin()  # with position ids
        self.read = 0

    def _given(self, ids: torch.Tensor, upto: int) -> dict[str, Any]:
        given = {"input_ids": ids} | ({} if self.bare else {"attention_mask": self.mask[:, :upto]})
        if self.placed:
            given["position_ids"] = (self.mask[:, :upto].cumsum(1) - 1).clamp(min=0)[:, upto - ids.shape[1] :]
        return given

    def prefill(self, chunks: int = 1) -> None:
        for part in torch.tensor_split(self.ids, chunks, dim=1):
            if part.shape[1]:
                self.read += part.shape[1]
                self.d.model(**self._given(part, self.read), past_key_values=self.cache)

    def step(self) -> None:
        token = torch.from_numpy(self.d.rng.integers(3, 100, (len(self.rows), 1)))
        self.mask = torch.cat([self.mask, torch.ones(len(self.rows), 1, dtype=torch.long)], 1)
        self.read += 1
        self.d.model(**self._given(token, self.read), past_key_values=self.cache)
        for row, value in zip(self.rows, token[:, 0].tolist(), strict=True):
            row.append(value)

    def expected(self, start: list[int] | None = None) -> list[Row]:
        starts = start or [0] * len(self.rows)
        return [Row(row, n, s) for row, n, s in zip(self.rows, self.prompts, starts, strict=True)]


def own_loop(d: Drawn) -> list[Row]:
    decode = Decode(d, d.rows(), _cache(d))
    decode.prefill()
    for _ in range(d.whole(0, 5)):
        decode.step()
    return decode.expected()


def quantized_cache(d: Drawn) -> list[Row]:
    """Keys and values come back rounded, so bare hooks beside the recording say which experts were chosen."""
    cache = QuantizedCache(
        "hqq", d.model.config, nbits=8, axis_key=1, axis_value=1, q_group_size=8, residual_length=d.whole(2, 8)
    )
    decode = Decode(d, d.rows(low=3), cache)
    seen: list[list[torch.Tensor]] = [[] for _ in d.model.model.layers]
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _gate, _args, output, at=at: at.append(output[2]))
        for layer, at in zip(d.model.model.layers, seen, strict=True)
    ]
    decode.prefill()
    for _ in range(d.whole(0, 12)):
        decode.step()
    for handle in handles:
        handle.remove()
    rows = len(decode.rows)
    ids = torch.stack([torch.cat([part.reshape(rows, -1, part.shape[-1]) for part in at], 1) for at in seen], 2)
    expected = decode.expected()
    for number, row in enumerate(expected):
        row.expert_id = ids[number][decode.mask[number].bool()].numpy()
    return expected


def adapted(d: Drawn) -> list[Row]:
    """Adapters on attention, recorded through the model or through PEFT's wrapper, alone or in a loop."""
    return d.one(own_loop, forward)(d)


def chunks(d: Drawn) -> list[Row]:
    decode = Decode(d, d.rows(low=6), _cache(d))
    # A chunk of one token outside generate cannot be told from a decode.
    decode.prefill(d.whole(1, min(3, decode.ids.shape[1] // 2)))
    return decode.expected()


def interleaved(d: Drawn) -> list[Row]:
    n = d.whole(1, 3)
    decodes = [Decode(d, d.rows(n), _cache(d)) for _ in range(d.whole(2, 3))]
    for decode in decodes:
        decode.prefill()
    for _ in range(d.whole(2, 8)):
        d.one(*decodes).step()
    return [row for decode in decodes for row in decode.expected()]


def threads(d: Drawn) -> list[Row]:
    decodes = [Decode(d, d.rows(2), DynamicCache(config=d.model.config)) for _ in range(2)]
    for decode in decodes:
        decode.prefill()
    failed: list[BaseException] = []

    def work(decode: Decode) -> None:
        try:
            with torch.no_grad():
                for _ in range(4):
                    decode.step()
        except BaseException as error:
            failed.append(error)

    decodes[1].d = copy.copy(d)
    decodes[1].d.rng = np.random.default_rng(d.seed + 1)
    running = [threading.Thread(target=work, args=(decode,)) for decode in decodes]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failed:
        raise failed[0]
    return [row for decode in decodes for row in decode.expected()]


def filled_before(d: Drawn) -> list[Row]:
    """A cache that was filled, copied or cut before or inside the recording."""
    decode = d.compare["before"]
    starts = [len(row) for row in decode.rows]
    if d.coin():
        decode.cache = copy.deepcopy(decode.cache)
    for _ in range(d.whole(1, 4)):
        decode.step()
    return decode.expected(starts)


def from_a_prefix(d: Drawn) -> list[Row]:
    """Rows that go on from one prefix, whose cache is repeated, copied or cut to some of its rows."""
    cache = DynamicCache(config=d.model.config)
    prefix = Decode(d, d.rows(d.whole(1, 3)), cache)
    prefix.placed |= len(prefix.rows) > 1
    prefix.prefill()
    picked = sorted(d.rng.integers(0, len(prefix.rows), d.whole(1, 4)).tolist())
    decode = copy.copy(prefix)
    decode.cache, decode.bare = copy.deepcopy(cache) if d.coin() else cache, False
    if decode.cache is cache and len(picked) == len(prefix.rows) and picked != list(range(len(picked))):
        d.compare["must_refuse"] = True  # as many rows as before, and others
    decode.cache.batch_select_indices(torch.tensor(picked))
    decode.rows = [list(prefix.rows[row]) for row in picked]
    decode.prompts, decode.mask = [prefix.prompts[row] for row in picked], prefix.mask[picked]
    goes_on = decode.cache is cache and picked == list(range(len(prefix.rows)))
    if goes_on:
        decode.cache = cache = copy.deepcopy(cache)  # its keys were replaced by themselves
    starts = [len(row) for row in decode.rows]
    for _ in range(d.whole(1, 3)):
        decode.step()
    return [*prefix.expected(), *decode.expected(starts)]


def masked_whole(d: Drawn) -> list[Row]:
    """A mask of four dimensions under which padding is left out, or something else than the past is seen."""
    rows = d.rows(low=3)
    ids, mask = padded(rows, d.one("left", "right"))
    width = ids.shape[1]
    allowed = torch.ones(width, width).tril().bool()[None, None] & mask[:, None, None].bool()
    if d.whole(0, 9) == 0:
        d.compare["must_refuse"] = True
        row = d.whole(0, len(rows) - 1)
        *_, before, last = mask[row].nonzero()[:, 0].tolist()
        allowed[row, 0, last, before] = False
        if d.coin():  # as many as before: one that is ahead, or padding
            allowed[row, 0, before, last] = True
    floats = torch.zeros(allowed.shape).masked_fill(~allowed, d.one(-1e4, -1e9, torch.finfo(torch.float32).min))
    d.model(ids, attention_mask=floats, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=d.coin())
    return [Row(row, len(row)) for row in rows]


def cropped(d: Drawn) -> list[Row]:
    """Tokens are taken back: nobody can say what the sequence is."""
    decode = Decode(d, d.rows(1, low=5), DynamicCache(config=d.model.config))
    decode.bare = True
    decode.prefill()
    decode.cache.crop(-d.whole(1, 3))
    d.compare["must_refuse"] = True
    decode.step()
    return []


class _Says(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids[:, -1] == self.token


class _Stream(BaseStreamer):
    def put(self, value: Any) -> None: ...

    def end(self) -> None: ...


def generate(d: Drawn) -> list[Row]:
    """generate with anything in its config."""
    rows = d.rows(high=9)
    ids, mask = padded(rows, "left")
    stop = d.one([], d.rng.integers(3, 100, 30).tolist())
    config: dict[str, Any] = {
        "max_new_tokens": d.whole(1, 8),
        "do_sample": d.coin(),
        "eos_token_id": stop or None,
        "pad_token_id": PAD,
    }
    if d.coin():
        config |= d.one(
            {"temperature": 2.0, "do_sample": True},
            {"top_k": 5, "do_sample": True},
            {"top_p": 0.7, "do_sample": True},
            {"min_p": 0.05, "do_sample": True},
            {"typical_p": 0.8, "do_sample": True},
            {"repetition_penalty": 1.3},
            {"no_repeat_ngram_size": 2},
            {"min_new_tokens": 2},
            {"renormalize_logits": True},
            {"bad_words_ids": [[5], [6]]},
            {"suppress_tokens": [7, 8]},
            {"forced_eos_token_id": 9},
            {"sequence_bias": {(11,): 2.0}},
            {"max_time": 60.0},
            {"output_scores": True, "return_dict_in_generate": True},
            {"output_logits": True, "output_hidden_states": True, "return_dict_in_generate": True},
            {"cache_implementation": "static"},
            {"prefill_chunk_size": d.whole(1, 4), "cache_implementation": "static"},
            {"num_return_sequences": d.whole(2, 3), "do_sample": True},
        )
    many = config.get("num_return_sequences", 1)
    options: dict[str, Any] = {}
    if d.whole(0, 4):
        options["attention_mask"] = mask
    elif config["eos_token_id"] is None and len(rows) > 1 and d.coin():
        config["eos_token_id"] = stop = [PAD]  # pad is end: nothing tells the padding
        d.compare["must_refuse"] = True
    if d.coin():
        options["stopping_criteria"] = StoppingCriteriaList([_Says(d.whole(3, 99))])
    if len(rows) == 1 and many == 1 and d.coin():
        options["streamer"] = _Stream()
    how = d.whole(0, 3)
    previous = d.model.generation_config
    try:
        if how == 0:
            output = d.model.generate(ids, **config, **options)
        elif how == 1:
            output = d.model.generate(inputs=ids, generation_config=GenerationConfig(**config), **options)
        elif how == 2:
            output = d.model.generate(ids, GenerationConfig(**config), **options)
        else:
            d.model.generation_config = GenerationConfig(**config)
            output = d.model.generate(input_ids=ids, **options)
    finally:
        d.model.generation_config = previous
    output = output if isinstance(output, torch.Tensor) else output.sequences
    if not stop and how in (1, 2):  # a config that names no end takes the model's
        stop = [d.model.generation_config.eos_token_id]
    expected = []
    says = options["stopping_criteria"][0].token if "stopping_criteria" in options else None
    for number, answer in enumerate(output[:, ids.shape[1] :].tolist()):
        prompt = rows[number // many]
        read = answer[:-1]  # no forward saw the last
        for at, token in enumerate(read):
            if token in stop:
                read = read[:at]
                break
            if stop and token == says:  # from then on it is fed the pad token
                read = read[: at + 1]
                break
        expected.append(Row(prompt + read, len(prompt)))
    return expected


def generate_from_embeddings(d: Drawn) -> list[Row]:
    rows = d.rows(1)
    embeds = d.model.get_input_embeddings()(torch.tensor(rows)).detach()
    output = d.model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False, eos_token_id=None)
    d.compare["ids_unknown"] = True
    return [Row(rows[0] + output[0, :-1].tolist(), len(rows[0]))]


def generate_with_cache(d: Drawn) -> list[Row]:
    """A second turn, in the cache of the first, which the recording may have seen or not."""
    decode = d.compare.get("before")
    if decode is None:
        decode = Decode(d, d.rows(), DynamicCache(config=d.model.config))
        decode.placed |= len(decode.rows) > 1  # as generate places tokens
        decode.prefill()
        starts = [0] * len(decode.rows)
    else:
        starts = [len(row) for row in decode.rows]
    more = torch.from_numpy(d.rng.integers(3, 100, (len(decode.rows), 2)))
    ids = torch.cat([decode.ids, more], 1)
    mask = torch.cat([decode.mask, torch.ones_like(more)], 1)
    n = d.whole(1, 4)
    given = {"attention_mask": mask, CACHE: decode.cache}
    output = d.model.generate(ids, **given, max_new_tokens=n, do_sample=False, eos_token_id=None)
    return [
        Row([*row, *new.tolist(), *answer.tolist()[:-1]], len(row) + 2, start)
        for row, new, answer, start in zip(decode.rows, more, output[:, ids.shape[1] :], starts, strict=True)
    ]


def taken_back(d: Drawn) -> list[Row]:
    """Generation that reads tokens more than once, or takes them back."""
    ids = torch.tensor(d.rows(1, low=3))
    d.compare["must_refuse"] = True
    d.model.generate(
        ids,
        max_new_tokens=5,
        eos_token_id=None,
        **d.one(
            {"num_beams": 2},
            {"num_beams": 2, "do_sample": True},
            {"use_cache": False},
            {"prompt_lookup_num_tokens": 2},
            {"guidance_scale": 1.5},
            {"assistant_model": models()[0]},
        ),
    )
    return []


@functools.cache
def words() -> PreTrainedTokenizerFast:
    """A tokenizer that reads "w17" as 17."""
    numbers = Tokenizer(WordLevel({f"w{token}": token for token in range(100)}, "w3"))
    numbers.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=numbers, pad_token=f"w{PAD}", padding_side="left")


def pipeline(d: Drawn) -> list[Row]:
    """transformers' pipeline, with prompts one by one or in batches."""
    rows = d.rows(high=9)
    pipe = TextGenerationPipeline(model=d.model, tokenizer=words())
    stop = d.rng.integers(3, 100, 30).tolist()
    found = pipe(
        [" ".join(f"w{token}" for token in row) for row in rows],
        batch_size=d.whole(1, 3),
        return_tensors=True,
        generation_config=GenerationConfig(
            max_new_tokens=d.whole(1, 6), do_sample=d.coin(), eos_token_id=stop, pad_token_id=PAD
        ),
    )
    expected = []
    for row, (answer,) in zip(rows, found, strict=True):
        whole = answer["generated_token_ids"]
        at = next(i for i in range(len(whole)) if whole[i : i + len(row)] == row) + len(row)
        read = whole[at:-1]  # no forward saw the last
        end = next((i for i, token in enumerate(read) if token in stop), len(read))
        expected.append(Row(row + read[:end], len(row)))
    return expected


def continuous(d: Drawn) -> list[Row]:
    """Continuous batching: rows of many requests in one, in a cache of pages."""
    d.compare["must_refuse"] = True
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=2, pad_token_id=PAD)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # the default takes most of the memory
    try:
        d.model.generate_batch(d.rows(2), generation_config=config, continuous_batching_config=small, warmup=False)
    finally:
        d.model.set_attn_implementation(d.model.config._attn_implementation.removeprefix("paged|"))
    return []


def transformed(d: Drawn) -> list[Row]:
    """torch.func: a call with parameters passed in is a forward; a transformed one holds no values."""
    rows = d.rows(1)
    ids = torch.tensor(rows)
    parameters = dict(d.model.named_parameters())
    if d.coin():
        torch.func.functional_call(d.model, parameters, (ids,))
        return [Row(rows[0], len(rows[0]))]
    d.compare["must_refuse"] = True
    if d.coin():
        torch.vmap(lambda row: d.model(row[None]).logits)(ids)
    else:
        torch.func.grad(lambda scale: (scale * d.model(ids).logits).sum())(torch.ones(()))
    return []


def compiled(d: Drawn) -> list[Row]:
    """Compiled and run before the recording, whole or by layer."""
    rows = d.rows()
    ids, mask = padded(rows, "left")
    d.compare["compiled"](input_ids=ids, attention_mask=mask)
    return [Row(row, len(row)) for row in rows]


def edited(d: Drawn) -> list[Row]:
    """An expert is forbidden at some positions, rows or phases."""
    decode = Decode(d, d.rows(), _cache(d))
    layer, expert = d.whole(0, 1), d.whole(0, 3)
    where = d.one({"positions": [0, 2, 3]}, {"phase": "prompt"}, {"phase": "generated"}, {"rows": [0]}, {})
    d.compare["forbid"] = (layer, expert, where)
    with ml.edit(d.model, ml.edits.forbid(layer, expert, where=ml.edits.Where(**where))):
        decode.prefill()
        for _ in range(d.whole(0, 3)):
            decode.step()
    return decode.expected()


WAYS: dict[Callable[[Drawn], list[Row]], int] = {
    forward: 6,
    training: 2,
    packed: 3,
    own_loop: 5,
    quantized_cache: 2,
    adapted: 2,
    chunks: 3,
    interleaved: 4,
    threads: 1,
    filled_before: 3,
    from_a_prefix: 2,
    masked_whole: 2,
    cropped: 1,
    generate: 14,
    generate_from_embeddings: 1,
    generate_with_cache: 3,
    taken_back: 1,
    pipeline: 2,
    continuous: 1,
    transformed: 1,
    compiled: 1,
    edited: 4,
}


# To compiled code threads are one, as are a cache and its copy; packed documents are told by the mask of layers.
NOT_COMPILED = (threads, from_a_prefix, packed, quantized_cache, training, transformed, continuous, compiled)


# ---------------------------------------------------------------------- the oracle


def truth(model: Any, tokens: list[int], row: int, n_prompt: int, forbid: Any = None) -> dict[str, np.ndarray]:
    """expert_id and weight [token, layer, slot], clear [token, layer], logprob [token] of a row run alone."""
    seen: list[tuple] = []

    def hook(layer: int) -> Callable[..., Any]:
        def of(_module: Any, _args: Any, output: tuple) -> Any:
            logits, weights, ids = output
            if forbid is not None and forbid[0] == layer:
                at = np.arange(len(tokens))
                where = forbid[2]
                hit = np.isin(at, where["positions"]) if "positions" in where else np.ones(len(tokens), bool)
                if "phase" in where:
                    hit &= (at >= n_prompt) == (where["phase"] == "generated")
                hit &= row in where.get("rows", [row])
                logits = logits.clone()
                logits[torch.from_numpy(hit), forbid[1]] = -torch.inf
                weights, ids = logits.float().softmax(-1).topk(ids.shape[-1], -1)
                weights = weights / weights.sum(-1, keepdim=True)
            seen.append((logits, weights, ids))
            return logits, weights, ids

        return of

    layers = getattr(model, "get_base_model", lambda: model)().model.layers
    handles = [layer.mlp.gate.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    for handle in handles:
        handle.remove()
    router, weight, ids = (torch.stack([each[part] for each in seen], 1) for part in range(3))
    ranked = router.float().sort(-1, descending=True).values[..., : ids.shape[-1] + 1]
    clear = (ranked.diff(dim=-1).abs() > MARGIN).all(-1)
    said = torch.log_softmax(logits.float(), -1)[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0]
    return {
        "expert_id": ids.numpy(),
        "weight": weight.float().numpy(),
        "clear": clear.numpy(),
        "logprob": np.append(np.nan, said.numpy()),
    }


def _compiled(d: Drawn) -> Any:
    if d.coin():
        return torch.compile(d.model, backend="eager")
    d.model = copy.deepcopy(d.model)
    if d.coin():
        d.model.compile(backend="eager")
        return d.model
    for layer in d.model.model.layers:
        layer.compile(backend="eager")
    return d.model


def _with_adapters(d: Drawn) -> Any:
    model = get_peft_model(copy.deepcopy(d.model), LoraConfig(target_modules=["q_proj", "o_proj"], r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(d.seed))
    return d.one(model.eval(), model.get_base_model())


def drawn(seed: int) -> tuple[Callable[[Drawn], list[Row]], Drawn]:
    rng = np.random.default_rng(seed)
    ways = list(WAYS)
    weights = np.array(list(WAYS.values()), float)
    way = ways[rng.choice(len(ways), p=weights / weights.sum())]
    d = Drawn(seed, way.__name__, rng, models()[int(rng.integers(4))])
    with torch.no_grad():
        if way is filled_before or (way is generate_with_cache and d.coin()):
            cache = DynamicCache(config=d.model.config) if way is generate_with_cache else _cache(d)
            d.compare["before"] = before = Decode(d, d.rows(), cache)
            before.placed |= way is generate_with_cache
            before.prefill()
        if way is compiled:
            d.compare["compiled"] = call = _compiled(d)
            call(torch.tensor([[5, 6, 7]]))
        if way is adapted:
            d.model = _with_adapters(d)
    return way, d


def outcome(seed: int) -> str:
    """Gives "equal", "refused: why", "refused, as it must be: why", or "wrong: what"."""
    way, d = drawn(seed)
    torch.manual_seed(seed)
    signals = d.one(("logprob",), ("router_logits", "logprob", "top_logprobs"))
    recorder: ml.Recorder = ml.Recorder(d.model, signals=signals)
    if way not in NOT_COMPILED and np.random.default_rng((seed, 1)).integers(6) == 0:
        recorder, d.name = ml.CompiledRecorder(d.model, tokens=1000), f"{d.name}, CompiledRecorder"
    try:
        with torch.no_grad(), recorder:
            expected = way(d)
        trace = recorder.trace()
    except BadInput as error:
        how = "refused, as it must be" if d.compare.get("must_refuse") else "refused"
        return f"{how}: {d.name}: {error.argument} {error.value}"[:100]
    except Exception:
        return f"wrong: {d.name}: {traceback.format_exc().splitlines()[-1]}"
    finally:
        if way is compiled:
            torch._dynamo.reset()
    if d.compare.get("must_refuse"):
        return f"wrong: {d.name}: recorded what cannot be followed"
    return _difference(d, trace, expected)


def _difference(d: Drawn, trace: ml.Trace, expected: list[Row]) -> str:
    expected = [(number, row) for number, row in enumerate(expected) if len(row.tokens) > row.start]
    columns = {name: trace.read(name) for name in ("sequence", "token_id", "position", "phase", "expert_id", "weight")}
    logprob = trace.read("logprob") if "logprob" in trace.signals else np.full(trace.n_tokens, np.nan)
    numbers = np.unique(columns["sequence"])
    if len(numbers) != len(expected):
        return f"wrong: {d.name}: {len(numbers)} sequences for {len(expected)}"
    for number, (place, row) in zip(numbers, expected, strict=True):
        own = {name: values[columns["sequence"] == number] for name, values in columns.items()}
        at = np.arange(row.start, len(row.tokens))
        told = truth(d.model, row.tokens, place, row.prompt, d.compare.get("forbid"))
        if own["position"].tolist() != at.tolist():
            return f"wrong: {d.name}: positions {own['position'].tolist()} for {at.tolist()}"
        ids = own["token_id"]
        same = (ids == np.array(row.tokens)[at]) | ((ids == -1) & d.compare.get("ids_unknown", False))
        if not same.all():
            return f"wrong: {d.name}: tokens"
        if own["phase"].tolist() != (at >= row.prompt).astype(int).tolist():
            return f"wrong: {d.name}: phase"
        clear = told["clear"][at].all(1).cumprod().astype(bool)  # after a near tie anything may follow
        if row.expert_id is not None:
            if not np.array_equal(own["expert_id"], row.expert_id[at]):
                return f"wrong: {d.name}: expert ids"
            continue
        if not np.array_equal(own["expert_id"][clear], told["expert_id"][at][clear]):
            return f"wrong: {d.name}: expert ids"
        if not np.allclose(own["weight"][clear], told["weight"][at][clear], atol=2e-3):
            return f"wrong: {d.name}: weights"
        said = logprob[columns["sequence"] == number]
        known = ~np.isnan(said) & clear
        if "forbid" not in d.compare and not np.allclose(said[known], told["logprob"][at][known], atol=1e-3):
            return f"wrong: {d.name}: log-probabilities"
    return "equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: collections.Counter[str] = collections.Counter()
    for seed in range(options.seed, options.seed + options.n):
        result = outcome(seed)
        if result.startswith("wrong"):
            print(seed, result, flush=True)
        found[result if result.startswith("refused") else result.partition(":")[0]] += 1
    for result, count in found.most_common():
        print(f"{count:6d}  {count / options.n:.3f}  {result}")


if __name__ == "__main__":
    main()
