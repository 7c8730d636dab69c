"""Documents from files that are named on the command line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixlens.errors import BadInput


def read_documents(paths: Sequence[str], limit: int | None = None) -> list[Any]:
    """Read JSON Lines files, one mapping a line, JSON files, and text files, each of which is one document.

    A file that is called .json is read by its contents: JSON Lines, a list of documents, or one document.

    Raises BadInput where a file cannot be read, naming the line.
    """
    return [document for path in paths for document in _read(Path(path), limit)]


def _read(path: Path, limit: int | None) -> list[Any]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if ".json" in path.suffixes:
                return _json(path, file.read())[:limit]
            if not {".jsonl", ".ndjson"} & {*path.suffixes}:
                return [{"document_id": str(path), "text": file.read()}]
            documents = []
            for number, line in enumerate(file, 1):
                if limit is not None and len(documents) >= limit:
                    break
                try:
                    documents.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise BadInput(
                        f"Cannot read documents from {path}: line {number} is not JSON ({error}). "
                        "Write one JSON object a line.",
                        argument=str(path),
                        value=number,
                    ) from error
            return documents
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise BadInput(
            f"Cannot read documents from {path}: {error}. Pass a JSON Lines file (.jsonl or .jsonl.gz) or a text file "
            "in UTF-8.",
            argument=str(path),
        ) from error


def _json(path: Path, text: str) -> list[Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as whole:
        try:
            found = [json.loads(line) for line in text.split("\n") if line.strip()]
        except json.JSONDecodeError:
            raise BadInput(
                f"Cannot read documents from {path}: it is neither JSON ({whole}) nor JSON Lines. Pass a list of "
                "documents, one JSON object a line, or a text file under another name.",
                argument=str(path),
                value=whole.lineno,
            ) from whole
    return found if isinstance(found, list) else [found]
