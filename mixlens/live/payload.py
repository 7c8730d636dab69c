"""The data of live views: JSON and binary arrays in one gzip stream, encoded as text.

Layout, before compression: length of the JSON (uint32, little endian), the JSON, then each array aligned to 8 bytes.
The JSON has {"arrays": {name: [dtype, shape, offset]}, ...}; offsets count from the first array.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mixlens.trace.shards import id_dtype
from mixlens.trace.trace import Trace

# Base 85 is 6 % shorter than base 64. Five of its usual digits are special in HTML or JavaScript.
_DIGITS = str.maketrans("<>&$`", ",./:[")
ENTROPY_LEVELS, NO_LOGPROB = 31, 65535
_MOST_PAIRED = 16  # experts whose pairs fit into one byte
_MOST_WEIGHTS = 3_500_000  # choices up to which weights are included; they take as many bytes as the choices


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Encode `header` and `arrays` as base-85 text, without characters that are special in HTML or a JSON string."""
    places, body = {}, bytearray()
    for name, array in arrays.items():
        body.extend(bytes(-len(body) % 8))
        places[name] = [array.dtype.name, list(array.shape), len(body)]
        body.extend(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    text = json.dumps({**header, "arrays": places}, ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-(len(text) + 4) % 8)
    raw = len(text).to_bytes(4, "little") + text + bytes(body)
    return base64.b85encode(gzip.compress(raw, 9, mtime=0)).decode("ascii").translate(_DIGITS)


def token_arrays(trace: Trace, sequences: list[int]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return header and arrays of the token views for some sequences, given in ascending order.

    header["left_out"] describes data omitted because the view would be too large.
    header["starts"] has the first token of every sequence, followed by the number of tokens; a sequence without tokens
    starts where the next one does.

    pair     uint8 [layer, token], first choice * experts + second, for two of up to 16 experts; else
    expert   uint8, uint16 above 256 experts [slot, layer, token]
    weight   uint8 [slot, layer, token] in hundredths, rounded as text is; of two that sum to one, the second only
    entropy  uint8 [layer, token], 31 = log2(experts)
    surprise uint16 [token], -log p in hundredths of a nat, rounded as text is; 65535 for the first of a sequence
    step     int32 [token], position minus that of the previous token
    piece    int32 [token], index into the header's "pieces"
    """
    trace.require("a token view", "expert_id")
    part = trace.select(where=trace.sequences.index.to_series().isin(sequences))
    number = part.read("sequence")
    starts = np.searchsorted(number, sequences)
    header: dict[str, Any] = {
        "n_experts": trace.n_experts,
        "top_k": trace.top_k,
        "layers": trace.layers.tolist(),
        "starts": [*starts.tolist(), len(number)],
    }
    arrays = choice_arrays(part.read("expert_id"), trace.n_experts)
    arrays["step"] = np.diff(part.read("position"), prepend=0).astype(np.int32)
    if "token_id" in part.signals:
        token_id, text_index, pieces = _pieces(part, starts)
        arrays |= {"token_id": token_id, "piece": text_index}
        header["pieces"] = pieces
    if "weight" in part.signals:
        choices = part.n_tokens * part.n_layers * part.top_k
        if choices <= _MOST_WEIGHTS:
            arrays["weight"] = weight_plane(part.read("weight"))
        else:
            header["left_out"] = f"The weights of {choices:,} choices are left out"
    if "logprob" in part.signals:
        steps = np.rint(-100 * part.read("logprob").astype(np.float64)).clip(0, NO_LOGPROB - 1)
        arrays["surprise"] = np.nan_to_num(steps, nan=NO_LOGPROB).astype(np.uint16)
    if "router_logits" in part.signals:
        arrays["entropy"] = _entropy_bytes(part.read("router_logits")).T
    if "phase" in part.signals:
        arrays["phase"] = part.read("phase")
    return header, arrays


def choice_arrays(ids: np.ndarray, n_experts: int) -> dict[str, np.ndarray]:
    """Return expert ids [token, layer, slot] as `pair`, or as `expert` if a pair does not fit into a byte."""
    if ids.shape[2] == 2 and n_experts <= _MOST_PAIRED:
        return {"pair": (ids[..., 0].astype(np.uint8) * n_experts + ids[..., 1]).astype(np.uint8).T}
    return {"expert": ids.astype(id_dtype(n_experts)).transpose(2, 1, 0)}


def weight_plane(weight: np.ndarray) -> np.ndarray:
    """Return weights [token, layer, slot] in hundredths [slot, layer, token], as tables show them.

    Of two that sum to one the first is left out: halves are rounded to even, so one minus the second is the first.
    """
    hundredths = np.rint(100 * weight.astype(np.float64).clip(0, 2.55)).astype(np.uint8)
    summed = weight.shape[-1] == 2 and bool((hundredths.sum(-1) == 100).all())
    return (hundredths[..., 1:] if summed else hundredths).transpose(2, 1, 0)


def signed_plane(values: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the step, and numbers [token, layer, slot] in steps as int8 [slot, layer, token]; -128 for NaN.

    The scale ends at the 99.9th percentile of the magnitudes, so that a few outliers do not flatten the rest.
    """
    known = np.abs(values[np.isfinite(values)])
    most = float(np.quantile(known, 0.999)) if known.size else 1.0
    step = (most or 1.0) / 127
    return step, np.nan_to_num(np.rint(values / step).clip(-127, 127), nan=-128).astype(np.int8).transpose(2, 1, 0)


def pieces_index(shown: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return the index of each text among the distinct texts, and the distinct texts."""
    index = {piece: i for i, piece in enumerate(dict.fromkeys(shown))}
    return np.array([index[piece] for piece in shown], np.int32), list(index)


def _pieces(part: Trace, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return token ids, text indices and distinct texts; byte tokens are decoded within their own sequence."""
    token_id = part.read("token_id")
    shown: list[str] = []
    for ids in np.split(token_id, starts[1:]):
        shown += part.pieces(ids)
    return token_id.astype(np.int32), *pieces_index(shown)


def _entropy_bytes(logits: np.ndarray) -> np.ndarray:
    """Return the entropy of softmax(logits [token, layer, expert]) as uint8 [token, layer], 31 = log2(experts)."""
    shifted = logits - logits.max(-1, keepdims=True)
    probability = np.exp(shifted)
    total = probability.sum(-1)
    nats = np.log(total) - (probability * np.maximum(shifted, -80)).sum(-1) / total
    return np.rint(ENTROPY_LEVELS * (nats / np.log(logits.shape[-1])).clip(0, 1)).astype(np.uint8)
