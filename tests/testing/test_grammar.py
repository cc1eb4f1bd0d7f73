"""The grammar checker: it must tell the three endings apart, and must not be lenient."""

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


def test_a_finished_stream_is_reported_with_what_was_in_it() -> None:
    report = read_stream(FINISHED)
    assert report.ending == "finished"
    assert (report.text, report.texts) == ("ab", {0: "ab"})
    assert report.finish_reasons == {0: "stop"}
    assert report.usage == {"total_tokens": 2}
    assert (report.comments, len(report.events), report.error) == (1, 4, None)


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


def test_a_streamed_transcript_is_known_too() -> None:
    events = [
        event(type="transcript.text.delta", delta="Hel"),
        event(type="transcript.text.delta", delta="lo"),
        event(type="transcript.text.done", text="Hello"),
    ]
    report = read_stream(b"".join(events) + DONE)
    assert (report.ending, report.text) == ("finished", "Hello")


def test_a_streamed_completion_is_known_too() -> None:
    chunks = [
        event(choices=[{"index": 1, "text": "x", "finish_reason": None}]),
        event(choices=[{"index": 1, "text": "", "finish_reason": "length"}]),
    ]
    report = read_stream(b"".join(chunks) + DONE)
    assert (report.texts, report.finish_reasons) == ({1: "x"}, {1: "length"})


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (DONE, "nothing has ended"),
        (delta("a") + DONE, "never said why"),
        (delta("a") + end() + delta("b", 1) + DONE, "never said why"),
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
        (b"event: x\ndata: {}\n\n", "neither"),
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
