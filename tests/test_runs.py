"""Run directories: whole or not there, one writer, resumed at every step, and every byte accounted for."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.inside import _KINDS, RunWriter, open_run, plan_at, versions, write_file
from helpers.refusals import refused

import mixlens as ml
from mixlens.errors import RunError

PLAN = {"settings": {"seed": 1, "batch": [2, 3]}, "input": "abc", "none": None}
META = {"counts": {"rows": 9}, "model": {"name": "m", "layers": [1, 2]}, "top_k": 2}
SHARDS = [b"first", b"second", b"third"]
FILES = {"plan.json", "meta.json", "part-0.bin", "part-2.bin", "last.bin", "inner/meta.json"}


class Killed(BaseException):
    """What ends the process."""


def write(folder: Path, *, stop_at: str = "", plan: dict = PLAN) -> list[int]:
    """A run of three shards, a run inside, and a last file; killed before it writes `stop_at`. Gives what it made."""

    def content(name: str, data: bytes):
        def made() -> bytes:
            if name == stop_at:
                raise Killed
            return data

        return made

    made = []
    with RunWriter(folder, "trace", plan) as writer:
        if writer.complete:
            return made
        for index, data in enumerate(SHARDS):
            if not writer.has(index):
                name, made = f"part-{index}.bin", [*made, index]
                kept = {"files": {}, "interim": {name: content(name, data)}}
                kept = {"files": {name: content(name, data)}, "interim": {}} if index != 1 else kept
                writer.commit_shard(index, kept["files"], {"rows": index}, interim=kept["interim"])
        assert {index: record["rows"] for index, record in writer.done.items()} == {0: 0, 1: 1, 2: 2}
        assert (writer.work / "part-1.bin").read_bytes() == SHARDS[1]
        with RunWriter(folder / "inner", "bench", {}) as inner:
            if not inner.complete:
                inner.finish({}, {"deep.bin": b"deep"})
        writer.finish(META, {"last.bin": content("last.bin", b"last")}, runs=[folder / "inner"])
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def whole(tmp_path) -> Path:
    write(tmp_path / "whole")
    return tmp_path / "whole"


def test_a_whole_run_lists_every_file_with_size_and_checksum(whole):
    files = contents(whole)
    assert files.keys() == FILES | {"inner/plan.json", "inner/deep.bin"}
    meta = json.loads(files["meta.json"])
    assert meta["files"] == {
        name: {"sha256": hashlib.sha256(files[name]).hexdigest(), "bytes": len(files[name])}
        for name in FILES - {"meta.json"}
    }
    assert (meta["kind"], meta["shards"], meta["counts"]) == ("trace", 3, {"rows": 9})
    run = open_run(whole)
    assert run.verify() == []
    assert run.plan.items() >= PLAN.items()
    assert run.kind == "trace"
    assert run.nested("inner") == whole / "inner"


DATA = sorted(FILES - {"meta.json", "inner/meta.json"} | {"inner/plan.json", "inner/deep.bin"})


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("damage", ["flip", "cut", "add", "gone", "folder", "pipe"])
def test_a_damage_to_any_file_is_named(whole, name, damage):
    path = whole / name
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage != "gone":
        path.write_bytes({"flip": data[:-1] + bytes([data[-1] ^ 1]), "cut": data[:-1], "add": data + b" "}[damage])
    run = open_run(whole)
    (fault,) = run.verify()
    assert fault.startswith(f"{name} ")
    inside, _, inner_name = name.rpartition("/")
    with pytest.raises(ml.errors.RunError):
        open_run(whole / inside).file(inner_name)
    others = FILES - {name, "meta.json"}
    assert {run.file(other).relative_to(whole).as_posix() for other in others} == others


@pytest.mark.parametrize("where", ["", "inner"])
@pytest.mark.parametrize("damage", range(0, 900, 7))
def test_a_flip_anywhere_in_a_meta_is_found(whole, where, damage):
    path = whole / where / "meta.json"
    data = bytearray(path.read_bytes())
    data[damage % len(data)] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ml.errors.RunError):
        open_run(whole / where)
    if where:
        assert [fault.split(" ")[0] for fault in open_run(whole).verify()] == ["inner/meta.json"]


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["counts", "rows"], 10, "counts.rows"),
        (["counts", "rows"], "9", "counts.rows"),
        (["counts", "rows"], 10**300, "counts.rows"),
        (["counts", "rows"], None, "counts.rows"),
        (["counts"], None, "counts.rows"),
        (["model", "layers"], [1], "model.layers"),
        (["top_k"], True, "top_k"),
        (["top_k"], None, "top_k"),
        (["kind"], "bench", "kind"),
        (["format"], 1, "format"),
        (["files", "last.bin", "bytes"], 5, "files.last.bin"),
        (["files", "last.bin"], None, "files.last.bin"),
        (["files", "../x"], {"sha256": "0" * 64, "bytes": 1}, "files.../x"),
        (["more"], 1, "more"),
        (["checksums"], None, "checksums"),
        (["sha256"], None, "sha256"),
        (["sha256"], "0" * 64, "sha256"),
        (["sha256"], 5, "sha256"),
    ],
)
def test_an_edit_of_a_meta_is_refused_and_named(whole, path, value, named):
    meta = json.loads((whole / "meta.json").read_text())
    *above, last = path
    place = meta
    for key in above:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    (whole / "meta.json").write_text(json.dumps(meta))
    for check in (True, False):
        with refused(ml.errors.RunError, named):
            open_run(whole, check=check)


def resealed(folder: Path, **changed: object) -> None:
    """Rewrite the meta of a run with its checksums, as somebody would who means to deceive."""
    from mixlens.core.sealed_json import read_sealed, sealed

    (folder / "meta.json").write_bytes(sealed({**read_sealed(folder / "meta.json"), **changed}))


@pytest.mark.parametrize("name", ["../last.bin", "/etc/hostname", "a/../../b", "", "C:\\x", "..\\x", "a\x00b"])
def test_no_file_of_a_run_lies_outside_its_folder(whole, name):
    entry = {"sha256": "0" * 64, "bytes": 1}
    resealed(whole, files={name: entry})
    with refused(ml.errors.RunError, name):
        open_run(whole)


def test_a_device_is_no_file_of_a_run(whole):
    (whole / "last.bin").unlink()
    (whole / "last.bin").symlink_to("/dev/zero")
    resealed(whole, files={"last.bin": {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}})
    with refused(ml.errors.RunError, "last.bin"):
        open_run(whole).file("last.bin")


@pytest.mark.parametrize("place", ["stray.txt", ".hidden", "inner/stray", "empty/", "a/b/c", "unfinished/x.partial"])
def test_what_a_run_does_not_list_is_named(whole, place):
    path = whole / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if place.endswith("/") else path.write_text("stray")
    (fault,) = open_run(whole).verify()
    assert place.startswith(fault.split(" ")[0])


def test_without_check_sizes_are_compared_and_contents_are_not(whole):
    (whole / "last.bin").write_bytes(b"lost")
    (whole / "part-0.bin").write_bytes(b"firs")
    run = open_run(whole, check=False)
    assert run.file("last.bin").read_bytes() == b"lost"
    with pytest.raises(ml.errors.RunError):
        run.file("part-0.bin")
    assert sorted(fault.split(" ")[0] for fault in run.verify()) == ["last.bin", "part-0.bin"]


@pytest.mark.parametrize("first", ["part-0.bin", "part-1.bin", "part-2.bin", "last.bin"])
@pytest.mark.parametrize("second", ["part-1.bin", "part-2.bin", "last.bin"])
def test_stopped_anywhere_and_again_it_ends_with_the_same_bytes(whole, tmp_path, first, second):
    folder = tmp_path / "killed"
    for stop_at in (first, second):
        try:
            write(folder, stop_at=stop_at)
        except Killed:
            assert not (folder / "meta.json").exists()
            with pytest.raises(ml.errors.RunError):
                open_run(folder)
    write(folder)
    assert contents(folder) == contents(whole)
    write(folder)  # once more changes nothing
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("damage", ["part-0.bin", "unfinished/part-1.bin", "unfinished/shard-00000.json"])
@pytest.mark.parametrize("how", ["flip", "gone"])
def test_a_resumed_run_makes_a_damaged_shard_again(whole, tmp_path, damage, how):
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        write(folder, stop_at="part-2.bin")
    path = folder / damage
    data = path.read_bytes()
    path.unlink() if how == "gone" else path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    if how == "gone" and damage.endswith(".json"):
        assert write(folder) == [0, 2]
    else:
        with pytest.warns(UserWarning, match="made again"):
            assert write(folder) == [1 if "part-1" in damage else 0, 2]
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("left", ["lock", "shard-00002.json", "part-1.bin", "x.partial"])
def test_what_a_process_left_that_was_killed_at_the_very_end_goes(whole, left):
    before = contents(whole)
    (whole / "unfinished").mkdir()
    (whole / "unfinished" / left).write_text("left")
    write(whole)
    assert contents(whole) == before
    assert not (whole / "unfinished").exists()


def test_a_run_of_the_first_layout_opens_and_is_complete(whole):
    meta = json.loads((whole / "meta.json").read_text())
    del meta["sha256"], meta["checksums"], meta["files"]["inner/meta.json"]
    plan = json.loads((whole / "plan.json").read_text()) | {"format": 1}
    (whole / "plan.json").write_text(json.dumps(plan))
    data = (whole / "plan.json").read_bytes()
    meta["files"]["plan.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (whole / "meta.json").write_text(json.dumps(meta | {"format": 1}))
    run = open_run(whole)
    assert run.verify() == []
    assert run.nested("inner") == whole / "inner"
    assert write(whole) == []
    (whole / "inner" / "deep.bin").write_bytes(b"sour")
    assert [fault.split(" ")[0] for fault in run.verify()] == ["inner/deep.bin"]


SECOND = """
import sys
from mixlens.core.run_dir import RunWriter
from mixlens.errors import RunError
try:
    RunWriter(sys.argv[1], "trace", {"input": 1})
except RunError as error:
    print(error.argument, error.value)
"""


def second_writer(folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", SECOND, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_second_process_is_told_who_writes_and_goes_on_when_it_has_ended(tmp_path):
    with RunWriter(tmp_path, "trace", {"input": 1}):
        assert f"process {os.getpid()} " in second_writer(tmp_path)
        with refused(ml.errors.RunError, "out"):
            RunWriter(tmp_path, "trace", {"input": 1})
    assert second_writer(tmp_path) == ""
    holder = subprocess.Popen(
        [sys.executable, "-c", SECOND + "else:\n print('held', flush=True); input()", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    assert str(holder.pid) not in second_writer(tmp_path)  # its writer was let go of at once
    holder.kill()
    holder.wait()


def part_and_failure(folder: Path) -> None:
    write(folder / "part")
    raise RunError("the second part failed")


@pytest.mark.parametrize("made_before", [True, False])
def test_a_start_that_failed_leaves_nothing_and_a_finished_part_keeps_the_plan(tmp_path, made_before):
    folder = tmp_path / "run"
    if made_before:
        folder.mkdir()
    with pytest.raises(RunError), RunWriter(folder, "demo", PLAN):
        raise RunError("it could not begin")
    assert folder.exists() == made_before
    with pytest.raises(RunError), RunWriter(folder, "demo", PLAN):
        part_and_failure(folder)
    assert not open_run(folder / "part").verify()
    with RunWriter(folder, "demo", PLAN) as writer:
        writer.finish({}, {}, runs=[folder / "part"])
    assert not open_run(folder).verify()


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


@pytest.mark.parametrize("plan", ["[1]", "{", "", "5", '{"format": 2}', "[" * 100_000])
def test_a_plan_that_is_none_is_refused(tmp_path, plan):
    (tmp_path / "plan.json").write_text(plan)
    with pytest.raises(ml.errors.RunError):
        RunWriter(tmp_path, "trace", PLAN)


def test_a_folder_of_anything_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ml.errors.RunError):
        RunWriter(tmp_path, "trace", PLAN)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_one_process_of_several_leads(tmp_path):
    RunWriter(tmp_path, "trace", PLAN, leader=False)
    assert contents(tmp_path) == {}
    with RunWriter(tmp_path, "trace", PLAN) as leads:
        assert plan_at(tmp_path).items() >= PLAN.items()
        RunWriter(tmp_path, "trace", PLAN, leader=False).commit_shard(4, {"x": b"x"}, {"rows": 4})
        assert leads.has(4)
        assert leads.done[4]["rows"] == 4


@pytest.mark.parametrize("meta", [b"", b"{", b"[]", b'{"kind": "trace"}', b'{"files": {}}', b"\xff"], ids=range(6))
def test_a_meta_that_is_none_is_refused(whole, meta):
    (whole / "meta.json").write_bytes(meta)
    with pytest.raises(ml.errors.RunError):
        open_run(whole)


def test_a_folder_without_a_plan_has_none(tmp_path):
    assert plan_at(tmp_path) == {}


def test_a_folder_that_is_not_there_is_refused_by_its_name(tmp_path):
    with refused(ml.errors.RunError, "path", str(tmp_path / "no")):
        open_run(tmp_path / "no")


@pytest.mark.parametrize("kind", sorted(_KINDS))
def test_a_run_of_another_kind_is_refused_alike_everywhere(whole, kind):
    resealed(whole, kind="another")
    with refused(ml.errors.RunError, "kind", "another"):
        _KINDS[kind](whole)


@pytest.mark.parametrize("opener", [ml.open, open_run, *_KINDS.values()], ids=lambda opener: opener.__qualname__)
def test_runs_are_checked_unless_the_caller_says_not_to(opener):
    assert inspect.signature(opener).parameters["check"].default is True


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only"), (errno.EMFILE, "-n")],
)
def test_what_the_disk_refuses_is_said_and_nothing_is_left_of_the_shard(tmp_path, monkeypatch, code, reason):
    def no_room(path: Path, data: bytes) -> None:
        raise OSError(code, os.strerror(code))

    with RunWriter(tmp_path, "trace", PLAN) as writer:
        writer.commit_shard(0, {"a": b"a"}, {"rows": 0})
        monkeypatch.setattr(Path, "write_bytes", no_room)
        with refused(ml.errors.RunError, "path", str(tmp_path)) as caught:
            writer.commit_shard(1, {"b": bytes(70)}, {"rows": 1})
        assert reason in str(caught.value)
        assert "70 bytes needed" in str(caught.value)
        assert list(writer.done) == [0]
    assert not list(tmp_path.rglob("*b*"))


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "x"), MemoryError()])
def test_what_ends_a_run_for_want_of_something_is_an_error_of_mixlens(tmp_path, error):
    def work() -> None:
        with RunWriter(tmp_path, "trace", PLAN):
            raise error

    with refused(ml.errors.RunError, "path", str(tmp_path)):
        work()


def test_room_is_asked_for_before_a_file_is_begun(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    (tmp_path / "report.html").write_text("old")
    with refused(ml.errors.RunError, "path", str(tmp_path)) as caught:
        write_file(tmp_path / "report.html", "ten bytes!")
    assert "10 bytes needed, 9 free" in str(caught.value)
    assert contents(tmp_path) == {"report.html": b"old"}


def test_a_file_is_replaced_whole_or_left(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_file(path, "old")
    path.chmod(0o600)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "x")))
    with refused(ml.errors.RunError, "path", str(path)):
        write_file(path, "new")
    assert contents(tmp_path) == {"report.html": b"old"}
    monkeypatch.undo()
    write_file(path, "new")
    assert contents(tmp_path) == {"report.html": b"new"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_versions_are_of_what_is_installed():
    found = versions("numpy", "no-such-package", "torch")
    assert found == {"python": platform.python_version(), "numpy": version("numpy"), "torch": version("torch")}
