"""Endpoint: a model behind a URL, and the requests of its protocol."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from mixlens.endpoints.calls import Completion, complete, count_tokens, list_models
from mixlens.endpoints.keys import is_variable, redacted, secret_fields
from mixlens.endpoints.protocols import PATHS, ROUTING, Messages
from mixlens.endpoints.transport import Client
from mixlens.errors import BadInput

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
    routing : bool, optional
        Request the experts of every token, which vLLM and SGLang return if started with
        ``--enable-return-routed-experts`` (protocols "openai-chat" and "openai-completions").
    max_tries : int, optional
        Maximum number of times that an untimed call is sent. Temporary failures (408, 409, 5xx), lost connections and
        timeouts are retried.
    patience_s : float, optional
        Maximum total seconds that an untimed call waits for rate limits (429) to pass. Each wait is as long as the
        server requests, else 1, 2, 4 ... seconds, and at most 60 seconds.
    deadline_s : float, optional
        Maximum seconds for the answer to an untimed call. Benchmarks use `BenchSettings(timeouts=)` instead.

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
    routing: bool = field(default=False, kw_only=True)
    max_tries: int = field(default=5, kw_only=True)
    patience_s: float = field(default=900.0, kw_only=True)
    deadline_s: float = field(default=600.0, kw_only=True)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url if isinstance(self.url, str) else "")
            host, _ = parts.hostname, parts.port
            httpx.URL(parts.geturl())
        except (ValueError, httpx.InvalidURL):
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
                f"Cannot use the endpoint at {host} with model={self.model!r}: a model name is required. Pass one "
                "of the names listed by `mixlens models URL`.",
                argument="model",
                value=self.model,
            )
        if self.protocol not in PATHS:
            raise BadInput(
                f"Unknown protocol {self.protocol!r}. Pass one of {', '.join(PATHS)}.",
                argument="protocol",
                value=self.protocol,
            )
        if self.routing and not self.protocol.startswith("openai"):
            raise BadInput(
                f"Cannot request routing from {host} with the protocol {self.protocol}: servers return it only in "
                'OpenAI\'s formats. Pass protocol="openai-completions" or "openai-chat".',
                argument="routing",
                value=self.protocol,
            )
        if not (isinstance(self.max_tries, int) and self.max_tries >= 1 and self.patience_s >= 0):
            raise BadInput(
                f"Cannot use the endpoint at {host} with max_tries={self.max_tries} and patience_s={self.patience_s}. "
                "Pass a whole number of at least 1 and a number of seconds of at least 0.",
                argument="max_tries" if not (isinstance(self.max_tries, int) and self.max_tries >= 1) else "patience_s",
                value=(self.max_tries, self.patience_s),
            )
        if not (isinstance(self.deadline_s, int | float) and self.deadline_s > 0):
            raise BadInput(
                f"Cannot use the endpoint at {host} with deadline_s={self.deadline_s}. Pass a number above 0.",
                argument="deadline_s",
                value=self.deadline_s,
            )
        if self.key_env is not None and not is_variable(self.key_env):
            raise BadInput(
                f"Cannot use the endpoint at {host}: key_env is not the name of a variable, and may be the key "
                'itself. Store the key in a variable and pass its name, as in key_env="MY_API_KEY".',
                argument="key_env",
            )
        if secret := [*secret_fields(self.headers), *secret_fields(self.extra)]:
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
        """True if the server runs on this machine."""
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
                "shorter than 8 characters or contains blanks or non-ASCII characters. Set the variable to the "
                "key only.",
                argument="key_env",
                value=self.key_env,
            )
        return key

    def request(
        self, prompt: str | Messages | Sequence[int], *, max_tokens: int, key: str | None = None, stream: bool = True
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Build the headers and the body of a request without sending it.

        Parameters
        ----------
        prompt : str or Messages or Sequence[int]
            A text, messages of {"role", "content"}, or token ids ("openai-completions").
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
        headers["Accept"] = "text/event-stream, application/json" if stream else "application/json"
        body: dict[str, Any] = {"model": self.model, "stream": stream, "max_tokens": max_tokens}
        if self.protocol == "openai-completions":
            if not isinstance(prompt, str) and not all(isinstance(token, int) for token in prompt):
                raise BadInput(
                    f"Cannot send messages to {self.host}: its protocol, openai-completions, takes a single text. "
                    'Pass a string, or create the endpoint with protocol="openai-chat".',
                    argument="prompt",
                    value=self.protocol,
                )
            body["prompt"] = prompt
        else:
            body |= _messages(prompt, self.protocol)
        if self.routing:
            body |= ROUTING
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
        prompt: str | Messages | Sequence[int],
        *,
        max_tokens: int = 256,
        logprobs: int | None = None,
        echo: bool = False,
        retries: int | None = None,
        client: Client | None = None,
        **fields: Any,
    ) -> Completion:
        r"""Request the complete answer to a text or to messages.

        The answer is not streamed. Use this method for evaluations and `ml.benchmark` for timing. Log-probabilities
        that the server does not return are None. The method is safe to call from several threads.

        Parameters
        ----------
        prompt : str or Messages or Sequence[int]
            A text, messages of {"role", "content"}, or token ids ("openai-completions").
        max_tokens : int, optional
            Maximum number of tokens in the answer; 0 together with `echo` only scores the prompt.
        logprobs : int, optional
            Request the log-probability of every token and of this number of alternatives (0 for no alternatives).
            None requests no log-probabilities.
        echo : bool, optional
            Start the answer with the prompt, with log-probabilities of its tokens too ("openai-completions").
        retries : int, optional
            Number of retries after a temporary failure, a lost connection or a timeout. By default `max_tries` minus
            one. Rate limits are not counted; `patience_s` bounds the time spent waiting for them.
        client : Client, optional
            Client from `connect`, so that many calls share connections. By default every call opens its own.
        **fields : Any
            Additional fields of the body, such as temperature=0 or stop=["\n"]. They override the endpoint's `extra`,
            except fields that `extra` removes.

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

    def connect(self) -> Client:
        """Open connections that many calls can share.

        Returns
        -------
        Client
            For `complete(client=)`; closed at the end of a `with` block.

        Examples
        --------
        >>> with ml.Endpoint("http://127.0.0.1:8000/v1", model="mixtral").connect() as client:
        ...     pass
        """
        return Client(self)

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
        kept |= {"routing": True} if self.routing else {}
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


def canonical(model: str) -> str:
    """Return the canonical name of a model that has several names; unknown names are returned unchanged."""
    found = (name for name, others in ALIASES.items() if model.lower() in (name, *others))
    return next(found, model)


def same_model(answered: str, asked: str) -> bool:
    """Check whether two names refer to the same model; transformers serve appends the revision, as in name@main."""
    return canonical(asked) in (canonical(answered), canonical(answered.rpartition("@")[0]))


def _messages(prompt: Any, protocol: str) -> dict[str, Any]:
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
