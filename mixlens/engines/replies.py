"""Routing in the answers of vLLM and SGLang servers.

vLLM sends an array in NumPy's format: since 0.22 for all tokens in `choices[].routed_experts`, and before that for the
prompt separately in `prompt_routed_experts`. SGLang sends the raw bytes of int32 in `meta_info` or `sglext`, so the
shape must be known.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixlens.engines.check import Checker, Routers
from mixlens.errors import SourceError
from mixlens.trace.shards import GENERATED, PROMPT, MemoryPart
from mixlens.trace.trace import Trace, from_parts

_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class Routed:
    """The routing of one answer, as received.

    ids            integers [row, layer, slot]
    prompt         number of tokens of the prompt
    generated      number of tokens of the answer
    token_ids      ids of both; None if the server does not return them
    prompt_rows    number of rows received for the prompt; None if rows were not separate
    start          number of tokens at the beginning whose rows were not requested
    form           "vllm" or "sglang"
    """

    ids: np.ndarray
    prompt: int
    generated: int
    token_ids: list[int] | None
    prompt_rows: int | None
    start: int
    form: str

    def checked(self, checker: Checker) -> np.ndarray:
        """Return the checked ids of every token that a forward pass read, as from `Checker.check`."""
        return checker.check(
            self.ids,
            prompt=self.prompt,
            generated=self.generated,
            token_ids=self.token_ids,
            prompt_rows=self.prompt_rows,
            start=self.start,
        )


def routed(answer: Mapping[str, Any], routers: Routers, *, prompt_ids: Sequence[int] | None = None) -> Routed | None:
    """Read the routing of an answer.

    Parameters
    ----------
    answer : Mapping[str, Any]
        JSON of an answer that was not streamed, from the completions or chat API, or from SGLang's /generate.
    routers : Routers
        Routers of the model that answered.
    prompt_ids : Sequence[int], optional
        Ids of the prompt, if it was sent as ids.

    Returns
    -------
    Routed or None
        None if the answer has no routing.

    Raises
    ------
    SourceError
        If the routing is not an array of ids, or token counts are missing; the argument is "shape".
    """
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    meta = _mapping(answer.get("meta_info"))
    about = {**_mapping(answer.get("usage")), **meta}
    places = (choice, answer, meta, _mapping(answer.get("sglext")), _mapping(choice.get("sglext")))
    sent = next((place["routed_experts"] for place in places if place.get("routed_experts") is not None), None)
    if sent is None:
        return None
    before = answer.get("prompt_routed_experts", choice.get("prompt_routed_experts"))
    read = _ids(choice.get("prompt_token_ids"), answer.get("prompt_token_ids"), prompt_ids)
    made = _ids(choice.get("token_ids"), answer.get("output_ids"))
    prompt = len(read) if read is not None else _count(about, "prompt_tokens")
    generated = len(made) if made is not None else _count(about, "completion_tokens")
    start = _count(answer, "routed_experts_prompt_start") if answer.get("routed_experts_prompt_start") else 0
    if start > prompt:
        raise _unreadable(f"its rows begin at token {start} of a prompt of {prompt}")
    raw = decoded(sent)
    if not raw.startswith(_MAGIC):
        ids, form = _reshaped(raw, prompt + max(generated - 1, 0) - start, routers), "sglang"
    else:
        ids, form = array_in(raw, "iu"), "vllm"
    prompt_rows = None
    if before is not None:
        of_prompt = array_in(decoded(before), "iu")
        if of_prompt.shape[1:] != ids.shape[1:]:
            raise _unreadable(f"the prompt's array has shape {of_prompt.shape}, the answer's {ids.shape}")
        prompt_rows, ids = len(of_prompt), np.concatenate([of_prompt, ids])
    tokens = None if read is None or made is None else [*read, *made]
    return Routed(ids, prompt, generated, tokens, prompt_rows, start, form)


def columns_of_answers(found: Sequence[Routed], checker: Checker) -> dict[str, np.ndarray]:
    """Return tokens and checked ids of answers as trace columns [token, ...], one sequence per answer."""
    checked = [one.checked(checker) for one in found]
    lengths = [len(ids) for ids in checked]
    position = np.concatenate([one.start + np.arange(n) for one, n in zip(found, lengths, strict=True)])
    prompt = np.repeat([one.prompt for one in found], lengths)
    columns = {
        "sequence": np.repeat(np.arange(len(found)), lengths),
        "position": position,
        "phase": np.where(position < prompt, PROMPT, GENERATED).astype(np.uint8),
        "expert_id": np.concatenate(checked),
    }
    if all(one.token_ids is not None for one in found):
        tokens = [(one.token_ids or [])[one.start : one.start + n] for one, n in zip(found, lengths, strict=True)]
        columns["token_id"] = np.concatenate([np.asarray(ids, np.int64) for ids in tokens])
    return columns


def trace_of_answers(
    columns: dict[str, np.ndarray],
    about: Sequence[Mapping[str, Any]],
    checker: Checker,
    *,
    source: str,
    model: Mapping[str, Any],
) -> Trace:
    """Create the trace of answers.

    columns  result of `columns_of_answers`, and any further columns
    about    columns of the sequence of each answer
    """
    routers = checker.routers
    meta = {
        "source": source,
        "model": model,
        "n_experts": routers.n_experts,
        "top_k": routers.top_k,
        "source_check": checker.about(),
    }
    frame = pd.DataFrame(list(about)).assign(length=np.bincount(columns["sequence"], minlength=len(about)))
    return from_parts([MemoryPart(columns)], frame, meta, list(routers.layers))


def decoded(sent: Any, argument: str = "shape") -> bytes:
    """Decode base64."""
    try:
        return base64.b64decode(sent, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise _unreadable(f"it is not in base64 ({error})", argument) from error


def array_in(raw: bytes, kinds: str, argument: str = "shape") -> np.ndarray:
    """Read an array in NumPy's format whose dtype kind is in `kinds`."""
    try:
        found = np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
    except Exception as error:  # NumPy's parser may raise anything for a broken header
        raise _unreadable(f"it is not an array in NumPy's format ({error})", argument) from error
    if found.dtype.kind not in kinds:
        raise _unreadable(f"its numbers are of type {found.dtype}", argument)
    return found


def _reshaped(raw: bytes, rows: int, routers: Routers) -> np.ndarray:
    """Reshape int32 to [row, layer, slot]: all layers or those with routers, with extra slots for shared experts."""
    flat = np.frombuffer(raw[: len(raw) // 4 * 4], "<i4")
    widths = list(dict.fromkeys((routers.n_layers, len(routers.layers))))
    if flat.any() and not (flat % 2**24).any():
        raise _unreadable("its numbers are in the other byte order")
    for size in (1, 2, 8):
        of_size = any(len(raw) == size * rows * width * routers.top_k for width in widths)
        if of_size and (size < 4 or not flat[1::2].any()):
            raise _unreadable(f"its numbers have {size} bytes, and those of int32 four")
    shapes = [(width, routers.top_k + shared) for shared in range(3) for width in widths]
    fitting = [shape for shape in shapes if flat.size % (shape[0] * shape[1]) == 0]
    exact = [shape for shape in fitting if flat.size == rows * shape[0] * shape[1]]
    if not fitting:
        raise _unreadable(f"{flat.size} numbers are not of {widths[0]} layers with {routers.top_k} experts a token")
    return flat.reshape(-1, *(exact or fitting)[0])


def _count(about: Mapping[str, Any], name: str) -> int:
    value = about.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _unreadable(f"the answer does not say its {name}, or not as a whole number")
    return value


def _ids(*given: Any) -> list[int] | None:
    """Return the first list of token ids among those given; None if there is none."""
    ids = next((ids for ids in given if ids is not None), None)
    if ids is None:
        return None
    whole = isinstance(ids, list) and all(isinstance(token, int) and not isinstance(token, bool) for token in ids)
    if not whole or not all(0 <= token < 2**31 for token in ids):
        raise _unreadable("its token ids are not a list of integers below 2^31")
    return ids


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _unreadable(found: str, argument: str = "shape") -> SourceError:
    what = "routing" if argument == "shape" else argument
    return SourceError(
        f"Cannot read the {what} of an answer: {found}. Check which server answered, and its version.",
        argument=argument,
        value=found,
    )
