"""Exceptions of mixlens. A message says what failed and why, then the remedy."""

from __future__ import annotations

import re

# Terminal control and bidirectional formatting characters, and surrogates, which UTF-8 cannot encode.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """Escape control and direction characters in text from a model, a server or a file."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class MixlensError(Exception):
    """Base class of the exceptions of mixlens.

    Programs read the attributes; the wording of the message may change in any version.

    Attributes
    ----------
    argument : str or None
        Name of the offending parameter, column, file, model or header. None if no single thing is at fault.
    value : object
        Value given or found for it, never a key. None if there is none.
    """

    def __init__(self, message: str, *, argument: str | None = None, value: object = None) -> None:
        super().__init__(visible(message))
        self.argument = argument
        self.value = value


class BadInput(MixlensError, ValueError):
    """An argument, a document or a file is invalid."""


class RecordingError(BadInput):
    """A forward pass has tokens whose sequence or position cannot be determined."""


class MissingSignal(MixlensError, LookupError):
    """A statistic or a view needs a signal that the trace does not have."""


class ModelError(MixlensError):
    """A model cannot be loaded, or is not the expected one."""


class RunError(MixlensError):
    """A run directory is incomplete, altered, or holds something else."""


class EndpointError(MixlensError):
    """A server refused, failed, or gave no usable answer."""


class SourceError(MixlensError):
    """Routing from an engine, a server or a file does not fit its tokens; `argument` names the fault."""


class SandboxError(MixlensError):
    """Code written by a model cannot be run safely on this machine."""
