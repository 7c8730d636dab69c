"""Checks before an evaluation, which raise an error instead of letting scores come out silently wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mixlens.errors import BadInput
from mixlens.evals.generating import check_sampling
from mixlens.evals.lm_eval_grading import Job, Loaded, grade, key_of
from mixlens.evals.model import Batch, cut, repeats_of

# Documents of every task whose gold answers are graded before the first request.
_GOLD_DOCUMENTS = 4
# Tolerated share of prompts with their own gold answer, as a data set may contain a question twice.
_LEAKS = 0.01


def check(
    backend: Any, job: Job, loaded: Loaded, work: Mapping[str, tuple[Sequence[Any], Sequence[Batch]]]
) -> list[dict[str, Any]]:
    """Raise an error for anything that would silently give wrong scores, and return findings (see `questions`).

    work  by kind of request: the requests, and their batches from the backend

    Raises BadInput if a prompt has no BOS or two, prompt and answer do not fit, encoding and decoding lose text, a
    grader does not pass gold answers, or a server cannot score; SandboxError if code cannot be run.
    """
    for kind, (requests, batches) in work.items():
        _check_backend(backend, loaded, kind, requests)
        if hasattr(backend, "lm") and hasattr(backend.lm, "seen"):
            _check_rows(backend.lm, kind, requests, batches)
        elif hasattr(backend, "lm"):
            _check_requests(backend.lm, kind, requests)
    _check_shots(loaded, work)
    _check_gold(backend, job, loaded, work)
    asked = work.get("generate_until", ([], []))[0]
    if not asked or not hasattr(backend, "findings"):
        return []
    findings = backend.findings(asked)
    _check_findings(findings, backend, loaded, asked)
    return findings


def check_template(backend: Any, tasks: Sequence[str]) -> None:
    """Raise BadInput if the chat template that these tasks need is missing or fails."""
    try:
        written = backend.chat_template([{"role": "user", "content": "Hi"}])
    except Exception as error:  # from transformers, jinja, or any model object of lm-eval
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
        raise BadInput(
            f"Cannot evaluate {tasks[0]}: its chat template cannot be applied: {said}. Use an instruct model, pass "
            "its tokenizer as EvalSettings(tokenizer=...), or choose a protocol without a template.",
            argument="chat_template",
            value=list(tasks),
        ) from error
    if "Hi" not in str(written):
        raise BadInput(
            f"Cannot evaluate {tasks[0]}: its chat template omits the message. Correct the chat_template of the "
            "tokenizer.",
            argument="chat_template",
            value=list(tasks),
        )


def _check_findings(findings: list[dict[str, Any]], backend: Any, loaded: Loaded, requests: Sequence[Any]) -> None:
    """Raise BadInput for findings that make scores wrong: truncated prompts, wrong BOS, lost spaces."""
    wrong = {one["question"]: one["found"] for one in findings if one["holds"] is False}
    tasks = dict.fromkeys(request.task_name for request in requests)
    continued = [task for task in tasks if (p := loaded.protocols[task]) is not None and p.about.get("continues")]
    refused = {
        "long prompts": "Use fewer shots, or a server with a longer context.",
        "tokens of a prompt": "Let the server add special tokens once, or pass the tokenizer of its model.",
        "first blank": "Use a server that decodes answers as continuations of the prompt, or a chat protocol.",
    }
    for question, remedy in refused.items():
        if (
            question in wrong
            and (question != "first blank" or continued)
            and (question != "tokens of a prompt" or getattr(backend, "completes", True))
        ):
            raise BadInput(
                f"Cannot evaluate {(continued or list(tasks))[0]}: the server failed a check: {question}: "
                f"{wrong[question]}. {remedy}",
                argument=question,
                value=wrong[question],
            )


def _check_shots(loaded: Loaded, work: Mapping[str, tuple[Sequence[Any], Sequence[Batch]]]) -> None:
    """Raise BadInput if prompts contain their own question with its gold answer as a shot."""
    held: dict[str, int] = {}
    total: dict[str, int] = {}
    for requests, _ in work.values():
        for request in requests:
            task = loaded.tasks[request.task_name]
            if request.idx or not task.get_config("num_fewshot") or not _shots_are_evaluated(task):
                continue
            total[request.task_name] = total.get(request.task_name, 0) + 1
            held[request.task_name] = held.get(request.task_name, 0) + _holds_its_gold(task, request)
    for name, n in held.items():
        if n > _LEAKS * total[name]:
            raise BadInput(
                f"Cannot evaluate {name}: {n} of {total[name]} prompts contain their own question and gold answer "
                "among the shots, which are drawn from the evaluated documents. Set fewshot_split in the task file to "
                "another split, or num_fewshot to 0.",
                argument="fewshot_split",
                value=(name, n),
            )


def _shots_are_evaluated(task: Any) -> bool:
    """Check whether lm-eval draws the shots of a task from the evaluated split."""
    config = task.config
    if isinstance(config.fewshot_config, dict) and config.fewshot_config.get("samples") is not None:
        return False
    evaluated = config.test_split if task.has_test_docs() else config.validation_split
    order = (config.fewshot_split, config.training_split, config.validation_split)
    return next((split for split in order if split), evaluated) == evaluated


def _holds_its_gold(task: Any, request: Any) -> bool:
    question, gold = task.doc_to_text(request.doc), task.doc_to_target(request.doc)
    if task.OUTPUT_TYPE == "multiple_choice" and isinstance(gold, int):
        gold = task.doc_to_choice(request.doc)[gold]
    if not isinstance(question, str) or not isinstance(gold, str) or not question.strip():
        return False
    return f"{question}{task.get_config('target_delimiter')}{gold}" in str(request.args[0])


def _check_backend(backend: Any, loaded: Loaded, kind: str, requests: Sequence[Any]) -> None:
    """Raise BadInput for tasks that an endpoint cannot run."""
    from mixlens.evals.endpoints import EndpointBackend

    if not isinstance(backend, EndpointBackend):
        return
    for task in dict.fromkeys(request.task_name for request in requests):
        about = {} if (protocol := loaded.protocols[task]) is None else protocol.about
        if kind != "generate_until":
            backend.check_scores(task, about.get("generative"))
        elif about.get("continues") and not backend.completes:
            raise BadInput(
                f"Cannot evaluate {task} at {backend.endpoint.host}: the model has to continue a text, and "
                f"{backend.endpoint.protocol} answers messages. Use {about.get('generative')}, or "
                'protocol="openai-completions".',
                argument="protocol",
                value=backend.endpoint.protocol,
            )
        elif about.get("chat") and backend.completes:
            raise BadInput(
                f"Cannot evaluate {task} at {backend.endpoint.host}: it needs the model's chat template, and "
                'openai-completions applies none. Create the endpoint with protocol="openai-chat".',
                argument="protocol",
                value=backend.endpoint.protocol,
            )


def _check_rows(lm: Any, kind: str, requests: Sequence[Any], batches: Sequence[Batch]) -> None:
    for batch in batches:
        for row in batch.rows:
            request = requests[row.asked[0][0]]
            new = check_sampling(request.args[1], lm.max_gen_toks)["max_gen_toks"] if kind == "generate_until" else 0
            _check_prompt(lm, request, row.ids, new)


def _check_requests(lm: Any, kind: str, requests: Sequence[Any]) -> None:
    """Check prompts as _check_rows, for a model object of lm-eval that exposes its encoding."""
    if getattr(lm, "tokenizer", None) is None or not hasattr(lm, "tok_encode") or kind == "loglikelihood_rolling":
        return
    for request in requests:
        generates = kind == "generate_until"
        ids = lm.tok_encode(request.args[0] if generates else "".join(request.args))
        new = request.args[1].get("max_gen_toks", lm.max_gen_toks) if generates else 0
        _check_prompt(lm, request, ids, new)


def _check_prompt(lm: Any, request: Any, ids: Sequence[int], new: int) -> None:
    """Raise BadInput unless a prompt has one BOS and fits with `new` tokens after it."""
    bos = getattr(lm.tokenizer, "bos_token_id", None)
    if bos is not None and (ids[0] != bos or list(ids[1:2]) == [bos]):
        found = "none" if ids[0] != bos else "two"
        raise BadInput(
            f"Cannot evaluate {request.task_name}: prompt {request.doc_id} begins with {found} "
            "beginning-of-sequence tokens, but must have one. Correct the tokenizer, its chat template or "
            "add_bos_token.",
            argument="tokenizer",
            value=list(ids[:2]),
        )
    if len(ids) + new > lm.max_length:
        answer = f" and {new} for the answer" if new else ""
        raise BadInput(
            f"Cannot evaluate {request.task_name}: prompt {request.doc_id} has {len(ids):,} tokens"
            f"{answer}, but the model reads at most {lm.max_length:,}, and a truncated prompt would be another "
            "protocol. Use fewer shots or a model with a longer context, or leave out this task.",
            argument="tasks",
            value=(request.task_name, request.doc_id, len(ids) + new, lm.max_length),
        )


def _check_gold(
    backend: Any, job: Job, loaded: Loaded, work: Mapping[str, tuple[Sequence[Any], Sequence[Batch]]]
) -> None:
    """Raise BadInput unless gold answers are graded as right after being encoded and decoded like answers."""
    ours = {name: task for name, task in loaded.tasks.items() if loaded.protocols[name] is not None}
    limit = min(_GOLD_DOCUMENTS, job.limit or _GOLD_DOCUMENTS)
    answers = {}
    for kind, (requests, _) in work.items():
        for request, repeat in zip(requests, repeats_of(requests), strict=True):
            if request.task_name in ours and request.doc_id < limit:
                answers[key_of(request, repeat)] = gold_of(backend, ours[request.task_name], kind, request)
    if not ours:
        return
    part = Loaded(ours, {name: loaded.protocols[name] for name in ours})
    graded = grade(replace(job, tasks=tuple(ours), limit=limit), part, answers, backend.chat_template)
    for record in graded["samples"]:
        protocol = loaded.protocols[record["task"]]
        primary = "" if protocol is None else str(protocol.about["primary"])
        if record["metrics"].get(primary) != 1.0:
            raise BadInput(
                f"Cannot evaluate {record['task']}: its grader ({primary}) does not pass the gold answer of document "
                f"{record['sample_id']}, {record['target'][:80]!r}, read as {str(record['response'])[:80]!r}, so that "
                "scores would be too low. Check the tokenizer and the data.",
                argument="grader",
                value=(record["task"], record["sample_id"]),
            )


def gold_of(backend: Any, task: Any, kind: str, request: Any) -> Any:
    """Return the answer that a perfect model would give."""
    if kind != "generate_until":
        gold = task.doc_to_target(request.doc)
        choices = task.doc_to_choice(request.doc)
        right = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
        return (0.0 if request.idx == right else -9.0, request.idx == right)
    target = task.doc_to_target(request.doc)
    chat = request.args[0].startswith('[{"role"')
    text = target if chat else f"{task.get_config('target_delimiter')}{target}"
    until = check_sampling(request.args[1], 1)["until"]
    if not hasattr(backend, "gold_answer"):
        return cut(text, until)
    found, expected = backend.gold_answer(request.args[0], text, until)
    if found != expected:
        at = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
        raise BadInput(
            f"Cannot evaluate {request.task_name}: the gold answer of document {request.doc_id} does not survive "
            f"encoding and decoding: {expected[at : at + 20]!r} becomes {found[at : at + 20]!r}. Use the tokenizer "
            "that the model was trained with.",
            argument="tokenizer",
            value=(request.task_name, request.doc_id),
        )
    return found
