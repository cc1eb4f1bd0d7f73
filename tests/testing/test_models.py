"""Fake models: what they give is what they say, for every kind, and what happens to them is on record."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ApiError
from trio_cluster.testing import FakeModel, Response, SimulatedCluster, ThreadedFakeModel, worker

pytestmark = pytest.mark.parametrize("fake", [FakeModel, ThreadedFakeModel])


async def start(cluster: SimulatedCluster, model: FakeModel, kind: str = "chat", **options: Any) -> None:
    server = worker("w1", **options)
    getattr(server, f"register_{kind}")("m", model)
    await cluster.start_worker(server)


async def test_a_chat_is_the_announced_text_at_the_announced_pace(
    cluster: SimulatedCluster, fake: type[FakeModel]
) -> None:
    model = fake(tokens=4, first_after=3, interval=2)
    await start(cluster, model)
    began = trio.current_time()
    response = await cluster.client().chat("m")
    assert response.report().text == model.text() == "t0 t1 t2 t3 "
    assert trio.current_time() - began == 9
    assert (model.started, model.finished, model.cleaned_up, model.running) == (1, 1, 1, 0)


async def test_every_kind_has_an_answer(cluster: SimulatedCluster, fake: type[FakeModel]) -> None:
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
    assert scores == [(1, model.score("bc")), (0, model.score("a"))]
    verdict = (await post("moderations", model="moderation", input="a")).json()
    assert verdict["results"][0]["category_scores"]["violence"] == model.score("a")
    assert (await post("own", model="chat")).body.decode() == model.text()
    assert [type(request).__name__ for request in model.requests] == [
        "ChatRequest", "EmbeddingRequest", "TTSRequest", "ImageGenRequest", "ASRRequest", "ImageEditRequest",
        "RerankRequest", "ModerationRequest", "CustomRequest",
    ]  # fmt: skip


async def test_it_fails_where_it_was_told_to(cluster: SimulatedCluster, fake: type[FakeModel]) -> None:
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
async def test_it_stalls_where_it_was_told_to_and_is_cancelled_by_its_deadline(
    cluster: SimulatedCluster, fake: type[FakeModel], pieces: int
) -> None:
    model = fake(stall_at=pieces)
    await start(cluster, model, default_timeout=10)
    response = await cluster.client().chat("m")
    assert response.status == (200 if pieces else 504)
    if pieces:
        assert (response.report().ending, response.report().text) == ("failed", model.text(pieces))
    assert trio.current_time() == pytest.approx(10)
    assert (model.cancelled, model.cleaned_up, model.running) == (1, 1, 0)


async def test_a_stall_that_ends_is_only_a_pause(cluster: SimulatedCluster, fake: type[FakeModel]) -> None:
    model = fake(stall_at=1, stall_for=5)
    await start(cluster, model)
    assert (await cluster.client().chat("m")).report().text == model.text()
    assert trio.current_time() == 5


async def test_it_goes_on_after_it_was_cancelled_for_as_long_as_it_was_told_to(
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


async def test_it_counts_how_many_calls_it_has_at_once(
    cluster: SimulatedCluster, fake: type[FakeModel]
) -> None:
    model = fake(interval=1)
    await start(cluster, model, max_concurrency=2)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(cluster.client().chat, "m")
        await model.wait_until(lambda m: m.running == 2)
    assert (model.started, model.finished, model.max_running, model.running) == (3, 3, 2, 0)


async def test_it_notes_how_much_time_each_request_was_allowed(
    cluster: SimulatedCluster, fake: type[FakeModel]
) -> None:
    model = fake()
    await start(cluster, model, default_timeout=60)
    client = cluster.client()
    await client.chat("m", headers={"x-request-timeout": "7"})
    await client.chat("m")
    assert model.allowed == [pytest.approx(7), pytest.approx(60)]


async def test_large_pieces_hold_it_up_at_a_client_that_does_not_read(
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


async def test_a_wait_that_would_never_end_is_refused(fake: type[FakeModel]) -> None:
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
