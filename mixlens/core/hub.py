"""Runs on the Hub, fetched file by file, and readable errors of the Hub's client."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from mixlens.errors import BadInput, RunError

SCHEME = "hf://"
FOLDER = "run"  # in a repository, beside its card
# Path of a file of a data set in the cache of the Hub's client.
_SNAPSHOT = re.compile(r"datasets--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/(.+)$")
_NAME = "Give owner and name as the Hub has them, as in mistralai/Mixtral-8x7B-v0.1"
_OUT_OF_REACH = ("the Hub cannot be reached, and there is no cached copy", "Check the network, or give a local folder.")
# Cause and remedy by name of the client's exception.
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
    "HFValidationError": ("this is not a valid repository name", f"{_NAME}, or a local folder."),
    "OfflineModeIsEnabled": (
        "the Hub is switched off (HF_HUB_OFFLINE), and there is no cached copy",
        "Fetch it once with HF_HUB_OFFLINE unset, or give a local folder.",
    ),
    **dict.fromkeys(("ConnectError", "ReadError", "RemoteProtocolError", "ConnectionError"), _OUT_OF_REACH),
    **dict.fromkeys(("ConnectTimeout", "ReadTimeout", "PoolTimeout"), _OUT_OF_REACH),
}


def fault_of(error: BaseException) -> tuple[str, str] | None:
    """Return the cause (a clause) and remedy (a sentence) for an error of the Hub; None for other errors."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in FAULTS:
            return FAULTS[type(cause).__name__]
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk of the cache is full", "Free space there, or point HF_HOME at a larger disk."
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EROFS):
            return "the cache folder is not writable", "Point HF_HOME at a folder of your own."
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            return f"access was refused ({status})", "Log in with a token that may read it: hf auth login."
        if isinstance(status, int) and status >= 400 and status != 404:
            return f"the Hub answered {status}", "Try again later, or give a local folder."
        cause = cause.__cause__ or cause.__context__
    return None


def snapshot_of(address: str) -> Path:
    """Return the local folder of a run at "hf://owner/name[@revision]", holding only its meta.json so far.

    Other files are fetched when `present` asks for them.

    Raises
    ------
    BadInput
        If the address has no owner or name.
    RunError
        If the repository cannot be read or holds no run.
    """
    from huggingface_hub import HfApi, hf_hub_download

    name, _, revision = address.removeprefix(SCHEME).strip("/").partition("@")
    if name.count("/") != 1:
        raise BadInput(
            f"Cannot open {address}: it lacks an owner or a name. Write it as hf://owner/name.",
            argument="path",
            value=address,
        )
    try:
        commit = HfApi().resolve_revision(name, repo_type="dataset", revision=revision or None).resolved
        meta = hf_hub_download(name, f"{FOLDER}/meta.json", repo_type="dataset", revision=commit)
    except Exception as error:  # the client raises errors of several libraries
        raise _unreadable(address, error) from error
    return Path(meta).parent


def present(path: Path) -> Path:
    """Return the path, after fetching its file if it belongs to a run on the Hub and is not cached yet."""
    match = None if path.exists() else _SNAPSHOT.search(path.as_posix())
    if match is not None:
        from huggingface_hub import hf_hub_download

        owner, name, commit, file = match.groups()
        try:
            hf_hub_download(f"{owner}/{name}", file, repo_type="dataset", revision=commit)
        except Exception as error:  # as above
            raise _unreadable(f"{file} of {SCHEME}{owner}/{name}", error) from error
    return path


def _unreadable(what: str, error: Exception) -> RunError:
    absent = ("there is no such file in it", "Check that a run was pushed there with ml.push.")
    lacking = type(error).__name__ in ("EntryNotFoundError", "RemoteEntryNotFoundError")
    found, do = absent if lacking else fault_of(error) or (first_line(error), "Check the name and the network.")
    return RunError(f"Cannot read {what}: {found}. {do}", argument="path", value=what)


def first_line(error: Exception) -> str:
    """Return the first line of an error, or its type, without a full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
