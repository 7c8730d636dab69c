"""Generation for evaluations: each row stops at its stop strings, and each sampled row has its own noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mixlens.errors import BadInput

_KNOWN = {"do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "until"}


def check_sampling(given: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Return the generation_kwargs of a task with until, max_gen_toks and temperature (0.0 for greedy) filled in.

    max_new_tokens  default for tasks without a limit; lm-eval's 256 would cut worked answers short

    Raises BadInput for an argument that would be ignored silently.
    """
    asked: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), max_new_tokens))
    if unknown := sorted(set(asked) - _KNOWN):
        raise BadInput(
            f"Cannot sample with {', '.join(unknown)}: mixlens samples by temperature, top_k and top_p. Remove the "
            "others from the task's generation_kwargs.",
            argument="generation_kwargs",
            value=unknown,
        )
    asked["temperature"] = float(asked.get("temperature") or 0.0) if asked["do_sample"] else 0.0
    return asked


@dataclass(frozen=True)
class Sampling:
    """Sampling by temperature, then top-k, then top-p, with one seed per row. Without seeds, decoding is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seeds: tuple[int, ...] = ()

    @classmethod
    def of(cls, asked: Mapping[str, Any], seeds: Sequence[int]) -> Sampling:
        """Create from the result of check_sampling."""
        if not asked["temperature"]:
            return GREEDY
        return cls(asked["temperature"], float(asked.get("top_p") or 1.0), int(asked.get("top_k") or 0), tuple(seeds))

    def processors(self) -> LogitsProcessorList:
        if not self.seeds:
            return LogitsProcessorList()
        chain: list[Any] = [TemperatureLogitsWarper(self.temperature)]
        chain += [TopKLogitsWarper(self.top_k)] if self.top_k > 0 else []
        chain += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        return LogitsProcessorList([*chain, SeededNoise(self.seeds)])


GREEDY = Sampling()


class SeededNoise(LogitsProcessor):
    """Gumbel noise with one stream per row: the largest noisy logit is a draw from the softmax (Gumbel-max trick).

    Draws from a shared stream would depend on which rows share a batch, and a resumed run would differ.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._streams = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=stream) for stream in self._streams])
        return scores.float() - torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7))).to(scores.device)


class StopStrings(StoppingCriteria):
    """Stop a row once the tail of its answer, decoded as for grading, contains a stop string."""

    def __init__(self, lm: Any, until: Sequence[str], prompt_columns: int) -> None:
        self.lm, self.until, self.start = lm, [stop for stop in until if stop], prompt_columns
        # Every token has at least one byte.
        self.tail = 1 + max([len(stop.encode()) for stop in self.until], default=0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> Any:
        first = max(self.start, input_ids.shape[1] - self.tail)
        texts = [self.lm.decode(row) for row in input_ids[:, first:].tolist()] if self.until else [""] * len(input_ids)
        done = [any(stop in text for stop in self.until) for text in texts]
        return torch.tensor(done, device=input_ids.device)


@torch.inference_mode()
def generate(
    lm: Any, ids: torch.Tensor, mask: torch.Tensor, *, max_new_tokens: int, until: Sequence[str], sampling: Sampling
) -> list[list[int]]:
    """Return the token ids that the model appends to each row of left-padded prompts [rows, columns]."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # draws come from SeededNoise
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(lm.stop_ids),
        pad_token_id=min(lm.stop_ids),
        repetition_penalty=1.0,
    )
    written = lm.model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=sampling.processors(),
        stopping_criteria=StoppingCriteriaList([StopStrings(lm, until, ids.shape[1])]),
    )
    return written[:, ids.shape[1] :].tolist()
