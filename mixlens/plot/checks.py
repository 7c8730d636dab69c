"""What a figure takes, checked before it draws, so that anything else is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import xarray as xr

from mixlens.errors import BadInput

Draw = TypeVar("Draw", bound=Callable[..., Any])


def takes(given_by: str, *needed: str) -> Callable[[Draw], Draw]:
    """Of a function that draws: its first argument is a Dataset with these dimensions, variables or attributes.

    given_by   what computes such a Dataset, as a user writes it behind `ml.`

    Raises BadInput, when the function is called, for anything else.
    """

    def checked(draw: Draw) -> Draw:
        @wraps(draw)
        def drawn(data: Any, *args: Any, **options: Any) -> Any:
            check(data, draw.__name__, given_by, *needed)
            return draw(data, *args, **options)

        return drawn  # type: ignore[return-value]

    return checked


def takes_run(given_by: str, *attributes: str) -> Callable[[Draw], Draw]:
    """The same of a function whose first argument is a run or a comparison: an object with these attributes."""

    def checked(draw: Draw) -> Draw:
        @wraps(draw)
        def drawn(run: Any, *args: Any, **options: Any) -> Any:
            if not all(hasattr(run, name) for name in attributes):
                raise BadInput(
                    f"{draw.__name__} was to be drawn. A {type(run).__name__} was given. Give what "
                    f"ml.{given_by} gives.",
                    argument="run",
                    value=type(run).__name__,
                )
            return draw(run, *args, **options)

        return drawn  # type: ignore[return-value]

    return checked


def check(data: Any, what: str, given_by: str, *needed: str) -> None:
    """Raises BadInput, naming `what` was to be drawn, unless `data` is a Dataset with everything in `needed`."""
    if not isinstance(data, xr.Dataset):
        found, wrong = f"A {type(data).__name__} was given", type(data).__name__
    elif missing := [n for n in needed if n not in data.variables and n not in data.dims and n not in data.attrs]:
        found, wrong = f"A Dataset without {' and '.join(missing)} was given", missing
    else:
        return
    raise BadInput(
        f"{what} was to be drawn. {found}. Give what ml.{given_by} gives.",
        argument="data",
        value=wrong,
    )
