"""What of a request's query string is passed on to the model that answers it."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_plus

from ..core.headers import QUERY_MAX
from ..errors import InvalidRequest

__all__ = ["forwarded_query"]

#: Names of parameters that hold keys. This server takes keys only in headers; other servers take them in the query too,
#: so a client may send one there, and it is not meant for whatever answers the model.
_SECRET: Final = re.compile(
    r"(.*[-_.])?(key|token|auth|authorization|password|secret|signature)|.*(apikey|accesskey|authtoken)"
)

#: Everything that is not visible ASCII, and the mark that would end the query. It is percent-encoded, so that no query
#: can end a request line or begin another one.
_UNSAFE: Final = re.compile(rb"[^\x21\x22\x24-\x7e]")


def forwarded_query(query: bytes, model: str) -> str:
    """Return a query string as it is passed on: byte for byte, apart from what follows.

    - Parameters that hold keys are left out.
    - ``model`` is left out if it names the model of the request. Two names would leave it to the reader which counts.
    - Bytes that a URL may not contain are percent-encoded.

    Args:
        query: what followed the question mark, as it was received.
        model: the model that the request is for.

    Raises:
        InvalidRequest: it is too long (414), or names another model (400).
    """
    text = _UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], query).decode("ascii")
    kept = []
    for parameter in text.split("&"):
        name, _, value = parameter.partition("=")
        name = unquote_plus(name).lower()
        if name == "model":
            if unquote_plus(value) != model:
                raise InvalidRequest(
                    "The query names another model than the body: name it in the body only", param="model"
                )
        elif not _SECRET.fullmatch(name):
            kept.append(parameter)
    text = "&".join(kept)
    if len(text) > QUERY_MAX:
        raise InvalidRequest(f"The query is longer than {QUERY_MAX} characters", status=414)
    return text
