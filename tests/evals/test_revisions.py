"""Revisions of data sets that cannot be, and what stands in the way of the Hub: said before anything is asked."""

from __future__ import annotations

import errno

import pytest

import mixlens as ml
from mixlens.cli import main
from mixlens.models.hub import fault_of


def test_revisions_that_cannot_be_are_said(capsys):
    for revisions, said in {
        "main": "That does not say of which. Give a revision for each",
        ("openai/gsm8k",): "That does not say of which",
    }.items():
        with pytest.raises(ml.BadInput, match=said):
            ml.evaluate("demo", "gsm8k_5shot", settings=ml.EvalSettings(revisions=revisions))  # type: ignore[arg-type]
    assert main(["eval", "demo", "demo_0shot", "--data-revision", "openai/gsm8k"]) == 1
    assert "It names no data set or no revision. Write it as in" in capsys.readouterr().err


def test_a_revision_of_a_data_set_that_no_task_reads_is_refused(tmp_path):
    settings = ml.EvalSettings(revisions={"openai/gsm8k": "main"}, progress=False)
    with pytest.raises(ml.BadInput, match="openai/gsm8k was to be read at .* asked for read nothing from the Hub"):
        ml.evaluate(ml.load("demo", verbose=False), "demo_0shot::phrases", settings=settings)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "is full"), (errno.EDQUOT, "is full"), (errno.EACCES, "cannot be written"), (errno.ENOENT, None)],
)
def test_a_cache_that_cannot_be_written_is_told_from_a_hub_out_of_reach(number, said):
    error = ValueError("wrapped")
    error.__cause__ = OSError(number, "as the system says it")
    found = fault_of(error)
    if said is None:
        assert found is None
    else:
        assert found is not None
        assert said in found[0]
        assert "HF_HOME" in found[1]
