"""Bytes to messages and back.

One binary websocket message carries a batch: a msgpack array of ``[tag, body]`` pairs, where ``tag`` is a
small number for the class of the message and ``body`` a map of its fields. cattrs knows the fields; its
functions for each class are made once, here, because looking them up for every message costs more than
running them.

Types are strict in both directions of doubt: ``"7"``, ``7.9`` and ``True`` are no integers, and nothing
becomes a string by being printed. cattrs by itself would accept all of these.

Two converters. The one that does the work stops at the first mistake and does not say where it was. When it
has refused something, the other, slower by half, does it again for the sake of the error message.

``Data`` is a message like the others and looks like them. But nearly all batches hold nothing else, so each is first
tried as one of those, which msgspec reads by itself, ten times as fast; it is as strict about types.
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

__all__ = ["MAX_MESSAGE", "TAGS", "Packed", "decode", "encode", "freeze", "pack", "pack_data", "write"]

#: Bytes in one websocket message at most; a larger one breaks the protocol. The largest single message has
#: about half of it.
MAX_MESSAGE: Final = 256 * 1024

#: What stands for each class on the wire. Numbers are never given anew, not even those of messages that are
#: gone.
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
    """A field has another type than its class declares; the text is fit to be shown."""

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
    # Other languages write 60.0 as 60.
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


def _as_it_is(value: Any) -> Any:
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
        # msgspec takes all that fields hold as it is; left alone, cattrs would copy every container.
        converter.register_unstructure_hook_func(partial(eq, shape), _as_it_is)
    return converter


for _class in TAGS:
    if attrs.has(_class):
        attrs.resolve_types(_class)

_plain: Final = _converter(detailed=False)
_explaining: Final = _converter(detailed=True)
_plain.register_structure_hook(Data, partial(msgspec.convert, builtin_types=(bytes,)))
_plain.register_unstructure_hook(Data, _as_it_is)
_UNSTRUCTURE: Final[dict[type[Message], Callable[[Any], Any]]] = {
    cls: _plain.get_unstructure_hook(cls) for cls in TAGS
}
_STRUCTURE: Final = {tag: (cls, _plain.get_structure_hook(cls)) for cls, tag in TAGS.items()}

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(list[Any]).decode
_decode_bodies: Final = msgspec.msgpack.Decoder(list[tuple[Literal[8], Data]]).decode

#: A message in the form in which :func:`write` takes it.
Packed = msgspec.Raw | list[Any]


def pack(message: Message) -> list[Any]:
    """Return ``message`` as the ``[tag, body]`` that :func:`write` takes; bytes in it are not copied."""
    cls = type(message)
    return [TAGS[cls], _UNSTRUCTURE[cls](message)]


def pack_data(call: int, data: bytes | memoryview, last: bool) -> list[Any]:
    """Return what :func:`pack` does for such a ``Data``, which has to be a good one."""
    return [TAGS[Data], {"call": call, "data": data, "last": last}]


def freeze(message: Message) -> msgspec.Raw:
    """Return ``message`` encoded, ready to become part of a batch."""
    return msgspec.Raw(_encode(pack(message)))


def write(batch: list[Packed]) -> bytes:
    """Return the bytes of a batch. Payloads are copied once, into the result."""
    return _encode(batch)


def encode(messages: Iterable[Message]) -> bytes:
    """Return the batch of ``messages`` as the content of one binary websocket message.

    Raises:
        ValueError: it would be larger than ``MAX_MESSAGE``.
    """
    data = write([pack(message) for message in messages])
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"a batch of {len(data)} bytes; the peer takes at most {MAX_MESSAGE}")
    return data


def decode(data: bytes) -> list[Message]:
    """Return the messages of one binary websocket message, in order.

    Raises:
        ProtocolError: ``data`` is not a batch of well-formed messages. Nothing else is ever raised, and no
            message of such a batch is used: what precedes a mistake cannot be trusted either.
    """
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"a batch of {len(data)} bytes; at most {MAX_MESSAGE} are allowed")
    if bodies := _only_data(data):
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
            raise ProtocolError("a batch holds something that is not a pair of tag and body")
        tag, body = pair
        # The type first: True and 1.0 would find the entry of 1.
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


def _only_data(data: bytes) -> list[Message] | None:
    """Return the messages of a batch if all of them are good ``Data``."""
    try:
        return [piece for _, piece in _decode_bodies(data)]
    except Exception:
        return None


def _explain(exc: Exception, body: Any, cls: type[Message]) -> str:
    """Say in one line what is wrong with ``body``."""
    if type(body) is not dict:
        return f"the body is no map but {type(body).__name__}"
    if type(exc) is ValueError or cls is Data:
        # One of our own bounds, or msgspec's opinion; both name the field.
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
