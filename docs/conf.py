"""How Sphinx makes the pages that `scripts/pages.py` stages; nothing in them is fetched from elsewhere."""

from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

project = html_title = "fourfold"
author = "The fourfold authors"
root_doc = "README"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
default_role = "code"  # one backtick is code in Markdown and in docstrings alike
highlight_language = "none"
myst_heading_anchors = 3

add_module_names = False
autodoc_default_options = {"member-order": "bysource", "undoc-members": True}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
# A reference lists its names at its head; in the sidebar of every page they cost half a minute.
toc_object_entries = False
# With True, a class that is an attribute of another is linked as if it were of that one's module.
viewcode_follow_imported_members = False

html_theme = "furo"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = html_show_copyright = False
html_show_search_summary = False  # a browser reads no page from a file to quote it
html_permalinks_icon = "#"


def setup(app: Sphinx) -> None:
    """Read docstrings in Google's style; the extension napoleon would take "x: y" of a field for a type."""
    app.connect("autodoc-process-docstring", read_google_style)


def read_google_style(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Turn the sections of a docstring into fields, in place; a field's or property's has none."""
    if what not in {"attribute", "data", "property"}:
        lines[:] = GoogleDocstring(lines, Config(), app, what, name, obj, options).lines()
