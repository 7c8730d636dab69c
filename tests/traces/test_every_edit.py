"""Every edit, under padding, over several forwards and batches, with every form of where=, against rows run alone.

Each row is run alone through a block written out in plain torch, whose choice and outputs a rule changes.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.bare import Change, strongest
from helpers.told import assert_tells, told
from helpers.ways import decoding_by_hand, generated, net, one_batch, several_batches, texts

import mixlens as ml

LAYER, K = 1, 2
SITES = tuple(ml.Site(name, (0, 1, 2), "float32") for name in ("resid_post", "moe_out", "expert_out", "expert_neurons"))
PLANS = {"all": ("router_logits", "logprob", *SITES)}
VECTOR, NEURONS = torch.linspace(-1, 1, 16), torch.linspace(-0.5, 0.5, 24)
SLOTS = torch.stack([VECTOR, VECTOR.flip(0)])
MEANS = torch.linspace(-2, 2, 16)

# ---------------------------------------------------------------- ways: name: (run, number of each row in its batch)

RUNS = {
    "left padding": (lambda edits: one_batch("left", edits=edits, plans=PLANS), [0, 1, 2, 3]),
    "several batches": (lambda edits: several_batches(edits=edits, plans=PLANS), [0, 1, 2, 0, 0, 1]),
    "decoding by hand": (lambda edits: decoding_by_hand(edits=edits, plans=PLANS), [0, 1, 2]),
    "generate": (
        lambda edits: generated(texts((5, 2, 7), 7), pad=4, stop=4, recording={"edits": edits, "plans": PLANS}),
        [0, 1, 2],
    ),
    "static cache": (
        lambda edits: generated(
            texts((3, 6), 8),
            pad=4,
            stop=4,
            recording={"edits": edits, "plans": PLANS},
            cache_implementation="static",
        ),
        [0, 1],
    ),
}
DECODES = ("decoding by hand", "generate", "static cache")

# ---------------------------------------------------------------- conditions

WORDS = list(range(20, 60))
WHERES = {
    "everywhere": {},
    "words": {"tokens": WORDS},
    "a position": {"positions": 1},
    "positions": {"positions": range(2, 30)},
    "a row": {"rows": 1},
    "prompt": {"phase": "prompt"},
    "rows and positions": {"rows": [0, 2], "positions": [0, 1, 2, 5, 6]},
    "generated": {"phase": "generated"},
    "generated words": {"phase": "generated", "tokens": range(100), "positions": range(3, 40)},
}


def numbers(value):
    return [value] if isinstance(value, int) else list(value)


def meant(where, token, position, generated, row):
    """Whether a token meets every condition, said once more."""
    return (
        ("tokens" not in where or token in numbers(where["tokens"]))
        and ("positions" not in where or position in numbers(where["positions"]))
        and ("rows" not in where or row in numbers(where["rows"]))
        and ("phase" not in where or generated == (where["phase"] == "generated"))
    )


# ---------------------------------------------------------------- rules


def forbidding(*experts):
    def rule(logits):
        stands = [-np.inf if e in experts else v for e, v in enumerate(logits)]
        return stands, strongest(logits, K, banned=experts)

    return rule


def forcing(logits):
    return logits, strongest(logits, K, forced=[3])


def forcing_with_weight(logits):
    other = next(e for e in strongest(logits, K, forced=[4]) if e != 4)
    return logits, {4: 0.7, other: 0.3}


def forcing_with_a_small_weight(logits):
    other = next(e for e in strongest(logits, K, forced=[4]) if e != 4)
    return logits, {other: 0.8, 4: 0.2}


def changed(change):
    def rule(logits):
        stands = [change(e, v) for e, v in enumerate(logits)]
        return stands, strongest(stands, K)

    return rule


def rerouting(source, target):
    def rule(logits):
        if source not in strongest(logits, K):
            return logits, strongest(logits, K)
        moved = list(logits)
        moved[target] = max(logits[source], logits[target])
        chosen = strongest(moved, K, banned=[source])
        moved[source] = -np.inf
        return moved, chosen

    return rule


E = ml.edits
ROUTINGS = {
    "forbid": (lambda w: E.forbid(LAYER, [1, 3], where=w), forbidding(1, 3)),
    "ablate": (lambda w: E.ablate(LAYER, 2, where=w), forbidding(2)),
    "force": (lambda w: E.force(LAYER, 3, where=w), forcing),
    "force with weight": (lambda w: E.force(LAYER, 4, weight=0.7, where=w), forcing_with_weight),
    "force with a small weight": (lambda w: E.force(LAYER, 4, weight=0.2, where=w), forcing_with_a_small_weight),
    "scale": (
        lambda w: E.scale(3.0, layers=LAYER, experts=[0, 2], where=w),
        changed(lambda e, v: v * 3 if e in (0, 2) else v),
    ),
    "scale all": (lambda w: E.scale(-1.0, layers=LAYER, where=w), changed(lambda e, v: -v)),
    "add": (lambda w: E.add(1.5, layers=LAYER, experts=4, where=w), changed(lambda e, v: v + 1.5 if e == 4 else v)),
    "temperature": (lambda w: E.temperature(0.5, layers=LAYER, where=w), changed(lambda e, v: v / 0.5)),
    "reroute": (lambda w: E.reroute(LAYER, 3, 1, where=w), rerouting(3, 1)),
    "reroute back": (lambda w: E.reroute(LAYER, 1, 3, where=w), rerouting(1, 3)),
}


def output_of(experts, value):
    return lambda expert, found: (found * 0 if value is None else value) if expert in experts else found


OUTPUTS = {
    "zero": (lambda w: E.ablate(LAYER, [1, 3], how="zero", where=w), output_of((1, 3), None)),
    "mean": (lambda w: E.ablate(LAYER, 2, how="mean", mean=MEANS, where=w), output_of((2,), MEANS)),
    "output of one expert": (
        lambda w: E.patch("expert_out", VECTOR, layer=LAYER, expert=4, where=w),
        output_of((4,), VECTOR),
    ),
}
STREAMS = {
    site: (lambda w, site=site: E.patch(site, VECTOR, layer=LAYER, where=w), site)
    for site in ("resid_pre", "resid_post", "attn_out", "moe_in", "moe_out")
}


def change_of(edit, here):
    """The Change that an edit of the tables makes of a row; `here` says at which positions."""
    if edit in ROUTINGS:
        rule = ROUTINGS[edit][1]
        return Change(
            decide=lambda layer, t, logits: (
                rule(logits) if layer == LAYER and here(t) else (logits, strongest(logits, K))
            )
        )
    if edit in OUTPUTS:
        put = OUTPUTS[edit][1]
        return Change(
            output=lambda layer, t, slot, expert, value: put(expert, value) if layer == LAYER and here(t) else value
        )
    if edit == "neurons of one expert":
        return Change(
            neurons=lambda layer, t, slot, expert, value: (
                NEURONS if layer == LAYER and expert == 1 and here(t) else value
            )
        )
    if edit == "outputs of all slots":
        return Change(output=lambda layer, t, slot, expert, value: SLOTS[slot] if layer == LAYER and here(t) else value)
    return Change(stream=lambda layer, t, site, value: VECTOR if (layer, site) == (LAYER, edit) and here(t) else value)


EDITS = {
    **{name: make for name, (make, _) in (ROUTINGS | OUTPUTS | STREAMS).items()},
    "neurons of one expert": lambda w: E.patch("expert_neurons", NEURONS, layer=LAYER, expert=1, where=w),
    "outputs of all slots": lambda w: E.patch("expert_out", SLOTS, layer=LAYER, where=w),
}
# Every edit in every way to run, the conditions taking turns so that each meets every edit or its like.
CASES = []
for number, run in enumerate(RUNS):
    possible = [name for name in WHERES if run in DECODES or "generated" not in name]
    turns = itertools.cycle(possible)
    for _ in range(2 * number):
        next(turns)
    CASES += [(run, edit, next(turns)) for edit in EDITS]


def changes_of(edit, where, way, in_batch):
    """A Change for every row of a way."""
    return [
        change_of(
            edit,
            lambda t, row=row, prompt=prompt, number=number: meant(where, row[t], t, t >= prompt, number),
        )
        for row, prompt, number in zip(way.rows, way.prompts, in_batch, strict=True)
    ]


@pytest.mark.parametrize(("run", "edit", "where"), CASES, ids=map(", ".join, CASES))
def test_an_edit_does_to_a_batch_what_it_does_to_each_row_alone(run, edit, where):
    start, in_batch = RUNS[run]
    way = start([EDITS[edit](E.Where(**WHERES[where]))])
    truth = told(
        net(),
        way.rows,
        way.prompts,
        sites=SITES,
        table=way.table,
        scores_prompts=way.scores_prompts,
        changes=changes_of(edit, WHERES[where], way, in_batch),
    )
    assert_tells(way.traces["all"], truth)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("run", ["several batches", "generate"])
def test_every_token_chooses_k(run, k):
    way = RUNS[run][0]([E.top_k(k)])
    change = Change(decide=lambda layer, t, logits: (logits, strongest(logits, k)))
    options = {"sites": SITES, "table": way.table, "scores_prompts": way.scores_prompts}
    truth = told(net(), way.rows, way.prompts, changes=[change] * len(way.rows), **options)
    assert_tells(way.traces["all"], truth)
    assert way.traces["all"].top_k == k
