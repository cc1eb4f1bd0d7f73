"""Machines that sleep: the models of a worker that is away, whose machine can be woken.

Theory of operation
===================

A worker that the option ``wake`` names may have gone to sleep with its machine. What it served is remembered, over a
restart of the master as well, and a *sleeping worker* stands in for it: a backend that the catalogue asks only as long
as no other one serves the model (see :meth:`Catalog.set_stand_in`). A request for such a model is a call like every
other one. It has the machine sent magic packets, and waits.

When any worker brings the model, the waiting calls fail as retryable, and the router opens them again, there. So
nothing else has to know about sleep. A call that has waited for ``wake_timeout`` fails, and so does one for a model
that the worker no longer brings although it has come back.

A magic packet is six bytes of ones and the hardware address sixteen times, in a UDP datagram to the broadcast address
of the network; the network card of a machine that sleeps looks for nothing else. There is no answer. Packets are
repeated, since datagrams may be lost.

One task sends the packets, watches the time, and writes the file. Everything else is synchronous.
"""

from __future__ import annotations

import json
import logging
import math
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, NoReturn

import attrs
import trio

from ..core.answer import Failed
from ..core.call import Call
from ..core.model import KINDS, ModelInfo
from ..core.model_state import CONTROL, UNLOAD, ModelState, ModelWait
from ..core.request import Request
from ..core.status import SleepingStatus
from ..core.wake_target import ASLEEP, WakeTarget, read_wake_target
from ..errors import ApiError, ModelStartFailed, ModelUnavailable
from ..net.throttled_log import ThrottledLog
from ..options import ClusterServerOptions
from ..protocol import RegisterModel
from ..routing.catalog import Catalog
from ..routing.health import Health

__all__ = ["PACKET_INTERVAL", "SleepingWorker", "SleepingWorkers", "send_packet"]

logger = logging.getLogger("trio_cluster.node")

#: Seconds between two packets for a machine.
PACKET_INTERVAL: Final = 5.0
#: Seconds in which a worker that has come back registers its models.
_REGISTRATION: Final = 30.0
#: Models of a worker that are remembered at most. Peers choose the names.
_MAX_MODELS: Final = 1000
#: Of the content of the file.
_VERSION: Final = 1


def send_packet(target: WakeTarget) -> None:
    """Send a magic packet. Synchronous.

    Raises:
        OSError: it cannot be sent.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.sendto(target.packet, target.address)


class SleepingWorker:
    """A worker that is away, and whose machine can be woken, as the backend that the router knows.

    Args:
        worker: its name.
        target: how it is woken.
        wake: called when a call waits for it, and when none waits any more. Synchronous.

    Attributes:
        worker, target: as given.
        models: what it served, by name.
        present: those of them that it serves now.
        waiting: the calls that wait for it, with the trio time at which each began to.
        connected_at: the trio time at which it came back; ``None`` while it is away.
        next_packet: the trio time at which the next packet is sent.
        asked_at: the trio time of the first call that it was woken for; ``None``: it is not being woken.
        seconds: how long it took to come the last time; ``None``: not known.
    """

    elsewhere = 0

    def __init__(self, worker: str, target: WakeTarget, wake: Callable[[], None]) -> None:
        self.worker = worker
        self.target = target
        self.health = Health()
        self.models: dict[str, ModelInfo] = {}
        self.present: set[str] = set()
        self.waiting: dict[Call, float] = {}
        self.connected_at: float | None = None
        self.next_packet = -math.inf
        self.asked_at: float | None = None
        self.seconds: float | None = None
        self._wake = wake

    @property
    def name(self) -> str:
        """See ``Backend``. Not the name of the worker: a call is not opened again on the node that had it."""
        return self.worker + ASLEEP

    @property
    def load(self) -> float:
        """See ``Backend``. It can be given no second attempts."""
        return math.inf

    def open(self, request: Request) -> Call:
        """See ``Backend``."""
        if request.kind == CONTROL and request.endpoint == UNLOAD:
            # A machine is not woken for that.
            raise ModelUnavailable(request.model)
        now = trio.current_time()
        if self.connected_at is None:
            if self.asked_at is None:
                self.set_asked(now)
            self._wake()
        # Otherwise it is awake, and registers its models.
        if request.upload is not None:
            # It could not be sent to the worker later: what arrives is not kept.
            raise ModelUnavailable(request.model)
        call = Call(request, served_by=self.name, on_cancel=lambda reason: self._leave(call))
        self.waiting[call] = now
        ready_at = None if self.seconds is None or self.asked_at is None else self.asked_at + self.seconds
        call.set_model_wait(ModelWait(f"waking {self.worker}", ready_at))
        return call

    def status(self) -> SleepingStatus:
        """Return what is shown of the worker. Synchronous."""
        return SleepingStatus(self.worker, self.asked_at is not None, sorted(self.models), len(self.waiting))

    def set_asked(self, since: float | None) -> None:
        """Record since when it is being woken; ``None``: it is not. Synchronous."""
        self.asked_at = since
        self.show_states()

    def show_states(self) -> None:
        """Let the router know the states of the models. Synchronous."""
        seconds = 0.0 if self.seconds is None else self.seconds
        state = ModelState("cold", start_seconds=seconds)
        if self.asked_at is not None:
            state = ModelState("starting", ready_at=self.asked_at + seconds)
        self.health.model_states = dict.fromkeys(self.models, state)

    def replaced(self, name: str) -> None:
        """See ``StandIn``."""
        self.fail(lambda call: call.request.model == name, ModelUnavailable)

    def fail(self, which: Callable[[Call], bool], error: Callable[[str], ApiError]) -> None:
        """Fail some of the calls that wait, so that they are opened elsewhere if that is possible. Synchronous.

        Args:
            which: tells which.
            error: makes the error, given the name of the model.
        """
        for call in [call for call in self.waiting if which(call)]:
            if not call.ended:
                call.put(Failed(error(call.request.model), retryable=True))
            self._leave(call)

    def _leave(self, call: Call) -> None:
        del self.waiting[call]
        if not self.waiting:
            self._wake()
        call.release()


class SleepingWorkers:
    """The workers of a master whose machines can be woken. See the top of this module.

    Args:
        catalog: where they stand in for their models.
        options: read at the time of use.
        send: sends a packet. Synchronous; raises ``OSError`` if it cannot.

    Attributes:
        on_changed: called when :meth:`content` has changed. Synchronous.
    """

    def __init__(
        self,
        catalog: Catalog,
        options: ClusterServerOptions,
        send: Callable[[WakeTarget], None] = send_packet,
    ) -> None:
        self.on_changed: Callable[[], None] = lambda: None
        self._catalog = catalog
        self._options = options
        self._send = send
        self._workers: dict[str, SleepingWorker] = {}
        self._asked = trio.lowlevel.ParkingLot()
        for name, text in (options.wake or {}).items():
            self._workers[name] = SleepingWorker(name, read_wake_target(text), self._look_again)

    def __bool__(self) -> bool:
        return bool(self._workers)

    def __iter__(self) -> Iterator[SleepingWorker]:
        return iter(self._workers.values())

    def _look_again(self) -> None:
        self._asked.unpark_all()

    # What happens to the workers. All of this is synchronous, and without effect for other workers.

    def joined(self, name: str) -> None:
        """Record that a worker is connected."""
        worker = self._workers.get(name)
        if worker is not None:
            now = trio.current_time()
            if worker.asked_at is not None:
                worker.seconds = now - worker.asked_at
                worker.set_asked(None)
                logger.info(
                    "machine woken", extra={"fields": {"worker": name, "seconds": round(worker.seconds)}}
                )
            worker.connected_at = now
            # By another connection, perhaps, which has not been found to be lost.
            worker.present.clear()
            self._look_again()

    def registered(self, name: str, info: ModelInfo) -> None:
        """Record that a worker serves a model."""
        worker = self._workers.get(name)
        if worker is not None and (info.name in worker.models or len(worker.models) < _MAX_MODELS):
            worker.present.add(info.name)
            if worker.models.get(info.name) != info:
                self._remember(worker, info)
                self.on_changed()

    def unregistered(self, name: str, model: str) -> None:
        """Record that a worker serves a model no more, although it is there."""
        worker = self._workers.get(name)
        if worker is not None and model in worker.models:
            self._forget(worker, [model])

    def left(self, name: str) -> None:
        """Record that a worker is away."""
        worker = self._workers.get(name)
        if worker is not None:
            worker.connected_at = None
            worker.present.clear()
            if worker.waiting:
                # It is to be woken again, and was not before what they wait for was there.
                worker.set_asked(trio.current_time())
                self._look_again()

    # The file

    def content(self) -> bytes:
        """Return what is to be kept over a restart."""
        return _encode(
            {each.worker: [*each.models.values()] for each in self._workers.values() if each.models}
        )

    def restore(self, content: bytes) -> None:
        """Take up what :meth:`content` has returned in an earlier process. What cannot be understood is left out.

        To be called before :meth:`run`.
        """
        for name, infos in _decode(content).items():
            worker = self._workers.get(name)
            if worker is not None:
                worker.models |= {info.name: info for info in infos}
                worker.show_states()

    # Waking

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Wake the machines that are asked for, until cancelled. The calls that wait then are failed.

        Args:
            task_status: ``started()`` is called when the workers stand in for what was restored.
        """
        failures = ThrottledLog(logger, "packets could not be sent")
        try:
            # Not before: the catalogue outlives a start that fails.
            for each in self:
                for info in each.models.values():
                    self._catalog.add_stand_in(info, each)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(failures.run)
                task_status.started()
                while True:
                    due = min((self._step(each, failures) for each in self), default=math.inf)
                    with trio.move_on_at(due):
                        await self._asked.park()
        finally:
            for each in self:
                for name in each.models:
                    self._catalog.remove_stand_in(name, each)
                each.fail(lambda call: True, ModelUnavailable)
        raise AssertionError("unreachable: it ends by cancellation")

    def _step(self, worker: SleepingWorker, failures: ThrottledLog) -> float:
        """Do what is due for a machine, and return the trio time at which something is due again."""
        now = trio.current_time()
        if worker.connected_at is not None:
            settled = worker.connected_at + _REGISTRATION
            missing = worker.models.keys() - worker.present
            if now < settled:
                return settled if missing else math.inf
            self._forget(worker, missing)
            return math.inf
        timeout = self._options.wake_timeout
        expired = {call for call, since in worker.waiting.items() if since + timeout <= now}
        if expired:
            fields = {"worker": worker.worker, "after": timeout}
            logger.warning("a machine did not wake up", extra={"fields": fields})
            why = f"its machine did not wake up within {timeout:g} s"
            worker.fail(
                expired.__contains__, lambda model: ModelStartFailed(f"'{model}'", why, PACKET_INTERVAL)
            )
            if not worker.waiting:
                worker.set_asked(None)
        if (worker.asked_at is not None or worker.waiting) and worker.next_packet <= now:
            worker.next_packet = now + PACKET_INTERVAL
            try:
                self._send(worker.target)
            except OSError as error:
                failures.warning(f"no packet could be sent: {error}", {"worker": worker.worker})
        if not worker.waiting:
            # Nobody asks any more, or it was a request that cannot wait.
            worker.set_asked(None)
            return math.inf
        return min(worker.next_packet, min(worker.waiting.values()) + timeout)

    def _remember(self, worker: SleepingWorker, info: ModelInfo) -> None:
        worker.models[info.name] = info
        worker.show_states()
        self._catalog.add_stand_in(info, worker)

    def _forget(self, worker: SleepingWorker, names: Iterable[str]) -> None:
        """Stand in no longer for some of the models of a worker."""
        for name in list(names):
            del worker.models[name]
            worker.present.discard(name)
            self._catalog.remove_stand_in(name, worker)
            worker.replaced(name)
            self.on_changed()


def _encode(workers: Mapping[str, Iterable[ModelInfo]]) -> bytes:
    entries = {
        name: [attrs.asdict(RegisterModel.of(info)) for info in infos] for name, infos in workers.items()
    }
    return json.dumps({"version": _VERSION, "workers": entries}, indent=1).encode()


def _decode(content: bytes) -> dict[str, list[ModelInfo]]:
    workers: dict[str, list[ModelInfo]] = {}
    try:
        data = json.loads(content)
        if data["version"] > _VERSION:
            raise ValueError("it was written by a later version")
        for name, entries in data["workers"].items():
            messages = [
                RegisterModel(**{**each, "also": tuple(each["also"]), "via": tuple(each["via"])})
                for each in entries
            ]
            workers[name] = [each.info() for each in messages if each.kind in KINDS]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the models of machines that sleep are lost: %s", error)
        return {}
    return workers
