"""Endpoints: what they send, and that a key is read late and kept nowhere."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers.refusals import refused

from mixlens.endpoints.endpoint import Endpoint, canonical
from mixlens.endpoints.keys import redacted
from mixlens.errors import BadInput

KEY = "sk-test-0123456789"
LOCAL = "http://127.0.0.1:8000/v1"


def test_each_protocol_has_its_address_and_body():
    headers, body = Endpoint(LOCAL, model="m").request("Hi", max_tokens=8)
    assert body["messages"] == [{"role": "user", "content": "Hi"}]
    assert body["stream_options"] == {"include_usage": True}
    assert "Authorization" not in headers
    completions = Endpoint(LOCAL, model="m", protocol="openai-completions")
    assert completions.request("Hi", max_tokens=8)[1]["prompt"] == "Hi"
    anthropic = Endpoint(LOCAL, model="m", protocol="anthropic")
    headers, body = anthropic.request("Hi", max_tokens=8, key=KEY)
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["anthropic-version"] == "2023-06-01"
    assert "stream_options" not in body
    addresses = [e.address for e in (Endpoint(LOCAL + "/chat/completions", model="m"), completions, anthropic)]
    assert addresses == [LOCAL + "/chat/completions", LOCAL + "/completions", LOCAL + "/messages"]


def test_modelslab_has_a_body_of_its_own():
    endpoint = Endpoint.modelslab()
    headers, body = endpoint.request("Hi", max_tokens=8, key=KEY)
    assert endpoint.address == "https://modelslab.com/api/v7/llm/chat/completions"
    assert (body["model_id"], body["key"]) == ("mistralai-mixtral-8x7b-instruct", KEY)
    assert "model" not in body
    assert "Authorization" not in headers
    assert Endpoint.modelslab(protocol="anthropic").address == "https://modelslab.com/api/v7/llm/v1/messages"


def test_presets_and_pinning():
    small, large = (
        Endpoint.openrouter(),
        Endpoint.openrouter("mistralai/mixtral-8x22b-instruct", providers=["deepinfra"]),
    )
    assert (small.model, small.context) == ("mistralai/mixtral-8x7b-instruct", 32_768)
    assert (large.context, large.address) == (65_536, "https://openrouter.ai/api/v1/chat/completions")
    body = large.request("Hi", max_tokens=8)[1]
    assert body["provider"] == {"only": ["deepinfra"], "allow_fallbacks": False}
    assert Endpoint.deepinfra().address == "https://api.deepinfra.com/v1/openai/chat/completions"
    assert Endpoint.deepinfra().context == 32_768


@pytest.mark.parametrize(
    "name", ["mistral/mixtral-8x7b-instruct", "mistralai-mixtral-8x7b-instruct", "mistralai/Mixtral-8x7B-Instruct-v0.1"]
)
def test_one_model_has_several_names(name):
    assert canonical(name) == "mistralai/mixtral-8x7b-instruct"
    assert Endpoint.openrouter(name).model == "mistralai/mixtral-8x7b-instruct"
    assert canonical("another") == "another"


def test_extra_fields_come_last_and_none_leaves_one_out():
    endpoint = Endpoint(LOCAL, model="m", extra={"temperature": 0, "stream_options": None})
    body = endpoint.request("Hi", max_tokens=8)[1]
    assert body["temperature"] == 0
    assert "stream_options" not in body


def test_a_key_is_read_when_it_is_needed_and_kept_nowhere(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    endpoint = Endpoint("https://example.invalid/v1", model="m", key_env="MY_KEY")
    with refused(BadInput, "key_env", "MY_KEY"):
        endpoint.key()
    monkeypatch.setenv("MY_KEY", KEY + "\n")
    assert endpoint.key() == KEY
    endpoint.request("Hi", max_tokens=8, key=KEY)
    assert KEY not in repr(endpoint) + json.dumps(endpoint.plan())
    monkeypatch.setenv("MY_KEY", "two words here")
    with refused(BadInput, "key_env", "MY_KEY") as caught:
        endpoint.key()
    assert "two words" not in str(caught.value)


def test_the_key_is_masked_where_a_field_holds_it_under_another_name(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    endpoint = Endpoint(LOCAL, model="m", key_env="MY_KEY", extra={"user": {"id": [KEY]}}, headers={"X-User": KEY})
    assert endpoint.request("Hi", max_tokens=8)[1]["user"] == {"id": [KEY]}
    assert (endpoint.plan()["extra"], endpoint.plan()["headers"]) == ({"user": {"id": ["[key]"]}}, {"X-User": "[key]"})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"url": "127.0.0.1:8000"}, ("url",)),
        ({"url": "http://["}, ("url",)),
        ({"url": "https://u:p@example.invalid/v1"}, ("url", "example.invalid")),
        ({"url": "https://example.invalid/v1?key=abc"}, ("url", "example.invalid")),
        ({"url": 3}, ("url",)),
        ({"model": None}, ("model",)),
        ({"protocol": "openai"}, ("protocol", "openai")),
        ({"headers": {"X-API-Key": "abc"}}, ("X-API-Key",)),
        ({"headers": {"X-Title": "é"}}, ("X-Title",)),
        ({"headers": {"X-RapidAPI-Key": "abc"}}, ("X-RapidAPI-Key",)),
        ({"extra": {"key": "abc"}}, ("key",)),
        ({"extra": {"apiKey": "abc"}}, ("apiKey",)),
        ({"extra": {"access_token": "abc"}}, ("access_token",)),
        ({"extra": {"provider": {"api_key": "abc"}}}, ("provider.api_key",)),
        ({"extra": {"a": [{"b": {"Authorization": {"value": "abc"}}}]}}, ("a.b.Authorization.value",)),
        ({"extra": {"api_keys": ["abc"]}}, ("api_keys",)),
        ({"extra": {"note": ["Bearer abc-0123456789"]}}, ("note",)),
        ({"extra": {"user": {"id": "sk-or-v1-abc0123456789abcdef"}}}, ("user.id",)),
        ({"headers": {"X-Forwarded": "Basic abc0123456789"}}, ("X-Forwarded",)),
        ({"headers": {"X-Title": 5}}, ("X-Title",)),
        ({"extra": {"stop": {1, 2}}}, ("extra",)),
        ({"extra": {"temperature": float("nan")}}, ("extra",)),
        ({"url": "http://example.invalid/v1", "key_env": "K"}, ("url", "http")),
    ],
)
def test_endpoints_that_are_refused(fields, named):
    with refused(BadInput, *named) as caught:
        Endpoint(**{"url": LOCAL, "model": "m", **fields})
    assert "abc" not in str(caught.value)


def test_fields_that_hold_no_secret_are_taken():
    fields = {"max_tokens": 5, "min_tokens": "1", "add_bos_token": True, "prompt_cache_key": "a", "monkey": "b"}
    schema = {"type": "object", "properties": {"key": {"type": "string"}, "token": {"description": "a word"}}}
    fields |= {
        "tools": [{"function": {"parameters": schema}}],
        "stop_token_ids": [2],
        "system": "Basic questions are asked.",
    }
    assert Endpoint(LOCAL, model="m", extra=fields).plan()["extra"] == fields


def test_a_key_is_taken_out_in_the_forms_that_json_gives_it():
    key = 'sk-"a/b'
    written = json.dumps({"key": key})
    assert redacted(f"{key} {written} {written.replace('/', chr(92) + '/')}", key).count("[key]") == 3
    assert redacted("plain", None) == "plain"


def test_an_endpoint_needs_no_torch():
    script = "import sys, mixlens.endpoints.endpoint; print({'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
