"""Edits in any order against their rules applied one after the other, token by token; and experts under other names."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.bare import Change, alone, softmax
from helpers.ways import net, texts
from hypothesis import given
from hypothesis import strategies as st

import mixlens as ml

LAYER, EXPERTS = 1, 5
ROW = texts((9,), 21)[0]
numbers = st.integers(0, EXPERTS - 1)
factors = st.sampled_from([-1.5, 0.25, 0.5, 2.0, 3.0])

# (what it is, its arguments); at most one expert is forbidden and one forced, so that enough are left
steps = st.lists(
    st.one_of(
        st.tuples(st.just("scale"), factors, st.frozensets(numbers, min_size=1)),
        st.tuples(st.just("add"), factors, st.frozensets(numbers, min_size=1)),
        st.tuples(st.just("reroute"), numbers, numbers).filter(lambda step: step[1] != step[2]),
        st.tuples(st.just("forbid"), numbers),
        st.tuples(st.just("force"), numbers),
    ),
    min_size=1,
    max_size=5,
).filter(lambda found: all(sum(step[0] == name for step in found) < 2 for name in ("forbid", "force", "reroute")))


def made(step):
    name, *arguments = step
    if name in ("scale", "add"):
        return getattr(ml.edits, name)(arguments[0], layers=LAYER, experts=sorted(arguments[1]))
    return getattr(ml.edits, name)(LAYER, *arguments)


def chosen(logits, banned, forced):
    order = sorted(range(EXPERTS), key=lambda e: (e not in forced, -logits[e]))
    return [e for e in order if e not in banned][:2]


def in_turn(steps, logits):
    """The rules of the edits, each on what those before it left."""
    logits, banned, forced = list(logits), set(), set()
    for name, *arguments in steps:
        if name == "scale":
            logits = [v * arguments[0] if e in arguments[1] else v for e, v in enumerate(logits)]
        elif name == "add":
            logits = [v + arguments[0] if e in arguments[1] else v for e, v in enumerate(logits)]
        elif name == "forbid":
            banned.add(arguments[0])
            forced.discard(arguments[0])
        elif name == "force":
            forced.add(arguments[0])
            banned.discard(arguments[0])
        elif arguments[0] in chosen(logits, banned, forced):
            source, target = arguments
            logits[target] = max(logits[source], logits[target])
            banned = banned - {target} | {source}
            if source in forced:
                forced = forced - {source} | {target}
    ids = chosen(logits, banned, forced)
    weights = softmax([logits[e] for e in ids])
    stands = [-np.inf if e in banned else v for e, v in enumerate(logits)]
    return stands, dict(sorted(zip(ids, weights, strict=True), key=lambda pair: -pair[1]))


@given(steps)
def test_edits_act_each_on_what_those_before_it_left(steps):
    assert_in_turn(steps)


@pytest.mark.parametrize("source", range(EXPERTS))
def test_what_was_rerouted_may_be_outdone_by_a_later_edit(source):
    """It is chosen for its logit, and not forced."""
    for target in {*range(EXPERTS)} - {source}:
        assert_in_turn([("reroute", source, target), ("add", -1.5, frozenset({target}))])


def assert_in_turn(steps):
    natural = Change(decide=lambda layer, _t, logits: in_turn(steps if layer == LAYER else (), logits))
    expected = alone(net(), ROW, natural)
    with torch.no_grad(), ml.Recorder(net()) as recorder, ml.edit(net(), *map(made, steps)):
        logits = net()(torch.tensor([ROW])).logits[0]
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    trace = recorder.trace()
    np.testing.assert_array_equal(np.sort(trace.read("expert_id"), -1), np.sort(expected["expert_id"], -1))
    np.testing.assert_allclose(trace.read("router_logits"), expected["router_logits"], atol=5e-3, rtol=2e-3)


@given(st.permutations(range(EXPERTS)), steps)
def test_experts_under_other_names_give_the_same_under_edits_of_the_other_names(order, steps):
    other = copy.deepcopy(net())
    new_name = np.argsort(order)
    for layer in other.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data[list(order)]
        for name in ("gate_up_proj", "down_proj"):
            getattr(layer.mlp.experts, name).data = getattr(layer.mlp.experts, name).data[list(order)]
    renamed = [
        (step[0], step[1], frozenset(int(new_name[e]) for e in step[2]))
        if step[0] in ("scale", "add")
        else (step[0], *(int(new_name[e]) for e in step[1:]))
        for step in steps
    ]
    found = []
    for model, edits in ((net(), steps), (other, renamed)):
        with torch.no_grad(), ml.Recorder(model, signals=()) as recorder, ml.edit(model, *map(made, edits)):
            found.append((model(torch.tensor([ROW])).logits[0], recorder.trace()))
    (logits, trace), (renamed_logits, renamed_trace) = found
    np.testing.assert_allclose(renamed_logits, logits, atol=1e-4)
    np.testing.assert_array_equal(renamed_trace.read("expert_id"), new_name[trace.read("expert_id")])
