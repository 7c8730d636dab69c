"""Evaluations with an engine in this process, which runs the forwards of a LocalLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mixlens.engines.check import Checker, Routers
from mixlens.engines.replies import Routed, columns_of_answers, trace_of_answers
from mixlens.engines.vllm_engine import VLLM, Rows, weights_of
from mixlens.evals.generating import check_sampling
from mixlens.evals.model import Batch, LocalLM
from mixlens.evals.response_cache import Reply
from mixlens.models.layout import moe_layers
from mixlens.trace.shards import narrowed, pack_weights
from mixlens.trace.trace import Trace


class EngineLM(LocalLM):
    """A LocalLM whose forwards run in an engine, which caches prefixes internally.

    read  (tokens, number of prompt tokens, routing) of every row, in the order of `seen`
    """

    def __init__(self, engine: VLLM, tokenizer: Any, **options: Any) -> None:
        super().__init__(engine.skeleton, tokenizer, **{**options, "share_prefix": False})
        self.engine = engine
        self.read: list[tuple[list[int], int, Rows]] = []

    def _scored(self, batch: Batch, requests: Sequence[Any] | None = None) -> dict[int, tuple[float, bool]]:
        asked = [(row.ids, number, continuation) for row in batch.rows for number, continuation in row.asked]
        prompts = [[*ids, continuation[-1]] for ids, _, continuation in asked]
        params = self.engine.params(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        outputs, rows = self.engine.generate(prompts, params)
        self._note(batch, requests)
        found, noted = {}, set()
        for (ids, number, continuation), output, routing in zip(asked, outputs, rows, strict=True):
            scores = [output.prompt_logprobs[at][token] for at, token in _places(ids, continuation)]
            found[number] = (float(sum(one.logprob for one in scores)), all(one.rank == 1 for one in scores))
            if requests is not None and ids not in noted:
                noted.add(ids)
                self.read.append((list(ids), len(ids), routing.first(len(ids))))
        return found

    def _generated(self, requests: Sequence[Any], batch: Batch, repeats: Sequence[int]) -> list[str]:
        asked = check_sampling(requests[batch.requests[0]].args[1], self.max_gen_toks)
        until = [stop for stop in asked["until"] if stop]
        common = {name: asked[name] for name in ("top_p", "top_k") if asked.get(name)}
        params = [
            self.engine.params(
                max_tokens=asked["max_gen_toks"],
                temperature=asked["temperature"],
                stop=until,
                seed=self.seed + repeats[number] if asked["temperature"] else None,
                stop_token_ids=sorted(self.stop_ids),
                **common,
            )
            for number in batch.requests
        ]
        outputs, rows = self.engine.generate([row.ids for row in batch.rows], params)
        self._note(batch, requests, repeats=repeats)
        answers = []
        for row, output, routing in zip(batch.rows, outputs, rows, strict=True):
            made = list(output.outputs[0].token_ids)
            self.read.append(([*row.ids, *made[:-1]], len(row.ids), routing))
            finish = "length" if output.outputs[0].finish_reason == "length" else "stop"
            answers.append(Reply(self.finish(made, until), finish=finish))
        return answers

    def trace(self, seen: Sequence[dict[str, Any]]) -> Trace:
        """Return the routing of the rows that were read, named by `seen`."""
        layers, checker = moe_layers(self.model), Checker(Routers.of(self.model))
        found = [Routed(rows.ids, n, len(ids) + 1 - n, ids, None, 0, "vllm") for ids, n, rows in self.read]
        columns = columns_of_answers(found, checker)
        logits = np.concatenate([rows.logits for _, _, rows in self.read])
        columns["router_logits"] = narrowed(logits, np.float16)
        if all(layer.rule is not None for layer in layers):
            columns["weight"] = pack_weights(weights_of(layers, logits, columns["expert_id"]))
        return trace_of_answers(columns, seen, checker, source=self.engine.name, model=self.engine.describe())


def _places(ids: tuple[int, ...], continuation: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (position, id) of the tokens of a continuation, the last of which follows `ids`."""
    begin = len(ids) + 1 - len(continuation)
    return zip(range(begin, len(ids) + 1), continuation, strict=True)
