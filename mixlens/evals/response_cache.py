"""Answers as they come: in memory, and in a file that a killed evaluation goes on from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Task, number of the document, number of its request (a choice), which of its repeated answers.
Key = tuple[str, int, int, int]
PARTIAL = "answers.partial.jsonl"


class Reply(str):
    """A generated answer, with what came beside its text.

    about  finish, model, reasoning and token counts, as far as they are known
    """

    about: Mapping[str, Any]

    def __new__(cls, text: str, **about: Any) -> Reply:
        reply = super().__new__(cls, text)
        reply.about = {name: value for name, value in about.items() if value not in (None, "")}
        return reply


class Answers:
    """What the model answered, by request; one line of the file is one batch, which counts once it is whole.

    path  file of the run directory; None keeps them in memory
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.by_key: dict[Key, Any] = {}
        self.about: dict[Key, Mapping[str, Any]] = {}
        self.done: set[str] = set()
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        whole = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                batch = json.loads(line)
            except ValueError:
                break  # the process was killed while it wrote this line
            if not line.endswith(b"\n"):
                break
            whole.append(line)
            self._keep(batch["batch"], batch["answers"])
        path.write_bytes(b"".join(whole))

    def add(self, batch: str, keys: Sequence[Key], answers: Sequence[Any]) -> None:
        """Keep the answers of one batch, on disk first."""
        listed = [
            [*key, _writable(answer), *([_plain(answer.about)] if isinstance(answer, Reply) else [])]
            for key, answer in zip(keys, answers, strict=True)
        ]
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"batch": batch, "answers": listed}, ensure_ascii=False) + "\n")
        # As they come back from JSON, so that a resumed run cannot differ from one that was not stopped.
        self._keep(batch, json.loads(json.dumps(listed)))

    def _keep(self, batch: str, answers: Sequence[Sequence[Any]]) -> None:
        self.done.add(batch)
        for task, doc, choice, repeat, answer, *about in answers:
            key = (task, doc, choice, repeat)
            self.by_key[key] = tuple(answer) if isinstance(answer, list) else answer
            self.about |= {key: about[0]} if about else {}


def _writable(answer: Any) -> Any:
    """A text without lone surrogates, which a server's JSON may hold and no file in UTF-8 can."""
    return answer.encode("utf-8", "replace").decode("utf-8") if isinstance(answer, str) else answer


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _writable(value) for name, value in about.items()}
