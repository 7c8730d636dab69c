"""What several commands share: arguments for reading a corpus with a model, and how a table is printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixlens.cli.quantization import add_quantization
from mixlens.errors import BadInput

if TYPE_CHECKING:
    import xarray as xr

    from mixlens.recording.corpus import RecordSettings


def reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare model, documents, run directory, and how documents are read."""
    parser.add_argument("model", help='Hub id, folder, or "demo"')
    parser.add_argument("documents", nargs="+", help="JSON Lines (.jsonl, .jsonl.gz) or text files (one document each)")
    parser.add_argument("--out", required=True, help="run directory; a stopped run there goes on")
    parser.add_argument("--text", default="text", metavar="COLUMN", help="text column of JSON Lines (default: text)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of every file")
    parser.add_argument("--max-length", type=int, metavar="TOKENS", help="tokens a sequence (default: the context)")
    parser.add_argument(
        "--overlong", choices=("error", "truncate", "split"), default="error", help="what to do with longer documents"
    )
    parser.add_argument("--batch-tokens", type=int, metavar="TOKENS", help="tokens a forward")
    parser.add_argument("--device-map", help='as in accelerate, such as "auto" or "cpu"')
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_quantization(parser)


def read(arguments: argparse.Namespace, settings: RecordSettings) -> tuple[list[Any], Any, RecordSettings]:
    """Documents, model and settings, as the arguments have them."""
    from dataclasses import replace

    from mixlens.models.load import load

    documents = [d for path in arguments.documents for d in read_documents(Path(path), arguments.limit)]
    placed = ("device_map", "dtype", "revision", "quantization")
    model = load(arguments.model, **{name: getattr(arguments, name) for name in placed})
    names = ("text", "max_length", "overlong", "batch_tokens")
    return documents, model, replace(settings, **{name: getattr(arguments, name) for name in names})


def table(data: xr.Dataset, arguments: argparse.Namespace, *, also: Sequence[str] = ()) -> Any:
    """A statistic, with the variables `also`, as a CSV file, as JSON or as columns, as the arguments have it."""
    from mixlens.plot.tables import tidy

    frame = tidy(data, also=also)
    if arguments.csv:
        try:
            frame.to_csv(arguments.csv, index=False)
        except OSError as error:
            raise BadInput(
                f"A table was to be written to {arguments.csv}. Writing failed: {error.strerror or error}. Give a "
                "file in an existing folder.",
                argument="csv",
                value=arguments.csv,
            ) from error
        return {"written": arguments.csv, "rows": len(frame)}
    if arguments.json:
        rows = json.loads(frame.to_json(orient="records"))
        return {"statistic": data.attrs["statistic"], "attrs": _jsonable(data.attrs), "rows": rows}
    print(frame.to_string(index=False, float_format=lambda value: f"{value:.4f}"))
    print(f"\n{data.attrs.get('formula', '')}\nsource: {data.attrs.get('source', '')}")
    return None


def read_documents(path: Path, limit: int | None = None) -> list[Any]:
    """Documents of a JSON Lines file, one mapping a line, or of a text file, which is one document.

    Raises BadInput when the file cannot be read, naming the line.
    """
    import gzip
    import zlib

    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if ".jsonl" not in path.suffixes:
                return [{"document_id": str(path), "text": file.read()}]
            documents = []
            for number, line in enumerate(file, 1):
                if limit is not None and len(documents) >= limit:
                    break
                try:
                    documents.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise BadInput(
                        f"Documents were to be read from {path}. Line {number} is not JSON: {error}. "
                        "Give one JSON object a line.",
                        argument=str(path),
                        value=number,
                    ) from error
            return documents
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise BadInput(
            f"Documents were to be read from {path}. The file cannot be read: {error}. Give a JSON Lines file (.jsonl "
            "or .jsonl.gz) or a text file in UTF-8.",
            argument=str(path),
        ) from error


def numbers(text: str, what: str) -> list[int]:
    """Numbers from "0,15,31"; `what` they are, for the error.

    Raises BadInput for anything else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(
            f"{what} {text!r} were asked for. They are no numbers. Give them as 0,15,31.", argument=what, value=text
        ) from error


def _jsonable(attrs: dict[Any, Any]) -> dict[str, Any]:
    return {str(key): value.tolist() if hasattr(value, "tolist") else value for key, value in attrs.items()}
