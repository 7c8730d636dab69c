"""The parameter probe against a server whose treatment of every parameter is known."""

from __future__ import annotations

import json
import random

import pytest
from bench_scripts import chunk, sse
from helpers.refusals import refused
from json_server import Call, Reply, answering

from mixlens.endpoints.endpoint import Endpoint
from mixlens.endpoints.probe import PARAMETERS, probe
from mixlens.errors import BadInput, EndpointError

KEY = "sk-loopback-0123456789"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
CALLS = [{"function": {"name": "current_weather", "arguments": "{}"}}]


def server(*, ignores: set[str] = frozenset(), rejects: set[str] = frozenset(), steady: bool = True):
    """A model of ten words that does what the parameters say, apart from those that it ignores or rejects."""

    def reply(call: Call) -> Reply:
        asked = call.body
        if refused := rejects & {*asked}:
            return Reply({"detail": f"unknown field {sorted(refused)[0]}"}, 422)
        body = {name: value for name, value in asked.items() if name not in ignores}
        return answer(body, call.number)

    def answer(body: dict, number: int) -> Reply:
        prompt = body["messages"][0]["content"]
        greedy = body.get("temperature", 1) == 0 or body.get("top_p", 1) < 0.01
        draw = random.Random(0 if greedy and steady else body.get("seed", number + 1000))
        words = draw.choices(WORDS, k=12)
        if body.get("frequency_penalty", 0) > 0 or body.get("presence_penalty", 0) > 0:
            words = list(dict.fromkeys(words))
        words = words[: body.get("max_completion_tokens", body.get("max_tokens") or 12)]
        text = " ".join(words)
        if body.get("response_format"):
            text = json.dumps({"answer": text})
        for mark in body.get("stop", []):
            text = text.split(mark)[0]
        message: dict = {"role": "assistant", "content": text}
        choice = body.get("tool_choice", "auto")
        if body.get("tools") and choice != "none" and (isinstance(choice, dict) or "tool" in prompt):
            message = {"role": "assistant", "content": None, "tool_calls": CALLS}
        if body.get("stream"):
            stream = b"".join(sse(chunk({"content": word})) for word in words) + sse("[DONE]")
            return Reply(stream, headers={"Content-Type": "text/event-stream"})
        usage = {"prompt_tokens": 5 + 40 * bool(body.get("tools")), "completion_tokens": len(words)}
        return Reply({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})

    return reply


def probed(reply, **fields):
    with answering(reply) as (url, calls):
        return probe(Endpoint(url, model="m"), **fields), calls


def test_a_server_that_honours_everything_does():
    found, calls = probed(server())
    assert found.verdicts == dict.fromkeys(PARAMETERS, "honoured")
    assert len(found.exchanges) == len(calls) == found.table["requests"].sum() + 1 <= 40


@pytest.mark.parametrize("name", PARAMETERS)
def test_what_is_ignored_is_ignored_and_what_is_rejected_is_rejected(name):
    found, _ = probed(server(ignores={name}), parameters=[name])
    # Without temperature every answer of this server is random, so that none can be told from another.
    assert found.verdicts == {name: "undetermined" if name == "temperature" else "ignored"}
    if name != "temperature":
        refusing, _ = (
            probed(server(rejects={name}), parameters=[name])
            if name != "stream"
            else probed(
                lambda call: Reply({"detail": "no streams"}, 422) if call.body["stream"] else server()(call),
                parameters=[name],
            )
        )
        assert refusing.verdicts == {name: "rejected"}
        assert "422" in refusing.table["evidence"].iloc[0]


def test_a_server_that_is_always_greedy_ignores_temperature():
    def greedy(call: Call) -> Reply:
        call.body["temperature"] = 0
        return server()(call)

    found, _ = probed(greedy, parameters=["temperature", "seed", "top_p"])
    assert found.verdicts == {"temperature": "ignored", "seed": "undetermined", "top_p": "undetermined"}


def test_a_server_that_does_not_repeat_itself_leaves_penalties_open():
    found, _ = probed(server(steady=False), parameters=["frequency_penalty", "temperature"])
    assert {*found.verdicts.values()} == {"undetermined"}


def test_other_refusals_decide_nothing():
    refusal = {"stop": Reply({"error": "slow"}, 429), "seed": Reply("cut")}

    def reply(call: Call) -> Reply:
        return next((refusal[name] for name in refusal if name in call.body), server()(call))

    found, _ = probed(reply, parameters=["stop", "seed"])
    assert found.verdicts == {"stop": "undetermined", "seed": "undetermined"}
    assert "429" in found.table["evidence"].iloc[0]


def test_a_tool_that_reached_the_prompt_and_is_not_called_is_undetermined():
    def shy(call: Call) -> Reply:
        return server()(Call(call.number, "POST", "", {}, {**call.body, "tool_choice": "none"}))

    assert probed(shy, parameters=["tools"])[0].verdicts == {"tools": "undetermined"}


def test_evidence_is_kept_without_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)

    def telling(call: Call) -> Reply:
        made = server()(call)
        made.payload["id"] = f"you sent {call.headers['Authorization']}"
        return made

    with answering(telling) as (url, calls):
        found = probe(
            Endpoint(url, model="m", key_env="LOOPBACK_KEY"), parameters=["stop"], out=tmp_path / "probe.jsonl"
        )
    assert calls[0].headers["Authorization"].endswith(KEY)
    lines = [json.loads(line) for line in (tmp_path / "probe.jsonl").read_text().splitlines()]
    assert len(lines) == 1 + 1 + len(found.exchanges)
    assert lines[1]["verdict"] == "honoured"
    assert "[key]" in lines[-1]["answer"]
    assert KEY not in (tmp_path / "probe.jsonl").read_text() + repr(found) + found._repr_html_()


def test_no_part_of_the_key_is_left_where_an_answer_is_shortened(monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    long = {"choices": [{"message": {"content": "one"}}], "said": "." * 3930 + KEY}
    with answering(lambda call: Reply(long)) as (url, _):
        found = probe(Endpoint(url, model="m", key_env="LOOPBACK_KEY"), parameters=["seed"])
    assert KEY[:6] not in found.exchanges[0].answer
    assert "[key]" in found.exchanges[0].answer


def test_what_cannot_be_probed():
    with refused(BadInput, "parameters", "top_k"):
        probe(Endpoint("http://127.0.0.1:9/v1", model="m"), parameters=["top_k"])
    with refused(BadInput, "protocol", "anthropic"):
        probe(Endpoint("http://127.0.0.1:9/v1", model="m", protocol="anthropic"))
    with refused(EndpointError, "endpoint", 401):
        probed(lambda call: Reply({"error": "no"}, 401))
