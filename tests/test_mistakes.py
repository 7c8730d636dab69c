"""Mistakes of the first hour: each is answered by name, before any weights are loaded and with nothing left behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.traces import made

import mixlens as ml
from mixlens.cli import main as cli
from mixlens.core.run_dir import RunWriter, now

GOOD = '{"text": "one text of several words", "condition": "a"}\n{"text": "another text", "condition": "b"}\n'


def evaluated(folder):
    """Write an evaluation of weights in float32."""
    texts = dict.fromkeys(("prompt", "target", "response"), "x")
    rest = dict.fromkeys(("group", "responses", "choices", "logprobs", "gold"))
    found = {"task": "demo_0shot", "sample_id": 0, "metrics": {"acc": 1.0}, "correct": 1.0, "doc_hash": "d"}
    metrics = {"acc": {"aggregation": "mean", "higher_is_better": True}}
    about = {"benchmark": "demo", "protocol": "demo_0shot", "version": "1", "primary": "acc", "chat": False}
    model = {"name": "demo", "audit": {"label": "float32", "bytes": 4}, "weights_checksum": "1a"}
    meta = {"created": now(), "model": model, "tasks": {"demo_0shot": about | {"metrics": metrics}}, "counts": {}}
    with RunWriter(folder, "eval", {}) as writer:
        writer.finish(meta, {"results.jsonl": json.dumps(found | texts | rest).encode()})


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder as a newcomer has one: some of it right, much of it wrong."""
    folder = tmp_path_factory.mktemp("desk")
    texts = {
        "good.jsonl": GOOD, "bad.jsonl": GOOD + "oops\n", "table.csv": "body,label\na text,1\n", "empty.txt": "",
        "odd.csv": "text,n\na,1\nb,2,3\n", "mixed.jsonl": GOOD + '{"text": "no condition"}\n', "file": "x",
        "twice.jsonl": '{"text": "a", "id": 1}\n{"text": "b", "id": 1}\n', "number.jsonl": '{"text": 7}\n',
        "chat.jsonl": '{"messages": [{"content": "no role"}]}\n', "void.jsonl": "\n", "full/mine.txt": "mine",
        "zip.xlsx": "PK\3\4", "list.yaml": "- a\n",
        "half.yaml": "a: [\n", "typo.yaml": "maxlength: 3\n", "many.yaml": "max-length: many\n",
        "weights/pytorch_model.bin": "x", "other/config.json": '{"model_type": "bert"}', "half/config.json": "{",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "paper.pdf").write_bytes(b"%PDF-1.7")
    (folder / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "none").mkdir()
    made([3, 4], domains=["x", "y"]).trace.save(folder / "run")
    evaluated(folder / "full-precision")
    return folder


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch, desk):
    def loaded(*_, **__):
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    monkeypatch.setattr("mixlens.models.load._load_quantized", loaded)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    monkeypatch.chdir(desk)


RECORD, OUT = "record demo", "--out new"
# The command, the kind of error, and what it names.
COMMANDS = [
    # documents
    (f"{RECORD} missing.jsonl {OUT}", "BadInput", "source"),
    (f"{RECORD} mispelt {OUT}", "BadInput", "source"),
    (f"{RECORD} none {OUT}", "BadInput", "source"),
    (f"{RECORD} bad.jsonl {OUT}", "BadInput", "source"),
    (f"{RECORD} void.jsonl {OUT}", "BadInput", "source"),
    (f"{RECORD} paper.pdf {OUT}", "BadInput", "source"),
    (f"{RECORD} latin.txt {OUT}", "BadInput", "source"),
    (f"{RECORD} odd.csv {OUT}", "BadInput", "source"),
    (f"{RECORD} owner/unknown {OUT}", "BadInput", "source"),
    (f"{RECORD} table.csv {OUT}", "BadInput", "text"),
    (f"{RECORD} good.jsonl {OUT} --text body", "BadInput", "text"),
    (f"{RECORD} good.jsonl {OUT} --columns topic", "BadInput", "columns"),
    (f"{RECORD} good.jsonl {OUT} --limit 0", "BadInput", "--limit"),
    (f"{RECORD} good.jsonl {OUT} --split train", "BadInput", "split"),
    (f"{RECORD} zip.xlsx {OUT}", "BadInput", "source"),
    (f"{RECORD} table.csv {OUT} --text Body", "BadInput", "text"),
    (f"record good.jsonl demo {OUT}", "BadInput", "source"),
    (f"{RECORD} mixed.jsonl {OUT}", "BadInput", "condition"),
    (f"{RECORD} twice.jsonl {OUT}", "BadInput", "id"),
    (f"{RECORD} number.jsonl {OUT}", "BadInput", "text"),
    (f"{RECORD} empty.txt {OUT}", "BadInput", "text"),
    (f"{RECORD} chat.jsonl {OUT}", "BadInput", "text"),
    (f"importance demo good.jsonl {OUT} --by topic", "BadInput", "--by"),
    (f"topk demo good.jsonl {OUT} --by domain", "BadInput", "--by"),
    # where it goes
    (f"{RECORD} good.jsonl", "BadInput", "--out"),
    (f"{RECORD} good.jsonl --out full", "RunError", "out"),
    (f"{RECORD} good.jsonl --out file", "RunError", "out"),
    (f"{RECORD} good.jsonl --out file/inside", "RunError", "out"),
    ("importance demo good.jsonl --out run", "RunError", "out"),
    ("eval demo demo --out run", "RunError", "out"),
    ("bench demo --out full", "RunError", "out"),
    (f"topk demo good.jsonl {OUT} --csv no/such/t.csv", "BadInput", "--csv"),
    ("stats run expert_share --csv none", "BadInput", "--csv"),
    ("demo --out file", "RunError", "out"),
    ("report run --out none", "BadInput", "path"),
    ("report run --out no/such.html", "BadInput", "path"),
    # options
    (f"{RECORD} good.jsonl {OUT} --signals router_logit", "BadInput", "--signals"),
    (f"{RECORD} good.jsonl {OUT} --max-length -5", "BadInput", "--max-length"),
    (f"{RECORD} good.jsonl {OUT} --max-length 1k", "BadInput", "--max-length"),
    (f"{RECORD} good.jsonl {OUT} --max-length 1.5", "BadInput", "--max-length"),
    (f"{RECORD} good.jsonl {OUT} --overlong cut", "BadInput", "--overlong"),
    (f"{RECORD} good.jsonl {OUT} --like run", "BadInput", "--like"),
    (f"{RECORD} good.jsonl {OUT} --dry-run --like none", "RunError", "path"),
    (f"{RECORD} good.jsonl {OUT} --config none.yaml", "BadInput", "--config"),
    (f"{RECORD} good.jsonl {OUT} --config list.yaml", "BadInput", "--config"),
    (f"{RECORD} good.jsonl {OUT} --config half.yaml", "BadInput", "--config"),
    (f"{RECORD} good.jsonl {OUT} --config typo.yaml", "BadInput", "[maxlength]"),
    (f"{RECORD} good.jsonl {OUT} --config many.yaml", "BadInput", "--max-length"),
    (f"{RECORD} good.jsonl {OUT} --quantization int4", "BadInput", "--quantization"),
    (f"{RECORD} good.jsonl {OUT} --dtype fp16", "BadInput", "--dtype"),
    (f"{RECORD} good.jsonl {OUT} --batch 8", "BadInput", "--batch"),
    (f"{RECORD} good.jsonl {OUT} --device-map mars", "BadInput", "device_map"),
    ("recrod demo good.jsonl --out new", "BadInput", "recrod"),
    (f"impact demo good.jsonl {OUT}", "BadInput", "--quantization"),
    (f"topk demo good.jsonl {OUT} --ks 9", "BadInput", "ks"),
    (f"topk demo good.jsonl {OUT} --ks 0", "BadInput", "ks"),
    (f"importance demo good.jsonl {OUT} --layers 99", "BadInput", "layers"),
    (f"importance demo good.jsonl {OUT} --how delete", "BadInput", "--how"),
    (f"pareto demo good.jsonl {OUT} --schemes nf4,nf4", "BadInput", "schemes"),
    (f"pareto demo good.jsonl {OUT} --schemes nf4 --scores nf4=full-precision", "BadInput", "--scores"),
    (f"pareto demo good.jsonl {OUT} --schemes nf4,int4", "BadInput", "--schemes"),
    (f"pareto demo good.jsonl {OUT} --schemes nf4 --scores run", "BadInput", "--scores"),
    (f"pareto demo good.jsonl {OUT} --schemes nf4 --scores nf4=run", "RunError", "kind"),
    # models
    (f"record owner/unknown good.jsonl {OUT}", "ModelError", "model"),
    (f"record ./nowhere good.jsonl {OUT}", "ModelError", "model"),
    (f"record weights good.jsonl {OUT}", "ModelError", "config.json"),
    (f"record other good.jsonl {OUT}", "ModelError", "model_type"),
    (f"record half good.jsonl {OUT}", "ModelError", "config.json"),
    # runs
    ("stats run load_ballance", "BadInput", "NAME"),
    ("stats run expert_share --by topic", "BadInput", "by"),
    ("stats run expert_share --layers 99", "BadInput", "layers"),
    ("stats run expert_share --layers one", "BadInput", "--layers"),
    ("stats nowhere expert_share", "RunError", "path"),
    ("stats run expert_share --cluster author", "BadInput", "cluster"),
    ("stats good.jsonl expert_share", "RunError", "path"),
    ("contrast run expert_share --by topic --a x", "BadInput", "by"),
    ("contrast run expert_share --by domain --a z", "BadInput", "by"),
    ("contrast run expert_share --by domain --a x --out no/such.html", "BadInput", "path"),
    ("report run --by condition --out r.html", "BadInput", "by"),
    ("again run", "RunError", "run"),
    ("decide nowhere", "RunError", "path"),
    ("decide run", "BadInput", "runs"),
    ("decide full-precision --max mmlu=3", "BadInput", "at_most"),
    ("decide full-precision --max demo", "BadInput", "--max"),
    ("decide full-precision --baseline bf16", "BadInput", "baseline"),
    ("decide full-precision --usd-per-hour 2", "BadInput", "usd_per_hour"),
    ("report nowhere", "RunError", "path"),
    ("compare run nowhere", "RunError", "path"),
    ("info full", "RunError", "path"),
    # evaluations and endpoints
    ("eval demo", "BadInput", "model"),
    ("eval demo mmlu --protocol nope", "BadInput", "protocol"),
    ("eval demo demo --data nowhere", "BadInput", "data"),
    ("eval demo demo --limit 0", "BadInput", "--limit"),
    ("eval demo demo --key-env NO_KEY", "BadInput", "--key-env"),
    ("eval demo demo --vllm-args a=1", "BadInput", "--vllm-args"),
    ("eval demo demo --data-revision main", "BadInput", "--data-revision"),
    ("eval m demo --url localhost:8000", "BadInput", "url"),
    ("bench demo --output-tokens 100000", "BadInput", "prompt_tokens"),
    ("bench demo --experts fast", "BadInput", "experts"),
    ("bench demo --slo ttft=-1", "BadInput", "--slo"),
    ("bench demo --slo latency=1", "BadInput", "--slo"),
    ("bench demo --concurrency 0", "BadInput", "batch"),
    ("bench ftp://host/v1 --model m", "BadInput", "url"),
    ("bench http://127.0.0.1:9/v1 --model m --compiled", "BadInput", "--compiled"),
    ("bench http://127.0.0.1:9/v1 --model m --prompts empty.txt", "BadInput", "prompts"),
    ("probe http://127.0.0.1:9/v1 --model m --parameters temprature", "BadInput", "parameters"),
    ("providers full", "BadInput", "runs"),
    ("cost --input-tokens -5 --output-tokens 3", "BadInput", "cost"),
    ("bench openrouter", "BadInput", "key_env"),
    ("bench http://127.0.0.1:9/v1", "BadInput", "--model"),
    ("bench demo --concurrency 1;4", "BadInput", "--concurrency"),
    ("bench demo --max-dollars 5", "BadInput", "--max-dollars"),
    ("cost --input-tokens 1000", "BadInput", "--output-tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "kind", "argument"), COMMANDS, ids=[command for command, *_ in COMMANDS])
def test_the_command_line_answers_before_a_model_is_loaded(command, kind, argument, capsys, desk):
    before = sorted(desk.rglob("*"))
    status = cli.main([*command.split(), "--json"])
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert (answer["error"], answer["argument"]) == (kind, argument), answer["message"]
    assert status == (cli.EXIT_USAGE if kind == "BadInput" else cli.EXIT_FAILED)
    assert "Traceback" not in printed.err
    assert sorted(desk.rglob("*")) == before


TRACE = made([3, 4, 5], domains=["x", "y", "x"]).trace
SHARE = ml.stats.expert_share
CALLS = {
    "a path for documents": (lambda: ml.record(None, "good.jsonl"), ml.MixlensError, None),
    "a value that nobody has": (lambda: TRACE.select(where={"domain": "z"}), ml.BadInput, "where"),
    "an unknown phase": (lambda: TRACE.select(phase="answer"), ml.BadInput, "phase"),
    "a statistic of a path": (lambda: SHARE("run"), ml.BadInput, "trace"),
    "a figure of a trace": (lambda: ml.show.expert_share(TRACE), ml.BadInput, "data"),
    "a percentage for a level": (lambda: ml.stats.Bootstrap(level=95), ml.BadInput, "level"),
    "a contrast by nothing": (lambda: ml.stats.contrast(TRACE, SHARE), ml.BadInput, "by"),
    "a contrast of no group": (lambda: ml.stats.contrast(TRACE, SHARE, by="domain", a="z"), ml.BadInput, "by"),
    "expert ids from one": (lambda: ml.Trace.from_arrays(np.full((2, 1, 2), 8), n_experts=8), ml.BadInput, "n_experts"),
    "a run in an open door": (lambda: ml.open(None), ml.BadInput, "path"),
    "two kinds compared": (lambda: ml.compare(TRACE, None), ml.BadInput, "kind"),
    "a trace saved over files": (lambda: TRACE.save("full"), ml.RunError, "out"),
}


@pytest.mark.parametrize("call", CALLS)
def test_python_answers_by_name(call):
    made_mistake, kind, argument = CALLS[call]
    if argument is None:
        with pytest.raises(kind):
            made_mistake()
        return
    with refused(kind, argument):
        made_mistake()


def test_there_are_more_than_a_hundred():
    assert len(COMMANDS) + len(CALLS) >= 100
