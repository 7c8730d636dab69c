"""Traces of expert ids for documents, through a server that returns routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from mixlens.core.sealed_json import short
from mixlens.endpoints.calls import Completion
from mixlens.endpoints.endpoint import Endpoint
from mixlens.endpoints.transport import Client
from mixlens.engines.check import Checker, Routers
from mixlens.engines.replies import Routed, columns_of_answers, routed, trace_of_answers
from mixlens.errors import BadInput, SourceError
from mixlens.models.load import skeleton
from mixlens.trace.shards import PROMPT, MemoryPart
from mixlens.trace.signals import Signals
from mixlens.trace.trace import Trace

_AT_A_TIME = 8
_ROUNDED_UP = 1e-3  # largest log-probability above 0 that rounding in low precision explains


class Server:
    """A server as a source of routing. It reads token ids and generates one more token, which has no routing."""

    signals = frozenset({"logprob"})

    def __init__(self, endpoint: Endpoint, tokenizer: Any = None) -> None:
        if not endpoint.routing or endpoint.protocol != "openai-completions":
            raise BadInput(
                f"Cannot record through {endpoint!r}: tokens are sent as ids, which the protocol openai-completions "
                'takes, and routing has to be asked for. Pass ml.Endpoint(..., protocol="openai-completions", '
                "routing=True).",
                argument="routing" if not endpoint.routing else "protocol",
                value=endpoint.protocol,
            )
        self.endpoint, self._tokenizer = endpoint, tokenizer
        self.form: str | None = None

    @cached_property
    def skeleton(self) -> Any:
        return skeleton(architecture_name(self.endpoint, self._tokenizer))

    @property
    def name(self) -> str:
        return f"a server at {self.endpoint.host}"

    def describe(self) -> dict[str, Any]:
        return {"name": self.endpoint.model, "endpoint": self.endpoint.plan()}

    def reader(self, signals: Signals) -> ServerReader:
        return ServerReader(self.endpoint, Routers.of(self.skeleton), signals)


def answered(
    answers: Sequence[Mapping[str, Any]], about: Sequence[Mapping[str, Any]], endpoint: Endpoint, model: Any
) -> Trace:
    """Create the trace of answers to any requests, with prompt and answer of each as one sequence.

    Parameters
    ----------
    answers : Sequence[Mapping[str, Any]]
        JSON of each answer.
    about : Sequence[Mapping[str, Any]]
        Columns of the sequence of each answer.
    endpoint : Endpoint
        Endpoint that answered.
    model : torch.nn.Module
        The served model, whose weights are not needed.

    Raises
    ------
    SourceError
        If routing is missing, or does not fit its tokens.
    """
    checker = Checker(Routers.of(model))
    found = [routed(answer, checker.routers) for answer in answers]
    if any(one is None for one in found):
        raise no_routing(endpoint)
    columns = columns_of_answers([one for one in found if one is not None], checker)
    held = {"name": endpoint.model, "endpoint": endpoint.plan()}
    return trace_of_answers(columns, about, checker, source=f"a server at {endpoint.host}", model=held)


class ServerReader:
    """Reads sequences by sending them to the server, and checks the returned ids request by request, in order."""

    rule = "unchecked"

    def __init__(self, endpoint: Endpoint, routers: Routers, signals: Signals) -> None:
        self.endpoint, self.routers, self.signals = endpoint, routers, signals
        self._checker = Checker(routers)
        self._client: Client | None = None

    def __enter__(self) -> ServerReader:
        self._client = self.endpoint.connect()
        self._client.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._client is not None
        self._client.__exit__(*exception)

    def check(self) -> dict[str, Any]:
        return self._checker.about()

    def read(
        self, sequences: list[np.ndarray], first_sequence: int = 0, phases: Sequence[np.ndarray | None] | None = None
    ) -> MemoryPart:
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            answers = list(pool.map(self._ask, sequences))
        found = [self._routing(answer.raw, ids) for answer, ids in zip(answers, sequences, strict=True)]
        arrays = columns_of(sequences, first_sequence, phases)
        arrays["expert_id"] = np.concatenate([one.checked(self._checker) for one in found])
        if self.signals.logprob:
            scores = [prompt_logprobs(answer.raw, ids) for answer, ids in zip(answers, sequences, strict=True)]
            if not all(score is None for score in scores):
                unknown = [np.full(len(ids), np.nan, np.float32) for ids in sequences]
                arrays["logprob"] = np.concatenate(
                    [u if s is None else s for s, u in zip(scores, unknown, strict=True)]
                )
        return MemoryPart(arrays)

    def _ask(self, ids: np.ndarray) -> Completion:
        fields: dict[str, Any] = {"temperature": 0, **({"prompt_logprobs": 0} if self.signals.logprob else {})}
        return self.endpoint.complete(ids.tolist(), max_tokens=1, client=self._client, **fields)

    def _routing(self, answer: Mapping[str, Any], ids: np.ndarray) -> Routed:
        found = routed(answer, self.routers, prompt_ids=ids.tolist())
        if found is None:
            raise no_routing(self.endpoint)
        if found.token_ids is not None and found.token_ids[: len(ids)] != ids.tolist():
            raise SourceError(
                f"Cannot use the routing from {self.endpoint.host}: it read other tokens than were sent. Disable "
                "changes to prompts on the server.",
                argument="token_ids",
                value=found.token_ids[: len(ids)],
            )
        return found


def architecture_name(endpoint: Endpoint, tokenizer: Any) -> str:
    """Locate the config of the served model: next to the tokenizer, as the server reports, or by its name."""
    if given := str(getattr(tokenizer, "name_or_path", "") or ""):
        return given
    listed = next((one for one in endpoint.models() if one.get("id") == endpoint.model), {})
    return str(listed.get("root") or endpoint.model)


def columns_of(
    sequences: Sequence[np.ndarray], first_sequence: int, phases: Sequence[np.ndarray | None] | None
) -> dict[str, np.ndarray]:
    """Return the token columns that do not depend on the model: sequence, position, token_id, phase."""
    lengths = np.array([len(ids) for ids in sequences])
    starts = np.cumsum(lengths) - lengths
    given = phases or [None] * len(sequences)
    return {
        "sequence": np.repeat(np.arange(len(sequences)), lengths) + first_sequence,
        "position": np.arange(lengths.sum()) - np.repeat(starts, lengths),
        "token_id": np.concatenate(sequences),
        "phase": np.concatenate(
            [np.full(n, PROMPT, np.uint8) if phase is None else phase for n, phase in zip(lengths, given, strict=True)]
        ),
    }


def no_routing(endpoint: Endpoint) -> SourceError:
    return SourceError(
        f"Cannot read the routing from {endpoint.host}: its answer has none. Start vLLM or SGLang with "
        "--enable-return-routed-experts.",
        argument="routing",
        value=None,
    )


def prompt_logprobs(answer: Mapping[str, Any], ids: np.ndarray) -> np.ndarray | None:
    """Return the log-probability of every token, from vLLM; NaN for the first. None if there are none."""
    listed = answer["choices"][0].get("prompt_logprobs", answer.get("prompt_logprobs"))
    if not isinstance(listed, list) or len(listed) != len(ids):
        return None
    found = np.full(len(ids), np.nan, np.float32)
    for place, (token, scores) in enumerate(zip(ids.tolist(), listed, strict=True)):
        if isinstance(scores, dict) and isinstance(one := scores.get(str(token)), dict) and "logprob" in one:
            score = one["logprob"]
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if not (number and -1e30 < score <= _ROUNDED_UP):
                raise SourceError(
                    f"Cannot use the log-probabilities from a server: that of token {place} of a prompt is "
                    f"{short(score)}. Update the server, or record without logprob.",
                    argument="logprob",
                    value=score,
                )
            found[place] = score
    return found
