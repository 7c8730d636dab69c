"""Run directories: whole or not there, resumed at every step, and every byte accounted for."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.inside import _KINDS, RunWriter, open_run, plan_at, versions
from helpers.refusals import refused

import mixlens as ml

PLAN = {"settings": {"seed": 1, "batch": [2, 3]}, "input": "abc", "none": None}
META = {"counts": {"rows": 9}}
SHARDS = [b"first", b"second", b"third"]


class Killed(BaseException):
    """What ends the process."""


def content(data: bytes):
    return lambda path: path.write_bytes(data)


def write(folder: Path, *, stop_at: str = "", plan: dict = PLAN) -> None:
    """A run of three shards and a last file; killed while it writes `stop_at`."""

    def writing(name: str, data: bytes):
        def write_it(path: Path) -> None:
            path.write_bytes(data[:2])
            if name == stop_at:
                raise Killed
            path.write_bytes(data)

        return write_it

    writer = RunWriter(folder, "trace", plan)
    if writer.complete:
        return
    for index, data in enumerate(SHARDS):
        if index not in writer.done:
            name = f"part-{index}.bin"
            writer.commit_shard(index, {name: writing(name, data)}, {"rows": index})
    assert {index: record["rows"] for index, record in writer.done.items()} == {0: 0, 1: 1, 2: 2}
    writer.finish(META, {"last.bin": writing("last.bin", b"last")}, drop=["part-1.bin"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(tmp_path) -> Path:
    write(tmp_path / "whole")
    return tmp_path / "whole"


def test_a_whole_run_lists_every_file_with_size_and_checksum(whole):
    files = contents(whole)
    assert files.keys() == {"plan.json", "meta.json", "part-0.bin", "part-2.bin", "last.bin"}
    meta = json.loads(files["meta.json"])
    assert meta["files"] == {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in files.items()
        if name != "meta.json"
    }
    assert (meta["kind"], meta["shards"], meta["counts"]) == ("trace", 3, {"rows": 9})
    run = open_run(whole)
    assert run.verify() == []
    assert run.plan.items() >= PLAN.items()
    assert run.kind == "trace"


@pytest.mark.parametrize("name", ["plan.json", "part-0.bin", "part-2.bin", "last.bin"])
@pytest.mark.parametrize("damage", ["flip", "cut", "add", "gone"])
def test_a_damage_to_any_file_is_named(whole, name, damage):
    path = whole / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-1], "add": data + b" "}[damage])
    run = open_run(whole)
    (fault,) = run.verify()
    assert fault.startswith(f"{name} ")
    with pytest.raises(ml.errors.RunError):
        run.file(name)
    others = {"plan.json", "part-0.bin", "part-2.bin", "last.bin"} - {name}
    assert {run.file(other).name for other in others} == others


def test_without_check_sizes_are_compared_and_contents_are_not(whole):
    (whole / "last.bin").write_bytes(b"lost")
    (whole / "part-0.bin").write_bytes(b"firs")
    run = open_run(whole, check=False)
    assert run.file("last.bin").read_bytes() == b"lost"
    with pytest.raises(ml.errors.RunError):
        run.file("part-0.bin")
    assert [fault.split(" ")[0] for fault in run.verify()] == ["part-0.bin", "last.bin"]


@pytest.mark.parametrize("first", ["part-0.bin", "part-1.bin", "part-2.bin", "last.bin"])
@pytest.mark.parametrize("second", ["part-1.bin", "part-2.bin", "last.bin"])
def test_killed_anywhere_and_again_it_ends_with_the_same_bytes(whole, tmp_path, first, second):
    folder = tmp_path / "killed"
    for stop_at in (first, second):
        try:
            write(folder, stop_at=stop_at)
        except Killed:
            assert not (folder / "meta.json").exists()
            assert not list(folder.glob(".*partial"))
            with pytest.raises(ml.errors.RunError):
                open_run(folder)
    write(folder)
    assert contents(folder) == contents(whole)
    write(folder)  # once more changes nothing
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize(
    "other",
    [
        {**PLAN, "input": "abd"},
        {**PLAN, "more": 1},
        {name: value for name, value in PLAN.items() if name != "input"},
        {**PLAN, "settings": {"seed": 1, "batch": [3, 2]}},
        {**PLAN, "settings": {"seed": True, "batch": [2, 3], "x": 0}},
        {**PLAN, "settings": 5},
        {**PLAN, "input": {"sha256": "abc"}},
    ],
    ids=["another value", "one more key", "one key less", "order within", "one more inside", "a number", "an object"],
)
def test_a_folder_of_another_plan_is_refused_and_left_as_it_is(whole, other):
    before = contents(whole)
    with pytest.raises(ml.errors.RunError):
        write(whole, plan=other)
    with pytest.raises(ml.errors.RunError):
        RunWriter(whole, "bench", PLAN)
    assert contents(whole) == before


def test_a_folder_of_anything_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ml.errors.RunError):
        RunWriter(tmp_path, "trace", PLAN)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_one_process_of_several_leads(tmp_path):
    RunWriter(tmp_path, "trace", PLAN, leader=False)
    assert contents(tmp_path) == {}
    RunWriter(tmp_path, "trace", PLAN)
    assert plan_at(tmp_path).items() >= PLAN.items()
    RunWriter(tmp_path, "trace", PLAN, leader=False).commit_shard(4, {"x": content(b"x")}, {"rows": 4})
    assert RunWriter(tmp_path, "trace", PLAN).done[4]["rows"] == 4


@pytest.mark.parametrize("meta", [b"", b"{", b"[]", b'{"kind": "trace"}', b'{"files": {}}', b"\xff"], ids=range(6))
def test_a_meta_that_is_none_is_refused(whole, meta):
    (whole / "meta.json").write_bytes(meta)
    with pytest.raises(ml.errors.RunError):
        open_run(whole)


def test_a_plan_that_is_no_object_counts_as_none(tmp_path):
    assert plan_at(tmp_path) == {}
    (tmp_path / "plan.json").write_text("[1]")
    assert plan_at(tmp_path) == {}


def test_a_folder_that_is_not_there_is_refused_by_its_name(tmp_path):
    with refused(ml.errors.RunError, "path", str(tmp_path / "no")):
        open_run(tmp_path / "no")


@pytest.mark.parametrize("opener", [ml.open, open_run, *_KINDS.values()], ids=lambda opener: opener.__qualname__)
def test_runs_are_checked_unless_the_caller_says_not_to(opener):
    assert inspect.signature(opener).parameters["check"].default is True


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.ENOSPC, "full"), (errno.EDQUOT, "quota"), (errno.EROFS, os.strerror(errno.EROFS))]
)
def test_what_the_disk_refuses_is_said_and_nothing_is_left_of_the_shard(tmp_path, code, reason):
    def no_room(path: Path) -> None:
        path.write_bytes(b"some")
        raise OSError(code, os.strerror(code))

    writer = RunWriter(tmp_path, "trace", PLAN)
    writer.commit_shard(0, {"a": content(b"a")}, {"rows": 0})
    with refused(ml.errors.RunError, "path", str(tmp_path)) as caught:
        writer.commit_shard(1, {"b": no_room}, {"rows": 1})
    assert reason in str(caught.value)
    assert list(RunWriter(tmp_path, "trace", PLAN).done) == [0]
    assert not list(tmp_path.glob("*b*"))


def test_versions_are_of_what_is_installed():
    found = versions("numpy", "no-such-package", "torch")
    assert found == {"python": platform.python_version(), "numpy": version("numpy"), "torch": version("torch")}
