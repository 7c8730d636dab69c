"""Probe of the parameters that an OpenAI-compatible server honours, ignores or rejects, judged by their effect."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mixlens.core.files import write_file
from mixlens.core.run_dir import now
from mixlens.endpoints.endpoint import Endpoint
from mixlens.endpoints.keys import redacted, redacted_parts
from mixlens.endpoints.probe_effects import EFFECTS, Verdict
from mixlens.endpoints.protocols import decode
from mixlens.endpoints.sse import SSEParser
from mixlens.endpoints.transport import Client, Fault
from mixlens.errors import BadInput, EndpointError, visible

PARAMETERS = tuple(EFFECTS)
_TABLE = ("parameter", "verdict", "evidence", "requests")
_NO_ANSWER = 599


@dataclass(frozen=True)
class Exchange:
    """Request and answer of a probe: fields without the key, and at most 4,000 characters of the answer."""

    parameter: str
    fields: dict[str, Any]
    prompt: str
    status: int
    content_type: str
    answer: str

    @property
    def data(self) -> dict[str, Any]:
        """JSON object of the answer; {} if it is not an object."""
        try:
            found = json.loads(self.answer)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def message(self) -> dict[str, Any]:
        choices = self.data.get("choices") or [{}]
        first = choices[0] if isinstance(choices, list) and isinstance(choices[0], dict) else {}
        return first.get("message") or {}

    @property
    def text(self) -> str:
        return self.message.get("content") or ""

    @property
    def refused(self) -> bool:
        """Whether the server rejected the request, by status 400, 404, 405, 415, 422 or 501 or by an error."""
        failed = bool(self.data.get("error")) or self.data.get("status") == "error"
        return self.status in (400, 404, 405, 415, 422, 501) or (self.status < 300 and failed)

    def count(self, name: str) -> int | None:
        usage = self.data.get("usage")
        value = usage.get(name) if isinstance(usage, dict) else None
        return value if isinstance(value, int) else None


@dataclass(frozen=True)
class Probe:
    """Verdicts on the parameters of a server, with the exchanges as evidence.

    table      one row per parameter: parameter, verdict, evidence, requests
    exchanges  every request with its answer
    meta       endpoint and date
    """

    table: pd.DataFrame
    exchanges: tuple[Exchange, ...]
    meta: dict[str, Any]

    kind = "probe"

    @property
    def verdicts(self) -> dict[str, str]:
        return dict(zip(self.table["parameter"], self.table["verdict"], strict=True))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write JSON Lines: endpoint and date, then verdicts, then every exchange."""
        lines = [self.meta, *self.table.to_dict("records"), *(asdict(one) for one in self.exchanges)]
        return write_file(path, "".join(json.dumps(line) + "\n" for line in lines))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Probe:
        """Read a file written by `save`. Raises BadInput if it is missing or has another format."""
        try:
            meta, *lines = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
            rows = [line for line in lines if "verdict" in line]
            exchanges = tuple(Exchange(**line) for line in lines if "verdict" not in line)
            return cls(pd.DataFrame(rows, columns=list(_TABLE)), exchanges, meta)
        except (OSError, ValueError, TypeError) as error:
            raise BadInput(
                f"Cannot read a probe from {path} ({type(error).__name__}: {error}). Pass a file written by "
                "probe(out=) or mixlens probe --out.",
                argument="path",
                value=str(path),
            ) from error

    def __repr__(self) -> str:
        with pd.option_context("display.max_colwidth", 100):
            return visible(f"{self._whose()}\n{self.table.to_string(index=False)}")

    def _repr_html_(self) -> str:
        return f"<div><div>{html.escape(self._whose())}</div>{self.table.to_html(index=False, border=0)}</div>"

    def _whose(self) -> str:
        endpoint = self.meta["endpoint"]
        return f"{endpoint['model']} at {endpoint['url']}, {self.meta['created']}, {len(self.exchanges)} requests"


def probe(
    endpoint: Endpoint,
    *,
    parameters: Sequence[str] = PARAMETERS,
    max_tokens: int = 24,
    out: str | os.PathLike[str] | None = None,
) -> Probe:
    """Test which parameters a server honours, ignores or rejects.

    A server may accept a parameter without using it, so each parameter is sent in a request where it must have a
    visible effect: a seed must make random answers repeat, a stop string must end the answer, a penalty must change a
    greedy answer. The probe sends about thirty short requests, without retries.

    The verdict is "undetermined" if answers at temperature 0 are not repeatable, if answers are not random, so that a
    seed has nothing to change, or if the server fails for another reason (401, 402, 403, 429, 5xx).

    Parameters
    ----------
    endpoint : Endpoint
        Server and model.
    parameters : Sequence[str], optional
        Parameters to test. By default all of PARAMETERS.
    max_tokens : int, optional
        Maximum tokens per answer. Longer answers show weak effects better but cost more.
    out : str or os.PathLike, optional
        JSON Lines file for the verdicts and all exchanges.

    Returns
    -------
    Probe

    Raises
    ------
    BadInput
        If the protocol is not "openai-chat" or "modelslab", a parameter is unknown, or `out` cannot be a file.
    EndpointError
        If the server does not answer the plain request.

    Examples
    --------
    >>> ml.bench.probe(ml.Endpoint("http://127.0.0.1:8000/v1", model="mixtral"))  # doctest: +SKIP
    """
    if endpoint.protocol not in ("openai-chat", "modelslab"):
        raise BadInput(
            f"Cannot probe the parameters of {endpoint.host} over {endpoint.protocol}. Create the endpoint with "
            'protocol="openai-chat".',
            argument="protocol",
            value=endpoint.protocol,
        )
    if unknown := [name for name in parameters if name not in EFFECTS]:
        raise BadInput(
            f"Cannot probe the parameter {unknown[0]!r}: known parameters are {', '.join(PARAMETERS)}. Pass some of "
            "these.",
            argument="parameters",
            value=unknown[0],
        )
    if out is not None:
        _check_writable(Path(out))
    exchanges: list[Exchange] = []
    with endpoint.connect() as client:
        ask = _asker(endpoint, client, max_tokens, exchanges)
        plain = ask("baseline", "Count from one to ten in words.", {"temperature": 0})
        if plain.status >= 300 or not plain.text:
            raise EndpointError(
                f"Cannot probe the parameters of {endpoint.host}: the plain request failed with status "
                f"{plain.status}, {plain.answer[:200]!r}. Check address, model and key.",
                argument="endpoint",
                value=plain.status,
            )
        rows = []
        for name in parameters:
            before = len(exchanges)
            verdict: Verdict = EFFECTS[name](lambda prompt, fields, name=name: ask(name, prompt, fields))
            rows.append((name, verdict.name, verdict.evidence, len(exchanges) - before))
    table = pd.DataFrame(rows, columns=list(_TABLE))
    found = Probe(table, tuple(exchanges), {"created": now(), "endpoint": endpoint.plan()})
    if out is not None:
        found.save(out)
    return found


def _check_writable(path: Path) -> None:
    """Raise BadInput if the results cannot be written; called before the first request."""
    if path.is_dir() or not path.parent.is_dir():
        raise BadInput(
            f"Cannot write a probe to {path}: it is a folder, or its folder does not exist. Pass a file in an "
            "existing folder.",
            argument="out",
            value=str(path),
        )


def _asker(
    endpoint: Endpoint, client: Client, max_tokens: int, kept: list[Exchange]
) -> Callable[[str, str, Mapping[str, Any]], Exchange]:
    key = endpoint.key()

    def ask(parameter: str, prompt: str, fields: Mapping[str, Any]) -> Exchange:
        headers, body = endpoint.request(prompt, max_tokens=max_tokens, key=key, stream=False)
        body = {name: value for name, value in (body | dict(fields)).items() if value is not None}
        # A new connection per request, because one dropped by the server after a failure would look like a refusal.
        headers |= {"Content-Type": "application/json", "Connection": "close"}
        try:
            found = client.fetch("POST", endpoint.address, headers, json.dumps(body).encode())
            status, form = found.status, redacted(found.content_type, key)[:200]
            text = found.redirection or found.body.decode("utf-8", errors="replace")
        except Fault as fault:
            status, form, text = _NO_ANSWER, "", fault.detail
        kept.append(Exchange(parameter, dict(fields), prompt, status, form, _without(key, text)))
        return kept[-1]

    return ask


def _without(key: str | None, answer: str) -> str:
    """Return the answer shortened and without the key; a stream whose events together spell the key is omitted."""
    texts = [decode(message, "openai-chat").text for message in SSEParser().feed(answer.encode(), 0.0)]
    if redacted_parts(texts, key) != [redacted(text, key) for text in texts]:
        return "[a stream that spells the key]"
    return redacted(answer, key)[:4000]
