"""What chosen experts put out: sizes, means, super experts, and what each adds to the logit of the next token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import nn

from mixlens.errors import BadInput
from mixlens.models.layout import describe, final_scale, moe_layers, n_experts
from mixlens.traces.documents import Documents, Piece, Tally
from mixlens.traces.hooks import Raw
from mixlens.traces.pieces import display_pieces
from mixlens.traces.reading import Reader, batches
from mixlens.traces.record import RecordSettings, batch_size, length_limit, shards_of, tokenizer_of, vocabulary_of
from mixlens.traces.signals import Site, parse_signals

SETTINGS = RecordSettings()


@torch.inference_mode()
def expert_outputs(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    tokenizer: Any = None,
    settings: RecordSettings = SETTINGS,
) -> xr.Dataset:
    """Outputs of every expert over the tokens that chose it, before their weight.

    Returns  Dataset  max_abs, the largest |number| it put out; norm, mean Euclidean norm; weighted_norm, mean norm
                      after the weight; mean [layer, expert, hidden], for ablation by the mean; n, tokens
                      [layer, expert]. NaN where nobody chose the expert
    Raises   BadInput for documents that cannot be read as asked
    """
    layers, count = len(moe_layers(model)), n_experts(model)
    hidden: int = model.config.hidden_size  # type: ignore[attr-defined, assignment, union-attr]
    n, norm, weighted, largest = np.zeros((4, layers, count))
    total = torch.zeros(layers, count, hidden, dtype=torch.float64)
    for _, valid, raw, _ in _read(model, documents, ["expert_out"], tokenizer, settings):
        for layer, output in raw["expert_out"].items():
            ids = raw["expert_id"][layer].masked_fill(~valid.to(output.device)[:, None], -1)
            weight = raw["weight"][layer]
            for expert in ids[ids >= 0].unique().tolist():
                chosen = ids == expert
                values = output[chosen].float()
                size = values.norm(dim=-1)
                n[layer, expert] += len(values)
                norm[layer, expert] += float(size.sum())
                weighted[layer, expert] += float((size * weight[chosen]).sum())
                largest[layer, expert] = max(largest[layer, expert], float(values.abs().max()))
                total[layer, expert] += values.double().sum(0).cpu()
    with np.errstate(invalid="ignore", divide="ignore"):
        numbers = {"max_abs": np.where(n > 0, largest, np.nan), "norm": norm / n, "weighted_norm": weighted / n, "n": n}
        data: dict[str, Any] = {name: (("layer", "expert"), values) for name, values in numbers.items()}
        data["mean"] = (("layer", "expert", "hidden"), total.numpy() / n[..., None])
    coords = {"layer": range(layers), "expert": range(count)}
    dataset = xr.Dataset(data, coords, {"statistic": "expert_outputs", "model": describe(model)["name"]})
    return dataset.assign(n=dataset.n.astype(np.int64))


@torch.inference_mode()
def expert_contributions(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    tokenizer: Any = None,
    settings: RecordSettings = SETTINGS,
) -> xr.Dataset:
    """What every chosen expert adds to the logit of the token that came next: direct logit attribution.

    w o . (s * (u_next - mean_v u_v)): the expert's weighted output w o, through the last norm held at its scale s at
    this token, onto the unembedding row of the next token less the mean row. Summed over all experts, all attention
    layers and the embedding, this is the next token's logit less the mean logit. Effects through later layers are not
    in it.

    Returns  Dataset  logit, norm (of the weighted output), expert_id, weight [token, layer, slot]; logit is NaN at the
                      end of a sequence. Coordinates of tokens: document_id, sequence, position, token_id, next_id,
                      and piece, the text
    Raises   BadInput for documents that cannot be read as asked, and where the unembedding is offloaded
    """
    head: Any = model.lm_head
    if head.weight.is_meta:
        raise BadInput(
            "Contributions to logits were asked for. The unembedding (lm_head) is offloaded. Keep it on a device: "
            'device_map={"lm_head": 0, ...}.'
        )
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
    mean_row = head.weight.float().mean(0)
    last = len(moe_layers(model)) - 1
    parts: list[tuple[list[dict[str, Any]], dict[str, np.ndarray]]] = []
    sites = ["expert_out", Site("resid_post", (last,))]
    for tokens, valid, raw, _ in _read(model, documents, sites, tokenizer, settings):
        picked = valid.nonzero()[:, 0]
        known = torch.tensor([row["next_id"] for row in tokens])
        stream = raw["resid_post"][last].flatten(0, 1)
        scale = final_scale(model, stream[picked.to(stream.device)]).to(head.weight.device)
        direction = scale * (head.weight[known.clamp(min=0).to(scale.device)].float() - mean_row)
        found: dict[str, list[np.ndarray]] = {"logit": [], "norm": [], "expert_id": [], "weight": []}
        for layer in sorted(raw["expert_out"]):
            output = raw["expert_out"][layer]
            here = picked.to(output.device)
            weight = raw["weight"][layer][here].float()
            added = output[here].float() * weight[..., None]
            logit = torch.einsum("tsh,th->ts", added, direction.to(added.device)).cpu()
            found["logit"].append(logit.masked_fill(known[:, None] < 0, torch.nan).numpy())
            found["norm"].append(added.norm(dim=-1).cpu().numpy())
            found["expert_id"].append(raw["expert_id"][layer][here].cpu().numpy())
            found["weight"].append(weight.cpu().numpy())
        parts.append((tokens, {name: np.stack(values, 1) for name, values in found.items()}))
    rows = [row for tokens, _ in parts for row in tokens]
    order = np.lexsort([[row["position"] for row in rows], [row["sequence"] for row in rows]])
    joined = {name: np.concatenate([arrays[name] for _, arrays in parts])[order] for name in parts[0][1]}
    coords: dict[str, Any] = {name: ("token", np.array([row[name] for row in rows], object)[order]) for name in rows[0]}
    for name in ("sequence", "position", "token_id", "next_id"):
        coords[name] = ("token", coords[name][1].astype(np.int64))
    coords["piece"] = ("token", display_pieces(coords["token_id"][1], vocabulary_of(tokenizer)))
    data = {name: (("token", "layer", "slot"), values) for name, values in joined.items()}
    attrs = {"statistic": "expert_contributions", "unit": "logit", "model": describe(model)["name"]}
    return xr.Dataset(data, {**coords, "layer": range(last + 1)}, attrs)


def _read(
    model: nn.Module, documents: Iterable[Any], sites: list[str | Site], tokenizer: Any, settings: RecordSettings
) -> Iterator[tuple[list[dict[str, Any]], torch.Tensor, Raw, torch.Tensor]]:
    """(valid tokens in order, bool [T] which of the batch they are, raw signals, last states) of every forward."""
    corpus = Documents(documents, settings.text)
    tokenizer = tokenizer if tokenizer is not None else tokenizer_of(model)
    batch_tokens, limit = batch_size(model, settings), length_limit(model, settings)
    with Reader(model, parse_signals(sites, len(moe_layers(model))), batch_tokens) as reader:
        for shard in shards_of(corpus, tokenizer, limit, settings, Tally()):
            lengths = np.array([len(piece.ids) for piece in shard.pieces])
            for rows in batches(lengths, batch_tokens):
                pieces = [shard.pieces[row] for row in rows]
                for offset, ids, raw, states in reader.forwards([piece.ids for piece in pieces]):
                    valid = offset + np.arange(ids.shape[1])[None] < lengths[rows][:, None]
                    tokens = list(_tokens(pieces, rows + shard.first_sequence, offset, ids.shape[1]))
                    yield tokens, torch.from_numpy(valid.reshape(-1)), raw, states


def _tokens(pieces: list[Piece], sequences: np.ndarray, offset: int, columns: int) -> Iterator[dict[str, Any]]:
    for piece, sequence in zip(pieces, sequences.tolist(), strict=True):
        for position in range(offset, min(offset + columns, len(piece.ids))):
            following = int(piece.ids[position + 1]) if position + 1 < len(piece.ids) else -1
            yield {
                "document_id": piece.columns["document_id"],
                "sequence": sequence,
                "position": position,
                "token_id": int(piece.ids[position]),
                "next_id": following,
            }
