"""Evaluations over an ml.Endpoint: generated answers, and log-likelihoods if the server scores prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import pandas as pd

from mixlens.endpoints.calls import Completion
from mixlens.endpoints.endpoint import Endpoint, same_model
from mixlens.engines.server import answered, architecture_name
from mixlens.errors import BadInput, EndpointError
from mixlens.evals.generating import check_sampling
from mixlens.evals.model import Batch, cut, named, tokenizer_of
from mixlens.evals.questions import Said, ask_all
from mixlens.evals.response_cache import ABOVE_ZERO, Reply, ResponseCache, Scored
from mixlens.models.load import skeleton
from mixlens.recording.corpus import vocabulary_of
from mixlens.trace.trace import Trace

# OpenAI-compatible servers accept this many stop strings; the rest are applied to the answer.
_MOST_STOPS = 4
_PROBE = "The capital of France is Paris."


class EndpointBackend:
    """A model behind a URL with `batch_size` concurrent requests. The server encodes prompts and adds BOS.

    A chat endpoint receives each prompt as one user message, or as the messages of the protocol if it has any.
    """

    def __init__(self, endpoint: Endpoint, settings: Any) -> None:
        self.endpoint, self.settings = endpoint, settings
        self._client = endpoint.connect()
        if settings.routing and not endpoint.routing:
            raise BadInput(
                f"Cannot record the routing of the samples: the endpoint at {endpoint.host} does not request it. Pass "
                "ml.Endpoint(..., routing=True) of a server that returns routing, or leave out routing.",
                argument="routing",
                value=endpoint.routing,
            )
        # Cached answers have no routing.
        self.cache = ResponseCache(settings.cache if not settings.routing else False, endpoint.plan())
        self._answers: dict[int, tuple[dict[str, Any], Completion]] = {}

    def describe(self) -> dict[str, Any]:
        return {"name": self.endpoint.model, "backend": "endpoint", "endpoint": self.endpoint.plan()}

    def identity(self) -> dict[str, Any]:
        return self.describe()

    @property
    def completes(self) -> bool:
        """Whether the model continues a text rather than answering a message."""
        return self.endpoint.protocol == "openai-completions"

    @staticmethod
    def chat_template(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the messages as JSON, since the server applies its own template."""
        return json.dumps(history, ensure_ascii=False)

    def save_tokenizer(self, folder: str) -> None:
        """Do nothing: there is no local tokenizer, and `chat_template` needs none."""

    def findings(self, requests: Sequence[Any]) -> list[dict[str, Any]]:
        """Return findings of the preflight questions to the server, asked before these generative requests."""
        can = {"continue"} if self.completes else set()
        can |= set() if self.endpoint.protocol.startswith("anthropic") else {"stop", "seed"}
        return ask_all(self._ask, requests, can, self._n_tokens)

    def _ask(self, prompt: Any, max_tokens: int, *, stop: str = "", seed: int | None = None, again: str = "") -> Said:
        fields = {"temperature": 0} if seed is None else {"temperature": 1.0, "seed": seed}
        fields |= {"stop": [stop]} if stop else {}
        found = self._complete(self._message(prompt), f"preflight {again}", 0, max_tokens=max_tokens, **fields)
        return Said(found.text, found.output_tokens, found.input_tokens)

    def _n_tokens(self, prompt: str) -> int | None:
        """Count the tokens of a prompt with the tokenizer of the settings, with one BOS or in its chat template."""
        if self.settings.tokenizer is None:
            return None
        tokenizer = tokenizer_of(None, self.settings.tokenizer)
        if self.completes:
            specials = tokenizer.bos_token_id is not None
            return len(tokenizer.encode(prompt, add_special_tokens=False)) + specials
        if getattr(tokenizer, "chat_template", None) is None:
            return None
        message = self._message(prompt)
        messages = [{"role": "user", "content": message}] if isinstance(message, str) else message
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(tokenizer.encode(text, add_special_tokens=False))

    def check_scores(self, task: str, generative: str | None) -> None:
        """Raise BadInput unless the server returns log-probabilities of a given text."""
        instead = f"Use the generative protocol {generative}" if generative else "Use a generative task, such as gsm8k"
        if not self.completes:
            raise BadInput(
                f"Cannot evaluate {task} at {self.endpoint.host}: it needs log-probabilities of given answers, which "
                f"{self.endpoint.protocol} does not return. {instead}, or a server of openai-completions with echo "
                '(protocol="openai-completions").',
                argument="protocol",
                value=self.endpoint.protocol,
            )
        try:
            found = self._echo(_PROBE)
        except (EndpointError, BadInput) as error:
            raise BadInput(
                f"Cannot evaluate {task} at {self.endpoint.host}: it needs log-probabilities of given answers, but the "
                f"server did not echo a prompt with them. {instead}, or a server that does. The server's failure: "
                f"{error}",
                argument="logprobs",
                value=task,
            ) from error
        given = self.settings.tokenizer
        if given is not None and tokenizer_of(None, given).bos_token_id is None:
            return
        unlisted = (found.input_tokens or _n_listed(found)) - _n_listed(found)  # llama.cpp counts BOS but omits it
        specials = _n_before(found) + unlisted
        if specials != 1:
            raise BadInput(
                f"Cannot evaluate {task} at {self.endpoint.host}: it needs one beginning-of-sequence token before a "
                f"prompt, but the server adds {specials or 'none'} (the echo of {_PROBE!r} begins with "
                f"{list(found.tokens or ())[:3]}). Let the server add special tokens once, or pass "
                "EvalSettings(tokenizer=...) if the model has no such token.",
                argument="bos",
                value=specials,
            )

    def batches(self, kind: str, requests: Sequence[Any]) -> list[Batch]:
        numbers, size = list(range(len(requests))), 4 * self.settings.batch_size
        return [Batch(numbers[start : start + size]) for start in range(0, len(numbers), size)]

    def answer(self, kind: str, requests: Sequence[Any], batch: Batch, repeats: Sequence[int]) -> list[Any]:
        if kind == "loglikelihood_rolling":
            raise BadInput(
                f"Cannot evaluate {requests[0].task_name} at {self.endpoint.host}: it needs the log-probability of "
                "whole documents, which mixlens does not request from endpoints. Evaluate a local model: ml.load(...).",
                argument="tasks",
                value=requests[0].task_name,
            )

        asked = [requests[number].args for number in batch.requests]
        with ThreadPoolExecutor(self.settings.batch_size) as pool:
            if kind == "loglikelihood":
                contexts = list(dict.fromkeys(context.rstrip() for context, _ in asked))
                lengths = dict(zip(contexts, pool.map(self._length, contexts), strict=True))
                done = pool.map(lambda pair: self._score(pair[0], pair[1], lengths[pair[0].rstrip()]), asked)
            else:
                numbered = zip(asked, batch.requests, strict=True)
                done = pool.map(lambda one: self._generate(one[0][0], dict(one[0][1]), repeats[one[1]]), numbered)
            answers, found = zip(*done, strict=True)
        self._answers = {
            number: (named(requests[number], repeats[number], scored=kind == "loglikelihood"), completion)
            for number, completion in zip(batch.requests, found, strict=True)
        }
        return list(answers)

    @contextmanager
    def recording(self) -> Iterator[Callable[[], Trace]]:
        """Record the routing of the answers in the block, one sequence each; call the yielded function afterwards.

        For log-probabilities, the entire text is the prompt.
        """

        def trace() -> Trace:
            rows, found = zip(*self._answers.values(), strict=True)
            return answered([one.raw for one in found], rows, self.endpoint, self._skeleton)

        yield trace

    @cached_property
    def _skeleton(self) -> Any:
        given = self.settings.tokenizer
        return skeleton(given if isinstance(given, str) else architecture_name(self.endpoint, given))

    def vocabulary(self) -> pd.Series | None:
        try:
            return vocabulary_of(tokenizer_of(self._skeleton, self.settings.tokenizer))
        except BadInput:
            return None

    def _generate(self, prompt: str, asked: dict[str, Any], repeat: int) -> tuple[str, Completion]:
        asked = check_sampling(asked, self.settings.max_new_tokens)
        until = [stop for stop in asked["until"] if stop]
        fields: dict[str, Any] = {"temperature": asked["temperature"]}
        if asked["temperature"]:
            fields |= {"top_p": asked.get("top_p"), "seed": self.settings.seed + repeat}
        if until and not self.endpoint.protocol.startswith("anthropic"):
            fields["stop"] = until[:_MOST_STOPS]
        fields = {name: value for name, value in fields.items() if value is not None}
        found = self._complete(self._message(prompt), repeat, max_tokens=asked["max_gen_toks"], **fields)
        reply = Reply(
            cut(found.text, until),
            finish=found.finish,
            model=found.model,
            reasoning=found.reasoning,
            input_tokens=found.input_tokens,
            output_tokens=found.output_tokens,
            cached_tokens=found.cached_tokens,
            reasoning_tokens=found.reasoning_tokens,
            attempts=found.attempts,
        )
        return reply, found

    def _message(self, prompt: str) -> Any:
        """Return the prompt as text, or as the messages written by `chat_template`."""
        if self.completes or not prompt.startswith('[{"role"'):
            return prompt
        return json.loads(prompt)

    def _length(self, context: str) -> int:
        """Return the number of tokens that the server lists for a context, including special ones."""
        return _n_listed(self._echo(context)) if context else _n_before(self._echo(_PROBE))

    def _score(self, context: str, continuation: str, lead: int) -> tuple[tuple[float, bool], Completion]:
        """Return the log-probability of the tokens after the first `lead`, and whether each is the most likely one.

        Tokens are counted as in lm-eval. Text offsets would be simpler, but those of vLLM include BOS and omit spaces.
        """
        found = self._echo(context + continuation)
        logprobs = (found.logprobs or ())[lead : _n_listed(found)]
        best = (found.top_logprobs or ())[lead : _n_listed(found)]
        given = [logprob for logprob in logprobs if logprob is not None]
        if not given or not len(given) == len(logprobs) == len(best):
            raise EndpointError(
                f"Cannot score {continuation[:40]!r}: {self.endpoint.host} returned {len(given)} log-probabilities "
                f"for {len(logprobs)} tokens. Use a server that scores every token of a prompt.",
                argument="logprobs",
                value=(len(given), len(logprobs)),
            )
        greedy = all(logprob >= max(others.values(), default=0.0) for logprob, others in zip(given, best, strict=True))
        about = {} if same_model(found.model or self.endpoint.model, self.endpoint.model) else {"model": found.model}
        about |= {"attempts": found.attempts} if found.attempts > 1 else {}
        return Scored((sum(given), greedy), **about), found

    def _echo(self, text: str) -> Completion:
        """Request a text with its log-probabilities, and one more token."""
        found = self._complete(text, 0, max_tokens=1, echo=True, logprobs=1, temperature=0)
        listed = found.tokens and found.logprobs and found.top_logprobs
        if not listed or not found.text.startswith(text[:8]):
            raise EndpointError(
                f"Cannot read the log-probabilities of a prompt from {self.endpoint.host}: the answer does not echo "
                "the prompt with them. Use a server that does.",
                argument="logprobs",
            )
        given = [logprob for logprob in found.logprobs or () if logprob is not None]
        if given and (max(given) > ABOVE_ZERO or not any(given)):
            raise EndpointError(
                f"Cannot score {text[-40:]!r}: the largest value that {self.endpoint.host} returned is "
                f"{max(given):g}, but log-probabilities are never above 0, nor all of them 0. Use another server.",
                argument="logprobs",
                value=max(given),
            )
        return found

    def _complete(self, prompt: Any, repeat: int | str, retries: int | None = None, /, **asked: Any) -> Completion:
        def ask() -> Completion:
            return self.endpoint.complete(prompt, client=self._client, retries=retries, **asked)

        return self.cache.answer([prompt, asked, repeat], ask)


def _n_listed(found: Completion) -> int:
    """Return the number of prompt tokens in an echoed answer: all but the generated ones."""
    return len(found.tokens or ()) - (1 if found.output_tokens is None else found.output_tokens)


def _n_before(found: Completion) -> int:
    """Return the number of tokens listed before the text in an echo of _PROBE."""
    texts = (token.strip() for token in found.tokens or ())
    return next((n for n, text in enumerate(texts) if text and _PROBE.startswith(text)), 0)
