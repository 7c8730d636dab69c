"""What a server does to requests is looked at before it is asked; no answer that it gave is lost or asked for twice."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
from helpers.evaluations import Told, task_file
from helpers.refusals import refused
from hub_data import write_folder
from json_server import Reply, answering
from tiny import tiny_mixtral
from transformers import AutoTokenizer

import mixlens as ml
from mixlens.errors import BadInput, EndpointError
from mixlens.evals import runner
from mixlens.evals.model import cut
from mixlens.models.demo import demo_path

ROWS = [{"q": f"Count from {i}:", "a": f"{i + 1}"} for i in range(6)]
GREEDY = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
SAMPLED = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}


class Counting:
    """A server of completions that goes on counting, one token a word; its faults are planted by name."""

    def __init__(self, *faults: str) -> None:
        self.faults, self.calls = faults, 0

    def __call__(self, call) -> Reply:
        self.calls += 1
        body = call.body
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        number = int([word for word in f"0 {prompt}".replace(":", " ").split() if word.isdigit()][-1])
        seed = body.get("seed") if body.get("temperature") else 0
        if body.get("temperature") and "seed" in self.faults:
            seed = self.calls
        step = 1 + (seed or 0) % 7
        if "drift" in self.faults:
            step = self.calls
        limit = 40 if "max_tokens" in self.faults else body["max_tokens"]
        text = "".join(f" {number + step * k}" for k in range(1, limit + 1))
        stops = [] if "stop" in self.faults else body.get("stop", [])
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        if places:
            text = text[: max(min(places) - (4 if "eaten" in self.faults else 0), 0)]
        text = text.lstrip(" ") if "blank" in self.faults else " " + text if "added" in self.faults else text
        n_prompt = len(prompt.split()) + (0 if "template" in self.faults else 8) * ("messages" in body)
        n_prompt = min(n_prompt, 100) if "cut" in self.faults else n_prompt
        usage = {"prompt_tokens": n_prompt + 1, "completion_tokens": len(text.split())}
        choice = {"text": text} if "prompt" in body else {"message": {"content": text}}
        usage = {} if "uncounted" in self.faults else {"usage": usage}
        return Reply({"choices": [{**choice, "finish_reason": "length"}], **usage})


def findings(tmp_path, *faults: str, protocol: str = "openai-completions", rows=ROWS, **fields):
    path = task_file(
        tmp_path, "count", rows, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        **{"generation_kwargs": GREEDY, **fields},
    )  # fmt: skip
    with answering(Counting(*faults)) as (url, _):
        endpoint = ml.Endpoint(url, model="m", protocol=protocol)
        log = ml.evaluate(endpoint, path, settings=ml.evals.EvalSettings(progress=False, batch_size=2))
    return {one["question"]: one["holds"] for one in log.meta["preflight"]}, log


@pytest.mark.parametrize("protocol", ["openai-completions", "openai-chat"])
@pytest.mark.parametrize("kwargs", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_server_without_faults_is_told_as_it_should_be(tmp_path, protocol, kwargs):
    rows = [{"q": "word " * 600 + row["q"], "a": row["a"]} for row in ROWS]
    found, log = findings(tmp_path, protocol=protocol, rows=rows, generation_kwargs=kwargs)
    assert set(found.values()) == {True}
    assert {"max_tokens", "the same answer again", "stop strings", "long prompts"} <= set(found)
    assert ("seed" in found, "first blank" in found) == (kwargs is SAMPLED, protocol == "openai-completions")
    assert any("max_tokens" in remark for remark in log.remarks())


@pytest.mark.parametrize(
    ("fault", "question"),
    [
        ("max_tokens", "max_tokens"), ("drift", "the same answer again"), ("stop", "stop strings"),
        ("eaten", "stop strings"), ("blank", "first blank"), ("added", "first blank"), ("seed", "seed"),
    ],
)  # fmt: skip
def test_a_fault_of_a_server_is_told(tmp_path, fault, question):
    found, log = findings(tmp_path, fault, generation_kwargs=SAMPLED)
    assert found[question] is False
    assert any("not as it should be" in remark and question in remark for remark in log.remarks())


def test_a_limit_that_is_ignored_is_told_without_counts_too(tmp_path):
    assert findings(tmp_path, "max_tokens", "uncounted")[0]["max_tokens"] is False
    assert findings(tmp_path, "uncounted")[0]["max_tokens"] is True


def test_a_chat_server_without_a_template_is_told(tmp_path):
    rows = [{"q": row["q"] + " Hi 1", "a": row["a"]} for row in ROWS]
    found, _ = findings(tmp_path, "template", protocol="openai-chat", rows=rows)
    assert found["chat template"] in (False, None)


def test_a_server_that_cuts_prompts_is_refused(tmp_path):
    rows = [{"q": "word " * 600 + row["q"], "a": row["a"]} for row in ROWS]
    with refused(BadInput, "long prompts"):
        findings(tmp_path, "cut", rows=rows)


def test_a_server_that_answers_no_question_is_evaluated_all_the_same(tmp_path):
    path = task_file(
        tmp_path, "count", ROWS, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
        generation_kwargs=GREEDY,
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip

    def reply(call):
        known = call.body["max_tokens"] == GREEDY["max_gen_toks"]
        return Reply({"choices": [{"text": "1", "finish_reason": "stop"}]}) if known else Reply({"error": "no"}, 400)

    with answering(reply) as (url, _):
        endpoint = ml.Endpoint(url, model="m", protocol="openai-completions")
        log = ml.evaluate(endpoint, path, settings=ml.evals.EvalSettings(progress=False))
    assert len(log.records) == 6
    assert [one["holds"] for one in log.meta["preflight"]] == [None]


@pytest.fixture
def count(tmp_path):
    return task_file(
        tmp_path, "count", ROWS, output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
        generation_kwargs=GREEDY,
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip


def evaluated(url: str, task: str, **settings):
    endpoint = ml.Endpoint(url, model="m", protocol="openai-completions")
    quiet = {"progress": False, "batch_size": 1, **settings}
    return ml.evaluate(endpoint, task, settings=ml.evals.EvalSettings(**quiet))


def test_answers_of_an_evaluation_that_broke_off_are_not_asked_for_again(count):
    served = Counting()
    down = threading.Event()

    def reply(call):
        if call.body["max_tokens"] == 8 and call.body["prompt"].endswith(" 4:") and not down.is_set():
            return Reply({"error": "no"}, 400)
        return served(call)

    with answering(reply) as (url, calls):
        with pytest.raises(EndpointError):
            evaluated(url, count)
        before = len(calls)
        down.set()
        log = evaluated(url, count)
        asked_for = {call.body["prompt"] for call in calls[before:]}
        assert {"Count from 4:"} <= asked_for <= {"Count from 4:", "Count from 5:"}
        assert log.meta["answers"]["reused"] >= 4
        assert any(log.meta["answers"]["since"] in remark for remark in log.remarks())
        again = len(calls)
        assert evaluated(url, count).records == log.records
        assert len(calls) == again
        fresh = evaluated(url, count, cache=False)
        assert len(calls) > again + 6
        assert fresh.meta["answers"]["reused"] == 0


def test_what_is_asked_otherwise_or_of_another_server_is_asked(count):
    with answering(Counting()) as (url, calls):
        evaluated(url, count)
        n = len(calls)
        for other in (
            ml.Endpoint(url, model="other", protocol="openai-completions"),
            ml.Endpoint(url, model="m", protocol="openai-completions", extra={"top_k": 1}),
        ):
            ml.evaluate(other, count, settings=ml.evals.EvalSettings(progress=False))
            assert len(calls) == 2 * n
            n = len(calls) // 2 if other.extra else n
            del calls[n:]


def test_lines_that_were_cut_and_folders_that_cannot_be_written_lose_no_evaluation(count, tmp_path):
    place = tmp_path / "kept"
    with answering(Counting()) as (url, calls):
        whole = evaluated(url, count, cache=place)
        (file,) = place.iterdir()
        file.write_bytes(file.read_bytes()[:-9])
        n = len(calls)
        assert evaluated(url, count, cache=str(place)).records == whole.records
        assert len(calls) == n + 1
        assert evaluated(url, count, cache=place).records == whole.records
        assert len(calls) == n + 1
        (tmp_path / "file").write_text("")
        log = evaluated(url, count, cache=tmp_path / "file" / "below")
    assert log.records == whole.records
    assert any("not kept" in remark for remark in log.remarks())


def test_no_key_is_kept(count, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "sk-very-secret-key-1")
    with answering(Counting()) as (url, _):
        endpoint = ml.Endpoint(url, model="m", protocol="openai-completions", key_env="A_KEY")
        ml.evaluate(endpoint, count, settings=ml.evals.EvalSettings(progress=False, cache=tmp_path / "kept"))
    assert all("very-secret" not in path.read_text() for path in (tmp_path / "kept").iterdir())
    assert all(json.loads(line) for path in (tmp_path / "kept").iterdir() for line in path.read_text().splitlines())


class Object(Told):
    """A model object of lm-eval's with a tokenizer; it counts on, a blank and a digit a token."""

    tokenizer = SimpleNamespace(bos_token_id=None)
    max_length, max_gen_toks = 10_000, 16

    def __init__(self, *faults: str) -> None:
        super().__init__()
        self.faults = faults

    def tok_encode(self, text: str, **_) -> list[int]:
        return list(text.encode())

    def generate_until(self, requests, **_) -> list[str]:
        answers = []
        for request in requests:
            prompt, asked = request.args
            number = int([word for word in prompt.replace(":", " ").split() if word.isdigit()][-1])
            text = "".join(f" {number + k}" for k in range(1, asked.get("max_gen_toks", 16) + 1))
            text = cut(text, [] if "stop" in self.faults else asked["until"])
            answers.append(text.lstrip() if "blank" in self.faults else text)
        return answers


@pytest.mark.parametrize(("fault", "question"), [("stop", "stop strings"), ("blank", "first blank"), ("", "")])
def test_model_objects_of_lm_eval_are_asked_the_same(count, fault, question):
    log = ml.evaluate(Object(fault), count, settings=ml.evals.EvalSettings(progress=False))
    found = {one["question"]: one["holds"] for one in log.meta["preflight"]}
    assert {name for name, holds in found.items() if holds is not True} == ({question} - {""})
    assert len(found) == 4


@pytest.mark.parametrize("template", [None, "{{ bos_token }}", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_is_missing_or_broken_is_refused(template, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "verified_sums", lambda *_: {})
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    tokenizer.chat_template = template
    settings = ml.evals.EvalSettings(progress=False, tokenizer=tokenizer)
    with refused(BadInput, "chat_template"):
        ml.evaluate(tiny_mixtral(), "humaneval_0shot_instruct", data=write_folder(tmp_path), limit=1, settings=settings)
