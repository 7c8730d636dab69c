"""Final answers are found in whatever form they come: right ones count in each, wrong ones in none."""

from __future__ import annotations

from functools import cache

import pytest

from mixlens.evals.final_answer import NOTHING, final_answer, number_in
from mixlens.evals.math_scorer import equal, gsm8k, result_of

# {name: the end of an answer that comes to x}
DRESSES = {
    "the mark of GSM8K": "#### {x}",
    "the mark without a blank": "####{x}",
    "the mark and a full stop": "#### {x}.",
    "Minerva's sentence": "Final Answer: The final answer is ${x}$. I hope it is correct.",
    "Minerva's sentence, bare": "The final answer is {x}. I hope it is correct.",
    "box": "\\boxed{{{x}}}",
    "box in dollars": "Hence $\\boxed{{{x}}}$.",
    "box in display": "\\[\\boxed{{{x}}}\\]",
    "box in double dollars": "$$\n\\boxed{{{x}}}\n$$",
    "box in parentheses": "So \\(\\boxed{{{x}}}\\).",
    "box within a box": "$\\boxed{{\\boxed{{{x}}}}}$",
    "box with blanks": "$\\boxed{{ {x} }}$",
    "box of an equation": "$\\boxed{{n = {x}}}$",
    "box without braces": "$\\boxed {x}$",
    "box that is not closed": "$\\boxed{{{x}",
    "fbox": "$\\fbox{{{x}}}$",
    "framebox": "\\framebox{{{x}}}",
    "bold box": "**$\\boxed{{{x}}}$**",
    "box and words": "The answer is $\\boxed{{{x}}}$, as was to be shown.",
    "the answer is": "The answer is {x}.",
    "so the answer is": "So the answer is ${x}$.",
    "the answer is, with a colon": "The answer is: {x}",
    "the answer to that": "Therefore, the answer to the question is ${x}$.",
    "the answer and why": "The answer is {x}, because the rest was given away.",
    "the answer, bold": "The answer is **{x}**.",
    "answer with a colon": "Answer: {x}",
    "ANSWER": "ANSWER: ${x}$",
    "final answer with a colon": "Final answer: {x}",
    "bold title": "**Answer:** {x}",
    "bold title with its answer": "**Final Answer: {x}**",
    "title and next line": "**Answer**\n\n${x}$",
    "heading": "### Final Answer\n\n{x}",
    "heading of four": "#### Step 1: count\nDone.\n#### Answer\n{x}",
    "numbered heading of four": "#### 1. Count them\nDone.\n#### 2. Sum\nThe answer is {x}.",
    "item": "Answer:\n- {x}",
    "dash": "Answer - {x}",
    "tag": "<answer>{x}</answer>",
    "tag on lines": "<answer>\n${x}$\n</answer>",
    "A": "A: {x}",
    "correct answer": "The correct answer is therefore: ${x}$",
    "bold alone": "**{x}**",
    "dollars alone": "${x}$",
    "display alone": "\\[\nn = {x}\n\\]",
    "alone": "{x}",
    "equation": "n = {x}",
    "equation in words": "Thus we have $n = {x}$.",
    "result": "The result is ${x}$.",
    "code": "Answer: `{x}`",
    "quotes": 'Answer: "{x}"',
    "is the answer": "So {x} is the answer.",
    "mark and the equation": "#### n = {x}",
    "an element": "The answer is <b>{x}</b>.",
    "a quotation": "> **Answer:** {x}",
    "Windows": "The answer is {x}.\r\n",
}
NUMBERS = {
    "18": [
        "18",
        "18.",
        "18.00",
        "18 eggs",
        "$18",
        "18 dollars",
        "€18",
        "18%",
        "\\$18",
        "18\\text{ eggs}",
        "9 \\cdot 2 = 18",
        "₹18",
        "Rs. 18",
        "+18",
        "18\\text{ cm}^2",
        "18 m^2",
        "\\mathbf{18}",
        "**18**",
    ],
    "-7": ["-7", "−7", "-7.0"],
    "1200": [
        "1200",
        "1,200",
        "1{,}200",
        "1\\,200",
        "1\u202f200",
        "1’200",
        "1.2e3",
        "1.2 \\times 10^{3}",
        "$1,200.00",
        "1,200 (that is 30 x 40)",
    ],
    "0.5": ["0.5", ".5", "0.50", "\\frac{1}{2}", "1/2", "½"],
}
RESULTS = {
    "\\frac{3}{4}": ["\\frac{3}{4}", "\\dfrac{3}{4}", "\\frac34", "3/4", "0.75", "¾"],
    "\\sqrt{5}": ["\\sqrt{5}", "\\sqrt5", "√5"],
    "56": ["56", "56.0", "{56}"],
    "[2,\\infty)": ["[2,\\infty)", "[2, \\infty)", "\\left[2,\\infty\\right)", "[2, ∞)"],
    "(3,4)": ["(3,4)", "(3, 4)", "\\left(3,4\\right)"],
    "2000\\text{ grams}": ["2000\\text{ grams}", "2000", "2,000", "2{,}000"],
    "90^\\circ": ["90^\\circ", "90", "90^{\\circ}", "90°"],
    "2\\pi": ["2\\pi", "2π", "2 \\pi"],
    "x^2+1": ["x^2+1", "1+x^2", "x² + 1"],
}  # fmt: skip


same = cache(equal)  # sympy takes its time


def told(dress: str, said: str, before: str) -> str:
    return (
        f"First there are 12, then {before}, so 3 are left over. We put it together.\n{DRESSES[dress].format(x=said)}"
    )


@pytest.mark.parametrize("dress", DRESSES)
def test_numbers_are_found_in_every_form_and_wrong_ones_stay_wrong(dress):
    for gold, written in NUMBERS.items():
        for said in written:
            ((found,),) = gsm8k([[told(dress, said, "17")]], [{}])
            assert found == gold, said
            assert found.form not in ("none", "")
        ((wrong,),) = gsm8k([[told(dress, "17", gold)]], [{}])
        assert wrong == "17"


@pytest.mark.parametrize("dress", DRESSES)
def test_results_are_found_in_every_form_and_wrong_ones_stay_wrong(dress):
    for gold, written in RESULTS.items():
        for said in written:
            assert same(result_of(told(dress, said, "17")), gold), said
        for wrong in ("17", "\\frac{4}{3}", "(4,3)", "[2,3)"):
            assert not same(result_of(told(dress, wrong, f"${gold}$")), gold), (gold, wrong)


@pytest.mark.parametrize("text", ["", "\n \n", "I cannot say.", "It is large.", "**", "\\boxed{}", "The answer is"])
def test_an_answer_without_a_result_has_none(text):
    assert result_of(text) in ("", text.strip("*."))
    assert number_in(final_answer(text)) == ""
    assert final_answer("") == NOTHING


@pytest.mark.parametrize(
    "text",
    [
        "Therefore, she makes $18 every day.",
        "In total it is \\$18.00 now.",
        'Done: {"reasoning": "9 + 8 = 17", "answer": "18", "confidence": 0.9}',
        '```json\n{\n "final_answer": 18\n}\n```',
        '{"answer": "\\text{18}"}',
        "final_answer: 18",
        "She makes US$18 every day.",
        "<think>The answer is 99.\n#### 99 $\\boxed{99}$</think>The answer is 18.",
    ],
)
def test_a_number_is_found_in_a_sentence_of_money_in_json_and_behind_thoughts(text):
    assert number_in(final_answer(text)) == "18"


def test_the_last_answer_counts_and_of_an_unmarked_sentence_its_last_number():
    assert result_of("The answer is 5. No: the answer is 6.") == "6"
    assert result_of("\\boxed{5} was wrong, so it is $\\boxed{6}$") == "6"
    assert number_in(final_answer("In 2 days she sells 18.")) == "18"
    assert number_in(final_answer("She sells 9 * 2 = $18 in 2 days.")) == "18"


@pytest.mark.parametrize(
    "text", ["$" * 99_999, "answer " * 20_000, "\\boxed{" * 20_000, "**a" * 30_000, "####" * 30_000]
)
def test_hostile_text_takes_no_time(text):
    final_answer(text)
