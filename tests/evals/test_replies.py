"""What a server sends beside the text of an answer is kept with the sample, and told where a score would hide it."""

from __future__ import annotations

import json

import pytest
from helpers.refusals import refused
from json_server import Reply, answering

import mixlens as ml
from mixlens.errors import BadInput, EndpointError
from mixlens.evals.replies import reply_remarks, with_replies

QUIET = ml.evals.EvalSettings(progress=False, batch_size=1)
TASK = """task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
num_fewshot: {shots}
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task(tmp_path):
    def write(shots: int = 0, n: int = 6) -> str:
        data, path = tmp_path / "rows.jsonl", tmp_path / "tiny.yaml"
        data.write_text("".join(json.dumps({"q": f"Q{i}?", "a": f"answer {i}"}) + "\n" for i in range(n)))
        path.write_text(TASK.format(data=data, shots=shots))
        return str(path)

    return write


def said(content, finish="stop", **more) -> Reply:
    message = {"role": "assistant", "content": content, **more.pop("message", {})}
    return Reply({"choices": [{"index": 0, "message": message, "finish_reason": finish}], **more})


def number(call) -> int:
    return int(call.body["messages"][-1]["content"].strip("Q?"))


FORMS = {
    "text": {"content": "answer {}"},
    "blocks": {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
            {"type": "text", "text": "answer {}"},
        ]
    },
    "reasoning_content": {"content": "answer {}", "reasoning_content": "hm"},
    "reasoning": {"content": "answer {}", "reasoning": "hm"},
    "reasoning_details": {"content": "answer {}", "reasoning_details": [{"type": "reasoning.text", "text": "hm"}]},
    "tags": {"content": "<think>hm</think>answer {}"},
    "tags whose first is in the prompt": {"content": "hm</think>answer {}"},
}


@pytest.mark.parametrize("form", FORMS)
def test_reasoning_in_any_form_is_no_part_of_the_answer(task, form):
    def reply(call):
        message = json.loads(json.dumps(FORMS[form]).replace("answer {}", f"answer {number(call)}"))
        return said(message.pop("content"), message=message)

    with answering(reply) as (url, _):
        log = ml.evaluate(ml.Endpoint(url, model="m"), [task()], settings=QUIET)
    assert log.scores["score"].tolist() == [1.0]
    assert form == "text" or "hm" in log.records[0]["replies"][0]["reasoning"]


def test_answers_that_are_none_are_named_and_scores_come_without_them_too(task):
    def reply(call):
        n = number(call)
        if n == 1:
            return said(None, "length", message={"reasoning_content": "Let me think ..."})
        if n == 2:
            return said("", "content_filter")
        if n == 3:
            return said(None, "length")
        return said(f"answer {n}", usage={"prompt_tokens": 9, "completion_tokens": 2}, model="other")

    with answering(reply) as (url, _):
        log = ml.evaluate(ml.Endpoint(url, model="m"), [task()], settings=QUIET)
    assert [record["non_answer"] for record in log.records] == [
        None,
        "reasoning only",
        "filtered",
        "length",
        None,
        None,
    ]
    assert [record["finish"] for record in log.records] == [
        "stop",
        "length",
        "content_filter",
        "length",
        "stop",
        "stop",
    ]
    told = " ".join(log.remarks())
    assert "3 of 6 samples" in told
    assert "1.0000" in told  # of the three that are left
    assert "other (3)" in told


def test_an_evaluation_that_goes_on_keeps_what_came_beside_its_answers(task, tmp_path):
    asked: list[int] = []

    def reply(call):
        asked.append(number(call))
        if number(call) == 3 and asked.count(3) == 1:
            return Reply({"error": "no"}, 400)
        hm = {"reasoning_content": "half \ud83d of one"}
        return said(f"answer {number(call)}", "length" if number(call) == 0 else "stop", message=hm)

    with answering(reply) as (url, _):
        endpoint, path = ml.Endpoint(url, model="m"), task()
        settings = ml.evals.EvalSettings(progress=False, batch_size=1)
        with pytest.raises(EndpointError):
            ml.evaluate(endpoint, [path], settings=settings, out=tmp_path / "run")
        log = ml.evaluate(endpoint, [path], settings=settings, out=tmp_path / "run")
    assert [record["finish"] for record in log.records] == ["length", *["stop"] * 5]
    assert any("1 of 6" in remark for remark in log.remarks())


def test_shots_that_hold_the_question_with_its_answer_are_refused(task):
    with answering(lambda call: said("x")) as (url, calls):
        with refused(BadInput, "fewshot_split"):
            ml.evaluate(ml.Endpoint(url, model="m"), [task(shots=3)], settings=QUIET)
        assert not calls


def test_fields_that_extra_removes_are_not_sent(task):
    with answering(lambda call: said(f"answer {number(call)}")) as (url, calls):
        endpoint = ml.Endpoint(url, model="m", extra={"temperature": None, "stop": None})
        ml.evaluate(endpoint, [task()], settings=QUIET)
    assert not {"temperature", "stop"} & {name for call in calls for name in call.body}


def scoring(call, worst: str = "-1.5", others: str = "-1.0", **more) -> Reply:
    """An echo of the prompt, where the word green has another log-probability than all others."""
    words = call.body["prompt"].split(" ")
    tokens = ["<s>", words[0], *(f" {word}" for word in words[1:]), " x"]
    given = [worst if "green" in token else others for token in tokens[1:]]
    logprobs = json.dumps({"tokens": tokens, "token_logprobs": "GIVEN", "top_logprobs": "TOP"})
    logprobs = logprobs.replace('"GIVEN"', f"[null, {', '.join(given)}]")
    logprobs = logprobs.replace('"TOP"', json.dumps([None, *[{"a": -1.0}] * len(given)]))
    choice = {"text": call.body["prompt"] + " x", "finish_reason": "length", "logprobs": "LOGPROBS"}
    usage = {"prompt_tokens": len(tokens) - 1, "completion_tokens": 1}
    body = json.dumps({"choices": [choice], "usage": usage, **more})
    return Reply(body.replace('"LOGPROBS"', logprobs).encode())


@pytest.fixture
def choices(tmp_path):
    data, path = tmp_path / "rows.jsonl", tmp_path / "choice.yaml"
    data.write_text(json.dumps({"q": "The sky is", "a": 0}) + "\n")
    path.write_text(
        f"""task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
num_fewshot: 0
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["blue", "green"]
doc_to_target: a
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    return str(path)


@pytest.mark.parametrize(
    ("worst", "others", "kind"),
    [
        ("NaN", "-1.0", BadInput), ("-Infinity", "-1.0", BadInput), ("0.4", "-1.0", EndpointError),
        ("0.4", "0.9", BadInput), ("0.0", "0.0", BadInput),
    ],
)  # fmt: skip
def test_log_probabilities_that_are_none_are_refused(worst, others, kind, choices):
    with answering(lambda call: scoring(call, worst, others)) as (url, _), refused(kind, "logprobs"):
        ml.evaluate(ml.Endpoint(url, model="m", protocol="openai-completions"), [choices], settings=QUIET)


def test_another_model_that_scores_is_told(choices):
    for name, told in (("m", False), ("smaller", True)):
        with answering(lambda call, name=name: scoring(call, model=name)) as (url, _):
            endpoint = ml.Endpoint(url, model="m", protocol="openai-completions")
            log = ml.evaluate(endpoint, [choices], settings=QUIET)
        assert any("another model" in remark and "smaller" in remark for remark in log.remarks()) is told


@pytest.mark.parametrize("response", ["   return 1", "return 1", "     return 1"])
def test_a_server_that_drops_or_adds_a_first_blank_is_told(response):
    records = [
        {
            "task": "code",
            "sample_id": i,
            "target": "    return 1",
            "responses": [response],
            "metrics": {"pass": 0.0},
        }
        for i in range(6)
    ]
    meta = {"model": {"name": "m", "backend": "endpoint"}, "tasks": {}}
    assert any("blank" in remark for remark in reply_remarks(with_replies(records, {}), meta))
    whole = [record | {"responses": ["    return 1"]} for record in records[:1]] + records[1:]
    assert not reply_remarks(with_replies(whole, {}), meta)


@pytest.mark.parametrize(("answered", "told"), [("m", False), ("m@main", False), ("other@m", True), ("n", True)])
def test_another_model_that_answers_is_told_and_a_revision_is_none(answered, told):
    record = {"task": "t", "sample_id": 0, "target": "x", "responses": ["x"], "replies": [{"model": answered}]}
    remarks = reply_remarks([record], {"model": {"name": "m", "backend": "endpoint"}, "tasks": {}})
    assert any(answered in remark for remark in remarks) is told


LIMITED = [
    {"Retry-After": "7"},
    {"retry-after-ms": "7000"},
    {"x-ratelimit-reset-requests": "0m7s"},
    {"X-RateLimit-Reset": "1000000007000"},
    {"X-RateLimit-Reset": "1000000007"},
]


@pytest.mark.parametrize("headers", LIMITED)
def test_a_rate_limit_is_waited_for_as_long_as_the_server_says(headers, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("mixlens.endpoints.calls.time.sleep", waits.append)
    monkeypatch.setattr("mixlens.endpoints.calls.time.time", lambda: 1_000_000_000.0)
    with answering(lambda call: Reply({}, 429, headers) if call.number < 9 else said("yes")) as (url, _):
        assert ml.Endpoint(url, model="m").complete("Q?").text == "yes"
    assert waits == pytest.approx([7.0] * 9)


def test_a_rate_limit_without_a_time_is_waited_for_with_growing_patience(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("mixlens.endpoints.calls.time.sleep", waits.append)
    slow = Reply({"error": {"message": "slow down"}}, 429)
    with answering(lambda call: slow) as (url, _), refused(EndpointError, "endpoint", 429):
        ml.Endpoint(url, model="m", patience_s=200.0).complete("Q?")
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_redirection_is_named(monkeypatch):
    moved = {"Location": "https://elsewhere.example/v1"}
    with answering(lambda call: Reply({}, 308, moved)) as (url, calls):
        with refused(EndpointError, "endpoint", 308) as caught:
            ml.Endpoint(url, model="m").complete("Q?")
        assert len(calls) == 1
    assert "elsewhere.example" in str(caught.value)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "socks://127.0.0.1:9", "nonsense://x"])
def test_a_proxy_that_cannot_be_used_is_named(proxy, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    endpoint = ml.Endpoint("https://mixlens.invalid/v1", model="m", max_tries=1)
    with pytest.raises((BadInput, EndpointError)) as caught:
        endpoint.complete("Q?")
    assert caught.value.argument in ("proxy", "endpoint")
