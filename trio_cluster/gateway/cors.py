"""Browsers: which web pages may use the API, as the Fetch standard lets a server say it."""

from __future__ import annotations

from typing import Final, TypeAlias

from .context import RequestContext

__all__ = ["answer_preflight", "cors_headers", "is_allowed_origin"]

Headers: TypeAlias = list[tuple[bytes, bytes]]

#: What a page may see of an answer beside its content type.
_EXPOSED: Final = b"x-request-id, openai-processing-ms, retry-after"
#: Seconds for which a browser need not ask again.
_MAX_AGE: Final = b"600"


def cors_headers(context: RequestContext, origins: str | None) -> Headers:
    """Return what an answer has to say to a browser; nothing if it was none that asked, or its page is not allowed.

    Args:
        context: the request.
        origins: ``"*"``, or origins with commas between them; ``None``: nobody's.
    """
    origin = context.header(b"origin")
    if origin is None or origins is None:
        return []
    if origins.strip() == "*":
        return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
    # The answer depends on who asks, which caches have to know, also where that one may not.
    headers = [(b"vary", b"origin")]
    if is_allowed_origin(origin, origins):
        headers += [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]
    return headers


def is_allowed_origin(origin: bytes, origins: str | None) -> bool:
    """Return whether the pages of an origin may use the API; ``origins`` is as for :func:`cors_headers`."""
    if origins is None or origins.strip() == "*":
        return origins is not None
    return origin in {each.strip().rstrip("/").encode() for each in origins.split(",")}


def answer_preflight(context: RequestContext, origins: str | None) -> Headers | None:
    """Return the headers of the answer to a browser that asks whether it may ask; ``None`` if this is no such question.

    It comes without a key, and is told nothing but what may be sent.

    Args:
        context: the request, which is one for ``OPTIONS``.
        origins: as for :func:`cors_headers`.
    """
    if origins is None or context.header(b"access-control-request-method") is None:
        return None
    headers = cors_headers(context, origins)
    if any(name == b"access-control-allow-origin" for name, _ in headers):
        asked = context.header(b"access-control-request-headers")
        headers += [
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", asked or b"authorization, content-type"),
            (b"access-control-max-age", _MAX_AGE),
        ]
    return headers
