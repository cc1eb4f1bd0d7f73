"""The law of what is answered elsewhere, and of masters that are replaced, cell by cell, in virtual time."""

from __future__ import annotations

from typing import Any, Final, cast

import pytest
import trio
import trio.testing
from detour_law import DETOUR_LAW, DetourCell
from scenario import ENDPOINTS, LATENCY, MODEL, Endpoint, Phase, Scenario, Script, open_scenario
from test_matrix import LAST_EVENTS, OPTIONS, PATHS, SLOW_LINK, CellTest

from trio_cluster.routing.ejection import Verdict
from trio_cluster.testing import settle, worker

#: The names of two models, and of the list of both.
FIRST: Final = "first"
SECOND: Final = "second"

#: Seconds that answers usually take. A request that has none after that, and a little more, is late.
USUAL: Final = 1.0
LESSONS: Final = 40

#: Less than what a take-over and the idle timeout need together.
DRAIN_TIMEOUT: Final = 10.0

#: What some causes need.
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "alias": {"aliases": {MODEL: [FIRST, SECOND]}},
    "hedge": {"on_conflict": "replicate", "routing": "least-busy"},
    "hedge_left": {"on_conflict": "replicate", "routing": "least-busy"},
    "ejected": {"on_conflict": "replicate"},
    "replaced_too_long": {"drain_timeout": DRAIN_TIMEOUT},
}
#: Seconds that messages need on the link while a body is on its way.
SLOW_LINKS: Final = {"alias": 0.6, "replaced": 0.6, "ejected": 0.6, "hedge": 2.0, "hedge_left": 2.0}
#: Seconds; for what ends when the handler has finished there is no bound.
BOUNDS: Final = {"0": 0.0, "D": DRAIN_TIMEOUT, "D+V": DRAIN_TIMEOUT + LAST_EVENTS}


#: Options of a cluster, and not of its nodes.
OF_THE_CLUSTER: Final = ("fast_path", "above", "authenticator")


def cells(*, all_ways: bool) -> Any:
    for cause, row in DETOUR_LAW.items():
        for phase, entry in row.items():
            for endpoint in endpoints(cause, all_ways=all_ways):
                for path in PATHS if all_ways else ("fast",):
                    delivery = ENDPOINTS[endpoint].delivery
                    if not isinstance(entry, DetourCell) or (phase == "blocked" and delivery == "whole"):
                        continue
                    if path.startswith("keepalive") and delivery != "events":
                        # Such a response has no comments.
                        continue
                    if path == "tls" and cause.startswith("replaced"):
                        # There, TLS is put between the nodes and the network, so these have no listeners to hand over.
                        continue
                    yield pytest.param(cause, phase, endpoint, path, id=f"{cause}-{phase}-{endpoint}-{path}")


def endpoints(cause: str, *, all_ways: bool) -> list[str]:
    if cause.startswith("hedge"):
        return ["embeddings"]
    return list(ENDPOINTS) if all_ways else ["chat-stream"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cause" in metafunc.fixturenames:
        names = ("cause", "phase", "endpoint", "path")
        metafunc.parametrize(names, list(cells(all_ways=metafunc.config.option.all_ways)))


class DetourTest(CellTest):
    """The test of one cell. The request is on worker ``w`` when the cause happens. The other replica joins only then.

    Attributes:
        old: the master that has the request.
        other: the script of the other handler.
    """

    def __init__(
        self,
        scenario: Scenario,
        cause: str,
        phase: str,
        endpoint: Endpoint,
        options: dict[str, Any],
        *,
        commented: bool,
    ) -> None:
        super().__init__(scenario, cause, phase, endpoint, True)
        self.options = {name: value for name, value in options.items() if name not in OF_THE_CLUSTER}
        self.commented = commented
        self.old = scenario.master
        # It does not wait, or for ever.
        self.other = Script(endpoint, cast(Phase, "waiting" if cause == "hedge_left" else "queued"))

    @staticmethod
    def cell_of(cause: str, phase: str) -> DetourCell:
        cell = DETOUR_LAW[cause][phase]
        assert isinstance(cell, DetourCell)
        return cell

    def slow_link(self) -> float:
        return SLOW_LINKS.get(self.cause, SLOW_LINK)

    async def add_other(self, name: str, **more: Any) -> None:
        server = worker("other", **self.options)
        getattr(server, f"register_{self.endpoint.kind}")(name, self.other.handler("async"), **more)
        await self.scenario.cluster.start_worker(server)

    async def happen(self) -> None:
        await getattr(self, f"_{self.cause}")()
        self.since = trio.current_time()

    async def _alias(self) -> None:
        self.scenario.cluster.workers["w"].kill()

    async def _hedge(self) -> None:
        await self.add_other(MODEL, hedge=True)
        hedging = self.old.router.hedging
        with trio.fail_after(2 * USUAL):
            while not hedging.sent:  # noqa: ASYNC110  (there is no event for it)
                await trio.sleep(LATENCY)

    async def _hedge_left(self) -> None:
        await self._hedge()
        await trio.sleep(10 * LATENCY)
        assert self.other.words == ["starts"]
        self.caller.leave()

    async def _ejected(self) -> None:
        await self.add_other(MODEL)
        ejections = self.old.router.ejections
        for _ in range(self.old.options.ejection_failures):
            ejections.table.failed(("w", MODEL), Verdict("failed", "a test"), trio.current_time(), ["other"])
        assert ("w", MODEL) in ejections.ejected

    async def _replaced(self) -> None:
        await self.scenario.cluster.start_master(take_over=True)
        assert self.scenario.master is not self.old

    async def _replaced_too_long(self) -> None:
        await self._replaced()

    async def wait_for_effects(self) -> None:
        if self.phase == "uploading" and self.cell.bound == "end":
            await trio.sleep(5 * LATENCY)
        elif self.cell.bound == "end":
            await trio.sleep(5 * LATENCY + 0.5)
            assert self.caller.ended_at is None
            assert "cancelled" not in self.scenario.script.words
        else:
            # The news has to pass the slow link twice before the first call is over.
            await trio.sleep(BOUNDS[self.cell.bound] + 1 + 2 * self.link)
        self.scenario.watch()
        self.now = trio.current_time()
        self.caller.send_rest.set()
        self.caller.read_on.set()
        if self.cell.handler == "finishes":
            self.scenario.script.go.set()
            self.scenario.free_the_slot()
            await trio.sleep(14)
        await trio.sleep(1)

    def check(self) -> None:
        if self.cell.elsewhere:
            assert self.other.words == ["starts", "finishes", "cleaned up"]
            self.scenario.script.given = self.other.given
        elif self.cause == "hedge_left":
            assert self.other.words == ["starts", "cancelled", "cleaned up"]
        else:
            assert self.other.words == []
        self.check_client()
        self.check_handler()
        bound = BOUNDS.get(self.cell.bound)
        if bound is not None:
            # Messages to another worker and back, in whose way the whole body may be.
            late = 10 * LATENCY + (1.0 if self.phase == "forwarding" else 0.0)
            assert self.caller.ended_at is not None
            if self.phase != "blocked":
                assert bound - LATENCY <= self.caller.ended_at - self.since <= bound + late
            for name, when in self.scenario.released.items():
                if self.phase not in ("blocked", "forwarding"):
                    assert -LATENCY <= when - self.since - bound <= late, name
        counters = self.old.router.stats.counters()
        ended = ("completed", "cancelled", "timed_out", "worker_lost", "failed")
        counted = sorted(name for name in ended for _ in range(counters[name]))
        if self.phase == "queued":
            # The one that had the slot.
            counted.remove("cancelled" if "cancelled" in counted else "worker_lost")
        assert counted == sorted(self.cell.master)
        limiter = self.old.limiter
        assert limiter is None or (limiter.open_reservations, limiter.open_tokens) == (0, 0)


async def test_the_law_holds_for_detours(
    cause: str, phase: str, endpoint: str, path: str, autojump_clock: trio.testing.MockClock
) -> None:
    asked = ENDPOINTS[endpoint]
    stops = cast(Phase, phase if phase in ("waiting", "streaming", "blocked", "ending") else "waiting")
    options = OPTIONS | PATHS[path] | SETTINGS.get(cause, {})
    name, more = (
        (FIRST if cause == "alias" else MODEL),
        ({"hedge": True} if cause.startswith("hedge") else {}),
    )
    async with open_scenario(asked, stops, forwarded=True, name=name, more=more, **options) as scenario:
        for _ in range(LESSONS):
            scenario.master.router.hedging.late_after(MODEL)
            scenario.master.router.hedging.record(MODEL, USUAL)
        commented = path.startswith("keepalive") and phase in ("forwarding", "queued", "waiting")
        test = DetourTest(scenario, cause, phase, asked, options, commented=commented)
        if cause == "alias":
            # What is not served when the request is routed is not among the models that it goes on to.
            await test.add_other(SECOND)
        await test.reach_the_phase()
        await test.happen()
        await test.wait_for_effects()
        scenario.free_the_slot()
        await trio.sleep(1)
        test.check()
        await settle(scenario.cluster)
