"""What may explain that a request failed: causes, looked up in the chronicle, near enough in place and time.

A law that allows a failure for any reason finds nothing, and one that knows nothing of lags and aftermaths cries wolf.
So everything that is allowed is derived from the plan: how long silence is borne, how long the network takes, how
much there is to send.
"""

from __future__ import annotations

import math
from typing import Final

from ._errands import SLOW_READS, Outcome
from ._history import History, Trouble
from ._plan import Errand, Plan
from ._scripts import MARGIN

__all__ = ["BREAKS", "LOSSES", "STOPS", "Causes"]

#: Seconds that a worker waits at most before it dials again.
_BACKOFF: Final = 30.0

#: What makes a node refuse new requests.
STOPS: Final = frozenset({"worker stopped", "worker drained", "master stopped"})
#: What may cost a master a worker.
LOSSES: Final = STOPS | {
    "worker killed",
    "worker frozen",
    "worker cut off",
    "link cut",
    "link reset",
    "link silent",
    "master killed",
    "master frozen",
}
#: What may cost a client its connection.
BREAKS: Final = frozenset(
    {"client cut off", "connection cut", "connection reset", "master killed", "master stopped"}
)


class Causes:
    """What explains the failures of one schedule.

    Attributes:
        silence: seconds after which a node has noticed that another one is silent.
        reaction: seconds between a cause and its effect on another node, if nothing is in the way.
        aftermath: seconds for which a trouble may go on having effects after it is over.
    """

    def __init__(self, plan: Plan, history: History) -> None:
        self._plan = plan
        self._history = history
        self._full: dict[str, list[Trouble]] = {}
        self.silence = float(plan.options["worker_timeout"]) + float(plan.options["heartbeat_interval"])
        self.reaction = MARGIN + 6 * plan.longest_delay
        self.aftermath = self.silence + 2 * self.reaction

    def note_load(self, node: str, *, full: bool) -> None:
        """Take down whether all slots of a node are taken."""
        spans = self._full.setdefault(node, [])
        if full and (not spans or spans[-1].ended != math.inf):
            spans.append(Trouble("full", frozenset([node]), self._history.now))
        elif not full and spans and spans[-1].ended == math.inf:
            spans[-1].ended = self._history.now

    def explains(self, outcome: Outcome, code: str | None) -> bool:
        """Return whether an error with this code has something that explains it."""
        errand, hosts = outcome.errand, self.hosts(outcome.errand)
        match code:
            case "scripted":
                return errand.script.fails == "told"
            case "handler_failed":
                return errand.script.fails == "untold"
            case "timeout":
                return self._may_time_out(outcome)
            case "worker_lost":
                return self.near(hosts, outcome, LOSSES)
            case "over_capacity":
                # A worker that has not been heard of lately gets no new work.
                return self._was_full(outcome) or self.near(hosts, outcome, LOSSES)
            case "shutting_down":
                return self._may_be_refused(outcome)
            case "cancelled":
                return self.near(hosts, outcome, STOPS) or self.was_cancelled(outcome)
            case "model_not_found":
                model = next(model for model in self._plan.models if model.name == errand.model)
                # What one worker has taken back is no longer there only if the others are not there either.
                return all(
                    self._history.troubles(
                        frozenset([host, "master"]),
                        outcome.began - 2 * _BACKOFF - self.aftermath,
                        outcome.ended,
                    )
                    for host in model.hosts
                )
            case _:
                return False

    def hosts(self, errand: Errand) -> frozenset[str]:
        """Return the nodes that have to do with a request."""
        model = next(model for model in self._plan.models if model.name == errand.model)
        return frozenset([*model.hosts, "master"])

    def near(self, hosts: frozenset[str], outcome: Outcome, kinds: frozenset[str]) -> bool:
        """Return whether such a trouble touched one of the machines while the request was under way, or just before."""
        since = outcome.began - self.aftermath
        return bool(self._history.troubles(hosts, since, outcome.ended, kinds))

    def _may_time_out(self, outcome: Outcome) -> bool:
        errand, options = outcome.errand, self._plan.options
        script = errand.script
        limits = [options["default_timeout"], errand.listens, errand.budget]
        silence = options["queue_timeout"] + script.longest_silence + self.transport(errand)
        if silence >= min(limit for limit in limits if limit is not None):
            return True
        whole = options["queue_timeout"] + script.duration + self.pauses(errand) + self.transport(errand)
        if errand.budget is not None and whole >= errand.budget:
            return True
        return self.near(self.hosts(errand), outcome, LOSSES)

    def _may_be_refused(self, outcome: Outcome) -> bool:
        """Return whether a node may say that it is about to stop; a master knows which workers are, and asks others."""
        hosts = self.hosts(outcome.errand)
        if self.near(frozenset(["master"]), outcome, STOPS) or self.near(hosts, outcome, LOSSES - STOPS):
            return True
        stops = self._history.troubles(hosts, outcome.began - self.aftermath, outcome.ended, STOPS)
        return any(stop.began >= outcome.began - self.reaction for stop in stops)

    def was_cancelled(self, outcome: Outcome) -> bool:
        """Return whether an operator has cancelled the request."""
        return self.near(frozenset([outcome.errand.host]), outcome, frozenset({"call cancelled"}))

    def was_broken(self, outcome: Outcome) -> bool:
        """Return whether the connection between client and master was broken, or its master was."""
        return self.near(frozenset([outcome.errand.host, "master"]), outcome, BREAKS)

    def may_fail(self, outcome: Outcome) -> bool:
        """Return whether there is anything for which the answer may have failed in its middle."""
        errand = outcome.errand
        return (
            errand.script.fails is not None
            or self._may_time_out(outcome)
            or self.near(self.hosts(errand) | {errand.host}, outcome, LOSSES | BREAKS | {"call cancelled"})
        )

    def _was_full(self, outcome: Outcome) -> bool:
        return any(
            span.touches(outcome.began - MARGIN, outcome.ended)
            for host in self.hosts(outcome.errand)
            for span in self._full.get(host, ())
        )

    @staticmethod
    def pauses(errand: Errand) -> float:
        """Return how many seconds the client spends on not reading."""
        return errand.patience * SLOW_READS if errand.manner == "reads slowly" else 0.0

    def transport(self, errand: Errand) -> float:
        """Return what getting request and answer across may take: a round trip for each quarter of a window."""
        pieces = (errand.script.filling + errand.script.bytes_out) / 65536 + 2
        return self.reaction + 4 * self._plan.longest_delay * pieces
