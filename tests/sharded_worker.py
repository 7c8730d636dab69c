"""One of the processes that hold parts of a model: records, and writes what it saw and what was refused as JSON.

Run by test_sharded.py under torchrun: FOLDER MODE.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from tiny import Letters
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import mixlens as ml

SITES = ("resid_pre", "resid_post", "attn_out", "moe_in", "moe_out")
FORMS = {
    "tensor": {"tp_size": 2, "tp_plan": "auto"},
    "expert": {"tp_size": 2, "tp_plan": "auto", "enable_expert_parallel": True},
    "fully sharded": {"fsdp_size": 2},
    "expert and tensor": {"ep_size": 2, "tp_size": 2, "tp_plan": "auto"},
    "expert and fully sharded": {"ep_size": 2, "fsdp_size": 2},
    "tensor and fully sharded": {"tp_size": 2, "tp_plan": "auto", "fsdp_size": 2},
}
PIPELINE = {"pp_size": 2}
QUIET = ml.RecordSettings(progress=False, shard_tokens=8)
DOCUMENTS = ["some text", "and more of it", "x"]


def recorded(model) -> dict[str, list]:
    ids = torch.arange(3, 20)[None]
    signals = ["router_logits", "logprob", *(ml.Site(name, dtype="float32") for name in SITES)]
    with torch.no_grad(), ml.Recorder(model, signals=signals) as recorder:
        model(ids)
    trace = recorder.trace()
    found = {name: trace.read(name).tolist() for name in ("expert_id", "weight", "router_logits")}
    found["logprob"] = trace.read("logprob")[1:].tolist()
    return found | {name: trace.activations(name).values.tolist() for name in SITES}


def refused(act) -> str:
    try:
        act()
    except ml.ModelError as error:
        return f"{error.argument} {error.value}"
    return "done"


def edited(model) -> list:
    ids = torch.arange(3, 20)[None]
    with ml.edit(model, ml.edits.forbid(0, 1)), torch.no_grad(), ml.Recorder(model, signals=()) as recorder:
        model(ids)
    return recorder.trace().read("expert_id").tolist()


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", distributed_config=DistributedConfig(**FORMS.get(mode, PIPELINE))
    ).eval()
    if mode not in FORMS:
        found = [
            refused(lambda: ml.record(model, ["a"], tokenizer=Letters())),
            refused(lambda: ml.Recorder(model).__enter__()),
            refused(lambda: ml.edit(model, ml.edits.forbid(0, 1)).__enter__()),
            refused(lambda: ml.audit(model)),
        ]
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found), "utf-8")
        return
    run = {}
    if "fully sharded" not in mode:
        trace = ml.record(model, DOCUMENTS, tokenizer=Letters(), settings=QUIET, out=folder / "run")
        run = {name: trace.read(name).tolist() for name in ("token_id", "expert_id")}
    found = {
        "recorded": recorded(model),
        "edited": edited(model),
        "run": run,
        "bytes": ml.audit(model).bytes,
        "refused": {
            "expert_out": refused(lambda: ml.record(model, ["a"], tokenizer=Letters(), signals=["expert_out"])),
            "zero": refused(lambda: ml.edit(model, ml.edits.ablate(0, 1, how="zero")).__enter__()),
            "similarity": refused(lambda: ml.experiments.measure_similarity(model)),
            "importance": refused(lambda: ml.experiments.measure_importance(model, ["a b"], tokenizer=Letters())),
        },
    }
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
