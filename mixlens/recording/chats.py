"""Chats: messages as the tokenizer's template writes them, and which of their tokens the assistant said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixlens.errors import BadInput
from mixlens.trace.shards import GENERATED, PROMPT

ASSISTANT = "assistant"


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role and a content in text."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(one, Mapping) and isinstance(one.get("role"), str) for one in value)
        and all(isinstance(one.get("content"), str) for one in value)
    )


def read_chat(chat: Sequence[Mapping[str, Any]], tokenizer: Any, name: str) -> tuple[list[int], np.ndarray]:
    """Return token ids of a chat, and the phase of each: generated for what the assistant said, else prompt.

    A turn of the assistant reaches from the prompt for it, as the template writes it, to the end of its message.

    Raises BadInput where the tokenizer has no template, the template refuses the messages, or it writes earlier turns
    otherwise once later ones follow, so that nobody can tell where a turn begins.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise BadInput(
            f"Cannot read {name}: it is a chat, and the tokenizer has no chat template. Pass tokenizer= of an "
            "instruction-tuned model, or texts.",
            argument="tokenizer",
            value=str(getattr(tokenizer, "name_or_path", "")),
        )
    messages = [dict(message) for message in chat]
    whole = _written(messages, tokenizer, name)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            before = _written(messages[:number], tokenizer, name, add_generation_prompt=True) if number else ""
            until = _written(messages[: number + 1], tokenizer, name)
            if not (whole.startswith(before) and whole.startswith(until)):
                raise BadInput(
                    f"Cannot read {name}: the chat template writes message {number} otherwise where later ones follow, "
                    "so its tokens cannot be told. Cut the chat before it, or pass a text.",
                    argument="messages",
                    value=number,
                )
            spans.append((len(before), len(until)))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in found["offset_mapping"]], np.int64)
    phase = np.full(len(starts), PROMPT, np.uint8)
    for first, last in spans:
        phase[(starts >= first) & (starts < last)] = GENERATED
    return list(found["input_ids"]), phase


def _written(messages: list[dict[str, Any]], tokenizer: Any, name: str, **options: Any) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, ValueError, KeyError) as error:
        raise BadInput(
            f"Cannot read {name}: the chat template refuses its messages: {str(error).strip()}. Give them the roles "
            "and the order that the model was trained with.",
            argument="messages",
            value=[message["role"] for message in messages],
        ) from error
