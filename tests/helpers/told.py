"""What a trace of given rows must say, signal by signal, from rows run alone; and a trace held to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

import mixlens as ml
from helpers.bare import ROUTING, Change, alone

TOKENS = ("position", "token_id", "phase", "logprob")
NEXT = ("top_id", "top_logprob", "tail_logprob")
TOP = 64
# Rounding differs between batch shapes; weights and router logits are kept in half precision.
CLOSE = {"weight": 1e-3, "router_logits": 5e-3, "logprob": 1e-4, "top_logprob": 1e-4, "tail_logprob": 1e-4}


@dataclass(frozen=True, eq=False)
class Told:
    """The truth about a trace.

    columns  token columns, routing [token, layer, ...], logp float [token, vocabulary] after each token
    sites    {name: [token, layer, ...]} of every layer of the model
    kept     {name: (layers, bool [token])}: what was asked of each site
    layers   numbers of the layers at hand
    table    the caller's columns, one row for every sequence that has tokens
    scored   bool [token], whether the head ran on it: generate runs it on the last token of a prompt alone
    """

    columns: Mapping[str, np.ndarray]
    sites: Mapping[str, np.ndarray]
    kept: Mapping[str, tuple[tuple[int, ...], np.ndarray]]
    layers: tuple[int, ...]
    table: pd.DataFrame
    scored: np.ndarray

    def where(self, keep: np.ndarray) -> Told:
        """Only these tokens."""
        return replace(
            self,
            columns={name: values[keep] for name, values in self.columns.items()},
            sites={name: values[keep] for name, values in self.sites.items()},
            kept={name: (layers, asked[keep]) for name, (layers, asked) in self.kept.items()},
            scored=self.scored[keep],
        )

    def of_layers(self, layers: Sequence[int]) -> Told:
        return replace(self, layers=tuple(layers))

    def followed_by(self, other: Told) -> Told:
        """Both, one behind the other; sequences of the second are others than those of the first."""
        both = {name: np.concatenate([values, other.columns[name]]) for name, values in self.columns.items()}
        both["sequence"] = np.concatenate([self.columns["sequence"], other.columns["sequence"] + len(self.table)])
        return replace(
            self,
            columns=both,
            sites={name: np.concatenate([values, other.sites[name]]) for name, values in self.sites.items()},
            kept={n: (layers, np.concatenate([a, other.kept[n][1]])) for n, (layers, a) in self.kept.items()},
            table=pd.concat([self.table, other.table], ignore_index=True),
            scored=np.concatenate([self.scored, other.scored]),
        )


def told(
    model: Any,
    rows: Sequence[Sequence[int]],
    prompts: Sequence[int] | None = None,
    *,
    sites: Sequence[ml.Site] = (),
    table: pd.DataFrame | None = None,
    scores_prompts: bool = True,
    changes: Sequence[Change] | None = None,
) -> Told:
    """The truth about `rows`, each run alone.

    prompts         how many tokens of each are its prompt; None for all
    scores_prompts  whether the head runs on every token of a prompt
    """
    found = [alone(model, row, Change() if changes is None else changes[i]) for i, row in enumerate(rows)]
    lengths = [len(row) for row in rows]
    prompts = lengths if prompts is None else prompts
    position = np.concatenate([np.arange(n) for n in lengths])
    phase = np.concatenate([np.arange(n) >= prompt for n, prompt in zip(lengths, prompts, strict=True)]).astype(int)
    logp = [row["logits"] - _logsumexp(row["logits"])[:, None] for row in found]
    logprob = np.concatenate(
        [np.append(np.nan, one[range(len(one) - 1), row["token_id"][1:]]) for one, row in zip(logp, found, strict=True)]
    )
    before_end = position < np.repeat(prompts, lengths) - 1
    scored = np.ones(len(position), bool) if scores_prompts else ~before_end
    logprob[1:][~scored[:-1]] = np.nan
    columns = {
        "sequence": np.repeat(np.arange(len(rows)), lengths),
        "position": position,
        "token_id": np.concatenate([np.asarray(row) for row in rows]),
        "phase": phase,
        "logprob": logprob,
        "logp": np.concatenate(logp),
        **{name: np.concatenate([row[name] for row in found]) for name in ROUTING},
    }
    wanted = {
        "all": np.ones(len(position), bool),
        "last": position == np.repeat(lengths, lengths) - 1,
        "prompt": phase == 0,
        "generated": phase == 1,
    }
    n_layers = columns["expert_id"].shape[1]
    names = [name for name in found[0] if name not in ("logits", "token_id", *ROUTING)]
    return Told(
        columns,
        {name: np.concatenate([row[name] for row in found]) for name in names},
        {site.name: (site.layers or tuple(range(n_layers)), wanted[site.tokens]) for site in sites},
        tuple(range(n_layers)),
        pd.DataFrame(index=range(len(rows))) if table is None else table.reset_index(drop=True),
        scored,
    )


def assert_tells(trace: ml.Trace, truth: Told, *signals: str) -> None:
    """The trace has these tokens in this order, and each of its signals, or those named, is that of rows run alone."""
    assert trace.n_tokens == len(truth.columns["sequence"])
    assert trace.layers.tolist() == list(truth.layers)
    assert_sequences(trace, truth)
    for name in signals or (*trace.signals, *trace.sites):
        assert_signal(trace, truth, name)


def assert_sequences(trace: ml.Trace, truth: Told) -> None:
    """Tokens belong together as they did, and each finds the caller's columns of its own sequence."""
    number = trace.read("sequence")
    _, renumbered = np.unique(number, return_inverse=True)
    np.testing.assert_array_equal(renumbered, np.unique(truth.columns["sequence"], return_inverse=True)[1])
    assert set(trace.sequences) == {*truth.table, "document_id", "length"}
    for column in truth.table:
        mine = truth.table[column].to_numpy()[truth.columns["sequence"]]
        np.testing.assert_array_equal(trace.sequences.loc[number, column].to_numpy(), mine, err_msg=column)


def assert_signal(trace: ml.Trace, truth: Told, name: str) -> None:
    if name == "sequence":
        assert_sequences(trace, truth)
    elif name in truth.sites:
        _assert_site(trace, truth, name)
    elif name in NEXT:
        _assert_next(trace, truth, name)
    else:
        expected, found = truth.columns[name], trace.read(name)
        expected = expected[:, list(truth.layers)] if name in ROUTING else expected
        assert found.shape == expected.shape
        if name in CLOSE:
            np.testing.assert_allclose(found, expected, atol=CLOSE[name], rtol=2e-3, err_msg=name)
        else:
            np.testing.assert_array_equal(found, expected, err_msg=name)


def _assert_next(trace: ml.Trace, truth: Told, name: str) -> None:
    logp, found = truth.columns["logp"][truth.scored], trace.read(name)
    missing, found = found[~truth.scored], found[truth.scored]
    assert (missing == -1).all() if name == "top_id" else np.isnan(missing).all()
    best = -np.sort(-logp, axis=-1)
    if name == "top_id":  # of equal probability either may come first
        found, expected = np.take_along_axis(logp, found, -1), best[:, :TOP]
    else:
        expected = best[:, :TOP] if name == "top_logprob" else _logsumexp(best[:, TOP:])
    np.testing.assert_allclose(found, expected, atol=CLOSE["logprob"], err_msg=name)


def _assert_site(trace: ml.Trace, truth: Told, name: str) -> None:
    found, (layers, asked) = trace.activations(name), truth.kept[name]
    assert found.layer.values.tolist() == [layer for layer in layers if layer in truth.layers]
    np.testing.assert_array_equal(found.position, truth.columns["position"][asked], err_msg=name)
    number = trace.read("sequence")[asked]
    np.testing.assert_array_equal(found.sequence, number, err_msg=name)
    expected = truth.sites[name][asked][:, found.layer.values.tolist()]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.values, expected, atol=2e-4, rtol=1e-4, err_msg=name)


def _logsumexp(values: np.ndarray) -> np.ndarray:
    top = values.max(-1, keepdims=True)
    return (top + np.log(np.exp(values - top).sum(-1, keepdims=True)))[..., 0]
