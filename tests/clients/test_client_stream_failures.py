"""A stream that fails after it has begun, for every client and both ways of ending it.

No client may take such a stream for a finished one. What each client makes of it is the table in ``docs/http-api.md``.
Clients other than the official ones are tested where they are installed; ``nox -s clients`` installs them.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final, Literal

import openai
import pytest
import trio
from client_case import USER
from client_drivers import NODE_FOLDER, Answer, Client, Driver, Failure, file
from client_media import CLIP
from scripted import PNG
from served import Placement, Served, open_served, until

from trio_cluster import ApiError, ASRRequest, RawCall, TTSRequest

pytestmark = pytest.mark.feature("streams that fail")

Ending = Literal["end", "abort"]

#: What the model says before it fails.
SAID: Final = "0 1 2 "

CHAT: Final = "chat.completions.create"
MODEL: Final = {"model": "failing", "pieces": 3, "status": 429}
BROKEN: Final = ApiError(500, "as you wish", code="my_code")

MESSAGE: Final = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_1","type":"message",'
    b'"role":"assistant","model":"letters","content":[],"stop_reason":null,"stop_sequence":null,'
    b'"usage":{"input_tokens":1,"output_tokens":1}}}\n\n'
    b'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
    b'"content_block":{"type":"text","text":""}}\n\n'
    b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
    b'"delta":{"type":"text_delta","text":"0 1 2 "}}\n\n'
)


@pytest.fixture(params=["end", "abort"])
def ending(request: pytest.FixtureRequest) -> Ending:
    value: Ending = request.param
    return value


@pytest.fixture
async def served(placement: Placement, ending: Ending) -> AsyncIterator[Served]:
    """A server whose streams fail."""
    async with open_served(placement, stream_failure=ending) as running:

        @running.back.asr("failing/scribe")
        async def scribe(request: ASRRequest) -> AsyncIterator[str]:
            yield SAID
            raise BROKEN

        @running.back.tts("failing/events")
        async def speaker(request: TTSRequest) -> AsyncIterator[bytes]:
            yield bytes(1000)
            raise BROKEN

        async def letters(call: RawCall) -> None:
            call.begin(200, "text/event-stream")
            await call.send(MESSAGE)
            raise BROKEN

        running.back.register_raw("letters", letters)
        await until(lambda: running.front.has_model("letters"))
        yield running


@pytest.fixture
def client(served: Served, driver: Driver) -> Client:
    return driver.client_of(served.url)


def failure_of(answer: Answer) -> Failure:
    assert answer.failure is not None, f"a broken stream was taken for a finished one: {answer}"
    return answer.failure


# The official clients: Python with asyncio, and Node


STREAMS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "chat": (CHAT, {**MODEL, "messages": [USER]}),
    "completions": ("completions.create", {**MODEL, "prompt": "x"}),
    "responses": ("responses.create", {**MODEL, "input": "x"}),
    "transcriptions": ("audio.transcriptions.create", {"model": "failing/scribe", "file": CLIP}),
    "images": (
        "images.edit",
        {
            "model": "painter",
            "prompt": "fail",
            "image": file("a.png", PNG, "image/png"),
            "partial_images": 1,
        },
    ),
}


@pytest.mark.parametrize("route", STREAMS)
async def test_a_stream_of_events_raises_with_the_reason(client: Client, route: str) -> None:
    method, body = STREAMS[route]
    answer = await client.ask(method, stream=True, **body)
    failure = failure_of(answer)
    assert answer.events, "what was sent before the failure is lost"
    assert (failure.name, failure.status, failure.code) == ("APIError", None, "my_code")


@pytest.mark.parametrize("method", ["chat.completions.stream", "responses.stream"])
async def test_a_helper_that_collects_a_stream_raises_with_the_reason(client: Client, method: str) -> None:
    body = {"messages": [USER]} if method.startswith("chat") else {"input": "x"}
    failure = failure_of(await client.ask(method, **MODEL, **body))
    assert (failure.name, failure.code) == ("APIError", "my_code")


@pytest.mark.parametrize("as_pieces", [False, True], ids=["whole", "in pieces"])
async def test_audio_raises_since_its_connection_breaks(client: Client, as_pieces: bool) -> None:
    answer = await client.ask(
        "audio.speech.create", model="failing/voice", voice="v", input="x", as_pieces=as_pieces
    )
    failure = failure_of(answer)
    assert any(word in failure.message for word in ("incomplete", "terminated", "Connection error"))


async def test_speech_in_events_is_handed_to_the_program_which_finds_the_error_in_it(
    client: Client, ending: Ending
) -> None:
    answer = await client.ask(
        "audio.speech.create",
        model="failing/events",
        voice="v",
        input="x",
        stream_format="sse",
        as_pieces=True,
    )
    if ending == "abort":
        assert answer.failure is not None
        return
    # The official clients do not read these events: they give the program the bytes.
    assert answer.failure is None
    *_, last, nothing = base64.b64decode(answer.value).split(b"\n\n")
    assert nothing == b""
    event = json.loads(last.removeprefix(b"data: "))
    assert (event["type"], event["error"]["code"]) == ("error", "my_code")
    assert b"[DONE]" not in base64.b64decode(answer.value)
    assert b"speech.audio.done" not in base64.b64decode(answer.value)


# The official client for Python without an event loop


SYNC: Final[dict[str, Callable[[openai.OpenAI], Any]]] = {
    "chat": lambda client: client.chat.completions.create(
        model="failing",
        messages=[{"role": "user", "content": "x"}],
        stream=True,
        extra_body={"pieces": 3, "status": 429},
    ),
    "completions": lambda client: client.completions.create(
        model="failing", prompt="x", stream=True, extra_body={"pieces": 3, "status": 429}
    ),
    "responses": lambda client: client.responses.create(
        model="failing", input="x", stream=True, extra_body={"pieces": 3, "status": 429}
    ),
    "transcriptions": lambda client: client.audio.transcriptions.create(
        model="failing/scribe", file=("a.wav", b"RIFF"), stream=True
    ),
}


@pytest.mark.parametrize("route", SYNC)
async def test_the_blocking_client_raises_with_the_reason(served: Served, route: str) -> None:
    events = []

    def take(client: openai.OpenAI) -> None:
        for event in SYNC[route](client):
            events.append(event)

    with pytest.raises(openai.APIError) as caught:
        await served.with_sync_client(take)
    assert events
    assert caught.value.code == "my_code"


async def test_the_blocking_client_raises_for_audio(served: Served) -> None:
    def take(client: openai.OpenAI) -> bytes:
        return client.audio.speech.create(model="failing/voice", voice="alloy", input="x").read()

    with pytest.raises(Exception, match=r"incomplete|Connection error"):
        await served.with_sync_client(take)


# The AI SDK


def sdk_folder() -> Path:
    """Return the folder in which the AI SDK is installed; skip the test if there is none."""
    folder = Path(os.environ.get(NODE_FOLDER, "."))
    if (
        shutil.which("node") is None
        or not (folder / "node_modules" / "@ai-sdk" / "openai-compatible").is_dir()
    ):
        pytest.skip(f"{NODE_FOLDER} does not name a folder with the AI SDK in it; see docs/testing.md")
    return folder


async def ask_sdk(served: Served, model: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Have each provider of the AI SDK ask a model, and return what became of that, by provider."""
    program = Path(__file__).parent / "node" / "ai_sdk.mjs"
    command = ["node", str(program), str(sdk_folder()), f"{served.url}/v1", model, json.dumps(settings)]
    with trio.fail_after(60):
        completed = await trio.run_process(command, capture_stdout=True, stderr=subprocess.STDOUT)
    outcomes: dict[str, dict[str, Any]] = json.loads(completed.stdout.splitlines()[-1])
    return outcomes


async def test_the_ai_sdk_has_the_reason_and_no_ordinary_finish(served: Served, ending: Ending) -> None:
    for way, outcome in (await ask_sdk(served, "failing", pieces=3, status=429)).items():
        assert outcome["text"] == SAID, way
        assert [error["message"] for error in outcome["errors"]] == ["as you wish"], way
        plain = outcome["plain"]
        # A program that reads nothing but the text has to listen to `onError`, unless the connection breaks.
        assert [error["message"] for error in plain["told"]] == ["as you wish"], way
        assert (plain["text"], plain["thrown"] is None) == (SAID, ending == "end"), way
        if ending == "end":
            assert (outcome["reason"], outcome["thrown"]) == ("error", None), way
        else:
            assert outcome["reason"] is None, way
            assert outcome["thrown"]["message"] == "Failed to process successful response", way


async def test_the_ai_sdk_finishes_where_nothing_fails(served: Served) -> None:
    for way, outcome in (await ask_sdk(served, "echo")).items():
        assert "hi" in outcome["text"], way
        assert (outcome["errors"], outcome["thrown"]) == ([], None), way
        assert outcome["reason"] == "stop", way


# Others


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
async def test_langchain_raises_with_the_reason(served: Served, responses: bool) -> None:
    langchain = pytest.importorskip("langchain_openai")
    said = []

    def take() -> None:
        model = langchain.ChatOpenAI(
            model="failing",
            base_url=f"{served.url}/v1",
            api_key="a-key",
            max_retries=0,
            use_responses_api=responses,
            extra_body={"pieces": 3, "status": 429},
        )
        for chunk in model.stream("x"):
            said.append(chunk)

    with pytest.raises(openai.APIError) as caught:
        await trio.to_thread.run_sync(take)
    assert said
    assert caught.value.code == "my_code"


async def test_the_client_of_the_messages_api_raises_with_the_reason(served: Served) -> None:
    anthropic = pytest.importorskip("anthropic")
    said = []

    def take() -> None:
        client = anthropic.Anthropic(base_url=served.url, api_key="a-key", max_retries=0)
        with client.messages.stream(
            model="letters", max_tokens=10, messages=[{"role": "user", "content": "x"}]
        ) as stream:
            for text in stream.text_stream:
                said.append(text)

    with pytest.raises(anthropic.APIStatusError, match="as you wish"):
        await trio.to_thread.run_sync(take)
    assert "".join(said) == SAID
