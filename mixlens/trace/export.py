"""Export a trace to other formats: safetensors, NumPy, Parquet, or the routed experts of servers."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from mixlens.core.files import written_whole
from mixlens.errors import BadInput
from mixlens.trace import shards
from mixlens.trace.convert import to_parquet

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


def export(trace: Trace, path: Path, format: str) -> Path:
    """Implement Trace.export."""
    if format not in _FORMATS:
        raise BadInput(
            f"Cannot export a trace as {format!r}. Pass one of {', '.join(_FORMATS)}.", argument="format", value=format
        )
    if not trace.n_tokens or len(set(trace.layer_top_k)) > 1:
        raise BadInput(
            f"Cannot export this trace to {path}: it has no tokens, or its layers choose different numbers of "
            "experts. Select tokens, and layers that choose the same number.",
            argument="trace",
            value=trace.n_tokens,
        )
    _FORMATS[format](trace, path)
    return path


def _about(trace: Trace) -> dict[str, str]:
    """Return the metadata that the arrays lack, each as JSON."""
    numbers = list(dict.fromkeys(trace.read("sequence").tolist()))
    told: dict[str, Any] = {
        "n_experts": trace.n_experts,
        "layers": trace.layers.tolist(),
        "document_id": trace.sequences["document_id"].reindex(numbers).tolist(),
        "source": trace.meta.get("source"),
        "model": trace.meta.get("model", {}),
    }
    return {name: json.dumps(value, default=str) for name, value in told.items()}


def _arrays(trace: Trace) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(trace.read(name)) for name in trace.signals}


def _safetensors(trace: Trace, path: Path) -> None:
    with written_whole(path) as whole:
        save_file(_arrays(trace), whole, _about(trace))


def _npy(trace: Trace, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name, array in _arrays(trace).items():
        with written_whole(path / f"{name}.npy") as whole, open(whole, "wb") as file:
            np.save(file, array, allow_pickle=False)
    (path / "about.json").write_text(json.dumps(_about(trace)), "utf-8")


def _parquet(trace: Trace, path: Path) -> None:
    to_parquet(trace, path, _about(trace))


def _routed_experts(trace: Trace, path: Path) -> None:
    """Write one sequence per line: token ids, and the experts (and weights) of each token as a base64 array."""
    names = ["sequence", "position", "phase", "expert_id"]
    names += [name for name in ("token_id", "weight") if name in trace.signals]
    documents = trace.sequences["document_id"]
    with written_whole(path) as whole, open(whole, "w", encoding="utf-8") as file:
        for block in trace.blocks(*names):
            for number in dict.fromkeys(block["sequence"].tolist()):
                rows = block["sequence"] == number
                line = {
                    "document_id": documents[number],
                    "prompt_length": int((block["phase"][rows] == shards.PROMPT).sum()),
                    "routed_experts": _base64(block["expert_id"][rows]),
                    "usage": {"prompt_tokens": int(rows.sum()), "completion_tokens": 0},
                }
                if "token_id" in block:
                    line |= {"prompt_token_ids": block["token_id"][rows].tolist(), "output_ids": []}
                if "weight" in block:
                    line["routed_weights"] = _base64(block["weight"][rows])
                file.write(json.dumps(line, default=str) + "\n")


def _base64(array: np.ndarray) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode("ascii")


_FORMATS: dict[str, Callable[[Trace, Path], None]] = {
    "safetensors": _safetensors,
    "npy": _npy,
    "parquet": _parquet,
    "routed_experts": _routed_experts,
}
