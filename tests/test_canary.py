"""A key that a server gives back in every form is in nothing that any verb writes, prints, logs or raises."""

from __future__ import annotations

import base64
import html
import itertools
import json
import logging
import re
import traceback
from collections.abc import Callable
from urllib.parse import quote, unquote

import pytest
from bytes_server import writing
from helpers.refusals import refused

import mixlens as ml
from mixlens.cli.main import main
from mixlens.endpoints.keys import is_variable, redacted, redacted_parts
from mixlens.errors import BadInput, MixlensError

KEY = "cnry/Zq7-Xv29+Lm4Tw81"  # of no form by which it would be refused at once
HALVES = (KEY[:11], KEY[11:])
FORMS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "backslash-u": lambda text: "".join(f"\\u{ord(char):04X}" for char in text),
    "escaped twice": lambda text: "".join(f"\\\\u{ord(char):04x}" for char in text),
    "percent": lambda text: quote(text, safe=""),
    "percent, every character": lambda text: "".join(f"%{ord(char):02x}" for char in text),
    "percent twice": lambda text: quote(quote(text, safe=""), safe=""),
    "entities": lambda text: "".join(f"&#{ord(char)};" for char in text),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 of user and key": lambda text: base64.urlsafe_b64encode(f"user:{text}".encode()).decode(),
    "hexadecimal": lambda text: text.encode().hex(),
    "slashes": lambda text: text.replace("/", "\\/"),
}


def revealed(text: str) -> bool:
    """Whether the key, or half of it, can be read out of a text: undone by the decoders of Python, twice."""
    for _ in range(3):
        found = [text, *(_decoded(word) for word in re.findall(r"[\w+/-]{20,}", text))]
        if any(part in one for one in found for part in (KEY, *HALVES)):
            return True
        text = html.unescape(unquote(re.sub(r"\\+u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)))
        text = text.replace("\\/", "/")
    return False


def _decoded(word: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]+", word) and len(word) % 2 == 0:
        return bytes.fromhex(word).decode("latin-1")
    plain = word.replace("-", "+").replace("_", "/")
    alignments = ("A" * before + plain for before in range(4))
    return "\n".join(base64.b64decode(one[: len(one) // 4 * 4]).decode("latin-1") for one in alignments)


@pytest.mark.parametrize("form", FORMS)
def test_the_detector_and_the_mask_know_every_form(form):
    said = f"before {FORMS[form](KEY)} after"
    assert revealed(said)
    assert not revealed(redacted(said, KEY))
    parts = [said[at : at + 3] for at in range(0, len(said), 3)]
    masked = redacted_parts(parts, KEY)
    assert len(masked) == len(parts)
    assert "".join(masked) == redacted(said, KEY)


def http(status: str, kind: str, body: str, *headers: str) -> list[bytes | float]:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body.encode())}", *headers, "", ""]
    return ["\r\n".join(lines).encode(), body.encode()]


def stream(parts: list[str]) -> str:
    delta = '{{"choices":[{{"index":0,"delta":{{"{field}":"{part}"}}}}]}}'
    events = [delta.format(field=field, part=part) for field in ("reasoning", "content") for part in parts]
    spelled = (f"data: {one}\n\n: {part}\n\n" for one, part in zip(events, parts * 2, strict=True))
    return "".join(spelled) + "data: [DONE]\n\n"


def answers(said: str) -> dict[str, list[bytes | float]]:
    """Ways of a server to give back what it was sent, as it is or in parts."""
    inside = said if "\\" in said else json.dumps(said)[1:-1]
    parts = [inside] if "\\" in inside else [inside[at : at + 4] for at in range(0, len(inside), 4)]
    chat = f'{{"model":"{inside}","choices":[{{"message":{{"content":"you sent {inside}"}},"finish_reason":"stop"}}]}}'
    echo = f"X-Echo: {said}"
    return {
        "answer": http("200 OK", "application/json", chat, echo),
        "stream": http("200 OK", "text/event-stream", stream(parts)),
        "error": http("401 No", "application/json", f'{{"error":{{"message":"bad key {inside}"}}}}', echo),
        "error in a stream": http("200 OK", "text/event-stream", f'data: {{"error":"bad key {inside}"}}\n\n'),
        "page": http(f"403 {said}", f"text/html; x={said}", f"<html>{said}</html>"),
        "malformed": http("200 OK", "application/json", "." * 190 + said),
        "redirection": http("302 Found", "text/html", "", f"Location: https://elsewhere.invalid/?key={said}"),
        "other form": http("200 OK", "application/json", f'{{"data":[{{"id":"{inside}"}}], "said":"{inside}"}}'),
        "no HTTP": [f"{said} {said}\r\n\r\n".encode()],
        "no chunk": [f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{said}\r\n".encode()],
        "no coding": http("200 OK", "application/json", "x", f"Content-Encoding: {said}"),
    }


def use(url: str, folder) -> list[object]:
    """Every verb that talks to a server, each to its end or its error; what it gave."""
    endpoint = ml.Endpoint(url, model="m", key_env="CANARY_KEY", max_tries=1, extra={"user": KEY})
    quiet = ml.bench.BenchSettings(progress=False, warmup=0)
    small = {"workload": ml.bench.Workload(16, 8), "settings": quiet}
    named = ["--model", "m", "--key-env", "CANARY_KEY"]

    def report():
        return ml.report([ml.benchmark(endpoint, requests=1, out=folder / "reported", **small)], folder / "report.html")

    verbs: list[Callable[[], object]] = [
        lambda: endpoint,
        lambda: endpoint.complete("Hi", logprobs=1),
        lambda: endpoint.models(),
        lambda: ml.Endpoint(f"{url}", model="m", key_env="CANARY_KEY", protocol="anthropic").count_tokens("Hi"),
        lambda: ml.benchmark(endpoint, requests=2, out=folder / "bench", **small),
        lambda: ml.bench.benchmark_together({"a": endpoint, "b": endpoint}, requests=2, out=folder / "pair", **small),
        lambda: ml.bench.probe(endpoint, parameters=["stop", "stream"], out=folder / "probe.jsonl"),
        lambda: ml.evaluate(endpoint, ["demo"], limit=1, out=folder / "eval"),
        report,
        lambda: main(["models", url, "--key-env", "CANARY_KEY"]),
        lambda: main(["probe", url, *named, "--parameters", "stop", "--out", str(folder / "cli.jsonl")]),
        lambda: main(["bench", url, *named, "--requests", "1", "--out", str(folder / "cli")]),
    ]
    given: list[object] = []
    for verb in verbs:
        try:
            given.append(verb())
        except (MixlensError, SystemExit) as error:
            given += ["".join(traceback.format_exception(error)), getattr(error, "value", None)]
    return given


QUICK = ("stream", "error")


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way in QUICK else pytest.mark.slow) for way in answers("x")]
)
def test_a_key_is_in_nothing_that_is_written_printed_logged_or_raised(way, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CANARY_KEY", KEY)
    log = logging.FileHandler(tmp_path / "log.txt")
    root = logging.getLogger()
    root.addHandler(log)
    before, _ = root.level, root.setLevel(logging.DEBUG)
    try:
        forms = itertools.cycle(FORMS.values())
        with writing(lambda: answers(next(forms)(KEY))[way]) as (url, requests):
            given = use(url, tmp_path)
    finally:
        root.setLevel(before)
        root.removeHandler(log)
        log.close()
    assert any(KEY.encode() in request for request in requests)
    shown = [repr(one) + (one._repr_html_() if hasattr(one, "_repr_html_") else "") for one in given]
    records = [record for one in given if isinstance(one, ml.bench.Bench) for record in one.records]
    shown += [record.text + "\n" + record.reasoning for record in records]  # what was split over events
    shown += ["".join(event.text for event in record.events if event.kind == "comment") for record in records]
    printed = capsys.readouterr()
    files = {path.name: path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()}
    assert "log.txt" in files
    for name, text in {**files, "given": "\n".join(shown), "out": printed.out, "err": printed.err}.items():
        assert not revealed(text), name


@pytest.mark.parametrize("given", ["sk-live-0123456789abcdef", "hf_AbCdEfGhIjKlMnOp", "AKIAIOSFODNN7EXAMPLE", "Ab3 "])
def test_a_key_in_the_place_of_its_name_is_refused_and_not_printed(given, capsys):
    with refused(BadInput, "key_env", None) as caught:
        ml.Endpoint("http://127.0.0.1:9/v1", model="m", key_env=given)
    assert given not in "".join(traceback.format_exception(caught.value))
    for verb in (["bench", "http://127.0.0.1:9/v1", "--model", "m"], ["models", "http://127.0.0.1:9/v1"]):
        assert main([*verb, "--key-env", given]) not in (0, None)
    assert given not in "".join(capsys.readouterr())


def test_names_of_variables_are_taken():
    for name in ("OPENAI_API_KEY", "K", "my_key", "HF_TOKEN", "AZURE_OPENAI_KEY_2", "KEY1", "PATH"):
        assert is_variable(name)
