"""Every failure reaches both official clients as the exception they have for it, and never as a clean end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import attrs
import pytest
import trio
from client_case import USER, text_of
from client_drivers import Answer, Client, Driver, Failure, file
from client_media import CLIP
from scripted import PNG
from served import Placement, Served, open_served, until

from trio_cluster import ASRRequest, OutputChunk

pytestmark = pytest.mark.feature("every failure")

CHAT = "chat.completions.create"

PNG_FILE = file("a.png", PNG, "image/png")


async def ask_chat(client: Client, model: str, **more: Any) -> Answer:
    """Ask a chat model something."""
    return await client.ask(CHAT, model=model, messages=[USER], **more)


def failure_of(answer: Answer) -> Failure:
    """Return the exception that an answer is, which is one of the client's own."""
    assert answer.failure is not None, f"a clean end: {answer}"
    assert answer.failure.is_api_error, answer.failure
    return answer.failure


def seen(failure: Failure) -> tuple[Any, ...]:
    """Return what a program acts on."""
    return failure.name, failure.status, failure.code, failure.type, failure.param


# Before the answer


@attrs.frozen
class Wrong:
    """A request that is refused."""

    method: str
    body: Mapping[str, Any]
    seen: tuple[str, int, str | None, str, str | None]
    positional: tuple[Any, ...] = ()
    headers: dict[str, str] = attrs.field(factory=dict)


def bad(code: str, param: str) -> tuple[str, int, str, str, str]:
    return "BadRequestError", 400, code, "invalid_request_error", param


def chat(model: str = "echo", **fields: Any) -> dict[str, Any]:
    return {"model": model, "messages": [USER], **fields}


_IMAGE = {
    "role": "user",
    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
}

WRONG = {
    "nothing was said": Wrong(CHAT, chat(messages=[]), bad("empty_array", "messages")),
    "a wrong type": Wrong(CHAT, chat(temperature="hot"), bad("invalid_type", "temperature")),
    "out of range": Wrong(CHAT, chat(n=1000), bad("invalid_value", "n")),
    "a model of another kind": Wrong(CHAT, chat("vectors"), bad("model_kind_mismatch", "model")),
    "images for the blind": Wrong(CHAT, chat(messages=[_IMAGE]), bad("vision_not_supported", "messages")),
    "a time limit that is none": Wrong(
        CHAT,
        chat(),
        ("BadRequestError", 400, None, "invalid_request_error", "x-request-timeout"),
        headers={"x-request-timeout": "soon"},
    ),
    "a prompt of numbers": Wrong(
        "completions.create", {"model": "echo", "prompt": [1, 2]}, bad("token_ids_not_supported", "prompt")
    ),
    "nothing to embed": Wrong(
        "embeddings.create", {"model": "vectors", "input": []}, bad("empty_array", "input")
    ),
    "an empty file": Wrong(
        "audio.transcriptions.create",
        {"model": "scribe", "file": CLIP | {"base64": ""}},
        ("BadRequestError", 400, None, "invalid_request_error", "file"),
    ),
    "an image as a URL": Wrong(
        "images.generate",
        {"model": "painter", "prompt": "x", "response_format": "url"},
        bad("unsupported_value", "response_format"),
    ),
    "a memory that there is not": Wrong(
        "responses.create",
        {"model": "echo", "input": "and then?", "previous_response_id": "resp_1"},
        bad("previous_response_not_found", "previous_response_id"),
    ),
    "a tool that the server has not": Wrong(
        "responses.create",
        {"model": "echo", "input": "what is new?", "tool_choice": {"type": "web_search"}},
        bad("unsupported_value", "tool_choice.type"),
    ),
    "nothing to rank": Wrong(
        "post",
        {"model": "ranker", "query": "x", "documents": []},
        bad("empty_array", "documents"),
        positional=("/rerank",),
    ),
    "nothing to judge": Wrong(
        "moderations.create", {"model": "judge", "input": []}, bad("empty_array", "input")
    ),
    "nothing to change": Wrong(
        "images.edit",
        {"model": "painter", "prompt": "x", "image": CLIP | {"base64": ""}},
        ("BadRequestError", 400, None, "invalid_request_error", "image"),
    ),
    "no such model": Wrong(
        CHAT, chat("gpt-9"), ("NotFoundError", 404, "model_not_found", "invalid_request_error", "model")
    ),
    "no such model to tell about": Wrong(
        "models.retrieve",
        {},
        ("NotFoundError", 404, "model_not_found", "invalid_request_error", "model"),
        positional=("org/none",),
    ),
    "no such route": Wrong(
        "post", {}, ("NotFoundError", 404, None, "invalid_request_error", None), positional=("/nowhere",)
    ),
    "another method": Wrong(
        "get",
        {},
        ("APIStatusError", 405, None, "invalid_request_error", None),
        positional=("/chat/completions",),
    ),
    "another type of body": Wrong(
        "post",
        chat(),
        ("APIStatusError", 415, "unsupported_media_type", "invalid_request_error", "content-type"),
        positional=("/chat/completions",),
        headers={"content-type": "text/xml"},
    ),
}


@pytest.mark.parametrize("name", WRONG)
async def test_what_cannot_be_served_is_refused(served: Served, client: Client, name: str) -> None:
    wrong = WRONG[name]
    answer = await client.ask(wrong.method, *wrong.positional, headers=wrong.headers, **wrong.body)
    failure = failure_of(answer)
    assert seen(failure) == wrong.seen
    assert failure.request_id is not None
    assert answer.attempts == [0]
    assert served.trace.requests == []


async def test_without_the_key_nothing_is_served(served: Served, driver: Driver) -> None:
    served.front.set_api_key("the-key")
    refused = failure_of(await ask_chat(driver.client_of(served.url, api_key="another"), "echo"))
    welcome = await ask_chat(driver.client_of(served.url, api_key="the-key"), "echo")
    served.front.set_api_key(None)
    assert seen(refused) == (
        "AuthenticationError", 401, "invalid_api_key", "authentication_error", None
    )  # fmt: skip
    assert welcome.failure is None
    assert len(served.trace.requests) == 1


async def test_a_page_of_the_web_may_not_cancel_anything(client: Client) -> None:
    answer = await client.ask(
        "post",
        client.settings["base_url"].removesuffix("/v1") + "/cluster/calls/x/cancel",
        headers={"origin": "http://example.com"},
    )
    assert seen(failure_of(answer)) == (
        "PermissionDeniedError", 403, "foreign_origin", "permission_error", None
    )  # fmt: skip


async def test_a_body_over_the_limit_is_refused_and_the_connection_still_works(
    placement: Placement, driver: Driver
) -> None:
    async with open_served(placement, max_body_size=10_000) as served:
        client = driver.client_of(served.url)
        refused = await client.ask("embeddings.create", model="vectors", input="x" * 10_000)
        sound = await client.ask(
            "audio.transcriptions.create", model="scribe", file=CLIP | {"base64": "AAAA" * 10_000}
        )
        taken = await client.ask("embeddings.create", model="vectors", input="x" * 5000)
    for answer in (refused, sound):
        assert seen(failure_of(answer)) == (
            "APIStatusError", 413, None, "invalid_request_error", None
        )  # fmt: skip
    assert taken.failure is None


#: What the clients make of a status.
CLASSES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    408: "APIStatusError",
    409: "ConflictError",
    413: "APIStatusError",
    415: "APIStatusError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "InternalServerError",
    502: "InternalServerError",
    503: "InternalServerError",
    504: "InternalServerError",
}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_an_error_of_the_handler_is_what_the_client_gets(
    served: Served, client: Client, stream: bool
) -> None:
    caught: dict[int, Failure] = {}

    async def ask(status: int) -> None:
        caught[status] = failure_of(await ask_chat(client, "failing", stream=stream, status=status))

    async with trio.open_nursery() as nursery:
        for status in CLASSES:
            nursery.start_soon(ask, status)
    assert {status: failure.name for status, failure in caught.items()} == CLASSES
    for status, failure in caught.items():
        assert (failure.status, failure.code, failure.param) == (status, "my_code", "my_param")
        assert "as you wish" in failure.message


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_handler_that_crashes_shows_nothing_of_itself(client: Client, stream: bool) -> None:
    failure = failure_of(await ask_chat(client, "failing", stream=stream))
    assert seen(failure) == ("InternalServerError", 500, "handler_failed", "server_error", None)
    assert "secret" not in failure.message


# In the answer


async def test_a_stream_that_fails_raises_after_what_came_before(client: Client) -> None:
    answer = await ask_chat(client, "failing", stream=True, pieces=3, status=429)
    assert text_of(answer.events) == "0 1 2 "
    assert seen(failure_of(answer)) == ("APIError", None, "my_code", "rate_limit_error", "my_param")


async def test_a_stream_whose_handler_crashes_raises_too(client: Client) -> None:
    answer = await ask_chat(client, "failing", stream=True, pieces=3)
    assert text_of(answer.events) == "0 1 2 "
    assert seen(failure_of(answer)) == ("APIError", None, "handler_failed", "server_error", None)


async def test_a_streamed_completion_that_fails_raises_too(client: Client) -> None:
    answer = await client.ask(
        "completions.create", model="failing", prompt="x", stream=True, pieces=2, status=500
    )
    assert [event["choices"][0]["text"] for event in answer.events] == ["0 ", "1 "]
    assert failure_of(answer).code == "my_code"


async def test_a_streamed_transcription_that_fails_raises_too(served: Served, client: Client) -> None:
    async def mumble(request: ASRRequest) -> AsyncIterator[Any]:
        yield "hm "
        yield OutputChunk.error("my_code", "as you wish", 500)

    served.back.register_asr("mumble", mumble)
    await until(lambda: served.front.has_model("mumble"))
    answer = await client.ask("audio.transcriptions.create", model="mumble", file=CLIP, stream=True)
    assert answer.events == [{"type": "transcript.text.delta", "delta": "hm "}]
    assert failure_of(answer).code == "my_code"


async def test_a_streamed_response_that_fails_raises_too(client: Client) -> None:
    answer = await client.ask(
        "responses.create", model="failing", input="x", stream=True, pieces=2, status=429
    )
    deltas = [event["delta"] for event in answer.events if event["type"] == "response.output_text.delta"]
    assert deltas == ["0 ", "1 "]
    assert seen(failure_of(answer)) == ("APIError", None, "my_code", "rate_limit_error", "my_param")


async def test_a_streamed_image_that_fails_raises_too(client: Client) -> None:
    answer = await client.ask(
        "images.edit", model="painter", prompt="fail", image=PNG_FILE, stream=True, partial_images=1
    )
    assert [event["type"] for event in answer.events] == ["image_edit.partial_image"]
    assert failure_of(answer).code == "my_code"


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("chat.completions.stream", {"messages": [USER]}),
        ("responses.stream", {"input": "x"}),
    ],
    ids=["chat", "response"],
)
async def test_a_helper_that_puts_a_stream_together_raises_too(
    client: Client, method: str, body: dict[str, Any]
) -> None:
    answer = await client.ask(method, model="failing", pieces=3, status=500, **body)
    assert failure_of(answer).code == "my_code"


async def test_an_answer_that_is_not_streamed_is_an_error_also_after_the_first_output(
    client: Client,
) -> None:
    assert failure_of(await ask_chat(client, "failing", pieces=3, status=429)).name == "RateLimitError"


@pytest.mark.parametrize("as_pieces", [False, True], ids=["whole", "in pieces"])
async def test_sound_that_breaks_off_is_never_taken_for_the_whole_of_it(
    client: Client, as_pieces: bool
) -> None:
    answer = await client.ask(
        "audio.speech.create", model="failing/voice", voice="v", input="hi", as_pieces=as_pieces
    )
    # The head is there when it breaks off, so it is each client's HTTP library that complains.
    assert answer.failure is not None
    assert any(word in answer.failure.message for word in ("incomplete", "terminated", "Connection error"))
    assert bool(answer.events) == as_pieces


# Time


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_model_that_stays_silent_is_a_timeout_of_the_server(
    placement: Placement, driver: Driver, stream: bool
) -> None:
    async with open_served(placement, default_timeout=0.2) as served:
        answer = await ask_chat(driver.client_of(served.url), "silent/async-value", stream=stream)
        assert await served.trace.ended() == "cancelled"
    assert seen(failure_of(answer)) == (
        "InternalServerError", 504, "timeout", "timeout_error", None
    )  # fmt: skip


async def test_a_stream_that_falls_silent_ends_in_an_error(placement: Placement, driver: Driver) -> None:
    async with open_served(placement, default_timeout=0.3) as served:
        answer = await ask_chat(driver.client_of(served.url), "pausing", stream=True)
        assert await served.trace.ended() == "cancelled"
    assert text_of(answer.events) == "one moment"
    assert seen(failure_of(answer)) == ("APIError", None, "timeout", "timeout_error", None)


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_client_that_has_waited_long_enough_stops_the_handler(
    served: Served, driver: Driver, stream: bool
) -> None:
    client = driver.client_of(served.url, timeout=0.5)
    # The client for Python also tells the server how long it waits, which then gives up at the same time.
    headers = {"x-stainless-read-timeout": "60"}
    answer = await ask_chat(client, "silent/async-push", stream=stream, headers=headers)
    assert await served.trace.ended(within=1) == "cancelled"
    failure = failure_of(answer)
    assert (failure.name, failure.status) == ("APITimeoutError", None)


async def test_a_client_that_says_how_long_it_waits_is_told_in_time(served: Served, driver: Driver) -> None:
    client = driver.client_of(served.url, timeout=5)
    headers = {"x-stainless-read-timeout": "0.3"}
    answer = await ask_chat(client, "silent/async-push", headers=headers)
    assert await served.trace.ended(within=1) == "cancelled"
    assert seen(failure_of(answer)) == (
        "InternalServerError", 504, "timeout", "timeout_error", None
    )  # fmt: skip


# Leaving


@pytest.mark.parametrize("model", ["endless/async-generator", "endless/thread-push"])
async def test_a_client_that_has_had_enough_of_a_stream_stops_the_handler(
    served: Served, client: Client, model: str
) -> None:
    answer = await ask_chat(client, model, stream=True, take=3)
    assert await served.trace.ended(within=1) == "cancelled"
    assert text_of(answer.events) == "tick tick "
    assert answer.failure is None


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("model", ["silent/async-value", "silent/thread-value"])
async def test_a_client_that_gives_up_before_the_answer_stops_the_handler(
    served: Served, client: Client, model: str, stream: bool
) -> None:
    async with client.asking(CHAT, model=model, messages=[USER], stream=stream) as asking:
        await served.trace.started()
        await asking.abort()
        assert await served.trace.ended(within=1) == "cancelled"
        answer = await asking.answer()
    assert answer.failure is not None
    assert answer.failure.name == "aborted"


async def test_a_client_that_gives_up_in_a_stream_stops_the_handler(served: Served, client: Client) -> None:
    async with client.asking(CHAT, model="endless/async-push", messages=[USER], stream=True) as asking:
        await asking.receive_until(lambda events: len(events) > 3)
        await asking.abort()
        assert await served.trace.ended(within=1) == "cancelled"


# Too much, and too late


async def test_what_an_operator_has_cancelled_does_not_come_again(served: Served, driver: Driver) -> None:
    client = driver.client_of(served.url, max_retries=2)
    async with client.asking(
        CHAT, model="silent/async-value", messages=[USER], headers={"x-request-id": "unwanted"}
    ) as asking:
        await served.trace.started()
        cancelled = await served.post("/cluster/calls/unwanted/cancel", json={"reason": "enough of that"})
        assert cancelled.json() == {"request_id": "unwanted", "cancelled": 1}
        answer = await asking.answer()
    failure = failure_of(answer)
    assert seen(failure) == ("InternalServerError", 503, "cancelled", "server_error", None)
    assert "enough of that" in failure.message
    assert answer.attempts == [0]


async def test_a_stream_that_an_operator_has_cancelled_ends_in_an_error(
    served: Served, client: Client
) -> None:
    async with client.asking(
        CHAT,
        model="endless/async-push",
        messages=[USER],
        stream=True,
        headers={"x-request-id": "unwanted"},
    ) as asking:
        await asking.receive_until(bool)
        await served.post("/cluster/calls/unwanted/cancel", json={"reason": "enough of that"})
        answer = await asking.answer()
    assert seen(failure_of(answer)) == ("APIError", None, "cancelled", "server_error", None)


async def test_nobody_listens(driver: Driver, unused_port: int) -> None:
    client = driver.client_of(f"http://127.0.0.1:{unused_port}", max_retries=1)
    answer = await ask_chat(client, "echo")
    assert failure_of(answer).name == "APIConnectionError"
    assert len(answer.attempts) == 2
