"""Evaluations over an ml.Endpoint: generated answers, and log-likelihoods where a server scores what it is given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from mixlens.errors import BadInput, EndpointError
from mixlens.evals.generating import check_sampling
from mixlens.evals.model import Batch, cut
from mixlens.models.calls import Completion
from mixlens.models.endpoint import Endpoint

# OpenAI-compatible servers take this many stop strings; the others are applied to what comes back.
_MOST_STOPS = 4
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


class EndpointBackend:
    """A model behind a URL, asked `batch_size` requests at a time. It encodes prompts, and puts BOS, by itself.

    A chat endpoint gets each prompt as one user message, or the messages of a protocol that has them.
    """

    def __init__(self, endpoint: Endpoint, settings: Any) -> None:
        self.endpoint, self.settings = endpoint, settings
        self._client = httpx.Client(timeout=_TIMEOUT, trust_env=not endpoint.is_local)

    def describe(self) -> dict[str, Any]:
        return {"name": self.endpoint.model, "backend": "endpoint", "endpoint": self.endpoint.plan()}

    def identity(self) -> dict[str, Any]:
        return self.describe()

    @property
    def completes(self) -> bool:
        """Whether it continues a text, rather than answers a message."""
        return self.endpoint.protocol == "openai-completions"

    @staticmethod
    def chat_template(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as they are, since the server applies its own template."""
        return json.dumps(history, ensure_ascii=False)

    def save_tokenizer(self, folder: str) -> None:
        """It has none here; `chat_template` needs none."""

    def check_scores(self, task: str, generative: str | None) -> None:
        """Raise BadInput unless the server gives log-probabilities of a text that it is given."""
        instead = f"Use the generative protocol {generative}" if generative else "Use a generative task, such as gsm8k"
        if not self.completes:
            raise BadInput(
                f"{task} needs log-probabilities of given answers. {self.endpoint.host} is asked by "
                f"{self.endpoint.protocol}, which has none of a text it is given. {instead}, or a server of "
                'openai-completions with echo (protocol="openai-completions").'
            )
        try:
            self._score(("The capital of France is", " Paris"))
        except (EndpointError, BadInput) as error:
            raise BadInput(
                f"{task} needs log-probabilities of given answers. {self.endpoint.host} does not echo a prompt with "
                f"log-probabilities ({str(error).split('. ')[1].rstrip('.')}). {instead}, or a server that has both."
            ) from error

    def batches(self, kind: str, requests: Sequence[Any]) -> list[Batch]:
        numbers, size = list(range(len(requests))), 4 * self.settings.batch_size
        return [Batch(numbers[start : start + size]) for start in range(0, len(numbers), size)]

    def answer(self, kind: str, requests: Sequence[Any], batch: Batch, repeats: Sequence[int]) -> list[Any]:
        if kind == "loglikelihood_rolling":
            raise BadInput(
                f"{requests[0].task_name} needs the log-probability of whole documents. Endpoints are not asked for "
                "that. Evaluate a local model: ml.load(...)."
            )

        def one(number: int) -> Any:
            arguments = requests[number].args
            if kind == "loglikelihood":
                return self._score(arguments)
            return self._generate(arguments[0], dict(arguments[1]), repeats[number])

        with ThreadPoolExecutor(self.settings.batch_size) as pool:
            return list(pool.map(one, batch.requests))

    def _generate(self, prompt: str, asked: dict[str, Any], repeat: int) -> str:
        asked = check_sampling(asked, self.settings.max_new_tokens)
        until = [stop for stop in asked["until"] if stop]
        fields: dict[str, Any] = {"temperature": asked["temperature"]}
        if asked["temperature"]:
            fields |= {"top_p": asked.get("top_p"), "seed": self.settings.seed + repeat}
        if until and not self.endpoint.protocol.startswith("anthropic"):
            fields["stop"] = until[:_MOST_STOPS]
        fields = {name: value for name, value in fields.items() if value is not None}
        return cut(self._complete(self._message(prompt), max_tokens=asked["max_gen_toks"], **fields).text, until)

    def _message(self, prompt: str) -> Any:
        """A text, or the messages that `chat_template` wrote."""
        if self.completes or not prompt.startswith('[{"role"'):
            return prompt
        return json.loads(prompt)

    def _score(self, arguments: tuple[str, str]) -> tuple[float, bool]:
        context, continuation = arguments
        context, blanks = context.rstrip(), context[len(context.rstrip()) :]
        text = context + blanks + continuation
        found = self._complete(text, max_tokens=1, echo=True, logprobs=1, temperature=0)
        if not found.logprobs or not found.offsets or not found.tokens or not found.text.startswith(text[:8]):
            raise EndpointError(
                f"{self.endpoint.host} was asked to echo a prompt with log-probabilities. Its answer has none of the "
                "prompt. Use a server that has both."
            )
        total, greedy = 0.0, True
        for place, (offset, logprob) in enumerate(zip(found.offsets, found.logprobs, strict=True)):
            ends = offset + len(found.tokens[place])
            if ends > len(context) and offset < len(text) and logprob is not None:
                total += logprob
                best = (found.top_logprobs or ())[place : place + 1]
                greedy &= bool(best) and logprob >= max(best[0].values(), default=0.0)
        return total, greedy

    def _complete(self, prompt: Any, **asked: Any) -> Completion:
        return self.endpoint.complete(prompt, client=self._client, **asked)
