"""A server on 127.0.0.1 that reads tokens with a model, and returns routing in the forms of vLLM and SGLang."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from json_server import Call, Reply, answering

import mixlens as ml


def npy(ids):
    file = io.BytesIO()
    np.save(file, np.asarray(ids, np.uint8))
    return base64.b64encode(file.getvalue()).decode()


def int32(ids):
    return base64.b64encode(np.asarray(ids, "<i4").tobytes()).decode()


def vllm(ids, prompt, made):
    """Since 0.22: all tokens in one array, beside their ids."""
    choice = {"routed_experts": npy(ids), "prompt_token_ids": prompt, "token_ids": made}
    return {"choices": [choice]}


def vllm_021(ids, prompt, made):
    """Until 0.21: the prompt apart."""
    choice = {"routed_experts": npy(ids[len(prompt) :]), "token_ids": made}
    return {"prompt_routed_experts": npy(ids[: len(prompt)]), "prompt_token_ids": prompt, "choices": [choice]}


def sglang(ids, prompt, made):
    return {"choices": [{}], "sglext": {"routed_experts": int32(ids)}}


FORMS = {"vllm": vllm, "vllm_021": vllm_021, "sglang": sglang}


@contextmanager
def serving(model, tokenizer, form="vllm", spoil: Callable | None = None, scores: bool = True) -> Iterator:
    """The server's URL and its calls.

    spoil  changes the ids [token, layer, slot] before they are sent
    """

    turn = threading.Lock()  # a Recorder sees the forwards of every thread

    def reply(call: Call) -> Reply:
        with turn:
            return answer_to(call)

    def answer_to(call: Call) -> Reply:
        if call.path.endswith("/models"):
            return Reply({"data": [{"id": "served", "root": str(model.name_or_path)}]})
        body = call.body
        chat = "messages" in body
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        prompt = tokenizer(text)["input_ids"] if isinstance(text, str) else text
        made = []
        with torch.no_grad():
            for _ in range(body["max_tokens"]):
                made.append(int(model(torch.tensor([[*prompt, *made]])).logits[0, -1].argmax()))
            with ml.Recorder(model, signals=[]) as recorder:
                logits = model(torch.tensor([[*prompt, *made[:-1]]])).logits[0].log_softmax(-1)
        ids = recorder.trace().read("expert_id")
        asked = body.get("return_routed_experts") or body.get("return_token_ids")
        answer = FORMS[form](ids if spoil is None else spoil(ids), prompt, made) if asked else {"choices": [{}]}
        choice = answer["choices"][0]
        written = tokenizer.decode(made)
        choice |= {"message": {"role": "assistant", "content": written}} if chat else {"text": written}
        choice |= {"finish_reason": "length", "index": 0}
        if scores and body.get("prompt_logprobs") is not None and form.startswith("vllm"):
            known = [{str(t): {"logprob": float(logits[n, t]), "rank": 1}} for n, t in enumerate(prompt[1:])]
            choice["prompt_logprobs"] = [None, *known]
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(made)}
        return Reply({**answer, "model": "served", "usage": usage})

    with answering(reply) as (url, calls):
        yield url + "/v1", calls
