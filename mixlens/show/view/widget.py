"""The anywidget form of a view: the same module, with what is selected as a trait."""

from __future__ import annotations

from typing import Any

import anywidget
import traitlets

from mixlens.show.live import module_source


class ViewWidget(anywidget.AnyWidget):
    """A live view whose `selection` Python can observe; `asked` moves it."""

    kind = traitlets.Unicode().tag(sync=True)
    packed = traitlets.Unicode().tag(sync=True)
    selection = traitlets.Dict().tag(sync=True)
    asked = traitlets.Dict().tag(sync=True)

    def __init__(self, kind: str, packed: str, **options: Any) -> None:
        super().__init__(_esm=module_source(kind), kind=kind, packed=packed, **options)
