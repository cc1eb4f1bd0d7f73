"""Fake models: their output is what they announce, for every kind, and they record what happens to them."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ApiError, OutputChunk
from trio_cluster.core.model import KINDS, Kind
from trio_cluster.openai import endpoint_named
from trio_cluster.testing import FakeModel, Response, SimulatedCluster, ThreadedFakeModel, worker
from trio_cluster.testing._samples import ENDPOINT_OF, encode

pytestmark = pytest.mark.parametrize("fake", [FakeModel, ThreadedFakeModel])


async def start(cluster: SimulatedCluster, model: FakeModel, kind: str = "chat", **options: Any) -> None:
    server = worker("w1", **options)
    getattr(server, f"register_{kind}")("m", model)
    await cluster.start_worker(server)


async def test_a_chat_has_the_announced_text_at_the_announced_pace(
    cluster: SimulatedCluster, fake: type[FakeModel]
) -> None:
    model = fake(tokens=4, first_after=3, interval=2)
    await start(cluster, model)
    began = trio.current_time()
    response = await cluster.client().chat("m")
    assert response.report().text == model.text() == "t0 t1 t2 t3 "
    assert trio.current_time() - began == 9
    assert (model.started, model.finished, model.cleaned_up, model.running) == (1, 1, 1, 0)


async def test_every_kind_has_a_response(cluster: SimulatedCluster, fake: type[FakeModel]) -> None:
    model = fake(marked=True)
    server = worker("w1")
    server.register_chat("chat", model)
    server.register_embedding("embedding", model)
    server.register_tts("tts", model)
    server.register_asr("asr", model)
    server.register_image_generation("image", model)
    server.register_image_edit("image", model)
    server.register_rerank("rerank", model)
    server.register_moderation("moderation", model)
    server.route("/v1/own", "chat", model)
    await cluster.start_worker(server)
    client = cluster.client()

    async def post(path: str, **fields: Any) -> Response:
        response = await client.post(f"/v1/{path}", fields)
        assert response.status == 200
        return response

    message = {"role": "user", "content": "hi"}
    chat = (await post("chat/completions", model="chat", messages=[message], n=2)).json()
    assert [choice["message"]["content"] for choice in chat["choices"]] == ["hit0 hit1 hit2 "] * 2
    vectors = (await post("embeddings", model="embedding", input=["a", "bc"])).json()
    assert [item["embedding"] for item in vectors["data"]] == [model.vector(0, "a"), model.vector(1, "bc")]
    speech = await post("audio/speech", model="tts", input="say", voice="x")
    assert speech.body.decode() == model.text(mark="say")
    images = (await post("images/generations", model="image", prompt="p", n=2)).json()
    assert [base64.b64decode(item["b64_json"]) for item in images["data"]] == [
        model.image(0, mark="p"),
        model.image(1, mark="p"),
    ]
    form = (
        b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nasr\r\n'
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\nsound\r\n--x--\r\n'
    )
    headers = {"content-type": "multipart/form-data; boundary=x"}
    transcript = await client.post("/v1/audio/transcriptions", form, headers=headers)
    assert transcript.json()["text"] == model.text()
    form = (
        b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\nimage\r\n'
        b'--x\r\ncontent-disposition: form-data; name="prompt"\r\n\r\np\r\n'
        b'--x\r\ncontent-disposition: form-data; name="image"; filename="a.png"\r\n\r\npng\r\n--x--\r\n'
    )
    edited = (await client.post("/v1/images/edits", form, headers=headers)).json()
    assert base64.b64decode(edited["data"][0]["b64_json"]) == model.image(0, mark="p")
    ranking = (await post("rerank", model="rerank", query="q", documents=["a", "bc"])).json()
    scores = [(item["index"], item["relevance_score"]) for item in ranking["results"]]
    assert scores == [(1, model.score("qbc")), (0, model.score("qa"))]
    verdict = (await post("moderations", model="moderation", input="a")).json()
    assert verdict["results"][0]["category_scores"]["violence"] == model.score("a")
    assert (await post("own", model="chat")).body.decode() == model.text()
    assert [type(request).__name__ for request in model.requests] == [
        "ChatRequest", "EmbeddingRequest", "TTSRequest", "ImageGenRequest", "ASRRequest", "ImageEditRequest",
        "RerankRequest", "ModerationRequest", "CustomRequest",
    ]  # fmt: skip


def _message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


_FILE = b"bytes of a file"

#: For each kind, the fields of a request with a text, and what a marked model with two pieces gives for it.
MARKED: dict[Kind, tuple[Callable[[str], dict[str, Any]], Callable[[FakeModel, str], list[OutputChunk]]]] = {
    "chat": (
        lambda text: {"messages": _message(text)},
        lambda model, text: [
            OutputChunk.text_delta(f"{text}t0 ", 0),
            OutputChunk.text_delta(f"{text}t1 ", 0),
        ],
    ),
    "embedding": (
        lambda text: {"input": [text]},
        lambda model, text: [OutputChunk.embedding(model.vector(0, text), 0)],
    ),
    "asr": (
        lambda text: {"file": _FILE, "prompt": text},
        lambda model, text: [OutputChunk.text_delta(f"{text}t0 "), OutputChunk.text_delta(f"{text}t1 ")],
    ),
    "tts": (
        lambda text: {"input": text, "voice": "v"},
        lambda model, text: [
            OutputChunk.audio(f"{text}t0 ".encode(), "audio/mpeg"),
            OutputChunk.audio(f"{text}t1 ".encode(), "audio/mpeg"),
        ],
    ),
    "image_generation": (
        lambda text: {"prompt": text},
        lambda model, text: [OutputChunk.image(model.image(0, mark=text), "image/png")],
    ),
    "image_edit": (
        lambda text: {"prompt": text, "image": _FILE},
        lambda model, text: [OutputChunk.image(model.image(0, mark=text), "image/png")],
    ),
    "rerank": (
        lambda text: {"query": text, "documents": ["document"]},
        lambda model, text: [OutputChunk.scores([model.score(f"{text}document")])],
    ),
    "moderation": (
        lambda text: {"input": text},
        lambda model, text: [OutputChunk.json({"violence": model.score(text)})],
    ),
    "custom": (
        lambda text: {"text": text},
        lambda model, text: [OutputChunk.text_delta("t0 "), OutputChunk.text_delta("t1 ")],
    ),
}


def contents(chunks: list[OutputChunk]) -> list[Any]:
    """Return the chunks as values that can be compared."""
    return [(chunk.kind, chunk.value, chunk.index, chunk.mime_type) for chunk in chunks]


async def output_for(model: FakeModel, kind: Kind, fields: dict[str, Any]) -> list[Any]:
    body, content_type = encode(fields, stream=False)
    request = endpoint_named(ENDPOINT_OF[kind]).parse(body, content_type, {})
    output: list[OutputChunk] = []
    if isinstance(model, ThreadedFakeModel):

        class ThreadCollector:
            push = staticmethod(output.append)

        await trio.to_thread.run_sync(model, request, ThreadCollector)
    else:

        class Collector:
            @staticmethod
            async def push(chunk: OutputChunk) -> None:
                output.append(chunk)

        await model(request, Collector)  # type: ignore[arg-type]
    return contents(output)


def test_every_kind_is_in_the_table_of_marks(fake: type[FakeModel]) -> None:
    # Passthrough models get bytes, and no request that could be read.
    assert MARKED.keys() == set(KINDS) - {"any"}


@pytest.mark.parametrize("kind", MARKED)
async def test_a_marked_output_depends_on_the_text_of_its_request(kind: Kind, fake: type[FakeModel]) -> None:
    fields, expected = MARKED[kind]
    model = fake(tokens=2, marked=True)
    outputs = [await output_for(model, kind, fields(text)) for text in ("one", "another")]
    assert outputs == [contents(expected(model, text)) for text in ("one", "another")]
    assert (outputs[0] != outputs[1]) is (kind != "custom")


@pytest.mark.parametrize("kind", MARKED)
async def test_an_output_that_is_not_marked_depends_on_inputs_only(kind: Kind, fake: type[FakeModel]) -> None:
    fields, _ = MARKED[kind]
    model = fake(tokens=2)
    one, another = [await output_for(model, kind, fields(text)) for text in ("one", "another")]
    assert (one != another) is (kind in ("embedding", "moderation"))


async def test_it_fails_after_so_many_pieces(cluster: SimulatedCluster, fake: type[FakeModel]) -> None:
    model = fake(fail_at=2, error=ApiError(429, "enough", code="enough"))
    await start(cluster, model)
    report = (await cluster.client().chat("m")).report()
    assert (report.ending, report.text, report.error and report.error["code"]) == (
        "failed",
        model.text(),
        "enough",
    )
    assert (model.text(), model.failed, model.cleaned_up) == ("t0 t1 ", 1, 1)


async def test_an_error_that_is_not_for_clients_is_a_500(
    cluster: SimulatedCluster, fake: type[FakeModel]
) -> None:
    model = fake(fail_at=0, error=ZeroDivisionError("inside"))
    await start(cluster, model)
    response = await cluster.client().chat("m")
    assert (response.status, response.error["code"], b"inside" in response.body) == (
        500,
        "handler_failed",
        False,
    )


@pytest.mark.parametrize("pieces", [0, 1, 3])
async def test_it_stalls_after_so_many_pieces_and_is_cancelled_by_its_deadline(
    cluster: SimulatedCluster, fake: type[FakeModel], pieces: int
) -> None:
    model = fake(stall_at=pieces)
    await start(cluster, model, default_timeout=9)
    response = await cluster.client().chat("m")
    assert response.status == (200 if pieces else 504)
    if pieces:
        assert (response.report().ending, response.report().text) == ("failed", model.text(pieces))
    assert trio.current_time() == pytest.approx(9)
    assert (model.cancelled, model.cleaned_up, model.running) == (1, 1, 0)


async def test_a_stall_that_ends_is_only_a_pause(cluster: SimulatedCluster, fake: type[FakeModel]) -> None:
    model = fake(stall_at=1, stall_for=5)
    await start(cluster, model)
    assert (await cluster.client().chat("m")).report().text == model.text()
    assert trio.current_time() == 5


async def test_it_ignores_its_cancellation_for_so_long(
    cluster: SimulatedCluster, fake: type[FakeModel]
) -> None:
    model = fake(stall_at=1, ignore_cancellation_for=4, hang_in_cleanup=3)
    await start(cluster, model)
    async with cluster.client().open_chat("m") as response:
        await response.receive_until(b"t0")
    await model.wait_until(lambda m: m.cancelled == 1)
    began = trio.current_time()
    assert (model.running, model.cleaned_up) == (1, 0)
    await model.wait_until(lambda m: m.cleaned_up == 1)
    assert trio.current_time() - began == 7
    assert model.running == 0


async def test_it_counts_how_many_calls_run_at_once(cluster: SimulatedCluster, fake: type[FakeModel]) -> None:
    model = fake(interval=1)
    await start(cluster, model, max_concurrency=2)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(cluster.client().chat, "m")
        await model.wait_until(lambda m: m.running == 2)
    assert (model.started, model.finished, model.max_running, model.running) == (3, 3, 2, 0)


async def test_it_records_how_much_time_each_request_had(
    cluster: SimulatedCluster, fake: type[FakeModel]
) -> None:
    model = fake()
    await start(cluster, model, default_timeout=60)
    client = cluster.client()
    await client.chat("m", headers={"x-request-timeout": "7"})
    await client.chat("m")
    assert model.allowed == [pytest.approx(7), pytest.approx(60)]


async def test_large_pieces_block_it_if_the_client_does_not_read(
    cluster: SimulatedCluster, fake: type[FakeModel]
) -> None:
    model = fake(tokens=50, piece_size=100_000)
    await start(cluster, model)
    async with cluster.client().open_chat("m") as response:
        await trio.sleep(20)
        assert (model.running, model.finished) == (1, 0)
        whole = await response.finish()
    assert whole.report().text == model.text()
    assert len(model.text()) == 5_000_000


async def test_an_infinite_duration_is_refused(fake: type[FakeModel]) -> None:
    for what in ("first_after", "interval", "ignore_cancellation_for", "hang_in_cleanup"):
        with pytest.raises(ValueError, match=what):
            fake(**{what: math.inf})


async def test_a_thread_takes_no_virtual_time(
    autojump_clock: MockClock, fake: type[FakeModel], cluster: SimulatedCluster
) -> None:
    await start(cluster, fake(tokens=200))
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    assert (await cluster.client().post("/v1/chat/completions", json.dumps(body).encode())).status == 200
    assert trio.current_time() == 0
