"""Quantized loading never holds the model in bfloat16: peak memory of a process that loads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny import tiny_mixtral

SCRIPT = """
import gc, json, sys, threading
import mixlens as ml

def resident():
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

ml.load("demo", quantization="nf4", device_map="cpu", dtype="bfloat16", verbose=False)  # packages and kernels
gc.collect()
before, peak, done = resident(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, resident())

watcher = threading.Thread(target=watch)
watcher.start()
found = ml.audit(ml.load(sys.argv[1], quantization="nf4", device_map="cpu", dtype="bfloat16", verbose=False))
done.set()
watcher.join()
print(json.dumps({"peak": peak - before, "weights": found.weights, "bytes": found.bytes, "of": found.of("experts")}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_two_hundred_million_parameters_never_stand_in_bfloat16(tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 1792, "head_dim": 64, "num_hidden_layers": 9}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8192}
    model = tiny_mixtral(**shape, **heads).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100MB")
    del model
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 200_000_000
    assert found["of"]["of_bf16"] <= 0.30
    assert found["bytes"] < found["peak"] < 2 * found["weights"]
