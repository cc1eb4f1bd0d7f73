"""Fuzz target: the messages of the cluster protocol, as bytes and composed field by field.

Checked for any batch:

- Nothing is raised but ``ProtocolError``, whose reason is one short line.
- What was decoded can be encoded, has the size of a message at most, and is decoded as the same again.
- What a message can be made into on its receiver raises nothing but what is documented.
- A batch that begins with a handshake begins with the same one when only that is decoded.
- The CPU time is proportional to the bytes.
"""

from __future__ import annotations

from typing import Any, Final

import attrs
import msgspec
from fuzz_input import Bytecode, Input, seed, timed

from trio_cluster.protocol import (
    MAGIC,
    MAX_MESSAGE,
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
    ProtocolError,
    RegisterModel,
    Shutdown,
    UnregisterModel,
    decode,
    encode,
)
from trio_cluster.protocol.codec import TAGS, decode_handshake

__all__ = ["EXAMPLES", "FINDINGS", "SEEDS", "check"]

_RAW, _COMPOSED = range(2)
#: Bytes of a composed batch's program: a byte can stand for 64 KiB, or for hundreds of times what follows it.
_PROGRAM_MAX: Final = 512
#: What a close frame and a line of a log can carry, with room.
_REASON_MAX: Final = 2000

#: One of each, with something in each field.
EXAMPLES: Final[tuple[Message, ...]] = (
    Handshake(MAGIC, 1, 1, "n", "1.0", "i"),
    RegisterModel("m", "chat", "o", 7, {"a": [1, None, {"b": 0.5}], "c": "d"}, ("e",), ("v",)),
    ModelRegistered("m"),
    ModelRejected("m", "no"),
    UnregisterModel("m"),
    Heartbeat(1, 2, 3, 0.5, "b", ((1, 2), (3, -1))),
    ForwardRequest(1, "e", "chat", "m", "a/b", {"h": "v"}, "r", 1.5, None, 5, True, True, "p"),
    ForwardResponse(1, 200, "a/b", (("h", "v"), ("h", "w"))),
    Data(1, b"data", True),
    Done(1, {"prompt_tokens": 1, "total_tokens": 2}),
    Failed(1, 500, "m", "t", "c", None, 2.0, True, False),
    Cancel(1, "r"),
    Grant(1, 65536),
    Drain("r"),
    Shutdown("r"),
)
_FIELDS: Final = [
    {name: getattr(example, name) for name in example.__struct_fields__}
    if isinstance(example, Data)
    else attrs.asdict(example, recurse=False)
    for example in EXAMPLES
]
#: Values that may be right somewhere, and hardly anywhere else.
_VALUES: Final[list[Any]] = [
    None,
    True,
    0,
    1,
    -1,
    2**31 - 1,
    2**31,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**63),
    200,
    599,
    0.0,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x",
    "\n",
    "\x1b[0m",
    "ä\u2028",
    "x" * 512,
    "x" * 513,
    "x" * 8193,
    b"",
    b"x",
    bytes(65536),
    bytes(65537),
    [],
    {},
    [[1, 2]],
    [["h", "v"]],
    [["h:", "v\r\n"]],
    {"h": "v"},
    {"h": 1},
    {1: 2},
    {"a": {1: 2}},
    {"a": [b"x"]},
    {"extra_fields": {"a": 1}},
    {"temperature": "hot"},
    msgspec.msgpack.Ext(1, b"x"),
    [1] * 65,
    [["h", "v"]] * 129,
    [[1, 2]] * 1025,
]


def check(encoded: bytes) -> None:
    """Check one input."""
    given = Input.of(encoded)
    data = given.data if given.part % 2 == _RAW else _compose(Bytecode(given.data[:_PROGRAM_MAX]))
    messages = timed(lambda: _decoded(data), len(data))
    handshake = timed(lambda: _decoded_handshake(data), len(data))
    if messages is None:
        return
    if handshake is not None:
        assert handshake == (messages[0], len(messages) - 1)
    else:
        assert not isinstance(messages[0], Handshake)
    for message in messages[:64]:
        _check_message(message)


def _decoded(data: bytes) -> list[Message] | None:
    try:
        return decode(data)
    except ProtocolError as error:
        _check_reason(error.reason)
        return None


def _decoded_handshake(data: bytes) -> tuple[Handshake, int] | None:
    try:
        return decode_handshake(data)
    except ProtocolError as error:
        _check_reason(error.reason)
        return None


def _check_reason(reason: str) -> None:
    assert 0 < len(reason) <= _REASON_MAX, f"a reason of {len(reason)} characters: {reason[:200]!r} ..."
    assert reason.isprintable(), f"a reason that cannot be printed as one line: {reason!r}"


def _check_message(message: Message) -> None:
    try:
        again = encode([message])
    except ValueError as error:
        raise AssertionError(f"{type(message).__name__} cannot be encoded: {error}") from error
    assert len(again) <= MAX_MESSAGE
    (decoded,) = decode(again)
    # NaN, which a weight may be, equals nothing; it is shown like itself.
    assert repr(decoded) == repr(message), f"encoded again {decoded}, at first {message}"
    assert encode([decoded]) == again
    if isinstance(message, RegisterModel):
        try:
            message.info()
        except ValueError as error:
            assert str(error)
    elif isinstance(message, Done):
        message.tokens()
    elif isinstance(message, Failed):
        assert Failed.of(message.call, message.error()).status == message.status


def _compose(program: Bytecode) -> bytes:
    """Return a batch: of messages of any kind, in which some fields are missing, wrong, or unknown."""
    batch: list[Any] = []
    while not program.over and len(batch) < 8:
        kind = program.byte() % (len(EXAMPLES) + 1)
        body: Any = dict(_FIELDS[kind]) if kind < len(EXAMPLES) else {}
        tag: Any = TAGS[type(EXAMPLES[kind])] if kind < len(EXAMPLES) else _value(program, 0)
        for _ in range(program.byte() % 4):
            name = program.pick([*body, "unknown"])
            if program.byte() % 8 == 0:
                body.pop(name, None)
            else:
                body[name] = _value(program, 0)
        batch.append([tag, body if program.byte() % 16 else _value(program, 0)])
    return msgspec.msgpack.encode(batch)


def _value(program: Bytecode, depth: int) -> Any:
    kind = program.byte()
    if kind < len(_VALUES):
        return _VALUES[kind]
    kind %= 8
    if depth > 20 or kind == 0:
        return program.number(8)
    if kind == 1:
        return program.text()
    if kind == 2:
        return program.text().decode("utf-8", "replace")
    if kind == 3:
        return {
            program.text().decode("latin-1"): _value(program, depth + 1) for _ in range(program.byte() % 8)
        }
    if kind == 4:
        return [_value(program, depth + 1) for _ in range(program.byte() % 8)]
    if kind == 5:
        return {"a": _value(program, depth + 1)}
    if kind == 6:
        item = _value(program, depth + 1)
        # As often as fits; in a list in a list, that is soon once.
        return [item] * min(program.byte(), 2 * MAX_MESSAGE // len(msgspec.msgpack.encode(item)))
    return {program.number(2): _value(program, depth + 1)}


def _bytes_of(size: int) -> bytes:
    return bytes((index * 37) & 0xFF for index in range(size))


SEEDS: Final = [
    *[seed(encode([example])) for example in EXAMPLES],
    seed(encode(EXAMPLES)),
    seed(b""),
    seed(b"\x90"),
    *[
        seed(data)
        for data in (
            b"\xc1",
            b"\x80",
            b"\x91\xc0",
            b"\x91\x91\x00",
            b"\x91\x92\xa1x\x80",
            b"\x91\x92\x7f\x80",
        )
    ],
    # Many small messages, maps and lists in one.
    seed(b"\xdd\x00\x00\x0f\xff\x92\x08\x82\xa4call\x01\xa4data\xc4\x00", times=4096, start=5, length=16),
    seed(b"\xdd\x00\x00\x10\x00\x92\x05\x80", times=4096, start=5, length=3),
    seed(
        b"\x91\x92\x01\x85\xa4name\xa1m\xa4kind\xa1k\xa5owner\xa1o\xa7created\x01\xa7options\x81\xa1a"
        b"\xdd\x00\x00\x10\x00\x90",
        times=4096,
        start=48,
        length=1,
    ),
    seed(b"\x91\x92\x05\x81\xa1x" + b"\x91" * 8 + b"\xc0", times=8192, start=6, length=8),
    seed(b"\x91\x92\x05\x81\xa1x\xdd\x00\x01\x00\x00\x81\xa1a\xa1b", times=65536, start=11, length=5),
    *[
        seed(bytes((kind, 2, field, 1, value, field + 1, 0)), part=1)
        for kind in range(15)
        for field in (0, 3)
        for value in range(0, len(_VALUES), 7)
    ],
    *[seed(_bytes_of(size), part=1) for size in (20, 60, 200)],
]

#: What was found once, and must not come back.
FINDINGS: Final = [
    # A weight that is no number is taken, and counts as the least one.
    seed(
        b"\x91\x92\x06\xde\x00\x11\xa6budget\xc0\xa4call\x01\xa7checked\xc3\xaccontent_type\xa3a/b\xa8endpoint\xa1e"
        b"\xa7headers\x81\xa1h\xa1v\xa4kind\xa4chat\xaamax_to#ens\x00\xa5model\xa1m\xa4once\xc3\xa90rincipal\xa1p"
        b"\xa8priority\x00\xa5query\xa0\xaarequest_id\xa1r\xa4size\x05\xa7timeout\xcb?\xf8\x00\x00\x00\x00\x00\x00"
        b"\xa6weight\xcb\xff\xff\x00\x00\x00\x00\x00\x00"
    ),
]
