"""Endpoint: a model behind a URL, and the requests that its protocol needs."""

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
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import httpx

from mixlens.endpoints.protocols import blocks_text, message_text, usage_of, without_thinking
from mixlens.errors import BadInput, EndpointError

Messages = Sequence[Mapping[str, Any]]

# Path of each protocol, appended to the endpoint's URL.
PATHS = {
    "openai-chat": "/chat/completions",
    "openai-completions": "/completions",
    "anthropic": "/messages",
    "modelslab": "/chat/completions",
}
# Names of the same model with different providers.
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

# Names whose last word marks the value as a secret, such as X-RapidAPI-Key and apiKey. A cache key is not a secret.
_SECRET = re.compile(
    r"(?:^|[-_]|(?<=[a-z])(?=[A-Z]))(?<!(?i:cache)[-_])"
    r"(?i:api[-_]?keys?|key|token|secret|password|passwd|passphrase|credentials?|bearer|auth|authorization|cookie)$"
)
# Values that look like a secret under any name.
_KEY_LIKE = re.compile(r"\s*(?:(?i:bearer|basic)\s+\S{8,}|(?:sk-|hf_)[\w-]{16,})\s*")

_FOR_NOW = {408, 409, 429}
_TOO_MANY = 429
_RESETS = ("x-ratelimit-reset-requests", "x-ratelimit-reset-tokens", "x-ratelimit-reset", "ratelimit-reset")
_SINCE_1970, _MILLISECONDS = 1e9, 1e11
_LONGEST_WAIT_S = 60.0
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


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


@dataclass(frozen=True)
class Endpoint:
    """A model behind a URL.

    Creating an endpoint sends no request and reads no key.

    Parameters
    ----------
    url : str
        Base URL up to the API version, such as "http://127.0.0.1:8000/v1". A URL that already ends in the path of the
        protocol is used unchanged.
    model : str
        Name of the model on the server.
    protocol : {"openai-chat", "openai-completions", "anthropic", "modelslab"}, optional
        Request format: OpenAI chat or text completions, Anthropic Messages, or ModelsLab's own body with ``model_id``.
    key_env : str, optional
        Name of the environment variable that holds the API key. Every request reads the variable and sends the key as
        "Authorization: Bearer ..." ("modelslab": in the body). The key is never written to disk.
    extra : Mapping[str, Any], optional
        Additional fields of the request body, such as {"temperature": 0}. A value of None removes the field from the
        body.
    headers : Mapping[str, str], optional
        Additional headers, such as {"X-Title": "mixlens"}.
    context : int, optional
        Context length in tokens, if known.
    max_tries : int, optional
        How often a call that is not timed is sent in all, after temporary failures (408, 409, 5xx), lost connections
        and timeouts.
    patience_s : float, optional
        Seconds that such a call waits in all for a rate limit (429) to pass: as long as the server asks for, else 1,
        2, 4 ... and at most 60 seconds at a time.

    Raises
    ------
    BadInput
        If the URL is not an http(s) address or contains a secret, the protocol is unknown, a header or a field at any
        depth seems to hold a key, `extra` cannot be represented as JSON, or the key would leave this machine
        unencrypted.

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
    max_tries: int = field(default=5, kw_only=True)
    patience_s: float = field(default=900.0, kw_only=True)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url if isinstance(self.url, str) else "")
            host, _ = parts.hostname, parts.port
        except ValueError:
            parts, host = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not host:
            raise BadInput(
                f"Cannot use {self.url!r} as an endpoint: it is not an http or https address. Pass a URL such as "
                '"http://127.0.0.1:8000/v1".',
                argument="url",
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise BadInput(
                f"Cannot use the URL of {host}: it contains a user name, a password, a query or a fragment, and run "
                "directories store the URL. Pass the plain address, and the key with key_env=.",
                argument="url",
                value=host,
            )
        if not isinstance(self.model, str) or not self.model:
            raise BadInput(
                f"Cannot use the endpoint at {host} with model={self.model!r}: a request must name a model. Pass one "
                "of the names that `mixlens models URL` lists.",
                argument="model",
                value=self.model,
            )
        if self.protocol not in PATHS:
            raise BadInput(
                f"Unknown protocol {self.protocol!r}. Pass one of {', '.join(PATHS)}.",
                argument="protocol",
                value=self.protocol,
            )
        if not (isinstance(self.max_tries, int) and self.max_tries >= 1 and self.patience_s >= 0):
            raise BadInput(
                f"Cannot use the endpoint at {host} with max_tries={self.max_tries} and patience_s={self.patience_s}. "
                "Pass a whole number from 1 and a number of seconds from 0.",
                argument="max_tries" if not (isinstance(self.max_tries, int) and self.max_tries >= 1) else "patience_s",
                value=(self.max_tries, self.patience_s),
            )
        if secret := [*_secrets(self.headers), *_secrets(self.extra)]:
            raise BadInput(
                f"Cannot use the endpoint at {host} with {secret[0]!r} in its headers or fields: it seems to hold a "
                "secret, and run directories store these values. Store the key in an environment variable and pass "
                "the variable's name with key_env=.",
                argument=secret[0],
            )
        if wrong := [
            n
            for n, v in self.headers.items()
            if not (isinstance(v, str) and re.fullmatch(r"[!-9;-~]+", n) and v.isprintable() and v.isascii())
        ]:
            raise BadInput(
                f"Cannot use the endpoint at {host} with the header {wrong[0]!r}: its name or value contains "
                "characters that HTTP does not allow. Use printable ASCII.",
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
                f"Cannot send the key from {self.key_env} to {host}: http does not encrypt it. Use an https URL.",
                argument="url",
                value=parts.scheme,
            )

    def __repr__(self) -> str:
        return f"Endpoint({', '.join(f'{name}={value!r}' for name, value in self.plan().items())})"

    @property
    def host(self) -> str:
        """Host name of the server."""
        return urlsplit(self.url).hostname or ""

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def address(self) -> str:
        """URL that requests are sent to."""
        base, path = self.url.rstrip("/"), PATHS[self.protocol]
        return base if base.endswith(path) else base + path

    def key(self) -> str | None:
        """Read the API key from the environment.

        Returns
        -------
        str or None
            The key; None if the endpoint has no `key_env`.

        Raises
        ------
        BadInput
            If the variable is not set or its value cannot be a key. The message does not quote the value.

        Examples
        --------
        >>> ml.Endpoint("http://127.0.0.1:8000/v1", model="mixtral").key() is None
        True
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise BadInput(
                f"Cannot send a request to {self.host}: it needs a key, and the environment variable {self.key_env} "
                "is not set. Set it in the shell that starts Python; mixlens reads keys from nowhere else.",
                argument="key_env",
                value=self.key_env,
            )
        if not re.fullmatch(r"[!-~]{8,}", key):
            raise BadInput(
                f"Cannot send a request to {self.host}: the value of {self.key_env} cannot be a key, because it is "
                "shorter than 8 characters or contains blanks or non-ASCII characters. Set the variable to the key "
                "alone.",
                argument="key_env",
                value=self.key_env,
            )
        return key

    def request(
        self, prompt: str | Messages, *, max_tokens: int, key: str | None = None, stream: bool = True
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Build the headers and the body of a request without sending it.

        Parameters
        ----------
        prompt : str or Messages
            A text, or messages of {"role", "content"}.
        max_tokens : int
            Maximum number of tokens in the answer.
        key : str, optional
            API key to include; None sends no key.
        stream : bool, optional
            Whether to stream the answer.

        Returns
        -------
        tuple[dict[str, str], dict[str, Any]]
            Headers and body.

        Raises
        ------
        BadInput
            If `prompt` is a list of messages and the protocol is "openai-completions", which takes a text, or if the
            list is empty or a message has no role.

        Examples
        --------
        >>> endpoint = ml.Endpoint("http://127.0.0.1:8000/v1", model="mixtral")
        >>> headers, body = endpoint.request("Hello", max_tokens=8, stream=False)
        >>> body["messages"]
        [{'role': 'user', 'content': 'Hello'}]
        """
        headers, secret = self.key_fields(key)
        headers = {"Accept-Encoding": "identity", **headers}
        headers["Accept"] = "text/event-stream, application/json" if stream else "application/json"
        body: dict[str, Any] = {"model": self.model, "stream": stream, "max_tokens": max_tokens}
        if self.protocol == "openai-completions":
            if not isinstance(prompt, str):
                raise BadInput(
                    f"Cannot send messages to {self.host}: its protocol, openai-completions, takes a single text. "
                    'Pass a string, or create the endpoint with protocol="openai-chat".',
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
        """Build the headers and body fields that every request needs, with the key.

        Parameters
        ----------
        key : str or None
            API key to include; None sends no key.

        Returns
        -------
        tuple[dict[str, str], dict[str, str]]
            Headers, and fields of the body. The key is in the headers, or in the body for "modelslab".

        Examples
        --------
        >>> ml.Endpoint("http://127.0.0.1:8000/v1", model="mixtral").key_fields("some-key")
        ({'Authorization': 'Bearer some-key'}, {})
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
        retries: int | None = None,
        client: httpx.Client | None = None,
        **fields: Any,
    ) -> Completion:
        r"""Request the complete answer to a text or to messages.

        The answer is not streamed. Use this method for evaluations and `ml.benchmark` for timing. Log-probabilities
        that the server does not return are None. The method is safe to call from several threads.

        Parameters
        ----------
        prompt : str or Messages
            A text, or messages of {"role", "content"}.
        max_tokens : int, optional
            Maximum number of tokens in the answer; 0 together with `echo` only scores the prompt.
        logprobs : int, optional
            Request the log-probability of every token and of this number of alternatives (0 for no alternatives).
            None requests no log-probabilities.
        echo : bool, optional
            Start the answer with the prompt, with log-probabilities of its tokens too ("openai-completions").
        retries : int, optional
            How often to retry after a temporary failure, a lost connection or a timeout; None for the endpoint's
            `max_tries` less one. Waiting for a rate limit to pass is bounded by the endpoint's `patience_s` instead.
        client : httpx.Client, optional
            Client to use, so that many calls share connections. By default every call creates its own.
        **fields : Any
            Additional fields of the body, such as temperature=0 or stop=["\n"]. They override the endpoint's `extra`,
            except where that removes a field.

        Returns
        -------
        Completion

        Raises
        ------
        EndpointError
            If the server gives no usable answer.
        BadInput
            If the protocol does not support the request.

        Examples
        --------
        >>> endpoint = ml.Endpoint("http://127.0.0.1:8000/v1", model="mixtral")
        >>> endpoint.complete("2 + 2 =", max_tokens=4, temperature=0).text  # doctest: +SKIP
        """
        asked = {"max_tokens": max_tokens, "logprobs": logprobs, "echo": echo, **fields}
        return complete(self, prompt, asked, retries=retries, client=client)

    def models(self) -> list[dict[str, Any]]:
        """List the models of the server.

        Returns
        -------
        list[dict[str, Any]]
            One dict per model, as the server describes it, with its name under "id".

        Raises
        ------
        EndpointError
            If the server does not return a list.

        Examples
        --------
        >>> ml.Endpoint.openrouter().models()  # doctest: +SKIP
        """
        return list_models(self)

    def count_tokens(self, prompt: str | Messages) -> int:
        """Count the input tokens of a request on the server.

        Requires protocol="anthropic", which vLLM and ModelsLab serve.

        Parameters
        ----------
        prompt : str or Messages
            A text, or messages of {"role", "content"}.

        Returns
        -------
        int
            Number of input tokens.

        Raises
        ------
        EndpointError
            If the server does not return a count.
        BadInput
            If the protocol has no call for counting tokens.

        Examples
        --------
        >>> ml.Endpoint.modelslab(protocol="anthropic").count_tokens("Hello")  # doctest: +SKIP
        """
        return count_tokens(self, prompt)

    def plan(self) -> dict[str, Any]:
        """Return the fields that a run directory stores.

        Returns
        -------
        dict[str, Any]
            All fields. "[key]" replaces the API key wherever it occurs.

        Examples
        --------
        >>> ml.Endpoint("http://127.0.0.1:8000/v1", model="mixtral").plan()["model"]
        'mixtral'
        """
        kept = {"url": self.url, "model": self.model, "protocol": self.protocol, "context": self.context}
        kept |= {"key_env": self.key_env, "extra": dict(self.extra), "headers": dict(self.headers)}
        key = os.environ.get(self.key_env or "", "").strip()
        return json.loads(redacted(json.dumps(kept), key)) if key else kept

    @classmethod
    def openrouter(
        cls, model: str = "mistralai/mixtral-8x7b-instruct", *, providers: Sequence[str] = (), **fields: Any
    ) -> Endpoint:
        """Create an endpoint at OpenRouter, with its key in ``OPENROUTER_API_KEY``.

        Parameters
        ----------
        model : str, optional
            Name of the model at OpenRouter, or one of its known aliases.
        providers : Sequence[str], optional
            The only providers that may answer, such as "deepinfra"; empty for any provider.
        **fields : Any
            Other parameters of Endpoint.

        Returns
        -------
        Endpoint

        Examples
        --------
        >>> ml.Endpoint.openrouter(providers=["deepinfra"]).extra
        {'provider': {'only': ['deepinfra'], 'allow_fallbacks': False}}
        """
        model = canonical(model)
        pinned = {"provider": {"only": list(providers), "allow_fallbacks": False}} if providers else {}
        fields = {"key_env": "OPENROUTER_API_KEY", "context": CONTEXTS.get(model), **fields}
        fields["extra"] = {**pinned, **fields.get("extra", {})}
        return cls("https://openrouter.ai/api/v1", model=model, **fields)

    @classmethod
    def deepinfra(cls, model: str = "mistralai/Mixtral-8x7B-Instruct-v0.1", **fields: Any) -> Endpoint:
        """Create an endpoint at DeepInfra's OpenAI-compatible address, with its key in ``DEEPINFRA_API_KEY``.

        Parameters
        ----------
        model : str, optional
            Name of the model on the Hugging Face Hub.
        **fields : Any
            Other parameters of Endpoint.

        Returns
        -------
        Endpoint

        Examples
        --------
        >>> ml.Endpoint.deepinfra().host
        'api.deepinfra.com'
        """
        fields = {"key_env": "DEEPINFRA_API_KEY", "context": CONTEXTS.get(canonical(model)), **fields}
        return cls("https://api.deepinfra.com/v1/openai", model=model, **fields)

    @classmethod
    def modelslab(cls, model: str = "mistralai-mixtral-8x7b-instruct", **fields: Any) -> Endpoint:
        """Create an endpoint at ModelsLab, with its key in ``MODELSLAB_API_KEY``.

        Requests use ModelsLab's own body unless `protocol` is "openai-chat" or "anthropic".

        Parameters
        ----------
        model : str, optional
            Name of the model at ModelsLab.
        **fields : Any
            Other parameters of Endpoint.

        Returns
        -------
        Endpoint

        Examples
        --------
        >>> ml.Endpoint.modelslab().protocol
        'modelslab'
        """
        fields = {
            "key_env": "MODELSLAB_API_KEY",
            "protocol": "modelslab",
            "context": CONTEXTS.get(canonical(model)),
        } | fields
        base = "https://modelslab.com/api/v7/llm"
        return cls(base + "/v1" if fields["protocol"] == "anthropic" else base, model=model, **fields)


# Presets of the command line, by name.
PRESETS = {"openrouter": Endpoint.openrouter, "deepinfra": Endpoint.deepinfra, "modelslab": Endpoint.modelslab}


def redacted(text: str, key: str | None) -> str:
    """Replace the key, plain or JSON-escaped, by "[key]". Call this before shortening the text."""
    if key is None:
        return text
    escaped = json.dumps(key)[1:-1]
    for form in (escaped.replace("/", "\\/"), escaped, key):
        text = text.replace(form, "[key]")
    return text


def canonical(model: str) -> str:
    """Return the canonical name of a model that has several names; unknown names are returned unchanged."""
    found = (name for name, others in ALIASES.items() if model.lower() in (name, *others))
    return next(found, model)


def _secrets(value: Any, path: str = "", *, named: bool = False) -> Iterator[str]:
    """Yield the paths of values that may be secrets, judged by their own name or that of an enclosing field."""
    if isinstance(value, Mapping):
        # "properties" maps the field names of a tool or a schema to their types, so these names mark no secrets.
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
    """Return the body fields that hold the conversation."""
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


# ---------------------------------------------------------------------- calls that are retried and not timed


def complete(
    endpoint: Endpoint,
    prompt: str | Messages,
    asked: Mapping[str, Any],
    *,
    retries: int | None = None,
    client: httpx.Client | None = None,
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
        return _completion(data, endpoint.protocol, attempts)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
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


def get_json(url: str) -> Any:
    """Fetch JSON from a public URL. Raises EndpointError if that fails, and BadInput for an invalid URL."""
    endpoint = Endpoint(url, model="-")
    return _answer(endpoint, ("GET", url), {}, None)[0]


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


def client_of(endpoint: Endpoint, **options: Any) -> httpx.Client:
    """A client for calls that are not timed. Raises BadInput for a proxy of the environment that cannot be used."""
    try:
        return httpx.Client(timeout=_TIMEOUT, trust_env=not endpoint.is_local, **options)
    except (ImportError, ValueError) as error:
        raise no_proxy(endpoint, error) from error


def no_proxy(endpoint: Endpoint, error: Exception) -> BadInput:
    """What to raise where httpx cannot use the proxy that the environment names."""
    names = [name for name in os.environ if name.lower() in ("all_proxy", "http_proxy", "https_proxy")]
    return BadInput(
        f"Cannot reach {endpoint.host} through the proxy of {', '.join(sorted(names)) or 'the environment'}: {error}. "
        "Use an http:// or socks5:// proxy (the latter with pip install 'httpx[socks]'), or unset the variable.",
        argument="proxy",
        value=sorted(names),
    )


def _answer(
    endpoint: Endpoint,
    where: tuple[str, str],
    headers: Mapping[str, str],
    body: Mapping[str, Any] | None,
    *,
    retries: int | None = None,
    client: httpx.Client | None = None,
) -> tuple[Any, int]:
    """Send a request, with retries, and return the JSON of the answer and the number of attempts."""
    method, address = where
    key = endpoint.key()
    tries = endpoint.max_tries if retries is None else max(retries, 0) + 1
    found, status, attempt, failures, limits, waited = "nothing", None, 0, 0, 0, 0.0
    with nullcontext(client) if client else client_of(endpoint) as http:
        while True:
            attempt += 1
            wait = min(0.5 * 2**failures, _LONGEST_WAIT_S)
            limited = False
            try:
                response = http.request(method, address, headers=dict(headers), json=body)
            except httpx.RequestError as error:
                found = redacted(f"{type(error).__name__}: {error}".removesuffix(": "), key)
            else:
                good, found = _read(response, key)
                status = response.status_code
                if good is not None:
                    return good, attempt
                if status not in _FOR_NOW and status < 500:
                    break
                limited = status == _TOO_MANY
                wait = _asked_wait(response, min(2.0**limits, _LONGEST_WAIT_S) if limited else wait)
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


def _read(response: httpx.Response, key: str | None) -> tuple[Any, str]:
    """Return the JSON of a good answer, else None, and a description of the failure; neither contains the key."""
    try:
        data = json.loads(redacted(response.content.decode("utf-8-sig"), key))
    except (ValueError, RecursionError):
        data = None
    if response.status_code < 300 and data is not None and not _failed(data):
        return data, ""
    if 300 <= response.status_code < 400:
        place = redacted(response.headers.get("location", "nowhere"), key)
        return None, f"status {response.status_code}, a redirection to {place}; pass that address as the URL"
    said = json.dumps(data) if data is not None else " ".join(redacted(response.text, key).split())
    return None, f"status {response.status_code}, {said[:300] or 'an empty body'}"


def _failed(data: Any) -> bool:
    """Return whether an answer reports an error, at the top or in a choice, where OpenRouter puts provider errors."""
    if not isinstance(data, dict):
        return False
    choices = data["choices"] if isinstance(data.get("choices"), list) else []
    broken = (c for c in choices if isinstance(c, dict) and (c.get("error") or c.get("finish_reason") == "error"))
    return bool(data.get("error")) or data.get("status") == "error" or any(broken)


def _asked_wait(response: httpx.Response, otherwise: float) -> float:
    """Return the seconds that a server asks to wait, in any form that servers use, capped; else `otherwise`."""
    given = {name.lower(): value for name, value in response.headers.items()}
    try:
        inner = response.json()["error"]["metadata"]["headers"]  # OpenRouter hands on what a provider said
        given = {str(name).lower(): str(value) for name, value in inner.items()} | given
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0), *((name, 1.0) for name in _RESETS)):
        seconds = _seconds(given.get(name))
        if seconds is not None:
            return min(max(seconds * scale, 0.0), _LONGEST_WAIT_S)
    return otherwise


def _seconds(value: str | None) -> float | None:
    """Seconds from now of "20", "6m0.5s", a date, or a time since 1970 in seconds or milliseconds."""
    if not value:
        return None
    try:
        number = float(value)
    except ValueError:
        if parts := re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m(?!s))?(?:([\d.]+)s)?(?:([\d.]+)ms)?", value.strip()):
            return sum(float(p or 0) * s for p, s in zip(parts.groups(), (3600, 60, 1, 1e-3), strict=True))
        try:
            return parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    if not math.isfinite(number):
        return None
    since = number / 1000 if number > _MILLISECONDS else number
    return since - time.time() if since > _SINCE_1970 else number


def _completion(data: dict[str, Any], protocol: str, attempts: int) -> Completion:
    """Build a Completion from the JSON of an answer."""
    usage = usage_of(data.get("usage"))
    common = {
        **{name: usage.get(name) for name in ("input_tokens", "output_tokens", "cached_tokens", "reasoning_tokens")},
        "cost_usd": usage.get("cost_usd"),
        "model": data.get("model"),
        "provider": data.get("provider"),
        "attempts": attempts,
        "raw": data,
    }
    if protocol == "anthropic":
        text, reasoning = blocks_text(data["content"])
        scores = dict.fromkeys(("tokens", "logprobs", "top_logprobs", "offsets"))
        return Completion(text=text, finish=data.get("stop_reason"), reasoning=reasoning, **scores, **common)
    choice = data["choices"][0]
    if "text" in choice:
        text, reasoning = choice["text"] or "", ""
    else:
        text, thought = message_text(choice["message"])
        text, tagged = without_thinking(text)
        reasoning = thought + tagged
    return Completion(
        text=text,
        finish=choice.get("finish_reason"),
        reasoning=reasoning,
        **_scores(choice.get("logprobs")),
        **common,
    )


def _scores(given: Any) -> dict[str, Any]:
    """Return tokens and log-probabilities of a choice from the chat or the completions form; None where absent."""
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
