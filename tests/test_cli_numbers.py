"""What the command line prints, read back and held to loops over the arrays; and names that could steer a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from helpers import loops
from helpers.displayed import numbers
from helpers.hostile import NAMES, plain_in_a_terminal
from helpers.traces import made

import mixlens as ml
from mixlens.cli import main as cli
from mixlens.cli.runs import Statistic

CASE = made((9, 5, 7, 12, 6, 8, 11), layers=(0, 1, 3), experts=5)
DOMAINS = sorted(set(CASE.sequences["domain"]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(CASE.trace.save(tmp_path_factory.mktemp("cli") / "run").path)


def printed(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(list(argv)) == 0
    return capsys.readouterr().out


def cells(case, columns) -> list[tuple]:
    """(domain, layer, expert, share, tokens), in the order in which they are printed."""
    rows = []
    for domain in DOMAINS:
        tokens = loops.tokens_of(case, domain)
        for place, layer in enumerate(case.layers):
            for e in range(case.n_experts):
                rows.append((domain, layer, e, loops.share(case, place, e, tokens, case.top_k), len(tokens)))
    return [tuple(row[i] for i in columns) for row in rows]


def test_a_table_for_a_person(run, capsys):
    text = printed(capsys, "stats", run, "expert_share", "--by", "domain")
    lines = text.splitlines()
    header, rows = lines[0].split(), [line.split() for line in lines[1 : 1 + 3 * 3 * 5]]
    found = pd.DataFrame(rows, columns=header)
    assert list(zip(found["domain"], found["layer"].astype(int), found["expert"].astype(int), strict=True)) == cells(
        CASE, (0, 1, 2)
    )
    np.testing.assert_allclose(found["estimate"].astype(float), [x for (x,) in cells(CASE, (3,))], atol=5.1e-5)
    assert found["n"].astype(int).tolist() == [n for (n,) in cells(CASE, (4,))]


def test_json_and_csv_have_every_digit(run, capsys, tmp_path):
    rows = pd.DataFrame(json.loads(printed(capsys, "stats", run, "expert_share", "--by", "domain", "--json"))["rows"])
    printed(capsys, "stats", run, "expert_share", "--by", "domain", "--csv", str(tmp_path / "share.csv"))
    for found in (rows, pd.read_csv(tmp_path / "share.csv")):
        assert list(zip(found["domain"], found["layer"], found["expert"], strict=True)) == cells(CASE, (0, 1, 2))
        np.testing.assert_allclose(found["estimate"], [x for (x,) in cells(CASE, (3,))], rtol=1e-6)
        assert found["n"].tolist() == [n for (n,) in cells(CASE, (4,))]


@pytest.mark.parametrize("name", sorted({*get_args(Statistic)} - {"transitions"}))
def test_every_statistic_prints_the_numbers_of_its_function(run, capsys, name):
    """Those numbers are held to loops elsewhere; here it is which numbers, of which layers, under which names."""
    rows = pd.DataFrame(json.loads(printed(capsys, "stats", run, name, "--layers", "1,3", "--json"))["rows"])
    data = getattr(ml.stats, name)(ml.open(run).select(layers=[1, 3]))
    keys = list(data["estimate"].dims)
    found = rows.set_index(keys)[["estimate", "ci_low", "ci_high"]].astype(float).sort_index()
    expected = data[["estimate", "ci_low", "ci_high"]].to_dataframe()[["estimate", "ci_low", "ci_high"]].sort_index()
    pd.testing.assert_frame_equal(found, expected, check_index_type=False, rtol=1e-6)


def test_what_a_run_holds(run, capsys):
    lines = printed(capsys, "info", run, "--verify").splitlines()
    said = {line.split()[0]: line for line in lines}
    assert numbers(said["counts"]) == [CASE.n_tokens, len(CASE.sequences), CASE.sequences["document_id"].nunique()]
    held = json.loads(printed(capsys, "info", run, "--verify", "--json"))
    assert list(held["counts"].values()) == numbers(said["counts"])
    assert [held["files"]] == numbers(said["files"]) == [len(list(Path(run).iterdir())) - 1]  # but meta.json
    assert held["verified"] is True


def test_no_name_steers_the_terminal(capsys, tmp_path):
    names = list(NAMES.values())
    hostile = made([3] * len(names), documents=[f"d{i}" for i in range(len(names))], domains=names, layers=(0,))
    path = str(hostile.trace.save(tmp_path / "run").path)
    text = printed(capsys, "stats", path, "expert_share", "--by", "domain")
    assert plain_in_a_terminal(text)
    assert "red" in text
    assert cli.main(["stats", path, "expert_share", "--by", NAMES["terminal"]]) == cli.EXIT_USAGE
    assert plain_in_a_terminal(capsys.readouterr().err)
