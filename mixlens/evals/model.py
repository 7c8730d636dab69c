"""Local model for lm-eval with one BOS, padding masks, decoding that keeps the first space, and no truncation."""

from __future__ import annotations

import copy
import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import DynamicCache

from mixlens.errors import BadInput, ModelError
from mixlens.evals.generating import Sampling, check_sampling, generate
from mixlens.evals.response_cache import Reply
from mixlens.models.hub import tokenizer_beside
from mixlens.models.layout import CACHE

# lm-eval's decorator hides the class from type checkers.
_Base: Any = HFLM
# A shorter prefix is not worth a separate forward.
_SHORTEST_PREFIX = 48


@dataclass(frozen=True)
class Row:
    """Tokens in one row of a forward, and the requests that it answers.

    asked  (number of the request, tokens whose log-probability after the row's context is requested)
    """

    ids: tuple[int, ...]
    asked: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass
class Batch:
    """Rows of one forward, or prompts of one generate call. The division of requests into batches is fixed.

    prefix  tokens shared by all rows, read once and kept in a key-value cache; () for none
    """

    requests: list[int]
    rows: list[Row] = field(default_factory=list)
    prefix: tuple[int, ...] = ()


class LocalLM(_Base):
    """A loaded transformers model for lm-eval.

    batch_size    rows per forward
    max_length    maximum tokens of prompt and answer together; None for the context length of the model
    seed          seed of sampled answers; the noise of an answer does not depend on its batch
    max_new_tokens  maximum tokens of an answer for tasks without a limit
    share_prefix  whether to read the shots shared by the questions of a task once and keep their key-value cache

    `seen` lists every row that a forward read, in order, for recorders.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        max_new_tokens: int = 1024,
        seed: int = 0,
        share_prefix: bool = True,
    ) -> None:
        # lm-eval sets a padding token on the tokenizer, so it gets a copy.
        with redirect_stderr(io.StringIO()):  # it warns about arguments that are not passed here
            super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self._max_length = max_length or int(model.config.max_position_embeddings)
        self._max_new_tokens, self.seed, self.share_prefix = max_new_tokens, seed, share_prefix
        self.seen: list[dict[str, Any]] = []
        self._newline = self.tokenizer.encode("\n", add_special_tokens=False)[-1]
        self._prefix: tuple[tuple[int, ...], Any] = ((), None)

    @property
    def max_gen_toks(self) -> int:
        return self._max_new_tokens

    # ------------------------------------------------------------------ text and tokens

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode with exactly one BOS, which a chat template may already contain."""
        ids = self.tokenizer.encode(string, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        if add_special_tokens is False or bos is None:
            return ids
        return ids if ids[:1] == [bos] else [bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode generated tokens as the continuation of a prompt.

        With SentencePiece tokenizers a continuation decoded alone loses its first space. It is therefore decoded after
        a newline, which is then removed.
        """
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text = self.tokenizer.decode([self._newline, *ids], **options)
        return text[len(self.tokenizer.decode([self._newline], **options)) :]

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        return self.decode([tokens] if isinstance(tokens, int) else list(tokens))

    def finish(self, ids: Sequence[int], until: Sequence[str]) -> str:
        """Decode an answer for grading, cut at its end of sequence and its first stop string."""
        ends = self.stop_ids
        length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        return cut(self.decode(ids[:length]), until)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end an answer, from the tokenizer and from the generation config of the model."""
        config = getattr(self.model, "generation_config", None)
        listed = getattr(config, "eos_token_id", None)
        listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
        return frozenset({*listed, self.tokenizer.eos_token_id} - {None})

    # ------------------------------------------------------------------ requests in fixed batches

    def encode_request(self, request: Any) -> tuple[list[int], list[int]]:
        """Encode context and continuation of a log-likelihood request; for a generative one, the prompt and []."""
        if request.request_type != "loglikelihood":
            return self.tok_encode(request.args[0]), []
        context, continuation = request.args[0], request.args[1]
        if context:
            return self._encode_pair(context, continuation)
        return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)

    def batches(self, kind: str, requests: Sequence[Any]) -> list[Batch]:
        """Divide all requests of one kind into batches that depend only on the requests."""
        if kind == "loglikelihood_rolling":
            return [Batch([number]) for number in range(len(requests))]
        if kind == "generate_until":
            return self._generation_batches(requests)
        encoded = [self.encode_request(request) for request in requests]
        batches = []
        for members in _by_task(requests):
            asked: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
            for number in members:
                context, continuation = encoded[number]
                asked.setdefault(tuple(context + continuation[:-1]), []).append((number, tuple(continuation)))
            rows = [Row(ids, tuple(them)) for ids, them in asked.items()]
            batches += self._row_batches(rows)
        return batches

    def _row_batches(self, rows: list[Row]) -> list[Batch]:
        prefix = self._common_prefix(rows) if self.share_prefix else ()
        # Rows after a prefix are short, so that a forward can take more of them.
        size = self.batch_size if not prefix else 4 * self.batch_size
        rows = sorted(rows, key=lambda row: (-len(row.ids), row.ids))
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [Batch([number for row in part for number, _ in row.asked], part, prefix) for part in parts]

    def _common_prefix(self, rows: list[Row]) -> tuple[int, ...]:
        if len(rows) < 2:
            return ()
        first, last = min(row.ids for row in rows), max(row.ids for row in rows)
        common = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        # Every row must still read the token before its first continuation token.
        common = min([common, *(len(row.ids) - len(c) for row in rows for _, c in row.asked)])
        return first[:common] if common >= _SHORTEST_PREFIX else ()

    def _generation_batches(self, requests: Sequence[Any]) -> list[Batch]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(number)
        batches = []
        for members in groups.values():
            rows = [Row(tuple(self.tok_encode(requests[n].args[0])), ((n, ()),)) for n in members]
            rows.sort(key=lambda row: (-len(row.ids), row.ids, row.asked))
            for start in range(0, len(rows), self.batch_size):
                part = rows[start : start + self.batch_size]
                batches.append(Batch([row.asked[0][0] for row in part], part))
        return batches

    def answer(self, kind: str, requests: Sequence[Any], batch: Batch, repeats: Sequence[int]) -> list[Any]:
        """Return the answers to the requests of a batch, in the order of the batch.

        repeats  for every request, the index of its repeated answer, which determines the noise of a sampled one
        """
        if kind == "loglikelihood_rolling":
            return [self._rolling(requests[number]) for number in batch.requests]
        if kind == "generate_until":
            return self._generated(requests, batch, repeats)
        found = self._scored(batch, requests)
        return [found[number] for number in batch.requests]

    # ------------------------------------------------------------------ forwards

    @torch.inference_mode()
    def _scored(self, batch: Batch, requests: Sequence[Any] | None = None) -> dict[int, tuple[float, bool]]:
        """Return the log-probability of every continuation of a batch, and whether greedy decoding would produce it."""
        cache, n_prefix = self._cached(batch, requests), len(batch.prefix)
        rests = [row.ids[n_prefix:] for row in batch.rows]
        ids, mask = self._left_padded(rests)
        if n_prefix:
            mask = torch.cat([mask.new_ones(len(rests), n_prefix), mask], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, n_prefix:]
        n_kept = max(len(continuation) for row in batch.rows for _, continuation in row.asked)
        self._note(batch, requests)
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache is not None,
            logits_to_keep=n_kept,
            **{CACHE: cache},
        ).logits
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        found = {}
        for row, scores in zip(batch.rows, logprobs, strict=True):
            for number, continuation in row.asked:
                tail = scores[-len(continuation) :]
                wanted = torch.tensor(continuation, device=tail.device)
                total = float(tail.gather(1, wanted[:, None]).sum())
                if total != total:
                    raise ModelError(
                        "Cannot compute log-probabilities: the logits of the model are NaN. Load it in bfloat16 or "
                        "float32, and check its weights.",
                        argument="model",
                        value=total,
                    )
                found[number] = (total, bool((tail.argmax(-1) == wanted).all()))
        return found

    def _cached(self, batch: Batch, requests: Sequence[Any] | None) -> Any:
        """Return a key-value cache of the batch's prefix, expanded to its rows; None without a prefix."""
        if not batch.prefix:
            return None
        if self._prefix[0] != batch.prefix:
            ids = torch.tensor([batch.prefix], device=self.device)
            self._note(batch, requests, shots=True)
            read = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            self._prefix = (batch.prefix, getattr(read, CACHE))
        cache = DynamicCache(config=self.model.config)
        for index, layer in enumerate(self._prefix[1].layers):
            rows = (len(batch.rows), -1, -1, -1)
            cache.update(layer.keys.expand(rows), layer.values.expand(rows), index)
        return cache

    def _rolling(self, request: Any) -> float:
        """Return the log-probability of a whole text, in windows of the maximum length."""
        windows = map(
            make_disjoint_window,
            get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ),
        )
        rows = [Row(tuple(context + target[:-1]), ((0, tuple(target)),)) for context, target in windows]
        return sum(self._scored(Batch([0], [row]), [request])[0][0] for row in rows)

    def _generated(self, requests: Sequence[Any], batch: Batch, repeats: Sequence[int]) -> list[str]:
        asked = check_sampling(requests[batch.requests[0]].args[1], self.max_gen_toks)
        seeds = [_seed(self.seed, requests[n].args[0], repeats[n]) for n in batch.requests]
        until, sampling = asked["until"], Sampling.of(asked, seeds)
        ids, mask = self._left_padded([row.ids for row in batch.rows])
        self._note(batch, requests, repeats=repeats)
        answers = generate(self, ids, mask, max_new_tokens=asked["max_gen_toks"], until=until, sampling=sampling)
        return [
            Reply(self.finish(ids, until), finish="stop" if self.ended(ids, until, asked["max_gen_toks"]) else "length")
            for ids in answers
        ]

    def ended(self, ids: Sequence[int], until: Sequence[str], most: int) -> bool:
        """Check whether an answer ended before the length limit."""
        return len(ids) < most or bool(self.stop_ids & set(ids)) or any(s in self.decode(ids) for s in until if s)

    def _left_padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and mask [rows, columns]; every row ends in the last column."""
        columns = max(map(len, rows))
        ids = torch.zeros(len(rows), columns, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, columns - len(tokens) :] = torch.tensor(tokens)
            mask[row, columns - len(tokens) :] = 1
        return ids.to(self.device), mask.to(self.device)

    def _note(self, batch: Batch, requests: Sequence[Any] | None, *, shots: bool = False, repeats: Any = ()) -> None:
        if requests is None:
            return
        first = requests[batch.requests[0]]
        if shots:
            self.seen.append({"role": "shots", "task": first.task_name, "sample_id": -1, "choice": -1, "repeat": -1})
            return
        for row in batch.rows:
            number = row.asked[0][0]
            one = requests[number]
            alone = one.request_type == "loglikelihood" and len(row.asked) == 1
            self.seen.append(named(one, repeats[number] if len(repeats) else -1, scored=alone))

    # ------------------------------------------------------------------ interface of lm-eval

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._all("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return self._all("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._all("generate_until", requests)

    def _all(self, kind: str, requests: list[Any]) -> list[Any]:
        repeats = repeats_of(requests)
        found: dict[int, Any] = {}
        for batch in self.batches(kind, requests):
            found |= dict(zip(batch.requests, self.answer(kind, requests, batch, repeats), strict=True))
        return [found[number] for number in range(len(requests))]


def named(request: Any, repeat: int, *, scored: bool) -> dict[str, Any]:
    """Return the columns that identify a recorded row: its sample, and its choice if it is `scored`."""
    choice = request.idx if scored else -1
    return {
        "role": "sample",
        "task": request.task_name,
        "sample_id": request.doc_id,
        "choice": choice,
        "repeat": -1 if scored else repeat,
    }


def cut(text: str, until: Sequence[str]) -> str:
    """Cut a text at the first stop string in it."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def repeats_of(requests: Sequence[Any]) -> list[int]:
    """Count for every request how often the same one occurred before it."""
    counts: dict[int, int] = {}
    repeats = []
    for request in requests:
        repeats.append(counts.get(id(request), 0))
        counts[id(request)] = repeats[-1] + 1
    return repeats


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """Return the given tokenizer, the one with the given name, or the one beside the weights of the model.

    Raises BadInput if there is none.
    """
    from transformers import AutoTokenizer

    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    name = str(tokenizer or getattr(model, "name_or_path", "") or "")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False) if tokenizer else tokenizer_beside(model)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"Cannot load the tokenizer of {name or type(model).__name__}. Pass one as a name, a folder or a "
            "tokenizer: EvalSettings(tokenizer=...).",
            argument="tokenizer",
            value=name or type(model).__name__,
        ) from error


def _by_task(requests: Sequence[Any]) -> Iterator[list[int]]:
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(str(request.task_name), []).append(number)
    yield from groups.values()


def _seed(seed: int, prompt: str, repeat: int) -> int:
    digest = hashlib.sha256(f"{seed}\n{repeat}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def chat_template_of(folder: str) -> Any:
    """Return apply_chat_template of the tokenizer in a folder, with the signature of lm-eval."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def apply(history: list[dict[str, str]], add_generation_prompt: bool = True) -> Any:
        return tokenizer.apply_chat_template(
            history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    return apply
