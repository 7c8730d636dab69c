"""The JavaScript module of live views, and the script that lets it turn a static form into a live view.

`bundle.js` is made from `assets/` by ``make views``.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_MODULES = "window.mixlensModules"


@cache
def module_source() -> str:
    return (_HERE / "bundle.js").read_text("utf-8")


def module_script() -> str:
    """Return a JavaScript expression: the promise of the module, loaded from a blob once per page."""
    blob = f'new Blob([{_string(module_source())}],{{type:"text/javascript"}})'
    return f"(({_MODULES}??={{}})[{_string(_version())}]??=import(URL.createObjectURL({blob})))"


def mount_script(kind: str, packed: str, *, load: bool) -> str:
    """Return a script element that turns the nearest .mixlens before it into the live view `kind`.

    VS Code runs a copy of the script at the end of the output, so the view need not be right before it.

    Parameters
    ----------
    kind : str
        Kind of view.
    packed : str
        The data, from `payload.pack`.
    load : bool
        Whether to include the module; False on a page that already has it.
    """
    module = module_script() if load else f"{_MODULES}[{_string(_version())}]"
    return (
        "<script>(()=>{let host=document.currentScript;"
        'do host=host.previousElementSibling;while(!host.matches(".mixlens"));'
        f"{module}.then(m=>m.mount(host,{_string(kind)},{_string(packed)}))"
        '.catch(e=>console.warn("mixlens: the view stays a picture.",e))})()</script>'
    )


def _string(text: str) -> str:
    """Return `text` as a JavaScript string that cannot end a script element."""
    return json.dumps(text).replace("<", "\\u003c")


@cache
def _version() -> str:
    return hashlib.sha256(module_source().encode()).hexdigest()[:12]
