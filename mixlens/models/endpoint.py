"""Endpoint: a model behind a URL, and how it wants to be asked. Making one sends nothing and reads no key."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mixlens.errors import BadInput

if TYPE_CHECKING:
    import httpx

    from mixlens.models.calls import Completion

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


@dataclass(frozen=True)
class Endpoint:
    """A model behind a URL.

    url       up to the version, as in "http://127.0.0.1:8000/v1"; the address of the protocol itself is taken as it is
    model     the name that the server knows it by
    protocol  "openai-chat", "openai-completions", "anthropic" (Messages), or "modelslab" (its own body, with model_id)
    key_env   name of the environment variable that holds the key, or None. It is read when a request is made, sent as
              "Authorization: Bearer ..." (by "modelslab" in the body), and written nowhere
    extra     more fields of the body, such as {"temperature": 0}; None leaves out a field that would be sent
    headers   more headers, such as {"X-Title": "mixlens"}
    context   tokens of the context, where known

    Raises BadInput for a URL that is no http(s) address or carries a secret, for a protocol that is not known, for
    headers or fields, however deep inside, that would hold a key, for fields that are no JSON, and for a key that would
    leave this machine unencrypted.
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
                f"An endpoint at {self.url!r} was asked for. That is no http or https address. "
                'Give one as "http://127.0.0.1:8000/v1".',
                argument="url",
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise BadInput(
                f"An endpoint at {host} was asked for. Its URL carries a user, a password or a query, which would be "
                "written into run directories. Give the plain address, and the key by key_env=.",
                argument="url",
                value=host,
            )
        if not isinstance(self.model, str) or not self.model:
            raise BadInput(
                f"An endpoint at {host} was asked for with model={self.model!r}. A request must name one. Give the "
                "name that the server has for it, as in `mixlens models URL`.",
                argument="model",
                value=self.model,
            )
        if self.protocol not in PATHS:
            raise BadInput(
                f"An endpoint of protocol {self.protocol!r} was asked for. There is no such protocol. "
                f"Give one of {', '.join(PATHS)}.",
                argument="protocol",
                value=self.protocol,
            )
        if secret := [*_secrets(self.headers), *_secrets(self.extra)]:
            raise BadInput(
                f"An endpoint at {host} was asked for with {secret[0]!r} among its headers or fields. Those are "
                "written into run directories, and a key never is. Name the variable that holds the key by key_env=.",
                argument=secret[0],
            )
        if wrong := [
            n
            for n, v in self.headers.items()
            if not (isinstance(v, str) and re.fullmatch(r"[!-9;-~]+", n) and v.isprintable() and v.isascii())
        ]:
            raise BadInput(
                f"An endpoint at {host} was asked for with a header {wrong[0]!r}. Its name or value has characters "
                "that HTTP does not allow. Use printable ASCII.",
                argument=wrong[0],
            )
        try:
            json.dumps(self.extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise BadInput(
                f"An endpoint at {host} was asked for with more fields of the body. They cannot be sent as JSON: "
                f"{error}. Give extra= as a dict of plain numbers, strings, lists and dicts.",
                argument="extra",
            ) from error
        if self.key_env is not None and parts.scheme == "http" and not self.is_local:
            raise BadInput(
                f"An endpoint at {host} was asked for with the key of {self.key_env}. The address is http, so that "
                "the key could be read on its way. Use https.",
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
        """Whether the server is on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def address(self) -> str:
        """Where requests go."""
        base, path = self.url.rstrip("/"), PATHS[self.protocol]
        return base if base.endswith(path) else base + path

    def key(self) -> str | None:
        """The key, from the environment; None for an endpoint without one.

        Raises BadInput when the variable is not set, or does not hold what could be a key. It is not quoted.
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
        """Headers and body of a request for the answer to a text, or to messages of {"role", "content"}.

        Raises BadInput for messages to "openai-completions", which takes a text.
        """
        headers, secret = self.key_fields(key)
        headers = {"Accept-Encoding": "identity", **headers}
        headers["Accept"] = "text/event-stream, application/json" if stream else "application/json"
        body: dict[str, Any] = {"model": self.model, "stream": stream, "max_tokens": max_tokens}
        if self.protocol == "openai-completions":
            if not isinstance(prompt, str):
                raise BadInput(
                    f"Messages were to be sent to {self.host}. Its protocol, openai-completions, takes one text. "
                    'Give a string, or make the endpoint with protocol="openai-chat".',
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
        """Headers of every call, the key among them, and the field of the body that "modelslab" has it in instead."""
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
        """The whole answer to a text or to messages, not streamed: for evaluations, not for measuring.

        max_tokens  at most; 0 with `echo` scores the prompt alone
        logprobs    log-probabilities of the tokens, and of so many alternatives each (0 for none); None does not ask
        echo        the answer begins with the prompt, whose tokens have log-probabilities too ("openai-completions")
        retries     how often a refusal for now (408, 409, 429, 5xx), a lost connection or a timeout is tried again,
                    after the time that the server asks for, or 0.5, 1, 2 ... seconds, at most 60
        client      httpx.Client to use, so that many calls share connections; one is made for this call without
        fields      more of the body, as temperature=0 or stop=["\n"]; they come before the endpoint's `extra`

        Log-probabilities that the server did not give are None. Safe to call from several threads.
        Raises EndpointError when there is no answer; BadInput for what the protocol cannot ask.
        """
        from mixlens.models.calls import complete

        asked = {"max_tokens": max_tokens, "logprobs": logprobs, "echo": echo, **fields}
        return complete(self, prompt, asked, retries=retries, client=client)

    def models(self) -> list[dict[str, Any]]:
        """The models that the server lists, as it describes them; each has an "id".

        Raises EndpointError when it gives no list.
        """
        from mixlens.models.calls import list_models

        return list_models(self)

    def count_tokens(self, prompt: str | Messages) -> int:
        """How many input tokens a request would have, by the server's own count ("anthropic": vLLM, ModelsLab).

        Raises EndpointError when the server does not count; BadInput for a protocol that has no such call.
        """
        from mixlens.models.calls import count_tokens

        return count_tokens(self, prompt)

    def plan(self) -> dict[str, Any]:
        """What a run directory keeps of it: everything but the key, "[key]" where a field holds it under any name."""
        kept = {"url": self.url, "model": self.model, "protocol": self.protocol, "context": self.context}
        kept |= {"key_env": self.key_env, "extra": dict(self.extra), "headers": dict(self.headers)}
        key = os.environ.get(self.key_env or "", "").strip()
        return json.loads(redacted(json.dumps(kept), key)) if key else kept

    @classmethod
    def openrouter(
        cls, model: str = "mistralai/mixtral-8x7b-instruct", *, providers: Sequence[str] = (), **fields: Any
    ) -> Endpoint:
        """OpenRouter; with `providers` only these answer, and no other steps in (as "deepinfra")."""
        model = canonical(model)
        pinned = {"provider": {"only": list(providers), "allow_fallbacks": False}} if providers else {}
        fields = {"key_env": "OPENROUTER_API_KEY", "context": CONTEXTS.get(model), **fields}
        fields["extra"] = {**pinned, **fields.get("extra", {})}
        return cls("https://openrouter.ai/api/v1", model=model, **fields)

    @classmethod
    def deepinfra(cls, model: str = "mistralai/Mixtral-8x7B-Instruct-v0.1", **fields: Any) -> Endpoint:
        """DeepInfra's OpenAI-compatible address; models go by their names on the Hub."""
        fields = {"key_env": "DEEPINFRA_API_KEY", "context": CONTEXTS.get(canonical(model)), **fields}
        return cls("https://api.deepinfra.com/v1/openai", model=model, **fields)

    @classmethod
    def modelslab(cls, model: str = "mistralai-mixtral-8x7b-instruct", **fields: Any) -> Endpoint:
        """ModelsLab, with its own body unless `protocol` says "openai-chat" or "anthropic"."""
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
            f"A request with {len(messages)} messages was to be sent. There is none, or one has no role. "
            'Give at least one {"role": "user", "content": ...}.',
            argument="prompt",
            value=len(messages),
        )
    if protocol != "anthropic" or messages[0]["role"] != "system":
        return {"messages": messages}
    return {"system": messages[0]["content"], "messages": messages[1:]}
