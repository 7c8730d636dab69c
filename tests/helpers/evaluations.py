"""Evaluations without a benchmark: requests of lm-eval's, small task files, models that say what they are told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from mixlens.evals.backends import LocalBackend as LocalBackend
from mixlens.evals.generating import Sampling as Sampling
from mixlens.evals.generating import StopStrings as StopStrings
from mixlens.evals.generating import check_sampling as check_sampling
from mixlens.evals.lm_eval_grading import Job as Job


def pairs(asked: Sequence[tuple[str, str]], task: str = "t") -> list[Instance]:
    """Log-likelihood requests of (context, continuation)."""
    return [Instance("loglikelihood", {}, pair, 0, (task, doc, 1)) for doc, pair in enumerate(asked)]


def prompts(asked: Sequence[str], repeats: int = 1, **kwargs: Any) -> list[Instance]:
    """Generative requests; a repeated one is the same object several times, as lm-eval gives it."""
    made = [
        Instance("generate_until", {}, (prompt, kwargs), 0, ("t", doc, repeats)) for doc, prompt in enumerate(asked)
    ]
    return [one for one in made for _ in range(repeats)]


class Told(LM):
    """A model object that answers as it is told.

    scores  {choice: log-probability}; says  what it generates, by prompt and how often it was asked before
    """

    tokenizer_name = ""

    def __init__(
        self, scores: Mapping[str, float] | None = None, says: Callable[[str, int], str] | None = None
    ) -> None:
        super().__init__()
        self.scores, self.says, self.asked = scores or {}, says, []

    def loglikelihood(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        return [(self.scores[request.args[1]], False) for request in requests]

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        answers = []
        for request in requests:
            self.asked.append(request.args)
            before = sum(asked[0] == request.args[0] for asked in self.asked) - 1
            answers.append(self.says(request.args[0], before))
        return answers

    def loglikelihood_rolling(self, requests: list[Any], **_: Any) -> list[float]:
        raise AssertionError


def task_file(folder: Path, name: str, rows: Sequence[Mapping[str, Any]], **fields: Any) -> str:
    """A task file in lm-eval's format over these rows; JSON is YAML."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task | {"test_split": "test", "num_fewshot": 0} | fields))
    return str(path)


@torch.no_grad()
def scored_alone(model: Any, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Sum of the continuation's log-probabilities, token by token behind all before it; and whether all are top."""
    total, greedy, ids = 0.0, True, list(context)
    for token in continuation:
        scores = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)
        total, greedy = total + float(scores[token]), greedy and int(scores.argmax()) == token
        ids.append(token)
    return total, greedy


@torch.no_grad()
def greedy_alone(model: Any, prompt: Sequence[int], n: int, ends: frozenset[int] = frozenset()) -> list[int]:
    """The likeliest n tokens behind a prompt, one forward each, without a cache; up to one that ends."""
    ids = list(prompt)
    for _ in range(n):
        token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]
