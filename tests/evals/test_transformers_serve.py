"""A server of another project's, `transformers serve` with the bundled model, answers as the local model does.

It gives no log-probabilities of a prompt, so the answers that are compared are generated ones.
"""

from __future__ import annotations

import csv
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from helpers.evaluations import task_file
from transformers import AutoTokenizer

import mixlens as ml
from mixlens.models.demo import demo_path

pytestmark = pytest.mark.slow
N, TOKENS, TIE = 100, 4, 1e-3


@pytest.fixture(scope="module")
def server() -> Iterator[ml.Endpoint]:
    pytest.importorskip("fastapi", reason="transformers serve needs FastAPI")
    found = shutil.which("transformers", path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip("no transformers command beside this Python")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = str(demo_path())
    process = subprocess.Popen(
        [found, "serve", name, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            assert process.poll() is None
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except httpx.TransportError:
                continue
        yield ml.Endpoint(f"http://127.0.0.1:{port}/v1", model=name, protocol="openai-completions")
    finally:
        process.kill()
        process.wait()


def questions(folder: Path) -> list[dict[str, str]]:
    """The first questions of MMLU's test split, by subject."""
    rows = []
    for path in sorted((folder / "mmlu" / "test").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for question, *choices, letter in csv.reader(file):
                listed = "".join(f"\n{name}. {text}" for name, text in zip("ABCD", choices, strict=True))
                rows.append({"q": f"{question}{listed}\nAnswer:", "a": letter})
                if len(rows) == N:
                    return rows
    return rows


@torch.no_grad()
def narrowest(model, prompt: str, answer: str) -> float:
    """The smallest gap between the two likeliest tokens along a greedy answer."""
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    ids = tokenizer.encode(tokenizer.bos_token + prompt + answer, add_special_tokens=False)
    top = model(torch.tensor([ids])).logits[0, -TOKENS - 2 :].float().log_softmax(-1).topk(2).values
    return float((top[:, 0] - top[:, 1]).min())


def test_a_hundred_questions_of_mmlu_are_answered_as_by_the_local_model(server, shared, tmp_path):
    task = task_file(
        tmp_path, "letters", questions(shared / "data"), output_type="generate_until", doc_to_text="{{q}}",
        doc_to_target="{{a}}", generation_kwargs={"until": [], "max_gen_toks": TOKENS, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    settings = ml.evals.EvalSettings(progress=False, batch_size=4)
    model = ml.load("demo", verbose=False)
    there, here = (ml.evaluate(one, task, settings=settings) for one in (server, model))
    pairs = list(zip(here.records, there.records, strict=True))
    assert len(pairs) == N
    assert len({a["response"] for a, _ in pairs}) > N // 10
    assert all(len(a["response"].strip()) > 1 for a, _ in pairs)
    # This server decodes an answer alone, and so loses its first blank.
    differing = [
        (a["prompt"], a["response"], b["response"])
        for a, b in pairs
        if a["response"].lstrip(" ") != b["response"].lstrip(" ")
    ]
    assert [row for row in differing if narrowest(model, row[0], row[1]) > TIE] == []
    found = {one["question"]: one["holds"] for one in there.meta["preflight"]}
    assert (found["max_tokens"], found["the same answer again"]) == (True, True)
    assert found["first blank"] is not True
    assert [record["replies"][0]["output_tokens"] for _, record in pairs] == [TOKENS] * N
