"""Loaded by schemathesis: keeps the numbers that it draws to what both sides call an integer.

JSON Schema takes 1.0 for one. The API does not, and JSON Schema has no words for that.
"""

from __future__ import annotations

from typing import Any

import schemathesis


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(each) for each in value]
    if isinstance(value, dict):
        return {name: _whole(each) for name, each in value.items()}
    return value


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """See schemathesis."""
    return _whole(body)
