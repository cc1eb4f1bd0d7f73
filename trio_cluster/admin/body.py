"""The body of a request to the admin application."""

from __future__ import annotations

from typing import Any

from quart import request

from ..openai import read_object

__all__ = ["json_object"]


async def json_object() -> dict[str, Any]:
    """Return the JSON object in the body of the current request; an empty one if there is no body.

    Raises:
        InvalidRequest: the body is not a JSON object.
    """
    body = await request.get_data(cache=True, as_text=False, parse_form_data=False)
    return read_object(body) if body.strip() else {}
