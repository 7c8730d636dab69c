"""The Hub: which commit a name stands for, and what lies beside a model's weights."""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi


def commit_of(name: str, revision: str | None = None, *, kind: str = "model") -> str:
    """The commit that a branch, a tag or main is at; where the Hub cannot be reached, the one that was seen last.

    kind  "model" or "dataset"

    Raises what the Hub's client raises, which core.hub.fault_of explains.
    """
    return HfApi().resolve_revision(name, repo_type=kind, revision=revision).resolved


def safetensors_of(name: str, commit: str) -> list[str]:
    """Names of the safetensors that a model has on the Hub. Raises what the Hub's client raises."""
    listed = HfApi().model_info(name, revision=commit).siblings or []
    return [file.rfilename for file in listed if file.rfilename.endswith(".safetensors")]


def tokenizer_beside(model: Any) -> Any:
    """The tokenizer that lies beside a model's weights, of the same commit.

    Raises OSError or ValueError, as transformers does, where there is none.
    """
    from transformers import AutoTokenizer  # which takes a second to import

    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    return AutoTokenizer.from_pretrained(
        str(getattr(model, "name_or_path", "")), revision=revision or "main", trust_remote_code=False
    )
