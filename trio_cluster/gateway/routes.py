"""The paths that models answer: the routes of the OpenAI API, and custom routes."""

from __future__ import annotations

import re
from typing import Final

from ..openai import ENDPOINTS, MESSAGE_ERRORS, OPENAI_ERRORS, ErrorFamily

__all__ = ["MODEL_ROUTES", "PREFIXES", "canonical_path", "custom_route", "error_family", "may_be_custom"]

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


#: Below these, paths belong to the Messages API, also those that are not served here.
_MESSAGES_API: Final = tuple(f"{prefix}/messages/" for prefix in PREFIXES)


def error_family(path: str) -> ErrorFamily:
    """Return the family of the errors of a path, which begins with one slash."""
    endpoint = MODEL_ROUTES.get(path.rstrip("/"))
    if endpoint is not None:
        return endpoint.errors
    return MESSAGE_ERRORS if path.startswith(_MESSAGES_API) else OPENAI_ERRORS


#: Stored responses are not posted to by their ids. Servers behind passthrough models have routes there.
_BELOW_RESPONSES: Final = re.compile(r"(?:/v1)?/responses/[^/]+")


def may_be_custom(path: str) -> bool:
    """Return whether a path that the application has may be a custom route for all that, if it is posted to."""
    return _BELOW_RESPONSES.fullmatch(path) is not None


#: Other paths that clients know for what is served here.
_ALIASES: Final = {"/v2/rerank": "/v1/rerank", "/openai/models": "/v1/models"}

#: The prefixes in front of the last one, if there are several.
_DOUBLED: Final = re.compile(r"^(?:/v1)+(?=/v1/)")

#: In front of the name of a model and the path of a route, in the API of Azure.
_DEPLOYMENTS: Final = "/openai/deployments/"


def canonical_path(method: str, path: str) -> tuple[str, str]:
    """Return the path that is served here for a path that clients of other servers know, and the model in it.

    - ``/v2/rerank`` is ``/v1/rerank``, and ``GET /v1/health`` is ``/health``;
    - a prefix that came twice, once from a base URL and once from the client, counts once;
    - Azure has the model in the path: ``/openai/deployments/MODEL/chat/completions``.

    Args:
        method: the method of the request.
        path: begins with one slash.

    Returns:
        The path, unchanged if it is no such path; and the name of the model, empty if the path has none.
    """
    if path.startswith("/openai/"):
        if path.startswith(_DEPLOYMENTS):
            rest = path.removeprefix(_DEPLOYMENTS).rstrip("/")
            # The name of a model may have slashes in it.
            ends = [each.path for each in ENDPOINTS.values() if rest.endswith(each.path)]
            end = max(ends, key=len, default="")
            if end and len(rest) > len(end):
                return "/v1" + end, rest.removesuffix(end)
        elif path.startswith("/openai/v1/"):
            path = path.removeprefix("/openai")
    path = _DOUBLED.sub("", path, count=1)
    if path.rstrip("/") == "/v1/health" and method in ("GET", "HEAD"):
        return "/health", ""
    return _ALIASES.get(path.rstrip("/"), path), ""
