"""Untimed calls of an endpoint, with retries: completions, lists of models and token counts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixlens.endpoints.keys import redacted, redacted_parts
from mixlens.endpoints.protocols import (
    PATHS,
    REFUSAL,
    Messages,
    blocks_text,
    is_broken,
    message_text,
    name_of,
    reason_of,
    without_thinking,
)
from mixlens.endpoints.transport import Client, Fault, Fetched
from mixlens.endpoints.usage import counts_of
from mixlens.endpoints.waits import asked_wait
from mixlens.errors import BadInput, EndpointError

if TYPE_CHECKING:
    from mixlens.endpoints.endpoint import Endpoint

_FOR_NOW = {408, 409, 429}
_TOO_MANY = 429
# Some servers also send 429 for failures that waiting does not resolve.
_NO_CREDIT = (b"insufficient_quota", b"billing_hard_limit", b"insufficient_balance", b"exceeded_current_quota")
# Errors that servers report in an answer with a success status, and the equivalent HTTP status.
_NAMED = {"overloaded_error": 529, "overloaded": 529, "rate_limit_error": _TOO_MANY, "rate_limit_exceeded": _TOO_MANY}
_NAMED |= {"server_error": 500, "internal_error": 500, "internal_server_error": 500, "api_error": 500}
# After this many rate limits, a requested wait of 0 s is ignored.
_MANY_LIMITS = 4
_LONGEST_WAIT_S = 60.0
# Faults that a retry may resolve.
_PASSING = ("connect", "timeout", "cut")
_COLUMNS = {"tokens": str, "logprobs": int | float | None, "top_logprobs": dict, "offsets": int}


@dataclass(frozen=True)
class Completion:
    """A complete answer. Fields that the server does not report are None.

    Parameters
    ----------
    text : str
        The answer, preceded by the prompt if the request set `echo`.
    finish : str or None
        Why generation ended, such as "stop" or "length".
    input_tokens, output_tokens : int or None
        Token counts reported by the server.
    cost_usd : float or None
        Cost reported by the server.
    model, provider : str or None
        Model and provider that answered, as named by the server.
    tokens : tuple[str, ...] or None
        Text of each token that has a log-probability, in order.
    logprobs : tuple[float or None, ...] or None
        Natural log-probability of each token; None for the first token of an echoed prompt, which has no context.
    top_logprobs : tuple[dict[str, float], ...] or None
        Alternatives to each token, with their log-probabilities.
    offsets : tuple[int, ...] or None
        Character of `text` at which each token begins ("openai-completions").
    reasoning : str
        Reasoning that the server shows, in whatever form; never part of `text`.
    cached_tokens, reasoning_tokens : int or None
        Input tokens from a prefix cache, and output tokens that are reasoning, as reported by the server.
    attempts : int
        Number of requests sent, retries included.
    raw : dict[str, Any]
        The server's answer as parsed JSON.
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
    reasoning: str = ""
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


def complete(
    endpoint: Endpoint,
    prompt: str | Messages | Sequence[int],
    asked: Mapping[str, Any],
    *,
    retries: int | None = None,
    client: Client | None = None,
) -> Completion:
    """Implement Endpoint.complete; `asked` holds max_tokens, logprobs, echo and additional fields of the body."""
    fields = dict(asked)
    max_tokens, logprobs, echo = fields.pop("max_tokens"), fields.pop("logprobs"), fields.pop("echo")
    key = endpoint.key()
    headers, body = endpoint.request(prompt, max_tokens=max_tokens, key=key, stream=False)
    removed = {name for name, value in endpoint.extra.items() if value is None}
    body = {name: value for name, value in (body | fields).items() if value is not None and name not in removed}
    body |= _scoring(endpoint, logprobs, echo)
    data, attempts = _answer(endpoint, ("POST", endpoint.address), headers, body, retries=retries, client=client)
    try:
        return _completion(data, endpoint.protocol, attempts, key)
    except (AttributeError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise EndpointError(
            f"Cannot read the completion from {endpoint.host}: its answer does not follow {endpoint.protocol}: "
            f"{json.dumps(data)[:200]}. Check the URL, and pass the server's protocol with protocol=.",
            argument="answer",
            value=data,
        ) from error


def list_models(endpoint: Endpoint) -> list[dict[str, Any]]:
    """Implement Endpoint.models."""
    base = endpoint.url.rstrip("/").removesuffix(PATHS[endpoint.protocol])
    # ModelsLab lists its models below /v1, next to its Anthropic API, and accepts the key in the query or a header.
    base += "/v1" if endpoint.protocol == "modelslab" else ""
    key = endpoint.key()
    headers = {**endpoint.headers, **({} if key is None else {"Authorization": f"Bearer {key}"})}
    data, _ = _answer(endpoint, ("GET", base + "/models"), headers, None, retries=1)
    listed = data.get("data", data.get("models")) if isinstance(data, dict) else data
    if not isinstance(listed, list) or not all(isinstance(one, dict | str) for one in listed):
        raise EndpointError(
            f"Cannot list the models of {endpoint.host}: its answer contains no list: {json.dumps(data)[:200]}. Look "
            "up the model name in the server's documentation.",
            argument="answer",
            value=data,
        )
    named = [{"id": one} if isinstance(one, str) else one for one in listed]
    return [{"id": one.get("id") or one.get("model_id") or one.get("name"), **one} for one in named]


def count_tokens(endpoint: Endpoint, prompt: str | Messages) -> int:
    """Implement Endpoint.count_tokens."""
    if endpoint.protocol != "anthropic":
        raise BadInput(
            f"Cannot count tokens at {endpoint.host}: its protocol, {endpoint.protocol}, has no call for it. Create "
            'the endpoint with protocol="anthropic", or count with the tokenizer of the model.',
            argument="protocol",
            value=endpoint.protocol,
        )
    headers, body = endpoint.request(prompt, max_tokens=1, key=endpoint.key(), stream=False)
    body = {name: body[name] for name in ("model", "system", "messages") if name in body}
    data, _ = _answer(endpoint, ("POST", endpoint.address + "/count_tokens"), headers, body)
    count = data.get("input_tokens") if isinstance(data, dict) else None
    if not isinstance(count, int) or isinstance(count, bool):
        raise EndpointError(
            f"Cannot count tokens at {endpoint.host}: its answer has no input_tokens: {json.dumps(data)[:200]}. Count "
            "with the tokenizer of the model.",
            argument="answer",
            value=data,
        )
    return count


def get_json(endpoint: Endpoint) -> Any:
    """Fetch JSON from the URL of an endpoint, without a key. Raises EndpointError if that fails."""
    return _answer(endpoint, ("GET", endpoint.url), {}, None)[0]


def _scoring(endpoint: Endpoint, logprobs: int | None, echo: bool) -> dict[str, Any]:
    """Return the body fields that request log-probabilities and an echo of the prompt."""
    if echo and endpoint.protocol != "openai-completions":
        raise BadInput(
            f"Cannot echo the prompt at {endpoint.host}: only openai-completions echoes, and the protocol is "
            f'{endpoint.protocol}. Create the endpoint with protocol="openai-completions".',
            argument="echo",
            value=endpoint.protocol,
        )
    if logprobs is not None and not endpoint.protocol.startswith("openai"):
        raise BadInput(
            f"Cannot request log-probabilities from {endpoint.host}: the protocol {endpoint.protocol} does not support "
            'them. Create the endpoint with protocol="openai-chat" or "openai-completions".',
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
    retries: int | None = None,
    client: Client | None = None,
) -> tuple[Any, int]:
    """Send a request, with retries, and return the JSON of the answer and the number of attempts."""
    method, address = where
    key = endpoint.key()
    tries = endpoint.max_tries if retries is None else max(retries, 0) + 1
    found, status, attempt, failures, limits, waited = "nothing", None, 0, 0, 0, 0.0
    try:
        content = None if body is None else json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"Cannot send the request to {endpoint.host} as JSON: {error}. Pass numbers, strings, lists and dicts.",
            argument="fields",
        ) from error
    headers = {**headers, **({} if content is None else {"Content-Type": "application/json"})}
    with nullcontext(client) if client else Client(endpoint) as connections:
        while True:
            attempt += 1
            wait = min(0.5 * 2**failures, _LONGEST_WAIT_S)
            limited = False
            try:
                fetched = connections.fetch(method, address, headers, content)
            except Fault as fault:
                found = redacted(fault.detail, key)
                if fault.kind not in _PASSING:
                    break
            else:
                good, found = _read(fetched, key)
                status = fetched.status
                if good is not None:
                    return good, attempt
                meant = status if status >= 300 else _status_within(fetched.body)
                if meant not in _FOR_NOW and meant < 500:
                    break
                limited = meant == _TOO_MANY
                if limited and any(words in fetched.body for words in _NO_CREDIT):
                    break
                wait = min(2.0**limits, _LONGEST_WAIT_S) if limited else wait
                asked = asked_wait(fetched.headers, fetched.body)
                if asked is not None and (asked or limits < _MANY_LIMITS):
                    wait = min(asked, _LONGEST_WAIT_S)
            if limited:
                limits, waited = limits + 1, waited + wait
                if waited > endpoint.patience_s:
                    found += f"; waited {waited - wait:.0f} s, and patience_s is {endpoint.patience_s:g}"
                    break
            else:
                failures += 1
                if failures >= tries:
                    break
            time.sleep(wait)
    raise EndpointError(
        f"{method} {address} failed after {'1 try' if attempt == 1 else f'{attempt} tries'}: {found}. Check the URL, "
        "the model and the key, or try again later.",
        argument="endpoint",
        value=status,
    )


def _read(fetched: Fetched, key: str | None) -> tuple[Any, str]:
    """Return the JSON of a good answer, else None, and a description of the failure; neither contains the key."""
    text = redacted(fetched.body.decode("utf-8-sig", errors="replace"), key)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if fetched.status < 300 and data is not None and not _failed(data):
        return data, ""
    said = redacted(fetched.redirection, key) or (json.dumps(data) if data is not None else " ".join(text.split()))
    return None, f"status {fetched.status}, {said[:300] or 'an empty body'}"


def _failed(data: Any) -> bool:
    """Return whether an answer reports an error, at the top or in a choice, where OpenRouter puts provider errors."""
    if not isinstance(data, dict):
        return False
    return data.get("status") == "error" or any(True for _ in _faults(data))


def _faults(data: dict[str, Any]) -> Iterator[Any]:
    """Yield the errors of an answer: those that the server reports, and one for every choice that broke off."""
    choices = data["choices"] if isinstance(data.get("choices"), list) else []
    for place in (data, *(choice for choice in choices if isinstance(choice, dict))):
        error = place.get("error")
        if error and (not isinstance(error, dict) or any(error.values())):
            yield error
        elif is_broken(reason_of(place.get("finish_reason"))):
            yield {"type": "server_error"}


def _status_within(body: bytes) -> int:
    """Return the HTTP status equivalent to the error in an answer with a success status; 200 without an error."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return 200
    for error in _faults(data) if isinstance(data, dict) else ():
        given = [error.get(name) for name in ("code", "status", "type")] if isinstance(error, dict) else [error]
        found = [str(_NAMED.get(str(value), value)) for value in given]
        if (status := next((text for text in found if text.isascii() and text.isdigit()), None)) is not None:
            return int(status[:4])
    return 200


def _completion(data: dict[str, Any], protocol: str, attempts: int, key: str | None) -> Completion:
    """Build a Completion from the JSON of an answer; joined text is redacted again, as the key may have been split."""
    usage = counts_of(data)
    common = {
        **{name: usage.get(name) for name in ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens")},
        "cost_usd": usage.get("cost_usd"),
        "model": name_of(data.get("model")),
        "provider": name_of(data.get("provider")),
        "attempts": attempts,
        "raw": data,
    }
    if protocol == "anthropic":
        text, reasoning = blocks_text(data["content"])
        finish, scores = data.get("stop_reason"), _scores(None, key)
    else:
        choice = data["choices"][0]
        text, reasoning = (choice["text"] or "", "") if "text" in choice else message_text(choice["message"])
        refused = bool((choice.get("message") or {}).get("refusal"))
        finish = REFUSAL if refused else choice.get("finish_reason")
        scores = _scores(choice.get("logprobs"), key)
    text = redacted(text + "", key)
    if protocol != "openai-completions":
        text, tagged = without_thinking(text)
        reasoning += tagged
    return Completion(text=text, finish=reason_of(finish), reasoning=redacted(reasoning, key), **scores, **common)


def _scores(given: Any, key: str | None) -> dict[str, Any]:
    """Return tokens and log-probabilities of a choice from the chat or the completions form; None where absent.

    Raises TypeError for columns of the wrong type.
    """
    if not given:
        return dict.fromkeys(_COLUMNS)
    if given.get("content") is not None:
        content = given["content"]
        top = [{one["token"]: one["logprob"] for one in token.get("top_logprobs") or []} for token in content]
        columns = ([t["token"] for t in content], [t["logprob"] for t in content], top if any(top) else None, None)
    else:
        top = given.get("top_logprobs")
        top = [one or {} for one in top] if top else None
        columns = (given.get("tokens"), given.get("token_logprobs"), top, given.get("text_offset"))
    found = {name: None if column is None else tuple(column) for name, column in zip(_COLUMNS, columns, strict=True)}
    if any(not isinstance(one, _COLUMNS[name]) for name, column in found.items() for one in column or ()):
        raise TypeError("logprobs")
    tokens: Any = found["tokens"]
    return found | ({"tokens": tuple(redacted_parts(tokens, key))} if tokens else {})
