"""Evaluations of a model whose layers lie in several places."""

from __future__ import annotations

import numpy as np
from accelerate import dispatch_model

import mixlens as ml

SETTINGS = ml.evals.EvalSettings(routing=True, progress=False)


def test_a_model_in_memory_and_on_disk_scores_and_routes_as_a_whole_one(tmp_path):
    whole = ml.evaluate(ml.load("demo", verbose=False), "demo", limit=2, settings=SETTINGS)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(8)}
    model = dispatch_model(ml.load("demo", verbose=False), places, offload_dir=tmp_path, main_device="cpu")
    sharded = ml.evaluate(model, "demo", limit=2, settings=SETTINGS)
    assert next(model.model.layers[1].parameters()).device.type == "meta"
    assert list(sharded.samples.logprobs) == list(whole.samples.logprobs)
    np.testing.assert_array_equal(sharded.routing.read("expert_id"), whole.routing.read("expert_id"))
