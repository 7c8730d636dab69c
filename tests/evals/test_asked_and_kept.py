"""What a server is asked and what is kept of its answers: stops, seeds, room, and files that were cut."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.inside import PARTIAL, Answers, EndpointBackend, _check_prompt, _seed
from helpers.refusals import refused
from json_server import Reply, answering

import mixlens as ml

STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]  # servers take four
QUIET = ml.evals.EvalSettings(progress=False, batch_size=2, seed=10)


def generate(protocol: str, text: str, repeats=(0,), settings=QUIET, **asked) -> tuple[list[str], list[dict]]:
    """Answers to one prompt, and the bodies that were sent for them."""
    shape = {
        "openai-completions": lambda: {"choices": [{"text": text, "finish_reason": "stop"}]},
        "openai-chat": lambda: {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]},
        "anthropic": lambda: {"content": [{"type": "text", "text": text}], "stop_reason": "end_turn"},
    }
    with answering(lambda call: Reply(shape[protocol]())) as (url, calls):
        backend = EndpointBackend(ml.Endpoint(f"{url}/v1", model="m", protocol=protocol), settings)
        requests = [SimpleNamespace(args=("Say", asked), task_name="t", doc_id=0) for _ in repeats]
        (batch,) = backend.batches("generate_until", requests)
        answers = backend.answer("generate_until", requests, batch, list(repeats))
    return answers, [call.body for call in calls]


@pytest.mark.parametrize("protocol", ["openai-completions", "openai-chat", "anthropic"])
@pytest.mark.parametrize("stop", STOPS)
def test_each_of_five_stops_ends_an_answer_wherever_it_was_asked_for(protocol, stop):
    answers, bodies = generate(protocol, f"    return 1{stop} x\nmore", until=STOPS, max_gen_toks=64)
    assert answers == ["    return 1"]
    if protocol == "anthropic":
        assert "stop" not in bodies[0]
    else:
        assert bodies[0]["stop"] == STOPS[:4]


def test_the_first_stop_in_the_text_counts_not_the_first_in_the_list():
    answers, _ = generate("openai-completions", "a\nprint b\nclass c", until=STOPS)
    assert answers == ["a"]
    assert generate("openai-completions", "\nclass c", until=STOPS)[0] == [""]
    assert generate("openai-completions", "none here", until=STOPS)[0] == ["none here"]


def test_repeats_of_a_prompt_have_seeds_of_their_own_and_greedy_answers_none():
    sampled = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "until": ["#"], "max_gen_toks": 33}
    bodies = [generate("openai-completions", "x", (repeat,), **sampled)[1][0] for repeat in range(3)]
    assert [body["seed"] for body in bodies] == [10, 11, 12]
    assert all((body["temperature"], body["top_p"], body["max_tokens"]) == (0.6, 0.9, 33) for body in bodies)
    (greedy,) = generate("openai-completions", "x", until=["#"], do_sample=False, temperature=0.6)[1]
    assert greedy["temperature"] == 0
    assert "seed" not in greedy
    assert "top_p" not in greedy
    assert greedy["max_tokens"] == QUIET.max_new_tokens


def test_a_row_s_seed_depends_on_seed_repeat_and_prompt_and_on_nothing_else():
    cases = [(seed, prompt, repeat) for seed in (0, 1, 11) for prompt in ("a", "b", "1\na") for repeat in (0, 1, 2, 11)]
    seeds = {case: _seed(*case) for case in cases}
    assert len(set(seeds.values())) == len(cases)
    assert seeds == {case: _seed(*case) for case in cases}
    assert all(0 <= seed < 2**63 for seed in seeds.values())


class Words:
    """A model object that reads ten tokens."""

    tokenizer = SimpleNamespace(bos_token_id=1)
    max_length = 10


REQUEST = SimpleNamespace(task_name="t", doc_id=3)


@pytest.mark.parametrize(("prompt", "new", "fits"), [(10, 0, True), (11, 0, False), (6, 4, True), (7, 4, False)])
def test_a_prompt_must_leave_room_for_its_answer(prompt, new, fits):
    ids = [1, *[5] * (prompt - 1)]
    if fits:
        _check_prompt(Words, REQUEST, ids, new)
    else:
        with refused(ml.BadInput, "tasks", ("t", 3, prompt + new, 10)):
            _check_prompt(Words, REQUEST, ids, new)


@pytest.mark.parametrize(("ids", "good"), [([1, 5], True), ([5, 1], False), ([1, 1, 5], False), ([1, 5, 1], True)])
def test_a_prompt_begins_with_one_beginning_of_sequence(ids, good):
    if good:
        _check_prompt(Words, REQUEST, ids, 0)
    else:
        with refused(ml.BadInput, "tokenizer", ids[:2]):
            _check_prompt(Words, REQUEST, ids, 0)


KEYS = [("t", doc, choice, repeat) for doc in (0, 1) for choice in (0, 1) for repeat in (0, 2)]


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_line_that_was_cut_is_gone_and_what_comes_after_it_stays(tmp_path, cut):
    path = tmp_path / Path(PARTIAL).name
    first = Answers(path)
    first.add("a", KEYS[:2], ["one", (-1.5, True)])
    first.add("b", KEYS[2:4], ["two", "three"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])

    second = Answers(path)  # resumed, and killed again after one batch
    assert second.done == {"a"}
    assert second.by_key == {KEYS[0]: "one", KEYS[1]: (-1.5, True)}
    second.add("c", KEYS[4:5], ["four"])

    third = Answers(path)
    assert third.done == {"a", "c"}
    assert third.by_key == {**second.by_key, KEYS[4]: "four"}
    assert [json.loads(line)["batch"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_what_is_read_again_is_what_was_kept_and_nothing_else_is_written(tmp_path):
    kept = Answers(tmp_path / Path(PARTIAL).name)
    kept.add("a", KEYS[:3], ["é\n\u2028", (float("-inf"), False), ""])
    kept.add("b", [KEYS[3]], [(0.1 + 0.2, True)])
    before = (tmp_path / Path(PARTIAL).name).read_bytes()
    again = Answers(tmp_path / Path(PARTIAL).name)
    assert again.by_key == kept.by_key
    assert again.done == kept.done == {"a", "b"}
    assert (tmp_path / Path(PARTIAL).name).read_bytes() == before
    assert Answers(None).by_key == {}


def test_a_completions_server_scores_no_whole_documents():
    request = SimpleNamespace(args=("x",), task_name="wiki", doc_id=0)
    backend = EndpointBackend(ml.Endpoint("http://127.0.0.1:9/v1", model="m", protocol="openai-completions"), QUIET)
    with refused(ml.BadInput, "tasks", "wiki"):
        backend.answer("loglikelihood_rolling", [request], SimpleNamespace(requests=[0]), [0])
