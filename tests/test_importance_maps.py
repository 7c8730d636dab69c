"""Importance maps from documents: against forwards under edits, and as runs that resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from helpers.refusals import refused
from tiny import Letters, tiny_mixtral

import mixlens as ml
from mixlens import BadInput, RecordSettings, RunError
from mixlens.experiments import Ablation

DOCUMENTS = [
    {"id": f"d{i}", "domain": domain, "text": text}
    for i, (domain, text) in enumerate(
        [("code", "def f(x):"), ("prose", "It was night."), ("code", "return x"), ("prose", "Rain fell"), ("code", "x")]
    )
]
SETTINGS = RecordSettings(progress=False, shard_tokens=12)


@pytest.fixture(scope="module")
def net():
    return tiny_mixtral()


def measure(net, documents=DOCUMENTS, **options):
    return ml.experiments.measure_importance(net, documents, tokenizer=Letters(), **{"settings": SETTINGS, **options})


def test_sums_are_those_of_recording_under_the_same_edit(net):
    measured = measure(net)
    assert measured.document_id.values.tolist() == ["d0", "d1", "d2", "d3", "d4"]
    quiet = RecordSettings(progress=False)

    def loss_by_document(trace) -> np.ndarray:
        logprob, sequence = trace.read("logprob"), trace.read("sequence")
        return np.array([-np.nansum(logprob[sequence == s]) for s in range(len(DOCUMENTS))])

    whole = loss_by_document(ml.record(net, DOCUMENTS, tokenizer=Letters(), settings=quiet))
    np.testing.assert_allclose(measured.value, whole, atol=1e-4)
    for layer, expert in [(0, 1), (1, 6), (3, 3)]:
        with ml.edit(net, ml.edits.ablate(layer, expert)):
            without = loss_by_document(ml.record(net, DOCUMENTS, tokenizer=Letters(), settings=quiet))
        np.testing.assert_allclose(measured.change.sel(layer=layer, expert=expert), without - whole, atol=1e-4)


def test_pieces_of_a_document_are_added_up(net):
    split = RecordSettings(progress=False, max_length=6, overlong="split")
    measured = measure(net, settings=split)
    assert measured.sizes["document"] == len(DOCUMENTS)
    np.testing.assert_array_equal(measured.length, [len(d["text"]) + 1 for d in DOCUMENTS])
    pieces = [-(-len(text) // 6) for text in (d["text"] + "B" for d in DOCUMENTS)]
    np.testing.assert_array_equal(measured.tokens, measured.length - pieces)


def test_a_run_that_was_stopped_resumes_to_the_same_numbers(net, tmp_path, monkeypatch):
    whole = measure(net, out=tmp_path / "whole")
    in_memory = measure(net)
    xr.testing.assert_identical(whole, in_memory)
    from mixlens.experiments.ablator import Ablator

    calls, own = [], Ablator.measure

    def stops(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(self, *args)

    monkeypatch.setattr(Ablator, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        measure(net, out=tmp_path / "stopped")
    with refused(RunError, "shards", 1):
        ml.open(tmp_path / "stopped")
    xr.testing.assert_identical(measure(net, out=tmp_path / "stopped"), whole)
    n_shards = len(list((tmp_path / "whole").glob("importance-*.safetensors")))
    assert len(calls) == 1 + n_shards
    xr.testing.assert_identical(ml.open(tmp_path / "stopped"), whole)
    assert len(calls) == 1 + n_shards
    with refused(RunError, "out", ["ablation"]):
        measure(net, out=tmp_path / "whole", ablation=Ablation(how="zero"))
    with refused(RunError, "out") as error:
        ml.experiments.measure_topk(net, DOCUMENTS, tokenizer=Letters(), out=tmp_path / "whole", settings=SETTINGS)
    assert {"kind", "ks", "own_k"} <= set(error.value.value)


class Others(Letters):
    name_or_path = "others"


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("input_sha256", {"documents": [{**DOCUMENTS[0], "domain": "prose"}, DOCUMENTS[1]]}),
        ("documents", {"documents": DOCUMENTS[:1]}),
        ("max_length", {"settings": replace(SETTINGS, max_length=300)}),
        ("overlong", {"settings": replace(SETTINGS, overlong="split")}),
        ("batch_tokens", {"settings": replace(SETTINGS, batch_tokens=64)}),
        ("shard_tokens", {"settings": replace(SETTINGS, shard_tokens=13)}),
        ("layers", {"ablation": Ablation(layers=[1])}),
        ("ablation", {"ablation": Ablation(how="zero", layers=[0])}),
        ("tokenizer", {"tokenizer": Others()}),
        ("edits", {"edits": (ml.edits.forbid(1, 2),)}),
    ],
)
def test_whatever_decides_the_numbers_makes_another_run(net, tmp_path, key, changes):
    asked = {"documents": DOCUMENTS[:2], "ablation": Ablation(layers=[0]), "settings": SETTINGS}
    asked |= {"tokenizer": Letters(), "edits": (), "out": tmp_path / "run"}
    once(net, **asked)
    with refused(RunError, "out") as error:
        once(net, **asked | changes)
    assert key in error.value.value


def once(net, *, edits, **options):
    with ml.edit(net, *edits) if edits else nullcontext():
        return ml.experiments.measure_importance(net, **options)


def test_a_map_by_domain_with_a_metric_of_ones_own(net):
    def right(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1) == target

    data = ml.expert_importance(
        net, DOCUMENTS, by="domain", tokenizer=Letters(), settings=SETTINGS, ablation=Ablation(metric=right, layers=[2])
    )
    assert data.estimate.dims == ("domain", "layer", "expert")
    assert data.estimate.shape == (2, 1, 8)
    assert "right" in data.attrs["metric"]
    assert float(abs(data.share.sum("expert") - 1).max()) < 1e-9


@pytest.mark.parametrize("metric", ["accuracy", lambda logits, target: logits.mean()])
def test_a_metric_that_is_none(net, metric):
    with refused(BadInput, "metric"):
        measure(net, ablation=Ablation(metric=metric, layers=1))


def test_another_metric_of_the_same_name_is_another_run(net, tmp_path):
    def kept(metric, out=tmp_path / "run"):
        return measure(net, DOCUMENTS[:1], out=out, ablation=Ablation(metric=metric, layers=0))

    once, twice = (lambda logits, target: logits[:, 0] * 1), (lambda logits, target: logits[:, 0] * 2)
    first = kept(once)
    xr.testing.assert_identical(kept(once), first)
    with refused(RunError, "out", ["ablation"]):
        kept(twice)
    for metric in (partial(once), lambda logits, target: logits[:, 0] + len(first)):
        with refused(BadInput, "metric", metric):
            kept(metric, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_unknown_layers(net):
    with refused(BadInput, "layers", [2, 4]):
        measure(net, ablation=Ablation(layers=[2, 4]))


SHARE = """
import sys
sys.path[:0] = {paths!r}
from tiny import Letters, tiny_mixtral
from test_importance_maps import DOCUMENTS, SETTINGS
import mixlens as ml

common = dict(tokenizer=Letters(), settings=SETTINGS)
model = tiny_mixtral()
ml.experiments.measure_importance(model, DOCUMENTS, out={out!r} + "/importance", **common)
ml.experiments.measure_topk(model, DOCUMENTS, out={out!r} + "/topk", ks=[1, 2], **common)
found = ml.experiments.measure_contributions(model, DOCUMENTS, out={out!r} + "/contributions", **common)
assert len(set(found.document_id.values)) == len(DOCUMENTS)  # every process has the whole
"""


def files_of(run: Path) -> dict[str, bytes]:
    """Bytes of every file, times in meta.json aside."""
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    meta = json.loads(files["meta.json"])
    for name in ("created", "checksums", "sha256"):
        del meta[name]
    return {**files, "meta.json": json.dumps(meta).encode()}


@pytest.mark.slow
def test_two_processes_write_the_runs_of_one(tmp_path):
    for name, launcher in {
        "one": (),
        "two": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    }.items():
        script = tmp_path / f"{name}.py"
        script.write_text(SHARE.format(paths=[str(Path(__file__).parent)], out=str(tmp_path / name)))
        done = subprocess.run(
            [sys.executable, *launcher, str(script)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    for kind in ("importance", "topk", "contributions"):
        one, two = (files_of(tmp_path / name / kind) for name in ("one", "two"))
        assert len([name for name in one if name.startswith(f"{kind}-")]) > 1
        assert one == two


def test_a_loss_that_is_nan_at_every_k_stays_so():
    broken = tiny_mixtral()
    broken.lm_head.weight.data[5] = torch.nan
    measured = ml.experiments.measure_topk(broken, DOCUMENTS[:2], ks=1, tokenizer=Letters(), settings=SETTINGS)
    assert measured.loss.isnull().all()
