"""Workloads of a benchmark: generated prompts of a given length, or the caller's prompts."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlens.errors import BadInput

# Short common words: most tokenizers encode each, with its leading space, as one token.
_WORDS = """
air area art back body book business car case change child city company country day door education end eye face fact
family father force friend game girl group guy hand head health history home hour house idea issue job kind law level
life line lot man member minute moment money month morning mother name night office parent part party people person
place point power problem program question reason research result right room school service side state story student
study system teacher team thing time war water way week woman word work world year
""".split()  # noqa: SIM905
_TASK = "Write a long story with these words."


@dataclass(frozen=True)
class Workload:
    """Prompts of a benchmark and the length of their answers.

    Parameters
    ----------
    prompt_tokens : int, optional
        Length of a generated prompt. Prompts consist of random common words and share no prefix, and every run draws
        its own, so that a prefix cache has no effect. `count_tokens` determines the length; without it one word counts
        as one token, and the results report the server's count.
    output_tokens : int, optional
        Maximum number of tokens in an answer.
    prompts : Sequence[str], optional
        Prompts to use instead of generated ones, in order and repeated if there are more requests than prompts.
    count_tokens : Callable[[str], int], optional
        Function that counts the tokens of a text, such as ``lambda text: len(tokenizer(text).input_ids)``. It also
        counts answers for which the server reports no usage.
    seed : int, optional
        Seed of the generated prompts.
    reuse_prompts : bool, optional
        Whether every run sends the same generated prompts, which tests a prefix cache.

    Raises
    ------
    BadInput
        If `output_tokens` is below 1, `prompt_tokens` is below 16, or `prompts` is empty or contains an empty text.

    Examples
    --------
    >>> ml.bench.Workload(256, 128).output_tokens
    128
    """

    prompt_tokens: int = 256
    output_tokens: int = 128
    prompts: Sequence[str] | None = None
    count_tokens: Callable[[str], int] | None = None
    seed: int = 0
    reuse_prompts: bool = False

    def __post_init__(self) -> None:
        if self.output_tokens < 1 or (self.prompts is None and self.prompt_tokens < 16):
            raise BadInput(
                f"Cannot generate prompts of {self.prompt_tokens} tokens with answers of {self.output_tokens}: a "
                "prompt has at least 16 tokens and an answer at least 1. Pass larger numbers.",
                argument="output_tokens" if self.output_tokens < 1 else "prompt_tokens",
            )
        if self.prompts is not None and not (self.prompts and all(isinstance(p, str) and p for p in self.prompts)):
            raise BadInput(
                "Cannot benchmark the given prompts: the list is empty, or a prompt is empty or not a string. Pass a "
                "list of texts.",
                argument="prompts",
            )

    def prompt(self, number: int, salt: str = "") -> str:
        """Return the prompt of a request. The result depends only on the workload, the number and the salt.

        Parameters
        ----------
        number : int
            Number of the request.
        salt : str, optional
            Text that makes the prompts of a run differ from those of other runs.

        Returns
        -------
        str

        Examples
        --------
        >>> ml.bench.Workload(prompts=["one", "two"]).prompt(2)
        'one'
        """
        if self.prompts is not None:
            return self.prompts[number % len(self.prompts)]
        draw = random.Random(f"{self.seed} {number} {salt}".rstrip())
        words = [*draw.choices(_WORDS, k=max(self.prompt_tokens - len(_TASK.split()), 8))]
        text = _made(words)
        while self.count_tokens is not None and (over := self.count_tokens(text) - self.prompt_tokens) > 0 and words:
            del words[-max(1, over // 2) :]
            text = _made(words)
        return text

    def plan(self) -> dict[str, Any]:
        """Return the parameters that determine the prompts, as plain values.

        Returns
        -------
        dict[str, Any]
            Lengths and seed of generated prompts, or number and SHA-256 of given ones.

        Examples
        --------
        >>> ml.bench.Workload(256, 128).plan()["prompt_tokens"]
        256
        """
        kept: dict[str, Any] = {"output_tokens": self.output_tokens}
        if self.prompts is None:
            counted = "words" if self.count_tokens is None else "count_tokens"
            again = {"reuse_prompts": True} if self.reuse_prompts else {}
            return {**kept, "prompt_tokens": self.prompt_tokens, "counted_by": counted, "seed": self.seed, **again}
        digest = hashlib.sha256("\0".join(self.prompts).encode("utf-8", "surrogatepass")).hexdigest()
        return {**kept, "prompts": len(self.prompts), "distinct": len({*self.prompts}), "prompts_sha256": digest}


def workload_words(plan: Mapping[str, Any]) -> str:
    """Describe the result of `Workload.plan` as text."""
    if "prompts" in plan:
        prompts = f"{plan['prompts']} given prompts ({plan['distinct']} distinct, sha256 {plan['prompts_sha256'][:8]})"
    else:
        prompts = f"prompts of {plan['prompt_tokens']} {'words' if plan['counted_by'] == 'words' else 'tokens'}"
    return f"{prompts}, answers of at most {plan['output_tokens']} tokens"


def _made(words: Sequence[str]) -> str:
    # The task comes last: prompts with the same beginning would share a cached prefix.
    return f"{' '.join(words)}. {_TASK}"


def read_prompts(
    documents: str | os.PathLike[str] | Iterable[str | Mapping[str, Any]], *, column: str = "text"
) -> list[str]:
    """Read prompts from a file or a data set, for Workload(prompts=...).

    documents  path of a text file (one prompt per line) or of JSON Lines, recognized by name or content; or texts,
               dicts, or a datasets.Dataset
    column     name of the text column of JSON Lines, dicts and data sets

    Raises BadInput if a file cannot be read, a line is not JSON, or a document lacks the column.
    """
    if isinstance(documents, str | os.PathLike):
        lines = _lines(Path(documents))
        if Path(documents).suffix not in (".jsonl", ".ndjson", ".json") and not all(map(_is_object, lines)):
            return lines
        documents = [_parsed(line, i, Path(documents)) for i, line in enumerate(lines)]
    found = []
    for i, document in enumerate(documents):
        text = document if isinstance(document, str) else document.get(column)
        if not isinstance(text, str) or not text.strip():
            has = (
                ""
                if isinstance(document, str)
                else f" in {column!r}; it has {', '.join(map(str, document)) or 'nothing'}"
            )
            raise BadInput(
                f"Cannot read prompts: document {i} has no text{has}. Pass the name of the text column, or remove the "
                "document.",
                argument="column",
                value=i,
            )
        found.append(text)
    return found


def _lines(path: Path) -> list[str]:
    try:
        return [line.removesuffix("\r") for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"Cannot read prompts from {path}: {error}. Pass a UTF-8 text file with one prompt per line, or JSON "
            "Lines.",
            argument="path",
            value=str(path),
        ) from error


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(line: str, number: int, path: Path) -> str | Mapping[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict | str):
        raise BadInput(
            f"Cannot read prompts from {path}: line {number + 1} is not a JSON object or string. Pass JSON Lines, one "
            "document per line.",
            argument="path",
            value=number + 1,
        )
    return found
