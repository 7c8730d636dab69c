"""Where: which tokens of a forward an edit applies to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixlens.errors import BadInput
from mixlens.interventions.places import Placed

PHASES = ("prompt", "generated")


@dataclass(frozen=True)
class Where:
    """A condition on tokens; a token must meet all its parts.

    Parameters
    ----------
    tokens : int or Iterable[int], optional
        Token ids, one or several.
    positions : int or Iterable[int], optional
        Places within the own sequence, counted from 0 without padding: a number, a range or several numbers.
    phase : str, optional
        "prompt" or "generated".
    rows : int or Iterable[int], optional
        Rows of the batch.

    Examples
    --------
    >>> ml.edits.Where(phase="generated").phase
    'generated'
    """

    tokens: int | Iterable[int] | None = None
    positions: int | Iterable[int] | None = None
    phase: str | None = None
    rows: int | Iterable[int] | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "positions", "rows"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, _numbers(name, value))
        if self.phase is not None and self.phase not in PHASES:
            raise BadInput(
                f"Cannot apply an edit where phase={self.phase!r}: phases are prompt and generated. Pass one of them.",
                argument="phase",
                value=self.phase,
            )

    def __repr__(self) -> str:
        given = {name: value for name, value in vars(self).items() if value is not None}
        return f"Where({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    @property
    def everywhere(self) -> bool:
        return self == EVERYWHERE

    def locate(self, placed: Placed) -> tuple[np.ndarray, None]:
        """Return bool [rows, columns], true at the selected tokens and never at padding.

        Parameters
        ----------
        placed : Placed
            Ids, rows and columns of the forward.
        """
        mask = placed.valid.copy()
        if self.tokens is not None:
            mask &= np.isin(placed.ids, np.asarray(self.tokens))
        if self.positions is not None:
            mask &= np.isin(placed.position, np.asarray(self.positions))
        if self.phase is not None:
            mask &= placed.generated[None] == (self.phase == "generated")
        if self.rows is not None:
            mask &= np.isin(np.arange(len(mask)), np.asarray(self.rows))[:, None]
        return mask, None


def _numbers(name: str, value: Any) -> tuple[int, ...]:
    found = whole_numbers(value)
    if not found or min(found) < 0:
        raise BadInput(
            f"Cannot apply an edit where {name}={value!r}: expected a whole number from 0, or several. Pass such "
            f"numbers, or leave {name} out.",
            argument=name,
            value=value,
        )
    return found


def whole_numbers(value: Any) -> tuple[int, ...]:
    """One number or several as a tuple; empty where it is neither, or one of them is not whole."""
    try:
        array = np.asarray(value if isinstance(value, np.ndarray) or np.isscalar(value) else list(value))
    except TypeError:
        return ()
    return tuple(array.ravel().tolist()) if array.dtype.kind in "iu" else ()


EVERYWHERE = Where()
