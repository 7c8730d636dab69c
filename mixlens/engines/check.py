"""Checks of routing from an engine, a server or a file.

The checks cover ten faults that real engines have had. What can be corrected without guessing (padding at the ends,
layers without routers, slots of shared experts, a row for the last token) is corrected and counted; anything else is
refused with the name of the fault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixlens.errors import SourceError
from mixlens.trace.shards import MOST_EXPERTS, id_dtype

FAULTS = {
    "missing_rows": "fewer rows than tokens that the model read",
    "sentinels": "-1, or the largest number of a type, where an expert should be",
    "stale_rows": "rows that belong to other tokens, as of a reused block of the cache",
    "duplicates": "an expert twice for one token, as in rows that were never written",
    "out_of_range": "ids of experts that the model does not have",
    "shared_experts": "markers of shared experts among the routed ones",
    "physical_ids": "ids of copies made for load balancing, in place of the experts of the model",
    "layers": "layers without routers counted in, so that layers are offset; or a layer twice",
    "last_token": "a row for the last token, which no forward read, so that prompt and answer are misaligned",
    "padding": "rows before or after those of the tokens",
}
_SHAPE = "ids are whole numbers [token, layer, slot]"
_SENTINELS = (-1, 2**8 - 1, 2**15 - 1, 2**16 - 1, 2**31 - 1)
# Eight consecutive rows with the routing of eight other tokens never occur by chance in 23,961 tokens of the bundled
# model, even with only two of its layers; with a single layer, sixteen rows are needed.
_WINDOW, _WINDOW_OF_ONE_LAYER = 8, 16
_REPEATED, _VARIED = 16, 4  # tokens, and distinct choices among them, for which two layers never agree by chance
_REMEMBERED = 32_768
_BY_CHANCE = 1e-3
_EXPLAINED = 0.9  # minimum share of choices that a fault must explain
_REPLICAS = 0.01  # minimum share of ids beyond the experts that indicates copies rather than an error


@dataclass(frozen=True)
class Routers:
    """Shape of a model's routers.

    Parameters
    ----------
    n_experts, top_k : int
        Experts per layer, and experts per token.
    layers : tuple[int, ...]
        Numbers of the layers with routers, counted over all layers.
    n_layers : int
        Number of all layers, including those without routers.
    n_physical : int, optional
        Number of experts including copies, if a server balances its load with copies.
    """

    n_experts: int
    top_k: int
    layers: tuple[int, ...]
    n_layers: int
    n_physical: int | None = None

    @classmethod
    def of(cls, model: Any) -> Routers:
        """Read the shape of the routers from a model, whose weights are not needed.

        Raises
        ------
        SourceError
            If its layers choose different numbers of experts, which the ids of servers cannot represent.
        """
        from mixlens.models.layout import config_of, moe_layers, n_experts  # imported here because torch is slow

        found = moe_layers(model)
        chosen = {layer.top_k for layer in found}
        if len(chosen) > 1:
            raise SourceError(
                f"Cannot read routing of this model from elsewhere: its layers choose {sorted(chosen)} experts, and "
                "arrays of ids have one number for all layers. Record it with transformers.",
                argument="top_k",
                value=sorted(chosen),
            )
        layers = tuple(layer.index for layer in found)
        return cls(n_experts(model), chosen.pop(), layers, int(config_of(model).num_hidden_layers))


class Checker:
    """Checks the routing of requests in sequence, and remembers rows to detect stale ones.

    Parameters
    ----------
    routers : Routers
        Routers of the model that reads the requests.

    Examples
    --------
    >>> from mixlens.engines.check import Checker, Routers
    >>> checker = Checker(Routers(n_experts=4, top_k=2, layers=(0,), n_layers=1))
    >>> checker.check(np.array([[[0, 2]], [[-1, -1]]]), prompt=1, generated=1).tolist()
    [[[0, 2]]]
    >>> checker.about()["corrected"]
    {'last_token': 1}
    """

    def __init__(self, routers: Routers) -> None:
        self.routers = routers
        self._requests = self._rows = self._rows_without_tokens = self._rows_alike = 0
        self._corrected: dict[str, int] = {}
        window = _WINDOW if len(routers.layers) > 1 else _WINDOW_OF_ONE_LAYER
        self._hashes, self._tokens = np.zeros(0, np.uint64), np.zeros((0, window), np.int64)
        self._window = window

    def check(
        self,
        ids: Any,
        *,
        prompt: int,
        generated: int,
        token_ids: Any = None,
        prompt_rows: int | None = None,
        start: int = 0,
    ) -> np.ndarray:
        """Return the routing of a request, with one row for every token that a forward pass read.

        Parameters
        ----------
        ids : Any
            Received ids as integers [row, layer, slot].
        prompt, generated : int
            Number of tokens of the prompt and of the answer; no forward pass reads the last token of the answer.
        token_ids : Any, optional
            Ids of all these tokens; without them, stale rows cannot be detected.
        prompt_rows : int, optional
            Number of rows received for the prompt, if reported.
        start : int, optional
            Number of tokens at the beginning whose rows were not requested.

        Returns
        -------
        numpy.ndarray
            Integers [token, layer, slot] for the layers with routers; uint8, or uint16 above 256 experts.

        Raises
        ------
        SourceError
            If the routing is faulty; `argument` is one of FAULTS, or "shape" if `ids` is not an array of ids.
        """
        ids = np.asarray(ids)
        if ids.ndim != 3 or ids.dtype.kind not in "iu" or self.routers.n_experts > MOST_EXPERTS:
            raise self._fault("shape", f"ids have shape {ids.shape} and dtype {ids.dtype}")
        ids = ids.astype(np.int64)
        corrected: dict[str, int] = {}
        ids = self._slots(self._layers(ids, corrected), corrected)
        if prompt_rows is not None and prompt_rows != prompt - start:
            raise self._fault("last_token", f"{prompt_rows} rows came for {prompt - start} tokens of the prompt")
        ids = self._whole(ids, prompt + max(generated - 1, 0) - start, corrected)
        self._values(ids)
        self._repeated(ids)
        if token_ids is None:
            self._rows_without_tokens += len(ids)
        else:
            self._stale(ids, np.asarray(token_ids, np.int64)[start : start + len(ids)])
        self._requests, self._rows = self._requests + 1, self._rows + len(ids)
        for name, n in corrected.items():
            self._corrected[name] = self._corrected.get(name, 0) + n
        return ids.astype(id_dtype(self.routers.n_experts))

    def about(self) -> dict[str, Any]:
        """Return what was checked and corrected since the previous call, as plain JSON values."""
        unchecked = {}
        if self._rows_without_tokens:
            unchecked["stale_rows"] = "rows came without token ids"
        elif self._rows_alike:
            unchecked["stale_rows"] = "rows of different tokens are too much alike"
        for name, fault in (("layers", "another layer"), ("last_token", "the token beside")):
            unchecked[name] = f"ids of {fault}, all shifted by one, look like others"
        if self.routers.n_physical is None:
            unchecked["physical_ids"] = "ids that are permuted, and not beyond the experts, look like others"
        found = {
            "requests": self._requests,
            "rows": self._rows,
            "checked": list(FAULTS),
            "partly_checked": unchecked,
            "corrected": dict(self._corrected),
        }
        self._requests = self._rows = self._rows_without_tokens = self._rows_alike = 0
        self._corrected = {}
        return found

    # ------------------------------------------------------------------ one fault each

    def _layers(self, ids: np.ndarray, corrected: dict[str, int]) -> np.ndarray:
        """Remove the layers without a router, which must be empty; the others must not be."""
        known, width = self.routers, ids.shape[1]
        wanted = np.asarray(known.layers)
        if width not in (len(wanted), known.n_layers):
            raise self._fault("layers", f"{width} layers came, but {len(wanted)} of {known.n_layers} have routers")
        counted_in = width > len(wanted)
        of_dense = np.setdiff1d(np.arange(known.n_layers), wanted) if counted_in else np.zeros(0, int)
        routed = ids[:, wanted] if counted_in else ids
        filled = of_dense[~_empty(ids[:, of_dense]).all(0)] if len(ids) else []
        blank = wanted[_unwritten(routed, known.n_experts).all(0)] if len(ids) else []
        if len(filled) or 0 < len(blank) < len(wanted):
            where = [f"layers {[int(n) for n in filled]} without a router have ids"] if len(filled) else []
            where += [f"layers {[int(n) for n in blank]} with a router have none"] if len(blank) else []
            raise self._fault("layers", "; ".join(where))
        if len(of_dense):
            corrected["layers"] = len(of_dense)
        return routed

    def _slots(self, ids: np.ndarray, corrected: dict[str, int]) -> np.ndarray:
        """Remove the last slots if they hold shared experts."""
        experts, k = self.routers.n_experts, self.routers.top_k
        extra = ids.shape[2] - k
        if extra < 0:
            raise self._fault("shape", f"{ids.shape[2]} experts per token were received, but a token chooses {k}")
        marks = ids[..., k:]
        constant = len(ids) > 0 and (marks == marks[:1, :1]).all() and not ((marks >= 0) & (marks < experts)).any()
        if extra and not constant:
            raise self._fault("shared_experts", f"{ids.shape[2]} experts per token were received instead of {k}")
        kept = ids[..., :k]
        always = ((kept >= experts) & (kept < experts + k)).all((0, 1)) & (len(ids) > 0) & (k > 1)
        if always.any() and not always.all():
            slots = np.flatnonzero(always).tolist()
            raise self._fault("shared_experts", f"slots {slots} hold {int(kept[0, 0, slots[0]])} for every token")
        if extra:
            corrected["shared_experts"] = extra
        return kept

    def _whole(self, ids: np.ndarray, wanted: int, corrected: dict[str, int]) -> np.ndarray:
        """Return one row per token, without empty rows before or after them."""
        extra = len(ids) - wanted
        if extra < 0:
            raise self._fault("missing_rows", f"{len(ids)} rows came for {wanted} tokens")
        if extra == 0:
            return ids
        name = "last_token" if extra == 1 else "padding"
        for kept, rest in ((ids[:wanted], ids[wanted:]), (ids[extra:], ids[:extra])):
            alike = len(rest) > 1 and (rest == rest[:1]).all() and not (kept[-1:] == rest[:1]).all()
            if alike or _unwritten(rest, self.routers.n_experts).all():
                corrected[name] = extra
                return kept
        raise self._fault(name, f"{len(ids)} rows came for {wanted} tokens, and none is empty")

    def _values(self, ids: np.ndarray) -> None:
        known = self.routers
        beyond = (ids < 0) | (ids >= known.n_experts)
        sentinel = beyond & np.isin(ids, _SENTINELS)
        if sentinel.any():
            raise self._fault("sentinels", f"{_place(sentinel, known.layers)}: {int(ids[sentinel][0])}")
        if beyond.any():
            worst = int(ids[beyond].max())
            most = 2 * known.n_experts if known.n_physical is None else known.n_physical
            copies = (ids >= 0).all() and worst < most
            copies &= known.n_physical is not None or (beyond.mean() >= _REPLICAS and (ids == 0).any())  # no 0: from 1
            where = f"{_place(beyond, known.layers)}: {worst}, and there are {known.n_experts} experts"
            raise self._fault("physical_ids" if copies else "out_of_range", where)
        ordered = np.sort(ids, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
        if twice.any():
            token, layer = np.argwhere(twice)[0]
            raise self._fault("duplicates", f"{_place(twice, known.layers)}: {ids[token, layer].tolist()}")

    def _repeated(self, ids: np.ndarray) -> None:
        """Refuse a layer with the ids of the previous layer for many tokens, which never happens by chance."""
        same = (np.sort(ids[:, 1:], -1) == np.sort(ids[:, :-1], -1)).all((0, 2))
        for at in np.flatnonzero(same) if len(ids) >= _REPEATED else []:
            if len(np.unique(np.sort(ids[:, at], -1), axis=0)) >= _VARIED:
                pair = f"{self.routers.layers[at]} and {self.routers.layers[at + 1]}"
                raise self._fault("layers", f"layers {pair} have the same ids for all of {len(ids)} tokens")

    def _stale(self, ids: np.ndarray, tokens: np.ndarray) -> None:
        """Refuse windows of rows that equal those of an earlier window although their tokens differ."""
        n, window = len(ids) - self._window + 1, self._window
        if n < 1:
            return
        weights = np.random.default_rng(0).integers(1, 2**63, ids.shape[1] * ids.shape[2], dtype=np.uint64) | np.uint64(
            1
        )
        rows = (ids.reshape(len(ids), -1).astype(np.uint64) * weights).sum(1, dtype=np.uint64)
        _, counts = np.unique(rows, return_counts=True)
        alike = (counts * (counts - 1)).sum() / max(len(rows) * (len(rows) - 1), 1)
        if alike**window * (len(self._hashes) + n) ** 2 > _BY_CHANCE:  # as with collapsed routers
            self._rows_alike += len(rows)
            return
        hashes = np.zeros(n, np.uint64)
        for place in range(window):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + rows[place : place + n]
        read = np.lib.stride_tricks.sliding_window_view(tokens, window)
        every, of = np.concatenate([self._hashes, hashes]), np.concatenate([self._tokens, read])
        order = np.argsort(every, kind="stable")
        # Compare each window with the previous window that has the same rows.
        same = np.flatnonzero(every[order[1:]] == every[order[:-1]])
        earlier, later = order[same], order[same + 1]
        other = (of[earlier] != of[later]).sum(1) >= window * 3 // 4
        if other.any():
            row = int(later[other].min()) - len(self._hashes)
            raise self._fault("stale_rows", f"rows {row} to {row + window - 1} are those of other tokens")
        self._hashes, self._tokens = every[-_REMEMBERED:], of[-_REMEMBERED:]

    def _fault(self, name: str, found: str) -> SourceError:
        return SourceError(
            f"Cannot use this routing ({name}): {FAULTS.get(name, _SHAPE)}. In request {self._requests}, {found}. "
            f"{_REMEDIES[name]}",
            argument=name,
            value=found,
        )


_REMEDIES: Mapping[str, str] = {
    **dict.fromkeys(
        [*FAULTS, "shape"], "Update the server, or record with a local model; ml.compare with one shows where."
    ),
    **dict.fromkeys(("out_of_range", "layers", "shape"), "Check that the model named is the one that was served."),
    "sentinels": "The recorder did not see these tokens: update the server, or record with a local model.",
    "stale_rows": "Disable prefix caching and cache transfers, or update the server.",
    "physical_ids": "Disable load balancing of experts, or have the server return logical ids.",
}


def combined(checks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine several checks for `Trace.meta["source_check"]`: everything that any corrected or could not check."""
    corrected: dict[str, int] = {}
    for check in checks:
        for name, n in check["corrected"].items():
            corrected[name] = corrected.get(name, 0) + n
    return {
        "requests": sum(check["requests"] for check in checks),
        "rows": sum(check["rows"] for check in checks),
        "checked": list(FAULTS),
        "partly_checked": {name: why for check in checks for name, why in check["partly_checked"].items()},
        "corrected": corrected,
    }


def _empty(ids: np.ndarray) -> np.ndarray:
    """Return whether all slots of all rows hold the same number, as if never written: bool [row, layer]."""
    return (ids == ids[:1, :, :1]).all(-1)


def _unwritten(ids: np.ndarray, n_experts: int) -> np.ndarray:
    """Return whether all slots hold sentinels or one number, which no real choice has: bool [row, layer]."""
    sentinel = (np.isin(ids, _SENTINELS) & ((ids < 0) | (ids >= n_experts))).all(-1)
    return np.asarray(sentinel | (ids == ids[..., :1]).all(-1) if ids.shape[-1] > 1 else sentinel)


def _place(found: np.ndarray, layers: tuple[int, ...]) -> str:
    row, layer = np.argwhere(found)[0][:2]
    return f"{int(found.sum()):,} places, the first in row {int(row)}, layer {layers[int(layer)]}"


def explained(ids: np.ndarray, others: np.ndarray, position: np.ndarray) -> tuple[str, str] | None:
    """Find the fault that explains why routing differs from that of a local model.

    Covers faults that ids alone do not show: renumbered experts, and shifted layers or tokens.

    Parameters
    ----------
    ids, others : numpy.ndarray
        Received ids, and the choices of a local model for the same tokens [token, layer, slot].
    position : numpy.ndarray
        Position of each token in its sequence.

    Returns
    -------
    tuple[str, str] or None
        Name of the fault and a description; None if no fault explains the difference.
    """
    if _alike(ids, others) > _EXPLAINED:
        return None
    for shift in (1, -1, 2, -2, 3, -3):
        if abs(shift) < ids.shape[1] - 1 and _alike(_shifted(ids, shift, 1), _shifted(others, -shift, 1)) > _EXPLAINED:
            return "layers", f"the ids are those of {abs(shift)} layers {'before' if shift > 0 else 'after'}"
    inside = np.flatnonzero(position > 0)
    for rows, others_rows, where in ((inside, inside - 1, "before"), (inside - 1, inside, "after")):
        if len(inside) and _alike(ids[rows], others[others_rows]) > _EXPLAINED:
            return "last_token", f"the ids are those of the token {where}"
    renamed = np.stack([_renamed(ids[:, at], others[:, at]) for at in range(ids.shape[1])], axis=1)
    if _alike(renamed, others) > _EXPLAINED:
        return "physical_ids", "the ids are those of experts under other numbers"
    return None


def _alike(ids: np.ndarray, others: np.ndarray) -> float:
    """Return the share of tokens and layers with the same set of experts."""
    return float((np.sort(ids, -1) == np.sort(others, -1)).all(-1).mean())


def _shifted(ids: np.ndarray, by: int, axis: int) -> np.ndarray:
    return np.take(ids, range(max(by, 0), ids.shape[axis] + min(by, 0)), axis)


def _renamed(ids: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Renumber the ids of one layer [token, slot], replacing each expert by the one most often chosen with it."""
    n = int(max(ids.max(), others.max())) + 1
    together = np.zeros((n, n), np.int64)
    np.add.at(together, (ids[:, :, None], others[:, None, :]), 1)
    return together.argmax(1)[ids]
