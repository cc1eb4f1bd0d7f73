"""The description of a model: its name, kind and options, without the function that answers."""

from __future__ import annotations

import json
import time
from typing import Any, Final, Literal, TypeAlias, get_args

import attrs

from .provenance import Via

__all__ = ["KINDS", "ChatModelOptions", "Kind", "Modality", "ModelInfo", "require_model_name"]

#: What a model can do; named after the ``register_*`` methods of the server. A model of kind ``custom`` answers only
#: its custom routes; one of kind ``any`` is a passthrough model, and answers every route.
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

#: What goes into a model or comes out of it.
Modality: TypeAlias = Literal["text", "image", "audio", "embedding", "score"]

#: What each kind takes, and what it gives. Chat and moderation models with ``supports_vision`` take images as well.
#: What models of the other kinds take is known only to their handlers.
_MODALITIES: Final[dict[Kind, tuple[list[Modality], list[Modality]]]] = {
    "chat": (["text"], ["text"]),
    "embedding": (["text"], ["embedding"]),
    "asr": (["audio"], ["text"]),
    "tts": (["text"], ["audio"]),
    "image_generation": (["text"], ["image"]),
    "image_edit": (["text", "image"], ["image"]),
    "rerank": (["text"], ["score"]),
    "moderation": (["text"], ["score"]),
}
_VISION: Final[tuple[Kind, ...]] = ("chat", "moderation")


def _json_object(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{attribute.name}: expected a dict, got {value!r}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{attribute.name}: is not JSON: {error}") from error


@attrs.frozen
class ChatModelOptions:
    """What ``/v1/models`` shows about a model besides its name, kind and owner.

    Raises:
        TypeError: a value has a wrong type.
        ValueError: ``extra_fields`` cannot be encoded as JSON.
    """

    supports_vision: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))
    """Whether requests may contain images; requests with images to a model without it get 400."""
    context_window: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.instance_of(int))
    )
    """The size of the context, in tokens; ``None``: not shown."""
    extra_fields: dict[str, Any] = attrs.field(factory=dict, validator=_json_object)
    """Further fields of the entry, as JSON values. They cannot replace those that every entry has."""
    accepts_token_ids: bool = attrs.field(default=False, validator=attrs.validators.instance_of(bool))
    """The handler takes prompts of token ids (``ChatRequest.prompt_tokens``); without it they are refused with 400."""
    max_output_tokens: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.instance_of(int))
    )
    """How many tokens an answer may have at most; ``None``: not shown. It is not enforced."""
    cache_tokens: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.instance_of(int))
    )
    """How many tokens of prompts the model's prompt cache holds, for all requests together; ``None``: unknown. Not
    shown: the master's routing needs it."""


def require_model_name(value: object) -> None:
    """Refuse what is not a name that a model may have.

    Raises:
        TypeError: it is not text.
        ValueError: it is empty, too long or not printable.
    """
    # Names appear in URLs, in logs, on terminals and in messages of the cluster protocol, which has the same limits.
    if not isinstance(value, str):
        raise TypeError(f"a model's name must be text, not {value!r}")
    if not 0 < len(value) <= 512 or not value.isprintable() or value != value.strip():
        shown = value if len(value) <= 40 else value[:40] + "..."
        raise ValueError(
            f"a model's name must have 1 to 512 printable characters, and no spaces around them; got {shown!r}"
        )


def _name(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    require_model_name(value)


@attrs.frozen
class ModelInfo:
    """A model as the cluster knows it: announced to the master, and listed to clients.

    Raises:
        TypeError: the name is not text.
        ValueError: the name is empty, too long or not printable.
    """

    name: str = attrs.field(validator=_name)
    kind: Kind
    owner: str = "trio-cluster"
    created: int = attrs.field(factory=lambda: int(time.time()))
    """When the model was first registered, in seconds since the epoch."""
    options: ChatModelOptions = attrs.field(factory=ChatModelOptions)
    extra_endpoints: tuple[str, ...] = ()
    """What the model answers besides the endpoints of its kind: other kinds, and paths of custom routes."""
    via: Via = ()
    """The ids of the other clusters through which the model comes, first the one that serves it; see
    ``provenance.py``."""
    hedge: bool = False
    """A request whose answer is late may be sent to another replica as well."""

    def answers(self, kind: str, endpoint: str) -> bool:
        """Return whether the model answers an endpoint.

        Args:
            kind: the kind of models that the endpoint is for.
            endpoint: the name of the endpoint, or the path of a custom route.
        """
        return (
            self.kind == "any"
            or self.kind == kind != "custom"
            or kind in self.extra_endpoints
            or endpoint in self.extra_endpoints
        )

    def is_listed_as(self, kind: Kind) -> bool:
        """Return whether the model belongs in a list of the models of a kind.

        A model that answers the endpoints of several kinds is in the list of each.
        """
        return self.kind == kind or (kind != "custom" and self.answers(kind, ""))

    def modalities(self) -> dict[str, list[Modality]] | None:
        """Return what goes into the model and what comes out of it; ``None`` if that is not known."""
        inputs, outputs = _MODALITIES.get(self.kind, ([], []))
        takes_images = (
            self.options.supports_vision if self.kind in _VISION else self.answers("image_edit", "")
        )
        if not inputs:
            return None
        if takes_images and "image" not in inputs:
            inputs = [*inputs, "image"]
        return {"input": inputs, "output": outputs}

    def entry(self) -> dict[str, Any]:
        """Return the model's entry in ``/v1/models``."""
        entry = dict(self.options.extra_fields)
        entry |= {"id": self.name, "object": "model", "created": self.created, "owned_by": self.owner}
        entry["kind"] = self.kind
        entry["capabilities"] = {"vision": self.options.supports_vision}
        if self.options.context_window is not None:
            entry["context_window"] = self.options.context_window
        if self.options.max_output_tokens is not None:
            entry["max_output_tokens"] = self.options.max_output_tokens
        if (modalities := self.modalities()) is not None:
            entry["modalities"] = modalities
        return entry
