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

# What the signatures mention and this site does not describe. Other projects' inventories would have to be
# fetched from the network at every build, so their names are not links.
nitpick_ignore_regex = [
    ("py:.*", r"(trio|quart_trio|quart|h11|random|collections\.abc|contextlib|typing|pathlib|attr)\..*"),
    (
        "py:.*",
        r"(QuartTrio|collections\.Counter|Counter|Handler|Kind|H|Started|WorkerManager|WorkerClient|ConflictRule|FinishReason|PATIENCE)",
    ),
    ("py:.*", r"trio_cluster\._?[a-z]+\..*"),
    ("py:class", r"(optional|Any|ApiError|Literal.*|~?H)"),
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


# Napoleon takes "The longest silence: to the first output" under an attribute for a type and its description.
# The text under attributes is prose here, so it is put back as it was.
_PROSE = frozenset({"attribute", "data", "property"})
_as_written: dict[str, list[str]] = {}


def _keep(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    if what in _PROSE:
        _as_written[name] = list(lines)


def _put_back(app: Any, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    if what in _PROSE:
        lines[:] = _as_written.pop(name)


def setup(app: Any) -> None:
    """Have napoleon's handler (priority 500) between the two."""
    app.connect("autodoc-process-docstring", _keep, priority=400)
    app.connect("autodoc-process-docstring", _put_back, priority=600)
