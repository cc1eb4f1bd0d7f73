"""The fault oracle: decides whether a failed request has a fault in the history that explains it.

An invariant that accepts any reason for a failure finds no bugs, and one that ignores latency and aftermath reports
failures that are correct. So a fault explains a failure only if it is near enough in place and time, and everything
that is allowed is derived from the plan: how long a node tolerates silence, how long the network takes, how many bytes
have to be sent.
"""

from __future__ import annotations

import math
from typing import Final

from ..gateway.deadlines import GRACE
from ._history import FaultSpan, History
from ._limited_keys import LimitedKeys
from ._plan import START_FAILED, Plan, ResidentSpec, SimulatedRequest, replica_name, take_over_name
from ._scripts import MARGIN
from ._simulation import FIRST_PROBE
from ._workload import SLOW_READS, Outcome

__all__ = ["CONNECTION_FAULTS", "STOPS", "WORKER_FAULTS", "FaultOracle"]

#: Seconds that a worker waits at most before it tries to reconnect.
_BACKOFF: Final = 5.0

#: Faults after which a node refuses new requests.
STOPS: Final = frozenset({"worker stopped", "worker drained", "master stopped"})
#: Faults by which a master may lose a worker.
WORKER_FAULTS: Final = STOPS | {
    "worker killed",
    "worker frozen",
    "worker partitioned",
    "link cut",
    "link reset",
    "link partitioned",
    "master killed",
    "master frozen",
}
#: Faults by which a client may lose its connection.
CONNECTION_FAULTS: Final = frozenset(
    {"client partitioned", "connection cut", "connection reset", "master killed", "master stopped"}
)


#: The one of them after which the link is resumed, and no call is lost.
_RESUMED: Final = frozenset({"link reset"})
#: Seconds for which a link is suspended at most, without the latency: a few attempts.
_RESUMPTION: Final = 1.0


class FaultOracle:
    """Explains the failures of one schedule.

    Attributes:
        detection_time: seconds after which a node has noticed that another one is silent.
        reaction_time: seconds between a fault and its effect on another node, if nothing delays it.
        aftermath: seconds for which a fault may have effects after it is over.
    """

    def __init__(self, plan: Plan, history: History) -> None:
        self._plan = plan
        self._history = history
        self._full: dict[str, list[FaultSpan]] = {}
        self.detection_time = float(plan.options["worker_timeout"]) + float(
            plan.options["heartbeat_interval"]
        )
        self.reaction_time = MARGIN + 6 * plan.longest_delay
        self.aftermath = self.detection_time + 2 * self.reaction_time

    def record_load(self, node: str, *, full: bool) -> None:
        """Record whether all slots of a node are taken at this moment."""
        spans = self._full.setdefault(node, [])
        if full and (not spans or spans[-1].ended != math.inf):
            spans.append(FaultSpan("full", frozenset([node]), self._history.now))
        elif not full and spans and spans[-1].ended == math.inf:
            spans[-1].ended = self._history.now

    def explains(self, outcome: Outcome, code: str | None) -> bool:
        """Return whether an error with this code is explained by the script, the limits, or a fault."""
        request, hosts = outcome.request, self.hosts(outcome.request)
        match code:
            case "scripted":
                return request.script.fails == "api_error"
            case "handler_failed":
                return request.script.fails == "exception"
            case "timeout":
                return self._may_time_out(outcome)
            case "replica_failing":
                return self._has_trouble(outcome, "replica failing")
            case "worker_lost":
                # A call whose link is cut is opened elsewhere, unless its time was used up in that moment.
                kinds = WORKER_FAULTS if self._is_slow(outcome) else self.losses(outcome)
                return self.fault_near(hosts, outcome, kinds)
            case "upstream_lost":
                return self._has_trouble(outcome, "resident died")
            case "model_start_failed":
                return self._has_trouble(outcome, START_FAILED)
            case "over_capacity":
                if any(
                    outcome.ended - outcome.began >= spec.start_timeout - MARGIN
                    for spec in self.residents(request)
                ):
                    # It has waited for memory for so long.
                    return True
                # A worker whose heartbeats are late gets no new calls.
                return self._was_full(outcome) or self.fault_near(hosts, outcome, WORKER_FAULTS)
            case "rate_limit_exceeded":
                return self._plan.limited_keys and LimitedKeys(FIRST_PROBE).is_limited(request.number)
            case "shutting_down":
                return self._may_be_refused(outcome)
            case "cancelled":
                return (
                    self.fault_near(hosts, outcome, STOPS)
                    or self.was_cancelled(outcome)
                    or self.was_left_behind(outcome)
                )
            case "model_unavailable":
                # A model that one worker has unregistered is missing only if no other worker serves it either. Of
                # several models that may answer, the client is told of one that is missing, also if others failed.
                quantify = any if request.others else all
                return quantify(
                    self._history.faults_on(
                        frozenset([host, request.master]),
                        outcome.began - 2 * _BACKOFF - self.aftermath,
                        outcome.ended,
                    )
                    for host in hosts - {request.master}
                )
            case "model_not_found":
                # The simulated master has no directory for its state: after a restart it knows no names. One that has
                # taken over knows those of the workers that have joined it in time, if they were registered then.
                unknown = WORKER_FAULTS | {"model unregistered"}
                if self._take_overs(outcome) and self.fault_near(hosts, outcome, unknown):
                    return True
                return bool(
                    self._history.faults_on(
                        frozenset([request.master]),
                        outcome.began - 2 * _BACKOFF - self.aftermath,
                        outcome.ended,
                        frozenset({"master killed", "master stopped"}),
                    )
                )
            case _:
                return False

    def residents(self, request: SimulatedRequest) -> list[ResidentSpec]:
        """Return the models on demand that a request may be for."""
        return [spec for spec in self._plan.residents if spec.model in request.models]

    def start_time(self, request: SimulatedRequest) -> float:
        """Return for how many seconds a request may wait for its model to be started, at most.

        That is for memory, and for the start; and once more if the model is unloaded before it answers.
        """
        specs = self.residents(request)
        stop = max((spec.stop for spec in self._plan.residents), default=0.0)
        return max((2 * (2 * spec.start_timeout + 2 * stop) for spec in specs), default=0.0)

    def losses(self, outcome: Outcome) -> frozenset[str]:
        """Return the faults by which a master may lose a worker, with its calls."""
        # A link to a master that was replaced cannot be resumed: another process listens there.
        if not self._plan.options["resume_window"] or self._take_overs(outcome):
            return WORKER_FAULTS
        return WORKER_FAULTS - _RESUMED

    def was_left_behind(self, outcome: Outcome) -> bool:
        """Return whether the master of a request was replaced, and has not waited for it longer than it does."""
        waits = float(self._plan.options["drain_timeout"]) - MARGIN
        return any(
            outcome.began <= each.ended + self.reaction_time and outcome.ended >= each.ended + waits
            for each in self._take_overs(outcome)
        )

    def replaced_master_ends(self, since: float, until: float) -> bool:
        """Return whether a master that was replaced may have waited long enough within that time, and has ended."""
        places = frozenset(take_over_name(name) for name in self._plan.masters)
        waits = float(self._plan.options["drain_timeout"])
        return any(
            each.ended + waits >= since - GRACE and each.ended + waits <= until
            for each in self._history.faults_on(places, 0.0, until)
        )

    def _take_overs(self, outcome: Outcome) -> list[FaultSpan]:
        """Return the take-overs of the master of a request, while it was under way or not much longer before."""
        since = outcome.began - self.aftermath - float(self._plan.options["drain_timeout"])
        return self._history.faults_on(
            frozenset([take_over_name(outcome.request.master)]), since, outcome.ended
        )

    def hosts(self, request: SimulatedRequest) -> frozenset[str]:
        """Return the nodes that a request involves: its master, and all that serve its models."""
        hosts = [model.hosts for model in self._plan.models if model.name in request.models]
        return frozenset([request.master]).union(*hosts)

    def fault_near(self, hosts: frozenset[str], outcome: Outcome, kinds: frozenset[str]) -> bool:
        """Return whether such a fault touched one of the machines while the request was under way, or just before."""
        since = outcome.began - self.aftermath
        return bool(self._history.faults_on(hosts, since, outcome.ended, kinds))

    def _may_time_out(self, outcome: Outcome) -> bool:
        hosts = self.hosts(outcome.request)
        if self.fault_near(hosts, outcome, self.losses(outcome)) or self._has_trouble(
            outcome, "replica stuck"
        ):
            return True
        # A link that is resumed costs a moment, and no more.
        since = outcome.began - self.aftermath
        cuts = len(self._history.faults_on(hosts, since, outcome.ended, _RESUMED))
        return self._is_slow(outcome, cuts * (_RESUMPTION + 8 * self._plan.longest_delay))

    def _has_trouble(self, outcome: Outcome, kind: str) -> bool:
        """Return whether something was wrong with one of the replicas that may have answered."""
        request = outcome.request
        replicas = frozenset(
            replica_name(host, model.name)
            for model in self._plan.models
            if model.name in request.models
            for host in model.hosts
        )
        return bool(
            self._history.faults_on(
                replicas, outcome.began - self.reaction_time, outcome.ended, frozenset([kind])
            )
        )

    def _is_slow(self, outcome: Outcome, suspended: float = 0.0) -> bool:
        """Return whether the response may come too late although no worker was lost.

        Args:
            outcome: of the request.
            suspended: seconds for which links were suspended meanwhile.
        """
        request, options = outcome.request, self._plan.options
        script = request.script
        limits = [options["default_timeout"], request.idle_timeout, request.total_timeout]
        silence = options["queue_timeout"] + script.longest_silence + self.transport_time(request) + suspended
        if silence >= min(limit for limit in limits if limit is not None):
            return True
        total = (
            options["queue_timeout"]
            + script.duration
            + self.read_pauses(request)
            + self.transport_time(request)
            + self.start_time(request)
            + suspended
        )
        return request.total_timeout is not None and total >= request.total_timeout

    def _may_be_refused(self, outcome: Outcome) -> bool:
        """Return whether a node may answer that it is shutting down.

        A master knows which workers are draining, and sends requests to others. So a worker that drains explains the
        refusal only for as long as the news takes to reach the master.
        """
        hosts = self.hosts(outcome.request)
        if self.fault_near(frozenset([outcome.request.master]), outcome, STOPS) or self.fault_near(
            hosts, outcome, WORKER_FAULTS - STOPS
        ):
            return True
        stops = self._history.faults_on(hosts, outcome.began - self.aftermath, outcome.ended, STOPS)
        return any(stop.began >= outcome.began - self.reaction_time for stop in stops)

    def was_cancelled(self, outcome: Outcome) -> bool:
        """Return whether an operator has cancelled the request."""
        return self.fault_near(frozenset([outcome.request.host]), outcome, frozenset({"call cancelled"}))

    def was_disconnected(self, outcome: Outcome) -> bool:
        """Return whether a fault broke the connection between client and master, or the master has ended."""
        ends = frozenset([outcome.request.host, outcome.request.master])
        return self.fault_near(ends, outcome, CONNECTION_FAULTS) or self.was_left_behind(outcome)

    def may_fail(self, outcome: Outcome) -> bool:
        """Return whether there is any reason for which the response may have failed after it had begun."""
        request = outcome.request
        return (
            request.script.fails is not None
            or self._has_trouble(outcome, "replica failing")
            or self._has_trouble(outcome, "resident died")
            or self._may_time_out(outcome)
            or self.fault_near(
                self.hosts(request) | {request.host},
                outcome,
                self.losses(outcome) | CONNECTION_FAULTS | {"call cancelled"},
            )
            or self.was_left_behind(outcome)
        )

    def _was_full(self, outcome: Outcome) -> bool:
        return any(
            span.overlaps(outcome.began - MARGIN, outcome.ended)
            for host in self.hosts(outcome.request)
            for span in self._full.get(host, ())
        )

    @staticmethod
    def read_pauses(request: SimulatedRequest) -> float:
        """Return how many seconds the client spends not reading."""
        return request.delay * SLOW_READS if request.behavior == "reads slowly" else 0.0

    def transport_time(self, request: SimulatedRequest) -> float:
        """Return how many seconds request and response may take on the network.

        Flow control allows a quarter of a window for each round trip, so this counts round trips.
        """
        pieces = (request.script.padding + request.script.output_bytes) / 65536 + 2
        return self.reaction_time + 4 * self._plan.longest_delay * pieces
