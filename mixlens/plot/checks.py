"""Checks of the first argument of a figure, made before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import xarray as xr

from mixlens.errors import BadInput

Draw = TypeVar("Draw", bound=Callable[..., Any])


def takes(given_by: str, *needed: str) -> Callable[[Draw], Draw]:
    """Declare which Dataset a drawing function takes as its first argument.

    The function then raises BadInput unless it is given a Dataset with everything in `needed`.

    Parameters
    ----------
    given_by : str
        The call that computes such a Dataset, as a user writes it behind ``ml.``.
    *needed : str
        Dimensions, variables or attributes that the Dataset must have.
    """

    def checked(draw: Draw) -> Draw:
        @wraps(draw)
        def drawn(data: Any, *args: Any, **options: Any) -> Any:
            check(data, draw.__name__, given_by, *needed)
            return draw(data, *args, **options)

        return drawn  # type: ignore[return-value]

    return checked


def takes_run(given_by: str, *attributes: str) -> Callable[[Draw], Draw]:
    """Declare that the first argument of a drawing function is a run or comparison with these attributes."""

    def checked(draw: Draw) -> Draw:
        @wraps(draw)
        def drawn(run: Any, *args: Any, **options: Any) -> Any:
            if not all(hasattr(run, name) for name in attributes):
                raise BadInput(
                    f"Cannot draw {draw.__name__}: got a value of type {type(run).__name__}. "
                    f"Pass what ml.{given_by} returns.",
                    argument="run",
                    value=type(run).__name__,
                )
            return draw(run, *args, **options)

        return drawn  # type: ignore[return-value]

    return checked


def check(data: Any, what: str, given_by: str, *needed: str) -> None:
    """Raise BadInput, naming the figure `what`, unless `data` is a Dataset that has everything in `needed`."""
    if not isinstance(data, xr.Dataset):
        found, wrong = f"expected a Dataset, got {type(data).__name__}", type(data).__name__
    elif missing := [n for n in needed if n not in data.variables and n not in data.dims and n not in data.attrs]:
        found, wrong = f"the Dataset lacks {' and '.join(missing)}", missing
    else:
        return
    raise BadInput(
        f"Cannot draw {what}: {found}. Pass what ml.{given_by} returns.",
        argument="data",
        value=wrong,
    )
