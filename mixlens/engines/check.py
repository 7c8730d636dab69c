"""Validation of routing from an engine, a server or a file.

Ten known faults of real engines are tested. Faults that can be corrected without guessing (padding at the ends, layers
without routers, slots of shared experts, a row for the last token) are corrected and noted; others are refused by name.
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
# Eight rows in a row with the routing of eight other tokens: never by chance in 23,961 tokens of the bundled model, not
# even if it had two layers; with a single layer sixteen.
_WINDOW, _WINDOW_OF_ONE_LAYER = 8, 16
_REPEATED, _VARIED = 16, 4  # tokens, and different choices among them, for which two layers never agree throughout
_REMEMBERED = 32_768
_BY_CHANCE = 1e-3
_EXPLAINED = 0.9  # share of choices that a fault has to explain
_REPLICAS = 0.01  # from this share of ids on, those beyond the experts are copies rather than a slip


@dataclass(frozen=True)
class Routers:
    """Known properties of a model's routers.

    Parameters
    ----------
    n_experts, top_k : int
        Experts of a layer, and those that a token chooses.
    layers : tuple[int, ...]
        Numbers of the layers that have routers, counted through all layers.
    n_layers : int
        All layers, with those that have none.
    n_physical : int, optional
        Experts and their copies, where a server balances its load with copies.
    """

    n_experts: int
    top_k: int
    layers: tuple[int, ...]
    n_layers: int
    n_physical: int | None = None

    @classmethod
    def of(cls, model: Any) -> Routers:
        """Of a model, which may be one without weights.

        Raises
        ------
        SourceError
            If its layers choose different numbers of experts, which the ids of servers cannot say.
        """
        from mixlens.models.layout import config_of, moe_layers, n_experts  # torch takes seconds to import

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
    """Checks the routing of one request after the other, and remembers rows, to know them again.

    Parameters
    ----------
    routers : Routers
        Of the model that the requests are read by.

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
        """Return the routing of a request, one row for every token that a forward read.

        Parameters
        ----------
        ids : Any
            Integers [row, layer, slot] as they came.
        prompt, generated : int
            Tokens of the prompt and of the answer, the last of which no forward reads.
        token_ids : Any, optional
            Ids of all these tokens; without them stale rows cannot be found.
        prompt_rows : int, optional
            How many of the rows came as those of the prompt, where that was said.
        start : int, optional
            Tokens at the beginning that have no rows because they were not asked for.

        Returns
        -------
        numpy.ndarray
            uint8, or uint16 above 256 experts [token, layer, slot], for the layers that have routers.

        Raises
        ------
        SourceError
            Whose `argument` is one of FAULTS, or "shape" for what is no array of ids.
        """
        ids = np.asarray(ids)
        if ids.ndim != 3 or ids.dtype.kind not in "iu" or self.routers.n_experts > MOST_EXPERTS:
            raise self._fault("shape", f"ids of shape {ids.shape} and dtype {ids.dtype} came")
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
        """Return what was checked and corrected since this was last asked, as plain JSON values."""
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
        """Remove layers without a router, which must be empty, unlike the others."""
        known, width = self.routers, ids.shape[1]
        wanted = np.asarray(known.layers)
        if width not in (len(wanted), known.n_layers):
            raise self._fault("layers", f"{width} layers came, and {len(wanted)} of {known.n_layers} have routers")
        counted_in = width > len(wanted)
        of_dense = np.setdiff1d(np.arange(known.n_layers), wanted) if counted_in else np.zeros(0, int)
        routed = ids[:, wanted] if counted_in else ids
        filled = of_dense[~_empty(ids[:, of_dense]).all(0)] if len(ids) else []
        blank = wanted[_unwritten(routed, known.n_experts).all(0)] if len(ids) else []
        if len(filled) or 0 < len(blank) < len(wanted):
            where = [f"layers {[int(n) for n in filled]}, which have no router, have ids"] if len(filled) else []
            where += [f"layers {[int(n) for n in blank]}, which have one, have none"] if len(blank) else []
            raise self._fault("layers", "; ".join(where))
        if len(of_dense):
            corrected["layers"] = len(of_dense)
        return routed

    def _slots(self, ids: np.ndarray, corrected: dict[str, int]) -> np.ndarray:
        """Remove the last slots if they hold shared experts."""
        experts, k = self.routers.n_experts, self.routers.top_k
        extra = ids.shape[2] - k
        if extra < 0:
            raise self._fault("shape", f"{ids.shape[2]} experts a token came, and a token chooses {k}")
        marks = ids[..., k:]
        constant = len(ids) > 0 and (marks == marks[:1, :1]).all() and not ((marks >= 0) & (marks < experts)).any()
        if extra and not constant:
            raise self._fault("shared_experts", f"{ids.shape[2]} experts a token came, and a token chooses {k}")
        kept = ids[..., :k]
        always = ((kept >= experts) & (kept < experts + k)).all((0, 1)) & (len(ids) > 0) & (k > 1)
        if always.any() and not always.all():
            slots = np.flatnonzero(always).tolist()
            raise self._fault("shared_experts", f"slots {slots} hold {int(kept[0, 0, slots[0]])} for every token")
        if extra:
            corrected["shared_experts"] = extra
        return kept

    def _whole(self, ids: np.ndarray, wanted: int, corrected: dict[str, int]) -> np.ndarray:
        """Remove empty rows before and after the tokens, leaving one row per token."""
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
        raise self._fault(name, f"{len(ids)} rows came for {wanted} tokens, and none of them are empty")

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
            copies &= known.n_physical is not None or (beyond.mean() >= _REPLICAS and (ids == 0).any())  # else from 1
            where = f"{_place(beyond, known.layers)}: {worst}, and there are {known.n_experts} experts"
            raise self._fault("physical_ids" if copies else "out_of_range", where)
        ordered = np.sort(ids, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
        if twice.any():
            token, layer = np.argwhere(twice)[0]
            raise self._fault("duplicates", f"{_place(twice, known.layers)}: {ids[token, layer].tolist()}")

    def _repeated(self, ids: np.ndarray) -> None:
        """Refuse a layer with the ids of the previous one for many tokens, which never happens by chance."""
        same = (np.sort(ids[:, 1:], -1) == np.sort(ids[:, :-1], -1)).all((0, 2))
        for at in np.flatnonzero(same) if len(ids) >= _REPEATED else []:
            if len(np.unique(np.sort(ids[:, at], -1), axis=0)) >= _VARIED:
                pair = f"{self.routers.layers[at]} and {self.routers.layers[at + 1]}"
                raise self._fault("layers", f"layers {pair} have the same ids for all of {len(ids)} tokens")

    def _stale(self, ids: np.ndarray, tokens: np.ndarray) -> None:
        """Refuse windows of rows that repeat an earlier window with other tokens."""
        n, window = len(ids) - self._window + 1, self._window
        if n < 1:
            return
        weights = np.random.default_rng(0).integers(1, 2**63, ids.shape[1] * ids.shape[2], dtype=np.uint64) | np.uint64(
            1
        )
        rows = (ids.reshape(len(ids), -1).astype(np.uint64) * weights).sum(1, dtype=np.uint64)
        _, counts = np.unique(rows, return_counts=True)
        alike = (counts * (counts - 1)).sum() / max(len(rows) * (len(rows) - 1), 1)
        if alike**window * (len(self._hashes) + n) ** 2 > _BY_CHANCE:  # as of routers that have collapsed
            self._rows_alike += len(rows)
            return
        hashes = np.zeros(n, np.uint64)
        for place in range(window):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + rows[place : place + n]
        read = np.lib.stride_tricks.sliding_window_view(tokens, window)
        every, of = np.concatenate([self._hashes, hashes]), np.concatenate([self._tokens, read])
        order = np.argsort(every, kind="stable")
        # Pair each window with the previous one with the same rows.
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
    "stale_rows": "Switch off prefix caching and transfers of the cache, or update the server.",
    "physical_ids": "Switch off load balancing of experts, or have the server return logical ids.",
}


def combined(checks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine several checks for `Trace.meta["source_check"]`: everything corrected or not checkable."""
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
    """Mask [row, layer] of rows with the same number everywhere, as in a layer that never writes."""
    return (ids == ids[:1, :, :1]).all(-1)


def _unwritten(ids: np.ndarray, n_experts: int) -> np.ndarray:
    """Mask [row, layer] of rows that hold only sentinels, or one number in all slots, which no real choice does."""
    sentinel = (np.isin(ids, _SENTINELS) & ((ids < 0) | (ids >= n_experts))).all(-1)
    return np.asarray(sentinel | (ids == ids[..., :1]).all(-1) if ids.shape[-1] > 1 else sentinel)


def _place(found: np.ndarray, layers: tuple[int, ...]) -> str:
    row, layer = np.argwhere(found)[0][:2]
    return f"{int(found.sum()):,} places, the first in row {int(row)}, layer {layers[int(layer)]}"


def explained(ids: np.ndarray, others: np.ndarray, position: np.ndarray) -> tuple[str, str] | None:
    """Return the fault that explains a difference in routing from a local model, with its description; else None.

    Covers faults that ids alone do not show: renumbered experts, shifted layers or tokens.

    Parameters
    ----------
    ids, others : numpy.ndarray
        What came, and what a model here chooses for the same tokens [token, layer, slot].
    position : numpy.ndarray
        Of each token in its sequence.

    Returns
    -------
    tuple[str, str] or None
        Name of the fault, and in words what was found.
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
    """Renumber the ids of one layer [token, slot] by the experts most often chosen with them."""
    n = int(max(ids.max(), others.max())) + 1
    together = np.zeros((n, n), np.int64)
    np.add.at(together, (ids[:, :, None], others[:, None, :]), 1)
    return together.argmax(1)[ids]
