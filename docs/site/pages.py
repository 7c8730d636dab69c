"""Stage the pages of the site: docs/*.md, the notebooks, the API reference, the gallery and the command line.

python docs/site/pages.py out/site-source
sphinx-build -W --keep-going out/site-source out/site
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from gallery import FIGURES, VIEWS, caption_of, drawn, live

import mixlens as ml
from mixlens.cli.main import app

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GUIDE = ("load", "quantize", "record", "statistics", "show", "view", "explore", "edit", "evaluate", "benchmark",
         "compare", "decide", "report", "files")  # fmt: skip
PACKAGES = ("stats", "show", "view", "edits", "bench", "evals", "experiments", "decisions", "pricing")


def contents(*pages: str, hidden: bool = False) -> str:
    return "\n".join(["```{toctree}\n:maxdepth: 1", *([":hidden:"] if hidden else []), "", *pages, "```\n"])


def linked(text: str) -> str:
    """A page of the repository as a page of the site: links to files that are no pages lose their target."""
    text = re.sub(r"\]\(\.\./notebooks/(\d\d_\w+\.ipynb)\)", r"](notebooks/\1)", text)
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", text)


def reference(name: str, package: Any) -> str:
    """One entry for each public name of a package, in the order of its list."""
    parts = [f"# {name}\n", (inspect.getdoc(package) or "").strip(), ""]
    for public in package.__all__:
        found = getattr(package, public)
        if inspect.ismodule(found):
            continue
        home = f"{found.__module__}.{found.__qualname__}"
        kind = "exception" if inspect.isclass(found) and issubclass(found, BaseException) else "class"
        directive = f"auto{kind if inspect.isclass(found) else 'function'}"
        members = "   :members:\n" if directive == "autoclass" else ""
        no_index = "   :no-index:\n" if (name, public) in REPEATED else ""
        parts.append(f"## {public}\n\n```{{eval-rst}}\n.. {directive}:: {home}\n{members}{no_index}```\n")
    return "\n".join(parts)


# Names that two packages have: the second entry is no target of references.
REPEATED = {("mixlens.bench", "benchmark"), ("mixlens.evals", "evaluate"), ("mixlens.edits", "edit")}


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)

    def write(path: str, text: str | bytes) -> None:
        place = out / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text if isinstance(text, bytes) else text.encode())

    for page in sorted((ROOT / "docs").glob("*.md")):
        if page.stem != "README":
            write(page.name, linked(page.read_text("utf-8")))
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        write(f"notebooks/{notebook.name}", re.sub(r"\]\(\.\./docs/", "](../", notebook.read_text("utf-8")))

    write("reference/mixlens.md", reference("mixlens", ml))
    for package in PACKAGES:
        write(f"reference/{package}.md", reference(f"mixlens.{package}", getattr(ml, package)))
    commands = app.generate_docs(output_format="markdown", heading_level=2)
    write("reference/cli.md", f"# Command line\n\n{commands}")

    figures = ["# Figures\n", "Every figure of `ml.show`, of the bundled model on its samples.\n"]
    for name in FIGURES:
        write(f"gallery/{name}.svg", drawn(name))
        image = f"```{{image}} {name}.svg\n:alt: {name}\n:class: figure\n```\n"
        figures.append(f"## {name}\n\n{caption_of(name)}\n\n{image}")
    write("gallery/figures.md", "\n".join(figures))
    views = ["# Live views\n", "Every view of `ml.view`, live: hover, click, use the arrow keys.\n"]
    for name in VIEWS:
        write(f"_static/view_{name}.html", live(name))
        frame = f'<iframe class="view" src="../_static/view_{name}.html" title="{name}" loading="lazy"></iframe>'
        views.append(f"## {name}\n\n{caption_of(name, 'view')}\n\n```{{raw}} html\n{frame}\n```\n")
    write("gallery/views.md", "\n".join(views))

    overview = linked((ROOT / "docs" / "README.md").read_text("utf-8"))
    others = sorted({path.stem for path in (ROOT / "docs").glob("*.md")} - {"README", "tour", *GUIDE})
    sections = {
        "guide": ("Guide", ["tour", *GUIDE, *others]),
        "gallery/index": ("Gallery", ["figures", "views"]),
        "notebooks/index": ("Notebooks", [path.stem for path in notebooks]),
        "reference/index": ("Reference", ["mixlens", *PACKAGES, "cli"]),
    }
    for path, (title, members) in sections.items():
        write(f"{path}.md", f"# {title}\n\n{contents(*members)}")
    write("index.md", f"{overview}\n\n{contents(*sections, hidden=True)}")
    shutil.copy(HERE / "conf.py", out)
    shutil.copytree(ROOT / "docs" / "images", out / "images", dirs_exist_ok=True)
    shutil.copy(HERE / "site.css", out / "_static")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
