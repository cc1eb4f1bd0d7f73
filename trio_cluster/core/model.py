"""What a model is, apart from the function that answers for it."""

from __future__ import annotations

import json
import time
from typing import Any, Final, Literal, TypeAlias, get_args

import attrs

from .provenance import Via

__all__ = ["KINDS", "ChatModelOptions", "Kind", "ModelInfo"]

#: What a model can do; named after the ``register_*`` methods of the server. ``custom`` answers only routes of its own,
#: ``any`` is whatever stands behind the node, and answers every route.
Kind: TypeAlias = Literal[
    "chat",
    "embedding",
    "asr",
    "tts",
    "image_generation",
    "image_edit",
    "rerank",
    "moderation",
    "custom",
    "any",
]

KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


def _json_object(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{attribute.name}: expected a dict, got {value!r}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{attribute.name}: is not JSON: {error}") from error


@attrs.frozen
class ChatModelOptions:
    """What ``/v1/models`` tells about a chat model, beyond its name.

    ``extra_fields`` are shown as fields of the entry itself; they cannot replace those that every entry has.
    """

    supports_vision: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))
    context_window: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.instance_of(int))
    )
    extra_fields: dict[str, Any] = attrs.field(factory=dict, validator=_json_object)


def _name(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    # Names stand in URLs, in logs, on terminals and in the wire's messages, which bound them the same way.
    if not isinstance(value, str):
        raise TypeError(f"a model's name is text, not {value!r}")
    if not 0 < len(value) <= 512 or not value.isprintable() or value != value.strip():
        shown = value if len(value) <= 40 else value[:40] + "..."
        raise ValueError(
            f"a model's name has 1 to 512 printable characters and no spaces around them; {shown!r} has not"
        )


@attrs.frozen
class ModelInfo:
    """A model as the cluster knows it: what is announced to the master and listed to clients."""

    name: str = attrs.field(validator=_name)
    kind: Kind
    owner: str = "trio-cluster"
    created: int = attrs.field(factory=lambda: int(time.time()))
    """Seconds since the epoch; given once, when the model is first registered, and carried along from then on."""
    options: ChatModelOptions = attrs.field(factory=ChatModelOptions)
    extra_endpoints: tuple[str, ...] = ()
    """What it answers beside the routes of its kind: other kinds, and paths of routes of its own."""
    via: Via = ()
    """The other clusters through which it comes, the one where it is served first; see ``provenance.py``."""

    def answers(self, kind: str, endpoint: str) -> bool:
        """Tell whether it answers an endpoint, which is one for models of ``kind``."""
        return (
            self.kind == "any"
            or self.kind == kind != "custom"
            or kind in self.extra_endpoints
            or endpoint in self.extra_endpoints
        )

    def entry(self) -> dict[str, Any]:
        """Return the model's entry in ``/v1/models``."""
        entry = dict(self.options.extra_fields)
        entry |= {"id": self.name, "object": "model", "created": self.created, "owned_by": self.owner}
        entry["kind"] = self.kind
        entry["capabilities"] = {"vision": self.options.supports_vision}
        if self.options.context_window is not None:
            entry["context_window"] = self.options.context_window
        return entry
