"""Ablator: the change in loss of every token without each expert, computing only what the ablation changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from mixlens.errors import BadInput, ModelError
from mixlens.interventions.edits import ablate, edit
from mixlens.interventions.hooks import refuse_partial
from mixlens.models.layout import (
    CACHE,
    decoder_of,
    expert_weights,
    input_device,
    moe_layers,
    n_experts,
    only_layers,
    refuse_sharded,
)
from mixlens.models.quantization.linears import SCHEMES, Scheme, dequantized, quantize_linear, require
from mixlens.models.quantization.schemes import parse_scheme
from mixlens.models.quantization.unfuse import is_unfused
from mixlens.recording.hooks import Tap
from mixlens.recording.logprobs import score
from mixlens.recording.reader import batches
from mixlens.trace.signals import Site, parse_signals

Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_ROWS = 1024


@dataclass(frozen=True)
class Costs:
    """Sums over the predicted tokens of each sequence.

    tokens  int64 [sequence], number of tokens with a preceding token
    value   float64 [sequence], of the whole model
    change  float64 [sequence, layer, expert], value without the expert minus value of the whole model
    chosen  int64 [sequence, layer, expert], number of tokens that chose the expert, including first tokens
    """

    tokens: np.ndarray
    value: np.ndarray
    change: np.ndarray
    chosen: np.ndarray


class Ablator:
    """Measures sequences without each expert of `layers` in turn.

    layers  layer numbers
    how     "reroute", "zero", or "mean" with `means`, as in edits.ablate; or a quantization scheme to which each expert
            is converted in turn
    metric  function of logits [n, vocabulary] and the next tokens [n] that returns one number per token [n]; None for
            the loss in nats

    An ablation in layer l does not affect lower layers, so hidden states are kept and only the layers from l on run
    again. In layer l itself only the affected tokens run, if the layer is known to add the output of its experts to the
    residual stream unchanged. Rows without an affected token are skipped, and tokens before the first affected token
    keep their value.

    Raises BadInput under edits of single tokens or of the residual stream, which kept hidden states would not reflect.
    """

    def __init__(
        self, model: nn.Module, layers: list[int], *, how: str, means: Any = None, metric: Metric | None = None
    ) -> None:
        self.model: Any = model
        self.layers, self.how, self.means, self.metric = layers, how, means, metric
        self.moe_layers = {layer.index: layer for layer in moe_layers(model)}
        self.scheme = parse_scheme(how) if how.partition("-g")[0] in SCHEMES else None
        self.n_experts = n_experts(model)
        self._direct = all(layer.family.direct for layer in self.moe_layers.values())
        sites = [Site(name, tuple(layers)) for name in ("attn_out", "moe_in", "resid_post") if self._direct]
        self._signals = parse_signals(sites, list(self.moe_layers))
        self._columns = 0
        refuse_partial(model)
        refuse_sharded(model, "ablate experts")
        if self.scheme is not None:
            refuse_rounded_inputs(self.scheme)
            refuse_quantized(model)

    @torch.inference_mode()
    def measure(self, sequences: list[np.ndarray], batch_tokens: int) -> Costs:
        """Return the Costs of whole sequences, in their order, read in batches of about `batch_tokens` tokens.

        A longer sequence is read in chunks of that size, with a key-value cache.
        """
        self._columns = batch_tokens
        shape = (len(sequences), len(self.layers), self.n_experts)
        lengths = np.array([len(ids) for ids in sequences])
        costs = Costs(
            np.zeros(len(sequences), np.int64), np.zeros(len(sequences)), np.zeros(shape), np.zeros(shape, int)
        )
        training = self.model.training
        self.model.eval()
        try:
            for rows in batches(lengths, batch_tokens):
                self._measure_batch([sequences[row] for row in rows], rows, costs)
        finally:
            self.model.train(training)
        return costs

    def _measure_batch(self, sequences: list[np.ndarray], rows: np.ndarray, costs: Costs) -> None:
        ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
        valid = torch.zeros_like(ids, dtype=torch.bool)
        for row, tokens in enumerate(sequences):
            ids[row, : len(tokens)] = torch.from_numpy(tokens)
            valid[row, : len(tokens)] = True
        predicts = torch.zeros_like(valid)  # positions whose next token is known
        predicts[:, :-1] = valid[:, 1:]
        target = torch.roll(ids, -1, dims=1)
        values = np.full((len(self.layers), self.n_experts, *ids.shape), np.nan)
        reached = np.zeros(values.shape, bool)
        hidden = decoder_of(self.model).get_input_embeddings()(ids.to(input_device(self.model)))
        for index, before, raw, after_layer in self._layer_by_layer(hidden):
            hidden = after_layer
            if index in self.layers:
                place = self.layers.index(index)
                chosen, spreads = raw["expert_id"][index].cpu(), self._spreads(index)
                for expert in range(self.n_experts):
                    hit = (chosen == expert).any(-1).reshape(ids.shape) & valid
                    costs.chosen[rows, place, expert] = hit.sum(1).numpy()
                    hit = valid if spreads else hit
                    after = (hit.cumsum(1) > 0) & predicts
                    reached[place, expert] = after.numpy()
                    if after.any():
                        found = self._without(index, expert, before, raw, hit, after, target)
                        values[place, expert][after.numpy()] = found
        whole = np.full(ids.shape, np.nan)
        states = self._run(hidden, self._depth)
        whole[predicts.numpy()] = self._value(states[predicts.to(states.device)], target[predicts])
        costs.tokens[rows] = predicts.sum(1).numpy()
        # Positions without a value contribute nothing; a NaN from the model or the metric stays.
        costs.value[rows] = np.where(predicts.numpy(), whole, 0.0).sum(1)
        costs.change[rows] = np.moveaxis(np.where(reached, values - whole, 0.0).sum(-1), -1, 0)

    def _spreads(self, index: int) -> bool:
        """Return whether removing an expert affects tokens that did not choose it, through group ranks or a softmax."""
        rule = self.moe_layers[index].rule
        return self.how == "reroute" and rule is not None and not rule.alone

    @property
    def _depth(self) -> int:
        return len(decoder_of(self.model).layers)

    def _layer_by_layer(self, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, Any, torch.Tensor]]:
        """Yield (layer, its input, the arrays of the Tap, its output) from the first layer to the last."""
        layers = decoder_of(self.model).layers
        with closing(Tap(self.model, self._signals)) as tap:
            for index in range(self._depth):
                seen: list[Any] = []
                outputs: list[torch.Tensor] = []

                def keep(_module: nn.Module, _args: Any, output: Any, to: list[torch.Tensor] = outputs) -> None:
                    to.append(_first(output))

                handle = layers[index].register_forward_hook(keep)
                try:
                    for _ in self._chunks(hidden, index, index + 1, tap):
                        seen.append(tap.take())
                finally:
                    handle.remove()
                after = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
                yield index, hidden, seen[0] if len(seen) == 1 else _joined(seen), after
                hidden = after

    def _without(
        self,
        index: int,
        expert: int,
        before: torch.Tensor,
        raw: Any,
        hit: torch.Tensor,
        reached: torch.Tensor,
        target: torch.Tensor,
    ) -> np.ndarray:
        """Return the values of the tokens that the ablation can affect, in the order of `reached` [row, column]."""
        rows = reached.any(1)
        if self._direct:
            after: torch.Tensor = raw["resid_post"][index].clone()
            device = after.device
            stream = (before.to(device) + raw["attn_out"][index].to(device))[hit.to(device)]
            read = raw["moe_in"][index][hit.to(raw["moe_in"][index].device)]
            with self._taken_out(index, expert):
                output = self.moe_layers[index].moe(read[None])
            after[hit.to(device)] = stream + _first(output)[0].to(device)
            states = self._run(after[rows.to(device)], index + 1)
        else:
            with self._taken_out(index, expert):
                states = self._run(before[rows.to(before.device)], index)
        return self._value(states[reached[rows].to(states.device)], target[reached])

    @contextmanager
    def _taken_out(self, index: int, expert: int) -> Iterator[None]:
        """Remove an expert from the model, or round its weights to the scheme, while the context is open."""
        if self.scheme is None:
            with edit(self.model, ablate(index, expert, how=self.how, mean=self.means)):
                yield
            return
        weights = [matrix[expert] for matrix in expert_weights(self.moe_layers[index])]
        before = [weight.clone() for weight in weights]
        try:
            for weight, linear in zip(weights, quantized_expert(before, self.scheme), strict=True):
                weight.copy_(dequantized(linear))
            yield
        finally:
            for weight, whole in zip(weights, before, strict=True):
                weight.copy_(whole)

    def _run(self, hidden: torch.Tensor, start: int) -> torch.Tensor:
        """Return the states [row, column, H] after the layers from `start` on and the last norm."""
        parts = list(self._chunks(hidden, start, self._depth))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _chunks(self, hidden: torch.Tensor, start: int, stop: int, tap: Tap | None = None) -> Iterator[torch.Tensor]:
        """Yield [row, columns, H] after layers `start` to `stop` - 1 and the last norm by chunk; `tap` records them."""
        long = hidden.shape[1] > self._columns
        cache = _CacheFrom(start) if long else None
        with only_layers(self.model, start, stop) as run:
            for chunk in hidden.split(self._columns if long else hidden.shape[1], dim=1):
                if tap is not None:
                    tap.now.listening = True
                output = run(chunk, use_cache=long, **{CACHE: cache})
                if tap is not None:
                    tap.now.listening = False
                yield output.last_hidden_state

    def _value(self, states: torch.Tensor, target: torch.Tensor) -> np.ndarray:
        if not len(target):
            return np.zeros(0)
        if self.metric is None:
            return -score(self.model.lm_head, states, target, top=False)["logprob"].astype(np.float64)
        parts = []
        for start in range(0, len(states), _ROWS):
            logits = self.model.lm_head(states[start : start + _ROWS]).float()
            found = torch.as_tensor(self.metric(logits, target[start : start + _ROWS].to(logits.device)))
            if found.shape != logits.shape[:1]:
                raise BadInput(
                    f"Cannot use this metric: for {len(logits)} tokens it returned the shape {list(found.shape)}. "
                    "Pass a function that returns one number per token: [n] for logits [n, vocabulary].",
                    argument="metric",
                    value=tuple(found.shape),
                )
            parts.append(found.double().cpu())
        return torch.cat(parts).numpy()


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def quantized_expert(weights: list[torch.Tensor], scheme: Scheme) -> list[nn.Module]:
    """Return the Linears of one expert in a scheme, from its matrices."""
    require(scheme, {weights[0].device})
    return [quantize_linear(weight, scheme, weight.device, weight.dtype) for weight in weights]


def refuse_quantized(model: nn.Module) -> None:
    """Raise ModelError unless experts are plain fused weights that can be rounded in place."""
    if any(is_unfused(layer.experts) for layer in moe_layers(model)):
        raise ModelError(
            "Cannot quantize experts one by one: the experts of this model are already quantized, or separate Linears. "
            "Load the original without quantization.",
            argument="model",
            value=type(model).__name__,
        )


def refuse_rounded_inputs(scheme: Scheme) -> None:
    """Raise BadInput for a scheme that also rounds the inputs of experts, which weights do not show."""
    if scheme.name in ("int8", "fp8"):
        raise BadInput(
            f"Cannot measure {scheme.name} expert by expert: it rounds inputs too, which weights alone do not show. "
            "Pass a scheme of weights alone, such as nf4, int8wo, int4wo or hqq4.",
            argument="how",
            value=scheme.name,
        )


class _CacheFrom(DynamicCache):
    """A key-value cache for the layers from `start` on, when only these run."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start = start

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *rest: Any, **more: Any):  # type: ignore[override]
        return super().update(key_states, value_states, layer_idx - self.start, *rest, **more)


def _joined(seen: list[Any]) -> dict[str, dict[int, torch.Tensor]]:
    """Join the arrays of several chunks of one row as if from one forward pass: gates [T, ...], sites [1, T, H]."""
    return {
        name: {
            layer: torch.cat([raw[name][layer] for raw in seen], dim=0 if name in ("expert_id", "weight") else 1)
            for layer in values
        }
        for name, values in seen[0].items()
    }
