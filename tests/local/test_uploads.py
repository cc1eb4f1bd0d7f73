"""Calls whose request body is still arriving: what they wait for, which time counts, and how the body reaches them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
import trio
from memory_cluster import everything, text
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.core.answer import Done, Event, Failed, Head
from trio_cluster.core.call import Call
from trio_cluster.core.channel import ByteChannel
from trio_cluster.core.model import ModelInfo
from trio_cluster.core.request import Request
from trio_cluster.errors import ApiError
from trio_cluster.local.handler import HandlerBackend
from trio_cluster.local.pool import HandlerPool
from trio_cluster.openai import ASRRequest, ChatRequest, CustomRequest
from trio_cluster.options import ClusterServerOptions, ServerOptions

TYPE = "multipart/form-data; boundary=B"
PART = b'--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
FORM = PART % (b"model", b"", b"m") + PART % (b"file", b'; filename="a.wav"', b"RIFF" * 100) + b"--B--\r\n"
CHAT = b'{"model": "m", "messages": [{"role": "user", "content": "a b"}]}'


def asr_request(upload: ByteChannel, **fields: Any) -> Request:
    return Request("audio.transcriptions", "asr", "m", b"", TYPE, upload=upload, **fields)


def chat_request(upload: ByteChannel, **fields: Any) -> Request:
    return Request("chat.completions", "chat", "m", b"", upload=upload, **fields)


@attrs.define
class Bench:
    """A pool that is being served, and a model for audio and for chats on it."""

    options: ClusterServerOptions
    pool: HandlerPool
    started: list[str] = attrs.field(factory=list)

    def open(self, request: Request, sleeps: float = 0.0) -> Call:
        async def listen(request: ASRRequest) -> str:
            self.started.append("asr")
            await trio.sleep(sleeps)
            return str(len(request.audio))

        async def chat(request: ChatRequest) -> AsyncIterator[str]:
            self.started.append("chat")
            yield request.last_text

        handler: Any = listen if request.kind == "asr" else chat
        return HandlerBackend(ModelInfo("m", request.kind), handler, self.pool).open(request)


@pytest.fixture
async def bench(nursery: trio.Nursery) -> Bench:
    options = ClusterServerOptions(
        server=ServerOptions(max_concurrency=1, queue_timeout=5.0, default_timeout=20.0)
    )
    pool = HandlerPool(options)
    await nursery.start(pool.serve)
    return Bench(options, pool)


async def failure(call: Call) -> ApiError:
    with trio.fail_after(1000):
        (end,) = await everything(call)
    assert isinstance(end, Failed)
    return end.error


def plain(events: list[Event]) -> str:
    assert isinstance(events[0], Head)
    assert isinstance(events[-1], Done)
    return text(events)


@pytest.mark.parametrize(
    ("make", "body", "expected"), [(asr_request, FORM, "400"), (chat_request, CHAT, "a b")]
)
async def test_a_handler_begins_when_the_body_is_there(
    make: Any, body: bytes, expected: str, bench: Bench
) -> None:
    upload = ByteChannel(len(body))
    call = bench.open(make(upload))
    for at in range(len(body) - 1):
        upload.put(body[at : at + 1])
    await wait_all_tasks_blocked()
    assert (call.phase, bench.started, bench.pool.running) == ("uploading", [], 0)
    upload.put(body[-1:], last=True)
    assert expected in plain(await everything(call))


async def test_a_body_that_is_still_coming_takes_no_slot(bench: Bench) -> None:
    stuck = bench.open(asr_request(ByteChannel()))
    await wait_all_tasks_blocked()
    upload = ByteChannel()
    upload.put(FORM, last=True)
    assert "400" in plain(await everything(bench.open(asr_request(upload))))
    stuck.cancel("enough")
    await wait_all_tasks_blocked()
    assert bench.pool.tasks == 0


async def test_the_idle_timeout_does_not_count_while_the_body_is_arriving(
    bench: Bench, autojump_clock: MockClock
) -> None:
    upload = ByteChannel()
    call = bench.open(asr_request(upload))
    for at in range(0, len(FORM), 100):
        await trio.sleep(19)
        upload.put(FORM[at : at + 100], last=at + 100 >= len(FORM))
    await trio.sleep(100)
    assert "400" in plain(await everything(call))


async def test_the_idle_timeout_counts_from_the_end_of_the_body(
    bench: Bench, autojump_clock: MockClock
) -> None:
    upload = ByteChannel()
    call = bench.open(asr_request(upload), 100)
    await trio.sleep(100)
    upload.put(FORM, last=True)
    began = trio.current_time()
    assert (await failure(call)).status == 504
    assert trio.current_time() - began == 20.0


async def test_the_total_timeout_counts_while_the_body_is_arriving(
    bench: Bench, autojump_clock: MockClock
) -> None:
    began = trio.current_time()
    closed: list[float] = []
    upload = ByteChannel()
    upload.on_close(lambda: closed.append(trio.current_time() - began))
    error = await failure(bench.open(asr_request(upload, total_timeout=7.0)))
    assert (error.status, closed) == (504, [7.0])
    assert bench.started == []


async def test_a_form_that_makes_no_sense_is_refused_before_the_rest_of_it_has_come(bench: Bench) -> None:
    upload = ByteChannel()
    call = bench.open(asr_request(upload))
    upload.put(FORM[:-10] + b"\r\n--Bnonsense")
    error = await failure(call)
    assert (error.status, upload.closed, bench.started) == (400, True, [])


async def test_a_body_of_another_type_is_refused_before_it_has_come(bench: Bench) -> None:
    upload = ByteChannel()
    request = attrs.evolve(asr_request(upload), content_type="application/json")
    assert (await failure(bench.open(request))).status == 415
    assert upload.closed


@pytest.mark.parametrize("body", [FORM[:-10], FORM.replace(b'"file"', b'"fill"')], ids=["cut", "no file"])
async def test_a_form_with_something_missing_is_refused_at_its_end(body: bytes, bench: Bench) -> None:
    upload = ByteChannel()
    call = bench.open(asr_request(upload))
    upload.put(body, last=True)
    assert (await failure(call)).status == 400
    assert bench.started == []


async def test_a_call_that_is_cancelled_while_its_body_is_coming_is_released_at_once(bench: Bench) -> None:
    upload = ByteChannel()
    call = bench.open(asr_request(upload))
    upload.put(FORM[:50])
    await wait_all_tasks_blocked()
    call.cancel("the client left")
    await wait_all_tasks_blocked()
    assert (call.released, upload.closed, bench.pool.tasks) == (True, True, 0)
    upload.put(FORM[50:], last=True)
    await wait_all_tasks_blocked()
    assert bench.started == []


async def test_a_form_that_the_master_has_checked_is_not_checked_again(bench: Bench) -> None:
    form = FORM.replace(b"--B--", PART % (b"temperature", b"", b"3") + b"--B--")
    for checked in (False, True):
        upload = ByteChannel()
        call = bench.open(asr_request(upload, checked=checked))
        upload.put(form, last=True)
        if checked:
            assert "400" in plain(await everything(call))
        else:
            assert (await failure(call)).status == 400


async def test_a_custom_route_gets_the_form_and_its_bytes(bench: Bench) -> None:
    async def handler(request: CustomRequest) -> str:
        return f"{len(request.body)} {len(request.files['file'][0])}"

    upload = ByteChannel()
    backend = HandlerBackend(
        ModelInfo("m", "custom", extra_endpoints=("/v1/x",)), handler, bench.pool, "/v1/x"
    )
    call = backend.open(Request("/v1/x", "custom", "m", b"", TYPE, upload=upload))
    upload.put(FORM[:100])
    upload.put(FORM[100:], last=True)
    assert plain(await everything(call)) == f"{len(FORM)} 400"
