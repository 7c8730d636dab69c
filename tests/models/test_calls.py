"""Completions, model lists and token counts, from real servers on loopback that refuse, lose and answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers.refusals import refused
from json_server import Call, Reply, answering

from mixlens.endpoints.endpoint import Endpoint
from mixlens.errors import BadInput, EndpointError

KEY = "sk-loopback-0123456789"
NOW = {"Retry-After": "0"}
CHAT = {
    "model": "m",
    "provider": "DeepInfra",
    "choices": [
        {
            "message": {"role": "assistant", "content": "Two"},
            "finish_reason": "stop",
            "logprobs": {
                "content": [
                    {"token": "T", "logprob": -0.5, "top_logprobs": [{"token": "T", "logprob": -0.5}]},
                    {"token": "wo", "logprob": -0.25, "top_logprobs": [{"token": "en", "logprob": -2.0}]},
                ]
            },
        }
    ],
    "usage": {"prompt_tokens": 7, "completion_tokens": 2, "cost": 1e-6},
}
ECHOED = {
    "choices": [
        {
            "text": "A B",
            "finish_reason": "length",
            "logprobs": {
                "tokens": ["A", " B"],
                "token_logprobs": [None, -1.5],
                "top_logprobs": [None, {" B": -1.5, " C": -2.5}],
                "text_offset": [0, 1],
            },
        }
    ],
    "usage": {"prompt_tokens": 2, "completion_tokens": 0},
}


def test_a_chat_completion_has_text_usage_and_log_probabilities():
    with answering(lambda call: Reply(CHAT)) as (url, calls):
        found = Endpoint(url, model="m", extra={"temperature": 1, "seed": 3}).complete(
            [{"role": "system", "content": "Count."}, {"role": "user", "content": "1 + 1"}],
            max_tokens=5,
            logprobs=1,
            temperature=0,
            stop=["\n"],
        )
    assert (found.text, found.finish, found.input_tokens, found.output_tokens) == ("Two", "stop", 7, 2)
    assert (found.provider, found.cost_usd, found.attempts) == ("DeepInfra", 1e-6, 1)
    assert (found.tokens, found.logprobs, found.offsets) == (("T", "wo"), (-0.5, -0.25), None)
    assert found.top_logprobs == ({"T": -0.5}, {"en": -2.0})
    [call] = calls
    assert call.path == "/v1/chat/completions"
    assert call.body["stream"] is False
    assert "stream_options" not in call.body
    assert [call.body[name] for name in ("temperature", "seed", "stop", "logprobs", "top_logprobs", "max_tokens")] == [
        0,
        3,
        ["\n"],
        True,
        1,
        5,
    ]


def test_an_echoed_prompt_is_scored():
    with answering(lambda call: Reply(ECHOED)) as (url, calls):
        endpoint = Endpoint(url, model="m", protocol="openai-completions")
        found = endpoint.complete("A B", max_tokens=0, logprobs=2, echo=True)
    assert (found.tokens, found.logprobs, found.offsets) == (("A", " B"), (None, -1.5), (0, 1))
    assert found.top_logprobs == ({}, {" B": -1.5, " C": -2.5})
    assert [calls[0].body[name] for name in ("prompt", "echo", "logprobs", "max_tokens")] == ["A B", True, 2, 0]


def test_log_probabilities_that_a_server_leaves_out_are_missing():
    plain = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    with answering(lambda call: Reply(plain)) as (url, _):
        found = Endpoint(url, model="m").complete("Hi", logprobs=0)
    assert (found.logprobs, found.tokens, found.top_logprobs, found.output_tokens) == (None, None, None, None)


def test_anthropic_and_modelslab_have_their_own_forms(monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    message = {
        "type": "message",
        "content": [{"type": "text", "text": "Two"}],
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 4, "output_tokens": 1},
    }
    asked = [{"role": "system", "content": "Count."}, {"role": "user", "content": "1 + 1"}]
    with answering(lambda call: Reply(message)) as (url, calls):
        found = Endpoint(url, model="m", protocol="anthropic", key_env="LOOPBACK_KEY").complete(asked)
    assert (found.text, found.finish, found.output_tokens) == ("Two", "end_turn", 1)
    assert (calls[0].body["system"], calls[0].body["messages"]) == ("Count.", asked[1:])
    with answering(lambda call: Reply(CHAT)) as (url, calls):
        assert Endpoint(url, model="m", protocol="modelslab", key_env="LOOPBACK_KEY").complete("Hi").text == "Two"
    assert (calls[0].body["model_id"], calls[0].body["key"]) == ("m", KEY)


def test_refusals_for_now_and_lost_connections_are_tried_again():
    replies = [
        Reply({"error": "slow"}, 429, NOW),
        Reply({}, 503, NOW),
        Reply(b"<html>", 200, NOW),
        Reply(CHAT),
    ]
    with (
        answering(lambda call: replies[call.number]) as (url, calls),
        refused(EndpointError, "endpoint", 200),
    ):
        Endpoint(url, model="m").complete("Hi")
    assert len(calls) == 3
    with answering(lambda call: [replies[0], Reply("cut"), replies[3]][call.number]) as (url, calls):
        assert Endpoint(url, model="m").complete("Hi").attempts == 3
    with (
        answering(lambda call: Reply({}, 500, NOW)) as (url, calls),
        refused(EndpointError, "endpoint", 500),
    ):
        Endpoint(url, model="m").complete("Hi", retries=2)
    assert len(calls) == 3


def test_a_limit_that_no_wait_lifts_is_not_waited_for_and_no_wait_is_no_endless_loop(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("mixlens.endpoints.calls.time.sleep", waits.append)
    out_of_credit = Reply({"error": {"code": "insufficient_quota", "message": "You exceeded your quota"}}, 429)
    with answering(lambda call: out_of_credit) as (url, calls), refused(EndpointError, "endpoint", 429):
        Endpoint(url, model="m").complete("Hi")
    assert len(calls) == 1
    past = {"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}
    with answering(lambda call: Reply({}, 429, past)) as (url, calls), refused(EndpointError, "endpoint", 429):
        Endpoint(url, model="m", patience_s=100.0).complete("Hi")
    assert waits == [0, 0, 0, 0, 16, 32]


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503, 504, 529])
def test_a_passing_failure_is_tried_as_often_as_was_said(status, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("mixlens.endpoints.calls.time.sleep", waits.append)
    failed = Reply({"error": {"type": "overloaded_error", "message": "Overloaded"}}, status, {"Retry-After": "3"})
    with answering(lambda call: failed) as (url, calls), refused(EndpointError, "endpoint", status):
        Endpoint(url, model="m", max_tries=3).complete("Hi")
    assert (len(calls), waits) == (3, [3.0, 3.0])


def test_refusals_for_good_are_not_and_the_key_is_not_quoted(monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    refusal = Reply({"error": {"message": f"Incorrect key {KEY}"}}, 401)
    with (
        answering(lambda call: refusal) as (url, calls),
        refused(EndpointError, "endpoint", 401) as error,
    ):
        Endpoint(url, model="m", key_env="LOOPBACK_KEY").complete("Hi")
    assert len(calls) == 1
    assert KEY not in str(error.value)
    assert "[key]" in str(error.value)


@pytest.mark.parametrize(
    ("failed", "tries"),
    [
        ({"choices": [{"message": {"content": "Tw"}, "finish_reason": "error"}]}, 3),
        ({"choices": [{"message": {"content": "Tw"}, "finish_reason": "abort"}]}, 3),
        ({"choices": [{"message": {"content": ""}, "error": {"code": 502}}]}, 3),
        ({"error": {"message": "Overloaded", "type": "overloaded_error"}}, 3),
        ({"error": {"message": "gone", "code": "503"}}, 3),
        ({"error": {"message": "no such model", "code": 404}}, 1),
        ({"error": "no"}, 1),
    ],
)
def test_a_failure_inside_a_good_status_is_no_answer_and_is_tried_again_where_it_may_pass(failed, tries, monkeypatch):
    monkeypatch.setattr("mixlens.endpoints.calls.time.sleep", lambda seconds: None)
    with (
        answering(lambda call: Reply(failed)) as (url, calls),
        refused(EndpointError, "endpoint", 200),
    ):
        Endpoint(url, model="m", max_tries=3).complete("Hi")
    assert len(calls) == tries


def test_a_rate_limit_inside_a_good_status_is_waited_for(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("mixlens.endpoints.calls.time.sleep", waits.append)
    limited = Reply({"error": {"code": 429, "message": "Slow", "metadata": {"headers": {"Retry-After": "7"}}}})
    with answering(lambda call: limited if call.number < 9 else Reply(CHAT)) as (url, _):
        assert Endpoint(url, model="m", max_tries=2).complete("Hi").attempts == 10
    assert waits == [7.0] * 9


@pytest.mark.parametrize("padding", [0, 185, 285])  # at the others, a message would end within the key
def test_the_key_is_in_no_message_and_no_answer(padding, monkeypatch):
    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    payload = {"said": "." * padding + KEY}
    for status, ask in ((200, Endpoint.models), (200, lambda e: e.complete("Hi")), (401, lambda e: e.complete("Hi"))):
        with answering(lambda call, s=status: Reply(payload, s)) as (url, _), pytest.raises(EndpointError) as error:
            ask(Endpoint(url, model="m", key_env="LOOPBACK_KEY"))
        assert KEY[:6] not in str(error.value) + repr(error.value.value)
    counted = Endpoint(url, model="m", key_env="LOOPBACK_KEY", protocol="anthropic")
    with (
        answering(lambda call: Reply(payload)) as (url, _),
        refused(EndpointError, "answer", {"said": "." * padding + "[key]"}) as error,
    ):
        replace(counted, url=url).count_tokens("Hi")
    assert KEY[:6] not in str(error.value) + repr(error.value.value)
    with answering(lambda call: Reply({**CHAT, "echo": KEY})) as (url, _):
        found = Endpoint(url, model="m", key_env="LOOPBACK_KEY").complete("Hi")
    assert found.raw["echo"] == "[key]"


def test_calls_can_share_connections():
    with answering(lambda call: Reply(CHAT)) as (url, _), Endpoint(url, model="m").connect() as client:
        assert [Endpoint(url, model="m").complete("Hi", client=client).text for _ in range(2)] == ["Two", "Two"]


@pytest.mark.parametrize("payload", [{"choices": []}, [], {"data": 1}, {"choices": [{"message": None}]}])
def test_an_answer_of_another_form_is_said_to_be_one(payload):
    with answering(lambda call: Reply(payload)) as (url, _), refused(EndpointError, "answer", payload):
        Endpoint(url, model="m").complete("Hi")


def test_what_a_protocol_cannot_ask_is_not_sent():
    chat, text = (Endpoint("http://127.0.0.1:9/v1", model="m", protocol=p) for p in ("anthropic", "openai-completions"))
    with refused(BadInput, "echo", "anthropic"):
        chat.complete("Hi", echo=True)
    with refused(BadInput, "logprobs", "anthropic"):
        chat.complete("Hi", logprobs=1)
    with refused(BadInput, "prompt", "openai-completions"):
        text.complete([{"role": "user", "content": "Hi"}])
    with refused(BadInput, "prompt", 0):
        chat.complete([])
    with refused(BadInput, "protocol", "openai-completions"):
        text.count_tokens("Hi")


def test_models_are_listed_in_every_form():
    forms = {"openai": {"data": [{"id": "a", "context": 1}]}, "named": {"models": ["a"]}, "bare": [{"model_id": "a"}]}
    for form in forms.values():
        with answering(lambda call, form=form: Reply(form)) as (url, calls):
            assert [one["id"] for one in Endpoint(url, model="m").models()] == ["a"]
        assert (calls[0].method, calls[0].path) == ("GET", "/v1/models")
    with answering(lambda call: Reply({"data": None})) as (url, _), refused(EndpointError, "answer", {"data": None}):
        Endpoint(url, model="m").models()


def test_modelslab_lists_its_models_below_its_anthropic_address():
    with answering(lambda call: Reply({"data": [{"id": "a"}]})) as (url, calls):
        base = url.removesuffix("/v1") + "/api/v7/llm"
        Endpoint(base, model="m", protocol="modelslab").models()
        Endpoint(base + "/v1", model="m", protocol="anthropic").models()
    assert [call.path for call in calls] == ["/api/v7/llm/v1/models"] * 2


def test_input_tokens_are_counted_by_the_server():
    def reply(call: Call) -> Reply:
        return Reply({"input_tokens": len(call.body["messages"][0]["content"].split())})

    with answering(reply) as (url, calls):
        endpoint = Endpoint(url, model="m", protocol="anthropic", extra={"temperature": 0})
        assert endpoint.count_tokens("one two three") == 3
    assert calls[0].path == "/v1/messages/count_tokens"
    assert sorted(calls[0].body) == ["messages", "model"]
    with answering(lambda call: Reply({})) as (url, _), refused(EndpointError, "answer", {}):
        Endpoint(url, model="m", protocol="anthropic").count_tokens("x")
