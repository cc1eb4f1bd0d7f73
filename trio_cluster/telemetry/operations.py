"""The names of operations, by the conventions for generative AI."""

from __future__ import annotations

from .names import OPERATIONS

__all__ = ["operation_of"]


def operation_of(endpoint: str) -> str:
    """Return the operation of an endpoint; that of a route of a model's own is the last part of its path."""
    return OPERATIONS.get(endpoint) or endpoint.rpartition("/")[2] or endpoint
