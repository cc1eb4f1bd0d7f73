"""Requests to custom routes, which the OpenAI API does not have.

Such a request is JSON or a form and names its model. The handler knows what the rest of it means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from trio_cluster.errors import InvalidRequest

from .checks import missing, wrong_type
from .forms import is_form, read_form
from .readers import read_json
from .types import CustomRequest

__all__ = ["checked_path", "read_custom"]

#: Characters of a path. It is announced to the master and stands in logs.
_PATH_MAX: Final = 256


def checked_path(path: str) -> str:
    """Return the path of a custom route in its canonical form, without a slash at the end.

    Raises:
        ValueError: it cannot be the path of a route.
    """
    if not isinstance(path, str) or not path.isascii() or not path.isprintable() or len(path) > _PATH_MAX:
        raise ValueError(
            f"the path of a route is at most {_PATH_MAX} ASCII characters, which {path!r} is not"
        )
    whole = path.rstrip("/")
    if not whole.startswith("/v1/") or "//" in whole:
        raise ValueError(
            f"the path of a route begins with /v1/, and none of its parts is empty; not so {path!r}"
        )
    if any(mark in whole for mark in "?#% "):
        raise ValueError(f"the path of a route has neither a query nor escapes; {path!r} has")
    return whole


def read_custom(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False, path: str
) -> CustomRequest:
    """Read a request to a custom route.

    Raises:
        InvalidRequest: it is neither JSON nor a form, or names no model.
    """
    files: dict[str, list[bytes]] = {}
    if is_form(content_type):
        form = read_form(body, content_type)
        raw = form.fields
        files = {name: [file.data for file in some] for name, some in form.files.items()}
        stream = raw.get("stream") in ("true", "True", "1")
    else:
        raw = read_json(body, content_type, checked=checked)
        stream = raw.get("stream") is True
    if not checked:
        _check_model(raw.get("model"))
    return CustomRequest(
        model=raw["model"],
        path=path,
        stream=stream,
        body=body,
        content_type=content_type,
        files=files,
        raw=raw,
        headers=headers,
    )


def _check_model(model: Any) -> None:
    if model is None:
        raise missing("model")
    if not isinstance(model, str):
        raise wrong_type("model", "a string", model)
    if not model:
        raise InvalidRequest("'model' must not be empty", param="model")
