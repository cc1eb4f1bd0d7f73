"""Bytes to messages: everything valid is decoded, everything else is refused with a reason."""

from __future__ import annotations

import math
import time
import tracemalloc
from typing import Any

import attrs
import msgspec
import pytest
from example_counts import examples
from hypothesis import example, given, settings, strategies as st

from trio_cluster.core import channel
from trio_cluster.core.model import ChatModelOptions, ModelInfo
from trio_cluster.errors import ApiError, Overloaded
from trio_cluster.protocol import (
    MAGIC,
    MAX_MESSAGE,
    PIECE,
    TEXT_MAX,
    WINDOW,
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
    ProtocolError,
    RegisterModel,
    Shutdown,
    UnregisterModel,
    decode,
    encode,
)
from trio_cluster.protocol.bounds import clip
from trio_cluster.protocol.codec import TAGS, encode_batch, pack_data

EXAMPLES: list[Message] = [
    Handshake(MAGIC, 1, 1, "node-1", "0.1.0"),
    Handshake(MAGIC, 0, 7, "node-1", "0.1.0", "a1b2"),
    Handshake(MAGIC, 1, 1, "node-1", "0.1.0", "a1b2", 15.0, "0123456789abcdef" * 2, 1 << 40),
    RegisterModel("echo", "chat", "me", 1_700_000_000, {"extra_fields": {"a": [1, 2.5, None, {"b": True}]}}),
    RegisterModel("模型", "asr", "me", 0),
    ModelRegistered("echo"),
    ModelRejected("echo", "taken"),
    ModelRejected("echo", ""),
    UnregisterModel("echo"),
    Heartbeat(),
    Heartbeat(3, 1, 10),
    Heartbeat(3, 1, 10, 2.5, "handler of 'm' (app.py:12 in compute)", ((1, 0), (7, -1))),
    Heartbeat(1, 0, 4, on_demand=(("qwen3-32b", "cold", 20.5),), starts=((7, "starting qwen3-32b", -1.0),)),
    ForwardRequest(
        1, "chat.completions", "chat", "echo", "application/json", {"x-a": "é"}, "r", 60.0, 0.5, 9
    ),
    ForwardRequest((1 << 63) - 1, "e", "chat", "m", "", {}, "", None, None, -1),
    ForwardRequest(1, "e", "chat", "m", "", {}, "", None, None, 0, True, True, "alice", 2.5, -1, 1 << 30),
    ForwardRequest(2, "/v1/x", "custom", "m", "", {}, "", None, None, -1, query="a=%0d%0a&b=?"),
    ForwardResponse(7, 200, "text/event-stream", (("x-a", "1"), ("x-a", "2"))),
    ForwardResponse(7, 201, "audio/wav"),
    Data(7, b"\x00\xff" * 100),
    Data(7, b"", True),
    Data(7, b""),
    Data(7, b"x" * PIECE, True),
    Done(7),
    Failed(7, 429, "slow down", "rate_limit_error", "c", "p", 1.5),
    Failed(7, 500, "", "server_error", None, None, None),
    Cancel(7, "client left"),
    Grant(7, WINDOW),
    Drain("restart"),
    Shutdown("upgrade"),
    Ack(0),
    Ack((1 << 63) - 1),
    OtherMasters(0),
    OtherMasters(7, (("b", "b.example:9080"), ("c", "[2001:db8::1]:9080"))),
]


def raw(*pairs: Any) -> bytes:
    """Return a batch of anything at all."""
    return msgspec.msgpack.encode(list(pairs))


def fields_of(message: Message) -> dict[str, Any]:
    return (
        msgspec.structs.asdict(message) if isinstance(message, Data) else attrs.asdict(message, recurse=False)
    )


def evolve(message: Message, name: str, value: Any) -> Message:
    replace = msgspec.structs.replace if isinstance(message, Data) else attrs.evolve
    return replace(message, **{name: value})


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_as_it_was(message: Message) -> None:
    (back,) = decode(encode([message]))
    assert back == message
    assert type(back) is type(message)


def test_there_is_an_example_and_a_number_for_every_message() -> None:
    assert {type(message) for message in EXAMPLES} == set(TAGS)
    assert len(set(TAGS.values())) == len(TAGS)


def test_the_numbers_on_the_wire_are_those_of_protocol_1() -> None:
    assert [cls.__name__ for cls, _ in sorted(TAGS.items(), key=lambda item: item[1])] == [
        "Handshake",
        "RegisterModel",
        "ModelRegistered",
        "ModelRejected",
        "UnregisterModel",
        "Heartbeat",
        "ForwardRequest",
        "ForwardResponse",
        "Data",
        "Done",
        "Failed",
        "Cancel",
        "Grant",
        "Drain",
        "Shutdown",
        "Ack",
        "OtherMasters",
    ]


def test_a_batch_keeps_its_order() -> None:
    assert decode(encode(EXAMPLES)) == EXAMPLES


def test_a_memoryview_is_sent_as_the_bytes_that_it_shows() -> None:
    (back,) = decode(encode_batch([pack_data(1, memoryview(b"0123456789")[3:6], False)]))
    assert back == Data(1, b"345")
    assert type(back.data) is bytes


def test_a_field_that_is_not_known_is_ignored() -> None:
    assert decode(raw([9, {"call": 7, "from_the_future": [1]}])) == [Done(7)]


def test_a_whole_number_of_seconds_is_a_float() -> None:
    example = next(message for message in EXAMPLES if isinstance(message, ForwardRequest))
    body = fields_of(example) | {"timeout": 60}
    (request,) = decode(raw([6, body]))
    assert isinstance(request, ForwardRequest)
    assert type(request.timeout) is float


def test_the_windows_of_calls_and_of_the_wire_are_the_same() -> None:
    assert WINDOW == channel.WINDOW


# What is refused


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a msgpack array"),
        (b"\xc1", "not a msgpack array"),
        (b"hello", "not a msgpack array"),
        (b"\x01\x02", "not a msgpack array"),
        (msgspec.msgpack.encode({"a": 1}), "not a msgpack array"),
        (msgspec.msgpack.encode("text"), "not a msgpack array"),
        (encode([Done(1)])[:-1], "not a msgpack array"),
        (encode([Done(1)]) + b"\x00", "not a msgpack array"),
        (b"\xdd\xff\xff\xff\xff", "not a msgpack array"),
        (b"\x91" * 200_000, "not a pair"),
        (b"\x91\x92\x09" + b"\x91" * 200_000, "not a msgpack array"),
        (b"\x91\xa1\xff", "not a pair"),
        (raw(), "an empty batch"),
        (raw(1), "not a pair"),
        (raw("ab"), "not a pair"),
        (raw({8: 1, 9: 2}), "not a pair"),
        (raw([9]), "not a pair"),
        (raw([9, {"call": 1}, 1]), "not a pair"),
        (raw(["9", {"call": 1}]), "a tag that is not an integer but str"),
        (raw([True, {"call": 1}]), "a tag that is not an integer but bool"),
        (raw([9.0, {"call": 1}]), "a tag that is not an integer but float"),
        (raw([[9], {"call": 1}]), "a tag that is not an integer but list"),
        (raw([17, {}]), "an unknown message, tag 17"),
        (raw([-1, {}]), "an unknown message, tag -1"),
        (raw([9, [7]]), "Done: the body is not a map but list"),
        (raw([9, None]), "Done: the body is not a map but NoneType"),
        (raw([9, "call"]), "Done: the body is not a map but str"),
        (raw([9, {}]), "Done: no such field in call"),
        (raw([9, {1: 2}]), "Done: a key that is not a string but int"),
        (raw(*[[5, {}]] * 4097), "not a msgpack array of at most 4096 messages"),
    ],
)
def test_what_is_not_a_batch_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(data)
    assert reason in caught.value.reason


# For each field that is not optional or a container: the types that it must not have.
WRONG: dict[str, list[Any]] = {
    "int": ["7", 7.9, 7.0, True, None, b"7", [7], {"a": 7}],
    "str": [7, 7.5, True, None, b"x", ["x"], {"x": "x"}],
    "float": ["7", True, None, b"7", [7.0], {}],
    "str | None": [7, True, b"x", ["x"], {}],
    "float | None": ["7", True, b"7", [7.0], {}],
    "bool": [0, 1, "true", None],
    "bytes": ["text", 7, None, [1, 2]],
    "dict[str, str]": [[], [["a", "b"]], "a", None, {"a": 1}, {1: "a"}, {"a": None}],
    "dict[str, int]": [[], "a", 1, None, {1: 1}, {"a": "1"}, {"a": 1.0}, {"a": True}, {"a": None}],
    "dict[str, Any]": [[], "a", 1, None, {1: "a"}],
    "tuple[str, ...]": [{}, "ab", 7, None, [7], [["a"]], [b"a"], [None]],
    "tuple[int, ...]": [{}, {1: 2}, "x", 7, None, ["7"], [7.5], [True], [[7]], [7, b"7"]],
    "tuple[tuple[int, int], ...]": [
        {},
        {1: 2},
        7,
        None,
        [7],
        [[7]],
        [[7, "1"]],
        [[7, True]],
        [[7, 1.0]],
        [[7, 1, 2]],
    ],
    "tuple[tuple[str, str, float], ...]": [
        {},
        "ab",
        None,
        [["a", "b"]],
        [["a", "b", "1"]],
        [[1, "b", 1.0]],
        [["a", "b", 1.0, 2]],
    ],
    "tuple[tuple[int, str, float], ...]": [{}, None, [[7, "b"]], [["7", "b", 1.0]], [[7, 7, 1.0]]],
    "tuple[tuple[str, str], ...]": [
        {},
        {"a": "b"},
        "ab",
        None,
        ["ab"],
        [["a"]],
        [["a", 1]],
        [["a", "b", "c"]],
    ],
}


def wrong_types() -> list[Any]:
    cases = []
    seen = set()
    for message in EXAMPLES:
        cls = type(message)
        if cls in seen:
            continue
        seen.add(cls)
        for name, declared in cls.__annotations__.items():
            for value in WRONG[declared]:
                cases.append(pytest.param(message, name, value, id=f"{cls.__name__}.{name}={value!r}"))
    return cases


@pytest.mark.parametrize(("message", "name", "value"), wrong_types())
def test_a_field_of_a_wrong_type_is_refused_by_its_name(message: Message, name: str, value: Any) -> None:
    cls = type(message)
    with pytest.raises(ProtocolError) as caught:
        decode(raw([TAGS[cls], fields_of(message) | {name: value}]))
    assert caught.value.reason.startswith(f"{cls.__name__}: ")
    assert name in caught.value.reason


OUTSIDE: list[tuple[type[Message], str, Any]] = [
    (Handshake, "protocol_min", -1),
    (Handshake, "node_id", ""),
    (Handshake, "node_id", "x" * 513),
    (Handshake, "node_id", "two\nlines"),
    (Handshake, "version", "\x1b[31m"),
    (RegisterModel, "name", ""),
    (RegisterModel, "name", "x" * 513),
    (RegisterModel, "created", -1),
    (RegisterModel, "options", {"a": b"bytes"}),
    (RegisterModel, "options", {"a": math.nan}),
    (RegisterModel, "options", {"a": math.inf}),
    (RegisterModel, "options", {"a": {1: 2}}),
    (RegisterModel, "options", {"a": "x" * 32768}),
    (RegisterModel, "options", {"x" * 32768: 1}),
    (RegisterModel, "options", {"a": [0] * 4096}),
    (RegisterModel, "options", {"a": [[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]}),
    (ModelRejected, "reason", "x" * 8193),
    (Heartbeat, "running", -1),
    (Heartbeat, "capacity", 1 << 31),
    (Heartbeat, "lag", -0.1),
    (Heartbeat, "lag", math.inf),
    (Heartbeat, "lag", math.nan),
    (Heartbeat, "blocked", "x" * 513),
    (RegisterModel, "also", ("a",) * 65),
    (RegisterModel, "also", ("",)),
    (RegisterModel, "also", ("a\nb",)),
    (Heartbeat, "progress", ((0, 1),)),
    (Heartbeat, "progress", ((1 << 63, 1),)),
    (Heartbeat, "progress", ((1, -2),)),
    (Heartbeat, "progress", ((1, 1 << 63),)),
    (Heartbeat, "progress", ((1, 1),) * 1025),
    (ForwardRequest, "call", 0),
    (ForwardRequest, "call", -1),
    (ForwardRequest, "call", 1 << 63),
    (ForwardRequest, "model", "x" * 513),
    (ForwardRequest, "content_type", "a/b\r\nx: y"),
    (ForwardRequest, "content_type", "x" * 513),
    (ForwardRequest, "headers", {"a": "b\r\nc: d"}),
    (ForwardRequest, "headers", {"a b": "c"}),
    (ForwardRequest, "headers", {"": "c"}),
    (ForwardRequest, "headers", {"a": "x" * 32768}),
    (ForwardRequest, "headers", {f"a{i}": "" for i in range(129)}),
    (ForwardRequest, "request_id", "x" * 513),
    (ForwardRequest, "timeout", -0.1),
    (ForwardRequest, "timeout", math.nan),
    (ForwardRequest, "budget", math.inf),
    (ForwardRequest, "size", -2),
    (ForwardRequest, "query", "a=\r\nx: y"),
    (ForwardRequest, "query", "a b"),
    (ForwardRequest, "query", "a\n"),
    (ForwardRequest, "query", "a#b"),
    (ForwardRequest, "query", "\u00e9"),
    (ForwardRequest, "query", "x" * 8193),
    (ForwardResponse, "status", 199),
    (ForwardResponse, "status", 600),
    (ForwardResponse, "headers", [["a", "\n"]]),
    (ForwardResponse, "headers", [["a", "b"]] * 129),
    (Data, "call", 0),
    (Data, "call", 1 << 63),
    (Data, "data", b"x" * (PIECE + 1)),
    (Done, "call", 0),
    (Failed, "status", 399),
    (Failed, "status", 600),
    (Failed, "message", "x" * 8193),
    (Failed, "code", "x" * 513),
    (Failed, "retry_after", -1.0),
    (Cancel, "reason", "x" * 8193),
    (Grant, "credit", 0),
    (Grant, "credit", -5),
    (Grant, "credit", WINDOW + 1),
    (Drain, "reason", "x" * 8193),
    (Shutdown, "reason", "x" * 8193),
]


@pytest.mark.parametrize(
    ("cls", "name", "value"), OUTSIDE, ids=lambda part: getattr(part, "__name__", repr(part)[:30])
)
def test_a_value_out_of_bounds_can_neither_be_received_nor_made(
    cls: type[Message], name: str, value: Any
) -> None:
    good = next(message for message in EXAMPLES if type(message) is cls)
    with pytest.raises(ProtocolError, match=f"^{cls.__name__}: {name}: ") as caught:
        decode(raw([TAGS[cls], fields_of(good) | {name: value}]))
    assert len(caught.value.reason) < 200
    with pytest.raises(ValueError, match=f"^{name}: "):
        evolve(good, name, value)


def test_a_batch_that_is_too_large_is_refused_at_both_ends() -> None:
    data = raw(*[[8, {"call": 1, "data": bytes(PIECE), "last": False}]] * 4)
    with pytest.raises(ProtocolError, match="at most"):
        decode(data)
    with pytest.raises(ValueError, match="at most"):
        encode([Data(1, bytes(PIECE))] * 4)


def test_the_largest_message_of_each_kind_leaves_room_for_the_batch_before_it() -> None:
    wide, name = "\U0001f600", "\U0001f600" * 512
    texts = {f"x{i}": "é" * 300 for i in range(100)}
    assert (len(name), name.isprintable()) == (512, True)
    largest: list[Message] = [
        Handshake(MAGIC, 1, 1, name, name, name),
        RegisterModel(name, name, name, 0, {"a": wide * 32700}),
        ForwardRequest(1, name, name, name, "é" * 512, texts, wide * 512, None, None, -1),
        Failed(1, 500, wide * TEXT_MAX, wide * 512, wide * 512, wide * 512, None),
        Drain(wide * TEXT_MAX),
        Heartbeat(
            0,
            0,
            0,
            1.0,
            wide * 512,
            (((1 << 63) - 1, (1 << 63) - 1),) * 1024,
            on_demand=((wide * 42, wide * 16, 1e300),) * 384,
            starts=(((1 << 63) - 1, wide * 42, 1e300),) * 384,
        ),
    ]
    for message in largest:
        assert len(encode([message])) < MAX_MESSAGE - PIECE
        assert decode(encode([message])) == [message]


@pytest.mark.parametrize("options", [{"a": ["x\udcff"]}, {"\ud800": 1}])
def test_a_text_without_an_encoding_is_refused_before_it_is_sent(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^reason: .* cannot be encoded"):
        Drain("\ud800")
    with pytest.raises(ValueError, match=r"^options: .* cannot be encoded"):
        RegisterModel("m", "chat", "o", 0, options)


def test_a_list_that_contains_itself_is_refused_before_it_takes_memory() -> None:
    loop: list[Any] = []
    loop.extend([loop] * 4000)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="options: too large"):
            RegisterModel("m", "chat", "o", 0, {"a": loop})
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


# Work that is caused by bytes of a peer


def colliding_keys(count: int) -> list[bytes]:
    """Return encoded tuples of two integers that all have the same hash: CPython does not seed that of a tuple."""
    mask = (1 << 64) - 1
    one, two, five = 11400714785074694791, 14029467366897019727, 2870177450012600261
    keys: list[bytes] = []
    first = 0
    wanted = pow(one, -1, 1 << 64) * 1234567 & mask
    turned = (wanted >> 31 | wanted << 33) & mask
    while len(keys) < count:
        first += 1
        state = (five + first * two) & mask
        state = (state << 31 | state >> 33) & mask
        second = (turned - state * one) * pow(two, -1, 1 << 64) & mask
        if second < (1 << 61) - 1:
            keys.append(msgspec.msgpack.encode((first, second)))
    return keys


def test_the_keys_of_the_attack_collide() -> None:
    keys: list[Any] = [tuple(msgspec.msgpack.decode(key)) for key in colliding_keys(50)]
    assert len({hash(key) for key in keys}) == 1
    assert len(set(keys)) == 50


def map_of(keys: list[bytes]) -> bytes:
    return b"\xdf" + len(keys).to_bytes(4, "big") + b"".join(key + b"\xc0" for key in keys)


ATTACK = map_of(colliding_keys(15_500))
REGISTER = b"\x85\xa4name\xa1n\xa4kind\xa4chat\xa5owner\xa1o\xa7created\x00\xa7options"


@pytest.mark.parametrize(
    ("data", "refused"),
    [
        (b"\x91\x92\x09\x82\xa4call\x01\xa5later" + ATTACK, None),
        (b"\x91\x92\x09" + ATTACK, "a key that is not a string"),
        (b"\x91" + ATTACK, "not a pair"),
        (b"\x91\x92\x11" + ATTACK, "unknown message"),
        (b"\x91\x92" + ATTACK + b"\x80", "a tag that is not an integer"),
        (b"\x91\x92\x08\x83\xa4call\x01\xa4data\xc4\x00\xa5later" + ATTACK, None),
        (b"\x91\x92\x01" + REGISTER + b"\x81\xa1a" + ATTACK, "options: too large"),
        (b"\x91\x92\x01" + REGISTER + b"\x81\xa1a\x91\x81\xa1b" + map_of(colliding_keys(4000)), "options: "),
        (b"\x91\x92\x01" + REGISTER + ATTACK, "options: "),
        (b"\x91\x92\x05\x81\xa8progress" + ATTACK, "progress"),
        (raw([5, {"progress": [[1, 1]] * 60_000}]), "progress: more than 1024"),
        (raw([9, {"call": 1, "usage": {str(i): 1 for i in range(20_000)}}]), "usage: more than 16"),
        (
            raw([7, {"call": 1, "status": 200, "content_type": "", "headers": [["a", "b"]] * 40_000}]),
            "headers: more",
        ),
        (raw(*[[5, {}]] * 80_000), "at most 4096 messages"),
        (
            raw([1, {"name": "n", "kind": "k", "owner": "o", "created": 0, "options": {"a": [0] * 240_000}}]),
            "too large",
        ),
    ],
)
def test_a_message_of_any_content_costs_a_few_milliseconds(data: bytes, refused: str | None) -> None:
    assert 49_000 < len(data) < MAX_MESSAGE
    took = []
    for _ in range(3):
        began = time.perf_counter()
        try:
            decode(data)
            reason = None
        except ProtocolError as error:
            reason = error.reason
        took.append(time.perf_counter() - began)
        assert (reason is None) == (refused is None)
        assert (refused or "") in (reason or "")
    assert min(took) < 0.01


def test_a_message_of_which_much_is_unknown_takes_no_memory_for_it() -> None:
    data = raw([9, {"call": 1, "later": [[]] * 100_000}])
    tracemalloc.start()
    try:
        assert decode(data) == [Done(1)]
        assert tracemalloc.get_traced_memory()[1] < 4 * len(data)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    [
        {"a": {"b": {1: 2}}},
        {"a": [{"b": [{None: 2}]}]},
        {"a": {b"k": 1}},
        {"a": {True: 1}},
        {"a": {1.5: 1}},
        {"a": {(1, 2): 1}},
        {"": {"": {"": {(): 1}}}},
    ],
)
def test_maps_have_string_keys_at_every_depth(value: dict[str, Any]) -> None:
    body = {"name": "n", "kind": "k", "owner": "o", "created": 0, "options": value}
    with pytest.raises(ProtocolError, match="options: contains a key that is not a string"):
        decode(raw([1, body]))


@given(
    st.dictionaries(
        st.text(max_size=40),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(1 << 63), (1 << 64) - 1)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(max_size=300),
            lambda inner: (
                st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=5), inner, max_size=20)
            ),
            max_leaves=30,
        ),
        max_size=20,
    )
)
@settings(deadline=None, max_examples=examples(50))
def test_any_json_object_arrives_as_it_was_sent(options: dict[str, Any]) -> None:
    try:
        message = RegisterModel("m", "chat", "o", 0, options)
    except ValueError:
        return
    assert decode(encode([message])) == [message]


# Errors and models on the wire


def test_an_error_is_received_as_it_was_raised() -> None:
    raised = ApiError(429, "slow down", code="c", type="t", param="p", retry_after=2)
    (failed,) = decode(encode([Failed.of(3, raised)]))
    assert isinstance(failed, Failed)
    assert failed.call == 3
    error = failed.error()
    for name in ("status", "message", "code", "type", "param", "retry_after"):
        assert getattr(error, name) == getattr(raised, name)
    assert Failed.of(1, Overloaded("full")).error().envelope() == Overloaded("full").envelope()


def test_whatever_an_error_holds_it_can_be_sent() -> None:
    odd: Any = ApiError(500, "x" * 10_000 + "\ud800", code="c" * 999, param="\udcff")
    odd.status, odd.code, odd.retry_after = "teapot", 1301, math.nan
    (failed,) = decode(encode([Failed.of(1, odd)]))
    assert isinstance(failed, Failed)
    assert (failed.status, failed.code, failed.param, failed.retry_after) == (500, "1301", "?", None)
    assert len(failed.message) == TEXT_MAX
    assert failed.message.endswith("x…")


def test_clipping_does_not_change_what_fits() -> None:
    assert clip("ä" * 10, 10) == "ä" * 10
    assert clip("ä" * 11, 10) == "ä" * 9 + "…"


def test_a_model_is_registered_with_all_of_its_fields() -> None:
    options = ChatModelOptions(
        supports_vision=True, context_window=4096, extra_fields={"a": [1, {"b": None}]}
    )
    info = ModelInfo("m", "chat", "me", 123, options)
    (message,) = decode(encode([RegisterModel.of(info)]))
    assert isinstance(message, RegisterModel)
    assert message.info() == info


def test_an_option_of_a_wrong_type_is_named_and_an_unknown_one_left_out() -> None:
    with pytest.raises(ValueError, match="supports_vision"):
        RegisterModel("m", "chat", "o", 0, {"supports_vision": "yes"}).info()
    assert RegisterModel("m", "chat", "o", 0, {"later": 1}).info().options == ChatModelOptions()


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"a": {1: 2}}, "a key that is not a string"),
        ({"a": 1 << 64}, "64 bits"),
        ({"a": "x" * 40_000}, "too large"),
    ],
)
def test_extra_fields_that_cannot_be_sent_are_refused_where_the_model_is_registered(
    extra: dict[str, Any], why: str
) -> None:
    info = ModelInfo("m", "chat", options=ChatModelOptions(extra_fields=extra))
    with pytest.raises(ValueError, match=f"options: .*{why}"):
        RegisterModel.of(info)


def test_a_name_that_is_not_valid_for_a_model_is_rejected_by_the_master() -> None:
    (message,) = decode(encode([RegisterModel(" m ", "chat", "o", 0)]))
    assert isinstance(message, RegisterModel)
    with pytest.raises(ValueError, match="name"):
        message.info()


# Arbitrary input

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=6,
)
tags = st.sampled_from(sorted(TAGS.values()))
bodies = st.dictionaries(
    st.sampled_from(sorted({name for cls in TAGS for name in cls.__annotations__})), anything, max_size=10
)


def only_protocol_errors(data: bytes) -> None:
    try:
        messages = decode(data)
    except ProtocolError as exc:
        reason = exc.reason
    else:
        reason = "none"
        assert decode(encode(messages)) == messages
    assert reason.isprintable()
    assert 0 < len(reason) < 200


@given(st.binary(max_size=400))
@example(b"\xc7\x00\x01")
@example(b"\x91\x92\xd6\xff\x00\x00\x00\x01\x80")
def test_arbitrary_bytes_never_raise_anything_but_a_protocol_error(data: bytes) -> None:
    only_protocol_errors(data)


@given(st.lists(st.tuples(tags | anything, bodies | anything), max_size=3))
@settings(max_examples=100)
def test_arbitrary_fields_never_raise_anything_but_a_protocol_error(pairs: list[tuple[Any, Any]]) -> None:
    only_protocol_errors(raw(*pairs))


data_bodies = st.fixed_dictionaries(
    {"call": st.integers(1, 9), "data": st.binary(max_size=9), "last": st.booleans()}
)


@given(st.lists(st.tuples(st.just(8) | tags, data_bodies | bodies), min_size=1, max_size=3))
@settings(max_examples=200)
def test_a_batch_of_data_alone_is_read_as_one_with_other_messages(pairs: list[tuple[Any, Any]]) -> None:
    def outcome(*more: Any) -> Any:
        try:
            return decode(raw(*pairs, *more))
        except ProtocolError as error:
            return error.reason

    alone, in_company = outcome(), outcome([9, {"call": 1}])
    assert in_company == (alone if isinstance(alone, str) else [*alone, Done(1)])


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=200)
def test_a_damaged_field_or_byte_never_raises_anything_but_a_protocol_error(
    message: Message, draw: st.DataObject
) -> None:
    body = fields_of(message)
    body[draw.draw(st.sampled_from(sorted(body)))] = draw.draw(anything)
    only_protocol_errors(raw([TAGS[type(message)], body]))
    data = bytearray(encode([message])[:2000])
    data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    only_protocol_errors(bytes(data))
