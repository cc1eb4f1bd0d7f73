"""The tokens of an upstream server's answers: how they are read, asked for, and kept from clients who did not ask."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Sequence
from typing import Any

import patience
import pytest
import trio
from hypothesis import example, given, strategies as st
from raw_server import Visit, reply
from test_openai_engine import CHUNKED, EVENTS, chunk, engine_with, outcome_of, posts, request

from trio_cluster.core.answer import Done, Usage
from trio_cluster.engines._usage_reader import EventReader, UsageFilter, UsageReader, usage_reader
from trio_cluster.engines._usage_request import ask_for_usage

JSON = "application/json"
SSE = "text/event-stream"


def event(value: Any, name: str = "", end: str = "\n") -> bytes:
    lines = ([f"event: {name}"] if name else []) + [f"data: {json.dumps(value)}", "", ""]
    return end.join(lines).encode()


DONE = b"data: [DONE]\n\n"
COUNTS = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
CHAT = COUNTS | {
    "prompt_tokens_details": {"cached_tokens": 8},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
NEWER = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 8},
    "output_tokens": 4,
    "output_tokens_details": {"reasoning_tokens": 2},
    "total_tokens": 13,
}
TOKEN = {"choices": [{"index": 0, "delta": {"content": 'a "usage": {}'}}], "usage": None}
#: A schema that some servers repeat in their answers.
TOOLS = [
    {"type": "function", "parameters": {"properties": {"usage": {"prompt_tokens": 77, "input_tokens": 77}}}}
]

#: For each route, plain and streamed: the answer, and its usage.
ANSWERS: dict[str, tuple[str, str, bytes, Usage | None]] = {
    "chat": (
        "chat.completions",
        JSON,
        json.dumps({"choices": [], "usage": CHAT}).encode(),
        Usage(9, 4, 8, 2),
    ),
    "chat, usage first": (
        "chat.completions",
        JSON,
        json.dumps({"usage": COUNTS, "x": {"usage": {"prompt_tokens": 1}}}).encode(),
        Usage(9, 4),
    ),
    "chat, none": ("chat.completions", JSON, json.dumps({"choices": [TOKEN], "usage": None}).encode(), None),
    "chat, indented": (
        "chat.completions",
        JSON,
        json.dumps({"a": [], "usage": CHAT}, indent=2).encode(),
        Usage(9, 4, 8, 2),
    ),
    "chat, streamed": (
        "chat.completions",
        SSE,
        event(TOKEN) + event({"choices": [], "usage": CHAT}) + DONE,
        Usage(9, 4, 8, 2),
    ),
    "chat, streamed, with the last choice": (
        "chat.completions",
        SSE,
        event(TOKEN) + event(TOKEN | {"usage": CHAT}) + DONE,
        Usage(9, 4, 8, 2),
    ),
    "chat, streamed, running counts": (
        "chat.completions",
        SSE,
        b"".join(event(TOKEN | {"usage": {"prompt_tokens": 9, "completion_tokens": n}}) for n in range(5)),
        Usage(9, 4),
    ),
    "chat, streamed, none": ("chat.completions", SSE, event(TOKEN) + DONE, None),
    "completions": ("completions", JSON, json.dumps({"usage": COUNTS}).encode(), Usage(9, 4)),
    "completions, streamed": (
        "completions",
        SSE,
        event({"choices": [], "usage": COUNTS}) + DONE,
        Usage(9, 4),
    ),
    "responses": (
        "responses",
        JSON,
        json.dumps({"tools": TOOLS, "usage": NEWER, "z": TOOLS}).encode(),
        Usage(9, 4, 8, 2),
    ),
    "responses, streamed": (
        "responses",
        SSE,
        event({"type": "response.created", "response": {"tools": TOOLS, "usage": None}}, "response.created")
        + event({"type": "response.output_text.delta", "delta": '"usage":{"input_tokens":5}'}, "x")
        + event(
            {"type": "response.completed", "response": {"tools": TOOLS, "usage": NEWER}}, "response.completed"
        ),
        Usage(9, 4, 8, 2),
    ),
    "responses, incomplete": (
        "responses",
        SSE,
        event({"type": "response.incomplete", "response": {"usage": NEWER, "tools": TOOLS}}),
        Usage(9, 4, 8, 2),
    ),
    "responses, only created": (
        "responses",
        SSE,
        event({"type": "response.created", "response": {"tools": TOOLS, "usage": None}}),
        None,
    ),
    "messages": (
        "messages",
        JSON,
        json.dumps({"usage": {"input_tokens": 1, "cache_read_input_tokens": 8, "output_tokens": 4}}).encode(),
        Usage(9, 4, 8),
    ),
    "messages, streamed": (
        "/v1/messages",
        SSE,
        event(
            {
                "type": "message_start",
                "message": {
                    "content": [],
                    "usage": {
                        "input_tokens": 1,
                        "cache_creation_input_tokens": 2,
                        "cache_read_input_tokens": 6,
                        "output_tokens": 1,
                    },
                },
            },
            "message_start",
        )
        + event({"type": "content_block_delta", "delta": {"text": "usage"}}, "content_block_delta")
        + event({"type": "message_delta", "delta": {}, "usage": {"output_tokens": 4}}, "message_delta")
        + event({"type": "message_stop"}, "message_stop"),
        Usage(9, 4, 6),
    ),
    "embeddings": (
        "embeddings",
        JSON,
        json.dumps(
            {"data": [{"embedding": [0.5]}], "usage": {"prompt_tokens": 9, "total_tokens": 9}}
        ).encode(),
        Usage(9),
    ),
    "embeddings, usage first": (
        "embeddings",
        JSON,
        json.dumps({"usage": {"prompt_tokens": 9}, "data": [{"embedding": [0.5] * 999}]}).encode(),
        Usage(9),
    ),
    "rerank, only a total": ("rerank", JSON, json.dumps({"usage": {"total_tokens": 9}}).encode(), Usage(9)),
    "moderations": ("moderations", JSON, json.dumps({"results": []}).encode(), None),
    "chat, only a total": (
        "chat.completions",
        JSON,
        json.dumps({"usage": {"total_tokens": 9}}).encode(),
        None,
    ),
    "images": (
        "images.generations",
        JSON,
        json.dumps({"data": [{"b64_json": "A" * 9999}], "usage": NEWER}).encode(),
        Usage(9, 4, 8, 2),
    ),
    "images, streamed": (
        "images.generations",
        SSE,
        event({"type": "image_generation.completed", "b64_json": "A" * 99_999, "usage": NEWER}),
        Usage(9, 4, 8, 2),
    ),
    "transcription": (
        "audio.transcriptions",
        JSON,
        json.dumps({"text": "a", "usage": {"type": "tokens"} | NEWER}).encode(),
        Usage(9, 4, 8, 2),
    ),
    "transcription, seconds": (
        "audio.transcriptions",
        JSON,
        json.dumps({"text": "a", "usage": {"type": "duration", "seconds": 3}}).encode(),
        None,
    ),
    "transcription, streamed": (
        "audio.transcriptions",
        SSE,
        event({"type": "transcript.text.done", "text": "a", "usage": NEWER}) + DONE,
        Usage(9, 4, 8, 2),
    ),
    "speech, streamed": (
        "audio.speech",
        SSE,
        event({"type": "speech.audio.done", "usage": NEWER}),
        Usage(9, 4, 8, 2),
    ),
    "another route": ("/v1/score", JSON, json.dumps({"usage": COUNTS}).encode(), Usage(9, 4)),
}


def read(reader: UsageReader | None, pieces: Sequence[bytes]) -> tuple[bytes, Usage | None]:
    """Return what a reader passes on, and what it has read."""
    assert reader is not None
    return b"".join([*map(reader.feed, pieces), reader.end()]), reader.usage


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(places)]


@pytest.mark.parametrize("name", ANSWERS)
def test_the_usage_of_every_route_is_read(name: str) -> None:
    endpoint, content_type, answer, usage = ANSWERS[name]
    assert read(usage_reader(endpoint, 200, content_type, ""), [answer]) == (answer, usage)
    if endpoint in ("chat.completions", "completions"):
        assert read(usage_reader(endpoint, 200, content_type, "", asked=True), [answer])[1] == usage


@given(st.sampled_from(sorted(ANSWERS)), st.lists(st.integers(0, 1 << 20), max_size=8))
def test_the_usage_does_not_depend_on_how_the_answer_is_divided(name: str, cuts: list[int]) -> None:
    endpoint, content_type, answer, usage = ANSWERS[name]
    assert read(usage_reader(endpoint, 200, content_type, ""), split(answer, cuts)) == (answer, usage)


@pytest.mark.parametrize("name", [name for name, (*_, answer, _) in ANSWERS.items() if len(answer) < 2000])
def test_the_usage_is_read_byte_by_byte_and_across_every_single_cut(name: str) -> None:
    endpoint, content_type, answer, usage = ANSWERS[name]
    for cut in range(len(answer)):
        pieces = [answer[:cut], answer[cut:]]
        assert read(usage_reader(endpoint, 200, content_type, ""), pieces) == (answer, usage)
    single = [answer[i : i + 1] for i in range(len(answer))]
    assert read(usage_reader(endpoint, 200, content_type, ""), single) == (answer, usage)


@pytest.mark.parametrize(
    ("status", "content_type", "encoding"),
    [(400, JSON, ""), (200, "audio/mpeg", ""), (200, "", ""), (200, JSON, "gzip"), (200, SSE, "br")],
)
def test_answers_that_cannot_be_read_have_no_reader(status: int, content_type: str, encoding: str) -> None:
    assert usage_reader("chat.completions", status, content_type, encoding) is None
    assert usage_reader("chat.completions", 200, "Application/JSON; charset=utf-8", "identity") is not None


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(['"usage":{"prompt_tokens":1}', "\\", '\\"', "{", "a]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["usage", "a", '"', "\\"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(["a", "b\\", 'c"', "choices"]), JSON_VALUES),
    st.dictionaries(st.sampled_from(["d", "e"]), JSON_VALUES),
    st.lists(st.integers(0, 1 << 16), max_size=5),
)
def test_the_usage_is_a_member_of_the_outermost_object_whatever_is_around_it(
    before: dict[str, Any], after: dict[str, Any], cuts: list[int]
) -> None:
    for usage, expected in ((COUNTS, Usage(9, 4)), (None, None), ({"seconds": 1}, None)):
        answer = json.dumps(before | {"usage": usage} | after).encode()
        reader = usage_reader("chat.completions", 200, JSON, "")
        assert read(reader, split(answer, cuts)) == (answer, expected)


@given(
    st.binary(max_size=300),
    st.lists(st.integers(0, 300), max_size=5),
    st.sampled_from([JSON, SSE]),
    st.booleans(),
)
def test_any_bytes_pass(data: bytes, cuts: list[int], content_type: str, asked: bool) -> None:
    passed, _ = read(usage_reader("chat.completions", 200, content_type, "", asked=asked), split(data, cuts))
    assert passed == data


@pytest.mark.parametrize(
    "usage",
    [
        b'{"prompt_tokens":' + b"9" * 20_000 + b"}",
        b'{"prompt_tokens":9,',
        b'{"prompt_tokens":-1}',
        b'{"prompt_tokens":1.5}',
        b'{"prompt_tokens":true}',
        b'{"prompt_tokens":"9"}',
        b"{]}",
        b"[1]",
        b"3",
        b'"x"',
        b"{}",
        b'{"a":' + b"{" * 17_000,
    ],
)
def test_what_is_no_usage_is_unknown(usage: bytes) -> None:
    answer = b'{"choices":[],"usage":' + usage + b"}"
    for content_type, whole in ((JSON, answer), (SSE, b"data: " + answer + b"\n\n")):
        assert read(usage_reader("chat.completions", 200, content_type, ""), [whole])[1] is None


def test_a_broken_line_does_not_hide_what_follows() -> None:
    stream = b": don't \"\n\n" + event({"usage": COUNTS})
    assert read(usage_reader("chat.completions", 200, SSE, ""), [stream[:5], stream[5:]])[1] == Usage(9, 4)


def test_numbers_that_are_not_json_are_read_all_the_same() -> None:
    answer = b'{"usage":{"prompt_tokens":9,"completion_tokens":4,"rate":NaN}}'
    assert read(usage_reader("chat.completions", 200, JSON, ""), [answer])[1] == Usage(9, 4)


# Streams whose usage the engine has asked for


EXTRA = {"id": "c", "object": "chat.completion.chunk", "choices": [], "usage": CHAT}

#: Events of a stream, and whether they are kept from the client.
EVENT = st.sampled_from(
    [(event(EXTRA), True), (event(EXTRA, end="\r\n"), True), (event(EXTRA, end="\r"), True),
     (event(TOKEN), False), (event(TOKEN, end="\r\n"), False), (event(TOKEN, end="\r"), False),
     (event(TOKEN | {"usage": CHAT}), False), (event({"choices": [], "usage": None}), False),
     (event({"choices": [], "prompt_filter_results": []}), False), (event({"usage": CHAT}), False),
     (event({"x": "y" * 70_000, "usage": CHAT, "choices": []}), False), (b": ping\n\n", False), (DONE, False),
     (event({"error": {"message": "no"}}), False), (b"data: {}\ndata: {}\n\n", False)]
)  # fmt: skip


@given(
    st.lists(EVENT, max_size=6),
    st.sampled_from([b"", b"data: [DO", b"data: [DONE]\n", b"\n"]),
    st.lists(st.integers(0, 1 << 18), max_size=8),
)
@example([(event(EXTRA), True)] * 2, b"", [1, 2, 3])
def test_the_extra_event_is_taken_out_and_all_others_pass_byte_for_byte(
    events: list[tuple[bytes, bool]], rest: bytes, cuts: list[int]
) -> None:
    stream = b"".join(data for data, _ in events) + rest
    expected = b"".join(data for data, extra in events if not extra) + rest
    passed, usage = read(usage_reader("chat.completions", 200, SSE, "", asked=True), split(stream, cuts))
    assert passed == expected
    assert (usage is not None) >= any(extra for _, extra in events)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_single_cut_and_every_byte_alone(end: str) -> None:
    kept = event(TOKEN, end=end), DONE
    stream = kept[0] + event(EXTRA, end=end) + kept[1]
    for cut in range(len(stream) + 1):
        reader = usage_reader("chat.completions", 200, SSE, "", asked=True)
        assert read(reader, [stream[:cut], stream[cut:]]) == (b"".join(kept), Usage(9, 4, 8, 2))
    reader = usage_reader("chat.completions", 200, SSE, "", asked=True)
    single = [stream[i : i + 1] for i in range(len(stream))]
    assert read(reader, single) == (b"".join(kept), Usage(9, 4, 8, 2))


def test_an_extra_event_without_its_blank_line_is_kept_back_at_the_end() -> None:
    stream = event(TOKEN) + event(EXTRA).rstrip()
    passed, usage = read(usage_reader("chat.completions", 200, SSE, "", asked=True), [stream])
    assert (passed, usage) == (event(TOKEN), Usage(9, 4, 8, 2))


@given(st.lists(st.sampled_from([event(TOKEN), event(TOKEN, end="\r\n"), DONE, b": ping\n\n"])))
def test_an_event_that_is_complete_is_never_held(events: list[bytes]) -> None:
    reader = usage_reader("chat.completions", 200, SSE, "", asked=True)
    assert reader is not None
    for each in events:
        assert reader.feed(each) == each
    for each in events:
        # Nor is one whose beginning was.
        assert reader.feed(each[:3]) + reader.feed(each[3:]) == each


def test_what_passes_is_always_a_beginning_of_what_will() -> None:
    stream = event(TOKEN) + event(EXTRA) + event(TOKEN) + DONE
    expected = event(TOKEN) * 2 + DONE
    for cut in range(len(stream)):
        reader = usage_reader("chat.completions", 200, SSE, "", asked=True)
        assert reader is not None
        passed = reader.feed(stream[:cut])
        assert expected.startswith(passed)
        assert passed.endswith((b"", b"\n\n"))


def test_a_large_event_is_passed_on_before_it_is_complete() -> None:
    reader = usage_reader("chat.completions", 200, SSE, "", asked=True)
    assert reader is not None
    assert reader.feed(b"data: " + b"x" * 70_000) == b"data: " + b"x" * 70_000
    assert reader.feed(b"y") == b"y"
    assert reader.feed(b"\n") == b"\n"
    assert reader.feed(b"\n" + event(EXTRA) + DONE) == b"\n" + DONE


# Costs


@pytest.mark.parametrize("kind", [UsageFilter, EventReader])
def test_a_token_is_neither_parsed_nor_copied(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = usage_reader("chat.completions", 200, SSE, "", asked=kind is UsageFilter)
    assert isinstance(reader, kind)
    monkeypatch.setattr("msgspec.json.decode", None)
    for usage in (TOKEN, {"choices": [{"delta": {"content": "x"}}]}):
        piece = event(usage)
        assert reader.feed(piece) is piece


def test_a_large_answer_is_read_without_being_collected() -> None:
    vector = json.dumps([0.123456789] * 1024)
    piece = ('{"object":"embedding","embedding":' + vector + "},").encode()
    reader = usage_reader("embeddings", 200, JSON, "")
    assert reader is not None
    reader.feed(b'{"data":[')
    for _ in range(1000):
        assert reader.feed(piece) is piece
    reader.feed(b'null],"usage":{"prompt_tokens":9}}')
    assert reader.usage == Usage(9)


# Asking


@pytest.mark.parametrize(
    ("body", "asking"),
    [
        (
            b'{"model":"m","stream":true}',
            b'{"stream_options":{"include_usage":true},"model":"m","stream":true}',
        ),
        (b' {\n "stream" : true }', b' {"stream_options":{"include_usage":true},\n "stream" : true }'),
        (
            b'{"stream":true,"stream_options":null}',
            b'{"stream":true,"stream_options":{"include_usage":true}}',
        ),
        (
            b'{"stream":true,"stream_options":{"include_usage":false,"x":1},"y":1.0e0}',
            b'{"stream":true,"stream_options":{"include_usage":true,"x":1},"y":1.0e0}',
        ),
        (b'{"stream":true,"stream_options":{"include_usage":true}}', None),
        (b'{"stream":true,"stream\\u005foptions":{"include_usage":true}}', None),
        (b'{"stream":false}', None),
        (b'{"stream":"true"}', None),
        (b'{"model":"m"}', None),
        (b'{"stream":true,"stream_options":[]}', None),
        (b'{"stream":true', None),
        (b"[]", None),
        (b"", None),
        (b"\xff", None),
        (b"[" * 100_000, None),
    ],
)
def test_what_asks_for_usage_is_spliced_in_and_nothing_else_changes(
    body: bytes, asking: bytes | None
) -> None:
    assert ask_for_usage(body) == asking


STREAM = b'{"model":"m","stream":true}'
ASKING = b'{"stream_options":{"include_usage":true},"model":"m","stream":true}'


def stream_of(*pieces: bytes) -> bytes:
    return CHUNKED + b"".join(map(chunk, pieces)) + b"0\r\n\r\n"


async def done_of(server: Any, **fields: Any) -> tuple[bytes, Done]:
    """Return the body of an answer, and its end."""
    call = server.router.open(request(**fields))
    outcome = await outcome_of(call)
    assert isinstance(call.end, Done), outcome.error
    return outcome.body, call.end


@pytest.mark.parametrize("endpoint", ["chat.completions", "completions"])
async def test_the_server_is_asked_and_the_extra_event_is_kept_from_the_client(endpoint: str) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(stream_of(event(TOKEN), event(EXTRA)[:30], event(EXTRA)[30:] + DONE))

    async with engine_with(script) as (server, raw, _):
        body, end = await done_of(server, body=STREAM, endpoint=endpoint)
        assert (body, end) == (event(TOKEN) + DONE, Done(Usage(9, 4, 8, 2)))
        assert [received.body for received in posts(raw)] == [ASKING]
        # A renamed model, and one that asks itself.
        own = b'{"stream":true,"stream_options":{"include_usage":true},"model":"m"}'
        body, end = await done_of(server, body=own, endpoint=endpoint)
        assert (body, end) == (event(TOKEN) + event(EXTRA) + DONE, Done(Usage(9, 4, 8, 2)))
        assert posts(raw)[-1].body == own


async def test_the_name_of_the_model_and_the_request_for_usage_are_both_put_into_the_body() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(stream_of(event(EXTRA), DONE))

    async with engine_with(script, ",prefix=gpu/") as (server, raw, _):
        body, end = await done_of(server, body=b'{"model":"gpu/m","stream":true}', model="gpu/m")
        assert (body, end.usage) == (DONE, Usage(9, 4, 8, 2))
        assert posts(raw)[-1].body == ASKING


async def test_an_engine_that_only_observes_leaves_the_request_and_the_stream_alone() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(stream_of(event(TOKEN), event(EXTRA), DONE))

    async with engine_with(script, ",usage=observe") as (server, raw, _):
        body, end = await done_of(server, body=STREAM)
        assert (body, end) == (event(TOKEN) + event(EXTRA) + DONE, Done(Usage(9, 4, 8, 2)))
        assert posts(raw)[-1].body == STREAM


async def test_a_server_that_reports_nothing_has_unknown_usage() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(stream_of(event(TOKEN), DONE))

    async with engine_with(script) as (server, _, _):
        assert await done_of(server, body=STREAM) == (event(TOKEN) + DONE, Done())


@pytest.mark.parametrize("status", ["400 Bad Request", "422 Unprocessable Content"])
async def test_a_server_that_refuses_to_be_asked_is_asked_once(
    status: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_cluster")

    async def script(visit: Visit) -> None:
        received = await visit.request()
        if b"stream_options" in received.body:
            await visit.send(reply(b'{"error":"extra field: stream_options"}', status))
        else:
            await visit.send(stream_of(event(TOKEN), DONE))

    async with engine_with(script) as (server, raw, _):
        for _ in range(3):
            assert await done_of(server, body=STREAM) == (event(TOKEN) + DONE, Done())
        assert [received.body for received in posts(raw)] == [ASKING, STREAM, STREAM, STREAM]
    assert len([record for record in caplog.records if "stream_options" in record.getMessage()]) == 1


async def test_the_refusal_of_a_bad_request_is_the_answer_and_says_nothing_about_asking() -> None:
    answers = ["400 no", "400 stream_options", "400 no", "200 yes"]

    async def script(visit: Visit) -> None:
        received = await visit.request()
        status = answers.pop(0) if received.body == ASKING else "400 still"
        await visit.send(reply(status[4:].encode() * 9_000, status, "application/json", "Retry-After: 7"))

    async with engine_with(script) as (server, raw, _):
        for expected in ("no", "still", "no", "yes"):
            assert (await done_of(server, body=STREAM))[0] == expected.encode() * 9_000
        assert [received.body for received in posts(raw)] == [ASKING, ASKING, STREAM, ASKING, ASKING]


@pytest.mark.parametrize("status", ["401 Unauthorized", "404 Not Found", "429 Busy", "500 Oops"])
async def test_other_refusals_are_the_answer_at_once(status: str) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(reply(b"no", status))

    async with engine_with(script) as (server, raw, _):
        assert (await done_of(server, body=STREAM))[0] == b"no"
        assert len(posts(raw)) == 1


async def test_a_body_that_is_too_large_to_be_held_is_not_asked_with() -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(stream_of(event(TOKEN), DONE))

    large = b'{"model":"m","stream":true,"x":"' + b"x" * 4_200_000 + b'"}'
    async with engine_with(script) as (server, raw, _):
        assert await done_of(server, body=large) == (event(TOKEN) + DONE, Done())
        assert posts(raw)[-1].body == large
        medium = large.replace(b"x" * 200_000, b"")
        assert await done_of(server, body=medium) == (event(TOKEN) + DONE, Done())
        assert posts(raw)[-1].body == b'{"stream_options":{"include_usage":true},' + medium[1:]


# Broken streams


@pytest.mark.parametrize("head", [CHUNKED, EVENTS + b"\r\n"], ids=["chunked", "close-delimited"])
@pytest.mark.parametrize("last", [b"", event(TOKEN)[:40], event(EXTRA)[:40], event(EXTRA)])
async def test_a_stream_that_breaks_off_fails_and_passes_no_part_of_an_event(
    head: bytes, last: bytes
) -> None:
    async def script(visit: Visit) -> None:
        await visit.request()
        sent = event(TOKEN) + last
        await visit.send(head + (chunk(sent) if head is CHUNKED else sent))
        await visit.stream.aclose()

    async with engine_with(script) as (server, _, _):
        outcome = await outcome_of(server.router.open(request(STREAM)))
        assert outcome.error is not None
        assert outcome.error.code == "upstream_lost"
        assert outcome.body == event(TOKEN)


async def test_a_token_is_not_delayed() -> None:
    taken = trio.Event()

    async def script(visit: Visit) -> None:
        await visit.request()
        await visit.send(CHUNKED + chunk(event(TOKEN)))
        await taken.wait()
        await visit.send(chunk(event(EXTRA) + DONE) + b"0\r\n\r\n")

    async with engine_with(script) as (server, _, _):
        call = server.router.open(request(STREAM))
        with patience.fail_after(2):
            await call.receive()
            assert (await call.receive()).data == event(TOKEN)  # type: ignore[union-attr]
        taken.set()
        assert (await outcome_of(call)).body == DONE
