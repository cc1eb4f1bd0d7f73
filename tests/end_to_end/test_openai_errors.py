"""Every failure reaches the official client as the exception it knows for it, wherever the handler runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import openai
import patience
import pytest
import trio
from openai.types.chat import ChatCompletionChunk
from served import PLACEMENTS, Placement, Served, chat, open_served, until

# Its streams leave their async generators to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Async generator '(openai|httpx|httpcore):ResourceWarning")

USER: Any = {"role": "user", "content": "hi"}
IMAGE: Any = {
    "role": "user",
    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
}

Ask: TypeAlias = Callable[[openai.AsyncOpenAI], Awaitable[Any]]


def ask_chat(model: str = "echo", **fields: Any) -> Ask:
    known = {"messages": [USER]} | {
        name: fields.pop(name) for name in ("messages", "n", "stop") if name in fields
    }
    return lambda client: client.chat.completions.create(model=model, extra_body=fields, **known)


BAD_REQUESTS: dict[str, tuple[Ask, str | None, str | None]] = {
    "no messages": (ask_chat(messages=[]), "messages", "empty_array"),
    "a wrong type": (ask_chat(temperature="hot"), "temperature", "invalid_type"),
    "out of range": (ask_chat(n=1000), "n", None),
    "a role that is none": (ask_chat(messages=[{"role": "king", "content": ""}]), "messages[0].role", None),
    "images for the blind": (ask_chat(messages=[IMAGE]), "messages", "vision_not_supported"),
    "a model of another kind": (ask_chat("vectors"), "model", "model_kind_mismatch"),
    "a time limit that is none": (
        lambda client: client.chat.completions.create(
            model="echo", messages=[USER], extra_headers={"x-request-timeout": "soon"}
        ),
        "x-request-timeout",
        None,
    ),
    "no input": (lambda client: client.embeddings.create(model="vectors", input=[]), "input", "empty_array"),
    "more dimensions than there are": (
        lambda client: client.embeddings.create(model="vectors", input="x", dimensions=5),
        "dimensions",
        "invalid_value",
    ),
    "a URL for an image": (
        lambda client: client.images.generate(model="painter", prompt="x", response_format="url"),
        "response_format",
        "unsupported_value",
    ),
    "a long speech": (
        lambda client: client.audio.speech.create(model="voice", voice="v", input="x" * 4097),
        "input",
        None,
    ),
    "an empty file": (
        lambda client: client.audio.transcriptions.create(model="scribe", file=("a.wav", b"")),
        "file",
        None,
    ),
    "a temperature in a form": (
        lambda client: client.audio.transcriptions.create(
            model="scribe", file=("a.wav", b"x"), temperature=1.5
        ),
        "temperature",
        None,
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_what_cannot_be_served_is_a_bad_request_that_names_the_field(served: Served, name: str) -> None:
    ask, param, code = BAD_REQUESTS[name]
    async with served.client() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client)
    error = caught.value
    assert error.status_code == 400
    assert error.param == param
    assert error.type == "invalid_request_error"
    assert code in (None, error.code)


async def test_a_model_that_does_not_exist_is_not_found_and_those_that_do_are_listed(served: Served) -> None:
    async with served.client() as client:
        with pytest.raises(openai.NotFoundError, match=r"'gpt-9' does not exist.*echo, .*org/vision-model"):
            await client.chat.completions.create(model="gpt-9", messages=[USER])
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("org/none")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_a_route_that_does_not_exist_is_not_found(served: Served) -> None:
    async with served.client() as client:
        with pytest.raises(openai.NotFoundError, match="Unknown URL"):
            await client.files.list()


async def test_without_the_key_nothing_is_served(served: Served) -> None:
    served.front.set_api_key("the-key")
    async with served.client(api_key="another-key") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model="echo", messages=[USER])
    assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
    async with served.client(api_key="the-key") as client:
        await client.chat.completions.create(model="echo", messages=[USER])
    served.front.set_api_key(None)
    assert len(served.trace.requests) == 1


CLASSES = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    502: openai.InternalServerError,
    503: openai.InternalServerError,
    504: openai.InternalServerError,
}


@pytest.mark.parametrize("status", CLASSES)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_an_error_of_the_handler_is_what_the_client_gets(
    served: Served, status: int, stream: bool
) -> None:
    async with served.client() as client:
        with pytest.raises(CLASSES[status], match="as you wish") as caught:
            await client.chat.completions.create(
                model="failing", messages=[USER], stream=stream, extra_body={"status": status}
            )
    error = caught.value
    assert (error.status_code, error.code, error.param) == (status, "my_code", "my_param")
    assert await served.trace.ended() == "failed"


async def test_an_error_chunk_does_the_same_as_raising_one(served: Served) -> None:
    async with served.client() as client:
        with pytest.raises(openai.RateLimitError, match="as you wish") as caught:
            await client.chat.completions.create(
                model="failing/thread", messages=[USER], extra_body={"status": 429}
            )
    assert caught.value.code == "my_code"


@pytest.mark.parametrize("model", ["failing", "wrong-type"])
async def test_a_handler_that_crashes_shows_nothing_of_itself_but_to_its_own_log(
    served: Served, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with served.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model=model, messages=[USER])
    assert caught.value.status_code == 500
    assert "secret" not in str(caught.value.body)
    [record] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info is not None
    assert f"'{model}'" in record.getMessage()


async def test_a_stream_that_fails_raises_after_what_came_before(served: Served) -> None:
    text = ""

    async def read(stream: openai.AsyncStream[ChatCompletionChunk]) -> None:
        nonlocal text
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""

    fields = {"pieces": 3, "status": 429}
    async with (
        served.client() as client,
        await client.chat.completions.create(
            model="failing", messages=[USER], stream=True, extra_body=fields
        ) as stream,
    ):
        with pytest.raises(openai.APIError, match="as you wish") as caught:
            await read(stream)
    assert text == "0 1 2 "
    assert (caught.value.code, caught.value.param) == ("my_code", "my_param")


@pytest.mark.parametrize("model", ["failing", "failing/thread"])
async def test_a_stream_that_fails_ends_in_one_error_event_and_a_proper_end(
    served: Served, model: str
) -> None:
    answer = await served.stream(chat(model, stream=True, pieces=3, status=500))
    assert answer.report.ending == "failed"
    assert answer.report.text == "0 1 2 "
    assert answer.report.error is not None
    assert answer.report.error["code"] == "my_code"
    assert answer.whole


async def test_a_plain_answer_is_an_error_also_if_the_handler_fails_after_its_first_output(
    served: Served,
) -> None:
    async with served.client() as client:
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(
                model="failing", messages=[USER], extra_body={"pieces": 3, "status": 429}
            )


async def test_audio_that_breaks_off_is_never_taken_for_the_whole_of_it(served: Served) -> None:
    async def read() -> None:
        async with client.audio.speech.with_streaming_response.create(
            model="failing/voice", voice="v", input="hi"
        ) as response:
            await response.read()

    async with served.client() as client:
        with pytest.raises(openai.APIConnectionError):
            await client.audio.speech.create(model="failing/voice", voice="v", input="hi")
        # Once the head is there it is the client's HTTP library that complains, whichever that is.
        with pytest.raises(Exception, match="incomplete chunked read"):
            await read()


# Time


@pytest.fixture(params=PLACEMENTS)
def placement(request: pytest.FixtureRequest) -> Placement:
    value: Placement = request.param
    return value


async def test_a_model_that_stays_silent_is_a_timeout_and_its_handler_is_stopped(
    placement: Placement,
) -> None:
    async with open_served(placement, default_timeout=0.2) as served, served.client() as client:
        with pytest.raises(openai.InternalServerError) as caught, patience.fail_after(2):
            await client.chat.completions.create(model="silent/async-value", messages=[USER])
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        assert await served.trace.ended() == "cancelled"


async def test_a_stream_that_falls_silent_ends_in_an_error_event(placement: Placement) -> None:
    async with open_served(placement, default_timeout=0.3) as served:
        answer = await served.stream(chat("pausing", stream=True))
        assert answer.report.ending == "failed"
        assert answer.report.text == "one moment"
        assert answer.report.error is not None
        assert answer.report.error["code"] == "timeout"
        assert await served.trace.ended() == "cancelled"


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_a_client_may_say_how_long_it_has_for_the_whole_answer(served: Served, stream: bool) -> None:
    headers = {"x-request-timeout": "0.5"}
    body = chat("endless/async-generator", stream=stream)
    with patience.fail_after(2):
        if stream:
            answer = await served.stream(body, headers=headers)
            assert answer.report.ending == "failed"
            assert answer.report.text.startswith("tick ")
            error = answer.report.error
        else:
            response = await served.post(json=body, headers=headers)
            assert response.status_code == 504
            error = response.json()["error"]
    assert error is not None
    assert error["code"] == "timeout"
    assert await served.trace.ended() == "cancelled"


# Too much


async def test_a_request_over_capacity_is_refused_and_may_come_again(placement: Placement) -> None:
    options = {"max_concurrency": 1, "queue_timeout": 0}
    async with open_served(placement, **options) as served, trio.open_nursery() as nursery:
        nursery.start_soon(lambda: served.post(json=chat("held")))
        await served.trace.started()
        refused = await served.post(json=chat("echo"))
        nursery.start_soon(release_after_refusals, served, 2)
        async with served.client(max_retries=2) as client:
            answer = await client.chat.completions.create(model="echo", messages=[USER])
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["code"] == "over_capacity"
    assert answer.choices[0].message.content == "hi"


async def release_after_refusals(served: Served, count: int) -> None:
    """Free the only slot when so many requests have been refused for want of it."""

    async def are_refused() -> bool:
        return bool((await served.status())["calls"]["failed"] == count)

    await until(are_refused, within=5)
    served.trace.released.set()


async def test_a_body_over_the_limit_is_refused(placement: Placement) -> None:
    async with open_served(placement, max_body_size=10_000) as served, served.client() as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await client.embeddings.create(model="vectors", input="x" * 10_000)
        assert caught.value.status_code == 413
        assert (await client.embeddings.create(model="vectors", input="x" * 5000)).data


async def test_a_body_of_another_type_is_refused(served: Served) -> None:
    response = await served.post(content=b"<xml/>", headers={"content-type": "text/xml"})
    assert response.status_code == 415
    response = await served.post("/v1/audio/transcriptions", json={"model": "scribe"})
    assert response.status_code == 415
