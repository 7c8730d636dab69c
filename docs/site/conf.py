"""Sphinx: `make docs` stages the pages (pages.py) and builds them. Any warning, a broken reference too, fails it."""

import mixlens

project = "mixlens"
author = "the mixlens developers"
release = mixlens.__version__
extensions = ["sphinx.ext.autodoc", "numpydoc", "myst_nb", "sphinx_copybutton"]
html_theme = "pydata_sphinx_theme"
html_title = "mixlens"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {"show_prev_next": False, "navigation_with_keys": False, "icon_links": []}
exclude_patterns = []
nb_execution_mode = "off"
nb_merge_streams = True
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
add_module_names = False
autodoc_typehints = "none"  # numpydoc has them
autodoc_member_order = "bysource"
numpydoc_class_members_toctree = False
numpydoc_show_class_members = False
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]
