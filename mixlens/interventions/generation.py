"""What a call of generate decides while it runs: when it samples, and which rows have ended."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from mixlens.errors import RecordingError

_ONE_ROW_AT_A_TIME = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_ATTRIBUTE = "_mixlens_generate"


@dataclass(eq=False)
class Generation:
    """One call of generate, as its forwards and its stopping criteria show it.

    mask_given  whether the caller passed an attention mask
    assistant   the assistant model, if the caller passed one
    parent      the generate that called this one
    batch       the rows that its forwards read; another cache is refused
    ended       after each sampled column, bool [rows]: rows whose later tokens are padding
    read        sampled columns that a forward has read
    stop        ids that end a row
    pad_tells   whether generate itself tells padding: by a pad token that ends no sequence
    """

    mask_given: bool = False
    assistant: Any = None
    parent: Generation | None = None
    batch: Any = None
    ended: list[torch.Tensor] = field(default_factory=list)
    read: int = 0
    pad_tells: bool = False
    stop: torch.Tensor | None = None

    def resolve(self, config: Any, who: str) -> None:
        """Read what generate made of its options.

        Raises RecordingError for ways of generating that read tokens more than once or take them back.
        """
        mode = config.get_generation_mode(self.assistant)
        what = mode.value.replace("_", " ") if mode not in _ONE_ROW_AT_A_TIME else ""
        if not what and config.use_cache is False:
            what = "generation without a cache"
        if what:
            raise RecordingError(
                f"{who} cannot follow {what}: it reads tokens more than once, or takes them back, so they cannot be "
                "counted. Sample or decode greedily, with one beam and the cache.",
                argument="generate",
                value=what,
            )
        pad, stop = config._pad_token_tensor, config._eos_token_tensor
        self.stop = stop
        self.pad_tells = pad is not None and (stop is None or not bool(torch.isin(stop, pad).any()))

    def decide(self, ended: torch.Tensor, *, padded: bool) -> None:
        """Take in which rows have ended with the column just sampled; `padded`: they are fed padding from now on."""
        if self.ended:
            ended = self.ended[-1] | ended
        self.ended.append(ended if padded else ended.all().expand_as(ended))

    def padding(self, step: int, ids: np.ndarray) -> np.ndarray:
        """bool [rows, columns] of sampled columns from number `step` on with these ids.

        An end-of-sequence token counts as padding, as does what a row is fed after it has ended.
        """
        columns = ids.shape[1]
        ended = torch.stack(self.ended[max(step - 1, 0) : step + columns], 1).cpu().numpy()
        if not step:
            ended = np.pad(ended, ((0, 0), (1, 0)))
        before, now = ended[:, :-1], ended[:, 1:]
        stops = np.isin(ids, () if self.stop is None else self.stop.cpu().numpy())
        return before | (now & stops) | now.all(0)


class _Watched(StoppingCriteriaList):
    """Stopping criteria that tell their verdict to whoever follows."""

    generations: tuple[Generation, ...] = ()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        ended = super().__call__(input_ids, scores, **kwargs)
        padded = any(hasattr(criterion, "eos_token_id") for criterion in self)
        for generation in self.generations:
            generation.decide(ended, padded=padded)
        return ended


class _InPlaceOf:
    """Runs in place of a method of one model; a copy of the model has its own method in its place."""

    def __init__(self, model: Any, name: str, run: Callable[..., Any]) -> None:
        self._model, self._name, self._run = model, name, run
        functools.update_wrapper(self, getattr(model, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._model))
        return self if copied is None else getattr(type(copied), self._name).__get__(copied)


class _GenerateWatch:
    """Replaces `generate` of one model, as long as anybody follows it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.followers: list[Any] = []
        self.own = {name: vars(model).get(name) for name in ("generate", "_get_stopping_criteria")}
        self.generate: Callable[..., Any] = model.generate
        self.criteria: Callable[..., Any] | None = getattr(model, "_get_stopping_criteria", None)

    def __deepcopy__(self, _memo: dict[int, Any]) -> None:
        """Nobody watches a copy of the model."""

    def install(self) -> None:
        self.model.generate = _InPlaceOf(self.model, "generate", self._generate)
        if self.criteria is not None:
            self.model._get_stopping_criteria = _InPlaceOf(self.model, "_get_stopping_criteria", self._criteria)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for follower in tuple(self.followers):
                stack.enter_context(follower.generation(kwargs))
            return self.generate(*args, **kwargs)

    def _criteria(self, *args: Any, **kwargs: Any) -> Any:
        assert self.criteria is not None
        config = kwargs.get("generation_config", args[0] if args else None)
        running = []
        for follower in tuple(self.followers):
            if (generation := follower.running) is None:
                raise RecordingError(
                    f"{follower.who} cannot follow a generate that was taken from the model before the block, or from "
                    "its class. Call model.generate inside the block.",
                    argument="generate",
                    value="taken before",
                )
            generation.resolve(config, follower.who)
            running.append(generation)
        watched = _Watched(self.criteria(*args, **kwargs))
        watched.generations = tuple(running)
        return watched

    def remove(self) -> None:
        for name, value in self.own.items():
            if name in vars(self.model):
                delattr(self.model, name)
            if value is not None:
                setattr(self.model, name, value)


def watch_generate(model: nn.Module, follower: Any) -> Callable[[], None]:
    """Have `follower.generation(kwargs)` entered round every generate of `model`; gives the way back.

    Whoever follows may leave in any order.
    """
    if not hasattr(model, "generate"):
        return lambda: None
    watch = vars(model).get(_ATTRIBUTE)
    if watch is None:
        watch = _GenerateWatch(model)
        watch.install()
        setattr(model, _ATTRIBUTE, watch)
    watch.followers.append(follower)

    def leave() -> None:
        watch.followers.remove(follower)
        if not watch.followers:
            watch.remove()
            delattr(model, _ATTRIBUTE)

    return leave
