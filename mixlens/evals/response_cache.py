"""Storage of answers: in memory, in a file from which an evaluation resumes, and in a cache of server answers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from mixlens.core.run_dir import UNFINISHED, now
from mixlens.endpoints.calls import Completion

# Task, index of the document, index of its request (a choice), index of the repeated answer.
Key = tuple[str, int, int, int]
PARTIAL = f"{UNFINISHED}/answers.jsonl"
# Rounding may put a log-probability above zero by at most this much.
ABOVE_ZERO = 1e-2


class Reply(str):
    """A generated answer with its metadata.

    about  finish, model, reasoning and token counts, as far as known
    """

    about: Mapping[str, Any]

    def __new__(cls, text: str, **about: Any) -> Reply:
        reply = super().__new__(cls, text)
        reply.about = {name: value for name, value in about.items() if value not in (None, "")}
        return reply


class Scored(tuple):
    """A log-probability, and whether its tokens are the most likely ones, with remarkable metadata.

    about  model if another one than requested answered, attempts if more than one
    """

    about: Mapping[str, Any]

    def __new__(cls, score: tuple[float, bool], **about: Any) -> Scored:
        scored = super().__new__(cls, score)
        scored.about = about
        return scored


class Answers:
    """Answers of the model by request. One line of the file is one batch; an incomplete line is discarded.

    path  file of the run directory; None keeps the answers in memory
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.by_key: dict[Key, Any] = {}
        self.about: dict[Key, Mapping[str, Any]] = {}
        self.done: set[str] = set()
        if path is not None and path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                batch = json.loads(line)
            except ValueError:
                break  # the process was killed while writing this line
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            self._keep(batch["batch"], batch["answers"])
        os.truncate(path, whole)

    def add(self, batch: str, keys: Sequence[Key], answers: Sequence[Any]) -> None:
        """Store the answers of one batch, on disk first."""
        listed = [
            [*key, _writable(answer), *([_plain(about)] if (about := getattr(answer, "about", None)) else [])]
            for key, answer in zip(keys, answers, strict=True)
        ]
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"batch": batch, "answers": listed}, ensure_ascii=False) + "\n")
        # Read back from JSON, so that a resumed run cannot differ from an uninterrupted one.
        self._keep(batch, json.loads(json.dumps(listed)))

    def _keep(self, batch: str, answers: Sequence[Sequence[Any]]) -> None:
        self.done.add(batch)
        for task, doc, choice, repeat, answer, *about in answers:
            key = (task, doc, choice, repeat)
            self.by_key[key] = tuple(answer) if isinstance(answer, list) else answer
            self.about |= {key: about[0]} if about else {}


class ResponseCache:
    """Disk cache of the answers of one server by content of the request, so that interruptions lose no answers.

    Parameters
    ----------
    place : bool or str or os.PathLike
        Folder; False for no cache; True for "answers" in MIXLENS_CACHE, else "mixlens/answers" in the user's cache.
    server : Mapping[str, Any]
        Values that identify the server and its model, without keys.

    `reused` counts answers from disk, `since` is the date of the oldest, and `problem` the reason why none are stored.
    """

    def __init__(self, place: bool | str | os.PathLike[str], server: Mapping[str, Any]) -> None:
        self.reused, self.since, self.problem = 0, "", ""
        self._lock, self._kept, self._path = threading.Lock(), {}, None
        if place is False:
            return
        path = _folder(place) / f"{_sha256(server)[:32]}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                whole = file.read()
                file.write(b"\n" if whole and not whole.endswith(b"\n") else b"")  # ends the line of a killed process
        except OSError as error:
            self.problem = f"{type(error).__name__}: {error.strerror}"
            return
        self._path = path
        for line in whole.splitlines():
            try:
                one = json.loads(line)
                self._kept[one["request"]] = (one["answer"], one["at"])
            except (ValueError, KeyError, TypeError):
                continue

    def answer(self, request: Any, ask: Callable[[], Completion]) -> Completion:
        """Return the answer to a request from disk, or from `ask`, storing it on disk first."""
        name = _sha256(request)
        if (kept := self._kept.get(name)) is not None:
            with self._lock:
                self.reused, self.since = self.reused + 1, min(self.since or kept[1], kept[1])
            return _completion(kept[0])
        found = ask()
        if self._path is not None and all(map(math.isfinite, filter(None, found.logprobs or ()))):
            self._keep(name, asdict(replace(found, raw={})))
        return found

    def _keep(self, name: str, answer: dict[str, Any]) -> None:
        at = now()
        line = json.dumps({"request": name, "at": at, "answer": answer}).encode() + b"\n"
        with self._lock:
            self._kept[name] = (answer, at)
            try:
                with open(self._path or "", "ab", buffering=0) as file:
                    file.write(line)
            except OSError as error:
                self._path, self.problem = None, f"{type(error).__name__}: {error.strerror}"

    def about(self) -> dict[str, Any]:
        """Return the metadata to store with the scores."""
        return {"reused": self.reused, "since": self.since or None, "problem": self.problem or None}


def cache_remarks(about: Mapping[str, Any]) -> list[str]:
    """Return sentences on answers reused from the cache, and on answers that could not be stored."""
    found = []
    if about.get("reused"):
        found.append(
            f"{about['reused']} answers of the server are from earlier evaluations, the oldest of {about['since']}: "
            "EvalSettings(cache=False) asks afresh."
        )
    if about.get("problem"):
        found.append(f"Answers were not kept on disk beside out=: {about['problem']}.")
    return found


def _folder(place: bool | str | os.PathLike[str]) -> Path:
    if not isinstance(place, bool):
        return Path(place)
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MIXLENS_CACHE") or users / "mixlens") / "answers"


def _completion(values: Mapping[str, Any]) -> Completion:
    known: dict[str, Any] = {}
    for field in fields(Completion):
        value = values.get(field.name)
        known[field.name] = tuple(value) if isinstance(value, list) else value
    return Completion(**known)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _writable(answer: Any) -> Any:
    """Replace lone surrogates, which JSON may contain but UTF-8 cannot encode."""
    return answer.encode("utf-8", "replace").decode("utf-8") if isinstance(answer, str) else answer


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _writable(value) for name, value in about.items()}
