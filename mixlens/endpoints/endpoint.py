"""Endpoint: a model behind a URL, and how it wants to be asked. Making one sends nothing and reads no key."""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from mixlens.errors import BadInput, EndpointError

Messages = Sequence[Mapping[str, Any]]

# Where each protocol is spoken, below the endpoint's URL.
PATHS = {
    "openai-chat": "/chat/completions",
    "openai-completions": "/completions",
    "anthropic": "/messages",
    "modelslab": "/chat/completions",
}
# What the same model is called in different places.
ALIASES = {
    "mistralai/mixtral-8x7b-instruct": (
        "mistral/mixtral-8x7b-instruct",
        "mistralai-mixtral-8x7b-instruct",
        "mistralai/mixtral-8x7b-instruct-v0.1",
    ),
    "mistralai/mixtral-8x22b-instruct": (
        "mistral/mixtral-8x22b-instruct",
        "mistralai-mixtral-8x22b-instruct",
        "mistralai/mixtral-8x22b-instruct-v0.1",
    ),
}
CONTEXTS = {"mistralai/mixtral-8x7b-instruct": 32_768, "mistralai/mixtral-8x22b-instruct": 65_536}

# Names whose last word says that the value is a secret, as X-RapidAPI-Key and apiKey; a cache key is none.
_SECRET = re.compile(
    r"(?:^|[-_]|(?<=[a-z])(?=[A-Z]))(?<!(?i:cache)[-_])"
    r"(?i:api[-_]?keys?|key|token|secret|password|passwd|passphrase|credentials?|bearer|auth|authorization|cookie)$"
)
# A value that is a secret, whatever it is called.
_KEY_LIKE = re.compile(r"\s*(?:(?i:bearer|basic)\s+\S{8,}|(?:sk-|hf_)[\w-]{16,})\s*")

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


@dataclass(frozen=True)
class Endpoint:
    """A model behind a URL. Making one sends nothing and reads no key.

    Parameters
    ----------
    url : str
        Up to the version, as in "http://127.0.0.1:8000/v1"; the address of the protocol itself is taken as it is.
    model : str, optional
        The name that the server knows it by.
    protocol : str, optional
        "openai-chat", "openai-completions", "anthropic" (Messages), or "modelslab" (its own body, with model_id).
    key_env : str, optional
        Name of the environment variable that holds the key, or None. It is read when a request is made, sent as
        "Authorization: Bearer ..." (by "modelslab" in the body), and written nowhere.
    extra : Mapping[str, Any], optional
        More fields of the body, such as {"temperature": 0}; None leaves out a field that would be sent.
    headers : Mapping[str, str], optional
        More headers, such as {"X-Title": "mixlens"}.
    context : int, optional
        Tokens of the context, where known.

    Raises
    ------
    BadInput
        For a URL that is no http(s) address or carries a secret, for a protocol that is not known, for headers or
        fields, however deep inside, that would hold a key, for fields that are no JSON, and for a key that would
        leave this machine unencrypted.

    Examples
    --------
    >>> endpoint = ml.Endpoint("http://127.0.0.1:8000/v1", model="mixtral")
    >>> endpoint.address
    'http://127.0.0.1:8000/v1/chat/completions'
    """

    url: str
    model: str = field(kw_only=True)
    protocol: str = field(default="openai-chat", kw_only=True)
    key_env: str | None = field(default=None, kw_only=True)
    extra: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    headers: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    context: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url if isinstance(self.url, str) else "")
            host, _ = parts.hostname, parts.port
        except ValueError:
            parts, host = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not host:
            raise BadInput(
                f"Cannot use {self.url!r} as an endpoint: not an http or https address. Pass one such as "
                '"http://127.0.0.1:8000/v1".',
                argument="url",
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise BadInput(
                f"Cannot use the URL of {host}: it contains a user, a password or a query, which would be written "
                "into run directories. Pass the plain address, and the key by key_env=.",
                argument="url",
                value=host,
            )
        if not isinstance(self.model, str) or not self.model:
            raise BadInput(
                f"Cannot use the endpoint at {host} with model={self.model!r}: a request must name a model. Pass the "
                "server's name for it, as listed by `mixlens models URL`.",
                argument="model",
                value=self.model,
            )
        if self.protocol not in PATHS:
            raise BadInput(
                f"Cannot use the protocol {self.protocol!r}: it does not exist. Pass one of {', '.join(PATHS)}.",
                argument="protocol",
                value=self.protocol,
            )
        if secret := [*_secrets(self.headers), *_secrets(self.extra)]:
            raise BadInput(
                f"Cannot use the endpoint at {host} with {secret[0]!r} in its headers or fields: they are written "
                "into run directories, where a key must never be. Name the environment variable that holds the key "
                "by key_env=.",
                argument=secret[0],
            )
        if wrong := [
            n
            for n, v in self.headers.items()
            if not (isinstance(v, str) and re.fullmatch(r"[!-9;-~]+", n) and v.isprintable() and v.isascii())
        ]:
            raise BadInput(
                f"Cannot use the endpoint at {host} with the header {wrong[0]!r}: HTTP does not allow some characters "
                "of its name or value. Use printable ASCII.",
                argument=wrong[0],
            )
        try:
            json.dumps(self.extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BadInput(
                f"Cannot send extra= to {host} as JSON: {error}. Pass a dict of plain numbers, strings, lists and "
                "dicts.",
                argument="extra",
            ) from error
        if self.key_env is not None and parts.scheme == "http" and not self.is_local:
            raise BadInput(
                f"Cannot send the key of {self.key_env} to {host}: over http anybody on the way could read it. Use "
                "https.",
                argument="url",
                value=parts.scheme,
            )

    def __repr__(self) -> str:
        return f"Endpoint({', '.join(f'{name}={value!r}' for name, value in self.plan().items())})"

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def is_local(self) -> bool:
        """Return whether the server is on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def address(self) -> str:
        """Return the address that requests go to."""
        base, path = self.url.rstrip("/"), PATHS[self.protocol]
        return base if base.endswith(path) else base + path

    def key(self) -> str | None:
        """Return the key from the environment; None for an endpoint without one.

        Raises
        ------
        BadInput
            If the variable is not set, or does not hold what could be a key. It is not quoted.
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise BadInput(
                f"A request to {self.host} needs a key. The environment variable {self.key_env} is not set. "
                "Set it in the shell that starts this; keys are taken from nowhere else.",
                argument="key_env",
                value=self.key_env,
            )
        if not re.fullmatch(r"[!-~]{8,}", key):
            raise BadInput(
                f"A request to {self.host} needs a key. What {self.key_env} holds is shorter than 8 characters, or has "
                "blanks or characters beyond ASCII. Set it to the key alone.",
                argument="key_env",
                value=self.key_env,
            )
        return key

    def request(
        self, prompt: str | Messages, *, max_tokens: int, key: str | None = None, stream: bool = True
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Return headers and body of a request for the answer to a text, or to messages of {"role", "content"}.

        Parameters
        ----------
        prompt : str or Messages
            A text, or messages of {"role", "content"}.
        max_tokens : int
            Tokens of the answer, at most.
        key : str, optional
            The key; None for none.
        stream : bool, optional
            Whether the answer is streamed.

        Raises
        ------
        BadInput
            For messages to "openai-completions", which takes a text.
        """
        headers, secret = self.key_fields(key)
        headers = {"Accept-Encoding": "identity", **headers}
        headers["Accept"] = "text/event-stream, application/json" if stream else "application/json"
        body: dict[str, Any] = {"model": self.model, "stream": stream, "max_tokens": max_tokens}
        if self.protocol == "openai-completions":
            if not isinstance(prompt, str):
                raise BadInput(
                    f"Cannot send messages to {self.host}: its protocol, openai-completions, takes a single text. "
                    'Pass a string, or make the endpoint with protocol="openai-chat".',
                    argument="prompt",
                    value=self.protocol,
                )
            body["prompt"] = prompt
        else:
            body |= _messages(prompt, self.protocol)
        if self.protocol.startswith("openai") and stream:
            body["stream_options"] = {"include_usage": True}
        if self.protocol == "modelslab":
            body["model_id"] = body.pop("model")
        return headers, {k: v for k, v in (body | dict(self.extra)).items() if v is not None} | secret

    def key_fields(self, key: str | None) -> tuple[dict[str, str], dict[str, str]]:
        """Return the headers of every call, with the key, and the body field in which "modelslab" takes it instead.

        Parameters
        ----------
        key : str or None
            The key; None for none.
        """
        headers = {**self.headers}
        if self.protocol == "anthropic":
            headers["anthropic-version"] = "2023-06-01"
        if key is not None and self.protocol == "modelslab":
            return headers, {"key": key}
        return headers | ({} if key is None else {"Authorization": f"Bearer {key}"}), {}

    def complete(
        self,
        prompt: str | Messages,
        *,
        max_tokens: int = 256,
        logprobs: int | None = None,
        echo: bool = False,
        retries: int = 4,
        client: httpx.Client | None = None,
        **fields: Any,
    ) -> Completion:
        r"""Request the whole answer to a text or to messages, not streamed: for evaluations, not for timing.

        Log-probabilities that the server did not give are None. Safe to call from several threads.

        Parameters
        ----------
        prompt : str or Messages
            A text, or messages of {"role", "content"}.
        max_tokens : int, optional
            At most; 0 with `echo` scores the prompt alone.
        logprobs : int, optional
            Log-probabilities of the tokens, and of so many alternatives each (0 for none); None does not ask.
        echo : bool, optional
            The answer begins with the prompt, whose tokens have log-probabilities too ("openai-completions").
        retries : int, optional
            How often a refusal for now (408, 409, 429, 5xx), a lost connection or a timeout is tried again, after
            the time that the server asks for, or 0.5, 1, 2 ... seconds, at most 60.
        client : httpx.Client, optional
            A client to use, so that many calls share connections; one is made for this call without.
        fields : Any
            More of the body, as temperature=0 or stop=["\n"]; they come before the endpoint's `extra`.

        Returns
        -------
        Completion

        Raises
        ------
        EndpointError
            If there is no answer.
        BadInput
            For what the protocol cannot ask.
        """
        asked = {"max_tokens": max_tokens, "logprobs": logprobs, "echo": echo, **fields}
        return complete(self, prompt, asked, retries=retries, client=client)

    def models(self) -> list[dict[str, Any]]:
        """Return the models that the server lists, as it describes them; each has an "id".

        Raises
        ------
        EndpointError
            If it gives no list.
        """
        return list_models(self)

    def count_tokens(self, prompt: str | Messages) -> int:
        """Return the number of input tokens of a request by the server's own count ("anthropic": vLLM, ModelsLab).

        Parameters
        ----------
        prompt : str or Messages
            A text, or messages of {"role", "content"}.

        Raises
        ------
        EndpointError
            If the server does not count.
        BadInput
            For a protocol that has no such call.
        """
        return count_tokens(self, prompt)

    def plan(self) -> dict[str, Any]:
        """Return what a run directory stores: everything but the key, "[key]" where a field holds it."""
        kept = {"url": self.url, "model": self.model, "protocol": self.protocol, "context": self.context}
        kept |= {"key_env": self.key_env, "extra": dict(self.extra), "headers": dict(self.headers)}
        key = os.environ.get(self.key_env or "", "").strip()
        return json.loads(redacted(json.dumps(kept), key)) if key else kept

    @classmethod
    def openrouter(
        cls, model: str = "mistralai/mixtral-8x7b-instruct", *, providers: Sequence[str] = (), **fields: Any
    ) -> Endpoint:
        """Return an OpenRouter endpoint; with `providers`, only these answer (such as "deepinfra").

        Parameters
        ----------
        model : str, optional
            A loaded model.
        providers : Sequence[str], optional
            The only providers that may answer, such as "deepinfra".
        fields : Any
            More fields of Endpoint.
        """
        model = canonical(model)
        pinned = {"provider": {"only": list(providers), "allow_fallbacks": False}} if providers else {}
        fields = {"key_env": "OPENROUTER_API_KEY", "context": CONTEXTS.get(model), **fields}
        fields["extra"] = {**pinned, **fields.get("extra", {})}
        return cls("https://openrouter.ai/api/v1", model=model, **fields)

    @classmethod
    def deepinfra(cls, model: str = "mistralai/Mixtral-8x7B-Instruct-v0.1", **fields: Any) -> Endpoint:
        """Return an endpoint at DeepInfra's OpenAI-compatible address; models go by their names on the Hub.

        Parameters
        ----------
        model : str, optional
            A loaded model.
        fields : Any
            More fields of Endpoint.
        """
        fields = {"key_env": "DEEPINFRA_API_KEY", "context": CONTEXTS.get(canonical(model)), **fields}
        return cls("https://api.deepinfra.com/v1/openai", model=model, **fields)

    @classmethod
    def modelslab(cls, model: str = "mistralai-mixtral-8x7b-instruct", **fields: Any) -> Endpoint:
        """Return a ModelsLab endpoint, with its own body unless `protocol` is "openai-chat" or "anthropic".

        Parameters
        ----------
        model : str, optional
            A loaded model.
        fields : Any
            More fields of Endpoint.
        """
        fields = {
            "key_env": "MODELSLAB_API_KEY",
            "protocol": "modelslab",
            "context": CONTEXTS.get(canonical(model)),
        } | fields
        base = "https://modelslab.com/api/v7/llm"
        return cls(base + "/v1" if fields["protocol"] == "anthropic" else base, model=model, **fields)


# By name, for the command line.
PRESETS = {"openrouter": Endpoint.openrouter, "deepinfra": Endpoint.deepinfra, "modelslab": Endpoint.modelslab}


def redacted(text: str, key: str | None) -> str:
    """The text with "[key]" for the key, as it is and as JSON writes it. To be called before the text is shortened."""
    if key is None:
        return text
    escaped = json.dumps(key)[1:-1]
    for form in (escaped.replace("/", "\\/"), escaped, key):
        text = text.replace(form, "[key]")
    return text


def canonical(model: str) -> str:
    """The one name of a model that goes by several; a name that is not known stays as it is."""
    found = (name for name, others in ALIASES.items() if model.lower() in (name, *others))
    return next(found, model)


def _secrets(value: Any, path: str = "", *, named: bool = False) -> Iterator[str]:
    """Where, inside the fields of a body, stands what may be a secret: by its name, or that of what holds it."""
    if isinstance(value, Mapping):
        # Below "properties" stand the names of a tool's or a schema's fields, and below these what they may hold.
        schema = path.rpartition(".")[2] == "properties"
        for name, inner in value.items():
            found = not schema and (named or bool(_SECRET.search(str(name))))
            yield from _secrets(inner, f"{path}.{name}" if path else str(name), named=found)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _secrets(inner, path, named=named)
    elif isinstance(value, str) and (named or _KEY_LIKE.fullmatch(value)):
        yield path


def _messages(prompt: str | Messages, protocol: str) -> dict[str, Any]:
    """The field, or fields, of a body that hold the conversation."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if not messages or not all("role" in message for message in messages):
        raise BadInput(
            f"Cannot send a request with {len(messages)} messages: the list is empty, or a message has no role. Pass "
            'at least one {"role": "user", "content": ...}.',
            argument="prompt",
            value=len(messages),
        )
    if protocol != "anthropic" or messages[0]["role"] != "system":
        return {"messages": messages}
    return {"system": messages[0]["content"], "messages": messages[1:]}


# ---------------------------------------------------------------------- calls that are not measured: these are retried


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
            f"Cannot read the completion of {endpoint.host}: its answer does not follow {endpoint.protocol}: "
            f"{json.dumps(data)[:200]}. Check the address of the server and pass the protocol that it speaks.",
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
            f"Cannot list the models of {endpoint.host}: its answer contains no list: {json.dumps(data)[:200]}. Take "
            "the name of the model from the server's documentation.",
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
            f"Cannot echo the prompt at {endpoint.host}: only openai-completions echoes, and the protocol is "
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
