"""The Hub: which commit a name stands for, and what an error of its client means to the caller."""

from __future__ import annotations

import errno
from typing import Any

from huggingface_hub import HfApi

_NAME = "Give owner and name as the Hub has them, as in mistralai/Mixtral-8x7B-v0.1"
_OUT_OF_REACH = ("the Hub cannot be reached, and it is not cached", "Check the network, or give a local folder.")
# By name of the client's exception: what was found, and what to do.
FAULTS = {
    "GatedRepoError": ("access to it is restricted", "Ask for access on its page there, then log in: hf auth login."),
    "RepositoryNotFoundError": (
        "there is no such repository, or it is private",
        f"{_NAME}; for a private one log in: hf auth login.",
    ),
    "RevisionNotFoundError": (
        "it has no such revision",
        "Give one of its branches, tags or commits, or none for main.",
    ),
    "HFValidationError": ("that is no name of a repository", f"{_NAME}, or a folder that is here."),
    "OfflineModeIsEnabled": (
        "the Hub is switched off (HF_HUB_OFFLINE), and it is not cached",
        "Fetch it once with HF_HUB_OFFLINE unset, or give a local folder.",
    ),
    **dict.fromkeys(("ConnectError", "ReadError", "RemoteProtocolError", "ConnectionError"), _OUT_OF_REACH),
    **dict.fromkeys(("ConnectTimeout", "ReadTimeout", "PoolTimeout"), _OUT_OF_REACH),
}


def commit_of(name: str, revision: str | None = None, *, kind: str = "model") -> str:
    """The commit that a branch, a tag or main is at; where the Hub cannot be reached, the one that was seen last.

    kind  "model" or "dataset"

    Raises what the Hub's client raises, which `fault_of` explains.
    """
    return HfApi().resolve_revision(name, repo_type=kind, revision=revision).resolved


def safetensors_of(name: str, commit: str) -> list[str]:
    """Names of the safetensors that a model has on the Hub. Raises what the Hub's client raises."""
    listed = HfApi().model_info(name, revision=commit).siblings or []
    return [file.rfilename for file in listed if file.rfilename.endswith(".safetensors")]


def fault_of(error: BaseException) -> tuple[str, str] | None:
    """What stood in the way of reading from the Hub (a clause), and what to do (a sentence); None for other errors."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in FAULTS:
            return FAULTS[type(cause).__name__]
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk that it is kept on is full", "Make room there, or point HF_HOME at a larger disk."
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS):
            return "the folder that it is kept in cannot be written", "Point HF_HOME at a folder of your own."
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            return f"access was refused ({status})", "Log in with a token that may read it: hf auth login."
        if isinstance(status, int) and status >= 400 and status != 404:
            return f"the Hub answered {status}", "Try again later, or give a local folder."
        cause = cause.__cause__ or cause.__context__
    return None


def tokenizer_beside(model: Any) -> Any:
    """The tokenizer that lies beside a model's weights, of the same commit.

    Raises OSError or ValueError, as transformers does, where there is none.
    """
    from transformers import AutoTokenizer  # which takes a second to import

    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    return AutoTokenizer.from_pretrained(
        str(getattr(model, "name_or_path", "")), revision=revision or "main", trust_remote_code=False
    )
