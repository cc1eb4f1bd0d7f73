"""Sphinx's settings. ``nox -s docs`` builds the site; a warning is an error there."""

from __future__ import annotations

from trio_cluster import __version__

project = "trio_cluster"
author = "The trio_cluster maintainers"
copyright = f"2026, {author}"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True

# What the signatures mention and this site does not describe. Other projects' inventories would have to be fetched
# from the network at every build, so their names are not links.
nitpick_ignore_regex = [
    ("py:.*", r"(trio|quart_trio|quart|collections\.abc|typing|pathlib|attr)\..*"),
    ("py:.*", r"(QuartTrio|Handler|Kind|H|Started|WorkerManager|WorkerClient|ConflictRule|FinishReason)"),
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
