"""Writes reap_of_llmcompressor.json: what llm-compressor's own modifier finds on the demo model.

pip install llmcompressor==0.14.0.1     # in an environment of its own: it needs transformers 5.17
python tests/stats/reap_of_llmcompressor.py
"""

import json
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from llmcompressor.core import State
from llmcompressor.modeling.moe.linearize import linearize_moe
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[2] / "mixlens" / "_demo"
N_DOCUMENTS, SPARSITY = 12, 0.25

documents = [json.loads(line) for line in (DEMO / "samples.jsonl").read_text("utf-8").splitlines()[:N_DOCUMENTS]]
tokenizer = AutoTokenizer.from_pretrained(DEMO)
model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
linearize_moe(model)
modifier = REAPPruningModifier(sparsity=SPARSITY)
state = State(model=model)
modifier.on_initialize(state)
modifier.on_calibration_start(state, None)
rows = [tokenizer(document["text"])["input_ids"] for document in documents]
with torch.no_grad():
    for row in rows:
        model(torch.tensor([row]))
trackers = modifier._saliency_trackers.values()
packages = ("llmcompressor", "transformers", "torch")
found = {
    "made_by": {name: version(name) for name in packages} | {"modifier": f"REAPPruningModifier(sparsity={SPARSITY})"},
    "date": date.today().isoformat(),
    "model": "demo, float32",
    "documents": [document["id"] for document in documents],
    "tokens": sum(map(len, rows)),
    "saliency": [tracker.mean_saliency.tolist() for tracker in trackers],
    "retained": [
        tracker.compute_retained_experts(modifier._n_experts_to_drop, None, modifier._moe_attrs).tolist()
        for tracker in trackers
    ],
}
Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
