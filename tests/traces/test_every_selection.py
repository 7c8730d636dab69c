"""Every signal of every way to record, selected, joined, saved and opened, against the rows run alone."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers.told import assert_signal, assert_tells
from helpers.ways import truth_of, way_of

import mixlens as ml

# One part in memory, several, several on disk; with phases and without; routing alone.
KINDS = ("generate", "decoding by hand", "compiled", "record", "resumed")


def of_domain(truth, *domains):
    return np.isin(truth.table["domain"].to_numpy()[truth.columns["sequence"]], domains)


def between(truth, first, stop):
    return (truth.columns["position"] >= first) & (truth.columns["position"] < stop)


def some_words(truth):
    return np.unique(truth.columns["token_id"])[::2].tolist()


# name: (arguments of select, tokens that are kept, layers that are kept)
SELECTIONS = {
    "one domain": (lambda _: {"where": {"domain": "x"}}, lambda t: of_domain(t, "x"), None),
    "two domains": (lambda _: {"where": {"domain": ["x", "z"]}}, lambda t: of_domain(t, "x", "z"), None),
    "one layer": (lambda _: {"layers": 2}, lambda t: between(t, 0, 99), (2,)),
    "layers in another order": (lambda _: {"layers": [2, 0]}, lambda t: between(t, 0, 99), (2, 0)),
    "prompt": (lambda _: {"phase": "prompt"}, lambda t: t.columns["phase"] == 0, None),
    "generated": (lambda _: {"phase": "generated"}, lambda t: t.columns["phase"] == 1, None),
    "positions": (lambda _: {"positions": (1, 4)}, lambda t: between(t, 1, 4), None),
    "words": (
        lambda t: {"tokens": some_words(t)},
        lambda t: np.isin(t.columns["token_id"], some_words(t)),
        None,
    ),
    "everything at once": (
        lambda t: {"where": {"domain": ["x", "y"]}, "layers": [2, 1], "positions": (0, 6), "tokens": some_words(t)},
        lambda t: of_domain(t, "x", "y") & between(t, 0, 6) & np.isin(t.columns["token_id"], some_words(t)),
        (2, 1),
    ),
}


def selected(trace, truth, selection):
    arguments, keep, layers = SELECTIONS[selection]
    part = truth.where(keep(truth))
    return trace.select(**arguments(truth)), part if layers is None else part.of_layers(layers)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("way", KINDS)
def test_a_selection_has_the_tokens_and_layers_that_were_asked_for(way, selection):
    view, truth = selected(way_of(way).traces["all"], truth_of(way), selection)
    assert_tells(view, truth)
    if way != "compiled":
        kept = selected(way_of(way).traces["last"], truth_of(way, "last"), selection)
        assert_tells(*kept, *kept[0].sites)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("way", ["generate", "record"])
def test_blocks_of_a_selection_are_whole_sequences_of_it(way, selection):
    view, truth = selected(way_of(way).traces["all"], truth_of(way), selection)
    names = ("sequence", "position", "phase", "token_id", "expert_id", "weight")
    blocks = list(view.blocks(*names, tokens=3))
    numbers = [set(block["sequence"].tolist()) for block in blocks]
    assert not any(a & b for i, a in enumerate(numbers) for b in numbers[:i])
    for name in names[:4]:
        assert [value for block in blocks for value in block[name].tolist()] == truth.columns[name].tolist()
    for name in names[4:]:
        assert [value for block in blocks for value in block[name].tolist()] == view.read(name).tolist()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_selection_of_a_selection_has_what_both_keep(selection):
    whole = truth_of("generate")
    view, truth = selected(way_of("generate").traces["all"], whole, "everything at once")
    arguments, keep, layers = SELECTIONS[selection]
    if layers is not None and 0 in layers:
        layers, arguments = (2,), lambda _: {"layers": [2]}
    both = SELECTIONS["everything at once"][1](whole) & keep(whole)
    assert_tells(view.select(**arguments(whole)), whole.where(both).of_layers(layers or truth.layers))


def test_selections_that_exclude_each_other_keep_nothing():
    trace = way_of("generate").traces["all"]
    word = int(trace.read("token_id")[0])
    assert trace.select(phase="prompt").select(phase="generated").n_tokens == 0
    assert trace.select(positions=(0, 3)).select(positions=(3, 9)).n_tokens == 0
    assert trace.select(tokens=[word]).select(tokens=[word + 1]).n_tokens == 0
    assert trace.select(where={"domain": "x"}).select(where={"domain": "y"}).n_tokens == 0


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("way", ["generate", "compiled", "resumed"])
def test_saved_and_opened_a_selection_is_the_same_and_counts_its_own_tokens(way, selection, tmp_path):
    view, truth = selected(way_of(way).traces["options"], truth_of(way, "options"), selection)
    if not len(truth.columns["sequence"]):
        return
    view.save(tmp_path / "run")
    saved = ml.open(tmp_path / "run")
    assert_tells(saved, truth)
    assert saved.signals == view.signals
    lengths = np.bincount(truth.columns["sequence"], minlength=len(truth.table))
    assert saved.sequences["length"].sum() == len(truth.columns["sequence"])
    assert saved.sequences["length"].tolist() == lengths[view.sequences.index].tolist()
    assert saved.sequences.index.tolist() == list(range(len(view.sequences)))
    assert saved.meta["counts"] == {
        "tokens": len(truth.columns["sequence"]),
        "sequences": len(view.sequences),
        "documents": view.sequences["document_id"].nunique(),
    }
    assert saved.meta["layers"] == list(truth.layers)


PAIRS = [
    ("one batch behind another", ("left padding", None), ("right padding", None)),
    ("part of a run behind a generation", ("generate", "one domain"), ("resumed", "words")),
    ("the whole behind its part", ("record to disk", "two domains"), ("record to disk", None)),
    ("tokens of the prompt behind those generated", ("static cache", "generated"), ("static cache", "prompt")),
    ("layers left out of both", ("decoding by hand", "layers in another order"), ("record", "layers in another order")),
]


def part_of(plan, way, selection):
    trace, truth = way_of(way).traces[plan], truth_of(way, plan)
    return (trace, truth) if selection is None else selected(trace, truth, selection)


@pytest.mark.parametrize("case", PAIRS, ids=lambda case: case[0])
def test_joined_traces_have_the_tokens_of_both(case, tmp_path):
    for plan in ("all", "last", "options"):
        (one, truth), (other, more) = (part_of(plan, *part) for part in case[1:])
        joined, both = ml.concat([one, other]), truth.followed_by(more)
        assert_tells(joined, both)
        assert len(joined.sequences) == len(one.sequences) + len(other.sequences)
        assert joined.sequences.index.is_unique
    assert_tells(joined.save(tmp_path / "run"), both)
    again = ml.concat([joined, one])
    assert_tells(again, both.followed_by(truth))


@pytest.mark.parametrize("way", ["generate", "several batches", "resumed"])
def test_whole_sequences_selected_apart_and_joined_are_the_trace(way):
    trace, truth = way_of(way).traces["all"], truth_of(way)
    parts = [trace.select(where=trace.sequences.index.to_series() == i) for i in trace.sequences.index]
    assert_tells(ml.concat(parts), truth)


@pytest.mark.parametrize("way", ["generate", "resumed"])
@pytest.mark.parametrize("selection", ["layers in another order", "everything at once"])
def test_other_forms_have_every_column(way, selection, tmp_path):
    view, truth = selected(way_of(way).traces["options"], truth_of(way, "options"), selection)
    tables = [view.to_pandas()]

    tables.append(pd.read_parquet(view.to_parquet(tmp_path / "long.parquet")))
    places = list(truth.layers)
    for table in tables:
        assert len(table) == len(truth.columns["sequence"]) * len(places) * 2
        shape = (-1, len(places), 2)
        np.testing.assert_array_equal(table["layer"].to_numpy().reshape(shape)[0, :, 0], places)
        np.testing.assert_array_equal(table["slot"].to_numpy().reshape(shape)[:, 0], [[0, 1]] * len(truth.scored))
        np.testing.assert_array_equal(
            table["expert_id"].to_numpy().reshape(shape), truth.columns["expert_id"][:, places]
        )
        np.testing.assert_allclose(
            table["weight"].to_numpy().reshape(shape), truth.columns["weight"][:, places], atol=1e-3
        )
        for name in ("token_id", "position", "phase"):
            repeated = np.broadcast_to(truth.columns[name][:, None, None], (len(truth.scored), len(places), 2))
            np.testing.assert_array_equal(table[name].to_numpy().reshape(shape), repeated)
    data = view.to_xarray()
    assert data.layer.values.tolist() == places
    domains = truth.table["domain"].to_numpy()[truth.columns["sequence"]]
    np.testing.assert_array_equal(data["domain"].values, domains)
    for name in view.signals:
        np.testing.assert_array_equal(data[name].values, view.read(name))
        assert_signal(view, truth, name)
