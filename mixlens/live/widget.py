"""The anywidget form of a view: the same module, with the selection as a trait."""

from __future__ import annotations

from typing import Any

import anywidget
import traitlets
from IPython.display import HTML, display

from mixlens.live.bundle import module_source


class ViewWidget(anywidget.AnyWidget):
    """A live view whose `selection` can be observed from Python; setting `asked` moves it.

    Parameters
    ----------
    kind, packed : str
        As in `View`.
    static : str, optional
        HTML that a notebook shows below the widget, in an output of its own, because a widget disappears with its
        kernel.
    """

    kind = traitlets.Unicode().tag(sync=True)
    packed = traitlets.Unicode().tag(sync=True)
    selection = traitlets.Dict().tag(sync=True)
    asked = traitlets.Dict().tag(sync=True)

    def __init__(self, kind: str, packed: str, *, static: str = "", **options: Any) -> None:
        super().__init__(_esm=module_source(), kind=kind, packed=packed, **options)
        self._static = static

    def _ipython_display_(self) -> None:
        bundle = self._repr_mimebundle_()
        assert bundle is not None
        display(bundle[0], metadata=bundle[1], raw=True)
        if self._static:
            display(HTML(self._static))
