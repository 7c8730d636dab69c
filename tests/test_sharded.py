"""Models whose tensors are spread over two processes: what is recorded equals one process, the rest is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sharded_worker import DOCUMENTS, FORMS, QUIET, edited, recorded
from tiny import Letters, tiny_mixtral

import mixlens as ml

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("mode", FORMS)
def test_every_process_sees_what_one_alone_does_or_refuses(mode, tmp_path):
    model = tiny_mixtral(num_hidden_layers=2, num_key_value_heads=2)
    model.save_pretrained(tmp_path / "model")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(HERE / "sharded_worker.py"), str(tmp_path), mode],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    whole, alone = recorded(model), ml.record(model, DOCUMENTS, tokenizer=Letters(), settings=QUIET)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text("utf-8"))
        for name, values in whole.items():
            np.testing.assert_allclose(
                found["recorded"][name], values, atol=1e-5 if name not in ("weight", "router_logits") else 2e-3
            )
        assert found["edited"] == edited(model)
        if mode != "fully sharded":
            assert found["run"] == {name: alone.read(name).tolist() for name in ("token_id", "expert_id")}
        assert found["bytes"] == ml.audit(model).bytes
        assert set(found["refused"].values()) <= {"model sharded", "model fully sharded"}
