"""Evaluations over an endpoint: what it cannot score is refused, with what to use instead."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from helpers.refusals import refused
from transformers import AutoTokenizer

import mixlens as ml
from mixlens.cli.main import main
from mixlens.evals.response_cache import Answers
from mixlens.models.demo import demo_path

QUIET = ml.evals.EvalSettings(progress=False)


@pytest.fixture(scope="module")
def demo():
    return ml.load("demo", verbose=False)


def closed(protocol: str) -> ml.Endpoint:
    """Nobody listens there."""
    return ml.Endpoint("http://127.0.0.1:9/v1", model="mixtral", protocol=protocol)


def test_a_chat_endpoint_is_not_asked_for_log_probabilities(shared):
    with refused(ml.BadInput, "protocol", "openai-chat"):
        ml.evaluate(closed("openai-chat"), "mmlu_5shot::virology", data=shared / "data", limit=1, settings=QUIET)


def test_a_chat_endpoint_is_not_asked_to_continue_a_text(shared):
    with refused(ml.BadInput, "protocol", "openai-chat"):
        ml.evaluate(closed("openai-chat"), "humaneval_0shot", data=shared / "data", limit=1, settings=QUIET)


def test_a_completions_endpoint_has_no_chat_template(shared):
    with refused(ml.BadInput, "protocol", "openai-completions"):
        ml.evaluate(
            closed("openai-completions"), "humaneval_0shot_instruct", data=shared / "data", limit=1, settings=QUIET
        )


def test_an_answer_with_half_a_character_is_kept(tmp_path):
    answers = Answers(tmp_path / "answers")
    answers.add("one", [("task", 0, 0, 0)], ["half \ud83d of one"])
    assert Answers(tmp_path / "answers").by_key == answers.by_key == {("task", 0, 0, 0): "half ? of one"}


@contextlib.contextmanager
def echoing(model, *, specials: str = "<s>", listed: bool = True, scores: bool = True, best: bool = True):
    """A server that echoes prompts with log-probabilities in the form of vLLM 0.32 (`listed`) or llama.cpp.

    vLLM lists BOS among the tokens, their texts have no leading blanks, and offsets into the text sum their lengths.
    llama.cpp counts BOS but does not list it, and gives the first token that it lists no log-probability.
    """
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
            ids = tokenizer.encode(specials + text, add_special_tokens=False)
            with lock, torch.inference_mode():
                given = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            ids.append(int(given[-1].argmax()))
            tokens = [tokenizer.decode([one]).lstrip() for one in ids]
            hidden = 0 if listed else len(tokenizer.encode(specials, add_special_tokens=False)[:1])
            logprobs = [None, *(float(given[n, one]) for n, one in enumerate(ids[1:]))]
            likeliest = [None, *({"best": float(row.max())} for row in given)]
            offsets = np.cumsum([0, *map(len, tokens[:-1])]).tolist()
            columns = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": likeliest, "text_offset": offsets}
            columns = {name: column[hidden:] for name, column in columns.items()}
            columns["token_logprobs"][0] = None
            columns["top_logprobs"] = columns["top_logprobs"] if best else None
            choice = {"text": text + tokens[-1], "finish_reason": "length", "logprobs": columns if scores else None}
            usage = {"prompt_tokens": len(ids) - 1, "completion_tokens": 1}
            body = json.dumps({"choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        yield ml.Endpoint(url, model="demo", protocol="openai-completions")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("listed", [True, False])
def test_an_echoing_server_scores_as_its_model_does_here(demo, listed):
    with echoing(demo, listed=listed) as endpoint:
        there = ml.evaluate(endpoint, "demo", limit=2, settings=QUIET).samples
    here = ml.evaluate(demo, "demo", limit=2, settings=QUIET).samples
    assert list(there.sample_id) == list(here.sample_id)
    assert len(there) == 12
    for ours, theirs in zip(here.logprobs, there.logprobs, strict=True):
        np.testing.assert_allclose(theirs, ours, atol=1e-3)


@pytest.mark.parametrize(("specials", "found"), [("", ("bos", 0)), ("<s><s>", ("bos", 2))])
def test_a_server_must_put_one_beginning_of_sequence(demo, specials, found):
    with echoing(demo, specials=specials) as endpoint, refused(ml.BadInput, *found):
        ml.evaluate(endpoint, "demo", limit=1, settings=QUIET)


@pytest.mark.parametrize("without", ["scores", "best"])
def test_an_echo_without_log_probabilities_is_refused(demo, without):
    with echoing(demo, **{without: False}) as endpoint, refused(ml.BadInput, "logprobs", "demo_0shot::languages"):
        ml.evaluate(endpoint, "demo", limit=1, settings=QUIET)


def test_words_of_transformers_are_not_dropped_for_vllm(capsys, tmp_path):
    out = str(tmp_path / "out")
    assert main(["eval", "demo", "demo", "--backend", "vllm", "--quantization", "nf4", "--out", out]) == 2
    assert "--vllm-args" in capsys.readouterr().err
