"""What routing reads of a prompt: the beginning that two requests have in common, and whose conversation it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from trio_cluster.core.channel import ByteChannel
from trio_cluster.core.request import Request
from trio_cluster.routing.prompt import ENDS, HASHED_MAX, Prompt, read_prompt


def request(body: Any, headers: dict[str, str] | None = None, **fields: Any) -> Request:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    values = {
        "endpoint": "chat.completions",
        "kind": "chat",
        "model": "m",
        "body": data,
        "headers": headers or {},
    }
    return Request(**(values | fields))


def common(one: Prompt, other: Prompt) -> int:
    """Return how many bytes of the beginning the blocks of both have in common."""
    shared = 0
    for end, first, second in zip(ENDS, one.blocks, other.blocks, strict=False):
        if first != second:
            break
        shared = end
    return shared


def turn(role: str, size: int, letter: str = "x") -> dict[str, str]:
    return {"role": role, "content": letter * size}


def test_a_conversation_that_goes_on_begins_as_before() -> None:
    messages = [turn("system", 3000), turn("user", 2000, "u")]
    first = read_prompt(request({"model": "m", "messages": messages, "temperature": 1}))
    more = [*messages, turn("assistant", 500, "a"), turn("user", 700, "v")]
    second = read_prompt(request({"model": "m", "messages": more, "temperature": 0}))
    assert common(first, second) == ENDS[len(first.blocks) - 1] > first.size - 1024
    assert second.size > first.size + 1200


@pytest.mark.parametrize("field", ["tools", "system", "instructions"])
def test_what_models_read_first_comes_first_wherever_clients_put_it(field: str) -> None:
    messages = [turn("user", 3000)]
    one, other = (
        read_prompt(request({"messages": messages, field: [{"name": name * 300}]})) for name in ("f", "g")
    )
    assert common(one, other) == 0
    put_first = read_prompt(request({field: [{"name": "f" * 300}], "messages": messages}))
    assert put_first == one


@pytest.mark.parametrize("field", ["messages", "input", "prompt"])
def test_prompts_are_read_in_every_form(field: str) -> None:
    prompt = read_prompt(request({"model": "m", field: "t" * 2000}))
    assert (prompt.size, len(prompt.blocks)) == (2002, 2002 // 256)


def test_a_block_has_the_hash_of_all_before_it() -> None:
    same = "s" * 1000
    one = read_prompt(request({"prompt": "a" + same}))
    other = read_prompt(request({"prompt": "b" + same}))
    assert not set(one.blocks) & set(other.blocks)


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        ({}, {}, ""),
        ({"prompt_cache_key": "k"}, {}, "k"),
        ({"prompt_cache_key": "k", "conversation": "c"}, {}, "k"),
        ({"conversation": "c"}, {}, "c"),
        ({"conversation": {"id": "c"}}, {}, "c"),
        ({"conversation": {"id": 7}}, {}, ""),
        ({"conversation": None, "prompt_cache_key": 7}, {}, ""),
        ({"prompt_cache_key": "k"}, {"x-claude-code-session-id": "4"}, "4"),
        ({}, {"x-claude-code-session-id": "4", "session_id": "3"}, "3"),
        ({}, {"session_id": "3", "session-id": "2"}, "2"),
        ({}, {"session-id": "2", "x-session-affinity": "1"}, "1"),
        ({}, {"x-session-affinity": "n" * 1000}, "n" * 256),
    ],
)
def test_the_first_name_of_a_conversation_counts(body: Any, headers: dict[str, str], expected: str) -> None:
    assert read_prompt(request({"messages": [turn("user", 5)], **body}, headers)).conversation == expected


@pytest.mark.parametrize(
    "sent",
    [
        request(b""),
        request({"input": "x" * 3000}, kind="embedding"),
        request(b"x" * 3000, content_type="multipart/form-data"),
        request(b"", upload=ByteChannel(70_000)),
        request(b"", upload=ByteChannel()),
    ],
)
def test_other_requests_have_a_size_only(sent: Request) -> None:
    assert read_prompt(sent) == Prompt(max(0, sent.size))


def test_a_large_body_is_hashed_as_far_as_caches_are_long() -> None:
    prompt = read_prompt(request(b'{"messages":["' + b"x" * 2 * HASHED_MAX + b'"]}'))
    assert len(prompt.blocks) == len(ENDS)
    assert prompt.size > 2 * HASHED_MAX


@given(st.binary(max_size=3000))
def test_nothing_that_a_client_sends_makes_it_fail(body: bytes) -> None:
    prompt = read_prompt(request(body, kind="any"))
    assert 0 <= len(prompt.blocks) <= len(ENDS)
    assert not prompt.blocks or ENDS[len(prompt.blocks) - 1] <= prompt.size


def test_json_that_is_nested_too_deeply_counts_as_text() -> None:
    body = b"[" * 100_000
    assert read_prompt(request(body, kind="any")).size == len(body)
