"""What a local model answers, against plain torch: sums over continuations, greedy and sampled answers, their ends."""

from __future__ import annotations

import pytest
import torch
from helpers.evaluations import (
    LocalBackend,
    Sampling,
    StopStrings,
    check_sampling,
    greedy_alone,
    pairs,
    prompts,
    scored_alone,
)
from helpers.refusals import refused

import mixlens as ml

PAIRS = [
    ("The router of a mixture sends", " every token to two of its experts"),
    ("It was", " a"),
    ("Solve 3x + 4 = 10 for x. The solution is found by", " subtracting 4 from both sides and dividing by 3."),
    ("def f(x):\n    return", " x"),
    ("", "Once upon a time"),
    ("A blank stands behind this ", "context"),  # which belongs to the continuation, as lm-eval has it
]
PROMPTS = ["Once upon a time", "def add(x, y):\n    return", "Zürich is", "Solve 2x = 4 for x.\nIt is well known that"]


@pytest.fixture(scope="module")
def demo():
    return ml.load("demo", verbose=False)


@pytest.fixture(scope="module")
def lm(demo):
    return backend(demo).lm


def backend(demo, **settings) -> LocalBackend:
    return LocalBackend(demo, ml.evals.EvalSettings(**{"progress": False, "batch_size": 3, **settings}))


def tokens(lm, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids by the tokenizer alone: BOS and context, and what the whole text has behind them."""
    blanks = len(context) - len(context.rstrip())
    context, continuation = context[: len(context) - blanks], context[len(context) - blanks :] + continuation

    def ids(text: str) -> list[int]:
        return lm.tokenizer.encode(text, add_special_tokens=False)

    return [lm.tokenizer.bos_token_id, *ids(context)], ids(context + continuation)[len(ids(context)) :]


def test_log_probabilities_are_sums_over_the_continuation_of_rows_of_any_length(demo, lm):
    likeliest = []  # one token that greedy decoding gives, and the same with a token behind it that it does not
    for context, _ in PAIRS[:4]:
        best = lm.decode(greedy_alone(demo, tokens(lm, context, "")[0], 1))
        likeliest += [(context, best), (context, best + " zebra")]
    asked = [*PAIRS, *likeliest]
    expected = [scored_alone(demo, *tokens(lm, *pair)) for pair in asked]
    found = lm.loglikelihood(pairs(asked))
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}
    assert any(one[1] and not longer[1] for one, longer in zip(found[6::2], found[7::2], strict=True))


def test_shots_that_rows_share_change_no_sum(demo):
    shots = "Question: what is cold? Answer: ice. " * 12
    asked = [(shots + context, continuation) for context, continuation in PAIRS[:4]]
    asked += [(shots + "A or B? It is", choice) for choice in (" A", " B", " A and B")]
    once = backend(demo)
    (batch,) = once.batches("loglikelihood", pairs(asked))
    assert len(batch.prefix) > 48
    expected = [scored_alone(demo, *tokens(once.lm, *pair))[0] for pair in asked]
    for lm in (once.lm, backend(demo, share_prefix=False).lm):
        assert [total for total, _ in lm.loglikelihood(pairs(asked))] == pytest.approx(expected, abs=2e-4)


def test_greedy_answers_of_a_padded_batch_are_those_of_each_prompt_alone(demo, lm):
    n = 9
    expected = [
        greedy_alone(
            demo, [lm.tokenizer.bos_token_id, *lm.tokenizer.encode(p, add_special_tokens=False)], n, lm.stop_ids
        )
        for p in PROMPTS
    ]
    found = lm.generate_until(prompts(PROMPTS, max_gen_toks=n, do_sample=False))
    for prompt, text, ids in zip(PROMPTS, found, expected, strict=True):
        whole = lm.tokenizer.decode([*lm.tokenizer.encode(prompt, add_special_tokens=False), *ids])
        assert whole.endswith(text)
        assert len(whole.removesuffix(text)) == len(
            lm.tokenizer.decode(lm.tokenizer.encode(prompt, add_special_tokens=False))
        )


def test_an_answer_ends_before_the_first_of_five_stops_in_its_text(lm):
    (whole,) = lm.generate_until(prompts(PROMPTS[:1], max_gen_toks=16))
    absent = ["\x01", "\x02", "\x03", "\x04"]
    stops = {"start": whole[:3], "inside": whole[7:10], "end": whole[-3:]}
    for stop in stops.values():
        (cut,) = lm.generate_until(prompts(PROMPTS[:1], max_gen_toks=16, until=[*absent, stop]))
        assert cut == whole[: whole.index(stop)]
    listed = [stops["end"], stops["inside"], "", *absent[:2]]
    assert lm.generate_until(prompts(PROMPTS[:1], max_gen_toks=16, until=listed)) == [
        whole[: min(whole.index(stops["end"]), whole.index(stops["inside"]))]
    ]
    assert lm.generate_until(prompts(PROMPTS[:1], max_gen_toks=16, until=stops["inside"])) == [
        whole[: whole.index(stops["inside"])]
    ]


def test_a_row_ends_by_itself_at_a_stop_in_its_answer_and_not_in_its_prompt(lm):
    until = ["stop here", "", "é"]
    texts = ["we stop here", "we stop her", "sté", "nothing"]
    answers = [lm.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    columns = max(map(len, answers))
    rows = [[*[5] * (columns - len(ids)), *ids] for ids in answers]
    prompt = lm.tokenizer.encode("stop here é", add_special_tokens=False)
    ids = torch.tensor([[*prompt, *row] for row in rows])
    ended = StopStrings(lm, until, len(prompt))(ids, None)
    assert ended.tolist() == [True, False, True, False]
    assert StopStrings(lm, [], len(prompt))(ids, None).tolist() == [False] * 4
    only_prompt = StopStrings(lm, until, len(prompt))(torch.tensor([[*prompt, 9]]), None)
    assert only_prompt.tolist() == [False]


def test_an_answer_ends_at_its_end_of_sequence(lm):
    end = lm.tokenizer.eos_token_id
    ids = lm.tokenizer.encode("one two", add_special_tokens=False)
    assert lm.finish([*ids, end, *ids], []) == lm.decode(ids)
    assert lm.finish([end, *ids], ["two"]) == ""
    assert lm.finish(ids, ["w"]) == lm.decode(ids).split("w")[0]


def test_repeats_differ_and_come_again_whatever_rows_share_their_batch(demo):
    sampled = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0}

    def answers(**settings) -> list[str]:
        return backend(demo, **settings).lm.generate_until(prompts(PROMPTS[:2], repeats=3, **sampled))

    found = answers()
    assert len(set(found[:3])) == len(set(found[3:])) == 3
    assert answers(batch_size=1) == answers(batch_size=6) == found
    assert not set(answers(seed=1)) & set(found)


def test_no_temperature_or_one_choice_is_greedy(lm):
    greedy = lm.generate_until(prompts(PROMPTS[:1], max_gen_toks=6))
    for asked in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        given = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6, **asked}
        assert lm.generate_until(prompts(PROMPTS[:1], **given)) == greedy
    assert lm.generate_until(prompts(PROMPTS[:1], do_sample=False, temperature=5.0, max_gen_toks=6)) == greedy


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"temperature": 1.0}, lambda p: p),
        ({"temperature": 0.5}, lambda p: p**2),  # softmax of twice the logits
        ({"temperature": 1.0, "top_k": 2}, lambda p: p * torch.tensor([1, 1, 0, 0])),
        ({"temperature": 1.0, "top_p": 0.5}, lambda p: p * torch.tensor([1, 0, 0, 0])),
        ({"temperature": 1.0, "top_p": 0.8}, lambda p: p * torch.tensor([1, 1, 0, 0])),
    ],
)
def test_draws_follow_temperature_top_k_and_top_p(asked, expected):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    rows = 3000
    chain = Sampling.of({"do_sample": True, **asked}, range(rows)).processors()
    drawn = chain(torch.zeros(rows, 1, dtype=torch.long), logits.expand(rows, -1).clone()).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / rows
    wanted = expected(logits.softmax(-1)[0])
    assert torch.allclose(shares, wanted / wanted.sum(), atol=0.03)
    assert torch.equal(shares[wanted == 0], torch.zeros(int((wanted == 0).sum())))


@pytest.mark.parametrize(
    ("given", "temperature", "longest", "until"),
    [
        ({}, 0.0, 77, []),
        ({"until": "x", "max_gen_toks": 5}, 0.0, 5, ["x"]),
        ({"do_sample": False, "temperature": 0.7}, 0.0, 77, []),
        ({"do_sample": True, "temperature": 0.7, "max_new_tokens": 3}, 0.7, 3, []),
        ({"temperature": 0.3}, 0.3, 77, []),
        ({"do_sample": True}, 0.0, 77, []),
    ],
)
def test_a_task_s_words_for_sampling(given, temperature, longest, until):
    asked = check_sampling(given, 77)
    assert (asked["temperature"], asked["max_gen_toks"], asked["until"]) == (temperature, longest, until)
    assert Sampling.of(asked, [1]).seeds == ((1,) if temperature else ())


def test_sampling_that_would_be_left_out_in_silence_is_refused():
    with refused(ml.BadInput, "generation_kwargs", ["min_p", "repetition_penalty"]):
        check_sampling({"repetition_penalty": 1.1, "min_p": 0.1, "temperature": 1.0}, 10)


def test_text_has_one_beginning_and_keeps_its_blanks(lm):
    bos = lm.tokenizer.bos_token_id
    assert lm.tok_encode("a b")[0] == bos
    assert lm.tok_encode("<s>a b").count(bos) == 1
    assert bos not in lm.tok_encode("a b", add_special_tokens=False)
    for text in ("    return x\n", " a", "\n\nb", "é"):
        assert lm.decode(lm.tokenizer.encode("f" + text, add_special_tokens=False)[1:]) == text


def test_logits_that_are_no_numbers_are_refused(demo, monkeypatch):
    lm = backend(demo).lm
    forward = demo.forward

    def broken(*args, **kwargs):
        found = forward(*args, **kwargs)
        found.logits = found.logits * float("nan")
        return found

    monkeypatch.setattr(demo, "forward", broken)
    with refused(ml.ModelError, "model"):
        lm.loglikelihood(pairs(PAIRS[:2]))
