"""Grading of collected answers with lm-eval's filters and metrics.

The graders of MATH need the main thread: they use a signal as timeout, and return False elsewhere. Off the main thread,
this module runs in a separate process: `python -m mixlens.evals.lm_eval_grading FOLDER`.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mixlens.errors import BadInput, MixlensError, RunError
from mixlens.evals.hub_datasets import commits_of
from mixlens.evals.protocols import Protocol, is_task_file, lm_eval_task_files, resolve, unknown_task
from mixlens.evals.readings import readings_of
from mixlens.evals.response_cache import Answers, Key


@dataclass(frozen=True)
class Job:
    """Plain values from which another process can rebuild the same tasks and requests.

    tasks, protocol  as passed to evaluate
    root     local folder of benchmark data, None for the Hub
    revisions  branch, tag or commit of data sets on the Hub, by repository; at_commits resolves them to commits
    limit    documents of every task, None for all
    seed     seed for tasks that draw few-shot examples at random
    tokenizer  folder of the tokenizer whose chat template is applied; None if no task needs one
    """

    tasks: tuple[str, ...]
    protocol: str | None = None
    root: str | None = None
    limit: int | None = None
    seed: int = 0
    tokenizer: str | None = None
    revisions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Job:
        """Create from values read back from JSON."""
        return cls(**{**values, "tasks": tuple(values["tasks"])})

    def at_commits(self, kept: Mapping[str, str]) -> Job:
        """Return the job with a fixed commit for every data set that its protocols read from the Hub.

        kept  commits of the run that this job resumes; requested revisions take precedence

        Raises BadInput for revisions of data sets that no protocol reads, and if the Hub does not have them.
        """
        protocols, _ = resolve(self.tasks, self.protocol)
        hubs = {str(p.about["hub"]) for p in protocols if p.about.get("hub")} if self.root is None else set()
        return replace(self, revisions=commits_of(hubs, self.revisions, kept))


@dataclass
class Loaded:
    """Tasks of a job as lm-eval objects, with the protocol of each; None for a task from lm-eval itself."""

    tasks: dict[str, Any] = field(default_factory=dict)
    protocols: dict[str, Protocol | None] = field(default_factory=dict)

    def chat(self, name: str) -> bool:
        protocol = self.protocols[name]
        return bool(protocol is not None and protocol.about.get("chat"))

    def add(self, tasks: Mapping[str, Any], protocol: Protocol | None) -> None:
        """Add tasks, each once. Raises BadInput for two different tasks of the same name."""
        for name, task in tasks.items():
            if name not in self.tasks:
                self.tasks[name], self.protocols[name] = task, protocol
            elif task.dump_config() != self.tasks[name].dump_config():
                raise BadInput(
                    f"Cannot evaluate two different tasks named {name!r}: their answers would be mixed up. Rename one "
                    "of them (task: in its file), or evaluate them separately.",
                    argument="tasks",
                    value=name,
                )

    def build(self, job: Job, chat_template: Any = None) -> list[Any]:
        """Return every request of every task, each repeated as often as the task requires."""
        requests = []
        for name, task in self.tasks.items():
            chat = self.chat(name)
            task.set_fewshot_seed(seed=job.seed)
            with redirect_stderr(io.StringIO()):
                task.build_all_requests(
                    limit=job.limit,
                    apply_chat_template=chat,
                    fewshot_as_multiturn=chat,
                    chat_template=chat_template if chat else None,
                )
            requests += [request for request in task.instances for _ in range(request.repeats or 1)]
        return requests


def load_tasks(job: Job) -> Loaded:
    """Load the tasks of a job with their data. Raises BadInput for unknown tasks and missing data."""
    from lm_eval.tasks import TaskManager

    protocols, others = resolve(job.tasks, job.protocol)
    loaded = Loaded()
    metadata: Any = {"root": job.root, "revisions": dict(job.revisions)}
    with redirect_stderr(io.StringIO()):
        manager = TaskManager(include_path=[], include_defaults=False, metadata=metadata)
        for protocol in protocols:
            loaded.add(_load(manager, protocol.name, protocol.task_configs()), protocol)
        if others:
            _add_lm_eval_tasks(loaded, others, metadata)
    for task in loaded.tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _add_lm_eval_tasks(loaded: Loaded, names: Sequence[str], metadata: Any) -> None:
    """Add task files, and lm-eval's tasks by name. All 14,000 files are parsed (20 s) only for groups and tags."""
    from lm_eval.tasks import TaskManager

    files = {name: name for name in names if is_task_file(name)}
    files |= lm_eval_task_files() if len(files) < len(names) else {}
    manager = TaskManager(include_path=[], include_defaults=any(name not in files for name in names), metadata=metadata)
    for name in names:
        if name not in files and name not in manager.all_tasks:
            raise unknown_task(name, [*files, *manager.all_tasks])
        tasks = _load(manager, name, [files.get(name, name)])
        if unsafe := [task for task, made in tasks.items() if getattr(made, "UNSAFE_CODE", False)]:
            raise BadInput(
                f"Cannot evaluate {', '.join(unsafe)}: lm-eval would run code written by the model outside any "
                "sandbox. Use humaneval_0shot or mbpp_3shot, which run it inside one.",
                argument="tasks",
                value=unsafe,
            )
        loaded.add(tasks, None)


def _load(manager: Any, name: str, configs: list[Any]) -> dict[str, Any]:
    try:
        return manager.load(configs)["tasks"]
    except MixlensError:
        raise
    except Exception as error:  # from lm-eval, the functions of a task, datasets or the Hub client
        said = (str(error).strip().splitlines() or [""])[0][:300].rstrip(".")
        raise BadInput(
            f"Cannot load {name} with lm-eval: {type(error).__name__}: {said}. Check the task file, and that its data "
            "is reachable and has the fields that the task uses.",
            argument="tasks",
            value=name,
        ) from error


def grade(job: Job, loaded: Loaded, answers: Mapping[Key, Any], chat_template: Any = None) -> dict[str, Any]:
    """Grade on a main thread; return {"samples": records as in Log, "results": results of lm-eval}."""
    if threading.current_thread() is threading.main_thread():
        return _grade(job, loaded, answers, chat_template)
    with tempfile.TemporaryDirectory(prefix="mixlens-grade-") as folder:
        _write(Path(folder, "job.json"), job.__dict__)
        _write(Path(folder, "answers.json"), [[*key, answer] for key, answer in answers.items()])
        done = subprocess.run(
            [sys.executable, "-m", "mixlens.evals.lm_eval_grading", folder], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RunError(
                "Cannot grade the answers: the process that runs MATH's graders, which need a main thread, ended "
                f"with {done.stderr.strip().splitlines()[-1:] or 'no message'}. Evaluate from a script, or retry.",
                argument="answers",
                value=done.returncode,
            )
        return json.loads(Path(folder, "graded.json").read_text("utf-8"))


def _grade(job: Job, loaded: Loaded, answers: Mapping[Key, Any], chat_template: Any) -> dict[str, Any]:
    from lm_eval import evaluator

    samples: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    for chat in (False, True):
        tasks = {name: task for name, task in loaded.tasks.items() if loaded.chat(name) is chat}
        if not tasks:
            continue
        for task in tasks.values():
            task.set_fewshot_seed(seed=job.seed)
        with redirect_stderr(io.StringIO()):
            found: Any = evaluator.evaluate(  # type: ignore[reportCallIssue]
                lm=_replay(answers, chat_template),
                task_dict={"tasks": tasks, "groups": {}},
                limit=job.limit,
                bootstrap_iters=1000,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                confirm_run_unsafe_code=True,  # load_tasks admits only tasks that run code in the sandbox
            )
        for name, task in tasks.items():
            samples += _records(name, task, found["samples"][name])
        found.pop("samples")
        for key, value in json.loads(json.dumps(found, default=_plain)).items():
            results[key] = {**results.get(key, {}), **value} if isinstance(value, dict) else value
    return {"samples": samples, "results": results}


def _replay(answers: Mapping[Key, Any], chat_template: Any) -> Any:
    from lm_eval.api.model import LM

    from mixlens.evals.model import repeats_of

    class Replay(LM):
        """Model object that replays the collected answers."""

        @property
        def tokenizer_name(self) -> str:
            return ""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return chat_template(chat_history, add_generation_prompt)

        def _given(self, requests: Sequence[Any]) -> list[Any]:
            repeats = repeats_of(requests)
            return [answers[key_of(r, repeat)] for r, repeat in zip(requests, repeats, strict=True)]

        loglikelihood = loglikelihood_rolling = generate_until = _given

    return Replay()


def key_of(request: Any, repeat: int) -> Key:
    return (str(request.task_name), int(request.doc_id), int(request.idx), repeat)


def _records(name: str, task: Any, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Merge lm-eval's samples, one per document and filter, into one record per document."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    records: dict[int, dict[str, Any]] = {}
    for sample in samples:
        record = records.setdefault(int(sample["doc_id"]), _record(name, task, sample))
        record["readings"] = readings_of(sample["filtered_resps"]) or record["readings"]
        for metric in sample["metrics"]:
            label = metric if len(filters) == 1 else f"{metric},{sample['filter']}"
            record["metrics"][label] = _number(sample[metric])
    return [records[doc] for doc in sorted(records)]


def _record(name: str, task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    arguments, answers = sample["arguments"], sample["resps"]
    record: dict[str, Any] = {
        "task": name,
        "sample_id": int(sample["doc_id"]),
        "doc_hash": sample["doc_hash"],
        "group": name.partition("::")[2] or None,
        "prompt": arguments[0][0],
        "target": str(sample["target"]),
        "response": None,
        "responses": None,
        "choices": None,
        "logprobs": None,
        "gold": None,
        "readings": None,
        "metrics": {},
    }
    if task.OUTPUT_TYPE == "generate_until":
        return record | {"response": answers[0][0], "responses": list(answers[0])}
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return record | {"logprobs": [float(answers[0][0])]}
    logprobs = [float(answer[0][0]) for answer in answers]
    choices = [str(argument[1]) for argument in arguments]
    record |= {"choices": choices, "logprobs": logprobs, "response": choices[int(np.argmax(logprobs))]}
    if task.OUTPUT_TYPE == "multiple_choice":
        gold = task.doc_to_target(sample["doc"])
        options = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
        gold = options.index(gold) if isinstance(gold, str) and gold in options else gold
        if isinstance(gold, int) and 0 <= gold < len(choices):
            record |= {"gold": gold, "target": choices[gold]}
    return record


def _number(value: Any) -> float | None:
    """Return a metric of one sample as a number; None for other values, such as lm-eval's pairs for F1."""
    if isinstance(value, bool | int | float | np.number) and np.isfinite(value):
        return float(value)
    return None


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, default=_plain), "utf-8")


def _main(folder: str) -> None:
    job = Job.of(json.loads(Path(folder, "job.json").read_text("utf-8")))
    answers = Answers()
    for task, doc, choice, repeat, answer in json.loads(Path(folder, "answers.json").read_text("utf-8")):
        answers.by_key[(task, doc, choice, repeat)] = tuple(answer) if isinstance(answer, list) else answer
    template = None
    if job.tokenizer is not None:
        from mixlens.evals.model import chat_template_of

        template = chat_template_of(job.tokenizer)
    _write(Path(folder, "graded.json"), _grade(job, load_tasks(job), answers.by_key, template))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _main(sys.argv[1])
