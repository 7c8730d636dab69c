"""Every error mixlens raises on purpose. A message is three sentences: what was asked, what was found, what to do."""

from __future__ import annotations

import re

# What steers a terminal or the direction of reading, and half characters that no file in UTF-8 can hold.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control and direction characters as escapes: it may come from a model, a server or a file."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class MixlensError(Exception):
    """Base of all errors that mixlens raises on purpose.

    Programs read the attributes; the wording of the message may change in any version.

    Attributes
    ----------
    argument : str or None
        Name of what was refused: a parameter, a column, a file, a model, a header. None where it is no single thing.
    value : object
        What was given or found for it. None where there is nothing to show; never a key.
    """

    def __init__(self, message: str, *, argument: str | None = None, value: object = None) -> None:
        super().__init__(visible(message))
        self.argument = argument
        self.value = value


class BadInput(MixlensError, ValueError):
    """An argument, a document or a file that cannot be used as it is."""


class RecordingError(BadInput):
    """A forward whose tokens cannot be told: which sequence they continue, or where they stand in it."""


class MissingSignal(MixlensError, LookupError):
    """A statistic or a view needs a signal that the trace was recorded without."""


class ModelError(MixlensError):
    """A model that cannot be loaded, or is not what was asked for."""


class RunError(MixlensError):
    """A run directory that is incomplete, altered, or holds something else."""


class EndpointError(MixlensError):
    """A server that refused, failed, or gave no answer that can be used."""


class SourceError(MixlensError):
    """Routing from an engine, a server or a file that cannot be that of its tokens; `argument` names the fault."""


class SandboxError(MixlensError):
    """Code that a model wrote cannot be run safely on this machine."""
