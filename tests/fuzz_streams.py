"""Ways in which servers stream an answer, drawn from a seed, read, and compared with what the drawn server knows.

``python tests/fuzz_streams.py --n 20000 --seed 0`` prints the streams that were read otherwise, by seed. Bytes are
split anywhere, and every piece has its own time on a clock that nobody waits for.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from mixlens.bench.events import Record, StreamReader, outcome_of
from mixlens.bench.metrics import request_table
from mixlens.bench.shares import clumped
from mixlens.endpoints.compression import Decompressor

SENT = 100.0
PIECES = ("a", " word", "é", "字", "🙂", "\n", " 7", '"', "\\n", "\u2028", "<b>")
TAGS = [(f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "seed:think")]
TAGS += [("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷"), ("<|START_THINKING|>", "<|END_THINKING|>")]
TAGS += [("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>")]
OTHERS = {"br": "brotli", "zstd": "zstandard"}

CODINGS = ("gzip", "deflate", *(coding for coding, module in OTHERS.items() if find_spec(module)))


def _zlib(window: int) -> Callable[[bytes], bytes]:
    compressor = zlib.compressobj(wbits=window)
    return lambda data: compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)


def _brotli() -> Callable[[bytes], bytes]:
    import brotli

    compressor = brotli.Compressor()
    return lambda data: compressor.process(data) + compressor.flush()


def _zstd() -> Callable[[bytes], bytes]:
    import zstandard

    compressor = zstandard.ZstdCompressor().compressobj()
    return lambda data: compressor.compress(data) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


# What a server makes of each event, flushed so that it leaves at once.
COMPRESSORS: dict[str, Callable[[], Callable[[bytes], bytes]]] = {
    "": lambda: lambda data: data,
    "gzip": lambda: _zlib(16 + zlib.MAX_WBITS),
    "deflate": lambda: _zlib(zlib.MAX_WBITS),
    "br": _brotli,
    "zstd": _zstd,
}


@dataclass
class Truth:
    """What the server did. Stamps are of the events that carry text; `counted` are tokens told of them."""

    outcome: str = "ok"
    text: str = ""
    reasoning: str = ""
    finish: str | None = None
    answer_at: list[float] = field(default_factory=list)
    shown_at: list[float] = field(default_factory=list)
    tokens: int = 0  # of the answer
    thought: int = 0  # of reasoning, shown or hidden
    after_first: int | None = None  # tokens of the answer after its first event, where a running count tells them
    answer_chars: list[int] = field(default_factory=list)  # of each event
    shown_chars: list[int] = field(default_factory=list)
    usage: bool = False
    apart: bool = False  # whether the usage tells reasoning apart
    cached: int | None = None
    model: str | None = None
    ended_at: float = SENT


class Server:
    """Writes one answer: `events` are (bytes, whether they carry text), in order."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.protocol = self.one("openai-chat", "openai-chat", "openai-completions", "anthropic", "modelslab")
        self.chats = self.protocol in ("openai-chat", "modelslab")
        self.coding = self.one(*CODINGS) if self.coin(0.2) else ""
        self.named = self.protocol == "anthropic" and self.coin(0.8)  # the SDK reads no others
        self.timing = self.one("replayed", "clumped", "clumped") if self.coin(0.2) else "streamed"
        self.whole_answer = self.coin(0.04)  # in place of a stream
        self.truth = Truth()
        self.events: list[tuple[bytes, str]] = []
        self.write()

    def one(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def coin(self, share: float = 0.5) -> bool:
        return bool(self.rng.random() < share)

    def whole(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def token(self) -> str:
        return str(self.one(*PIECES))

    # ------------------------------------------------------------------ writing

    def send(self, data: Any, carries: str = "", event: str = "") -> None:
        end = self.line_end
        if self.named and isinstance(data, dict):
            event = data.get("type", event)
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=self.coin())
        parts = [text]
        if not isinstance(data, str) and self.coin(0.05):  # one event in several lines of data
            parts = json.dumps(data, indent=1).split("\n")
        lines = ([f"event: {event}"] if event else []) + [f"data:{self.one('', ' ')}{part}" for part in parts]
        lines += [self.one("id: 7", "retry: 10", "id")] if self.coin(0.05) else []
        self.events.append((end.join([*lines, "", ""]).encode(), carries))
        if data != {"type": "ping"} and not self.finished:
            self.ends_at = len(self.events)
            self.finished = data == "[DONE]" or event == "message_stop"

    def noise(self) -> None:
        """What carries nothing."""
        while self.coin(0.25):
            what = self.one("comment", "ping", "empty", "null", "no data")
            if what == "comment":
                self.events.append((f": keep-alive{self.line_end}{self.line_end}".encode(), ""))
            elif what == "no data":
                self.events.append((f"data:{self.line_end}{self.line_end}".encode(), ""))
            elif what == "ping" or self.protocol == "anthropic":
                self.send({"type": "ping"}, event="ping")
            elif what == "null":
                self.send({**self.head, "choices": None, "usage": None})
            elif self.chats:
                delta = self.one({}, {"content": ""}, {"content": None}, {"content": []})
                self.send({**self.head, "choices": [{"index": 0, "delta": delta, "finish_reason": self.one(None, "")}]})
            else:
                self.send({**self.head, "choices": [{"index": 0, "text": ""}]})

    def write(self) -> None:
        truth = self.truth
        self.ends_at, self.finished = 0, False  # events up to the last that is none of the noise of a connection
        self.line_end = self.one("\n", "\r\n", "\r") if self.coin(0.3) else "\n"
        truth.model = self.one("mixtral", "vendor/mixtral-8x7b", None)
        self.head = {"id": "x", **({"model": truth.model} if truth.model else {})}
        truth.tokens, truth.thought = self.whole(1, 12), self.one(0, 0, self.whole(1, 6))
        if self.protocol == "openai-completions":
            truth.thought = 0
        hidden = truth.thought > 0 and self.coin(0.4)
        truth.usage = self.coin(0.7) or self.protocol == "anthropic"
        truth.apart = truth.thought > 0 and truth.usage and self.protocol != "anthropic" and (hidden or self.coin())
        if hidden and not truth.apart:
            hidden = False  # nobody could know
        truth.cached = self.one(None, 0, 8) if truth.usage else None
        self.running = self.chats and truth.usage and self.coin(0.3)
        self.at_once = self.whole(1, 3)  # tokens of an event
        truth.finish = self.one("stop", "length", "content_filter")
        fault = self.one("error", "cut", "several answers") if self.coin(0.1) else None
        if fault == "several answers" and (self.protocol == "anthropic" or truth.tokens <= self.at_once):
            fault = None
        fault = None if self.whole_answer else fault
        self.second = fault == "several answers"
        if self.whole_answer:
            self.write_whole(hidden)
            return
        self.tools = self.protocol == "openai-chat" and self.coin(0.1)  # the answer is the call of a tool
        self.begin()
        if truth.thought and not hidden:
            self.write_reasoning()
        self.write_answer()
        if fault == "error":
            truth.outcome = "error"
            fault = {"error": self.one({"message": "overloaded", "code": 503}, "overloaded", {"type": "overloaded"})}
            if self.protocol != "anthropic" and self.coin():
                gone = {"message": "gone", "code": 502}
                others = [
                    {"message": "overloaded"},
                    {"object": "error", "message": "overloaded"},
                    {"detail": "overloaded"},
                ]
                others += [{"choices": [{"index": 0, "error": gone}]}, {"choices": [{"finish_reason": "abort"}]}]
                fault = self.one(*others)
            elif self.protocol == "modelslab" and self.coin():
                fault = {"status": "error", self.one("message", "messege"): "overloaded"}
            self.send(fault, event=self.one("", "error"))
            return
        if self.second:
            truth.outcome = "malformed"
        if fault == "cut":
            truth.outcome, truth.finish = "truncated", None
            return
        self.end()

    def begin(self) -> None:
        if self.protocol == "anthropic":
            usage = {"input_tokens": 20, "output_tokens": 1}
            usage |= {} if self.truth.cached is None else {"cache_read_input_tokens": self.truth.cached}
            self.send({"type": "message_start", "message": {**self.head, "usage": usage}}, event="message_start")
            self.send({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
        elif self.coin(0.2):  # counts of the prompt alone, before anything is written
            usage = {"prompt_tokens": 20, "completion_tokens": self.one(0, 1)}
            empty = {"delta": {"role": "assistant"}} if self.chats else {"text": ""}
            self.send({**self.head, "choices": [{"index": 0, **empty}], "usage": usage})
        elif self.chats and self.coin():
            self.send({**self.head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        self.noise()

    def write_reasoning(self) -> None:
        form = self.one("reasoning", "reasoning_content", "reasoning_details", "both", "blocks", "tags")
        tokens = [self.token() for _ in range(self.truth.thought)]
        self.truth.reasoning = "".join(tokens)
        if self.protocol == "anthropic":
            self.truth.shown_chars = [len(part) for part in tokens]
            for part in tokens:
                delta = {"type": "thinking_delta", "thinking": part}
                self.send({"type": "content_block_delta", "index": 0, "delta": delta}, "reasoning")
                self.noise()
            return
        if form == "tags":
            opening, closing = self.one(*TAGS)
            tokens = [opening, *tokens, closing]
            self.truth.thought += 2
            self.truth.reasoning = "".join(tokens)
        self.truth.shown_chars = [len(part) for part in tokens]
        for part in tokens:
            delta: dict[str, Any] = {
                "reasoning": {"reasoning": part},
                "reasoning_content": {"reasoning_content": part, "content": None},
                "reasoning_details": {"reasoning_details": [{"type": "reasoning.text", "text": part}]},
                "both": {"reasoning": part, "reasoning_details": [{"type": "reasoning.text", "text": part}]},
                "blocks": {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": part}]}]},
                "tags": {"content": part},
            }[form]
            self.send({**self.head, "choices": [{"index": 0, "delta": delta}]}, "reasoning")
            self.noise()

    def write_answer(self) -> None:
        truth = self.truth
        left, done = [self.token() for _ in range(truth.tokens)], truth.thought
        if not left[0].strip():
            left[0] = "x"  # an answer that begins with a blank after tags is a matter of taste
        truth.text = "".join(left)
        first = True
        while left:
            part, left = left[: self.at_once], left[self.at_once :]
            text = "".join(part)
            truth.answer_chars.append(len(text))
            done += len(part)
            if first and self.running:
                truth.after_first = truth.tokens - len(part)
            first = False
            usage = {"usage": {"prompt_tokens": 20, "completion_tokens": done}} if self.running else {}
            if self.protocol == "anthropic":
                delta = {"type": "text_delta", "text": text}
                self.send({"type": "content_block_delta", "index": 0, "delta": delta}, "answer")
            elif self.protocol == "openai-completions":
                index = int(self.second and len(left) == 0)
                self.send({**self.head, "choices": [{"index": index, "text": text, "finish_reason": None}]}, "answer")
            else:
                content = self.one(text, [{"type": "text", "text": text}])
                called = {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
                index = int(self.second and len(left) == 0)
                delta = called if self.tools else {"content": content}
                choice = {"index": index, "delta": delta, "finish_reason": None}
                self.send({**self.head, "choices": [choice], **usage}, "answer")
            self.noise()

    def end(self) -> None:
        truth = self.truth
        total = truth.tokens + truth.thought
        if self.protocol == "anthropic":
            truth.finish = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}[truth.finish or ""]
            delta = {"stop_reason": truth.finish}
            self.send({"type": "message_delta", "delta": delta, "usage": {"output_tokens": total}})
            self.send({"type": "message_stop"}, event="message_stop")
            self.tail()
            return
        usage = self.usage()
        body = {"text": ""} if self.protocol == "openai-completions" else {"delta": {}}
        last = {**self.head, "choices": [{"index": 0, **body, "finish_reason": truth.finish}]}
        together = truth.usage and self.coin()
        place = self.one("usage", "usage", "choice", "x_groq") if self.chats else "usage"
        if together and place == "choice":
            last["choices"][0]["usage"] = usage
        elif together:
            last |= {"x_groq": {"usage": usage}} if place == "x_groq" else {"usage": usage}
        self.send(last)
        if truth.usage and (not together or self.coin(0.2)):
            self.send({**self.head, "choices": self.one([], None), "usage": usage})
        self.noise()
        if self.coin(0.8):
            self.send("[DONE]")
            self.tail()

    def usage(self) -> dict[str, Any]:
        """The counts at the end, in one of the forms of the protocols of OpenAI."""
        truth = self.truth
        total, cached = truth.tokens + truth.thought, truth.cached
        usage: dict[str, Any] = {"prompt_tokens": 20, "completion_tokens": total}
        if cached is not None:
            usage |= self.one(
                {"prompt_tokens_details": {"cached_tokens": cached}},
                {"prompt_cache_hit_tokens": cached, "prompt_cache_miss_tokens": 20 - cached},
                {"cached_tokens": cached, "prompt_tokens_details": None},
                {"cache_read_input_tokens": cached},
            )
        if truth.apart:
            usage["completion_tokens_details"] = {"reasoning_tokens": truth.thought}
            if self.coin(0.3):  # as at xAI, whose completion leaves them out
                usage |= {"completion_tokens": truth.tokens, "total_tokens": 20 + total}
        return {k: float(v) if isinstance(v, int) else v for k, v in usage.items()} if self.coin(0.1) else usage

    def write_whole(self, hidden: bool) -> None:
        """A complete answer under the name of a stream."""
        truth = self.truth
        truth.text = "".join(self.token() for _ in range(truth.tokens)).lstrip() or "x"
        truth.reasoning = "" if hidden or not truth.thought else "".join(self.token() for _ in range(truth.thought))
        if self.protocol == "anthropic":
            truth.finish = "end_turn"
            blocks = [{"type": "thinking", "thinking": truth.reasoning}] if truth.reasoning else []
            usage = {"input_tokens": 20, "output_tokens": truth.tokens + truth.thought}
            usage |= {} if truth.cached is None else {"cache_read_input_tokens": truth.cached}
            content = [*blocks, {"type": "text", "text": truth.text}]
            body = {**self.head, "type": "message", "content": content, "stop_reason": "end_turn", "usage": usage}
        else:
            message = {"content": truth.text} | ({"reasoning_content": truth.reasoning} if truth.reasoning else {})
            inner = {"message": message} if self.chats else {"text": truth.text}
            body = {**self.head, "choices": [{"index": 0, **inner, "finish_reason": truth.finish}]}
            body |= {"usage": self.usage()} if truth.usage else {}
        data = json.dumps(body, ensure_ascii=self.coin(), indent=self.one(None, 1)).encode()
        self.events.append((self.one(b"", b"\n", b" \r\n") + data, "answer"))
        self.ends_at = 1

    def tail(self) -> None:
        """Keep-alives after the end, as of a connection that stays open."""
        while self.coin(0.2):
            self.events.append((f": still here{self.line_end}{self.line_end}".encode(), ""))

    # ------------------------------------------------------------------ sending

    def pieces(self) -> list[tuple[bytes, float]]:
        """The bytes, split anywhere, with the times at which they arrive; notes the stamps of what carries text."""
        at, found = SENT, []
        bom = b"\xef\xbb\xbf" if self.coin(0.05) else b""
        compress = COMPRESSORS[self.coding]()
        for number, (data, carries) in enumerate(self.events):
            if self.timing == "streamed" or (self.timing == "clumped" and number % 4 == 0) or not number:
                at += float(self.rng.uniform(0.001, 0.05))
            whole = compress(bom * (not number) + data)
            if self.coding:  # as much as came may hold the event before its last byte
                found += [(whole[:3], at), (whole[3:], at)]
                self.note(at, number, carries)
                continue
            if self.timing != "streamed":
                found.append((whole, at))
                self.note(at, number, carries)
                continue
            parts = []
            tail = (
                0 if self.whole_answer else len(self.line_end) - 1
            )  # a carriage return ends its line, whatever follows
            while self.coin(0.4) and len(whole) > 1 + tail:
                cut = self.whole(1, len(whole) - 1 - tail)
                parts.append(whole[:cut])
                whole = whole[cut:]
            parts.append(whole)
            step = 0.0005 / len(parts)
            for place, part in enumerate(parts):
                found.append((part, at - 0.0005 + step * (place + 1)))
            self.note(found[-1][1], number, carries)
        return found

    def note(self, stamp: float, number: int, carries: str) -> None:
        if carries == "answer":
            self.truth.answer_at.append(stamp)
        if carries:
            self.truth.shown_at.append(stamp)
        if number < self.ends_at:
            self.truth.ended_at = stamp

    def buffered(self) -> bool:
        """Whether more than half of the gaps are far below the mean, and not all of them."""
        gaps = np.diff(self.truth.shown_at)
        return bool(gaps.sum() > 1e-4 * (len(gaps) + 1)) and bool((gaps < 0.1 * gaps.mean()).mean() > 0.5)


def read(server: Server) -> Record:
    """The record of what a server wrote."""
    reader = StreamReader(server.protocol)
    at = SENT
    decompressor = Decompressor(server.coding)
    for raw, at in server.pieces():
        for piece in decompressor.feed(raw):
            reader.feed(piece, at)
    reader.close(at)
    at = at if reader.ended_s is None else reader.ended_s
    outcome = outcome_of(reader.events, status=200)
    return Record(
        0,
        "concurrency 1",
        "measured",
        outcome,
        tuple(reader.events),
        SENT,
        at,
        sent_s=SENT,
        status=200,
        form=reader.form,
    )


def of_first(tokens: int, chars: list[int]) -> int:
    """Tokens of the first of several events, as they are to be estimated where nobody counts them."""
    return max(1, round(tokens * chars[0] / sum(chars))) if 0 < len(chars) < 8 and tokens >= 1.5 * len(chars) else 1


def outcome(seed: int) -> str:
    """Gives "equal", or what is not."""
    server = Server(seed)
    record, truth = read(server), server.truth
    if record.outcome != truth.outcome:
        return f"outcome {record.outcome} for {truth.outcome}"
    if truth.outcome != "ok":
        return "equal"
    row = request_table([record]).iloc[0].to_dict()
    streamed = truth.thought if truth.reasoning else 0
    total = truth.tokens + truth.thought if truth.usage else len(truth.shown_at)
    expected: dict[str, Any] = {
        "ttft_s": math.nan if server.whole_answer else truth.shown_at[0] - SENT,
        "ttft_answer_s": math.nan if server.whole_answer else truth.answer_at[0] - SENT,
        "e2e_token_s": truth.shown_at[-1] - SENT,
        "e2e_stream_s": truth.ended_at - SENT,
        "output_tokens": total,
        "cached_tokens": math.nan if truth.cached is None else truth.cached,
        "reasoning_tokens": truth.thought if truth.apart else math.nan,
    }
    if truth.usage and streamed and not truth.apart:  # the two cannot be told apart: one clock for both
        span = truth.shown_at[-1] - truth.shown_at[0]
        after = total - of_first(total, truth.shown_chars + truth.answer_chars)
    elif truth.usage:
        span = truth.answer_at[-1] - truth.answer_at[0]
        after = truth.after_first
        after = truth.tokens - of_first(truth.tokens, truth.answer_chars) if after is None else after
    else:
        span, after = truth.answer_at[-1] - truth.answer_at[0], len(truth.answer_at) - 1
    if server.whole_answer:
        span = 0.0
    elif len(truth.shown_at) >= 4 and truth.shown_at[-1] == truth.shown_at[0]:
        span = 0.0  # replayed
    expected["tpot_s"] = span / after if after > 0 and span > 0 else math.nan
    for name, value in expected.items():
        given = float(row[name])
        if not (math.isclose(given, value, rel_tol=1e-9, abs_tol=1e-12) or (math.isnan(given) and math.isnan(value))):
            return f"{name} {given} for {value}"
    if clumped(record) != (len(truth.shown_at) > 8 and server.buffered()):
        return f"clumped {clumped(record)}"
    told = (record.text, record.reasoning, record.finish, row["model"])
    known = (truth.text, truth.reasoning, truth.finish, truth.model)
    return "equal" if told == known else f"{told} for {known}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wrong = 0
    for seed in range(options.seed, options.seed + options.n):
        if (result := outcome(seed)) != "equal":
            wrong += 1
            print(seed, result, flush=True)
    print(f"{options.n} streams, {wrong} read otherwise")


if __name__ == "__main__":
    main()
