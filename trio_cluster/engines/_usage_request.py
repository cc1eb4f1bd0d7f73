"""Asking a server to report the tokens of a stream, where the client has not asked for it.

A stream of chat or completions has no usage unless the request has ``"stream_options": {"include_usage": true}``. What
asks for it is spliced into the body; everything else in it stays as it was, byte for byte.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

__all__ = ["ask_for_usage"]

_SPLICED: Final = b'"stream_options":{"include_usage":true},'


class _Fields(msgspec.Struct):
    """What has to be known of a request. Everything else is skipped, and not decoded."""

    stream: Any = None
    stream_options: Any = msgspec.UNSET


def ask_for_usage(body: bytes) -> bytes | None:
    """Return the body of a request for a stream, with a request for its usage in it. Synchronous.

    Args:
        body: what the client has sent.

    Returns:
        ``None`` if the body is to be sent as it is: it asks for no stream, or for the usage already, or it is not a
        JSON object that could be a request.
    """
    try:
        fields = msgspec.json.decode(body, type=_Fields)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # The server says what is wrong with it.
        return None
    if fields.stream is not True:
        return None
    options = fields.stream_options
    if options is msgspec.UNSET:
        begin = body.index(b"{") + 1
        return b"".join((body[:begin], _SPLICED, body[begin:]))
    if options is None:
        options = {}
    if not isinstance(options, dict) or options.get("include_usage") is True:
        return None
    members = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    members["stream_options"] = msgspec.Raw(msgspec.json.encode(options | {"include_usage": True}))
    return msgspec.json.encode(members)
