"""Evaluation of models on benchmarks with lm-eval, under fixed protocols and in a resumable run directory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mixlens.core.distributed import processes
from mixlens.core.files import SCARCE, shortages
from mixlens.core.run_dir import RunWriter, now, plan_at, versions
from mixlens.errors import BadInput
from mixlens.evals.backends import backend_of
from mixlens.evals.data import source_of
from mixlens.evals.lm_eval_grading import Job, Loaded, grade, key_of, load_tasks
from mixlens.evals.log import LM_EVAL_RESULTS, RESULTS, ROUTING, Log
from mixlens.evals.model import Batch, repeats_of
from mixlens.evals.preflight import check, check_template
from mixlens.evals.progress import Progress, reporting
from mixlens.evals.protocols import check_tasks
from mixlens.evals.replies import with_replies
from mixlens.evals.response_cache import ABOVE_ZERO, PARTIAL, Answers
from mixlens.evals.routing import SampleRecorder
from mixlens.evals.stock import STOCK_SHOTS_SEED, stock_remarks
from mixlens.evals.verify import verified_sums

_PACKAGES = ("mixlens", "lm_eval", "torch", "transformers", "datasets", "math-verify", "sympy")


@dataclass(frozen=True)
class EvalSettings:
    """Settings of an evaluation.

    Parameters
    ----------
    batch_size : int, optional
        Rows per forward pass, or concurrent requests to an endpoint.
    max_length : int, optional
        Maximum tokens of a prompt and its answer together. By default the context length of the model.
    max_new_tokens : int, optional
        Maximum tokens of an answer for tasks without a limit.
    seed : int, optional
        Seed of sampled answers.
    shots_seed : int, optional
        Seed of few-shot examples that a task draws; 1234 gives those of lm-eval.
    share_prefix : bool, optional
        Whether to read the shots shared by the questions of a task only once (local models).
    tokenizer : Any, optional
        A tokenizer, or the name or folder of one. By default the one beside the weights of the model.
    revisions : Mapping[str, str], optional
        Branch, tag or commit of data sets on the Hub, by repository: {"openai/gsm8k": "main"}.
    routing : bool, optional
        Whether to record the routing while the model answers, as Log.routing.
    loading : Mapping[str, Any], optional
        Options of ml.load for a model given by name, such as {"quantization": "nf4"}.
    cache : bool or str or os.PathLike, optional
        Store every answer of an endpoint on disk and reuse it for an identical request: True for the user's cache
        folder, a path for another folder, False for no cache. Log.remarks reports the number of reused answers.
    verify_prompts : bool, optional
        Whether to print the full first prompt of every task to stderr before the first request.
    progress : bool or Progress, optional
        True for a progress bar, False for none, or a function of (requests answered, total requests) that is called at
        the start and after every batch. An exception in it ends the evaluation; answers so far are kept in `out`.

    Examples
    --------
    >>> ml.evals.EvalSettings(batch_size=4).batch_size
    4
    """

    batch_size: int = 8
    max_length: int | None = None
    max_new_tokens: int = 1024
    seed: int = 0
    shots_seed: int = STOCK_SHOTS_SEED
    share_prefix: bool = True
    tokenizer: Any = None
    revisions: Mapping[str, str] = field(default_factory=dict)
    routing: bool = False
    loading: Mapping[str, Any] = field(default_factory=dict)
    cache: bool | str | os.PathLike[str] = True
    verify_prompts: bool = False
    progress: bool | Progress = True


SETTINGS = EvalSettings()


def evaluate(
    model: Any,
    tasks: str | Sequence[str],
    *,
    protocol: str | None = None,
    out: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    settings: EvalSettings = SETTINGS,
) -> Log:
    """Score a model on benchmarks, and record every sample and the protocol of each score.

    Before the first request, a preflight checks that prompts have one BOS, that encoding and decoding lose no text,
    that prompts and answers fit, and that graders pass gold answers.

    Parameters
    ----------
    model : Any
        A loaded transformers model (ml.load), an ml.Endpoint, an engine, or a model object of lm-eval, such as its
        VLLM. A model given by name as for ml.load ("demo", a name on the Hub, a folder) is loaded and evaluated in a
        separate process, which frees its memory afterwards, and ends if this process ends or is interrupted.
    tasks : str or Sequence[str]
        Benchmarks ("mmlu", "humaneval", "math"), protocols ("mmlu_5shot", or one subject of it,
        "mmlu_5shot::anatomy"), a suite ("mixtral-paper"), tasks of lm-eval by name, or task files in its format
        ("my_task.yaml").
    protocol : str, optional
        Protocol of benchmarks: a suite, or the name of a protocol.
    out : str or os.PathLike, optional
        Run directory. An interrupted evaluation there is resumed, with the same scores. By default everything is kept
        in memory.
    data : str or os.PathLike, optional
        Folder with the benchmarks in their original formats. By default they are loaded from the Hub.
    limit : int, optional
        Only the first documents of every task.
    settings : EvalSettings, optional
        Batch size, seeds, tokenizer and other settings.

    Returns
    -------
    Log

    Raises
    ------
    BadInput
        If a preflight check fails; if a task or protocol is unknown; if files in `data` are not those of the benchmark;
        or for a log-likelihood task on an endpoint without log-probabilities.
    RunError
        If `out` contains another run.

    Examples
    --------
    >>> log = ml.evaluate(model, ["demo"], limit=1, settings=ml.evals.EvalSettings(progress=False))
    >>> len(log.records) == len(log.tasks)
    True
    """
    with nullcontext() if out is None else shortages(Path(out), SCARCE):
        job = job_of(tasks, protocol=protocol, data=data, limit=limit, settings=settings)
        return _evaluate(model, job, out, settings)


def _evaluate(model: Any, job: Job, out: str | os.PathLike[str] | None, settings: EvalSettings) -> Log:
    if isinstance(model, str | os.PathLike):
        from mixlens.evals.subprocess import evaluate_apart

        return evaluate_apart(os.fspath(model), job, out, settings)
    if settings.loading:
        raise BadInput(
            f"Cannot apply loading={dict(settings.loading)} to a {type(model).__name__}: it is already loaded. Pass "
            "the name of the model instead, or leave out loading.",
            argument="loading",
            value=dict(settings.loading),
        )
    return run(lambda: model, job, out, settings)


def run(model_of: Callable[[], Any], job: Job, out: str | os.PathLike[str] | None, settings: EvalSettings) -> Log:
    """Evaluate in this process; `model_of` loads the model after tasks and data are loaded."""
    with ExitStack() as stack:
        job = job.at_commits({} if out is None else plan_at(out).get("data", {}))
        loaded = load_tasks(job)
        benchmarks = {str(p.about["hub"]) for p in loaded.protocols.values() if p is not None and p.about.get("hub")}
        sums = {} if job.root is None else verified_sums(Path(job.root), benchmarks)
        backend = backend_of(model_of(), settings)
        if chats := [name for name in loaded.tasks if loaded.chat(name)]:
            check_template(backend, chats)
            job = _with_tokenizer(job, backend, stack.enter_context(tempfile.TemporaryDirectory()))
        requests = loaded.build(job, backend.chat_template)
        if settings.verify_prompts:
            _print_first(requests)
        plan = _plan(job, loaded, requests, backend, settings)
        writer = None if out is None else stack.enter_context(RunWriter(out, "eval", plan))
        if writer is not None and writer.complete:
            return Log.open(writer.path)
        work = _work(backend, requests)
        findings = check(backend, job, loaded, work)
        answers = Answers(None if writer is None else writer.path / PARTIAL)
        recorder = SampleRecorder(backend, writer) if settings.routing else None
        _ask(backend, work, answers, recorder, settings.progress)
        graded = grade(job, loaded, answers.by_key, backend.chat_template)
        records = with_replies(_with_correct(graded["samples"], loaded), answers.about)
        meta = {
            "created": now(),
            "model": {**backend.describe(), **plan["model"]},
            "tasks": _about_tasks(backend, loaded, sums, records, graded["results"]),
            "settings": plan["settings"] | {"limit": job.limit, "data": job.root and Path(job.root).name},
            "input_sha256": plan["input_sha256"],
            "counts": {"samples": len(records), "requests": len(requests)},
            "versions": versions(*_PACKAGES),
            "preflight": findings,
            "beside_lm_eval": stock_remarks(job.tasks, loaded.tasks, loaded.protocols, job.seed),
            "answers": backend.cache.about() if hasattr(backend, "cache") else None,
        }
        names = [f"{kind}:{index}" for kind, (_, batches) in work.items() for index in range(len(batches))]
        routing = None if recorder is None else recorder.finish(names, records, meta["tasks"])
        if writer is None:
            log = Log(records, meta)
            log.routing = routing
            return log
        results = {**graded["results"], "config": {"model": meta["model"]["name"], **plan["settings"]}}
        files = {RESULTS: _lines(records), LM_EVAL_RESULTS: _text(results)}
        writer.finish(meta, files, runs=[] if routing is None else [writer.path / ROUTING])
        return Log.open(writer.path)


def job_of(
    tasks: str | Sequence[str],
    *,
    protocol: str | None,
    data: str | os.PathLike[str] | None,
    limit: int | None,
    settings: EvalSettings,
) -> Job:
    """Return the checked job. Raises BadInput for invalid arguments, and if several processes are running."""
    if not isinstance(settings, EvalSettings):
        raise BadInput(
            f"Cannot evaluate with settings of type {type(settings).__name__}: expected EvalSettings. Pass "
            "ml.evals.EvalSettings(batch_size=8), for example.",
            argument="settings",
            value=type(settings).__name__,
        )
    names = tuple(tasks) if isinstance(tasks, Iterable) and not isinstance(tasks, str) else (tasks,)
    named = bool(names) and all(isinstance(name, str) for name in names)
    counts = {"batch_size": settings.batch_size, "limit": 1 if limit is None else limit}
    wrong = {} if named else {"tasks": list(names)}
    wrong |= {name: n for name, n in counts.items() if not (isinstance(n, int) and n >= 1)}
    for argument, value in wrong.items():
        raise BadInput(
            f"Cannot evaluate {list(names)} with limit={limit} and batch_size={settings.batch_size}. Pass the name of "
            "at least one task, and whole numbers of at least 1.",
            argument=argument,
            value=value,
        )
    if data is not None and not Path(data).is_dir():
        raise BadInput(
            f"Cannot read benchmark data from {data}: no such folder. Pass the folder that contains mmlu, humaneval "
            "and so on, or leave out data= to load from the Hub.",
            argument="data",
            value=str(data),
        )
    if (world := processes().world) > 1:
        raise BadInput(
            f"Cannot evaluate in {world} processes: each would run the whole evaluation. Start it without accelerate "
            'launch; device_map="auto" spreads one model over all GPUs.',
            argument="processes",
            value=world,
        )
    if not isinstance(settings.revisions, Mapping):
        raise BadInput(
            f"Cannot read data sets at revisions={settings.revisions!r}: expected a revision for each data set. Pass "
            'them as in {"openai/gsm8k": "main"}.',
            argument="revisions",
            value=settings.revisions,
        )
    check_tasks(names, protocol)
    root = None if data is None else str(Path(data).resolve())
    return Job(names, protocol, root, limit, settings.shots_seed, revisions=dict(settings.revisions))


def _with_tokenizer(job: Job, backend: Any, folder: str) -> Job:
    """Return the job with a copy of the tokenizer, for a separate process that applies the chat template."""
    backend.save_tokenizer(folder)
    return Job(**{**job.__dict__, "tokenizer": folder})


def _print_first(requests: Sequence[Any]) -> None:
    """Print the first prompt of every task, between two marker lines."""
    for request in {request.task_name: request for request in reversed(requests)}.values():
        shown = "".join(
            c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in request.args[0]
        )
        print(f"--- first prompt of {request.task_name}\n{shown}\n--- end of the prompt", file=sys.stderr)


def _plan(job: Job, loaded: Loaded, requests: Sequence[Any], backend: Any, settings: EvalSettings) -> dict[str, Any]:
    """Return everything that determines the answers; a folder with another plan is refused."""
    digest = hashlib.sha256()
    for request in requests:
        asked = [request.task_name, request.doc_id, request.idx, request.args, request.doc]
        digest.update(json.dumps(asked, default=str).encode())
    for name in sorted(name for name, protocol in loaded.protocols.items() if protocol is None):
        config = loaded.tasks[name].dump_config()  # a task file may have changed how it grades
        config.pop("metadata", None)
        digest.update(json.dumps(config, default=str, sort_keys=True).encode())
    kept = ("batch_size", "max_length", "max_new_tokens", "seed", "shots_seed", "share_prefix", "routing")
    return {
        "model": backend.identity(),
        "tasks": {name: None if p is None else p.name for name, p in loaded.protocols.items()},
        "limit": job.limit,
        **({"data": dict(job.revisions)} if job.revisions else {}),
        "settings": {name: getattr(settings, name) for name in kept},
        "input_sha256": digest.hexdigest(),
        "lm_eval": versions("lm_eval").get("lm_eval"),
    }


def _work(backend: Any, requests: Sequence[Any]) -> dict[str, tuple[list[Any], list[Batch]]]:
    """Return the requests by kind, with their batches from the backend."""
    kinds: dict[str, list[Any]] = {}
    for request in requests:
        kinds.setdefault(request.request_type, []).append(request)
    return {kind: (members, backend.batches(kind, members)) for kind, members in kinds.items()}


def _ask(
    backend: Any,
    work: Mapping[str, tuple[Sequence[Any], Sequence[Batch]]],
    answers: Answers,
    recorder: SampleRecorder | None,
    progress: bool | Progress,
) -> None:
    """Answer every batch that is not yet answered."""
    total = sum(len(requests) for requests, _ in work.values())
    with reporting(progress) as report:
        report(len(answers.by_key), total)
        for kind, (requests, batches) in work.items():
            repeats = repeats_of(requests)
            for index, batch in enumerate(batches):
                name = f"{kind}:{index}"
                if name in answers.done:
                    continue
                ask = partial(backend.answer, kind, requests, batch, repeats)
                given = ask() if recorder is None else recorder.answer(name, ask)
                _check_finite(kind, [requests[n] for n in batch.requests], given)
                answers.add(name, [key_of(requests[n], repeats[n]) for n in batch.requests], given)
                report(len(answers.by_key), total)


def _check_finite(kind: str, requests: Sequence[Any], given: Sequence[Any]) -> None:
    """Raise BadInput for invalid log-probabilities of any backend."""
    if kind == "generate_until":
        return
    for request, answer in zip(requests, given, strict=True):
        value = answer[0] if isinstance(answer, tuple | list) else answer
        if not math.isfinite(float(value)) or value > ABOVE_ZERO:
            raise BadInput(
                f"Cannot score {request.task_name}: the log-probability of {str(request.args[-1])[:40]!r} for document "
                f"{request.doc_id} is {value}. Check the weights or the server; answers so far are kept in out=.",
                argument="logprobs",
                value=(request.task_name, request.doc_id),
            )


def _with_correct(records: list[dict[str, Any]], loaded: Loaded) -> list[dict[str, Any]]:
    for record in records:
        metrics = record["metrics"]
        record["correct"] = metrics.get(_primary(loaded, record["task"], list(metrics)))
    return records


def _primary(loaded: Loaded, task: str, metrics: Sequence[str]) -> str | None:
    protocol = loaded.protocols[task]
    if protocol is not None:
        return str(protocol.about["primary"])
    return metrics[0] if metrics else None


def _about_tasks(
    backend: Any,
    loaded: Loaded,
    sums: Mapping[str, Mapping[str, str]],
    records: Sequence[dict[str, Any]],
    results: dict[str, Any],
) -> dict[str, Any]:
    """Return for every task its benchmark, protocol, metrics and their aggregation, and the source of its data."""
    metrics: dict[str, list[str]] = {name: [] for name in loaded.tasks}
    for record in records:
        metrics[record["task"]] += [m for m in record["metrics"] if m not in metrics[record["task"]]]
    about = {}
    for name, task in loaded.tasks.items():
        protocol = loaded.protocols[name]
        words = {} if protocol is None else protocol.about
        own = results.get("results", {}).get(name, {})
        about[name] = {
            "benchmark": words.get("benchmark", name),
            "title": words.get("title", name),
            "protocol": protocol.name if protocol else f"lm-eval {name}",
            "version": str(task.VERSION),
            "shots": int(task.get_config("num_fewshot") or 0),
            "split": task.config.test_split or task.config.validation_split,
            "scorer": _scorer(task),
            "chat": loaded.chat(name) or not getattr(backend, "completes", True),
            "primary": _primary(loaded, name, metrics[name]),
            "metrics": {metric: _aggregation(task, metric, own) for metric in metrics[name]},
            "documents": len(task.eval_docs),
            "data": source_of(words.get("hub"), task, sums.get(str(words.get("hub")), {})),
        }
    return about


def _scorer(task: Any) -> str:
    """Return the name of the grading package: lm-eval, or that of functions named by the task file."""
    functions = [task.config.process_results, *(each["metric"] for each in task.config.metric_list or [])]
    own = {function.__module__.partition(".")[0] for function in functions if callable(function)} - {"lm_eval"}
    return ", ".join(sorted(own)) or "lm-evaluation-harness"


def _aggregation(task: Any, metric: str, own: dict[str, Any]) -> dict[str, Any]:
    base, _, chosen = metric.partition(",")
    function = task.aggregation().get(base)
    keys = [key for key in own if key.partition(",")[0] == base and (not chosen or key == metric)]
    errors = [key for key in own if key.partition(",")[0] == f"{base}_stderr" and key.endswith(chosen)]
    return {
        "aggregation": getattr(function, "__name__", "mean"),
        "higher_is_better": bool(task.higher_is_better().get(base, True)),
        "score": own[keys[0]] if keys else None,
        "stderr": own[errors[0]] if errors and isinstance(own[errors[0]], float) else None,
    }


def _text(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _lines(records: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
