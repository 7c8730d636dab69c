"""Metadata of generated answers: finish reasons, answering models, and missing answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mixlens.endpoints.endpoint import same_model
from mixlens.endpoints.protocols import calls_tool, is_cut, is_filtered, is_unknown
from mixlens.evals.response_cache import Key
from mixlens.evals.scoring import primary_rows, score_table

# Minimum number of answers to judge how all of them begin.
_SEVERAL = 5


def with_replies(records: list[dict[str, Any]], about: Mapping[Key, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add `finish`, `non_answer` and `replies` to the records; None if unknown."""
    of_sample: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for (task, document, _, _), facts in sorted(about.items()):
        of_sample.setdefault((task, document), []).append(facts)
    for record in records:
        replies = of_sample.get((record["task"], record["sample_id"]))
        record["finish"] = replies[0].get("finish") if replies else None
        record["non_answer"] = _non_answer(record, replies[0] if replies else {})
        record["replies"] = None if replies is None else [dict(facts) for facts in replies]
    return records


def _non_answer(record: Mapping[str, Any], reply: Mapping[str, Any]) -> str | None:
    given = record.get("responses")
    if not given or str(given[0]).strip():
        return None
    if is_filtered(reply.get("finish")):
        return "filtered"
    if reply.get("reasoning") or reply.get("reasoning_tokens"):
        return "reasoning only"
    return "length" if is_cut(reply.get("finish")) else "empty"


def reply_remarks(records: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> list[str]:
    """Return sentences on cut, filtered, missing and other irregular answers, which a score alone would hide."""
    generated = [record for record in records if record.get("responses")]
    n = len(generated)
    found = [*_without_non_answers(records, meta)]
    ends = [record.get("finish") for record in generated if not record.get("non_answer")]
    cut, filtered, called = (sum(map(told, ends)) for told in (is_cut, is_filtered, calls_tool))
    found += [f"Cut at the length limit, and graded as they are: {cut} of {n} answers."] if cut else []
    found += [f"Cut by a filter, and graded as they are: {filtered} of {n} answers."] if filtered else []
    found += [f"Called a tool, and graded as the text of that call: {called} of {n} answers."] if called else []
    unknown = Counter(end for end in ends if is_unknown(end))
    if unknown:
        reasons = ", ".join(map(str, unknown))
        found.append(
            f"Ended for a reason that may have cut them ({reasons}), and graded as they are: {unknown.total()} of {n} "
            "answers."
        )
    replies = [facts for record in records for facts in record.get("replies") or []]
    asked = str(meta["model"].get("name", "")) if meta["model"].get("backend") == "endpoint" else ""
    models = Counter(facts["model"] for facts in replies if facts.get("model"))
    others = ", ".join(f"{name} ({k})" for name, k in models.items() if asked and not same_model(name, asked))
    found += [f"Answered by another model than {asked}: {others}."] if others else []
    again = sum(facts.get("attempts", 1) > 1 for facts in replies)
    found += [f"Answered after a retry: {again} answers."] if again else []
    return found + _lost_blanks(generated, meta)


def _without_non_answers(records: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> list[str]:
    """Return a sentence with the scores without missing answers, if there are any."""
    empty = Counter(record["non_answer"] for record in records if record.get("non_answer"))
    if not empty:
        return []
    kept = [r for r in records if not r.get("non_answer")]
    frame = pd.DataFrame([{k: v for k, v in r.items() if k != "metrics"} | r["metrics"] for r in kept])
    rows = primary_rows(score_table(frame, meta["tasks"]), meta["tasks"]) if kept else []
    scores = "; ".join(
        f"{row['benchmark']} {row['score']:.4f} [{row['ci_low']:.4f}, {row['ci_high']:.4f}], n = {row['n']}"
        for row in rows
        if row["n"]
    )
    named = ", ".join(f"{reason} ({k})" for reason, k in empty.most_common())
    total = sum(empty.values())
    return [
        f"No answer at all, and graded as wrong: {total} of {len(records)} samples: {named}. Without them: "
        f"{scores or 'no sample is left'}."
    ]


def _lost_blanks(generated: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> list[str]:
    """Return sentences on tasks in which a server seems to drop or add the leading space of every answer."""
    if meta["model"].get("backend") != "endpoint":
        return []
    found = []
    for task in dict.fromkeys(record["task"] for record in generated):
        own = [r for r in generated if r["task"] == task and not r.get("non_answer")]
        blanks = [(_blanks(r["target"]), _blanks(str(r["responses"][0]))) for r in own]
        if len(own) < _SEVERAL:
            continue
        dropped = all(gold > given for gold, given in blanks)
        if dropped or all(0 < gold == given - 1 for gold, given in blanks):
            found.append(
                f"None of the {len(own)} answers to {task} begins with the blanks that its gold answers begin with: "
                f"the server seems to {'drop the first blank of' if dropped else 'put a blank before'} a completion, "
                "and the score is then too low."
            )
    return found


def _blanks(text: str) -> int:
    return len(text) - len(text.lstrip(" \t"))
