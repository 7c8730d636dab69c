"""Calls of an endpoint that are not measured: whole completions, model lists, token counts. These are tried again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import httpx

from mixlens.errors import BadInput, EndpointError
from mixlens.models.endpoint import PATHS, Endpoint, Messages, redacted

_FOR_NOW = {408, 409, 429}
_LONGEST_WAIT_S = 60.0
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


@dataclass(frozen=True)
class Completion:
    """A whole answer; None for what the server did not say.

    text           the answer, after the prompt where `echo` was asked for
    finish         why it ended: "stop", "length" ...
    input_tokens, output_tokens, cost_usd    the server's own count
    model, provider  who answered, in the server's words
    tokens         text of each token that has a log-probability, in order
    logprobs       its natural log-probability; None for the first token of an echoed prompt, which has none
    top_logprobs   alternatives of each token with theirs
    offsets        character at which each token begins in `text` ("openai-completions")
    attempts       requests that it took
    raw            the server's whole answer
    """

    text: str
    finish: str | None
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float | None
    model: str | None
    provider: str | None
    tokens: tuple[str, ...] | None
    logprobs: tuple[float | None, ...] | None
    top_logprobs: tuple[dict[str, float], ...] | None
    offsets: tuple[int, ...] | None
    attempts: int
    raw: dict[str, Any]


def complete(
    endpoint: Endpoint,
    prompt: str | Messages,
    asked: Mapping[str, Any],
    *,
    retries: int = 4,
    client: httpx.Client | None = None,
) -> Completion:
    """As Endpoint.complete; `asked` holds max_tokens, logprobs, echo and more fields of the body."""
    fields = dict(asked)
    max_tokens, logprobs, echo = fields.pop("max_tokens"), fields.pop("logprobs"), fields.pop("echo")
    key = endpoint.key()
    headers, body = endpoint.request(prompt, max_tokens=max_tokens, key=key, stream=False)
    body = {name: value for name, value in (body | fields).items() if value is not None}
    body |= _scoring(endpoint, logprobs, echo)
    data, attempts = _answer(endpoint, ("POST", endpoint.address), headers, body, retries=retries, client=client)
    try:
        return _completion(data, endpoint.protocol, attempts)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise EndpointError(
            f"{endpoint.host} was asked for a completion. Its answer is not of the form of {endpoint.protocol}: "
            f"{json.dumps(data)[:200]}. Look at the server's address and give the protocol that it speaks.",
            argument="answer",
            value=data,
        ) from error


def list_models(endpoint: Endpoint) -> list[dict[str, Any]]:
    """As Endpoint.models."""
    base = endpoint.url.rstrip("/").removesuffix(PATHS[endpoint.protocol])
    # ModelsLab lists its models below /v1, where its Anthropic form is, and takes the key in the query or a header.
    base += "/v1" if endpoint.protocol == "modelslab" else ""
    key = endpoint.key()
    headers = {**endpoint.headers, **({} if key is None else {"Authorization": f"Bearer {key}"})}
    data, _ = _answer(endpoint, ("GET", base + "/models"), headers, None, retries=1)
    listed = data.get("data", data.get("models")) if isinstance(data, dict) else data
    if not isinstance(listed, list) or not all(isinstance(one, dict | str) for one in listed):
        raise EndpointError(
            f"{endpoint.host} was asked for its models. Its answer has no list: {json.dumps(data)[:200]}. "
            "Name the model from the server's own documentation.",
            argument="answer",
            value=data,
        )
    named = [{"id": one} if isinstance(one, str) else one for one in listed]
    return [{"id": one.get("id") or one.get("model_id") or one.get("name"), **one} for one in named]


def count_tokens(endpoint: Endpoint, prompt: str | Messages) -> int:
    """As Endpoint.count_tokens."""
    if endpoint.protocol != "anthropic":
        raise BadInput(
            f"{endpoint.host} was asked to count tokens. Its protocol, {endpoint.protocol}, has no such call. Make the "
            'endpoint with protocol="anthropic", or count with the tokenizer of the model.',
            argument="protocol",
            value=endpoint.protocol,
        )
    headers, body = endpoint.request(prompt, max_tokens=1, key=endpoint.key(), stream=False)
    body = {name: body[name] for name in ("model", "system", "messages") if name in body}
    data, _ = _answer(endpoint, ("POST", endpoint.address + "/count_tokens"), headers, body)
    count = data.get("input_tokens") if isinstance(data, dict) else None
    if not isinstance(count, int) or isinstance(count, bool):
        raise EndpointError(
            f"{endpoint.host} was asked to count tokens. Its answer has no input_tokens: {json.dumps(data)[:200]}. "
            "Count with the tokenizer of the model.",
            argument="answer",
            value=data,
        )
    return count


def get_json(url: str) -> Any:
    """What a public address answers, as JSON. Raises EndpointError, or BadInput for what is no address."""
    endpoint = Endpoint(url, model="-")
    return _answer(endpoint, ("GET", url), {}, None)[0]


def _scoring(endpoint: Endpoint, logprobs: int | None, echo: bool) -> dict[str, Any]:
    """The fields that ask for log-probabilities and for the prompt in the answer."""
    if echo and endpoint.protocol != "openai-completions":
        raise BadInput(
            f"The prompt was to be echoed by {endpoint.host}. Only openai-completions does that, and the protocol is "
            f'{endpoint.protocol}. Make the endpoint with protocol="openai-completions".',
            argument="echo",
            value=endpoint.protocol,
        )
    if logprobs is not None and not endpoint.protocol.startswith("openai"):
        raise BadInput(
            f"Log-probabilities were asked of {endpoint.host}. The protocol {endpoint.protocol} has none. "
            'Make the endpoint with protocol="openai-chat" or "openai-completions".',
            argument="logprobs",
            value=endpoint.protocol,
        )
    if endpoint.protocol == "openai-completions":
        return ({"echo": True} if echo else {}) | ({} if logprobs is None else {"logprobs": logprobs})
    alternatives = {"top_logprobs": logprobs} if logprobs else {}
    return {} if logprobs is None else {"logprobs": True, **alternatives}


def _answer(
    endpoint: Endpoint,
    where: tuple[str, str],
    headers: Mapping[str, str],
    body: Mapping[str, Any] | None,
    *,
    retries: int = 4,
    client: httpx.Client | None = None,
) -> tuple[Any, int]:
    """The JSON of a good answer, and how many requests it took."""
    method, address = where
    key = endpoint.key()
    owned = nullcontext(client) if client else httpx.Client(timeout=_TIMEOUT, trust_env=not endpoint.is_local)
    found, status, attempt = "nothing", None, 0
    with owned as http:
        for attempt in range(1, max(retries, 0) + 2):
            wait = min(0.5 * 2 ** (attempt - 1), _LONGEST_WAIT_S)
            try:
                response = http.request(method, address, headers=dict(headers), json=body)
            except httpx.RequestError as error:
                found = redacted(f"{type(error).__name__}: {error}".removesuffix(": "), key)
            else:
                good, found = _read(response, key)
                status = response.status_code
                if good is not None:
                    return good, attempt
                if response.status_code not in _FOR_NOW and response.status_code < 500:
                    break
                wait = _asked_wait(response.headers.get("retry-after"), wait)
            if attempt <= retries:
                time.sleep(wait)
    tries = "1 try" if attempt == 1 else f"{attempt} tries"
    raise EndpointError(
        f"{method} {address} was to answer. After {tries} there is no answer: {found}. "
        "Check address, model and key, or try again later.",
        argument="endpoint",
        value=status,
    )


def _read(response: httpx.Response, key: str | None) -> tuple[Any, str]:
    """The JSON of an answer that is good, or None, and what was found, in words; neither has the key."""
    try:
        data = json.loads(redacted(response.content.decode("utf-8-sig"), key))
    except (ValueError, RecursionError):
        data = None
    if response.status_code < 300 and data is not None and not _failed(data):
        return data, ""
    said = json.dumps(data) if data is not None else " ".join(redacted(response.text, key).split())
    return None, f"status {response.status_code}, {said[:300] or 'an empty body'}"


def _failed(data: Any) -> bool:
    """Whether an answer says that it is a failure: as a whole, or in a choice, where OpenRouter has its providers'."""
    if not isinstance(data, dict):
        return False
    choices = data["choices"] if isinstance(data.get("choices"), list) else []
    broken = (c for c in choices if isinstance(c, dict) and (c.get("error") or c.get("finish_reason") == "error"))
    return bool(data.get("error")) or data.get("status") == "error" or any(broken)


def _asked_wait(value: str | None, otherwise: float) -> float:
    try:
        seconds = float(value) if value is not None else otherwise
    except ValueError:
        return otherwise
    return min(max(seconds, 0.0), _LONGEST_WAIT_S) if math.isfinite(seconds) else otherwise


def _completion(data: dict[str, Any], protocol: str, attempts: int) -> Completion:
    usage = data.get("usage") or {}
    common = {
        "cost_usd": usage.get("cost", usage.get("estimated_cost")),
        "model": data.get("model"),
        "provider": data.get("provider"),
        "attempts": attempts,
        "raw": data,
    }
    if protocol == "anthropic":
        return Completion(
            text="".join(block.get("text") or "" for block in data["content"]),
            finish=data.get("stop_reason"),
            input_tokens=usage.get("input_tokens"),
            output_tokens=usage.get("output_tokens"),
            **dict.fromkeys(("tokens", "logprobs", "top_logprobs", "offsets")),
            **common,
        )
    choice = data["choices"][0]
    return Completion(
        text=(choice["text"] if "text" in choice else choice["message"].get("content")) or "",
        finish=choice.get("finish_reason"),
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        **_scores(choice.get("logprobs")),
        **common,
    )


def _scores(given: Any) -> dict[str, Any]:
    """Tokens and log-probabilities of a choice, from either form; None each where there are none."""
    names = ("tokens", "logprobs", "top_logprobs", "offsets")
    if not given:
        return dict.fromkeys(names)
    if given.get("content") is not None:
        content = given["content"]
        top = [{one["token"]: one["logprob"] for one in token.get("top_logprobs") or []} for token in content]
        columns = ([t["token"] for t in content], [t["logprob"] for t in content], top if any(top) else None, None)
    else:
        top = given.get("top_logprobs")
        top = [one or {} for one in top] if top else None
        columns = (given.get("tokens"), given.get("token_logprobs"), top, given.get("text_offset"))
    return {name: None if column is None else tuple(column) for name, column in zip(names, columns, strict=True)}
