"""The paths that models answer: the routes of the OpenAI API, and custom routes."""

from __future__ import annotations

from typing import Final

from ..openai import ENDPOINTS

__all__ = ["MODEL_ROUTES", "PREFIXES", "custom_route"]

#: Every route of the OpenAI API is served under each of these.
PREFIXES: Final = ("/v1", "")

#: The routes that are answered by models.
MODEL_ROUTES: Final = {
    prefix + endpoint.path: endpoint for endpoint in ENDPOINTS.values() for prefix in PREFIXES
}


def custom_route(path: str) -> str:
    """Return the name of a custom route, given its path with or without the prefix ``/v1``."""
    path = path.rstrip("/")
    return path if path.startswith("/v1/") else "/v1" + path
