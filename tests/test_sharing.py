"""Runs on the Hub: pushed whole and private, read file by file, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.traces import made
from scripted_hub import asking, scripted_hub

import mixlens as ml
from mixlens.errors import BadInput, RunError
from mixlens.sharing import lm_eval_files

# In a process of its own, since the Hub's client reads its address when it is imported.
PUSH = """
import json, sys
import mixlens as ml

address = ml.push(sys.argv[1], "me/pile")
print(json.dumps({"address": address}))
"""
OPEN = """
import json, sys
from pathlib import Path
import mixlens as ml

trace = ml.open(sys.argv[1])
before = sorted(path.name for path in Path(trace.path).iterdir())
ids = trace.read("expert_id").tolist()
again = ml.Trace.open(trace.path).n_tokens
print(json.dumps({"before": before, "ids": ids, "again": again}))
"""


def said(code: str, *argv: object, env: dict[str, str]) -> dict:
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], env=env, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return made([5, 6, 7], domains=["x", "y", "x"]).trace.save(tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture(scope="module")
def pushed(saved, tmp_path_factory):
    """What the Hub holds after a push that replaces an earlier run, and what a reader sees of it."""
    home = tmp_path_factory.mktemp("home")
    with scripted_hub() as hub:
        env = asking(hub, home, HF_TOKEN="hf_of_a_test")
        hub.commit("datasets", "me/pile", {".gitattributes": b"", "run/old.parquet": b"old", "notes.txt": b"mine"})
        hub.repositories["datasets", "me/pile"].private = True
        told = said(PUSH, saved.path, env=env)
        hub.asked.clear()
        read = said(OPEN, "hf://me/pile", env=env)
        repository = hub.repositories["datasets", "me/pile"]
        return told["address"], repository.commits[repository.main], read, list(hub.asked)


def test_the_whole_run_is_there_with_a_card(pushed, saved):
    address, files, _, _ = pushed
    here = {f"run/{path.name}": path.read_bytes() for path in Path(saved.path).iterdir()}
    assert {name: content for name, content in files.items() if name.startswith("run/")} == here
    assert files["notes.txt"] == b"mine"
    card = files["README.md"].decode()
    assert all(entry["sha256"] in card for entry in ml.open(saved.path).meta["files"].values())
    assert "hf://me/pile" in card
    assert files["figure.png"].startswith(b"\x89PNG")
    assert "hf_of_a_test" not in "".join(content.decode("latin-1") for content in files.values())
    assert address.startswith("hf://me/pile@")


def test_it_is_read_file_by_file(pushed, saved):
    _, _, read, asked = pushed
    assert np.array_equal(read["ids"], saved.read("expert_id"))
    assert read["again"] == saved.n_tokens
    assert "meta.json" in read["before"]
    assert not any(name.startswith("routing") for name in read["before"])  # until it is used
    assert not any("figure.png" in line for line in asked)


def test_a_repository_that_is_made_is_private_and_a_public_one_is_refused(saved, tmp_path):
    code = PUSH.replace(
        'address = ml.push(sys.argv[1], "me/pile")',
        """
try:
    address = ml.push(sys.argv[1], sys.argv[2])
except ml.BadInput as error:
    address = error.argument
""",
    )
    with scripted_hub() as hub:
        env = asking(hub, tmp_path, HF_TOKEN="hf_of_a_test")
        hub.commit("datasets", "me/open", {".gitattributes": b""})
        assert said(code, saved.path, "me/open", env=env)["address"] == "private"
        assert set(hub.repositories["datasets", "me/open"].commits) == {hub.repositories["datasets", "me/open"].main}
        assert said(code, saved.path, "me/new", env=env)["address"].startswith("hf://me/new@")
        assert hub.repositories["datasets", "me/new"].private


def test_what_cannot_be_pushed_or_opened_is_refused(tmp_path):
    with refused(BadInput, "run", "Trace"):
        ml.push(made([3]).trace, "me/pile")
    damaged = made([3, 4]).trace.save(tmp_path / "run")
    file = Path(damaged.path) / "sequences.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with refused(RunError, "run", 1):
        ml.push(damaged, "me/pile")
    with refused(BadInput, "path", "hf://pile"):
        ml.open("hf://pile")


def test_an_evaluation_has_the_files_of_lm_eval(tmp_path):
    from lm_eval.utils import get_latest_filename, get_results_filenames, get_sample_results_filenames

    settings = ml.evals.EvalSettings(progress=False)
    log = ml.evaluate(ml.load("demo", verbose=False), ["demo"], limit=2, out=tmp_path / "run", settings=settings)
    files = {f"lm_eval/{name}": content for name, content in lm_eval_files(log).items()}
    assert get_latest_filename(get_results_filenames(list(files))) in files
    samples = get_sample_results_filenames(list(files))
    assert len(samples) == len(log.tasks)
    rows = [json.loads(line) for name in samples for line in files[name].decode().splitlines()]
    assert sorted(row["doc_hash"] for row in rows) == sorted(log.samples["doc_hash"])
    assert sum(row["acc"] for row in rows) == log.samples["correct"].sum()
