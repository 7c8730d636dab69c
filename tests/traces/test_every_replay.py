"""Replays and patches from recordings, whole and selected, onto rows in another order, batch and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.bare import Change, softmax, strongest
from helpers.refusals import refused
from helpers.told import assert_tells, told
from helpers.ways import (
    Numbers,
    Recorders,
    Way,
    chunks_with_a_cache,
    decoding_by_hand,
    net,
    one_batch,
    padded,
    several_batches,
    texts,
    way_of,
)

import mixlens as ml

E = ml.edits
K, SITES = 2, (ml.Site("moe_out", (0, 1, 2), "float32"),)
PLANS = {"all": ("router_logits", "logprob", *SITES)}
ROWS = [*texts((5, 11, 1, 8)), *texts((4, 9, 2), 1), *texts((7,), 2), *texts((12, 12), 4)]
ROWS[1][4] = 0
ROWS += [one + other for one, other in zip(texts((5, 2, 7), 5), texts((3, 3, 3), 6), strict=True)]


@pytest.fixture(scope="module")
def recorded():
    """(trace of all rows under an edit, another row in front, and what it chose: by row, from rows run alone)."""
    bias = Change(decide=lambda _l, _t, logits: biased(logits))
    rows = [[7, 7, 7], *ROWS]
    with Recorders([E.add(1.0, experts=4), E.add(-1.0, experts=0)], {"all": ("router_logits",)}) as recorders:
        for part in (rows[:6], rows[6:]):
            ids, mask = padded(part, "left")
            net()(ids, attention_mask=mask)
    trace = recorders.way(rows, [len(row) for row in rows]).traces["all"]
    truth = told(net(), ROWS, changes=[bias] * len(ROWS))
    own = {tuple(row): truth.where(truth.columns["sequence"] == i) for i, row in enumerate(ROWS)}
    return trace, own


def biased(logits):
    moved = [v + (e == 4) - (e == 0) for e, v in enumerate(logits)]
    return moved, strongest(moved, K)


def as_recorded(own, row, layers, weights, here):
    """The Change that a replay makes of a row: what was recorded of it, in these layers, at these positions."""
    truth = own[tuple(row)]

    def decide(layer, t, logits):
        if layer not in layers or not here(t):
            return logits, strongest(logits, K)
        ids = truth.columns["expert_id"][t, layer].tolist()
        first = float(np.float16(truth.columns["weight"][t, layer, 0]))  # a trace keeps half precision
        found = [first, 1 - first] if weights else softmax([logits[e] for e in ids])
        return logits, dict(sorted(zip(ids, found, strict=True), key=lambda pair: -pair[1]))

    return Change(decide=decide)


def reversed_rows(edits):
    """The batches of `several_batches`, rows in another order, padding on the other side."""
    batches = [texts((4, 9, 2), 1)[::-1], texts((7,), 2)]
    with Recorders(edits, PLANS) as recorders:
        for rows in batches:
            ids, mask = padded(rows, "left")
            net()(ids, attention_mask=mask)
    rows = [row for batch in batches for row in batch]
    return recorders.way(rows, [len(row) for row in rows])


def documents(edits):
    """`record` pads on the right, without a mask."""
    rows = [*texts((4, 9, 2), 1), *texts((7,), 2)]
    settings = ml.RecordSettings(batch_tokens=18, progress=False)
    with ml.edit(net(), *edits):
        trace = ml.record(
            net(),
            [" ".join(map(str, row)) for row in rows],
            tokenizer=Numbers(),
            signals=PLANS["all"],
            settings=settings,
        )
    return Way({"all": trace}, rows, [len(row) for row in rows], trace.sequences[["document_id"]])


RUNS = {
    "left padding": lambda edits: one_batch("left", edits=edits, plans=PLANS),
    "right padding": lambda edits: one_batch("right", edits=edits, plans=PLANS),
    "several batches": lambda edits: several_batches(((4, 9, 2), (7,)), edits=edits, plans=PLANS),
    "rows in another order": reversed_rows,
    "decoding by hand": lambda edits: decoding_by_hand(edits=edits, plans=PLANS),
    "chunks": lambda edits: chunks_with_a_cache(edits=edits, plans=PLANS),
    "record": documents,
}
# (layers selected of the trace, layers= of the replay, layers that are replayed)
LAYERS = {
    "all": (None, None, (0, 1, 2)),
    "asked": (None, 1, (1,)),
    "selected": ([2], [2], (2,)),
    "selected in another order": ([2, 0], [0, 2], (0, 2)),
    "reordered": ([2, 0, 1], None, (0, 1, 2)),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("weights", [False, True], ids=["chosen", "weighted"])
def test_a_replay_chooses_what_was_recorded_of_the_same_tokens(recorded, run, layers, weights):
    trace, own = recorded
    selected, asked, replayed = LAYERS[layers]
    trace = trace.select(where=trace.sequences["length"] != 3)  # the first sequence is left out: number is not place
    trace = trace if selected is None else trace.select(layers=selected)
    where = {"positions": range(1, 7)} if layers == "asked" else {}
    way = RUNS[run]([E.replay(trace, weights=weights, layers=asked, where=E.Where(**where))])
    changes = [as_recorded(own, row, replayed, weights, lambda t: t in where.get("positions", [t])) for row in way.rows]
    truth = told(net(), way.rows, way.prompts, sites=SITES, table=way.table, changes=changes)
    assert_tells(way.traces["all"], truth)
    if layers == "all":
        assert (way.traces["all"].read("expert_id") != told(net(), way.rows).columns["expert_id"]).any()


# ---------------------------------------------------------------- patches from recordings

SITE_LAYER = 2
RECORDED = ("resid_pre", "attn_out", "moe_in", "moe_out", "expert_out", "expert_neurons")
SHORTER = ((6, 5, 8), (7,), (3, 9))  # beside the 4, 9, 2; 7; 3, 6 tokens that were recorded


def recorded_value(truth, site, number, position):
    found = (truth.columns["sequence"] == number) & (truth.columns["position"] == position)
    return torch.tensor(truth.sites[site][found][0, SITE_LAYER]) if found.any() else None


def change_from(site, own):
    """The Change that puts own(t) at a site where there is one: [hidden], or [slot, hidden]."""

    def stream(layer, t, name, value):
        return value if (layer, name) != (SITE_LAYER, site) or own(t) is None else own(t)

    def slot_of(layer, t, slot, chosen, value):
        return value if layer != SITE_LAYER or own(t) is None else own(t)[slot]

    if site == "expert_out":
        return Change(output=slot_of)
    return Change(neurons=slot_of) if site == "expert_neurons" else Change(stream=stream)


@pytest.mark.parametrize("part", ["whole", "sequences left out", "positions"])
@pytest.mark.parametrize("site", RECORDED)
def test_a_recording_is_put_where_it_was_row_by_row_and_position_by_position(site, part):
    trace, truth = way_of("several batches").traces["all"], told(net(), way_of("several batches").rows)
    kept, where = {*range(6)}, E.Where()
    if part == "sequences left out":
        trace = trace.select(where={"domain": ["x", "z"]}, layers=[2])
        kept = {0, 2, 3, 5}
    if part == "positions":
        where = E.Where(positions=[0, 2, 5])
    patch = E.patch(site, trace.activations(site), layer=SITE_LAYER, where=where)
    way = several_batches(SHORTER, 40, edits=[patch], plans=PLANS)

    def own(number):
        def at(t):
            meant = number in kept and (part != "positions" or t in (0, 2, 5))
            return recorded_value(truth, site, number, t) if meant else None

        return at

    changes = [change_from(site, own(number)) for number in range(6)]
    expected = told(net(), way.rows, way.prompts, sites=SITES, table=way.table, changes=changes)
    assert_tells(way.traces["all"], expected)


@pytest.mark.parametrize("run", ["several batches", "decoding by hand"])
def test_values_by_position_are_put_in_every_row(run):
    values, positions = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), [6, 0, 3]
    patch = E.patch("moe_out", values, layer=SITE_LAYER, where=E.Where(positions=positions))
    way = RUNS[run]([patch])

    def own(t):
        return values[positions.index(t)] if t in positions else None

    changes = [change_from("moe_out", own)] * len(way.rows)
    assert_tells(way.traces["all"], told(net(), way.rows, way.prompts, sites=SITES, table=way.table, changes=changes))


@pytest.mark.parametrize("signal", ["expert_id", "weight"])
def test_what_was_recorded_is_what_was_decided(recorded, signal):
    trace, own = recorded
    expected = np.concatenate([own[tuple(row)].columns[signal] for row in ROWS])
    np.testing.assert_allclose(trace.read(signal)[3:], expected, atol=1e-3)


def test_padding_that_no_mask_tells_of_is_routed_as_the_router_says(recorded):
    trace, _ = recorded
    long, short = ROWS[1], ROWS[4]
    assert len(long) > len(short) > 1
    ids = torch.tensor([long, short + [0] * (len(long) - len(short))])
    seen = []
    handle = net().model.layers[0].mlp.gate.register_forward_hook(lambda _m, _i, output: seen.append(output[2]))
    try:
        with torch.no_grad():
            net()(ids)
            with ml.edit(net(), E.replay(trace)):
                net()(ids)
    finally:
        handle.remove()
    natural, replayed = (chosen.reshape(2, len(long), K).sort(-1).values for chosen in seen)
    assert torch.equal(natural[1, len(short) :], replayed[1, len(short) :])
    assert not torch.equal(natural[1, : len(short)], replayed[1, : len(short)])


def test_a_deeper_models_recording_is_replayed_in_the_layers_that_are_named():
    trace, own = told_by_a_deeper_model()
    ids = torch.tensor([ROWS[1]])
    with refused(ml.BadInput, "layers"), ml.edit(net(), E.replay(trace)):
        net()(ids)
    with torch.no_grad(), ml.Recorder(net()) as recorder, ml.edit(net(), E.replay(trace, layers=[0, 2])):
        net()(ids)
    ids = recorder.trace().read("expert_id")
    assert np.array_equal(np.sort(ids[:, [0, 2]]), np.sort(own[:, [0, 2]]))
    assert not np.array_equal(np.sort(ids[:, 1]), np.sort(own[:, 1]))


def told_by_a_deeper_model():
    """A trace of four layers over a row, and its experts [token, 4, slot]."""
    own = np.random.default_rng(0).permuted(np.tile(np.arange(5), (len(ROWS[1]), 4, 1)), axis=-1)[..., :K]
    return ml.Trace.from_arrays(own, n_experts=5, tokens={"token_id": np.array(ROWS[1])}), own
