"""load by name: from a scripted Hub, from the cache, and what it says when the Hub refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_hub import Hub, asking, scripted_hub
from tiny import tiny_mixtral

from mixlens.core.hub import FAULTS
from mixlens.models.demo import demo_path

# Loads every (name, arguments, folder) that it is given, records where there is a folder, and prints what came of it.
CHILD = """
import json, sys
import mixlens as ml
from mixlens.models.provenance import describe
outcomes = []
for name, arguments, out in json.loads(sys.argv[1]):
    try:
        model = ml.load(name, device_map="cpu", verbose=False, **arguments)
        about = ml.record(model, ["Bread and salt."], out=out).meta["model"] if out else describe(model)
        outcomes.append({key: about[key] for key in ("name", "revision", "router_sha256")})
    except ml.MixlensError as error:
        outcomes.append({"kind": type(error).__name__, "said": str(error), **vars(error)})
print(json.dumps(outcomes))
"""
pytestmark = pytest.mark.slow  # a new process has its own Hub and cache, and takes seconds to import torch


def about(fault: str) -> str:
    """What is said of an error of the Hub's client: what was found, and what to do."""
    return ". ".join(FAULTS[fault])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_in_a_child(hub: Hub | str, home: Path, asked: list[tuple[Any, ...]], **more: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", CHILD, json.dumps([(*one, None)[:3] for one in asked])]
    done = subprocess.run(command, env=asking(hub, home, **more), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hub():
    with scripted_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> dict[str, bytes]:
    """A sharded checkpoint of two files, with the tokenizer of the demo model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_mixtral(vocab_size=4096).save_pretrained(folder, max_shard_size="1400KB")
    files = contents(folder)
    assert sum(name.endswith(".safetensors") for name in files) == 2
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return files | {name: (demo_path() / name).read_bytes() for name in tokenizer}


def test_a_model_by_name_is_of_one_commit_and_loads_again_without_the_hub(hub, checkpoint, tmp_path):
    first = hub.commit("models", "own/tiny", checkpoint)
    other = tmp_path / "other"
    tiny_mixtral(vocab_size=4096, seed=1).save_pretrained(other, max_shard_size="1400KB")
    second = hub.commit("models", "own/tiny", {**checkpoint, **contents(other)})
    home, out = tmp_path / "home", str(tmp_path / "run")
    asked = [("own/tiny", {}), ("own/tiny", {"revision": first}, out), ("own/tiny", {"quantization": "int8wo"})]
    weightless = {name: content for name, content in checkpoint.items() if "safetensors" not in name}
    hub.commit("models", "own/weightless", weightless)
    *found, lacking = load_in_a_child(hub, home, [*asked, ("own/weightless", {})])
    assert lacking["argument"] == "weights"
    assert "safetensors" in lacking["value"]
    assert [model["revision"] for model in found] == [second, first, second]
    assert [model["name"] for model in found] == ["own/tiny"] * 3
    assert found[0]["router_sha256"] != found[1]["router_sha256"]
    read = [line for line in hub.asked if "/own/tiny/resolve/" in line]
    assert any(f"/resolve/{first}/tokenizer.json" in line for line in read)
    assert not [line for line in read if first not in line and second not in line]  # nothing of a moving branch
    assert json.loads(Path(out, "meta.json").read_text())["model"]["revision"] == first

    hub.commit("models", "own/tiny", checkpoint)
    before = len(hub.asked)
    *again, unknown = load_in_a_child(hub, home, [*asked, ("own/weightless", {})], HF_HUB_OFFLINE="1")
    assert again == found
    assert unknown["value"] == "own/weightless"
    assert about("OfflineModeIsEnabled") in unknown["said"]
    assert len(hub.asked) == before
    unreached, new = load_in_a_child("http://127.0.0.1:9", home, [("own/tiny", {}), ("own/new", {})])
    assert unreached == found[0]
    assert new["value"] == "own/new"
    assert about("ConnectError") in new["said"]


def test_what_the_hub_refuses_and_what_is_not_read_are_said(hub, checkpoint, tmp_path):
    config = json.loads(checkpoint["config.json"])
    foreign = config | {"model_type": "mixtral_own", "auto_map": {"AutoConfig": "own.Config"}}
    shards = sorted(name for name in checkpoint if name.endswith(".safetensors"))
    for name, files in {
        "own/gated": checkpoint,
        "own/forbidden": checkpoint,
        "own/denied": checkpoint,
        "own/down": checkpoint,
        "own/kept": checkpoint,
        "own/pickled": {"config.json": checkpoint["config.json"], "pytorch_model.bin": b"never read"},
        "own/code": {"config.json": json.dumps(foreign).encode(), "own.py": b"raise SystemExit('run')"},
        "own/short": {name: content for name, content in checkpoint.items() if name != shards[-1]},
    }.items():
        hub.commit("models", name, files)
    hub.refuse("models", "own/gated", 401, "GatedRepo")
    hub.refuse("models", "own/forbidden", 403, "GatedRepo")
    hub.refuse("models", "own/denied", 403)
    hub.refuse("models", "own/down", 503)
    names = {
        "own/gated": ("model", about("GatedRepoError")),
        "own/forbidden": ("model", about("GatedRepoError")),
        "own/denied": ("model", "403"),
        "own/down": ("model", "503"),
        "own/nothing": ("model", about("RepositoryNotFoundError")),
        "Mixtral-8x7B-v0.1": ("model", about("RepositoryNotFoundError")),
        "no/such/folder": ("model", about("HFValidationError")),
        "own/pickled": ("weights", "safetensors"),
        "own/code": ("trust_remote_code", "mixtral"),
        "own/short": ("weights", shards[-1]),
    }
    before = len(hub.asked)
    asked = [*((name, {}) for name in names), ("own/kept", {"revision": "v9"})]
    *found, revised = load_in_a_child(hub, tmp_path / "home", asked)
    for (name, (argument, said)), error in zip(names.items(), found, strict=True):
        assert (error["kind"], error["argument"]) == ("ModelError", argument), error
        assert name in error["said"]
        assert said in error["value" if argument == "weights" else "said"]
    assert (revised["argument"], revised["value"]) == ("model", "own/kept")
    assert about("RevisionNotFoundError") in revised["said"]
    assert not [line for line in hub.asked[before:] if "pytorch_model.bin" in line or "own.py" in line]
    assert not [line for line in hub.asked[before:] if "/commits/" in line]  # no request to convert pickled weights
