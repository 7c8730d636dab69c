"""What can be tested of an engine where none is installed: versions, and routing of prefixes that its cache spares."""

import numpy as np
import pytest
from helpers.refusals import refused

import mixlens as ml
from mixlens.engines import vllm_engine
from mixlens.engines.vllm_engine import Prefixes, Rows


def rows(n, start=0):
    ids = np.arange(start, start + 4 * n, dtype=np.int32).reshape(n, 2, 2)
    return Rows(ids, ids[..., :1].repeat(3, -1).astype(np.float32))


def test_a_version_that_was_not_tried_is_refused_and_so_is_none(monkeypatch):
    monkeypatch.setattr(vllm_engine, "version", lambda package: "0.99.0")
    with refused(ml.ModelError, "vllm", "0.99.0"):
        ml.engines.vllm("demo")

    def missing(package):
        raise vllm_engine.PackageNotFoundError(package)

    monkeypatch.setattr(vllm_engine, "version", missing)
    with refused(ml.ModelError, "vllm", None):
        ml.engines.vllm("demo")


@pytest.mark.parametrize(
    ("name", "value"), [("pipeline_parallel_size", 2), ("speculative_config", {}), ("worker_cls", "mine.Worker")]
)
def test_what_was_not_tried_with_recording_is_refused(monkeypatch, name, value):
    monkeypatch.setattr(vllm_engine, "version", lambda package: vllm_engine.TRIED[-1])
    with refused(ml.BadInput, name, value):
        ml.engines.vllm("demo", **{name: value})


def test_a_prefix_is_found_by_its_tokens_alone():
    known, tokens = Prefixes(block=4), np.arange(10)
    known.add(tokens, rows(10))
    other = np.concatenate([tokens[:8], [77, 78, 79]])
    assert np.array_equal(known.find(other, 8).ids, rows(10).ids[:8])
    assert known.find(np.concatenate([[99], tokens[1:]]), 4) is None
    assert known.find(tokens, 12) is None


def test_what_was_read_last_counts_and_the_oldest_is_forgotten(monkeypatch):
    monkeypatch.setattr(vllm_engine, "_REMEMBERED_BYTES", 3 * rows(8).nbytes)
    known, sequences = Prefixes(block=4), [np.arange(8) + 100 * n for n in range(5)]
    for n, tokens in enumerate(sequences):
        known.add(tokens, rows(8, start=n))
    known.add(sequences[3], rows(8, start=1000))
    assert [known.find(tokens, 8) is None for tokens in sequences] == [True, True, True, False, False]
    assert known.find(sequences[3], 4).ids[0, 0, 0] == 1000
