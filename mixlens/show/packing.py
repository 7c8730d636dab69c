"""What a page's live views read: JSON and binary arrays in one gzip stream, as base64 text.

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

from mixlens.traces.trace import Trace


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """`header` and `arrays` as base64 text, which holds no character that HTML gives a meaning to."""
    places, body = {}, bytearray()
    for name, array in arrays.items():
        body.extend(bytes(-len(body) % 8))
        places[name] = [array.dtype.name, list(array.shape), len(body)]
        body.extend(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    text = json.dumps({**header, "arrays": places}, ensure_ascii=False).encode("utf-8", "replace")
    text += b" " * (-(len(text) + 4) % 8)
    raw = len(text).to_bytes(4, "little") + text + bytes(body)
    return base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode("ascii")


def token_arrays(trace: Trace, sequences: list[int]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the token view needs of some sequences: a header, and planes by layer.

    expert   uint8 [slot, layer, token]
    weight   uint8 [slot, layer, token], 255 = 1; the last slot is left out where weights sum to one
    entropy  uint8 [layer, token], 255 = log2(experts)
    logprob  float32 [token]; NaN for the first token
    piece    int32 [token], index into the header's "pieces"
    """
    part = trace.select(where=trace.sequences.index.to_series().isin(sequences))
    ids = part.read("expert_id")
    number = part.read("sequence")
    starts = np.flatnonzero(np.append(True, np.diff(number) != 0))
    arrays = {"expert": ids.transpose(2, 1, 0), "position": part.read("position").astype(np.int32)}
    header: dict[str, Any] = {
        "n_experts": trace.n_experts,
        "top_k": trace.top_k,
        "layers": trace.layers.tolist(),
        "starts": [*starts.tolist(), len(number)],
    }
    if "token_id" in part.signals:
        token_id, text_index, pieces = _pieces(part, starts)
        arrays |= {"token_id": token_id, "piece": text_index}
        header["pieces"] = pieces
    if "weight" in part.signals:
        weight = part.read("weight")
        summed = bool(len(weight)) and bool(np.abs(weight.sum(-1) - 1).max() < 2e-3)
        kept = weight[..., : trace.top_k - 1] if summed else weight
        arrays["weight"] = np.rint(255 * kept.clip(0, 1)).astype(np.uint8).transpose(2, 1, 0)
    if "logprob" in part.signals:
        arrays["logprob"] = part.read("logprob").astype(np.float32)
    if "router_logits" in part.signals:
        arrays["entropy"] = _entropy_bytes(part.read("router_logits")).T
    if "phase" in part.signals:
        arrays["phase"] = part.read("phase")
    return header, arrays


def _pieces(part: Trace, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Token ids, index of each token's text, and the distinct texts; byte tokens read within their own sequence."""
    token_id = part.read("token_id")
    shown: list[str] = []
    for ids in np.split(token_id, starts[1:]):
        shown += part.pieces(ids)
    index = {piece: i for i, piece in enumerate(dict.fromkeys(shown))}
    return token_id.astype(np.int32), np.array([index[piece] for piece in shown], np.int32), list(index)


def _entropy_bytes(logits: np.ndarray) -> np.ndarray:
    """Entropy of softmax(logits [token, layer, expert]) as uint8 [token, layer], 255 = log2(experts)."""
    shifted = logits - logits.max(-1, keepdims=True)
    probability = np.exp(shifted)
    total = probability.sum(-1)
    nats = np.log(total) - (probability * np.maximum(shifted, -80)).sum(-1) / total
    return np.rint(255 * (nats / np.log(logits.shape[-1])).clip(0, 1)).astype(np.uint8)
