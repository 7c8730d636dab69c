"""Documents whose tokens are not independent, drawn around shares that are known."""

from __future__ import annotations

import numpy as np

SHARES = np.array([0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04])


def clustered(rng, shares, *, n_documents, spread, concentration, n_layers, length=60, sequences=None):
    """Documents of lognormal length, whose tokens follow a Dirichlet draw of their own around `shares`.

    Every layer is an experiment of its own. `shares` [choice], or [document, choice] where documents differ; `length`
    is the mean number of tokens.
    """
    lengths = np.maximum(10, rng.lognormal(-(spread**2) / 2, spread, n_documents) * length).astype(int)
    document = np.repeat(np.arange(n_documents), lengths)
    layers = []
    for _ in range(n_layers):
        draw = rng.standard_gamma(np.broadcast_to(shares * concentration, (n_documents, shares.shape[-1])))
        edges = (draw / draw.sum(-1, keepdims=True)).cumsum(-1)[document, :-1]
        layers.append((rng.random(len(document))[:, None] > edges).sum(-1))
    return np.stack(layers, axis=1), {"sequence": document}, sequences
