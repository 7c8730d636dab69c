"""Preflight questions with known outcome, sent to a server before an evaluation and reported with its scores.

They are derived from a prompt of the evaluation and require no knowledge of the model: its answer to the prompt
determines its answer if the prompt is longer or the answer shorter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from mixlens.errors import BadInput, EndpointError

_TOKENS, _LONG_PROMPT = 16, 2000
# A server may count the end of a sequence too.
_MORE = 1
# BOS and the word; every chat template adds more tokens.
_BARE = 3
# Upper bound on the tokens that a server adds around two halves of a prompt, and that cutting a word adds.
_AROUND = 64


@dataclass(frozen=True)
class Said:
    """An answer to a question: its text, and token counts, None if not reported."""

    text: str
    output_tokens: int | None = None
    input_tokens: int | None = None


class Ask(Protocol):
    """Function that sends a question to a backend; `again` distinguishes otherwise identical questions."""

    def __call__(
        self, prompt: Any, max_tokens: int, *, stop: str = "", seed: int | None = None, again: str = ""
    ) -> Said: ...


@dataclass(frozen=True)
class Finding:
    """Result of a question.

    question  tested property, such as "max_tokens"
    holds     whether the server behaves as expected; None if unknown
    found     description of the result
    """

    question: str
    holds: bool | None
    found: str


def ask_all(
    ask: Ask, requests: Sequence[Any], can: Collection[str], n_tokens: Callable[[str], int | None]
) -> list[dict[str, Any]]:
    """Return findings on max_tokens, stop strings, repeated answers, seeds, first blanks and prompt tokens, as dicts.

    can        those that apply of "continue" (prompts are continued as texts rather than answered as messages), "stop"
               (stop strings are sent) and "seed" (seeds are sent)
    n_tokens   function that counts the tokens of a prompt, including special ones, with the tokenizer of the model;
               None if unknown
    """
    from mixlens.evals.generating import check_sampling  # imports torch, which readers of a log do not need

    prompt, asked = requests[0].args
    asked = check_sampling(asked, _TOKENS)
    try:
        whole = ask(prompt, _TOKENS)
    except (EndpointError, BadInput) as error:
        return [asdict(Finding("answers", None, f"the preflight was not answered: {error}"))]
    looked: dict[str, Callable[[], Finding]] = {
        "max_tokens": lambda: _limit(ask, prompt, whole),
        "the same answer again": lambda: _again(ask, prompt, whole),
    }
    if "stop" in can and asked["until"]:
        looked["stop strings"] = lambda: _stop(ask, prompt, whole)
    if "seed" in can and asked["temperature"]:
        looked["seed"] = lambda: _seed(ask, prompt)
    if "continue" in can:
        looked["first blank"] = lambda: _blank(ask, prompt, whole)
    if whole.input_tokens is not None:
        expected = n_tokens(prompt)
        if expected is not None:
            looked["tokens of a prompt"] = lambda: _counted(whole.input_tokens or 0, expected)
        elif "continue" not in can:
            looked["chat template"] = lambda: _template(ask)
        longest = max((str(request.args[0]) for request in requests), key=len)
        if len(longest) >= _LONG_PROMPT and not longest.startswith('[{"role"'):
            looked["long prompts"] = lambda: _cut(ask, longest)
    return [asdict(_told(question, look)) for question, look in looked.items()]


def _told(question: str, look: Callable[[], Finding]) -> Finding:
    try:
        return look()
    except (EndpointError, BadInput) as error:
        return Finding(question, None, f"was not answered: {str(error)[:200]}")


def _limit(ask: Ask, prompt: Any, whole: Said) -> Finding:
    one = ask(prompt, 1)
    if one.output_tokens is not None:
        holds: bool | None = one.output_tokens <= 1 + _MORE
        return Finding("max_tokens", holds, f"{one.output_tokens} tokens where 1 was the most")
    words = len(one.text.split())
    holds = None if not whole.text.strip() else words <= 1 + _MORE
    return Finding("max_tokens", holds, f"{words} words where 1 token was the most")


def _again(ask: Ask, prompt: Any, whole: Said) -> Finding:
    same = ask(prompt, _TOKENS, again="greedy").text == whole.text
    return Finding("the same answer again", same, "a greedy answer " + ("repeats" if same else "differs when repeated"))


def _seed(ask: Ask, prompt: Any) -> Finding:
    first, second, other = (
        ask(prompt, _TOKENS, seed=seed, again=again).text for seed, again in ((1, ""), (1, "seed"), (2, ""))
    )
    if first != second:
        return Finding("seed", False, "a sampled answer differs at the same seed")
    return Finding("seed", None if first == other else True, "sampled answers repeat at a seed" + (
        ", and are the same at another" if first == other else ", and differ at another"))  # fmt: skip


def _stop(ask: Ask, prompt: Any, whole: Said) -> Finding:
    words = [word for found in re.finditer(r"\S+", whole.text) if whole.text.find(word := found.group()) > 0]
    if not words:
        return Finding("stop strings", None, "the answer has too few words to stop at one")
    stop = words[len(words) // 2]
    expected, said = whole.text[: whole.text.find(stop)], ask(prompt, _TOKENS, stop=stop).text
    if said in (expected, expected.rstrip()) or said.startswith(expected + stop):
        ignored = said != expected + stop and said.startswith(expected + stop)
        return Finding("stop strings", not ignored, "are ignored, and applied here" if ignored else "end an answer")
    if expected.startswith(said):
        return Finding("stop strings", False, f"take {len(expected) - len(said)} characters before them with them")
    return Finding("stop strings", None, "the answer is another one with a stop string")


def _blank(ask: Ask, prompt: str, whole: Said) -> Finding:
    places = [found.start() for found in re.finditer(r" (?=\w)", whole.text) if found.start() > 0]
    if not places:
        return Finding("first blank", None, "the answer has too few words to go on before a blank")
    rest = whole.text[places[0] :]
    said = ask(prompt + whole.text[: places[0]], _TOKENS).text
    if _same_start(said, rest):
        return Finding("first blank", True, "an answer begins with the blank that belongs to it")
    if _same_start(said, rest.lstrip(" ")):
        return Finding("first blank", False, "is lost: answers begin without the blank that belongs to them")
    if _same_start(said, " " + rest):
        return Finding("first blank", False, "is added: answers begin with a blank that does not belong to them")
    return Finding("first blank", None, "the answer goes on otherwise when its beginning is given")


def _same_start(a: str, b: str) -> bool:
    n = min(len(a), len(b))
    return n >= 2 and a[:n] == b[:n]


def _counted(found: int, expected: int) -> Finding:
    extra = {1: ": one more, as with two beginning-of-sequence tokens", -1: ": one less, as with none"}
    told = f"{found} by the server, {expected} by the tokenizer{extra.get(found - expected, '')}"
    return Finding("tokens of a prompt", found == expected, told)


def _template(ask: Ask) -> Finding:
    n = ask("Hi", 1).input_tokens
    if n is None:
        return Finding("chat template", None, "the server does not count tokens")
    missing = n <= _BARE
    return Finding("chat template", not missing, f"a message of one word has {n} tokens" + (
        ": no template is put round it" if missing else ""))  # fmt: skip


def _cut(ask: Ask, prompt: str) -> Finding:
    middle = prompt.find(" ", len(prompt) // 2)
    counts = [ask(part, 1).input_tokens for part in (prompt, prompt[:middle], prompt[middle:])]
    if None in counts:
        return Finding("long prompts", None, "the server does not count tokens")
    whole, *halves = (n for n in counts if n is not None)
    lost = sum(halves) - _AROUND - whole
    found = f"{whole} tokens in one piece, {sum(halves)} in two"
    return Finding("long prompts", lost <= 0, found + (": the server cuts them" if lost > 0 else ""))


def finding_remarks(findings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a sentence on the passed questions, one on the inconclusive ones, and one for each failure."""
    if good := [one["question"] for one in findings if one["holds"]]:
        yield f"Preflight, as it should be: {', '.join(good)}."
    if unknown := [f"{one['question']} ({one['found'].rstrip('.')})" for one in findings if one["holds"] is None]:
        yield f"Preflight, not known: {'; '.join(unknown)}."
    for one in findings:
        if one["holds"] is False:
            yield f"Preflight, not as it should be: {one['question']}: {one['found']}."
