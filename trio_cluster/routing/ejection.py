"""Ejection: a replica that keeps failing, or is stuck, is left alone for a while.

Theory of operation
===================

A replica is a model on one node: a worker may fail with one of its models and be well with the others. When a call
ends, :func:`judge` decides, in this one place, what that says about the replica that had it. An answer says that it is
well, also a refusal (4xx). An error of the replica (5xx, also one that an engine passes on from the server behind it),
its loss, and a silence of ``default_timeout`` are failures. Everything that a client can cause says nothing: that it
has left, that it has set a time limit of its own, that it did not send its body. Neither does a node that is busy or
drains, nor one that was given a request late, since another replica was lost with it, and had not that long.

:class:`EjectionTable` counts failures and decides which replicas are left alone. It does no IO and is told the time.

- A replica is ejected after ``ejection_failures`` failures in a row, or if so many of its last calls have failed and
  they are at least half of all, within :data:`WINDOW` seconds. A silence counts for half of that, since it costs its
  client a minute. Calls that are lost together count once: a process has died.
- A server that sends ``Retry-After`` with a 5xx is left alone at once, and for as long as it says.
- A replica is left alone for ``ejection_time``, twice as long each time that follows, ``ejection_time_max`` at most.
  Then *one* request is sent to it. If that is answered, or its answer begins, the replica takes its share again; if
  not, it is left alone again. If the client leaves, the next request is the one to try.
- No more than ``ejection_share`` of a model's replicas are left alone at once, and never the last one that is
  available: if no other replica can take a request, the ejected ones get it.

The state belongs to the names of node and model, so a worker that dies of each request and returns is known again.

Nothing is kept of a replica that has not failed, and while none has failed, a call costs one comparison at its end.
"""

from __future__ import annotations

import email.utils
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, TypeAlias

import attrs
import trio

from ..core.answer import Failed
from ..core.call import Call
from ..core.observer import Observer, Observers
from ..core.outcome import Outcome
from ..core.request import Request
from ..core.status import EjectedReplica
from ..options import ClusterServerOptions
from .backend import Backend

__all__ = ["WINDOW", "EjectionTable", "Ejections", "Verdict", "judge"]

logger = logging.getLogger("trio_cluster.routing")

#: Seconds for which failures count together that are not in a row.
WINDOW: Final = 60.0
#: The part of the calls that have to fail, if they do not fail in a row.
_FAILED_SHARE: Final = 0.5
#: Calls that are lost within so many seconds are lost together.
_TOGETHER: Final = 0.5
#: Replicas of which failures are kept at most; the ones that failed first are forgotten first. Peers choose the names.
_MAX_RECORDS: Final = 10_000

_FIRST_ERROR: Final = 500
#: Statuses that are about the request: not supported, no such version of HTTP, sent in a circle.
_ABOUT_THE_REQUEST: Final = frozenset({501, 505, 508})
#: Codes with which a node refuses what it would take at another time: it is busy, it stops, an operator has intervened,
#: the model is away.
_NOT_NOW: Final = frozenset({"over_capacity", "shutting_down", "cancelled", "model_unavailable"})

#: What a call says about its replica: it answered; it failed, with an error or a loss; it was silent for too long.
Judgement: TypeAlias = Literal["answered", "failed", "lost", "silent"]
#: A node and a model.
_Key: TypeAlias = tuple[str, str]


@attrs.frozen
class Verdict:
    """What the end of a call says about the replica that had it."""

    judgement: Judgement
    reason: str = ""
    """What has failed, for people."""
    retry_after: float = 0.0
    """Seconds for which the server behind the replica wants to be left alone; 0: it has not said so."""


_ANSWERED: Final = Verdict("answered")


def judge(call: Call, outcome: Outcome, default_timeout: float) -> Verdict | None:
    """Return what a call that has ended says about its replica; ``None`` if nothing.

    Args:
        call: the call.
        outcome: how it has ended.
        default_timeout: the idle timeout of this node. Shorter limits are those of clients.
    """
    if outcome == "completed" and call.status < _FIRST_ERROR:
        return _ANSWERED
    if call.overdue or outcome == "timed_out":
        return _judge_silence(call, default_timeout)
    if outcome == "cancelled":
        return None
    if outcome == "worker_lost":
        return Verdict("lost", "lost with its worker")
    if not isinstance(call.end, Failed):
        return _judge_error(call.status, None, call.retry_after)
    error = call.end.error
    after = error.retry_after
    return _judge_error(error.status, error.code, "" if after is None else f"{after:g}")


def _judge_error(status: int, code: str | None, retry_after: str) -> Verdict | None:
    if status < _FIRST_ERROR:
        return _ANSWERED
    if status in _ABOUT_THE_REQUEST or code in _NOT_NOW:
        return None
    reason = f"status {status}" if code is None else f"status {status}, {code}"
    return Verdict("failed", reason, _seconds(retry_after))


def _judge_silence(call: Call, default_timeout: float) -> Verdict | None:
    """Judge a call of which a time limit has passed: was it this node's limit, and the model that was silent?"""
    request = call.request
    if (
        call.queued
        or call.model_wait is not None
        or (request.upload is not None and not request.upload.complete)
    ):
        return None
    if request.idle_timeout < default_timeout:
        return None
    if request.total_timeout != math.inf and (call.begun or request.total_timeout < default_timeout):
        return None
    return Verdict("silent", "timed out")


def _seconds(retry_after: str) -> float:
    """Return the seconds that a ``Retry-After`` asks for, which may be a date; 0 if it is neither."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


@attrs.define
class _Record:
    """What is known against one replica."""

    in_a_row: int = 0
    """Calls that have failed since it last answered."""
    streak: int = 0
    """The same, with what they count."""
    failures: list[float] = attrs.field(factory=list)
    """When it has failed, within the last ``WINDOW`` seconds."""
    answers: int = 0
    """How many calls it has answered since the first of them."""
    last: float = 0.0
    """When it failed last."""
    ejections: int = 0
    """How often it was left alone without being well for long in between."""
    until: float | None = None
    """When the next request may try it; ``None``: it is not left alone."""
    reason: str = ""
    """Why it is."""
    back_off: float = 0.0
    """Seconds for which it was left alone last."""
    probe: Call | None = None
    """The call that tries it."""


@attrs.frozen
class Ejection:
    """A replica begins to be left alone."""

    reason: str
    until: float
    seconds: float


class EjectionTable:
    """Which replicas are left alone. See the top of this module.

    Args:
        options: read at the time of use.

    Attributes:
        ejected: the replicas that are left alone, by node and model. To be read only.
        records: what is known against replicas. To be read only.
        total: how often a replica was left alone.
    """

    def __init__(self, options: ClusterServerOptions) -> None:
        self.options = options
        self.ejected: dict[_Key, _Record] = {}
        self.records: dict[_Key, _Record] = {}
        self.total = 0

    def answered(self, key: _Key, now: float, probe: Call | None = None) -> bool:
        """Record that a replica has answered.

        Args:
            key: its node and model.
            now: the time in seconds.
            probe: the call.

        Returns:
            Whether the replica takes its share again.
        """
        record = self.records.get(key)
        if record is None:
            return False
        if record.until is not None:
            # A call that was opened before says nothing about now.
            if probe is None or record.probe is not probe:
                return False
            self.readmit(key, now)
            record.probe = None
            return True
        if record.probe is probe:
            record.probe = None
        record.streak = record.in_a_row = 0
        record.answers += 1
        if now - record.last > self._memory(record):
            del self.records[key]
        return False

    def readmit(self, key: _Key, now: float) -> None:
        """Record that the answer of the call has begun that tries a replica: it takes its share again."""
        record = self.ejected.pop(key)
        record.until = None
        record.failures.clear()
        record.streak = record.in_a_row = record.answers = 0
        record.last = now

    def failed(
        self, key: _Key, verdict: Verdict, now: float, others: Sequence[str], probe: Call | None = None
    ) -> Ejection | None:
        """Record that a replica has failed.

        Args:
            key: its node and model.
            verdict: how it has failed.
            now: the time in seconds.
            others: the names of the nodes that have the other replicas of the model, and are available.
            probe: the call.

        Returns:
            How long it is left alone from now on; ``None``: it is not, or it was already.
        """
        options = self.options
        if not options.ejection_failures:
            return None
        record = self.records.get(key)
        if record is not None and record.until is not None:
            if probe is None or record.probe is not probe:
                return None
            record.probe = None
            record.in_a_row += 1
            return self._eject(key, record, verdict, now)
        if record is None or now - record.last > self._memory(record):
            self._forget_old(now)
            self.records.pop(key, None)
            record = self.records[key] = _Record()
        elif verdict.judgement == "lost" and record.failures and now - record.failures[-1] < _TOGETHER:
            return None
        begun = record.probe is not None and record.probe is probe
        record.probe = None if begun else record.probe
        weight = (options.ejection_failures + 1) // 2 if verdict.judgement == "silent" else 1
        record.last = now
        record.streak += weight
        record.in_a_row += 1
        record.failures = [at for at in record.failures if now - at <= WINDOW] + [now] * weight
        if len(record.failures) <= weight:
            record.answers = 0
        if not (
            begun
            or verdict.retry_after
            or record.streak >= options.ejection_failures
            or (
                len(record.failures) >= options.ejection_failures
                and len(record.failures) >= _FAILED_SHARE * (len(record.failures) + record.answers)
            )
        ):
            return None
        left_alone = sum((name, key[1]) in self.ejected for name in others)
        if left_alone >= len(others) or left_alone + 1 > options.ejection_share * (len(others) + 1):
            return None
        return self._eject(key, record, verdict, now)

    def _eject(self, key: _Key, record: _Record, verdict: Verdict, now: float) -> Ejection:
        options = self.options
        longest = max(options.ejection_time, options.ejection_time_max)
        seconds = options.ejection_time * 2.0 ** min(record.ejections, 60)
        if verdict.retry_after:
            # A server that knows when it is back is asked then. It is not trusted beyond the bound.
            seconds = max(verdict.retry_after, seconds / 2 if record.ejections else 0.0)
        seconds = min(seconds, longest)
        record.ejections += 1
        count = f", {record.in_a_row} in a row" if record.in_a_row > 1 else ""
        record.reason = f"{verdict.reason}{count}"
        record.back_off = seconds
        record.until = record.last = now + seconds
        self.ejected[key] = record
        self.total += 1
        return Ejection(record.reason, record.until, seconds)

    def ended_without_verdict(self, key: _Key, probe: Call) -> None:
        """Record that a call says nothing: if it was the one to try the replica, the next request is."""
        record = self.records.get(key)
        if record is not None and record.probe is probe:
            record.probe = None

    def due(self, key: _Key, now: float) -> bool:
        """Return whether a replica that is left alone is to be tried with the next request."""
        record = self.ejected.get(key)
        return (
            record is not None and record.until is not None and record.until <= now and record.probe is None
        )

    def try_with(self, key: _Key, probe: Call) -> None:
        """Record that a call tries a replica that is left alone."""
        self.ejected[key].probe = probe

    def probed_by(self, probe: Call) -> _Key | None:
        """Return the replica that a call tries; ``None`` if it tries none."""
        return next((key for key, record in self.ejected.items() if record.probe is probe), None)

    @property
    def probing(self) -> bool:
        """Whether a replica that is left alone is being tried."""
        return any(record.probe is not None for record in self.ejected.values())

    def clear(self) -> None:
        """Forget all."""
        self.ejected.clear()
        self.records.clear()

    def _memory(self, record: _Record) -> float:
        """Return after how many seconds without a failure a replica is well. Silences are ``default_timeout`` apart."""
        timeout = self.options.server.default_timeout
        return max(WINDOW + (2 * timeout if timeout < math.inf else 0.0), record.back_off)

    def _forget_old(self, now: float) -> None:
        # They are sorted by the time at which they failed first; that is near enough.
        for key in list(self.records):
            record = self.records[key]
            if len(self.records) < _MAX_RECORDS and now - record.last <= self._memory(record):
                break
            del self.records[key]
            self.ejected.pop(key, None)


class Ejections(Observer):
    """Feeds the table of a node with the ends of its calls, and keeps requests from replicas that are left alone.

    Args:
        options: read at the time of use.
        replicas: returns the replicas of a model.
        observers: those of the node. This one is to be added by the caller; another one is while a replica is tried.

    Attributes:
        table: the table.
        ejected: as in the table.
    """

    def __init__(
        self,
        options: ClusterServerOptions,
        replicas: Callable[[str], Iterable[Backend]],
        observers: Observers,
    ) -> None:
        self.table = EjectionTable(options)
        # Empty as long as no replica is left alone: then neither `admit` nor `opened` is called for a request.
        self.ejected = self.table.ejected
        self._records = self.table.records
        self._replicas = replicas
        self._observers = observers
        self._first_bytes = _FirstBytes(self)
        self._listening = False
        # The calls that have replaced another one, and since when.
        self._replacements: dict[Call, float] = {}

    def on_retried(self, lost: Call, again: Call) -> None:
        """See ``Observer``."""
        now = _now()
        # A second attempt may have ended before the task ran that takes its answer; then nothing would remove it here.
        if now is not None and not again.released:
            self._replacements[again] = now

    def on_ended(self, call: Call, outcome: Outcome) -> None:
        """See ``Observer``."""
        if self._replacements:
            self._replacements.pop(call, None)
        if not self._records and (
            outcome == "cancelled" or (outcome == "completed" and call.status < _FIRST_ERROR)
        ):
            return
        if not call.overdue:
            self._judge(call, outcome)

    def on_overdue(self, call: Call) -> None:
        """See ``Observer``. This is not left to the end of the work, which may never come."""
        since, now = self._replacements.get(call), _now()
        if since is not None and now is not None and now - since < self.table.options.server.default_timeout:
            # Its client has waited for another replica before, and this one had less time than a replica has.
            self.table.ended_without_verdict((call.served_by, call.request.model), call)
            self._listen()
            return
        self._judge(call, "timed_out")

    def _judge(self, call: Call, outcome: Outcome) -> None:
        now = _now()
        if now is None:
            return
        key = (call.served_by, call.request.model)
        verdict = judge(call, outcome, self.table.options.server.default_timeout)
        if verdict is None:
            self.table.ended_without_verdict(key, call)
        elif verdict.judgement == "answered":
            self._answered(key, call, now)
        else:
            others = [
                each.name for each in self._replicas(key[1]) if each.name != key[0] and each.health.available
            ]
            ejection = self.table.failed(key, verdict, now, others, call)
            if ejection is not None:
                fields = {"node": key[0], "model": key[1], "seconds": round(ejection.seconds, 1)}
                logger.warning("replica ejected: %s", ejection.reason, extra={"fields": fields})
        self._listen()

    def admit(self, request: Request, candidates: list[Backend]) -> list[Backend]:
        """Return which of the replicas that can be given a request may get it: one that is due to be tried, or those
        that are not left alone; all, if there are no others. To be called while any replica is left alone.
        """
        now, model, ejected = _now(), request.model, self.ejected
        if not self.table.options.ejection_failures:
            self.clear()
        others = [each for each in candidates if (each.name, model) not in ejected]
        if not others or now is None:
            return candidates
        if not request.retried and request.replayable:
            for each in candidates:
                if self.table.due((each.name, model), now):
                    return [each]
        return others

    def opened(self, call: Call) -> None:
        """Record that a call was opened. To be called while any replica is left alone. Synchronous."""
        now, key = _now(), (call.served_by, call.request.model)
        if now is not None and self.table.due(key, now):
            self.table.try_with(key, call)
            self._listen()

    def first_byte(self, call: Call) -> None:
        """Record that the answer of a call has begun: if it tries a replica, that takes its share again."""
        key, now = self.table.probed_by(call), _now()
        if key is not None and now is not None and call.status < _FIRST_ERROR:
            self.table.readmit(key, now)
            self._log_readmitted(key)
            self._listen()

    def clear(self) -> None:
        """Forget all."""
        self.table.clear()
        self._listen()

    def status(self) -> list[EjectedReplica]:
        """Return the replicas that are left alone now, sorted. The last one that is available is not."""
        now = _now()
        if now is None or not self.ejected:
            return []
        shown = []
        for (node, model), record in sorted(self.ejected.items(), key=lambda item: item[0]):
            replicas = list(self._replicas(model))
            others = [
                each for each in replicas if each.health.available and (each.name, model) not in self.ejected
            ]
            if record.until is not None and others and any(each.name == node for each in replicas):
                seconds = max(0.0, record.until - now)
                until = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
                shown.append(EjectedReplica(node, model, record.reason, until, round(seconds, 3)))
        return shown

    def _answered(self, key: _Key, call: Call, now: float) -> None:
        if self.table.answered(key, now, call):
            self._log_readmitted(key)

    @staticmethod
    def _log_readmitted(key: _Key) -> None:
        logger.info("replica answers again", extra={"fields": {"node": key[0], "model": key[1]}})

    def _listen(self) -> None:
        """Listen for the beginnings of answers as long as one of them decides something."""
        if self.table.probing is not self._listening:
            self._listening = not self._listening
            (self._observers.add if self._listening else self._observers.remove)(self._first_bytes)


class _FirstBytes(Observer):
    """Listens for the beginnings of answers while a replica is tried."""

    def __init__(self, ejections: Ejections) -> None:
        self._ejections = ejections

    def on_first_byte(self, call: Call) -> None:
        """See ``Observer``."""
        self._ejections.first_byte(call)


def _now() -> float | None:
    try:
        return trio.current_time()
    except RuntimeError:
        return None
