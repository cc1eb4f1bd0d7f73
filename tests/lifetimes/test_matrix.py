"""The whole law of lifetimes, cell by cell, in virtual time."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final, cast

import pytest
import trio
import trio.testing
from certificates import TlsEverywhere
from law import LAW, Cell, Impossible
from scenario import (
    ENDPOINTS,
    LATENCY,
    REQUEST_ID,
    Caller,
    Endpoint,
    How,
    LimitedKey,
    Phase,
    Scenario,
    open_scenario,
)

from trio_cluster.admin.story import story_view
from trio_cluster.core.story import StoryFacts
from trio_cluster.gateway.body import BODY_IDLE_TIMEOUT
from trio_cluster.gateway.cycle import DRAIN_TIME
from trio_cluster.gateway.deadlines import GRACE
from trio_cluster.gateway.request_stats import RequestStats
from trio_cluster.gateway.story_ending import ending_of
from trio_cluster.testing import settle

#: The options of every node. All limits differ from each other, so that a test shows which one was applied.
OPTIONS: Final[dict[str, Any]] = {
    "default_timeout": 20.0,
    "worker_timeout": 15.0,
    "heartbeat_interval": 5.0,
    "drain_timeout": 19.0,
    "resume_window": 11.0,
    "queue_timeout": 100.0,
    "max_concurrency": 1,
    # Otherwise the first comment, and the status with it, would come before some causes, and after others.
    "keepalive": 0.0,
}
IDLE_TIMEOUT: Final = 9.0
TOTAL_TIMEOUT: Final = 7.0
HANGS: Final = 4.0
LAST_EVENTS: Final = 2.0

#: The latency of the link, in seconds, for cells in which the body is on its way to the worker.
SLOW_LINK: Final = 6.0
#: The same for causes that need another one: a deadline must pass meanwhile, a drain must end before its timeout, a
#: request must end.
SLOW_LINKS: Final = {
    "silence": 8.0,
    "idle_timeout": 5.0,
    "total_timeout": 5.0,
    "master_drains": 0.6,
    "worker_drains": 0.4,
    "worker_loses_other_master": 0.6,
}
PADDING: Final = 900_000

#: Seconds for which a slow client pauses after each piece: it needs more than LAST_EVENTS for what is under way.
PACE: Final = 0.4

#: Seconds by which computed times may differ.
EXACT: Final = 1e-6

BOUNDS: Final = {
    "0": 0.0,
    "T": OPTIONS["default_timeout"],
    "T+G": OPTIONS["default_timeout"] + GRACE,
    "R": IDLE_TIMEOUT,
    "R+G": IDLE_TIMEOUT + GRACE,
    "B": TOTAL_TIMEOUT,
    "B+G": TOTAL_TIMEOUT + GRACE,
    "W": OPTIONS["worker_timeout"],
    "D": OPTIONS["drain_timeout"],
    "S": OPTIONS["resume_window"],
    "U": BODY_IDLE_TIMEOUT + DRAIN_TIME,
    "V": LAST_EVENTS,
    "h": HANGS,
}

#: Bounds that are counted from the last message, which may have been a heartbeat ago: by how much they may be shorter.
EARLIER: Final = {"W": OPTIONS["heartbeat_interval"]}

HEADERS: Final = {
    "idle_timeout": {"x-stainless-read-timeout": str(IDLE_TIMEOUT)},
    "total_timeout": {"x-request-timeout": str(TOTAL_TIMEOUT)},
}

#: What some causes need.
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "link_resets": {"resume_window": 0.0},
    "link_silent": {"resume_window": 0.0},
    # The two ends heard of each other last at different times, up to an interval apart. So the second connection, after
    # 2.5 of them, is surely in time only if 3.5 of them are less than `worker_timeout`.
    "link_silent_resumed": {"heartbeat_interval": 3.0},
    "worker_loses_other_master": {"other_master": True},
}

FORWARDED_ONLY: Final = ("worker_", "link_")

#: The paths that a token can take: written to its client in the task that receives it, or not; waiting for others on a
#: busy link, or not; through the lean server, or hypercorn; with TLS everywhere. The law is the same on all of them.
PATHS: Final[dict[str, dict[str, Any]]] = {
    "fast": {},
    "slow": {"fast_path": False},
    "unbatched": {"batch_wait": 0.0},
    "slow_unbatched": {"fast_path": False, "batch_wait": 0.0},
    "hypercorn": {"http": "hypercorn"},
    "tls": {"above": TlsEverywhere, "cluster_token": "secret"},
    # The key of the client has limits, and every request a reservation.
    "limited": {"authenticator": LimitedKey()},
    # A comment was sent before the cause, and the status with it.
    "keepalive": {"keepalive": 0.2},
    "keepalive_hypercorn": {"keepalive": 0.2, "http": "hypercorn"},
}
#: The phases in which that makes a difference. Before them, the request has not arrived; after them, its answer has
#: begun.
COMMENTED: Final = ("forwarding", "queued", "waiting")
#: The phases in which the handler runs, and tokens are under way or about to be.
RUNNING: Final = ("waiting", "streaming", "blocked", "ending")
#: Where a path is always tested, if not in all phases; ``--all-ways`` tests it in all. Before there are tokens, their
#: path is not taken; without a comment, a node with comments is one without.
PATH_PHASES: Final[dict[str, tuple[str, ...]]] = {
    "slow": RUNNING,
    "unbatched": RUNNING,
    "slow_unbatched": RUNNING,
    "keepalive": COMMENTED,
    "keepalive_hypercorn": COMMENTED,
}
#: Paths that are always tested with one endpoint only: TLS lies below everything, and sees bytes; a reservation belongs
#: to the call, and ends with it, however its output is sent.
ONE_ENDPOINT: Final = ("tls", "limited")
#: Endpoints that are always tested on all paths: their responses are sent while they are made.
SAMPLE: Final = ("chat-stream", "speech")
#: Endpoints that are always tested with each kind of handler. What a kind changes lies below all endpoints; only how
#: the response is delivered (as events, as bytes, as a whole) reaches as far as the handler. Only async handlers are
#: always tested before they run: the others are not called yet either.
SAMPLES: Final[dict[str, tuple[str, ...]]] = {
    "async": tuple(ENDPOINTS),
    "threaded": (*SAMPLE, "chat"),
    "asyncio": SAMPLE,
}


def impossible(cause: str, phase: str, endpoint: Endpoint, forwarded: bool) -> str | None:
    """Return why this cell cannot happen; ``None`` if it can."""
    entry = LAW[cause][phase]
    if isinstance(entry, Impossible):
        return entry.why
    if not forwarded and (phase == "forwarding" or cause.startswith(FORWARDED_ONLY)):
        return "the handler runs in the master's process: there is no worker, and no link"
    if phase == "blocked" and endpoint.delivery == "whole":
        return "the response is sent when it is complete: no handler waits for the client"
    return None


def cells(*, all_ways: bool, brief: bool) -> Any:
    for cause, row in LAW.items():
        for phase in row:
            for endpoint in ENDPOINTS:
                for place in ("local", "forwarded"):
                    for how in ("async", "threaded", "asyncio"):
                        if brief and not (endpoint in SAMPLE and how == "async"):
                            continue
                        if not (all_ways or endpoint in SAMPLES[how]):
                            continue
                        if not (all_ways or how == "async" or phase in RUNNING):
                            continue
                        # Left out, not skipped: a test that was skipped for a real reason would be lost among these.
                        if impossible(cause, phase, ENDPOINTS[endpoint], place == "forwarded"):
                            continue
                        cell = f"{cause}-{phase}-{endpoint}-{place}-{how}"
                        yield pytest.param(cause, phase, endpoint, place, how, "fast", id=cell)
                        if all_ways or (not brief and endpoint in SAMPLE and how == "async"):
                            for path in other_paths(place, all_ways=all_ways):
                                if path.startswith("keepalive") and ENDPOINTS[endpoint].delivery != "events":
                                    # Such a response has no comments.
                                    continue
                                if not (all_ways or is_sample(path, phase, endpoint)):
                                    continue
                                yield pytest.param(
                                    cause, phase, endpoint, place, how, path, id=f"{cell}-{path}"
                                )


def is_sample(path: str, phase: str, endpoint: str) -> bool:
    """Tell whether a path is tested in this phase and on this endpoint of the sample in every run."""
    return phase in PATH_PHASES.get(path, (phase,)) and (path not in ONE_ENDPOINT or endpoint == SAMPLE[0])


def other_paths(place: str, *, all_ways: bool) -> list[str]:
    """Return the other paths on which to test a cell, besides the one that nodes take by default."""
    if place == "local":
        # There is no link on which a token could wait.
        return ["slow", "hypercorn", "tls", "limited", "keepalive", "keepalive_hypercorn"]
    return list(PATHS)[1:] if all_ways else [path for path in PATHS if path not in ("fast", "slow_unbatched")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cause" in metafunc.fixturenames:
        names = ("cause", "phase", "endpoint", "place", "how", "path")
        options = metafunc.config.option
        metafunc.parametrize(names, list(cells(all_ways=options.all_ways, brief=options.brief)))


class CellTest:
    """The test of one cell.

    Attributes:
        link: latency of the link, in seconds.
        began: when the client began to send its request.
        since: when the cause happened; bounds are counted from it.
        now: when everything should have followed.
        commented: the client has had a comment when the cause happens, and no answer yet.
    """

    def __init__(
        self, scenario: Scenario, cause: str, phase: str, endpoint: Endpoint, forwarded: bool
    ) -> None:
        self.scenario = scenario
        self.cause = cause
        self.phase = phase
        self.endpoint = endpoint
        self.forwarded = forwarded
        self.commented = False
        self.cell = self.cell_of(cause, phase)
        self.caller = Caller(
            scenario.cluster,
            endpoint,
            padding=PADDING if phase == "forwarding" else 0,
            whole=phase != "uploading",
            reads=phase != "blocked",
            **HEADERS.get(cause, {}),
        )
        self.link = LATENCY

    @staticmethod
    def cell_of(cause: str, phase: str) -> Any:
        """Return what follows from the cause in the phase."""
        cell = LAW[cause][phase]
        assert isinstance(cell, Cell)
        return cell

    # Before

    async def reach_the_phase(self) -> None:
        """Bring the request into its phase; the clock advances by no more than the messages need."""
        scenario = self.scenario
        if self.phase == "queued":
            scenario.occupy()
            await trio.sleep(1)
        if self.phase == "forwarding":
            # The body must still be on its way when the cause happens, and when the deadline passes.
            self.link = self.slow_link()
            scenario.cluster.workers["w"].link_to("master").delay(self.link)
        scenario.nursery.start_soon(self.caller.run)
        await trio.sleep(0.5)
        self.began = self.caller.asked_at
        scenario.watch()
        self.check_phase()

    def slow_link(self) -> float:
        """Return the latency of the link for a request whose body is to be on its way."""
        return SLOW_LINKS.get(self.cause, SLOW_LINK)

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
        """Let the cause happen."""
        self.since = trio.current_time()
        await getattr(self, f"_{self.cause}")()

    async def _client_leaves(self) -> None:
        self.caller.leave()

    async def _client_resets(self) -> None:
        self.caller.leave(reset=True)

    async def _silence(self) -> None:
        self.since = self.began

    async def _idle_timeout(self) -> None:
        self.since = self.began

    async def _total_timeout(self) -> None:
        self.since = self.began

    async def _operator(self) -> None:
        operator = self.scenario.cluster.client("operator")
        response = await operator.post(f"/cluster/calls/{REQUEST_ID}/cancel", {})
        assert response.json() == {"request_id": REQUEST_ID, "cancelled": 1}
        # It took effect when the response was sent, not when it was received.
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
        self.scenario.cluster.workers["w"].link_to("master").cut()

    async def _link_resets(self) -> None:
        self.scenario.cluster.workers["w"].link_to("master").reset()

    async def _link_resumed(self) -> None:
        self.scenario.cluster.workers["w"].link_to("master").reset()

    async def _link_silent_resumed(self) -> None:
        # Only the connection that there is: a second one passes.
        self.scenario.cluster.workers["w"].link_to("master").partition()

    async def _link_not_resumed(self) -> None:
        self.scenario.cluster.network.partition("w", "master")
        self.scenario.cluster.workers["w"].link_to("master").reset()
        self.scenario.cluster.workers["w"].link_to("master").heal()

    async def _link_silent(self) -> None:
        self.scenario.cluster.workers["w"].link_to("master").partition()

    async def _master_killed(self) -> None:
        self.scenario.cluster.master.kill()

    async def _worker_loses_other_master(self) -> None:
        self.scenario.cluster.masters["other"].kill()

    async def _master_drains(self) -> None:
        self.scenario.cluster.master.stop()

    async def _master_drains_too_long(self) -> None:
        self.scenario.cluster.master.stop()

    async def _worker_drains(self) -> None:
        self.scenario.cluster.workers["w"].stop()

    async def _worker_drains_too_long(self) -> None:
        self.scenario.cluster.workers["w"].stop()

    # After

    async def wait_for_effects(self) -> None:
        """Let time pass until everything that should follow has followed, and let the rest end."""
        bound = BOUNDS.get(self.cell.bound)
        if bound is None:
            # The request is not affected: the limit passes without effect, or is not reached.
            quiet = self.cause in ("silence", "idle_timeout", "link_silent")
            if self.cause == "link_silent_resumed":
                # The second connection is tried when two heartbeats are missing.
                await trio.sleep(3 * OPTIONS["heartbeat_interval"])
            else:
                await trio.sleep(BOUNDS["T"] + 5 if quiet else LAST_EVENTS + 0.5)
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
                # Long after the handler has finished, its client still reads.
                self.caller.pace = PACE
            await trio.sleep(14)
        await trio.sleep(1)
        if self.cause == "link_not_resumed":
            self.scenario.cluster.network.heal("w", "master")

    def check(self) -> None:
        self.check_client()
        self.check_handler()
        self.check_bounds()
        self.check_stats()
        self.check_reservations()
        self.check_story()

    def check_client(self) -> None:
        caller, cell, response = self.caller, self.cell, self.caller.response
        assert caller.ended_at is not None, "the client still waits"
        assert caller.left == (cell.client == "left")
        if caller.left:
            return
        begun = self.endpoint.delivery != "whole" and self.phase in ("streaming", "blocked", "ending")
        begun = begun or self.commented
        if cell.client == "complete":
            assert response is not None
            assert (response.status, response.complete) == (200, True), response.body
            self.endpoint.check(response, self.scenario.script.given)
        elif cell.client == "lost" and not begun:
            assert response is None
        elif not begun:
            assert response is not None
            assert response.complete
            status, _, code = cell.client.partition(" ")
            expected = self.endpoint.statuses.get(int(status), int(status))
            assert response.status == expected, response.body
            assert not code or response.error["code"] == code
            assert set(response.error) - {"param"} == self.endpoint.error_members - {"param"}
            assert set(response.error) >= self.endpoint.error_members
            if code in ("shutting_down", "model_unavailable"):
                assert int(response.headers["retry-after"]) >= 1
        else:
            assert response is not None
            assert response.status == 200
            if self.endpoint.delivery == "events":
                report = response.report()
                assert (report.comments > 0) >= self.commented
                assert response.complete == (report.ending == "failed")
                assert "".join(self.scenario.script.given).startswith(report.text)
                assert report.finish_reasons == {}
                if cell.client == "lost":
                    assert report.ending == "cut"
                else:
                    assert report.error is not None
                    assert report.error["code"] == CODES[cell.client]
            else:
                assert not response.complete, "it looks complete"
                assert b"".join(self.scenario.script.given).startswith(response.body)

    def check_handler(self) -> None:
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

    def check_bounds(self) -> None:
        bound = BOUNDS.get(self.cell.bound)
        if bound is None:
            return
        one_way = self.link if self.phase == "forwarding" else LATENCY
        earliest = bound - EARLIER.get(self.cell.bound, 0.0) - EXACT
        latest = bound + 2 * one_way + EXACT
        for name, when in self.scenario.released.items():
            late = latest + 2 * one_way if name == "master" and self.forwarded else latest
            if (
                name == "master"
                and self.phase == "blocked"
                and self.cause in ("total_timeout", "worker_drains_too_long")
            ):
                # The end of the call comes behind what the client has not read yet; only the master lists it so long.
                late = self.now - self.since + 1
            assert earliest <= when - self.since <= late, f"released on {name} after {when - self.since}"
        if self.cell.client == "left" or self.phase == "blocked" or not self.caller_waits():
            return
        assert self.caller.ended_at is not None
        told = self.caller.ended_at - self.since
        if self.cell.handler == "hangs":
            earliest, latest = 0.0, 2 * one_way + EXACT
        assert earliest <= told <= latest + 2 * one_way + LATENCY, f"the client was told after {told}"

    def caller_waits(self) -> bool:
        """Whether the client has sent its whole request, and waits for the cluster."""
        return self.phase != "uploading" or self.cell.client in ("408", "lost")

    def check_stats(self) -> None:
        scenario, cell = self.scenario, self.cell
        other_calls = 1 if self.phase == "queued" else 0
        if cell.master and self.cause != "master_killed":
            stats = scenario.master.router.stats.counters()
            assert stats[cell.master] >= 1, stats
            assert stats["admitted"] == 1 + other_calls
        if self.forwarded and cell.worker:
            stats = scenario.back.router.stats.counters()
            assert stats[cell.worker] >= 1, stats

    def check_reservations(self) -> None:
        """Check that a limited request held its reservation until its work had stopped, and no longer."""
        scenario = self.scenario
        others = 1 if self.phase == "queued" else 0
        for before, after, retryable in scenario.reserved:
            assert before in (1, 1 + others)
            assert retryable or after < before
        limiter = scenario.master.limiter
        if limiter is not None:
            assert (limiter.open_reservations, limiter.open_tokens) == (0, 0)

    def check_story(self) -> None:
        """Check that the story of the request says how it ended and by whom, and that its times are right."""
        assert self.scenario.stories is not None
        (facts,) = self.scenario.stories.find(REQUEST_ID)
        assert not self.scenario.stories.live
        story = story_view(facts)
        if self.cause == "master_killed":
            # Nobody can read it any more.
            return
        assert (story.outcome, story.by) == self.told(), story.why
        self.check_request_stats(facts)
        assert all(words in story.why for words in self.named()), story.why
        texts = [step.text for step in story.steps]
        assert [step.at for step in story.steps] == sorted(step.at for step in story.steps)
        assert (any("was cut" in text for text in texts), any("was resumed" in text for text in texts)) == (
            self.was_cut(),
            self.phase != "uploading" and self.cause in ("link_resumed", "link_silent_resumed"),
        )
        assert story.status == (0 if self.caller.response is None else self.caller.response.status) or (
            self.cell.client in ("left", "lost")
        )
        if not story.attempts:
            assert self.phase == "uploading"
            return
        (attempt,) = story.attempts
        assert attempt.node == ("w" if self.forwarded else "local")
        script = self.scenario.script
        reported = not self.forwarded or (story.outcome != "worker_lost" and attempt.stopped is not None)
        if reported and script.log:
            began = script.log[0][0] - self.began
            assert attempt.started is not None
            assert abs(attempt.started - began) < 1.5 * self.link + 0.5
        if self.cell.handler == "never":
            assert attempt.started is None
        if self.phase == "queued" and reported:
            ended = attempt.started if attempt.started is not None else attempt.ended
            assert ended is not None
            assert abs(attempt.queued_for - ended) < 1.5
            assert any("in the queue of" in text for text in texts)
        else:
            assert attempt.queued_for == 0.0
        if self.phase == "blocked" and reported:
            assert attempt.held_back > 0.4

    def check_request_stats(self, facts: StoryFacts) -> None:
        """Check that the metrics of requests say what the stories say: of this request and of its neighbours."""
        assert self.scenario.stories is not None
        stats = self.scenario.stories.stats
        assert isinstance(stats, RequestStats)
        told: Counter[str] = Counter()
        calls = 0
        for _, each in self.scenario.stories.over:
            told[ending_of(each).outcome] += 1
            calls += len(each.attempts)
        models, keys, workers = stats.read()
        for table in (models, keys):
            counted: Counter[str] = Counter()
            for sums in table.values():
                for (outcome, _), count in sums.ended.items():
                    counted[outcome] += count
            assert counted == told
        assert sum(sum(sums.ended.values()) for sums in workers.values()) == calls
        # Of those that were not sent to a model, it has the name of one that is served, or was a short while ago.
        model = facts.attempts[facts.answering].model if facts.attempts else facts.model
        outcome = ending_of(facts).outcome
        classes = {status for each, status in models[model].ended if each == outcome}
        assert (f"{facts.status // 100}xx" if facts.status else "none") in classes

    def was_cut(self) -> bool:
        """Whether the link was cut while the call was on it, and was to be resumed."""
        return self.phase != "uploading" and self.cause in (
            "link_resumed",
            "link_not_resumed",
        )

    def told(self) -> tuple[str, str]:
        """Return the outcome of the request, and who has ended it."""
        client, cause = self.cell.client, self.cause
        if client == "complete":
            return "completed", "model"
        if client == "left":
            return "cancelled", "client"
        if client == "408":
            return "timed_out", "client"
        if client == "504":
            return "timed_out", "node" if cause == "silence" else "client"
        if client == "502":
            return "worker_lost", "worker"
        if client == "500":
            return "failed", "model"
        if cause in ("operator", "handler_hangs"):
            return "cancelled", "operator"
        if cause == "master_drains_too_long":
            return "cancelled", "node"
        if self.phase == "uploading":
            return "refused", "node"
        assert cause.startswith("worker_drains")
        by = "worker" if self.forwarded else "node"
        return ("cancelled" if client == "503 cancelled" else "failed"), by

    def named(self) -> tuple[str, ...]:
        """Return what the last line of the story has to name."""
        client, code = self.cell.client, self.cell.client.partition(" ")[2]
        if client == "504":
            return {
                "silence": ("20 s", "default_timeout"),
                "idle_timeout": ("9 s", "x-stainless-read-timeout"),
                "total_timeout": ("7 s", "x-request-timeout"),
            }[self.cause]
        if client == "502":
            return ("'w'",)
        if self.cause in ("operator", "handler_hangs"):
            return "cancelled by an operator (", "): requested by an operator"
        if self.cause.startswith("worker_drains") and code and self.phase != "uploading":
            return ("'w'", code)
        return (code,) if self.phase == "uploading" else ()


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
    path: str,
    autojump_clock: trio.testing.MockClock,
) -> None:
    asked, forwarded = ENDPOINTS[endpoint], place == "forwarded"
    stops = cast(Phase, phase if phase in ("waiting", "streaming", "blocked", "ending") else "waiting")
    async with open_scenario(
        asked,
        stops,
        forwarded=forwarded,
        how=cast(How, how),
        **(OPTIONS | PATHS[path] | SETTINGS.get(cause, {})),
    ) as scenario:
        cell_test = CellTest(scenario, cause, phase, asked, forwarded)
        commented = path.startswith("keepalive") and asked.delivery == "events"
        cell_test.commented = commented and phase in COMMENTED
        await cell_test.reach_the_phase()
        await cell_test.happen()
        await cell_test.wait_for_effects()
        scenario.free_the_slot()
        await trio.sleep(1)
        cell_test.check()
        await settle(scenario.cluster)
