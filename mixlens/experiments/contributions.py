"""Outputs of chosen experts: sizes, means, super experts, and what each adds to the logit of the next token."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
import xarray as xr
from accelerate.utils import align_module_device
from torch import nn

from mixlens.errors import BadInput
from mixlens.interventions.hooks import top_k_of
from mixlens.models.layout import (
    decoder_of,
    final_scale,
    moe_layers,
    n_experts,
    refuse_indirect,
    refuse_without_experts,
    widths_of,
)
from mixlens.models.provenance import describe
from mixlens.models.quantization.linears import dequantized
from mixlens.recording.corpus import Corpus, RecordSettings, Shard, lengths_of, measure_documents, sum_documents
from mixlens.recording.hooks import routing_arrays
from mixlens.recording.reader import Reader
from mixlens.stats import contributions as stats
from mixlens.trace.shards import id_dtype
from mixlens.trace.signals import Signals, Site, parse_signals

SETTINGS = RecordSettings()


@torch.inference_mode()
def expert_outputs(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    tokenizer: Any = None,
    settings: RecordSettings = SETTINGS,
) -> xr.Dataset:
    """Measure the outputs of every expert over the tokens that chose it, before weighting.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    documents : Iterable[Any]
        Strings, mappings with a text column, or a datasets.Dataset.
    tokenizer : Any, optional
        Tokenizer; None for the model's own.
    settings : RecordSettings, optional
        Settings for reading the documents.

    Returns
    -------
    Dataset
        max_abs, largest absolute output; norm, mean Euclidean norm; weighted_norm, mean norm after weighting;
        mean [layer, expert, hidden], for mean ablation; n, tokens [layer, expert]. NaN if no token chose the expert.

    Raises
    ------
    BadInput
        If documents cannot be read with these settings.

    Examples
    --------
    >>> ml.experiments.expert_outputs(model, documents[:2], settings=quiet)["mean"].dims
    ('layer', 'expert', 'hidden')
    """
    layers, count = moe_layers(model), n_experts(model)
    for layer in layers:
        refuse_without_experts(layer, "measure what experts put out", inside=True)
    numbers_of = [layer.index for layer in layers]
    n, norm, weighted, largest = np.zeros((4, len(layers), count))
    total = torch.zeros(len(layers), count, widths_of(layers[0])[0], dtype=torch.float64)
    corpus = Corpus.of(model, documents, tokenizer, settings)
    with Reader(model, parse_signals(["expert_out"], numbers_of), corpus.batch_tokens) as reader:
        for shard in corpus.shards():
            for _, picked, raw, _ in reader.placed([piece.ids for piece in shard.pieces]):
                for place, number in enumerate(numbers_of):
                    output = raw["expert_out"][number]
                    here = picked.to(output.device)
                    ids, weight = raw["expert_id"][number][here], raw["weight"][number][here].float()
                    valid = output[here]
                    for expert in ids.unique().tolist():
                        chosen = ids == expert
                        values = valid[chosen].float()
                        size = values.norm(dim=-1)
                        n[place, expert] += len(values)
                        norm[place, expert] += float(size.sum())
                        weighted[place, expert] += float((size * weight[chosen]).sum())
                        largest[place, expert] = max(largest[place, expert], float(values.abs().max()))
                        total[place, expert] += values.sum(0, dtype=torch.float64).cpu()
    with np.errstate(invalid="ignore", divide="ignore"):
        numbers = {"max_abs": np.where(n > 0, largest, np.nan), "norm": norm / n, "weighted_norm": weighted / n, "n": n}
        data: dict[str, Any] = {name: (("layer", "expert"), values) for name, values in numbers.items()}
        data["mean"] = (("layer", "expert", "hidden"), total.numpy() / n[..., None])
    coords = {"layer": numbers_of, "expert": range(count)}
    dataset = xr.Dataset(data, coords, {"statistic": "expert_outputs", "model": describe(model)["name"]})
    return dataset.assign(n=dataset.n.astype(np.int64))


def measure_contributions(
    model: nn.Module,
    documents: Iterable[Any],
    *,
    out: str | os.PathLike[str] | None = None,
    tokenizer: Any = None,
    settings: RecordSettings = SETTINGS,
) -> xr.Dataset:
    """Measure the contribution of every chosen expert to the logit of the next token (direct logit attribution).

    The contribution is w o . (s * (u_next - mean_v u_v)): the expert's weighted output w o, scaled by the last norm
    with its scale s fixed at this token, times the unembedding row of the next token minus the mean row. Summed over
    all experts, all attention layers and the embedding, contributions give the next token's logit minus the mean logit.
    Effects through later layers are not included.

    Parameters
    ----------
    model : torch.nn.Module
        A loaded model.
    documents : Iterable[Any]
        Strings, mappings with a text column, or a datasets.Dataset.
    out : str or os.PathLike, optional
        Run directory; None keeps the result in memory. A stopped run resumes where it stopped. Under
        `accelerate launch` each process reads its share of the shards, and each returns the complete result.
    tokenizer : Any, optional
        Tokenizer; None for the model's own.
    settings : RecordSettings, optional
        Settings for reading the documents.

    Returns
    -------
    xarray.Dataset
        Variables [token, layer, slot], slots strongest first: ``logit``, contribution to the next token's logit, NaN
        at the end of a sequence; ``norm``, Euclidean norm of the weighted output; ``peak``, largest absolute value of
        the output before weighting; ``expert_id``; ``weight``. Coordinates along token, in input order: document_id
        and the other columns of the documents, sequence (counted from 0), position, token_id, next_id (-1 at the end
        of a sequence) and piece, the token's text. Select a sequence with
        ``data.isel(token=data.sequence.values == 3)``; stats.expert_contribution computes means with intervals.

    Raises
    ------
    BadInput
        If documents cannot be read with these settings.
    RunError
        As for record.

    Examples
    --------
    >>> found = ml.experiments.measure_contributions(model, documents[:2], settings=quiet)
    >>> found["logit"].dims
    ('token', 'layer', 'slot')
    """
    refuse_indirect(model, "measure contributions")
    numbers = [layer.index for layer in moe_layers(model)]
    if len(choices := set(top_k_of(model).values())) > 1:
        raise BadInput(
            f"Cannot measure contributions: layers choose {sorted(choices)} experts a token, and a contribution has "
            "one number for each slot. Pass a model, or an edit, with one number for all layers.",
            argument="top_k",
            value=sorted(choices),
        )
    signals = parse_signals(["expert_out", Site("resid_post", (numbers[-1],))], numbers)
    corpus = Corpus.of(model, documents, tokenizer, settings)

    def measure(shard: Shard) -> dict[str, np.ndarray]:
        return _contributions(model, shard, signals, corpus.batch_tokens)

    measured = measure_documents(model, corpus, stats.KIND, measure=measure, about={}, out=out, vocabulary=True)
    return stats.contributions_dataset(measured)


@torch.inference_mode()
def _contributions(model: nn.Module, shard: Shard, signals: Signals, batch_tokens: int) -> dict[str, np.ndarray]:
    """Return arrays along the tokens of a shard, and the length of every document."""
    sequences, lengths = [piece.ids for piece in shard.pieces], lengths_of(shard)
    position = np.concatenate([np.arange(length) for length in lengths])
    token_id = np.concatenate(sequences)
    following = np.append(token_id[1:], 0)
    ends = np.append(position[1:] == 0, True)
    numbers, k = [layer.index for layer in moe_layers(model)], max(top_k_of(model).values())
    head, norm = cast(Any, model).lm_head, decoder_of(model).norm
    found = {name: np.full((len(token_id), len(numbers), k), np.nan, np.float32) for name in ("logit", "norm", "peak")}
    found["weight"] = np.zeros_like(found["norm"])
    expert_id = np.zeros(found["norm"].shape, id_dtype(n_experts(model)))
    with align_module_device(head), Reader(model, signals, batch_tokens) as reader:
        rows = dequantized(head)
        mean = rows.mean(0, dtype=torch.float32)
        for target, picked, raw, _ in reader.placed(sequences):
            stream = raw["resid_post"][numbers[-1]].flatten(0, 1)
            with align_module_device(norm):
                scale = final_scale(model, stream[picked.to(stream.device)]).to(rows.device)
            direction = scale * (rows[torch.from_numpy(following[target]).to(rows.device)].float() - mean)
            expert_id[target] = routing_arrays(raw, picked, n_experts(model), packed=True)["expert_id"]
            for layer, number in enumerate(numbers):
                output = raw["expert_out"][number]
                here = picked.to(output.device)
                weight, value = raw["weight"][number][here].float(), output[here].float()
                added = value * weight[..., None]
                logit = torch.einsum("tsh,th->ts", added, direction.to(added.device)).cpu().numpy()
                found["logit"][target, layer] = np.where(ends[target, None], np.nan, logit)
                found["norm"][target, layer] = added.norm(dim=-1).cpu().numpy()
                found["peak"][target, layer] = value.abs().amax(-1).cpu().numpy()
                found["weight"][target, layer] = weight.cpu().numpy()
    return {
        **found,
        "expert_id": expert_id,
        "position": position.astype(np.int32),
        "token_id": token_id.astype(np.int32),
        "length": sum_documents(shard, lengths),
    }
