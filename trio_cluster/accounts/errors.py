"""The error of the database, apart from the code that needs SQLAlchemy to be imported."""

from __future__ import annotations

from ..errors import ClusterError

__all__ = ["StoreError"]


class StoreError(ClusterError):
    """The database cannot be opened, read or written. The message is one line that says which, and why."""
