"""Check the inputs of statistics: signals, clusters and token ids."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mixlens.core.bootstrap import DEFAULT, Bootstrap
from mixlens.errors import BadInput, MissingSignal
from mixlens.stats.clusters import group_columns

if TYPE_CHECKING:
    from mixlens.trace.trace import Trace


def require(trace: Any, what: str, *signals: str, bootstrap: Any = DEFAULT) -> None:
    """Raise BadInput unless given a trace and a Bootstrap, MissingSignal if the trace lacks a signal."""
    if not callable(getattr(trace, "require", None)):
        raise BadInput(
            f"Cannot compute {what}: expected a trace, got {type(trace).__name__}. Pass what ml.record, a Recorder or "
            "ml.open returns.",
            argument="trace",
            value=type(trace).__name__,
        )
    if not isinstance(bootstrap, Bootstrap):
        raise BadInput(
            f"Cannot compute {what} with bootstrap={bootstrap!r}: expected a Bootstrap. Pass "
            "ml.stats.Bootstrap(replicates=1000), or leave it out.",
            argument="bootstrap",
            value=bootstrap,
        )
    trace.require(what, *signals)


def clustered(trace: Trace, cluster: str | None) -> Trace:
    """Return a view of the trace in which a column of its sequences replaces documents as the independent unit.

    Raises BadInput for a column that does not exist or has missing values.
    """
    if cluster is None or not isinstance(getattr(trace, "sequences", None), pd.DataFrame):
        return trace
    group_columns(trace, cluster, "cluster")
    own = copy.copy(trace)
    own.cluster = cluster
    return own


def with_ids(trace: Trace, what: str) -> Trace:
    """Return the tokens that have an id; a model given embeddings read others without.

    Raises MissingSignal if none has.
    """
    known = np.unique(np.concatenate([[-1], *(np.unique(block["token_id"]) for block in trace.blocks("token_id"))]))
    if trace.n_tokens and len(known) == 1 and trace.reduce is None:
        raise MissingSignal(
            f"Cannot compute {what}: its tokens have no ids, because the model was given embeddings. Record a "
            "forward of token ids.",
            argument="token_id",
        )
    lacking = any(bool((block["token_id"] < 0).any()) for block in trace.blocks("token_id"))
    return trace.select(tokens=known[1:].tolist()) if lacking else trace
