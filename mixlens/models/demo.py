"""The small trained Mixtral inside the package, and the sample documents that go with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DEMO = "demo"
_FOLDER = Path(__file__).parent.parent / "_demo"


def demo_path() -> Path:
    """Folder of the bundled model: config, safetensors and tokenizer, as any other checkpoint."""
    return _FOLDER


def demo_documents() -> list[dict[str, Any]]:
    """Return sample documents written for mixlens, several for each of twelve domains.

    Examples
    --------
    >>> sorted(ml.demo_documents()[0])
    ['domain', 'id', 'license', 'text']
    """
    lines = (_FOLDER / "samples.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
