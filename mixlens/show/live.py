"""Script that puts the JavaScript module into a page, once, and lets it bring a view to life."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"
_MODULES = "window.mixlensModules"


@cache
def asset(name: str) -> str:
    return (_ASSETS / name).read_text("utf-8")


def module_script() -> str:
    """A JavaScript expression: the promise of the module, loaded from a blob the first time a page asks for it."""
    source, css = (_string(asset(name)) for name in ("mixlens.js", "mixlens.css"))
    load = f'import(URL.createObjectURL(new Blob([{source}],{{type:"text/javascript"}}))).then(m=>({{...m,css:{css}}}))'
    return f"(({_MODULES}??={{}})[{_string(_version())}]??={load})"


def mount_script(kind: str, packed: str, *, load: bool) -> str:
    """A script element that makes the element before it the live view `kind`.

    load   whether the module comes along; False on a page that has it already
    """
    module = module_script() if load else f"{_MODULES}[{_string(_version())}]"
    return (
        f"<script>(()=>{{const host=document.currentScript.previousElementSibling;"
        f"{module}.then(m=>m.mount(host,{_string(kind)},{_string(packed)},m.css))"
        '.catch(e=>console.warn("mixlens: the view stays a picture.",e))})()</script>'
    )


def _string(text: str) -> str:
    """`text` as a JavaScript string that ends no script element."""
    return json.dumps(text).replace("<", "\\u003c")


@cache
def _version() -> str:
    return hashlib.sha256((asset("mixlens.js") + asset("mixlens.css")).encode()).hexdigest()[:12]
