"""Encoding and decoding of messages.

One binary websocket message carries a batch: a msgpack array of ``[tag, body]`` pairs, where ``tag`` is a small number
for the class of the message and ``body`` a map of its fields.

Theory of operation
===================

A peer is not trusted, and the work that its bytes cause is bounded before it is done:

- *Only what is wanted is built.* A batch is first taken apart into tags and undecoded bodies. Then each body is decoded
  as the fields of its class, by msgspec, with types and numbers of entries. A field that is not known is skipped, and
  nothing is built of it.
- *Maps have string keys, at every depth.* A key of another type is refused while decoding, before it is hashed: Python
  seeds the hashes of strings, but not those of numbers or of tuples of numbers, so a peer could send any number of keys
  that collide, and each insertion would compare its key with all others.
- *Everything has a bound*: the bytes and the messages of a batch, the entries of each container, the values and the
  depth of a JSON object. Sizes are compared with the bounds before anything is allocated for them.

Types are strict: ``"7"``, ``7.9`` and ``True`` are not integers, and no value becomes a string by conversion.

For each class there is a msgspec struct with the same fields, made once, here. Decoding is done into that, and the
message is made of its values, which runs the validators of ``bounds.py``. ``Data`` is such a struct itself, as most
messages are ``Data``; and nearly all batches hold nothing else, so each batch is first decoded as one of those, in one
step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Final, Literal, TypeVar, get_type_hints

import attrs
import msgspec

from .bounds import (
    CANCELLED_MAX,
    HEADER_COUNT_MAX,
    JSON_DEPTH_MAX,
    JSON_MAX,
    NAMES_MAX,
    ON_DEMAND_MAX,
    PROGRESS_MAX,
    USAGE_MAX,
)
from .errors import ProtocolError
from .messages import (
    Ack,
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
    OtherMasters,
    RegisterModel,
    Shutdown,
    UnregisterModel,
)

__all__ = [
    "MAX_BATCH",
    "MAX_MESSAGE",
    "TAGS",
    "Packed",
    "decode",
    "decode_handshake",
    "encode",
    "encode_batch",
    "encode_part",
    "pack",
    "pack_data",
]

#: Bytes in one websocket message at most; a larger one violates the protocol. The largest single message has about half
#: of that.
MAX_MESSAGE: Final = 256 * 1024

#: Messages in one batch at most. A sender stops a batch at 64 KiB, into which not quite so many of the smallest fit.
MAX_BATCH: Final = 4096

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
    Ack: 15,
    OtherMasters: 16,
}


# How the types of fields are decoded: with the number of entries that their validators allow. A JSON object is decoded
# afterwards, by `_read_json`, since msgspec would decode the keys of inner maps whatever their type.
_AS_DECODED: Final[dict[Any, Any]] = {
    bytes | memoryview: bytes,
    dict[str, Any]: msgspec.Raw,
    dict[str, str]: Annotated[dict[str, str], msgspec.Meta(max_length=HEADER_COUNT_MAX)],
    dict[str, int]: Annotated[dict[str, int], msgspec.Meta(max_length=USAGE_MAX)],
    tuple[int, ...]: Annotated[tuple[int, ...], msgspec.Meta(max_length=CANCELLED_MAX)],
    tuple[str, ...]: Annotated[tuple[str, ...], msgspec.Meta(max_length=NAMES_MAX)],
    tuple[tuple[str, str], ...]: Annotated[
        tuple[tuple[str, str], ...], msgspec.Meta(max_length=HEADER_COUNT_MAX)
    ],
    tuple[tuple[int, int], ...]: Annotated[
        tuple[tuple[int, int], ...], msgspec.Meta(max_length=PROGRESS_MAX)
    ],
    tuple[tuple[str, str, float], ...]: Annotated[
        tuple[tuple[str, str, float], ...], msgspec.Meta(max_length=ON_DEMAND_MAX)
    ],
    tuple[tuple[int, str, float], ...]: Annotated[
        tuple[tuple[int, str, float], ...], msgspec.Meta(max_length=ON_DEMAND_MAX)
    ],
}
_EMPTY_MAP: Final = b"\x80"

MessageT = TypeVar("MessageT", bound="Message")


def _decoder_of(cls: type[MessageT]) -> Callable[[msgspec.Raw], MessageT]:
    """Return what decodes the body of a message of this class."""
    if cls is Data:
        return msgspec.msgpack.Decoder(cls).decode
    hints = get_type_hints(cls)
    fields: list[Any] = []
    json_fields: list[int] = []
    declared_fields: tuple[attrs.Attribute[Any], ...] = attrs.fields(cls)  # type: ignore[arg-type]
    for index, field in enumerate(declared_fields):
        declared = hints[field.name]
        decoded = _AS_DECODED.get(declared, declared)
        if decoded is msgspec.Raw:
            json_fields.append(index)
        if field.default is attrs.NOTHING:
            fields.append((field.name, decoded))
        elif decoded is msgspec.Raw:
            fields.append((field.name, decoded, msgspec.Raw(_EMPTY_MAP)))
        elif field.default == attrs.Factory(dict):
            fields.append((field.name, decoded, msgspec.field(default_factory=dict)))
        else:
            fields.append((field.name, decoded, field.default))
    decode_fields = msgspec.msgpack.Decoder(msgspec.defstruct(cls.__name__, fields, gc=False)).decode
    values_of = msgspec.structs.astuple

    def decode_body(body: msgspec.Raw) -> MessageT:
        return cls(*values_of(decode_fields(body)))

    def decode_body_with_json(body: msgspec.Raw) -> MessageT:
        values = list(values_of(decode_fields(body)))
        for index in json_fields:
            values[index] = _read_json(values[index], declared_fields[index].name)
        return cls(*values)

    return decode_body_with_json if json_fields else decode_body


def _read_json(encoded: msgspec.Raw, name: str) -> dict[str, Any]:
    """Return a JSON object, with string keys only and of limited size and depth.

    Raises:
        ValueError: it is something else. The text begins with the name of the field.
    """
    data = bytes(encoded)
    if data == _EMPTY_MAP:
        return {}
    if not _is_map(data[0]):
        raise ValueError(f"{name}: expected map")
    reader = _JsonReader(data)
    try:
        result: dict[str, Any] = reader.value(0)
    except (msgspec.DecodeError, ValueError) as error:
        problem = str(error)
        raise ValueError(f"{name}: {problem if type(error) is ValueError else 'not JSON'}") from error
    return result


def _is_map(tag: int) -> bool:
    return tag & 0xF0 == 0x80 or tag in (0xDE, 0xDF)


_scalar: Final = msgspec.msgpack.Decoder(None | bool | int | float | str).decode
_text: Final = msgspec.msgpack.Decoder(str).decode
# The bytes of a scalar of a fixed size, by its first byte; and the bytes of the length of the others.
_SIZES: Final = {
    **dict.fromkeys((*range(0x80), *range(0xE0, 0x100), 0xC0, 0xC2, 0xC3), 1),
    **dict.fromkeys((0xCC, 0xD0), 2),
    **dict.fromkeys((0xCD, 0xD1), 3),
    **dict.fromkeys((0xCA, 0xCE, 0xD2), 5),
    **dict.fromkeys((0xCB, 0xCF, 0xD3), 9),
}
_LENGTHS: Final = {0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}


class _JsonReader:
    """Reads JSON values from msgpack, which must be complete and well-formed, as msgspec guarantees of a ``Raw``."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        # What the validator allows: eight of its units for each value.
        self._left = JSON_MAX // 8

    def value(self, depth: int) -> Any:
        tag = self._data[self._position]
        if depth > JSON_DEPTH_MAX:
            raise ValueError(f"nested deeper than {JSON_DEPTH_MAX}")
        if _is_map(tag):
            count = self._count(tag, 0x0F)
            # Each key is read first, then its value: that is the order of the two in the expression.
            return {self._key(): self.value(depth + 1) for _ in range(count)}
        if tag & 0xF0 == 0x90 or tag in (0xDC, 0xDD):
            return [self.value(depth + 1) for _ in range(self._count(tag, 0x0F))]
        return self._scalar(tag)

    def _count(self, tag: int, mask: int) -> int:
        count = self._length(tag, mask)
        self._left -= count
        if self._left < 0:
            raise ValueError("too large")
        return count

    def _length(self, tag: int, mask: int) -> int:
        """Return the length of a text or container, and go to where its content begins."""
        width = _LENGTHS.get(tag, 0)
        start = self._position + 1
        self._position = start + width
        return int.from_bytes(self._data[start : start + width], "big") if width else tag & mask

    def _key(self) -> str:
        tag = self._data[self._position]
        if not (tag & 0xE0 == 0xA0 or tag in (0xD9, 0xDA, 0xDB)):
            raise ValueError("contains a key that is not a string")
        return _text(self._take(tag))

    def _scalar(self, tag: int) -> Any:
        if tag not in _SIZES and not (tag & 0xE0 == 0xA0 or tag in (0xD9, 0xDA, 0xDB)):
            raise ValueError("contains a value that JSON cannot represent")
        return _scalar(self._take(tag))

    def _take(self, tag: int) -> bytes:
        start = self._position
        if (size := _SIZES.get(tag)) is not None:
            self._position = start + size
        else:
            size = self._length(tag, 0x1F)
            self._position += size
        return self._data[start : self._position]


_DECODERS: Final = {tag: (cls, _decoder_of(cls)) for cls, tag in TAGS.items()}

_encode: Final = msgspec.msgpack.Encoder().encode
_BOUNDED: Final = msgspec.Meta(max_length=MAX_BATCH)
_decode_pairs: Final = msgspec.msgpack.Decoder(Annotated[list[tuple[int, msgspec.Raw]], _BOUNDED]).decode
_decode_bodies: Final = msgspec.msgpack.Decoder(Annotated[list[tuple[Literal[8], Data]], _BOUNDED]).decode

#: A message in the form that :func:`encode_batch` needs.
Packed = msgspec.Raw | list[Any]


def pack(message: Message) -> list[Any]:
    """Return ``message`` as a ``[tag, body]`` pair for :func:`encode_batch`; bytes in it are not copied."""
    return [TAGS[type(message)], message]


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
    if len(data) <= MAX_MESSAGE and (bodies := _decode_only_data(data)):
        return bodies
    return [_decode_message(tag, body) for tag, body in _split(data)]


def decode_handshake(data: bytes) -> tuple[Handshake, int]:
    """Return the handshake with which the first batch begins, and the number of messages that follow it.

    Those are not decoded.

    Raises:
        ProtocolError: ``data`` is not a batch, or does not begin with a valid handshake.
    """
    pairs = _split(data)
    tag, body = pairs[0]
    if tag in _DECODERS and tag != TAGS[Handshake]:
        raise ProtocolError(f"the first message must be Handshake, not {_DECODERS[tag][0].__name__}")
    message = _decode_message(tag, body)
    assert isinstance(message, Handshake)
    return message, len(pairs) - 1


def _split(data: bytes) -> list[tuple[int, msgspec.Raw]]:
    """Return the tags and the undecoded bodies of a batch, which is not empty.

    Raises:
        ProtocolError: as :func:`decode`.
    """
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"a batch of {len(data)} bytes; at most {MAX_MESSAGE} are allowed")
    try:
        pairs: list[tuple[int, msgspec.Raw]] = _decode_pairs(data)
    except msgspec.ValidationError as error:
        raise ProtocolError(_explain_batch(str(error))) from error
    except Exception as error:
        raise ProtocolError(_NO_BATCH) from error
    if not pairs:
        raise ProtocolError("an empty batch")
    return pairs


def _decode_message(tag: int, body: msgspec.Raw) -> Message:
    if tag not in _DECODERS:
        raise ProtocolError(f"an unknown message, tag {tag}")
    cls, decode_body = _DECODERS[tag]
    try:
        return decode_body(body)
    except Exception as error:
        raise ProtocolError(f"{cls.__name__}: {_explain(error)}") from error


def _decode_only_data(data: bytes) -> list[Message] | None:
    """Return the messages of a batch if all of them are valid ``Data``, else ``None``."""
    try:
        return [piece for _, piece in _decode_bodies(data)]
    except Exception:
        return None


_NO_BATCH: Final = f"not a msgpack array of at most {MAX_BATCH} messages"
# The parts of msgspec's errors: what was expected, what came, and where.
_WRONG_TYPE: Final = re.compile(r"Expected `([^`]+)`, got `([^`]+)`(?: - at (`key` in )?`\$([^`]*)`)?")
_WRONG_LENGTH: Final = re.compile(r"Expected `\w+` of length (<= )?(\d+)(?:, got \d+)?(?: - at `\$([^`]*)`)?")
_MISSING: Final = re.compile(r"Object missing required field `(\w+)`")
_PYTHON_NAMES: Final = {"array": "list", "object": "map", "null": "NoneType", "None": "NoneType"}


def _explain_batch(problem: str) -> str:
    """Return in one line what is wrong with a batch, given msgspec's words for it."""
    wrong_type, wrong_length = _WRONG_TYPE.match(problem), _WRONG_LENGTH.match(problem)
    if wrong_type is not None and (wrong_type[4] or "").endswith("][0]"):
        return f"a tag that is not an integer but {_PYTHON_NAMES.get(wrong_type[2], wrong_type[2])}"
    if (wrong_type is not None and wrong_type[4]) or (wrong_length is not None and wrong_length[3]):
        return "a batch with an element that is not a pair of tag and body"
    return _NO_BATCH


def _explain(error: Exception) -> str:
    """Return in one line what is wrong with a body."""
    problem = str(error)
    if type(error) is ValueError:
        # Raised by a validator of bounds.py, which names the field.
        return problem
    if not isinstance(error, msgspec.ValidationError):
        return "malformed"
    if (missing := _MISSING.match(problem)) is not None:
        return f"no such field in {missing[1]}"
    if (length := _WRONG_LENGTH.match(problem)) is not None:
        where = (length[3] or "").lstrip(".")
        if length[1]:
            return f"{where}: more than {length[2]} entries"
        return f"expected {length[2]} entries in {where}"
    if (wrong := _WRONG_TYPE.match(problem)) is None:
        # Raised by a validator of Data, which names the field, too.
        return problem.partition(" - at `$")[0]
    expected, got = (_PYTHON_NAMES.get(name, name) for name in wrong.group(1, 2))
    where = (wrong[4] or "").lstrip(".")
    if wrong[3]:
        return f"a key that is not a string but {got}" + (f" in {where}" if where else "")
    if not where:
        return f"the body is not a map but {got}"
    return f"expected {expected}, got {got} in {where}"
