"""Streams whose truth is known, cut anywhere, in every protocol; and every way an answer can end."""

from __future__ import annotations

import json

import pytest
from bench_scripts import CONTENT_S, SCRIPTS, TEXTS, chunk, cuts, openai_chat, replay, sse
from helpers.refusals import refused

from mixlens.bench.events import Record, StreamReader, outcome_of, read_records, records_bytes
from mixlens.endpoints.limits import TooLarge
from mixlens.endpoints.protocols import error_message
from mixlens.endpoints.sse import SSEParser
from mixlens.errors import BadInput

STREAM = (
    b"\xef\xbb\xbf: hello\r\n\r\nevent: a\r\ndata: one\r\ndata:two\r\n\r\n"
    b"id: 7\nretry: 10\ndata: {\xc3\xa9\xf0\x9f\x98\x80}\n\n"
    b"data\n\n\n\r\r: bye\rdata: three\r\revent: dropped\n\ndata: four\n\n"
)
MESSAGES = [
    (True, "", "hello"),
    (False, "a", "one\ntwo"),
    (False, "", "{é😀}"),
    (False, "", ""),
    (True, "", "bye"),
    (False, "", "three"),
    (False, "", "four"),
]


def parsed(pieces: list[bytes]) -> list[tuple]:
    parser = SSEParser()
    return [(m.comment, m.event, m.data) for piece in pieces for m in parser.feed(piece, 0.0)]


def test_an_event_stream_is_parsed_whatever_the_line_ends():
    assert parsed([STREAM]) == MESSAGES


def test_an_event_stream_may_be_cut_at_any_byte():
    for at in range(1, len(STREAM)):
        assert parsed(cuts(STREAM, (at,))) == MESSAGES, at
    assert parsed([STREAM[i : i + 1] for i in range(len(STREAM))]) == MESSAGES
    assert parsed([b"data: x\r", b"", b"\n\r", b"\n"]) == [(False, "", "x")]


def test_an_event_counts_from_its_last_byte_and_a_carriage_return_is_not_waited_behind():
    parser = SSEParser()
    assert not parser.feed(b"data: x", 1.0) + parser.feed(b"\r", 2.0)
    assert [m.at_s for m in parser.feed(b"\r", 3.0)] == [3.0]
    assert not parser.feed(b"\n", 4.0)


def test_an_endless_line_is_refused(monkeypatch):
    monkeypatch.setattr("mixlens.endpoints.sse.MAX_BODY_BYTES", 100)
    for endless in (b"data: " + b"x" * 101, b"data: x\n" * 3, b"x" * 101):
        with pytest.raises(TooLarge):
            StreamReader("openai-chat").feed(endless, 1.0)


@pytest.mark.parametrize("size", [None, 1, 7])
@pytest.mark.parametrize("protocol", SCRIPTS)
def test_the_scripted_stream_gives_its_events_at_their_times(protocol, size):
    record = replay(SCRIPTS[protocol](), protocol, size=size)
    tokens = [event for event in record.events if event.kind == "token"]
    assert record.outcome == "ok"
    assert record.events[0].kind == "comment"
    assert [event.text for event in tokens] == TEXTS
    assert [event.at_s for event in tokens] == CONTENT_S
    assert next(event for event in reversed(record.events) if event.output_tokens).output_tokens == 29
    if protocol != "openai-completions":
        assert next(event.at_s for event in record.events if event.kind == "role") == 0.05


def test_line_ends_do_not_matter_to_a_decoded_stream():
    plain = replay(openai_chat())
    for end in (b"\r\n", b"\r"):
        assert replay([(at, piece.replace(b"\n", end)) for at, piece in openai_chat()]).events == plain.events


def test_provider_reasoning_tool_calls_and_usage_ride_on_chunks():
    call = {"index": 0, "function": {"name": "look", "arguments": '{"a":1}'}}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "cost": 0.25}
    record = replay(
        [
            (0.1, sse(chunk({"reasoning_content": "hm"}, provider="DeepInfra"))),
            (0.2, sse(chunk({"reasoning": "so"}))),
            (0.3, sse(chunk({"tool_calls": [call]}, usage={"prompt_tokens": 3, "completion_tokens": 1}))),
            (0.4, sse(chunk({"content": ""}, "tool_calls", usage=usage))),
        ]
    )
    assert [event.kind for event in record.events] == ["reasoning", "reasoning", "token", "usage"]
    assert (record.text, record.reasoning) == ('look{"a":1}', "hmso")
    assert record.events[0].provider == "DeepInfra"
    assert (record.events[2].output_tokens, record.events[3].cost_usd) == (1, 0.25)


@pytest.mark.parametrize(
    ("pieces", "outcome"),
    [
        ([sse(chunk({"content": "a"})), sse(chunk({}, "stop"))], "ok"),
        ([sse(chunk({"content": "a"})), sse("[DONE]")], "ok"),
        ([sse(chunk({"content": "a"}, "length"))], "ok"),
        ([sse(chunk({"content": "a"})), sse("[DONE]")[:-1]], "ok"),
        ([sse(chunk({"content": "a"}))], "truncated"),
        ([sse(chunk({"content": "a"})), sse(chunk({"content": "b"}))[:20]], "truncated"),
        ([sse(chunk({"role": "assistant"}))], "truncated"),
        ([sse(chunk({"role": "assistant"})), sse(chunk({}, "stop")), sse("[DONE]")], "empty"),
        ([b": ping\n\n"], "empty"),
        ([], "empty"),
        ([sse(chunk({"content": "a"})), sse("{not json"), sse("[DONE]")], "malformed"),
        ([sse(chunk({"content": [{"type": "text", "text": "a"}]})), sse("[DONE]")], "ok"),
        ([sse(chunk({"content": [1]})), sse("[DONE]")], "malformed"),
        ([sse(chunk({"content": 1})), sse("[DONE]")], "malformed"),
        ([sse({"choices": "abc"}), sse("[DONE]")], "malformed"),
        ([sse({"hello": 1}), sse("[DONE]")], "malformed"),
        ([sse("[1]"), sse("[DONE]")], "malformed"),
        ([sse("[" * 100_000), sse("[DONE]")], "malformed"),
        ([sse(chunk({"content": "a"})), sse({"error": {"code": 502, "message": "gone"}})], "error"),
        ([sse(chunk({"content": "a"})), sse(chunk({"content": ""}, "error"))], "error"),
        ([sse({"status": "error", "message": "no credit"})], "error"),
        ([sse({"error": "overloaded"}), sse("[DONE]")], "error"),
        ([sse(chunk({"content": "a"}, error=None)), sse("[DONE]")], "ok"),
    ],
)
def test_every_way_a_stream_can_end_has_a_name(pieces, outcome):
    assert replay([(0.1, piece) for piece in pieces]).outcome == outcome


def test_an_anthropic_error_event_is_an_error():
    fault = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    record = replay([(0.1, sse(fault, "error"))], "anthropic")
    assert (record.outcome, record.events[0].text) == ("error", "overloaded_error: Overloaded")


def test_what_the_transport_reports_decides_where_the_stream_does_not():
    whole, half = replay(openai_chat()).events, replay(openai_chat()[:5]).events
    assert outcome_of(half, status=200, fault="timeout") == "timeout"
    assert outcome_of(half, status=200, fault="cut") == "truncated"
    assert outcome_of(whole, status=200, fault="cut") == "ok"
    assert outcome_of([], status=200, fault="cut") == "truncated"
    assert outcome_of([], status=None, fault="connect") == "connect"
    assert outcome_of([], status=None, fault="tls") == "tls"
    assert outcome_of([], status=None, fault="timeout") == "timeout"
    assert outcome_of([], status=302) == "http"


def test_an_answer_that_is_no_stream_is_one_event():
    reader = StreamReader("openai-chat")
    body = {"choices": [{"message": {"role": "assistant", "content": "all of it"}, "finish_reason": "stop"}]}
    reader.feed(json.dumps(body).encode(), 2.0)
    reader.close(3.0)
    assert reader.form == "json"
    assert [(event.kind, event.text, event.at_s) for event in reader.events] == [("token", "all of it", 2.0)]
    assert outcome_of(reader.events, status=200) == "ok"


def test_a_key_that_a_server_repeats_is_not_kept():
    reader = StreamReader("openai-chat", redact="sk-12345678")
    reader.feed(sse({"error": {"message": "bad key sk-12345678"}}) + b": sk-12345678\n\n", 0.0)
    assert [event.text for event in reader.events] == ["bad key [key]", "[key]"]


def test_records_round_trip_and_a_line_cut_short_is_passed_over(tmp_path):
    records = [
        replay(openai_chat(), connected_s=0.25, scheduled_s=0.1, detail="é"),
        replay([(0.1, sse(chunk({"content": "\ud83d"})))], index=1),
        replay([], index=2, status=None, outcome="connect", sent_s=None, headers_s=None),
    ]
    (tmp_path / "results.jsonl").write_bytes(records_bytes(records))
    assert list(read_records(tmp_path / "results.jsonl")) == records
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"index": 3, "le')
    assert list(read_records(tmp_path / "results.jsonl")) == records
    with refused(BadInput, "line", '{"index": 3}'):
        Record.from_json('{"index": 3}')


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"error": {"code": 429, "message": "slow down"}}', "429: slow down"),
        ('{"error": {"type": "invalid_request_error", "message": "no"}}', "invalid_request_error: no"),
        ('{"message": "no such model", "object": "error"}', "no such model"),
        ('{"detail": [{"loc": ["body", "stop"]}]}', '[{"loc": ["body", "stop"]}]'),
        ("<html>\n  Bad Gateway</html>", "<html> Bad Gateway</html>"),
        ("", ""),
    ],
)
def test_the_words_of_a_failed_answer(body, said):
    assert error_message(body) == said
