"""Encoding and decoding of messages.

One binary websocket message carries a batch: a msgpack array of ``[tag, body]`` pairs, where ``tag`` is a small number
for the class of the message and ``body`` a map of its fields. cattrs converts the fields; its functions for each class
are made once, here, because looking them up for every message costs more than running them.

Types are strict: ``"7"``, ``7.9`` and ``True`` are not integers, and no value becomes a string by conversion. cattrs by
itself would accept all of these.

There are two converters. The one that is used stops at the first error and does not report where it was. When it has
refused a message, the other one, slower by half, converts it again, for the text of the error.

``Data`` is a message like the others and is encoded like them. But nearly all batches hold nothing else, so each batch
is first decoded as one of those, by msgspec alone, which is ten times as fast and as strict about types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from operator import eq
from typing import Any, Final, Literal

import attrs
import cattrs
import msgspec

from .errors import ProtocolError
from .messages import (
    Cancel,
    Data,
    Done,
    Drain,
    Failed,
    ForwardRequest,
    ForwardResponse,
    Grant,
    Handshake,
    Heartbeat,
    Message,
    ModelRegistered,
    ModelRejected,
    RegisterModel,
    Shutdown,
    UnregisterModel,
)

__all__ = [
    "MAX_MESSAGE",
    "TAGS",
    "Packed",
    "decode",
    "encode",
    "encode_batch",
    "encode_part",
    "pack",
    "pack_data",
]

#: Bytes in one websocket message at most; a larger one violates the protocol. The largest single message has about half
#: of that.
MAX_MESSAGE: Final = 256 * 1024

#: The number of each class on the wire. Numbers are never reused, not even those of messages that no longer exist.
TAGS: Final[dict[type[Message], int]] = {
    Handshake: 0,
    RegisterModel: 1,
    ModelRegistered: 2,
    ModelRejected: 3,
    UnregisterModel: 4,
    Heartbeat: 5,
    ForwardRequest: 6,
    ForwardResponse: 7,
    Data: 8,
    Done: 9,
    Failed: 10,
    Cancel: 11,
    Grant: 12,
    Drain: 13,
    Shutdown: 14,
}


class _WrongType(Exception):
    """A field has another type than its class declares. The text can be shown to people."""

    def __init__(self, expected: str, value: object) -> None:
        super().__init__(f"expected {expected}, got {type(value).__name__}")


def _exactly(wanted: type) -> Callable[[Any, Any], Any]:
    label = wanted.__name__

    # type() and not isinstance(): True is an int.
    def structure(value: Any, _: Any) -> Any:
        if type(value) is wanted:
            return value
        raise _WrongType(label, value)

    return structure


def _structure_float(value: Any, _: Any) -> float:
    if type(value) is float:
        return value
    # Encoders of other languages write 60.0 as 60.
    if type(value) is int:
        return float(value)
    raise _WrongType("float", value)


def _structure_texts(value: Any, _: Any) -> dict[str, str]:
    if type(value) is not dict:
        raise _WrongType("map", value)
    for key, content in value.items():
        if type(key) is not str or type(content) is not str:
            raise _WrongType("map of str to str", key if type(key) is not str else content)
    return value


def _structure_numbers(value: Any, _: Any) -> dict[str, int]:
    if type(value) is not dict:
        raise _WrongType("map", value)
    for key, number in value.items():
        if type(key) is not str or type(number) is not int:
            raise _WrongType("map of str to int", key if type(key) is not str else number)
    return value


def _structure_names(value: Any, _: Any) -> tuple[str, ...]:
    if type(value) is not list or not all(type(text) is str for text in value):
        raise _WrongType("array of str", value)
    return tuple(value)


def _structure_pairs(value: Any, _: Any) -> tuple[tuple[str, str], ...]:
    if type(value) is not list:
        raise _WrongType("array", value)
    for pair in value:
        if type(pair) is not list or len(pair) != 2 or not all(type(text) is str for text in pair):
            raise _WrongType("array of pairs of str", pair)
    return tuple((key, content) for key, content in value)


def _structure_counts(value: Any, _: Any) -> tuple[tuple[int, int], ...]:
    if type(value) is not list:
        raise _WrongType("array", value)
    for pair in value:
        if type(pair) is not list or len(pair) != 2 or not all(type(number) is int for number in pair):
            raise _WrongType("array of pairs of int", pair)
    return tuple((call, count) for call, count in value)


def _unchanged(value: Any) -> Any:
    return value


_SHAPES: Final[tuple[tuple[Any, Callable[[Any, Any], Any]], ...]] = (
    (bytes | memoryview, _exactly(bytes)),
    (dict[str, Any], _exactly(dict)),
    (dict[str, str], _structure_texts),
    (dict[str, int], _structure_numbers),
    (tuple[str, ...], _structure_names),
    (tuple[tuple[str, str], ...], _structure_pairs),
    (tuple[tuple[int, int], ...], _structure_counts),
)


def _converter(*, detailed: bool) -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=detailed)
    for plain in (int, str, bool):
        converter.register_structure_hook(plain, _exactly(plain))
    converter.register_structure_hook(float, _structure_float)
    for shape, structure in _SHAPES:
        converter.register_structure_hook_func(partial(eq, shape), structure)
        # msgspec encodes all types that fields have; without this hook, cattrs would copy every container.
        converter.register_unstructure_hook_func(partial(eq, shape), _unchanged)
    return converter


for _class in TAGS:
    if attrs.has(_class):
        attrs.resolve_types(_class)

_plain: Final = _converter(detailed=False)
_explaining: Final = _converter(detailed=True)
_plain.register_structure_hook(Data, partial(msgspec.convert, builtin_types=(bytes,)))
_plain.register_unstructure_hook(Data, _unchanged)
_UNSTRUCTURE: Final[dict[type[Message], Callable[[Any], Any]]] = {
    cls: _plain.get_unstructure_hook(cls) for cls in TAGS
}
_STRUCTURE: Final = {tag: (cls, _plain.get_structure_hook(cls)) for cls, tag in TAGS.items()}

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(list[Any]).decode
_decode_bodies: Final = msgspec.msgpack.Decoder(list[tuple[Literal[8], Data]]).decode

#: A message in the form that :func:`encode_batch` needs.
Packed = msgspec.Raw | list[Any]


def pack(message: Message) -> list[Any]:
    """Return ``message`` as a ``[tag, body]`` pair for :func:`encode_batch`; bytes in it are not copied."""
    cls = type(message)
    return [TAGS[cls], _UNSTRUCTURE[cls](message)]


def pack_data(call: int, data: bytes | memoryview, last: bool) -> list[Any]:
    """Return what :func:`pack` returns for such a ``Data``. The values are not validated."""
    return [TAGS[Data], {"call": call, "data": data, "last": last}]


def encode_part(message: Message) -> msgspec.Raw:
    """Return ``message`` in its encoded form, as a part of a batch."""
    return msgspec.Raw(_encode(pack(message)))


def encode_batch(batch: list[Packed]) -> bytes:
    """Return the bytes of a batch. Bodies are copied once, into the result."""
    return _encode(batch)


def encode(messages: Iterable[Message]) -> bytes:
    """Return ``messages`` as one batch, the content of one binary websocket message.

    Raises:
        ValueError: it would be larger than ``MAX_MESSAGE``.
    """
    data = encode_batch([pack(message) for message in messages])
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"a batch of {len(data)} bytes; at most {MAX_MESSAGE} are allowed")
    return data


def decode(data: bytes) -> list[Message]:
    """Return the messages of one binary websocket message, in order.

    Raises:
        ProtocolError: ``data`` is not a batch of valid messages. Nothing else is ever raised. No message of such a
            batch is used: those before the invalid one cannot be trusted either.
    """
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"a batch of {len(data)} bytes; at most {MAX_MESSAGE} are allowed")
    if bodies := _decode_only_data(data):
        return bodies
    try:
        batch = _decode(data)
    except Exception as exc:
        raise ProtocolError("not a msgpack array") from exc
    if not batch:
        raise ProtocolError("an empty batch")
    messages: list[Message] = []
    for pair in batch:
        if type(pair) is not list or len(pair) != 2:
            raise ProtocolError("a batch with an element that is not a pair of tag and body")
        tag, body = pair
        # The type first, since True and 1.0 are equal to the key 1.
        if type(tag) is not int:
            raise ProtocolError(f"a tag that is not an integer but {type(tag).__name__}")
        if tag not in _STRUCTURE:
            raise ProtocolError(f"an unknown message, tag {tag}")
        cls, structure = _STRUCTURE[tag]
        try:
            messages.append(structure(body, cls))
        except Exception as exc:
            raise ProtocolError(f"{cls.__name__}: {_explain(exc, body, cls)}") from exc
    return messages


def _decode_only_data(data: bytes) -> list[Message] | None:
    """Return the messages of a batch if all of them are valid ``Data``, else ``None``."""
    try:
        return [piece for _, piece in _decode_bodies(data)]
    except Exception:
        return None


def _explain(exc: Exception, body: Any, cls: type[Message]) -> str:
    """Return in one line what is wrong with ``body``."""
    if type(body) is not dict:
        return f"the body is not a map but {type(body).__name__}"
    if type(exc) is ValueError or cls is Data:
        # Raised by a validator of bounds.py, or by msgspec; both name the field.
        return str(exc)
    try:
        _explaining.structure(body, cls)
    except cattrs.BaseValidationError as group:
        found = cattrs.transform_error(group, format_exception=_describe)
        return found[0].replace(" @ $.", " in ") if found else "malformed"
    return "malformed"


def _describe(exc: BaseException, _: type | None) -> str:
    if isinstance(exc, _WrongType):
        return str(exc)
    if isinstance(exc, KeyError):
        return "no such field"
    return "malformed"
