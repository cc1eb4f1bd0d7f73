"""The whole law, cell by cell, in virtual time."""

from __future__ import annotations

from typing import Any, Final, cast

import pytest
import trio
import trio.testing
from law import LAW, Cell, Impossible
from scenario import ENDPOINTS, LATENCY, REQUEST_ID, Caller, Endpoint, Phase, Scenario, open_scenario

from trio_cluster.gateway.body import BODY_IDLE_TIMEOUT
from trio_cluster.gateway.cycle import DRAIN_TIME
from trio_cluster.gateway.deadlines import GRACE
from trio_cluster.testing import settle

#: The options of every node, each limit different from all others.
OPTIONS: Final[dict[str, Any]] = {
    "default_timeout": 20.0,
    "worker_timeout": 15.0,
    "heartbeat_interval": 5.0,
    "drain_timeout": 19.0,
    "queue_timeout": 100.0,
    "max_concurrency": 1,
}
READ_TIMEOUT: Final = 9.0
BUDGET: Final = 7.0
HANGS: Final = 4.0
LAST_WORDS: Final = 2.0

#: Seconds from one end of the link to the other where the body is to be caught on its way.
SLOW_LINK: Final = 6.0
#: A deadline has to pass meanwhile; a drain must not take longer than it may.
LINKS: Final = {
    "silence": 8.0,
    "read_timeout": 5.0,
    "budget": 5.0,
    "master_drains": 0.6,
    "worker_drains": 0.4,
}
PADDING: Final = 900_000

#: Seconds after each piece that a slow client reads: it needs more than LAST_WORDS for what is on its way.
PACE: Final = 0.4

#: Seconds by which computed times may differ.
EXACT: Final = 1e-6

BOUNDS: Final = {
    "0": 0.0,
    "T": OPTIONS["default_timeout"],
    "T+G": OPTIONS["default_timeout"] + GRACE,
    "R": READ_TIMEOUT,
    "R+G": READ_TIMEOUT + GRACE,
    "B": BUDGET,
    "B+G": BUDGET + GRACE,
    "W": OPTIONS["worker_timeout"],
    "D": OPTIONS["drain_timeout"],
    "U": BODY_IDLE_TIMEOUT + DRAIN_TIME,
    "V": LAST_WORDS,
    "h": HANGS,
}

#: Those that are counted from the last that was heard, which may have been a heartbeat ago.
EARLIER: Final = {"W": OPTIONS["heartbeat_interval"]}

HEADERS: Final = {
    "read_timeout": {"x-stainless-read-timeout": str(READ_TIMEOUT)},
    "budget": {"x-request-timeout": str(BUDGET)},
}

FORWARDED_ONLY: Final = ("worker_", "link_")

#: The ways that a token can go: written to its client where it comes in, or not; waiting for others on a busy link, or
#: not. The law is the same on all of them.
WAYS: Final[dict[str, dict[str, Any]]] = {
    "short": {},
    "ordinary": {"fast_path": False},
    "unbatched": {"batch_wait": 0.0},
    "ordinary_unbatched": {"fast_path": False, "batch_wait": 0.0},
}
#: What is played on all of them in any case: answers that are sent as they come.
SAMPLE: Final = ("chat-stream", "speech")


def impossible(cause: str, phase: str, endpoint: Endpoint, forwarded: bool) -> str | None:
    """Return why there is no such cell, if there is none."""
    entry = LAW[cause][phase]
    if isinstance(entry, Impossible):
        return entry.why
    if not forwarded and (phase == "forwarding" or cause.startswith(FORWARDED_ONLY)):
        return "the handler runs in the master's process: there is no worker, and no link"
    if phase == "blocked" and endpoint.way == "whole":
        return "the answer is sent when it is complete: no handler waits for the client"
    return None


def cells(*, all_ways: bool, brief: bool) -> Any:
    for cause, row in LAW.items():
        for phase in row:
            for endpoint in ENDPOINTS:
                for place in ("local", "forwarded"):
                    for how in ("async", "threaded"):
                        if brief and not (endpoint in SAMPLE and how == "async"):
                            continue
                        # Not skipped: what has to be skipped somewhere would be lost among a thousand of these.
                        if impossible(cause, phase, ENDPOINTS[endpoint], place == "forwarded"):
                            continue
                        cell = f"{cause}-{phase}-{endpoint}-{place}-{how}"
                        yield pytest.param(cause, phase, endpoint, place, how, "short", id=cell)
                        if all_ways or (endpoint in SAMPLE and how == "async"):
                            for way in ways(place, all_ways=all_ways):
                                yield pytest.param(
                                    cause, phase, endpoint, place, how, way, id=f"{cell}-{way}"
                                )


def ways(place: str, *, all_ways: bool) -> list[str]:
    """Return in which other ways to play a cell, besides the one that nodes take by themselves."""
    if place == "local":
        # There is no link on which a token could wait.
        return ["ordinary"]
    return list(WAYS)[1:] if all_ways else ["ordinary", "unbatched"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cause" in metafunc.fixturenames:
        names = ("cause", "phase", "endpoint", "place", "how", "way")
        options = metafunc.config.option
        metafunc.parametrize(names, list(cells(all_ways=options.all_ways, brief=options.brief)))


class CellTest:
    """One cell, played."""

    def __init__(
        self, scenario: Scenario, cause: str, phase: str, endpoint: Endpoint, forwarded: bool
    ) -> None:
        self.scenario = scenario
        self.cause = cause
        self.phase = phase
        self.endpoint = endpoint
        self.forwarded = forwarded
        cell = LAW[cause][phase]
        assert isinstance(cell, Cell)
        self.cell = cell
        self.caller = Caller(
            scenario.cluster,
            endpoint,
            padding=PADDING if phase == "forwarding" else 0,
            whole=phase != "uploading",
            reads=phase != "blocked",
            **HEADERS.get(cause, {}),
        )
        self.link = LATENCY

    # Before

    async def reach_the_phase(self) -> None:
        """Have the request in its phase; the clock has moved by no more than the messages needed."""
        scenario = self.scenario
        if self.phase == "queued":
            scenario.occupy()
            await trio.sleep(1)
        if self.phase == "forwarding":
            # A black hole has no other side to be slow; deadlines need a link that is slower than they are long.
            self.link = LINKS.get(self.cause, SLOW_LINK)
            scenario.cluster.workers["w"].link.delay(self.link)
        scenario.nursery.start_soon(self.caller.run)
        await trio.sleep(0.5)
        self.began = self.caller.asked_at
        scenario.watch()
        self.check_phase()

    def check_phase(self) -> None:
        words, call = self.scenario.script.words, self.scenario.calls.get("master")
        if self.phase == "uploading":
            assert call is None
        elif self.phase == "forwarding":
            assert call is not None
            back = self.scenario.calls.get("back")
            assert back is None or back.phase == "uploading"
        elif self.phase == "queued":
            assert self.scenario.calls["back"].phase == "queued"
        else:
            assert words == ["starts"]
            assert self.scenario.calls["back"].phase == (
                "waiting" if self.phase == "waiting" else "streaming"
            )
            assert (self.scenario.calls["back"].body.waiting_bytes > 0) == (self.phase == "blocked")

    # The cause

    async def happen(self) -> None:
        """Let the cause happen; ``self.since`` is when."""
        self.since = trio.current_time()
        await getattr(self, f"_{self.cause}")()

    async def _client_leaves(self) -> None:
        self.caller.leave()

    async def _client_resets(self) -> None:
        self.caller.leave(reset=True)

    async def _silence(self) -> None:
        self.since = self.began

    async def _read_timeout(self) -> None:
        self.since = self.began

    async def _budget(self) -> None:
        self.since = self.began

    async def _operator(self) -> None:
        operator = self.scenario.cluster.client("operator")
        answer = await operator.post(f"/cluster/calls/{REQUEST_ID}/cancel", {})
        assert answer.json() == {"request_id": REQUEST_ID, "cancelled": 1}
        # It has taken effect when the answer was sent, not when it came.
        self.since = trio.current_time() - LATENCY

    async def _handler_hangs(self) -> None:
        self.scenario.script.hangs = HANGS
        await self._operator()

    async def _handler_raises(self) -> None:
        self.scenario.script.fails = True
        self.scenario.script.go.set()

    async def _worker_killed(self) -> None:
        self.scenario.cluster.workers["w"].kill()

    async def _worker_frozen(self) -> None:
        self.scenario.cluster.workers["w"].freeze()

    async def _link_ends(self) -> None:
        self.scenario.cluster.workers["w"].link.cut()

    async def _link_resets(self) -> None:
        self.scenario.cluster.workers["w"].link.reset()

    async def _link_silent(self) -> None:
        self.scenario.cluster.workers["w"].link.partition()

    async def _master_killed(self) -> None:
        self.scenario.cluster.master.kill()

    async def _master_drains(self) -> None:
        self.scenario.cluster.master.stop()

    async def _master_drains_too_long(self) -> None:
        self.scenario.cluster.master.stop()

    async def _worker_drains(self) -> None:
        self.scenario.cluster.workers["w"].stop()

    async def _worker_drains_too_long(self) -> None:
        self.scenario.cluster.workers["w"].stop()

    # After

    async def see(self) -> None:
        """Let time pass, until everything that is to follow has followed, and let the rest go its way."""
        bound = BOUNDS.get(self.cell.bound)
        if bound is None:
            # Untouched: whatever limit there is passes by, or is not reached.
            quiet = self.cause in ("silence", "read_timeout", "link_silent")
            await trio.sleep(BOUNDS["T"] + 5 if quiet else LAST_WORDS + 0.5)
            assert self.caller.ended_at is None
            assert "cancelled" not in self.scenario.script.words
        elif self.phase == "uploading" and self.cell.client not in ("408", "lost", "left"):
            await trio.sleep(bound + 1)
        else:
            await trio.sleep(self.since + bound + 4 * self.link + 1 - trio.current_time())
        self.scenario.watch()
        self.now = trio.current_time()
        self.caller.send_rest.set()
        self.caller.read_on.set()
        if self.cell.handler == "finishes":
            self.scenario.script.go.set()
            self.scenario.free_the_slot()
            if self.phase == "blocked":
                # Long after the handler is done, its client still takes its time.
                self.caller.pace = PACE
            await trio.sleep(14)
        await trio.sleep(1)

    def judge(self) -> None:
        self.judge_client()
        self.judge_handler()
        self.judge_bounds()
        self.judge_books()

    def judge_client(self) -> None:
        caller, cell, answer = self.caller, self.cell, self.caller.answer
        assert caller.ended_at is not None, "the client still waits"
        assert caller.left == (cell.client == "left")
        if caller.left:
            return
        begun = self.endpoint.way != "whole" and self.phase in ("streaming", "blocked", "ending")
        if cell.client == "complete":
            assert answer is not None
            assert (answer.status, answer.complete) == (200, True), answer.body
            self.endpoint.check(answer, self.scenario.script.given)
        elif cell.client == "lost" and not begun:
            assert answer is None
        elif not begun:
            assert answer is not None
            assert answer.complete
            status, _, code = cell.client.partition(" ")
            assert answer.status == int(status), answer.body
            assert not code or answer.error["code"] == code
            assert set(answer.error) == {"message", "type", "param", "code"}
            if answer.status == 503 and code == "shutting_down":
                assert int(answer.headers["retry-after"]) >= 1
        else:
            assert answer is not None
            assert answer.status == 200
            assert not answer.complete, "it looks complete"
            if self.endpoint.way == "events":
                report = answer.report()
                assert "".join(self.scenario.script.given).startswith(report.text)
                assert report.finish_reasons == {}
                if cell.client == "lost":
                    assert report.ending == "cut"
                else:
                    assert report.error is not None
                    assert report.error["code"] == CODES[cell.client]
            else:
                assert b"".join(self.scenario.script.given).startswith(answer.body)

    def judge_handler(self) -> None:
        words = self.scenario.script.words
        expected = {
            "never": [],
            "cancelled": ["starts", "cancelled", "cleaned up"],
            "hangs": ["starts", "cancelled", "cleaned up"],
            "dies": ["starts", "cancelled", "cleaned up"],
            "frozen": ["starts", "cancelled", "cleaned up"],
            "finishes": ["starts", "finishes", "cleaned up"],
            "raises": ["starts", "raises", "cleaned up"],
        }
        assert words == expected[self.cell.handler]

    def judge_bounds(self) -> None:
        bound = BOUNDS.get(self.cell.bound)
        if bound is None:
            return
        ways = self.link if self.phase == "forwarding" else LATENCY
        earliest = bound - EARLIER.get(self.cell.bound, 0.0) - EXACT
        latest = bound + 2 * ways + EXACT
        for name, when in self.scenario.released.items():
            late = latest + 2 * ways if name == "master" and self.forwarded else latest
            if (
                name == "master"
                and self.phase == "blocked"
                and self.cause in ("budget", "worker_drains_too_long")
            ):
                # Its end comes behind what the client has not taken yet; only the master's list of calls is longer.
                late = self.now - self.since + 1
            assert earliest <= when - self.since <= late, f"released on {name} after {when - self.since}"
        if self.cell.client == "left" or self.phase == "blocked" or not self.caller_waits():
            return
        assert self.caller.ended_at is not None
        told = self.caller.ended_at - self.since
        if self.cell.handler == "hangs":
            earliest, latest = 0.0, 2 * ways + EXACT
        assert earliest <= told <= latest + 2 * ways + LATENCY, f"the client was told after {told}"

    def caller_waits(self) -> bool:
        """Whether the client has done its part, and it is the cluster's turn."""
        return self.phase != "uploading" or self.cell.client in ("408", "lost")

    def judge_books(self) -> None:
        scenario, cell = self.scenario, self.cell
        neighbours = 1 if self.phase == "queued" else 0
        if cell.master and self.cause != "master_killed":
            stats = scenario.master.router.stats.counters()
            assert stats[cell.master] >= 1, stats
            assert stats["admitted"] == 1 + neighbours
        if self.forwarded and cell.worker:
            stats = scenario.back.router.stats.counters()
            assert stats[cell.worker] >= 1, stats


CODES: Final = {
    "500": "handler_failed",
    "502": "worker_lost",
    "503 cancelled": "cancelled",
    "503 shutting_down": "shutting_down",
    "504": "timeout",
}


async def test_the_law_holds(
    cause: str,
    phase: str,
    endpoint: str,
    place: str,
    how: str,
    way: str,
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked, forwarded = ENDPOINTS[endpoint], place == "forwarded"
    stops = cast(Phase, phase if phase in ("waiting", "streaming", "blocked", "ending") else "waiting")
    async with open_scenario(
        asked, stops, forwarded=forwarded, threaded=how == "threaded", **(OPTIONS | WAYS[way])
    ) as scenario:
        cell_test = CellTest(scenario, cause, phase, asked, forwarded)
        await cell_test.reach_the_phase()
        await cell_test.happen()
        await cell_test.see()
        scenario.free_the_slot()
        await trio.sleep(1)
        cell_test.judge()
        await settle(scenario.cluster)
