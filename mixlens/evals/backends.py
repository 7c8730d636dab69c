"""Backends that answer the requests of an evaluation: local models, engines, and model objects of lm-eval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import nn

from mixlens.endpoints.endpoint import Endpoint
from mixlens.engines.vllm_engine import VLLM
from mixlens.errors import BadInput
from mixlens.evals.engine import EngineLM
from mixlens.evals.model import Batch, LocalLM, cut, tokenizer_of
from mixlens.evals.questions import Said, ask_all
from mixlens.interventions.hooks import edits_of
from mixlens.models.provenance import describe, identity, tokenizer_sha256
from mixlens.recording.corpus import vocabulary_of
from mixlens.recording.recorder import Recorder
from mixlens.trace.trace import Trace

# Requests sent and saved together for a backend that batches internally.
_SLICE = 256
# Attributes that identify a model object of lm-eval.
_TOLD = ("revision", "dtype", "quantization", "tokenizer_revision", "add_bos_token", "max_length")


def backend_of(model: Any, settings: Any) -> Any:
    """Return the backend for a model. Raises BadInput for any other object."""
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM

    if isinstance(model, Endpoint):
        from mixlens.evals.endpoints import EndpointBackend

        return EndpointBackend(model, settings)
    if isinstance(model, HFLM):
        raise BadInput(
            f"Cannot evaluate lm-eval's {type(model).__name__}: it truncates long prompts silently, and a "
            "transformers model does not need it. Pass the model itself, and its tokenizer as "
            "EvalSettings(tokenizer=...).",
            argument="model",
            value=type(model).__name__,
        )
    if isinstance(model, LM):
        return LmEvalBackend(model)
    if isinstance(model, VLLM):
        return EngineBackend(model, settings)
    if isinstance(model, nn.Module):
        return LocalBackend(model, settings)
    raise BadInput(
        f"Cannot evaluate a {type(model).__name__}. Pass a loaded model, such as ml.load(...), an ml.Endpoint, an "
        "engine (ml.engines.vllm), or a model object of lm-eval.",
        argument="model",
        value=type(model).__name__,
    )


class LocalBackend:
    """A loaded transformers model."""

    def __init__(self, model: nn.Module, settings: Any) -> None:
        self.model = model
        self.lm = LocalLM(
            model,
            tokenizer_of(model, settings.tokenizer),
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            share_prefix=settings.share_prefix,
        )
        self.batches, self.answer, self.chat_template = self.lm.batches, self.lm.answer, self.lm.apply_chat_template

    @contextmanager
    def recording(self) -> Iterator[Callable[[], Trace]]:
        """Record the routing of the forwards in the block; call the yielded function for it after the block."""
        before = len(self.lm.seen)
        with Recorder(self.model) as recorder:
            yield lambda: recorder.trace(pd.DataFrame(self.lm.seen[before:]))

    def vocabulary(self) -> pd.Series | None:
        return vocabulary_of(self.lm.tokenizer)

    def describe(self) -> dict[str, Any]:
        return {**describe(self.model), "edits": edits_of(self.model), "backend": "transformers"}

    def identity(self) -> dict[str, Any]:
        """Return the values that identify this model, so that runs of different models are never mixed up."""
        told = ("name", "revision", "class", "dtype", "config_sha256", "router_sha256", "attention_implementation")
        kept = (*told, "weights_checksum", "adapters", "modules_sha256", "hooks", "audit", "quantization", "edits")
        model = {key: value for key, value in identity(self.model, self.describe()).items() if key in kept}
        return {**model, "tokenizer_sha256": tokenizer_sha256(self.lm.tokenizer)}

    def save_tokenizer(self, folder: str) -> None:
        self.lm.tokenizer.save_pretrained(folder)

    def gold_answer(self, prompt: str, text: str, until: list[str]) -> tuple[str, str]:
        """Return the text of an answer after a round trip through token ids, and the expected text."""
        lead = len(self.lm.tok_encode(prompt))
        ids = [*self.lm.tok_encode(prompt + text)[lead:], *sorted(self.lm.stop_ids)[:1]]
        return self.lm.finish(ids, until), cut(text, until)


class EngineBackend(LocalBackend):
    """An engine in this process."""

    def __init__(self, engine: VLLM, settings: Any) -> None:
        self.engine, self.model = engine, engine.skeleton
        self.lm: EngineLM = EngineLM(
            engine,
            tokenizer_of(engine.skeleton, settings.tokenizer),
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
        )
        self.batches, self.answer, self.chat_template = self.lm.batches, self.lm.answer, self.lm.apply_chat_template

    def describe(self) -> dict[str, Any]:
        return {**self.engine.describe(), "backend": self.engine.name}

    def identity(self) -> dict[str, Any]:
        return self.describe()

    @contextmanager
    def recording(self) -> Iterator[Callable[[], Trace]]:
        before = len(self.lm.seen)
        self.lm.read.clear()
        yield lambda: self.lm.trace(self.lm.seen[before:])


@dataclass
class LmEvalBackend:
    """A model object of lm-eval, such as VLLM, which encodes, batches and decodes internally."""

    lm: Any

    def describe(self) -> dict[str, Any]:
        return {"name": self._name(), "backend": f"lm-eval {type(self.lm).__name__}"}

    def identity(self) -> dict[str, Any]:
        found = {name: getattr(self.lm, name, None) for name in _TOLD} | self._given()
        return self.describe() | {name: str(found[name]) for name in _TOLD if found[name] is not None}

    def _given(self) -> dict[str, Any]:
        """Return the constructor arguments of the model if it keeps them, as VLLM does."""
        given = getattr(self.lm, "model_args", None)
        return given if isinstance(given, dict) else {}

    def _name(self) -> str:
        named = (self._given().get("model"), getattr(self.lm, "pretrained", None), getattr(self.lm, "model", None))
        for value in named:
            if isinstance(value, str) and value:
                return value
        return type(self.lm).__name__

    def chat_template(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.lm.apply_chat_template(history, add_generation_prompt)

    def save_tokenizer(self, folder: str) -> None:
        self.lm.tokenizer.save_pretrained(folder)

    def findings(self, requests: Sequence[Any]) -> list[dict[str, Any]]:
        """Return findings of the preflight questions if the model has a tokenizer."""
        if getattr(self.lm, "tokenizer", None) is None:
            return []
        return ask_all(self._ask, requests, {"continue", "stop"}, lambda _: None)

    def _ask(self, prompt: Any, max_tokens: int, *, stop: str = "", seed: int | None = None, again: str = "") -> Said:
        from lm_eval.api.instance import Instance

        asked = {"until": [stop] if stop else [], "max_gen_toks": max_tokens, "do_sample": False}
        (text,) = self.lm.generate_until([Instance("generate_until", {}, (prompt, asked), 0, ("preflight", 0, 1))])
        return Said(text)

    def batches(self, kind: str, requests: Sequence[Any]) -> list[Batch]:
        numbers = list(range(len(requests)))
        return [Batch(numbers[start : start + _SLICE]) for start in range(0, len(numbers), _SLICE)]

    def answer(self, kind: str, requests: Sequence[Any], batch: Batch, repeats: Sequence[int]) -> list[Any]:
        return getattr(self.lm, kind)([requests[number] for number in batch.requests])
