"""Sphinx's settings. ``nox -s docs`` builds the site; a warning is an error there."""

from __future__ import annotations

from typing import Any

from trio_cluster import __version__

project = "trio_cluster"
author = "The trio_cluster maintainers"
copyright = f"2026, {author}"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True

# Names that the signatures mention and this site does not describe. They are not links, since the inventories of other
# projects would have to be fetched from the network at every build.
nitpick_ignore_regex = [
    ("py:.*", r"(asyncio|collections|contextlib|h11|pathlib|random|trio|typing)\..*"),
    ("py:class", r"QuartTrio|Samples|Ts|Callable\[\[\]"),
    ("py:exc", "InvalidRequest"),
    # Private modules of this package. Names directly in its public modules must exist.
    ("py:.*", r"trio_cluster\.(?!(engines|testing)\.[A-Za-z])\w+\..*"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_enable_extensions = ["colon_fence", "deflist", "smartquotes"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"trio_cluster {version}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]


# Napoleon takes the first words of "The idle timeout: how long a model may take" under an attribute for a type. The
# text under attributes is prose here, so it is put back as it was.
_PROSE = frozenset({"attribute", "data", "property"})
_as_written: dict[str, list[str]] = {}


def _keep(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    if what in _PROSE:
        _as_written[name] = list(lines)


def _put_back(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    if what in _PROSE:
        lines[:] = _as_written.pop(name)


def setup(app: Any) -> None:
    """Connect the two functions around napoleon's own handler, whose priority is 500."""
    app.connect("autodoc-process-docstring", _keep, priority=400)
    app.connect("autodoc-process-docstring", _put_back, priority=600)
