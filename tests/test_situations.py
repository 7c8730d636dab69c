"""Situations that users of neighbouring projects reported, and siblings of each, where no other file has them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import matplotlib.pyplot as plt
import pytest
from helpers.traces import made
from json_server import Reply, answering
from matplotlib.colors import to_rgba

import mixlens as ml
from mixlens.bench.prompts import read_prompts

NAMES = ("_drafts", "__main__", "plain", "Кириллица")


def named_trace() -> ml.Trace:
    """Three documents of each domain."""
    domains = NAMES * 3
    return made([9] * len(domains), documents=[f"d{i}" for i in range(len(domains))], domains=domains).trace


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.txt"])
def test_json_lines_are_read_as_such_whatever_the_name(name, tmp_path):
    texts = ["one\u2028line", "two\x85too", "three"]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert read_prompts(tmp_path / name) == texts
    assert [one["text"] for one in ml.documents(tmp_path / name)] == texts


def test_a_line_separator_of_unicode_ends_no_prompt(tmp_path):
    (tmp_path / "a.txt").write_text("one\u2028line\n{braces} first\n", "utf-8")
    assert read_prompts(tmp_path / "a.txt") == ["one\u2028line", "{braces} first"]


def test_a_terminal_that_cannot_show_a_name_still_gets_its_table(tmp_path):
    trace = named_trace()
    trace.save(tmp_path / "Кириллица")
    done = subprocess.run(
        [sys.executable, "-m", "mixlens", "stats", str(tmp_path / "Кириллица"), "expert_share", "--by", "domain"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    assert done.returncode == 0, done.stderr
    assert b"plain" in done.stdout


@pytest.mark.parametrize("style", ["dark_background", "Solarize_Light2"])
@pytest.mark.parametrize("own", [False, True])
def test_texts_are_readable_and_names_complete_under_a_style(style, own):
    share = ml.stats.expert_share(named_trace(), by="domain").isel(layer=[0])
    with plt.style.context(style):
        ax = ml.show.expert_share(share, ax=plt.subplots()[1] if own else None)
        legend = ax.get_legend()
        assert {text.get_text().lstrip("\u200b") for text in legend.get_texts()} >= set(NAMES)
        faces = [to_rgba(face.get_facecolor()) for face in (ax, ax.figure)]
        behind = next(face for face in faces if face[3] > 0)
        for text in (*legend.get_texts(), ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()):
            assert abs(sum(to_rgba(text.get_color())[:3]) - sum(behind[:3])) > 1, text
    plt.close("all")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_key_does_not_follow_a_redirection(status, monkeypatch):
    monkeypatch.setenv("REDIRECTED_KEY", "0123456789-abcdef")
    with answering(lambda call: Reply({"data": []})) as (other, calls):
        away = {"Location": other.replace("http:", "https:" if status == 308 else "http:")}
        with answering(lambda call: Reply({}, status, away)) as (url, _):
            endpoint = ml.Endpoint(url, model="m", key_env="REDIRECTED_KEY", max_tries=1)
            for call in (lambda: endpoint.complete("Hi"), endpoint.models, lambda: ml.bench.probe(endpoint)):
                with pytest.raises(ml.EndpointError) as caught:
                    call()
                assert away["Location"] in str(caught.value)
    assert not calls
