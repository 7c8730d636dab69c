"""Benchmarks on the Hub: their repositories, the commits that an evaluation reads, and their splits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.cache.cache import Cache

from mixlens.core.hub import FAULTS, fault_of
from mixlens.errors import BadInput
from mixlens.models.hub import commit_of

# Keys are the names in task files (metadata: hub).
HUB = {
    "mmlu": "cais/mmlu",
    "humaneval": "openai/openai_humaneval",
    "gsm8k": "openai/gsm8k",
    "mbpp": "google-research-datasets/mbpp",
    "math": "EleutherAI/hendrycks_math",
    "arc": "allenai/ai2_arc",
    "hellaswag": "Rowan/hellaswag",
    "m_arc": "alexandrainst/m_arc",
    "m_hellaswag": "alexandrainst/m_hellaswag",
    "m_mmlu": "alexandrainst/m_mmlu",
}


def commits_of(benchmarks: Collection[str], asked: Mapping[str, str], kept: Mapping[str, str]) -> dict[str, str]:
    """Return the commit to read for the repository of every benchmark.

    asked   branches, tags or commits, by repository
    kept    commits of repositories not in `asked`; all others are read at main

    Raises BadInput for a repository that no benchmark reads, or that cannot be reached on the Hub.
    """
    repositories = sorted({HUB[benchmark] for benchmark in benchmarks})
    if strangers := sorted(set(asked) - set(repositories)):
        raise BadInput(
            f"Cannot pin {', '.join(strangers)} to a revision: the chosen protocols read "
            f"{', '.join(repositories) or 'nothing'} from the Hub. Name one of these, or leave it out.",
            argument="revisions",
            value=strangers,
        )
    wanted = {**kept, **asked}
    return {repository: _commit(repository, wanted.get(repository)) for repository in repositories}


def splits_of(benchmark: str, subset: str, revisions: Mapping[str, str] | None) -> dict[str, datasets.Dataset]:
    """Return the splits of one subset, by name, from the cache if it has the commit.

    revisions  commits by repository from commits_of; None, as in lm-eval without mixlens, reads main

    Raises BadInput if neither the cache nor the Hub has them.
    """
    repository = HUB[benchmark]
    commit = (revisions or {}).get(repository) or _commit(repository, None)
    what = f"{repository} ({subset}, {commit})"
    name = repository.partition("/")[2]
    builder: Any = Cache(repo_id=repository, dataset_name=name, config_name=subset, hash=commit)
    try:
        if not Path(builder.cache_dir).is_dir():
            builder = datasets.load_dataset_builder(repository, subset, revision=commit)
        if builder.hash == commit:
            builder.download_and_prepare()
            return dict(builder.as_dataset())
    except Exception as error:  # from datasets, the Hub client or pyarrow
        raise _not_given(what, error) from error
    raise BadInput(  # datasets falls back to another cached commit if the Hub does not answer
        f"Cannot read the data set {what}: the Hub did not answer, and only {builder.hash} is cached. Check the "
        "network, or pass that commit (EvalSettings(revisions=...), --data-revision).",
        argument="revisions",
        value=builder.hash,
    )


def _commit(repository: str, revision: str | None) -> str:
    try:
        return commit_of(repository, revision, kind="dataset")
    except Exception as error:  # the Hub client raises many unrelated classes
        raise _not_given(repository, error) from error


def _not_given(what: str, error: Exception) -> BadInput:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    found, do = fault_of(error) or (said, "Check the network, or pass a local folder as data=.")
    if "is a gated dataset" in said:  # datasets replaces the exception of the client
        found, do = FAULTS["GatedRepoError"]
    if found == FAULTS["RepositoryNotFoundError"][0]:  # the caller did not choose the name
        do = "Pass a folder with the benchmark in its original format as data=."
    return BadInput(
        f"Cannot read the data set {what} from the Hub: {found}. {do}",
        argument="data",
        value=what,
    )
