"""Deprecation of names that the kit had before: they still work, with a warning that names the new one."""

from __future__ import annotations

import warnings

__all__ = ["warn_renamed"]


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that ``old`` is now called ``new``.

    Args:
        old: the deprecated name, as it was written by the caller.
        new: what to write instead.
        stacklevel: see ``warnings.warn``; the default is the caller of the function that calls this one.
    """
    warnings.warn(f"{old} is deprecated, use {new}", DeprecationWarning, stacklevel=stacklevel)
