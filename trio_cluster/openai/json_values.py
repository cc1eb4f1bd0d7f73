"""Strict JSON, both for what clients send and for what handlers give.

Reading refuses everything that RFC 8259 does not know (NaN, Infinity, bytes that are not UTF-8), and turns every way in
which a text can be hostile, nesting included, into :class:`InvalidRequest`. Writing refuses numbers that JSON cannot
represent: the encoder underneath would write ``null`` in their place, and a client would take that for an answer.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final

import msgspec

from trio_cluster.errors import InvalidRequest

__all__ = ["dumps", "plain", "read_object"]

_decoder: Final = msgspec.json.Decoder()
_BOM: Final = b"\xef\xbb\xbf"
#: An escape in a JSON text: a whole surrogate pair, half of one (the group), or any other.
_ESCAPE: Final = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|\\.",
    re.DOTALL,
)


def _foreign(value: Any) -> Any:
    """Turn an array or a number of an array library into a list or a number."""
    tolist = getattr(value, "tolist", None)
    if tolist is None:
        raise TypeError(f"a value of type {type(value).__name__} cannot be written as JSON")
    return tolist()


#: Encode JSON types to compact JSON text in UTF-8, as ``bytes``. A float that is not finite is written as ``null``, so
#: a handler's values go through :func:`plain` first.
dumps: Final = msgspec.json.Encoder().encode


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``.

    Raises:
        InvalidRequest: it is not JSON, or not an object.
    """
    if body.startswith(_BOM):
        raise InvalidRequest(
            "The request body begins with a byte order mark (BOM), which JSON must not have; send UTF-8 without it",
            code="invalid_json",
        )
    try:
        value = _decoder.decode(body)
    except RecursionError:
        raise InvalidRequest("The request body is nested too deeply", code="invalid_json") from None
    except (msgspec.MsgspecError, ValueError) as exc:
        # ValueError covers text that is not UTF-8 and integers too long to convert.
        lone = _lone_surrogate(body)
        if lone is not None:
            # The decoder's own words for this are that the input was truncated.
            raise InvalidRequest(
                f"The request body is not valid JSON: {lone} is half of a surrogate pair, and no character by itself",
                code="invalid_json",
            ) from None
        reason = "it is not UTF-8" if isinstance(exc, UnicodeDecodeError) else str(exc)
        raise InvalidRequest(f"The request body is not valid JSON: {reason}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object", code="invalid_json")
    return value


def _lone_surrogate(body: bytes) -> str | None:
    """Return the first escape of half a surrogate pair that stands alone; ``None`` if there is none."""
    for escape in _ESCAPE.finditer(body):
        if escape[1] is not None:
            return escape[1].decode("ascii")
    return None


def plain(value: Any) -> Any:
    """Return a deep copy of a handler's value that consists of JSON types only.

    Arrays and numbers of array libraries become lists and numbers, tuples become lists, bytes become base64.

    Raises:
        TypeError: something in it has no JSON form.
        ValueError: a number in it is not finite, or it is nested too deeply.
    """
    try:
        copy = msgspec.to_builtins(value, enc_hook=_foreign, str_keys=True)
        _require_finite(copy)
    except RecursionError:
        raise ValueError("the value is nested too deeply to be written as JSON") from None
    return copy


def _require_finite(value: Any) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot be written as JSON")
    elif isinstance(value, dict):
        for item in value.values():
            _require_finite(item)
    elif isinstance(value, list):
        for item in value:
            _require_finite(item)
