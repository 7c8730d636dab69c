"""Evaluations over an endpoint: what it cannot score is refused, with what to use instead."""

from __future__ import annotations

import pytest

import mixlens as ml
from mixlens.evals.answers import Answers

QUIET = ml.EvalSettings(progress=False)


def closed(protocol: str) -> ml.Endpoint:
    """Nobody listens there."""
    return ml.Endpoint("http://127.0.0.1:9/v1", model="mixtral", protocol=protocol)


def test_a_chat_endpoint_is_not_asked_for_log_probabilities(shared):
    with pytest.raises(
        ml.BadInput, match="Use the generative protocol mmlu_5shot_generative, or a server of openai-compl"
    ):
        ml.evaluate(closed("openai-chat"), "mmlu_5shot::virology", data=shared / "data", limit=1, settings=QUIET)


def test_a_chat_endpoint_is_not_asked_to_continue_a_text(shared):
    with pytest.raises(ml.BadInput, match="which answers messages. Use humaneval_0shot_instruct"):
        ml.evaluate(closed("openai-chat"), "humaneval_0shot", data=shared / "data", limit=1, settings=QUIET)


def test_a_completions_endpoint_has_no_chat_template(shared):
    with pytest.raises(ml.BadInput, match="openai-completions applies none"):
        ml.evaluate(
            closed("openai-completions"), "humaneval_0shot_instruct", data=shared / "data", limit=1, settings=QUIET
        )


def test_an_answer_with_half_a_character_is_kept(tmp_path):
    answers = Answers(tmp_path / "answers")
    answers.add("one", [("task", 0, 0, 0)], ["half \ud83d of one"])
    assert Answers(tmp_path / "answers").by_key == answers.by_key == {("task", 0, 0, 0): "half ? of one"}
