"""The script that loads a JavaScript module into a page once, and lets it turn a static form into a live view."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

_ASSETS = Path(__file__).parent / "assets"
_MODULES = "window.mixlensModules"
# The files that each kind of view needs besides core.js, in order.
_FILES = {
    "tokens": ("routing.js", "text.js", "tokens.js"),
    "matrix": ("routing.js", "matrices.js"),
    "dots": ("routing.js", "matrices.js", "plots.js"),
    "ecdf": ("routing.js", "plots.js"),
    "pareto": ("routing.js", "plots.js"),
    "diff": ("routing.js", "text.js", "diff.js"),
    "strip": ("routing.js", "strip.js"),
    "samples": ("routing.js", "text.js", "samples.js"),
}
ALL = tuple(_FILES)


@cache
def asset(name: str) -> str:
    return (_ASSETS / name).read_text("utf-8")


@cache
def module_source(*kinds: str) -> str:
    """Return the source of the ES module with the views `kinds`: plain files, one after the other."""
    files = dict.fromkeys(name for kind in kinds for name in _FILES[kind])
    return f"const CSS={_string(asset('mixlens.css'))};\n" + "".join(asset(name) for name in ("core.js", *files))


def module_script(*kinds: str) -> str:
    """Return a JavaScript expression: the promise of the module, loaded from a blob once per page."""
    blob = f'new Blob([{_string(module_source(*kinds))}],{{type:"text/javascript"}})'
    return f"(({_MODULES}??={{}})[{_string(_version(*kinds))}]??=import(URL.createObjectURL({blob})))"


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
        Whether to include the module; False on a page that already has the module of all kinds.
    """
    module = module_script(kind) if load else f"{_MODULES}[{_string(_version(*ALL))}]"
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
def _version(*kinds: str) -> str:
    return hashlib.sha256(module_source(*kinds).encode()).hexdigest()[:12]
