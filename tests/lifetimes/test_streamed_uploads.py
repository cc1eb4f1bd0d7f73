"""Large uploads: streamed from the client to the handler, with every fault that can happen meanwhile."""

from __future__ import annotations

import functools
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import h11
import pytest
import trio
from trio.testing import MockClock

from trio_cluster import ApiError, ASRRequest, ChatRequest, ClusterServer, RawCall
from trio_cluster.core.limits import WINDOW
from trio_cluster.gateway import body
from trio_cluster.gateway.deadlines import GRACE
from trio_cluster.testing import (
    Response,
    SimulatedCluster,
    StreamingResponse,
    assert_no_orphans,
    assert_stats_balance,
    open_cluster,
    settle,
    worker,
)

LATENCY: Final = 0.01
SILENCE: Final = 20.0
OPTIONS: Final[dict[str, Any]] = {
    "default_timeout": SILENCE,
    "queue_timeout": 1.0,
    "worker_timeout": 15.0,
    "heartbeat_interval": 5.0,
    "drain_timeout": 10.0,
    "max_concurrency": 2,
}
#: Bytes of the file; several times what any node buffers of a body.
SIZE: Final = 3_000_000
#: Bytes that the client sends at a time.
PIECE: Final = 40_000
#: Where the client pauses: by then the field `model` has been received, if it comes first.
HALF: Final = SIZE // 2

places = pytest.mark.parametrize("forwarded", [True, False], ids=["forwarded", "local"])
orders = pytest.mark.parametrize("first", [True, False], ids=["model first", "model last"])
kinds = pytest.mark.parametrize("model", ["asr", "raw"])


@functools.cache  # making it takes longer than most tests
def sound(size: int = SIZE) -> bytes:
    """Return a file in which no two pieces are equal."""
    return b"".join(b"%07d," % number for number in range(size // 8 + 1))[:size]


def form(model: str, *, first: bool, size: int = SIZE) -> bytes:
    part = b'--B\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    parts = [part % (b"model", b"", model.encode()), part % (b"file", b'; filename="a.wav"', sound(size))]
    return b"".join(parts if first else reversed(parts)) + b"--B--\r\n"


def summary(data: bytes) -> str:
    return f"{len(data)} {zlib.crc32(data)}"


class Uploader:
    """A client that sends a form piece by piece.

    Attributes:
        sent: bytes of the body that have been sent.
        paused: set when it pauses, after ``pauses_at`` bytes.
        go_on: set by the test to let it continue.
        response: as far as it was received; ``None`` if there was none.
        took: seconds until the end.
        over: set at the end.
    """

    def __init__(
        self,
        cluster: SimulatedCluster,
        body: bytes,
        *,
        pauses_at: int = 1 << 60,
        pace: float = 0.0,
        chunked: bool = False,
        **headers: str,
    ) -> None:
        self._cluster = cluster
        self._body = body
        self._pauses_at = pauses_at
        self._pace = pace
        length = {"transfer-encoding": "chunked"} if chunked else {"content-length": str(len(body))}
        self._headers = {"host": "localhost", "content-type": "multipart/form-data; boundary=B", **length}
        self._headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        self._stream: Any = None
        self._http = h11.Connection(h11.CLIENT)
        self.sent = 0
        self.paused = trio.Event()
        self.go_on = trio.Event()
        self.response: Response | None = None
        self.took = 0.0
        self.over = trio.Event()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Send the form, and receive the response; reports as started when it pauses."""
        self._stream = await self._cluster.network.host("uploader").connect("master", 8080)
        began = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send)
                if self._pauses_at < len(self._body):
                    nursery.start_soon(self._report_pause, task_status)
                else:
                    task_status.started()
                with suppress(trio.ClosedResourceError):
                    self.response = await self._receive()
                self.took = trio.current_time() - began
                # It sends the whole body even if the response has come before.
                if self.response is None:
                    nursery.cancel_scope.cancel()
                self.go_on.set()
        finally:
            self.took = self.took or trio.current_time() - began
            self.over.set()

    async def _report_pause(self, task_status: trio.TaskStatus[None]) -> None:
        await self.paused.wait()
        task_status.started()

    async def _send(self) -> None:
        head = h11.Request(
            method="POST", target="/v1/audio/transcriptions", headers=list(self._headers.items())
        )
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._stream.send_all(self._http.send(head) or b"")
            for begin in range(0, len(self._body), PIECE):
                if begin >= self._pauses_at and not self.paused.is_set():
                    # By then every node has received what it is going to receive.
                    await trio.sleep(1)
                    self.paused.set()
                    await self.go_on.wait()
                piece = self._body[begin : begin + PIECE]
                await self._stream.send_all(self._http.send(h11.Data(piece)) or b"")
                self.sent = begin + len(piece)
                if self._pace:
                    await trio.sleep(self._pace)
            await self._stream.send_all(self._http.send(h11.EndOfMessage()) or b"")

    async def _receive(self) -> Response | None:
        try:
            event = self._http.next_event()
            while event is h11.NEED_DATA:
                self._http.receive_data(await self._stream.receive_some())
                event = self._http.next_event()
            return await StreamingResponse(self._stream, self._http, event).finish()
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            return None

    async def end(self) -> Response:
        """Wait for the complete response."""
        with trio.fail_after(2000):
            await self.over.wait()
        assert self.response is not None
        assert self.response.complete
        return self.response

    async def send_another(self) -> int:
        """Send another request on the same connection, and return the status of its response."""
        self._http.start_next_cycle()
        await self._stream.send_all(
            (
                self._http.send(h11.Request(method="GET", target="/health", headers=[("host", "master")]))
                or b""
            )
            + (self._http.send(h11.EndOfMessage()) or b"")
        )
        response = await self._receive()
        assert response is not None
        return response.status

    def leave(self, *, reset: bool = False) -> None:
        self._stream.close(reset=reset)


async def read_all(call: RawCall) -> None:
    data = b""
    while piece := await call.receive():
        data += piece
    begin = data.index(b"\r\n\r\n", data.index(b"a.wav")) + 4
    call.begin(200, "application/json")
    await call.send(b'{"text": "%s"}' % summary(data[begin : data.index(b"\r\n--B", begin)]).encode())


class Scenario:
    """A cluster with two models, ``asr`` and ``raw``, on a worker or on the master itself.

    Attributes:
        raw: what the raw model does.
        started, stopped: the models whose handlers have started, and ended.
        cancelled: the models whose handlers were cancelled.
    """

    def __init__(self, cluster: SimulatedCluster, back: ClusterServer, nursery: trio.Nursery) -> None:
        self.cluster = cluster
        self.back = back
        self.nursery = nursery
        self.raw: Callable[[RawCall], Any] = read_all
        self.started: list[str] = []
        self.cancelled: list[str] = []
        self.stopped: list[str] = []
        self.uploaders: list[Uploader] = []

    @property
    def master(self) -> ClusterServer:
        return self.cluster.master.server

    @property
    def nodes(self) -> list[ClusterServer]:
        return [self.master] if self.back is self.master else [self.master, self.back]

    async def listen(self, request: ASRRequest) -> str:
        self.started.append("asr")
        return summary(request.audio)

    async def relay(self, call: RawCall) -> None:
        self.started.append("raw")
        try:
            await self.raw(call)
        except trio.Cancelled:
            self.cancelled.append("raw")
            raise
        finally:
            self.stopped.append("raw")

    async def upload(self, model: str, *, first: bool, size: int = SIZE, **how: Any) -> Uploader:
        """Begin an upload, and return when it pauses, or at once if it does not pause."""
        return await self.send(form(model, first=first, size=size), **how)

    async def send(self, body: bytes, **how: Any) -> Uploader:
        uploader = Uploader(self.cluster, body, **how)
        self.uploaders.append(uploader)
        await self.nursery.start(uploader.run)
        return uploader

    def stats(self) -> dict[str, int]:
        """Return how the calls of the master have ended, without counters that are 0."""
        stats = self.master.router.stats
        names = ("completed", "cancelled", "timed_out", "worker_lost", "failed", "retried")
        return {name: count for name in names if (count := getattr(stats, name))}

    def waiting(self) -> list[int]:
        """Return how many bytes of bodies wait on each node."""
        return [
            sum(call.request.upload.waiting_bytes for call in node.router.live if call.request.upload)
            for node in self.nodes
        ]


@pytest.fixture(autouse=True)
def files(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record all files that are opened for bodies."""
    opened: list[Any] = []
    make = body.tempfile.TemporaryFile

    def remember(**options: Any) -> Any:
        opened.append(make(**options))
        return opened[-1]

    monkeypatch.setattr(body.tempfile, "TemporaryFile", remember)
    return opened


@asynccontextmanager
async def open_scenario(
    files: list[Any], *, forwarded: bool, slots: int | None = None, **options: Any
) -> AsyncIterator[Scenario]:
    options = OPTIONS | options
    async with open_cluster(latency=LATENCY, **options) as cluster, trio.open_nursery() as nursery:
        back = worker("w", **options) if forwarded else cluster.master.server
        scenario = Scenario(cluster, back, nursery)
        back.register_asr("asr", scenario.listen)
        back.register_raw("raw", scenario.relay, max_concurrency=slots)
        if forwarded:
            await cluster.start_worker(back)
        yield scenario
        for uploader in scenario.uploaders:
            uploader.leave()
        await settle(cluster)
        assert_stats_balance(cluster)
        assert all(file.closed for file in files)
        nursery.cancel_scope.cancel(reason="the test is over")


# Without faults


@places
@orders
@kinds
async def test_a_large_file_arrives_as_it_was_sent(
    model: str, first: bool, forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        uploader = await scenario.upload(model, first=first)
        response = await uploader.end()
        assert (response.status, response.json()["text"]) == (200, summary(sound()))
        assert await uploader.send_another() == 200
        assert scenario.stats() == {"completed": 1}
        # A body that is forwarded at once is not spooled.
        assert len(files) == (0 if first else 1)


@places
async def test_a_raw_model_gets_the_beginning_while_the_client_has_not_sent_the_rest(
    forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        received = 0

        async def count(call: RawCall) -> None:
            nonlocal received
            while piece := await call.receive():
                received += len(piece)
            call.begin(200, "text/plain")

        scenario.raw = count
        uploader = await scenario.upload("raw", first=True, pauses_at=HALF)
        assert received == uploader.sent
        uploader.go_on.set()
        assert (await uploader.end()).status == 200
        assert received == len(form("raw", first=True))


@places
async def test_two_concurrent_uploads_do_not_slow_each_other(
    forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        let_go = trio.Event()

        async def read_late(call: RawCall) -> None:
            await let_go.wait()
            await read_all(call)

        scenario.raw = read_late
        stuck = await scenario.upload("raw", first=True)
        await trio.sleep(1)
        began = trio.current_time()
        assert (await (await scenario.upload("asr", first=True)).end()).json()["text"] == summary(sound())
        # It takes as long as alone: a quarter of a window for each round trip, at worst.
        assert trio.current_time() - began < 2 * LATENCY * SIZE / (WINDOW / 4) + 1
        assert not stuck.over.is_set()
        let_go.set()
        assert (await stuck.end()).status == 200


@places
@orders
async def test_tokens_of_other_calls_are_not_delayed_by_an_upload(
    first: bool, forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:

        async def tick(request: ChatRequest) -> AsyncIterator[str]:
            while True:
                yield f"{trio.current_time()} "
                await trio.sleep(0.1)

        scenario.back.register_chat("clock", tick)
        await trio.sleep(1)
        async with scenario.cluster.client("listener").open_chat("clock") as response:
            await response.receive_until(b"content")
            uploader = await scenario.upload("raw", first=first, pace=0.02)
            before = len(response.received)
            latest = 0.0
            while not uploader.over.is_set():
                piece = await response.receive()
                sent_at = float(piece.split(b'"content":"')[1].split()[0])
                latest = max(latest, trio.current_time() - sent_at)
            assert (await uploader.end()).status == 200
            assert len(response.received) > before
        assert latest <= 4 * LATENCY


# The client


@places
@orders
@kinds
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
async def test_a_client_that_leaves_in_the_middle_frees_everything_at_once(
    reset: bool, model: str, first: bool, forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        uploader = await scenario.upload(model, first=first, pauses_at=HALF)
        uploader.leave(reset=reset)
        await trio.sleep(1)
        assert_no_orphans(scenario.cluster)
        assert uploader.response is None
        # There is no call while the model of the form is not known.
        assert scenario.stats() == ({"cancelled": 1} if first else {})
        assert scenario.started == scenario.cancelled == (["raw"] if (model, first) == ("raw", True) else [])


@places
@orders
@kinds
async def test_a_client_that_stops_sending_gets_408_and_everything_is_freed(
    model: str, first: bool, forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        uploader = await scenario.upload(model, first=first, pauses_at=HALF)
        response = await uploader.end()
        assert response.status == 408
        assert response.headers["connection"] == "close"
        assert uploader.took == pytest.approx(body.BODY_IDLE_TIMEOUT + 2, abs=1)
        assert scenario.stats() == ({"cancelled": 1} if first else {})
        assert "asr" not in scenario.started


@places
@orders
async def test_a_client_whose_upload_takes_too_long_gets_408(
    first: bool, forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        uploader = await scenario.upload("raw", first=first, pace=10.0)
        response = await uploader.end()
        assert response.status == 408
        assert uploader.took == pytest.approx(body.BODY_TIMEOUT + 2, abs=1)
        assert scenario.stats() == ({"cancelled": 1} if first else {})


@places
@orders
@kinds
async def test_a_body_that_exceeds_the_limit_in_its_middle_gets_413_and_the_connection_stays_usable(
    model: str, first: bool, forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded, max_body_size=2_000_000) as scenario:
        uploader = await scenario.upload(model, first=first, chunked=True)
        response = await uploader.end()
        assert response.status == 413
        assert "connection" not in response.headers
        assert await uploader.send_another() == 200
        assert scenario.stats() == ({"cancelled": 1} if first else {})
        assert "asr" not in scenario.started


async def test_the_limit_of_the_worker_applies_too(files: list[Any], autojump_clock: MockClock) -> None:
    async with open_scenario(files, forwarded=True) as scenario:
        scenario.back.options.server.max_body_size = 2_000_000
        declared = await scenario.upload("asr", first=True)
        assert (await declared.end()).status == 413
        assert await declared.send_another() == 200
        grown = await scenario.upload("asr", first=True, chunked=True)
        assert (await grown.end()).status == 413
        assert await grown.send_another() == 200
        assert scenario.stats() == {"failed": 2}
        assert scenario.started == []


# Time


@places
@kinds
async def test_the_total_timeout_runs_during_the_upload(
    model: str, forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        uploader = await scenario.upload(model, first=True, pauses_at=HALF, x_request_timeout="8")
        response = await uploader.end()
        assert (response.status, response.error["code"]) == (504, "timeout")
        # After that the rest of the body is received and dropped, for a short time.
        assert uploader.took == pytest.approx(8 + 2, abs=1)
        assert scenario.stats() == {"timed_out": 1}


@places
@orders
@kinds
async def test_the_idle_timeout_is_paused_during_the_upload(
    model: str, first: bool, forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded, default_timeout=2.0) as scenario:
        uploader = await scenario.upload(model, first=first, pace=1.5)
        assert (await uploader.end()).status == 200
        assert uploader.took > 100
        assert scenario.stats() == {"completed": 1}


@places
async def test_a_raw_model_that_reads_nothing_is_cancelled_after_the_idle_timeout(
    forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:

        async def read_nothing(call: RawCall) -> None:
            await trio.sleep_forever()

        scenario.raw = read_nothing
        uploader = await scenario.upload("raw", first=True)
        response = await uploader.end()
        assert (response.status, response.error["code"]) == (504, "timeout")
        assert uploader.took == pytest.approx(SILENCE + GRACE, abs=3)
        assert scenario.cancelled == ["raw"]


@places
async def test_a_raw_model_that_reads_slowly_slows_its_client_and_little_is_buffered(
    forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        most = [0, 0]
        read = 0

        async def read_slowly(call: RawCall) -> None:
            nonlocal read
            while piece := await call.receive():
                read += len(piece)
                await trio.sleep(1)
                for node, waits in enumerate(scenario.waiting()):
                    most[node] = max(most[node], waits)
                # All buffers together: two windows on each node, and those of the kernels.
                assert (
                    uploader.sent - read < (2 * len(scenario.nodes) + 2) * WINDOW + 2 * body.SPOOL_THRESHOLD
                )
            call.begin(200, "text/plain")

        scenario.raw = read_slowly
        uploader = await scenario.upload("raw", first=True)
        assert (await uploader.end()).status == 200
        assert uploader.took > 8
        assert most[0] <= 3 * WINDOW
        if forwarded:
            assert 0 < most[1] <= WINDOW


async def test_the_time_that_a_slow_worker_takes_does_not_count_as_time_of_the_client(
    files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=True, default_timeout=100.0) as scenario:

        async def read_slowly(call: RawCall) -> None:
            received = 0
            while piece := await call.receive():
                received += len(piece)
                if received < 2_200_000:
                    await trio.sleep(90)
            call.begin(200, "text/plain")

        scenario.raw = read_slowly
        uploader = await scenario.upload("raw", first=True, pace=0.5)
        assert (await uploader.end()).status == 200
        assert uploader.took > body.BODY_TIMEOUT


# The handler


@places
@kinds
async def test_a_model_that_has_left_when_its_name_is_received_is_503_and_the_connection_stays_usable(
    model: str, forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        uploader = await scenario.upload(model, first=False, pauses_at=HALF)
        scenario.back.unregister_model(model)
        await trio.sleep(1)
        uploader.go_on.set()
        response = await uploader.end()
        assert (response.status, response.error["code"]) == (503, "model_unavailable")
        assert await uploader.send_another() == 200
        assert scenario.stats() == {}


@places
@kinds
async def test_an_upload_that_is_under_way_is_answered_although_its_model_is_unregistered(
    model: str, forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        uploader = await scenario.upload(model, first=True, pauses_at=HALF)
        scenario.back.unregister_model(model)
        await trio.sleep(1)
        uploader.go_on.set()
        assert (await uploader.end()).status == 200


@places
async def test_an_unknown_model_is_404_as_soon_as_its_name_is_received(
    forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        uploader = await scenario.upload("unknown", first=True)
        response = await uploader.end()
        assert (response.status, response.error["code"]) == (404, "model_not_found")
        assert await uploader.send_another() == 200


async def test_a_form_without_a_model_or_with_an_empty_one_is_refused_as_a_small_one_is(
    files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=True) as scenario:
        without = form("m", first=True).replace(b'"model"', b'"madel"')
        for body in (without, form("", first=True), form("", first=False)):
            uploader = await scenario.send(body)
            response = await uploader.end()
            assert (response.status, response.error["param"]) == (400, "model")
            assert await uploader.send_another() == 200
        assert scenario.stats() == {}


@places
async def test_a_raw_model_without_a_free_slot_is_503_during_the_upload_and_the_connection_stays_usable(
    forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded, slots=1) as scenario:
        let_go = trio.Event()

        async def wait(call: RawCall) -> None:
            if scenario.started == ["raw"]:
                await let_go.wait()
            await read_all(call)

        scenario.raw = wait
        busy = await scenario.upload("raw", first=True)
        await trio.sleep(1)
        uploader = await scenario.upload("raw", first=True)
        response = await uploader.end()
        assert (response.status, response.error["code"]) == (503, "over_capacity")
        assert int(response.headers["retry-after"]) >= 1
        assert uploader.took < 3
        assert await uploader.send_another() == 200
        let_go.set()
        assert (await busy.end()).status == 200
        assert scenario.stats() == {"completed": 1, "failed": 1}


@places
async def test_a_handler_gets_its_slot_when_the_body_is_complete_and_not_before(
    forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded, max_concurrency=1) as scenario:
        slow = await scenario.upload("asr", first=True, pauses_at=HALF)
        assert (await (await scenario.upload("asr", first=True)).end()).status == 200
        slow.go_on.set()
        assert (await slow.end()).status == 200


@places
@pytest.mark.parametrize("status", [200, 413])
async def test_a_raw_model_may_answer_before_it_has_read_anything(
    status: int, forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:

        async def answer_at_once(call: RawCall) -> None:
            call.begin(status, "application/json")
            await call.send(b'{"early": true}')

        scenario.raw = answer_at_once
        uploader = await scenario.upload("raw", first=True)
        response = await uploader.end()
        assert (response.status, response.json()) == (status, {"early": True})
        assert uploader.took < 3
        assert await uploader.send_another() == 200
        assert scenario.stats() == {"completed": 1}


@places
async def test_a_raw_model_may_refuse_in_the_middle(
    forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:

        async def refuse(call: RawCall) -> None:
            await call.receive()
            raise ApiError(415, "not this sound", code="unsupported")

        scenario.raw = refuse
        uploader = await scenario.upload("raw", first=True)
        response = await uploader.end()
        assert (response.status, response.error["code"]) == (415, "unsupported")
        assert await uploader.send_another() == 200
        assert scenario.stats() == {"failed": 1}


@places
async def test_a_form_that_is_malformed_in_its_middle_is_refused_there(
    forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        body = form("asr", first=True).replace(sound()[2_000_000:2_000_005], b"\r\n--Bx", 1)
        uploader = await scenario.send(body, pauses_at=2_500_000)
        response = await uploader.end()
        assert (response.status, response.error["type"]) == (400, "invalid_request_error")
        assert "multipart" in response.error["message"]
        assert uploader.took < 5
        assert scenario.started == []


# The worker, the link, the master


@kinds
async def test_a_link_that_is_cut_and_resumed_in_the_middle_loses_nothing(
    model: str, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=True) as scenario:
        uploader = await scenario.upload(model, first=True, pauses_at=HALF)
        scenario.cluster.workers["w"].link.reset()
        await trio.sleep(1)
        uploader.go_on.set()
        await trio.sleep(0.02)
        scenario.cluster.workers["w"].link.reset()
        response = await uploader.end()
        assert response.status == 200
        assert scenario.stats() == {"completed": 1}


@orders
@kinds
@pytest.mark.parametrize("cause", ["killed", "cut", "reset", "silent", "frozen"])
async def test_a_worker_that_is_lost_in_the_middle_is_502_and_the_call_is_not_retried(
    cause: str, model: str, first: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=True, on_conflict="replicate", resume_window=0.0) as scenario:
        other = worker("other", **OPTIONS | {"on_conflict": "replicate"})
        uploader = await scenario.upload(model, first=first, pauses_at=HALF)
        other.register_asr("asr", scenario.listen)
        other.register_raw("raw", scenario.relay)
        await scenario.cluster.start_worker(other)
        node = scenario.cluster.workers["w"]
        link = node.link
        match cause:
            case "killed":
                node.kill()
            case "cut":
                link.cut()
            case "reset":
                link.reset()
            case "silent":
                link.partition()
            case "frozen":
                node.freeze()
        if cause in ("silent", "frozen"):
            await trio.sleep(OPTIONS["worker_timeout"] + OPTIONS["heartbeat_interval"])
        else:
            await trio.sleep(1)
        uploader.go_on.set()
        response = await uploader.end()
        if first:
            # What has been forwarded is not kept, so the call cannot be retried.
            assert (response.status, response.error["code"]) == (502, "worker_lost")
            assert scenario.stats() == {"worker_lost": 1}
        else:
            # There was no call yet.
            assert response.status == 200
            assert scenario.stats() == {"completed": 1}
        if cause not in ("silent", "frozen"):
            # The client sent the rest soon enough for the connection to be kept.
            assert await uploader.send_another() == 200
        link.heal()
        node.thaw()


@orders
@kinds
async def test_a_worker_that_drains_in_the_middle_finishes_calls_that_cannot_be_given_back(
    model: str, first: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=True) as scenario:
        uploader = await scenario.upload(model, first=first, pauses_at=HALF)
        scenario.cluster.workers["w"].stop()
        await trio.sleep(1)
        uploader.go_on.set()
        response = await uploader.end()
        if first:
            assert (response.status, scenario.stats()) == (200, {"completed": 1})
        else:
            assert (response.status, response.error["code"]) == (503, "model_unavailable")
            assert scenario.stats() == {}
        await scenario.cluster.workers["w"].over.wait()


@kinds
async def test_a_worker_whose_drain_timeout_passes_meanwhile_is_503(
    model: str, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=True) as scenario:
        uploader = await scenario.upload(model, first=True, pauses_at=HALF)
        scenario.cluster.workers["w"].stop()
        response = await uploader.end()
        assert (response.status, response.error["code"]) == (503, "shutting_down")
        assert uploader.took == pytest.approx(OPTIONS["drain_timeout"] + 2, abs=3)
        assert scenario.stats() == {"failed": 1}
        await scenario.cluster.workers["w"].over.wait()


@places
@orders
@kinds
async def test_a_master_that_drains_in_the_middle_finishes_its_calls(
    model: str, first: bool, forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        uploader = await scenario.upload(model, first=first, pauses_at=HALF)
        scenario.cluster.master.stop()
        await trio.sleep(1)
        uploader.go_on.set()
        await uploader.over.wait()
        response = uploader.response
        if first:
            assert response is not None
            assert (response.status, scenario.stats()) == (200, {"completed": 1})
        elif response is not None:
            assert (response.status, response.error["code"]) == (503, "shutting_down")
        await scenario.cluster.master.over.wait()
        if forwarded:
            scenario.cluster.workers["w"].stop()
            await scenario.cluster.workers["w"].over.wait()


@places
async def test_an_operator_can_cancel_an_upload(
    forwarded: bool, files: list[Any], autojump_clock: MockClock
) -> None:
    async with open_scenario(files, forwarded=forwarded) as scenario:
        uploader = await scenario.upload("asr", first=True, pauses_at=HALF, x_request_id="the-one")
        operator = scenario.cluster.client("operator")
        (call,) = (await operator.get("/cluster/calls")).json()["calls"]
        assert (call["request_id"], call["phase"]) == ("the-one", "uploading")
        assert (await operator.post("/cluster/calls/the-one/cancel", {})).status == 200
        response = await uploader.end()
        assert (response.status, response.error["code"]) == (503, "cancelled")
        assert scenario.stats() == {"cancelled": 1}


# The disk


async def test_a_disk_that_is_full_is_503_and_the_connection_stays_usable(
    files: list[Any], monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    def full(**options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(body.tempfile, "TemporaryFile", full)
    async with open_scenario(files, forwarded=True) as scenario:
        uploader = await scenario.upload("asr", first=False)
        response = await uploader.end()
        assert (response.status, response.error["code"]) == (503, "over_capacity")
        assert "No space left" in response.error["message"]
        assert await uploader.send_another() == 200
        assert (await (await scenario.upload("asr", first=True)).end()).status == 200
