"""The parser of streams: it must distinguish the three endings, and must be strict."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from trio_cluster.testing import StreamGrammarError, read_stream

DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error":{"message":"no","type":"server_error","param":null,"code":null}}\n\n'
PING = b": ping\n\n"


def event(**members: Any) -> bytes:
    return b"data: " + json.dumps(members).encode() + b"\n\n"


def delta(text: str, index: int = 0) -> bytes:
    return event(choices=[{"index": index, "delta": {"content": text}, "finish_reason": None}])


def end(reason: str = "stop", index: int = 0) -> bytes:
    return event(choices=[{"index": index, "delta": {}, "finish_reason": reason}])


FINISHED = delta("a") + PING + delta("b") + end() + event(choices=[], usage={"total_tokens": 2}) + DONE


def test_a_finished_stream_is_reported_with_its_content() -> None:
    report = read_stream(FINISHED)
    assert report.ending == "finished"
    assert (report.text, report.texts) == ("ab", {0: "ab"})
    assert report.finish_reasons == {0: "stop"}
    assert report.usage == {"total_tokens": 2}
    assert (report.comments, len(report.events), report.error) == (1, 4, None)


def test_comments_may_come_before_the_first_event_and_before_an_error() -> None:
    named_ping = b"event: ping\n" + event(type="ping")
    for comment in (PING, b": keepalive\n\n", named_ping):
        assert read_stream(comment * 2).ending == "cut"
        assert read_stream(comment * 2 + ERROR).ending == "failed"
        report = read_stream(comment + FINISHED)
        assert (report.ending, report.text, report.comments) == ("finished", "ab", 2)
        with pytest.raises(StreamGrammarError):
            read_stream(FINISHED + comment)


def test_a_failed_stream_is_reported_with_its_error() -> None:
    report = read_stream(delta("a") + ERROR)
    assert report.ending == "failed"
    assert report.text == "a"
    assert report.error is not None
    assert report.error["message"] == "no"


def test_a_stream_that_fails_after_its_last_reason_has_failed() -> None:
    assert read_stream(delta("a") + end() + ERROR).ending == "failed"


@given(st.integers(0, len(FINISHED) - 1))
def test_a_stream_that_lacks_any_byte_of_its_end_is_cut(length: int) -> None:
    assert read_stream(FINISHED[:length]).ending == "cut"


def test_a_streamed_transcript_is_parsed_too() -> None:
    events = [
        event(type="transcript.text.delta", delta="Hel"),
        event(type="transcript.text.delta", delta="lo"),
        event(type="transcript.text.done", text="Hello"),
    ]
    report = read_stream(b"".join(events) + DONE)
    assert (report.ending, report.text) == ("finished", "Hello")


def response_event(number: int, kind: str, **members: Any) -> bytes:
    return f"event: {kind}\n".encode() + event(type=kind, sequence_number=number, **members)


def response(number: int, status: str = "completed", why: str | None = None) -> bytes:
    details = None if why is None else {"reason": why}
    of_it = {"status": status, "incomplete_details": details, "usage": {"total_tokens": 2}}
    return response_event(number, f"response.{status}", response=of_it)


SAID = response_event(0, "response.output_text.delta", delta="Hi")


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (response(1), "stop"),
        (response(1, "incomplete", "max_output_tokens"), "length"),
        (response(1, "incomplete", "content_filter"), "content_filter"),
    ],
)
def test_a_streamed_response_is_parsed_too(end: bytes, reason: str) -> None:
    report = read_stream(SAID + PING + end)
    assert (report.ending, report.text, report.finish_reasons) == ("finished", "Hi", {0: reason})
    assert report.usage == {"total_tokens": 2}
    assert read_stream(SAID + end[:-1]).ending == "cut"


def message_event(kind: str, **members: Any) -> bytes:
    return f"event: {kind}\n".encode() + event(type=kind, **members)


def message_delta(reason: str, sequence: str | None = None) -> bytes:
    return message_event(
        "message_delta",
        delta={"stop_reason": reason, "stop_sequence": sequence},
        usage={"output_tokens": 2},
    )


BEGUN = message_event("message_start", message={"content": [], "stop_reason": None, "usage": {}})
BLOCK = message_event("content_block_start", index=0, content_block={"type": "text", "text": ""})
GROWN = message_event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hi"})
ENDED = message_event("content_block_stop", index=0)
STOP = message_event("message_stop")
MESSAGE_PING = message_event("ping")
MESSAGE_FAILED = message_event("error", error={"type": "api_error", "message": "no", "code": None})


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (message_delta("end_turn"), "stop"),
        (message_delta("stop_sequence", "x"), "stop"),
        (message_delta("max_tokens"), "length"),
        (message_delta("tool_use"), "tool_calls"),
        (message_delta("refusal"), "content_filter"),
    ],
)
def test_a_streamed_message_is_parsed_too(end: bytes, reason: str) -> None:
    whole = MESSAGE_PING + BEGUN + BLOCK + MESSAGE_PING + GROWN + ENDED + end + STOP
    report = read_stream(whole)
    assert (report.ending, report.text, report.finish_reasons) == ("finished", "Hi", {0: reason})
    assert report.usage == {"output_tokens": 2}
    assert read_stream(whole[:-1]).ending == read_stream(whole[: -len(STOP)]).ending == "cut"
    assert read_stream(BEGUN + end + STOP).text == ""


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (BLOCK, "outside of a message"),
        (BEGUN + BEGUN, "begins once"),
        (BEGUN + BLOCK + BLOCK, "one after the other"),
        (BEGUN + GROWN, "not open"),
        (BEGUN + BLOCK + ENDED + GROWN, "not open"),
        (BEGUN + BLOCK + message_delta("end_turn"), "still open"),
        (BEGUN + STOP, "without a reason"),
        (BEGUN + message_delta("end_turn") + BLOCK, "outside of a message"),
        (BEGUN + message_delta("end_turn", "x"), "do not fit"),
        (BEGUN + message_delta("end_turn") + STOP + MESSAGE_PING, "after the end"),
        (BEGUN + ERROR, "in a message"),
        (BEGUN + BLOCK + message_event("content_block_delta", index=0, delta={"type": "thinking_delta"}),
         "not in the form"),
        (MESSAGE_FAILED + STOP, "after the end"),
    ],
)  # fmt: skip
def test_a_message_that_breaks_the_grammar_is_an_error(data: bytes, why: str) -> None:
    with pytest.raises(StreamGrammarError, match=why):
        read_stream(data)


def test_a_message_fails_in_its_own_form() -> None:
    for before in (MESSAGE_PING, BEGUN, BEGUN + BLOCK + GROWN):
        report = read_stream(before + MESSAGE_FAILED)
        assert (report.ending, report.error) == (
            "failed",
            {"type": "api_error", "message": "no", "code": None},
        )


FAILED = {"status": "failed", "error": {"code": "c", "message": "no"}}
INNER = {"message": "no", "type": "t", "param": None, "code": "c"}


@pytest.mark.parametrize(
    ("before", "failure"),
    [
        (SAID, response_event(1, "response.failed", response=FAILED, error=INNER)),
        (event(type="transcript.text.delta", delta="a"), event(type="error", error=INNER)),
        (event(type="speech.audio.delta", audio=""), event(type="error", error=INNER)),
        (
            b"event: image_edit.partial_image\n" + event(type="image_edit.partial_image"),
            b"event: error\n" + event(type="error", error=INNER),
        ),
    ],
)
def test_a_stream_fails_in_the_form_of_its_own_events(before: bytes, failure: bytes) -> None:
    report = read_stream(before + failure)
    assert (report.ending, report.error) == ("failed", INNER)
    with pytest.raises(StreamGrammarError, match=r"fails with|on this route|between images"):
        read_stream(before + ERROR)
    with pytest.raises(StreamGrammarError, match="on this route"):
        read_stream(delta("a") + failure)


def test_a_streamed_completion_is_parsed_too() -> None:
    chunks = [
        event(choices=[{"index": 1, "text": "x", "finish_reason": None}]),
        event(choices=[{"index": 1, "text": "", "finish_reason": "length"}]),
    ]
    report = read_stream(b"".join(chunks) + DONE)
    assert (report.texts, report.finish_reasons) == ({1: "x"}, {1: "length"})


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (DONE, "no choice has ended"),
        (delta("a") + DONE, "have no finish_reason"),
        (delta("a") + end() + delta("b", 1) + DONE, "have no finish_reason"),
        (delta("a") + end() + end() + DONE, "already ended"),
        (delta("a") + end() + delta("b") + DONE, "already ended"),
        (FINISHED + ERROR, "after the end"),
        (FINISHED + DONE, "after the end"),
        (FINISHED + PING, "after the end"),
        (FINISHED + b"d", "after the end"),
        (ERROR + DONE, "after the end"),
        (ERROR + ERROR, "after the end"),
        (ERROR + delta("a"), "after the end"),
        (b"id: 1\n\n", "neither"),
        (b"event: x\ndata: {}\n\n", "is not its name"),
        (b"event: x\n\n", "its name and a single line"),
        (b"event: x\ndata: {}\ndata: {}\n\n", "its name and a single line"),
        (response(1), "should have been number 0"),
        (SAID + SAID, "should have been number 1"),
        (response(0, "incomplete"), "is another one"),
        (SAID + response_event(2, "response.failed", response=FAILED, error=INNER), "have been number 1"),
        (SAID + response_event(1, "response.failed", response={}, error=INNER), "is another one"),
        (response(0, "completed", "steered"), "is another one"),
        (response(0) + DONE, "after the end"),
        (response(0) + ERROR, "after the end"),
        (response_event(0, "response.completed"), "not in the form"),
        (b"data: {}\nid: 1\n\n", "single line"),
        (b": ping\ndata: {}\n\n", "its own"),
        (b"data: {\n\n", "not JSON"),
        (b"data: []\n\n", "not an object"),
        (b"data: {}\n\n", "no known kind"),
        (b'data: {"error":"x"}\n\n', "not an error envelope"),
        (b'data: {"choices":[{}]}\n\n', "not in the form"),
        (b'data: {"choices":3}\n\n', "not in the form"),
    ],
)
def test_a_stream_that_breaks_the_grammar_is_an_error(data: bytes, why: str) -> None:
    with pytest.raises(StreamGrammarError, match=why):
        read_stream(data)
