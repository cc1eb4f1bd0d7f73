"""One connected worker, as the backend that the master's router knows.

To the router a remote worker is what a local handler is: something that opens calls. Only the source of the events
differs. Opening and cancelling queue a message and wake the link's writer; neither waits for anything, so no
cancellation can come between asking for work and recording that it was asked for.

Credit: the bytes of an answer are granted back to the worker when the call's consumer has taken them, never when they
arrive. So a client that stops reading stops its own handler, and no other. In the other direction, a piece of a request
body that is still being received counts as consumed when it has been sent to the worker, which has asked for it then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final, TypeAlias

import trio

from ..core.answer import Done, Failed, Head
from ..core.call import Call
from ..core.log_context import MOST_IDS
from ..core.model import ModelInfo
from ..core.model_state import ModelState, ModelWait
from ..core.principal import PRIORITIES
from ..core.request import Request
from ..core.status import Admission, WorkerState, WorkerStatus, most_waiting
from ..core.story import TIMES
from ..errors import HandlerFailed, ShuttingDown, WorkerLost
from ..protocol import (
    NAME_MAX,
    Data as DataMessage,
    Done as DoneMessage,
    Failed as FailedMessage,
    ForwardResponse,
    Heartbeat,
    MasterSession,
    OtherMasters,
    State,
)
from ..routing.health import Health

__all__ = ["MAX_CAPACITY", "CallEvent", "RemoteWorker"]

#: What a worker's capacity counts as at most. The load of a worker is the number of its calls divided by its capacity,
#: so one with an absurd capacity would get all calls.
MAX_CAPACITY: Final = 4096

#: Versions whose workers do not know the field ``retryable`` of ``Failed``: for them it follows from the error.
_WITHOUT_RETRYABLE: Final = frozenset({"0.1.0"})

#: What a worker may have measured of a call at most, in microseconds: a hundred years.
_LONGEST: Final = 100 * 366 * 86_400 * 10**6

#: Why a model of a worker cannot be started. The reason is in the errors of requests, and in the worker's log.
_FAILED: Final = "its start has failed; see the log of the worker"

CallEvent: TypeAlias = ForwardResponse | DoneMessage | FailedMessage


class RemoteWorker:
    """One worker that is connected.

    Args:
        name: the worker's name.
        session: the master's half of the protocol, after its handshake.
        wake: called when the session has something to send. Synchronous.
        address: where the worker connected from, for people.

    Attributes:
        models: what it serves, by name.
        connected_at: the trio time at which it joined.
        running, waiting, capacity, lag: what it reported in its last heartbeat; the lag in seconds.
        elsewhere: how many calls of other masters it has.
        other_masters: the names and addresses of the other masters that it is linked to.
        health: whether it may be given calls; kept by the connection that watches it.
    """

    def __init__(
        self,
        name: str,
        session: MasterSession,
        wake: Callable[[], None],
        address: str,
        admitted: Admission = "open",
    ) -> None:
        self.name = name
        self.address = address
        self.admitted: Admission = admitted
        self.models: dict[str, ModelInfo] = {}
        self.connected_at = trio.current_time()
        self.running = 0
        self.waiting = 0
        self.capacity = 1
        self.lag = 0.0
        self.elsewhere = 0
        self.other_masters: tuple[tuple[str, str], ...] = ()
        self.health = Health()
        self._session = session
        self._wake = wake
        self._calls: dict[int, Call] = {}
        # The calls that wait for their model to run, as of the last heartbeat.
        self._waits: set[int] = set()

    @property
    def in_flight(self) -> int:
        """How many calls this master has there whose work has not stopped."""
        return len(self._calls)

    @property
    def request_ids(self) -> list[str]:
        """The ids of these calls, for the log: the first few, if there are many."""
        return [call.request.request_id for call in islice(self._calls.values(), MOST_IDS)]

    @property
    def load(self) -> float:
        """See ``Backend``."""
        return (len(self._calls) + self.elsewhere) / self.capacity

    @property
    def state(self) -> WorkerState:
        """See ``WorkerState``; the worst one that holds."""
        if self.health.suspended:
            return "suspended"
        if self.health.stalled:
            return "stalled"
        if self.health.draining:
            return "draining"
        return "busy" if max(self.in_flight + self.elsewhere, self.running) >= self.capacity else "ok"

    @property
    def instance(self) -> str:
        """Tells the worker's process from another one of the same name; empty if it did not send one."""
        peer = self._session.peer
        return "" if peer is None else peer.instance

    def status(self) -> WorkerStatus:
        """Return what is known of the worker now."""
        return WorkerStatus(
            id=self.name,
            instance=self.instance,
            address=self.address,
            state=self.state,
            draining=self.health.draining,
            stalled=self.health.stalled,
            models=sorted(self.models),
            running=self.running,
            waiting=self.waiting,
            capacity=self.capacity,
            in_flight=self.in_flight,
            waiting_by=most_waiting(
                Counter(call.request.principal.name for call in self._calls.values() if call.queued)
            ),
            lag=round(self.lag, 3),
            connected_for=round(trio.current_time() - self.connected_at, 3),
            admitted=self.admitted,
            in_flight_elsewhere=self.elsewhere,
            model_states={name: state.state for name, state in sorted(self.health.model_states.items())},
            version="" if self._session.peer is None else self._session.peer.version,
            failed_models=sorted(name for name, state in self.health.model_states.items() if state.why),
        )

    def request_shutdown(self, reason: str) -> None:
        """Give it no more calls, and ask it to finish those that it has and to stop. Synchronous."""
        self.health.drain()
        self._session.shut_down(reason)
        self._wake()

    def open(self, request: Request) -> Call:
        """See ``Backend``."""
        if self.health.lost is not None:
            raise WorkerLost(self.name, self.health.lost)
        session, wake, upload, principal = self._session, self._wake, request.upload, request.principal
        call_id = session.open(
            endpoint=request.endpoint,
            kind=request.kind,
            model=request.model,
            content_type=request.content_type,
            headers=request.headers,
            request_id=request.request_id,
            timeout=request.idle_timeout,
            budget=request.total_timeout,
            size=len(request.body) if upload is None else upload.size,
            once=upload is not None,
            checked=request.checked,
            principal=principal.name,
            weight=principal.weight,
            priority=PRIORITIES[principal.priority],
            max_tokens=request.max_tokens,
            query=request.query,
            alias=request.alias,
        )

        def cancel(reason: str) -> None:
            session.cancel(call_id, reason, complete=self._calls[call_id].satisfied)
            wake()

        def grant(count: int) -> None:
            if session.grant(call_id, count):
                wake()

        call = Call(request, served_by=self.name, forwarded=True, on_cancel=cancel, on_consumed=grant)
        self._calls[call_id] = call

        def send(data: bytes | memoryview, last: bool) -> bool:
            session.send_body(call_id, data, last=last)
            wake()
            # Not consumed before it has been written; see `on_sent`.
            return False

        if upload is None:
            send(request.body, True)
        else:
            upload.redirect(send)
            # The request's head is sent in any case, also if nothing of its body has been received yet.
            wake()
        return call

    def on_sent(self, counts: Sequence[tuple[int, int]]) -> None:
        """Record, for each call, how many bytes of its request body have been written to the worker."""
        for call_id, count in counts:
            call = self._calls.get(call_id)
            if call is not None and call.request.upload is not None:
                call.request.upload.consumed(count)

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Record what the worker reports of itself and of its calls."""
        self.running, self.waiting, self.capacity = (
            heartbeat.running,
            heartbeat.waiting,
            min(max(1, heartbeat.capacity), MAX_CAPACITY),
        )
        self.lag = heartbeat.lag
        for call_id, count in heartbeat.progress:
            call = self._calls.get(call_id)
            if call is not None:
                call.report(queued=count < 0, produced=max(0, count))
        if heartbeat.on_demand or self.health.model_states:
            self.health.model_states = {
                name: _model_state(state, seconds) for name, state, seconds in heartbeat.on_demand
            }
        if heartbeat.starts or self._waits:
            self._on_starts(heartbeat.starts)

    def _on_starts(self, starts: Sequence[tuple[int, str, float]]) -> None:
        """Record which calls wait for their model to run; those that are not named wait no more."""
        waits = {call_id for call_id, _, _ in starts}
        for call_id in self._waits - waits:
            call = self._calls.get(call_id)
            if call is not None:
                call.set_model_wait(None)
        self._waits = waits
        for call_id, what, seconds in starts:
            call = self._calls.get(call_id)
            if call is not None:
                call.set_model_wait(ModelWait(what, None if seconds < 0 else trio.current_time() + seconds))

    def on_other_masters(self, message: OtherMasters) -> None:
        """Record what the worker reports of its other masters."""
        self.elsewhere, self.other_masters = message.calls, message.masters

    def on_data(self, piece: DataMessage) -> None:
        """Put a piece of an answer into its call."""
        self._calls[piece.call].body.put(piece.data)

    def on_event(self, event: CallEvent) -> None:
        """Put the beginning or the end of an answer into its call."""
        call = self._calls[event.call]
        if not isinstance(event, ForwardResponse) and event.times:
            times = call.worker_times = {}
            for name in TIMES:
                if 0 <= (value := event.times.get(name, -1)) <= _LONGEST:
                    times[name] = value
        match event:
            case ForwardResponse():
                call.put(Head(event.status, event.content_type, event.headers))
            case DoneMessage():
                if not call.ended or call.satisfied:
                    finish = event.finish[:NAME_MAX]
                    call.put(Done(event.tokens(), finish if finish.isprintable() else ""))
                self._release(event.call)
            case FailedMessage():
                if not call.ended:
                    retryable = event.retryable or self._gave_back(event, call.request.model)
                    call.put(Failed(event.error(), retryable, event.timed_out, event.over_capacity))
                self._release(event.call)

    def _gave_back(self, event: FailedMessage, model: str) -> bool:
        """Tell whether a worker that does not know ``retryable`` means it: it stops, or has taken the model back."""
        peer = self._session.peer
        if peer is None or peer.version not in _WITHOUT_RETRYABLE:
            return False
        return event.code == "shutting_down" or (event.code == "model_not_found" and model not in self.models)

    def fail_after_error(self, call_id: int) -> None:
        """End a call with 500, since what belongs to it raised an exception. The other calls go on.

        Its work is asked to stop, unless it has stopped already.

        Raises:
            Exception: even that fails.
        """
        call = self._calls.get(call_id)
        if call is None:
            return
        if not call.ended:
            call.put(Failed(HandlerFailed("The request failed on the master")))
        if self._session.state(call_id) is State.ENDED:
            self._release(call_id)
        else:
            self._session.cancel(call_id, "an internal error of the master")
            self._wake()

    def split_calls(self, elsewhere: Callable[[Request], bool]) -> tuple[int, int]:
        """Return how many calls are lost if the link is over now, and how many can be retried. Synchronous.

        A call that has ended already, and whose work has not stopped yet, is none of either.

        Args:
            elsewhere: tells whether another replica can be given a request.
        """
        left = [call for call in self._calls.values() if not call.ended]
        retried = sum(_may_be_retried(call) and elsewhere(call.request) for call in left)
        return len(left) - retried, retried

    def suspend(self, elsewhere: Callable[[Request], bool]) -> int:
        """Record that the link was cut and may be resumed. Synchronous.

        Calls whose answer has not begun fail as retryable, if they can be opened elsewhere; their work here is asked to
        stop when the link is resumed, and counts until then. All others wait.

        Args:
            elsewhere: tells whether another replica can be given a request.

        Returns:
            How many calls have failed.
        """
        self.health.suspend(True)
        moved = 0
        for call_id, call in list(self._calls.items()):
            call.note(f"the link to worker '{self.name}' was cut; it may be resumed")
            if not call.ended and _may_be_retried(call) and elsewhere(call.request):
                call.put(Failed(WorkerLost(self.name, "its link was cut"), retryable=True))
                self._session.cancel(call_id, "opened on another worker, since the link was cut")
                moved += 1
        return moved

    def resumed(self, address: str) -> None:
        """Record that the link goes on, on a connection from ``address``. Synchronous."""
        self.address = address
        # A worker whose link is silent opens another one before this master has noticed anything.
        how = "resumed" if self.health.suspended else "silent, and was resumed on a second connection"
        for call in self._calls.values():
            call.note(f"the link to worker '{self.name}' was {how}")
        self.health.suspend(False)

    def connection_lost(self, why: str) -> None:
        """Fail every call at once: the link is over, and nothing more will come."""
        self.health.lose(why)
        for call_id, call in list(self._calls.items()):
            if not call.ended:
                # A draining worker gives back the calls that it has not begun, even if it could not report that.
                given_back = self.health.draining and not call.begun
                error = ShuttingDown() if given_back else WorkerLost(self.name, why)
                call.put(Failed(error, retryable=True))
            self._release(call_id)

    def _release(self, call_id: int) -> None:
        self._calls.pop(call_id).release()


def _model_state(state: str, seconds: float) -> ModelState:
    if state == "ready":
        return ModelState("ready")
    if state == "starting":
        return ModelState("starting", trio.current_time() + seconds)
    return ModelState("cold", 0.0, seconds, _FAILED if state == "failed" else "")


def _may_be_retried(call: Call) -> bool:
    """Return whether another replica may be given a request: no answer has begun, and it is the first retry.

    Of two attempts neither is retried, so it is better to wait for a link that was cut.
    """
    return not (call.begun or call.request.retried or call.hedged) and call.request.replayable
