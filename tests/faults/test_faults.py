"""A sample of what `make faults` tries, and under slow a larger one."""

from __future__ import annotations

import sys

import pytest
from kills import at_every_operation, at_random
from limits import LIMITS, full_disk, limited, refused
from tampering import damages, edits, strays
from verbs import QUICK, RUNS, VERBS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and limited as on Linux")
QUICK_RUNS = [verb for verb in QUICK if verb in RUNS]


def held(tried, *, least: int = 1) -> None:
    found = list(tried)
    assert len(found) >= least
    assert {which: wrong for which, wrong in found if wrong} == {}


@pytest.mark.parametrize(("verb", "every", "start"), [("record", 17, 3), ("topk", 23, 11)])
def test_a_call_that_was_killed_goes_on_to_what_it_would_have_been(tmp_path, verb, every, start):
    held(at_every_operation(verb, tmp_path, every, start), least=2)


def test_a_figure_that_was_killed_leaves_the_old_one_and_then_is_whole(tmp_path):
    held(at_every_operation("figure", tmp_path), least=5)


def test_a_figure_that_finds_no_room_for_its_fonts_says_so(tmp_path):
    held(limited("figure", tmp_path, "open files"), least=3)


@pytest.mark.parametrize("tampering", [damages, strays, edits])
def test_what_was_done_to_a_finished_run_is_named(tmp_path, tampering):
    VERBS["record"](tmp_path / "whole")
    held(tampering(tmp_path / "whole", tmp_path / "scratch"), least=4)


@pytest.mark.parametrize("what", LIMITS)
def test_too_little_of_something_ends_in_words_and_loses_nothing(tmp_path, what):
    held(limited("record", tmp_path, what), least=3)


def test_a_disk_that_refuses_from_some_operation_on_ends_in_words_and_loses_nothing(tmp_path):
    held(refused("topk", tmp_path, 19, 5), least=2)


@pytest.mark.slow
@pytest.mark.parametrize("verb", QUICK_RUNS)
def test_every_operation_of_a_verb(tmp_path, verb):
    held(at_every_operation(verb, tmp_path, every=9), least=2)


@pytest.mark.slow
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("report", "pareto")])
def test_random_kills_of_a_verb(tmp_path, verb):
    held(at_random(verb, tmp_path, 2, seed=1), least=2)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["evaluate", *QUICK_RUNS[1:]])
@pytest.mark.parametrize("tampering", [damages, strays])
def test_what_was_done_to_another_finished_run_is_named(tmp_path, verb, tampering):
    VERBS[verb](tmp_path / "whole")
    held(tampering(tmp_path / "whole", tmp_path / "scratch"), least=4)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["record", "topk"])
def test_a_full_disk_loses_nothing(tmp_path, verb):
    found = list(full_disk(verb, tmp_path, (40, 160)))
    if not found:
        pytest.skip("no file system can be mounted here")
    held(found)
