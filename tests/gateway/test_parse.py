"""What is made of a body: what is refused because two parsers would not understand the same, and in which words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import trio
from http_node import CHAT, HttpNode, open_http_node, plain

CHAT_PATH = "/v1/chat/completions"
SPEECH_PATH = "/v1/audio/transcriptions"
JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=b"}


@pytest.fixture
async def node() -> AsyncIterator[HttpNode]:
    """Serve a chat model, a speech model, and a passthrough model of each."""
    async with open_http_node(plain) as node:
        node.add("asr", "asr")
        node.add("any", "any")
        yield node


async def post(node: HttpNode, path: str, body: bytes, headers: dict[str, str]) -> httpx.Response:
    async with node.client() as client:
        return await client.post(path, content=body, headers=headers)


def error(answer: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()["error"]
    return found


def form(*parts: bytes, model: bytes | None = b"asr") -> bytes:
    """Return a form with these parts, each of which has its head."""
    named = [] if model is None else [field(b"model", model)]
    whole = b"".join(b"--b\r\n" + part + b"\r\n" for part in (*named, *parts))
    return whole + b"--b--\r\n"


def field(name: bytes, value: bytes) -> bytes:
    return b'Content-Disposition: form-data; name="' + name + b'"\r\n\r\n' + value


def file(data: bytes, name: bytes = b"a.wav") -> bytes:
    return b'Content-Disposition: form-data; name="file"; filename="' + name + b'"\r\n\r\n' + data


# Words


@pytest.mark.parametrize("model", ["m", "any"])
async def test_a_byte_order_mark_is_named(node: HttpNode, model: str) -> None:
    answer = await post(node, CHAT_PATH, b"\xef\xbb\xbf" + json.dumps(CHAT | {"model": model}).encode(), JSON)
    assert (answer.status_code, error(answer)["code"]) == (400, "invalid_json")
    assert "BOM" in error(answer)["message"]


@pytest.mark.parametrize("half", ["\\ud83d", "\\uDE00", "\\ud83dx", "\\ud83d\\u0041", "\\ude00\\ud83d"])
async def test_half_a_surrogate_pair_is_named(node: HttpNode, half: str) -> None:
    body = json.dumps(CHAT).replace("hi", f"\\\\ud83d {half}").encode()
    answer = await post(node, CHAT_PATH, body, JSON)
    assert answer.status_code == 400
    assert half[:6] + " is half of a surrogate pair" in error(answer)["message"]
    assert "truncated" not in error(answer)["message"]


async def test_a_whole_surrogate_pair_is_a_character(node: HttpNode) -> None:
    body = json.dumps(CHAT).replace("hi", "\\ud83d\\ude00 \\\\ud83d").encode()
    assert (await post(node, CHAT_PATH, body, JSON)).status_code == 200


@pytest.mark.parametrize("part", [file(b"x", b"caf\xe9.wav"), field(b"caf\xe9", b"x")])
async def test_a_name_in_latin_1_is_named_without_python(node: HttpNode, part: bytes) -> None:
    answer = await post(node, SPEECH_PATH, form(part), FORM)
    assert answer.status_code == 400
    assert "not UTF-8" in error(answer)["message"]
    assert "Unicode" not in error(answer)["message"]


@pytest.mark.parametrize("coding", ["gzip", "br", "gzip, identity", "zstd"])
@pytest.mark.parametrize("model", ["m", "any"])
async def test_a_compressed_body_is_415_and_its_coding_is_named(
    node: HttpNode, coding: str, model: str
) -> None:
    body = json.dumps(CHAT | {"model": model}).encode()
    answer = await post(node, CHAT_PATH, body, JSON | {"content-encoding": coding})
    assert (answer.status_code, error(answer)["param"]) == (415, "content-encoding")
    assert coding in error(answer)["message"]
    assert node.backend.opened() == 0


async def test_the_key_under_which_a_request_is_repeated_travels(node: HttpNode) -> None:
    headers = JSON | {"idempotency-key": "k-1", "content-encoding": "identity"}
    assert (await post(node, CHAT_PATH, json.dumps(CHAT).encode(), headers)).status_code == 200
    served = await node.backend.next()
    assert served.request.headers["idempotency-key"] == "k-1"


# The query


@pytest.mark.parametrize("http", ["lean", "hypercorn"])
@pytest.mark.parametrize("model", ["m", "any"])
async def test_the_query_is_part_of_the_request(http: str, model: str) -> None:
    async with open_http_node(http=http) as node:
        node.add("any", "any")
        body = json.dumps(CHAT | {"model": model}).encode()
        for query in ("", "?", "?a=%0d%0ab&api-key=secret&c"):
            assert (await post(node, CHAT_PATH + query, body, JSON)).status_code == 200
            served = await node.backend.next()
            assert served.request.query == ("a=%0d%0ab&c" if "c" in query else "")
        answer = await post(node, CHAT_PATH + "?model=other", body, JSON)
        assert (answer.status_code, error(answer)["param"]) == (400, "model")
        assert (await post(node, CHAT_PATH + "?a=" + "x" * 8192, body, JSON)).status_code == 414
        assert node.backend.opened() == 0


@pytest.mark.parametrize("size", [10, 2_000_000])
async def test_the_query_of_a_form_is_part_of_the_request(node: HttpNode, size: int) -> None:
    answer = await post(node, SPEECH_PATH + "?a=1", form(file(b"x" * size), model=b"any"), FORM)
    assert answer.status_code == 200
    assert (await node.backend.next()).request.query == "a=1"


# A model that is named twice


TWICE = [
    b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "model": "any"}',
    b'{"model": "any", "messages": [{"role": "user", "content": "hi"}], "model": "m"}',
    b'{"model": "m", "model": "m", "messages": [{"role": "user", "content": "hi"}]}',
    b'{"model": "m", "mod\\u0065l": "any", "messages": [{"role": "user", "content": "hi"}]}',
    b'{"\\u006Dodel": "m", "\\u006dodel": "any", "messages": [{"role": "user", "content": "hi"}]}',
]


@pytest.mark.parametrize("padding", [0, 2_000_000])
@pytest.mark.parametrize("body", TWICE)
async def test_json_that_names_its_model_twice_is_refused(node: HttpNode, body: bytes, padding: int) -> None:
    answer = await post(node, CHAT_PATH, body.replace(b"hi", b"x" * padding + b"hi"), JSON)
    assert (answer.status_code, error(answer)["param"]) == (400, "model")
    assert "more than once" in error(answer)["message"]
    assert node.backend.opened() == 0


@pytest.mark.parametrize("model", ["m", "any"])
async def test_a_model_further_inside_of_json_is_not_the_models_name(node: HttpNode, model: str) -> None:
    metadata = {"model": "x", "\u00e9": '"model"'}
    body = json.dumps(CHAT | {"model": model, "extra": [metadata, {"model": "model"}]}).encode()
    assert (await post(node, CHAT_PATH, body, JSON)).status_code == 200


SECOND = [field(b"model", b"any"), file(b"any").replace(b'"file"', b'"model"')]


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("model", [b"asr", b"any"])
async def test_a_form_that_names_its_model_twice_is_refused(
    node: HttpNode, model: bytes, second: bytes
) -> None:
    answer = await post(node, SPEECH_PATH, form(file(b"x"), second, model=model), FORM)
    assert (answer.status_code, error(answer)["param"]) == (400, "model")
    assert node.backend.opened() == 0


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("model", [b"asr", b"any"])
async def test_a_large_form_that_names_its_model_twice_is_refused_when_it_does(
    model: bytes, second: bytes
) -> None:
    async with open_http_node(lambda served: None) as node, trio.open_nursery() as nursery:
        node.add("asr", "asr")
        node.add("any", "any")

        async def read() -> None:
            served = await node.backend.next()
            assert served.request.upload is not None
            while await served.request.upload.receive():
                pass

        nursery.start_soon(read)
        answer = await post(node, SPEECH_PATH, form(file(bytes(3_000_000)), second, model=model), FORM)
        nursery.cancel_scope.cancel()
    assert (answer.status_code, error(answer)["param"]) == (400, "model")
    assert not node.router.live


async def test_a_large_form_that_names_its_model_once_goes_through(node: HttpNode) -> None:
    body = form(file(bytes(3_000_000)), field(b"language", b"model"))
    assert (await post(node, SPEECH_PATH, body, FORM)).status_code == 200


# Content types


@pytest.mark.parametrize("model", ["m", "any"])
@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "",
        "text/json",
        "x/y+json",
    ],
)
async def test_what_a_page_can_send_without_asking_is_not_taken_for_json(
    node: HttpNode, model: str, kind: str
) -> None:
    body = json.dumps(CHAT | {"model": model}).encode()
    answer = await post(node, CHAT_PATH, body, {"content-type": kind} if kind else {})
    assert (answer.status_code, error(answer)["param"]) == (415, "content-type")
    assert "application/json" in error(answer)["message"]
    assert node.backend.opened() == 0


@pytest.mark.parametrize("model", ["m", "any"])
@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"]
)
async def test_json_is_json(node: HttpNode, model: str, kind: str) -> None:
    body = json.dumps(CHAT | {"model": model}).encode()
    assert (await post(node, CHAT_PATH, body, {"content-type": kind})).status_code == 200


# How long the answer may be


@pytest.mark.parametrize("model", ["m", "any"])
@pytest.mark.parametrize(
    ("fields", "max_tokens"),
    [
        ({}, 0),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 7, "max_tokens": 5}, 7),
        ({"max_tokens": 5, "n": 3}, 15),
        ({"max_tokens": None, "n": 3}, 0),
    ],
)
async def test_the_longest_answer_of_a_request_is_known(
    node: HttpNode, model: str, fields: dict[str, Any], max_tokens: int
) -> None:
    body = json.dumps(CHAT | {"model": model} | fields).encode()
    assert (await post(node, CHAT_PATH, body, JSON)).status_code == 200
    assert (await node.backend.next()).request.max_tokens == max_tokens


@pytest.mark.parametrize("value", ["5", 5.5, True, -5, 1 << 40, [5], {}])
@pytest.mark.parametrize("name", ["max_tokens", "n"])
async def test_what_says_nothing_about_the_length_is_not_refused_for_a_passthrough_model(
    node: HttpNode, name: str, value: Any
) -> None:
    body = json.dumps({"model": "any", name: value}).encode()
    assert (await post(node, CHAT_PATH, body, JSON)).status_code == 200
    assert (await node.backend.next()).request.max_tokens == 0
