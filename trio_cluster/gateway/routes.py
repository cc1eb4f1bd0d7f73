"""Which paths are for models: the routes of the OpenAI API, and those that models add."""

from __future__ import annotations

from typing import Final

from ..openai import ENDPOINTS

__all__ = ["MODEL_ROUTES", "PREFIXES", "own_route"]

#: Every route of the OpenAI API is served under each of these.
PREFIXES: Final = ("/v1", "")

#: The routes that are answered by models.
MODEL_ROUTES: Final = {
    prefix + endpoint.path: endpoint for endpoint in ENDPOINTS.values() for prefix in PREFIXES
}


def own_route(path: str) -> str:
    """Return the name of a route that is not in the OpenAI API, given a path of it with or without the prefix."""
    path = path.rstrip("/")
    return path if path.startswith("/v1/") else "/v1" + path
