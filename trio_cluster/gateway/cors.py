"""Cross-origin resource sharing (CORS): which web pages may use the API, as defined by the Fetch standard."""

from __future__ import annotations

from typing import Final, TypeAlias

from .context import RequestContext

__all__ = ["answer_preflight", "cors_headers", "is_allowed_origin"]

Headers: TypeAlias = list[tuple[bytes, bytes]]

#: The headers of an answer that a page may see besides those that it may always see.
_EXPOSED: Final = (
    b"x-request-id, openai-processing-ms, retry-after, retry-after-ms, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens, "
    b"x-trio-cluster-model, x-trio-cluster-worker, "
    b"request-id, anthropic-ratelimit-requests-limit, anthropic-ratelimit-requests-remaining, "
    b"anthropic-ratelimit-requests-reset, anthropic-ratelimit-tokens-limit, "
    b"anthropic-ratelimit-tokens-remaining, anthropic-ratelimit-tokens-reset"
)
#: Seconds for which a browser may reuse the answer to a preflight.
_MAX_AGE: Final = b"600"


def cors_headers(context: RequestContext, origins: str | None) -> Headers:
    """Return the CORS headers of an answer; none if the request has no ``Origin``.

    Args:
        context: the request.
        origins: the option ``cors_origins``: ``"*"``, or a list with commas; ``None``: no origin is allowed.
    """
    origin = context.header(b"origin")
    if origin is None or origins is None:
        return []
    if origins.strip() == "*":
        return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
    # The answer depends on the origin, also if it is refused, and caches must know that.
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
    """Return the headers of the answer to a preflight; ``None`` if the request is not a preflight.

    Browsers send preflights without an API key. The answer shows only which methods and headers may be sent.

    Args:
        context: an ``OPTIONS`` request.
        origins: as for :func:`cors_headers`.
    """
    if origins is None or context.header(b"access-control-request-method") is None:
        return None
    headers = cors_headers(context, origins)
    if any(name == b"access-control-allow-origin" for name, _ in headers):
        requested = context.header(b"access-control-request-headers")
        headers += [
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", requested or b"authorization, content-type"),
            (b"access-control-max-age", _MAX_AGE),
        ]
    return headers
