"""Every figure and view on one page, to be looked at: of the demo, of 32 layers, and of 48 layers with 128 experts.

python docs/site/contact_sheet.py out/contact-sheet
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gallery import FIGURES, VIEWS, figures_of, generated, views_of

from mixlens.live.page import page
from mixlens.plot.html import escape, picture

WIDE = {"32 layers, 2 of 8 experts": (32, 8, 2), "48 layers, 8 of 128 experts": (48, 128, 8)}
_STYLE = "<style>main{max-width:none}.view iframe{width:100%;height:760px;border:0}</style>"
_POLICY = ("default-src 'none';", "default-src 'none'; frame-src 'self';")  # views are pages of their own


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    sheet = [section(out, "the bundled model", FIGURES, VIEWS)]
    for name, shape in WIDE.items():
        traces = partial(generated, *shape), partial(generated, *shape, seed=1)
        sheet.append(section(out, name, figures_of(*traces), views_of(*traces)))
    body = f"{_STYLE}<main><h1>Contact sheet</h1>{''.join(sheet)}</main>"
    (out / "index.html").write_text(page("Contact sheet", body).replace(*_POLICY), "utf-8")


def section(out: Path, of: str, figures: dict[str, Callable[[], Any]], views: dict[str, Callable[[], Any]]) -> str:
    parts = [f"<h2>Figures: {escape(of)}</h2>"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts += [picture(draw(), name, name) for name, draw in figures.items()]
        parts.append(f"<h2>Views: {escape(of)}</h2>")
        for name, make in views.items():
            file = make().save(out / f"{of} {name}.html".replace(" ", "-").replace(",", "")).name
            parts.append(f'<div class="view"><h3>{name}</h3><iframe src="{file}" title="{name}"></iframe></div>')
    return "".join(parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
