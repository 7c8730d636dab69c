"""Models whose tensors are spread over processes: what is recorded equals one process, the rest is refused."""

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


def told_by(folder: Path, mode: str, processes: int) -> list:
    """What each process wrote."""
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
         str(HERE / "sharded_worker.py"), str(folder), mode],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", FORMS)
def test_every_process_sees_what_one_alone_does_or_refuses(mode, tmp_path):
    model = tiny_mixtral(num_hidden_layers=2, num_key_value_heads=2)
    model.save_pretrained(tmp_path / "model")
    whole, alone = recorded(model), ml.record(model, DOCUMENTS, tokenizer=Letters(), settings=QUIET)
    for found in told_by(tmp_path, mode, processes=4 if mode == "tensor and fully sharded" else 2):
        for name, values in whole.items():
            np.testing.assert_allclose(
                found["recorded"][name], values, atol=1e-5 if name not in ("weight", "router_logits") else 2e-3
            )
        assert found["edited"] == edited(model)
        if "fully sharded" not in mode:
            assert found["run"] == {name: alone.read(name).tolist() for name in ("token_id", "expert_id")}
        assert found["bytes"] == ml.audit(model).bytes
        assert set(found["refused"].values()) <= {"model sharded", "model fully sharded"}


@pytest.mark.slow
def test_layers_shared_out_over_processes_are_refused(tmp_path):
    tiny_mixtral(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    for found in told_by(tmp_path, "pipeline", processes=2):
        assert set(found) == {"model pipeline parallel"}
