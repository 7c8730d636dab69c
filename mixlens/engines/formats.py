"""Readers for external trace files, one function per format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from mixlens.core.sealed_json import read_json, short
from mixlens.core.size_limits import bounded_lines, json_value
from mixlens.engines.check import Checker, Routers
from mixlens.engines.columns import (
    Arrays,
    Columns,
    Parquet,
    Safetensors,
    known_routers,
    listed,
    parquet_file,
    piece,
    trace_over,
)
from mixlens.engines.replies import Routed, array_in, columns_of_answers, decoded, routed, trace_of_answers
from mixlens.errors import BadInput, SourceError
from mixlens.models.load import skeleton
from mixlens.trace.shards import TOKEN_COLUMNS, pack_weights
from mixlens.trace.trace import Trace

_WINDOW = 2048


def open_flame(path: str, *, iteration: int | None = None, tokens_a_sequence: int = _WINDOW) -> Trace:
    """Open one checkpoint of FLAME-MoE-Traces (arXiv 2505.20225): a model folder, local or on the Hub.

    `samples/` holds token ids, and `actives/iter_NNNN/layer_NN.parquet` the experts of every token with their
    probabilities under a softmax over all experts. Documents, text and the other probabilities are unknown.
    """
    files, prefix = fsspec.core.url_to_fs(path)
    protocol = "" if "file" in files.protocol else "hf://"
    found = _numbered(files.glob(f"{prefix}/actives/iter_*"))
    if not found or (iteration is not None and iteration not in list(found)):
        raise BadInput(
            f"Cannot open {path} as a checkpoint of FLAME-MoE: it has the iterations "
            f"{', '.join(map(str, sorted(found))) or 'none'}. Pass the folder of a model, such as flame-moe-290m, and "
            "one of its iterations.",
            argument="iteration" if found else "path",
            value=iteration if found else path,
        )
    chosen = max(found) if iteration is None else iteration
    actives = _numbered(files.glob(f"{found[chosen]}/layer_*.parquet"))
    if not actives or min(actives) < 1:  # layers are counted from 1
        raise SourceError(
            f"Cannot open {path} as a checkpoint of FLAME-MoE: iteration {chosen} has the layers "
            f"{', '.join(map(str, actives)) or '(none)'}. Pass a folder that was downloaded whole.",
            argument="layers",
            value=list(actives),
        )
    layers = tuple(number - 1 for number in actives)
    names = {"expert_id": "indices", "weight": "scores"}
    columns: list[Columns] = [Parquet([protocol + one], names) for one in actives.values()]
    samples = [protocol + one for one in sorted(files.glob(f"{prefix}/samples/*.parquet"))]
    top_k = piece(columns[0], "expert_id", 0, 1).shape[-1]
    about = {
        "source": "FLAME-MoE-Traces",
        "model": {"name": Path(prefix).name, "iteration": chosen},
        "not_known": ["documents", "text", "router_logits"],
    }
    routers = Routers(64, top_k, layers, max(layers) + 1)
    return trace_over(
        columns, Parquet(samples, {"token_id": "token_id"}), routers, about, tokens_a_sequence=tokens_a_sequence
    )


def _numbered(paths: Iterable[str]) -> dict[int, str]:
    """Sort paths by the number at the end of their names."""
    found = {Path(path).stem.rpartition("_")[2]: path for path in paths}
    return {int(number): found[number] for number in sorted(filter(str.isdecimal, found), key=int)}


def open_safetensors(
    path: str, *, n_experts: int | None = None, layers: Any = None, tokens_a_sequence: int = _WINDOW
) -> Trace:
    """Open expert_id [token, layer, slot] of a file, with any other columns of a trace in it."""
    columns = Safetensors(path)
    return _of_arrays(columns, columns.about, n_experts, layers, tokens_a_sequence, f"safetensors {Path(path).name}")


def open_npy(path: str, *, n_experts: int | None = None, layers: Any = None, tokens_a_sequence: int = _WINDOW) -> Trace:
    """Open expert_id [token, layer, slot] of one .npy file, or a folder with one file per column."""
    place = Path(path)
    files = {one.stem: one for one in sorted(place.glob("*.npy"))} if place.is_dir() else {"expert_id": place}
    about: dict[str, str] = {}
    try:
        if place.is_dir() and (place / "about.json").exists():
            about = read_json(place / "about.json")
        arrays = {name: np.lib.format.open_memmap(one, mode="r") for name, one in files.items()}
    except Exception as error:  # NumPy's parser may raise anything for a broken header
        raise SourceError(
            f"Cannot open {place} as arrays: {error}. Pass a .npy file, or a folder of them.",
            argument="path",
            value=str(place),
        ) from error
    arrays = Arrays(arrays)
    return _of_arrays(arrays, about, n_experts, layers, tokens_a_sequence, f"npy {place.name}")


def open_parquet(
    path: str, *, n_experts: int | None = None, layers: Any = None, tokens_a_sequence: int = _WINDOW
) -> Trace:
    """Open a table with one row for every token, layer and slot, in this order, or one per token with lists.

    The long form is that of `Trace.to_parquet`; in the form with lists, expert_id is [layer][slot].
    """
    table = parquet_file(path)
    schema = table.schema_arrow
    names = [name for name in schema.names if name in TOKEN_COLUMNS]
    routing = [name for name in schema.names if name in ("expert_id", "weight", "router_logits")]
    held = {k: v for k, v in (schema.metadata or {}).items() if not k.startswith(b"pandas")}
    about = {k.decode("utf-8", "replace"): v.decode("utf-8", "replace") for k, v in held.items()}
    if "layer" not in schema.names:
        columns: Columns = Parquet([path], {name: name for name in [*names, *routing]})
        return _of_arrays(columns, about, n_experts, layers, tokens_a_sequence, f"parquet {Path(path).name}")
    batch = next(table.iter_batches(4096, columns=["layer", "slot"]), None)
    if batch is None:
        raise SourceError(f"Cannot open {path}: it has no rows. Pass one per token.", argument="tokens", value=path)
    head = batch.to_pandas()
    again = np.flatnonzero((head == head.iloc[0]).all(axis=1).to_numpy()[1:])
    rows = int(again[0]) + 1 if len(again) else len(head)
    numbers = head["layer"].iloc[:rows].unique().tolist()
    long = Parquet([path], {name: name for name in [*names, *routing]}, rows=rows)
    return _of_arrays(
        _Long(long, (len(numbers), rows // len(numbers))), about, n_experts, layers or numbers, tokens_a_sequence,
        f"parquet {Path(path).name}",
    )  # fmt: skip


class _Long:
    """A table with one row for every token, layer and slot."""

    def __init__(self, table: Parquet, shape: tuple[int, int]) -> None:
        self._table, self._shape = table, shape
        self.n_tokens, self.names = table.n_tokens, table.names

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        values = self._table.read(name, start, stop).reshape(stop - start, *self._shape)
        return values[:, 0, 0] if name in TOKEN_COLUMNS else values


def _of_arrays(
    columns: Columns, about: Mapping[str, str], n_experts: int | None, layers: Any, tokens_a_sequence: int, source: str
) -> Trace:
    if "expert_id" not in columns.names:
        raise SourceError(
            f"Cannot open {source} as a trace: it has the columns {', '.join(sorted(columns.names)) or 'none'}, and no "
            "expert_id. Rename the one that has the ids.",
            argument="expert_id",
            value=sorted(columns.names),
        )
    shape = (columns.n_tokens, *piece(columns, "expert_id", 0, 1).shape[1:])
    layers = listed(about, "layers", list) if layers is None else layers
    routers = known_routers(shape, listed(about, "n_experts", int) if n_experts is None else n_experts, layers)
    documents = listed(about, "document_id", list)
    lacking = [name for name in ("token_id", "weight", "router_logits") if name not in columns.names]
    meta = {
        "source": source,
        "model": listed(about, "model", dict) or {},
        "not_known": [*([] if documents else ["documents"]), "text", *lacking],
    }
    return trace_over([columns], columns, routers, meta, tokens_a_sequence=tokens_a_sequence, document_id=documents)


def open_replies(path: str, *, model: Any) -> Trace:
    """Open answers of vLLM or SGLang, one JSON object per line, as read by `replies.routed`.

    Trainers that replay routing (R3) use the same form: ids by position, optionally with "routed_weights".

    Parameters
    ----------
    path : str
        File to open.
    model : Any
        Name or folder of the model that answered, or a loaded model; answers lack the number of experts.
    """
    checker = Checker(Routers.of(skeleton(model) if isinstance(model, str | Path) else model))
    found: list[Routed] = []
    rows, weights = [], []
    for number, answer in _lines(path):
        one = routed(answer, checker.routers)
        if one is None:
            raise SourceError(
                f"Cannot open {path}: line {number} has no routing. Leave out answers without routed_experts.",
                argument="routing",
                value=number,
            )
        prompt = answer.get("prompt_length", one.prompt)
        name = answer.get("document_id", answer.get("id", number - 1))
        for key, value, kind in (("prompt_length", prompt, int), ("document_id", name, str | int)):
            if not isinstance(value, kind) or isinstance(value, bool):
                raise SourceError(
                    f"Cannot open {path}: {key} of line {number} is {short(value)}. Write a whole number"
                    f"{' or a name' if key == 'document_id' else ''} there.",
                    argument=key,
                    value=number,
                )
        found.append(replace(one, prompt=prompt, generated=one.prompt + one.generated - prompt))
        rows.append({"document_id": name})
        weights.append(answer.get("routed_weights"))
    if not found:
        raise SourceError(f"Cannot open {path}: it has no answers. Pass one per line.", argument="path", value=path)
    columns = columns_of_answers(found, checker)
    if all(weight is not None for weight in weights):
        ends = np.cumsum(np.bincount(columns["sequence"]))[:-1]
        of_each = np.split(columns["expert_id"], ends)
        read = [_weights(weight, ids.shape) for weight, ids in zip(weights, of_each, strict=True)]
        columns["weight"] = pack_weights(np.concatenate(read))
    held = {"name": str(getattr(model, "name_or_path", model))}
    return trace_of_answers(columns, rows, checker, source=f"answers in {Path(path).name}", model=held)


def _weights(sent: Any, shape: tuple[int, ...]) -> np.ndarray:
    weight = array_in(decoded(sent, "routed_weights"), "f", "routed_weights")
    if weight.shape != shape or not np.isfinite(weight).all():
        raise SourceError(
            f"Cannot use routed_weights of shape {weight.shape} and dtype {weight.dtype} beside ids of shape {shape}. "
            "Pass one finite number for every id.",
            argument="routed_weights",
            value=weight.shape,
        )
    return weight.astype(np.float32)


def _lines(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    number = 1
    with open(path, "rb") as file:
        try:
            for line in bounded_lines(file):
                if line.strip():
                    answer = json_value(line.decode("utf-8-sig"))
                    yield number, answer if isinstance(answer, dict) else {}
                number += 1
        except (ValueError, RecursionError) as error:
            raise SourceError(
                f"Cannot open {path}: line {number} is not JSON ({short(str(error))}). Write one answer per line.",
                argument="path",
                value=number,
            ) from error


FORMATS: dict[str, Callable[..., Trace]] = {
    "flame": open_flame,
    "npy": open_npy,
    "safetensors": open_safetensors,
    "parquet": open_parquet,
    "vllm": open_replies,
    "sglang": open_replies,
    "routed_experts": open_replies,
}
