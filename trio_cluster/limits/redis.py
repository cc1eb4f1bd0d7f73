"""Counting in a Redis or Valkey server, where several masters count together. Needs the extra ``redis``.

Theory of operation
===================

All rules are in a script that runs on the server (``script.lua``), by the server's time, so that what two masters do at
the same moment is done one after the other.

*One connection, in order.* What the requests of this master want from the server waits in one queue, and one task sends
what waits in one call of the script, and then what has come meanwhile. So many requests share a round trip, and a
settlement that comes before an admission is counted before it: a client that sends its next request when it has the
end of an answer finds its slot free.

*Nobody waits for long.* An admission waits for a second at most. While the server is away, requests do not wait at all;
the option ``limits_failure`` says what happens to them: they are counted in the memory of this master ("allow"), or
refused with 503 ("refuse"). That the server is away is logged once, and so is that it is back.

*Nothing leaks.* A reservation whose answer came too late, or whose request was cancelled meanwhile, is settled as soon
as it is known. If it is not known whether the server has made it, it is settled all the same: one that was not made is
not found. Slots are leased: a master renews those of requests that run, and those of a master that died are free when
their lease has ended. Its tokens count as reserved.
"""

from __future__ import annotations

import importlib
import importlib.resources
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import attrs
import msgspec
import trio

from ..core import randomness
from ..core.answer import Usage
from ..core.call import Call
from ..core.principal import Limits, Principal
from ..core.request import Request
from ..errors import ApiError, OptionsError
from .account import Demand, LimitState, Refusal, RefusalKind, Standing
from .estimate import Estimator
from .limiter import CountedElsewhere, refused
from .memory import MINUTE, MemoryLimiter
from .reservation import Reservation

__all__ = ["RedisLimiter"]

logger = logging.getLogger("trio_cluster.limits")

#: Seconds that anything waits for the server, at most.
PATIENCE: Final = 1.0
#: Seconds between two attempts to reach a server that is away.
_RETRY: Final = 0.5
#: Seconds for which a slot is leased; it is renewed three times as often.
_LEASE: Final = 15.0
#: How often a settlement is tried; after that, its tokens count as reserved, and its lease frees the slot.
_MOST_FAILURES: Final = 10
#: Operations in one call of the script; it holds up everything else that the server does.
_BATCH: Final = 128

#: All keys are in one slot of a cluster, since one call of the script may use any of them.
_PREFIX: Final = "{trio-cluster}:limits:"

_Reply: TypeAlias = list[Any]


@attrs.define(eq=False)
class _Operation:
    """Something that the script is to do."""

    key: str
    fields: dict[str, Any]
    done: trio.Event | None = None
    """Set when it was done, or has failed; ``None``: nobody waits for it, and it is repeated until it is done."""
    reply: _Reply | None = None
    abandoned: bool = False
    """Nobody waits for it any more."""
    failures: int = 0


class RedisLimiter(CountedElsewhere):
    """See ``Limiter``, and the top of this module.

    Args:
        url: ``redis://`` or ``rediss://``, with user, password and database if necessary.
        refuse: refuse requests while the server is away; otherwise they are counted in memory then.
        window: the length of the sliding window, in seconds.
        lease: for how many seconds a slot stays taken after its master has died.
        patience: for how many seconds anything waits for the server.
        clock: returns the time in microseconds, instead of the server; for tests.

    Raises:
        OptionsError: the URL is not valid, or the library is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        refuse: bool = False,
        window: float = MINUTE,
        lease: float = _LEASE,
        patience: float = PATIENCE,
        clock: Callable[[], int] | None = None,
    ) -> None:
        try:
            self._library: Any = importlib.import_module("coredis")
        except ImportError:
            raise OptionsError(
                "limits: counting in Redis needs a library that is not installed: pip install coredis"
            ) from None
        self._url = url
        self._address = _address(url)
        self._place = "{}:{}".format(*self._address)
        self._refuse = refuse
        self._window = round(window * 1_000_000)
        self._lease = lease
        self._patience = patience
        self._clock = clock
        self._estimator = Estimator()
        self._memory = MemoryLimiter(window, estimator=self._estimator)
        self._script = importlib.resources.files(__package__).joinpath("script.lua").read_text("utf-8")
        self._name = randomness.token(8)
        self._numbers = itertools.count(1)
        self._queue: deque[_Operation] = deque()
        self._wake = trio.Event()
        self._idle = trio.Event()
        self._sending = False
        # The reservations that are not settled: their keys and tokens.
        self._open: dict[str, tuple[str, int]] = {}
        self._available = False
        self._tried = trio.Event()
        self._away_logged = False

    async def reserve(self, principal: Principal, limits: Limits, request: Request) -> Reservation:
        """See ``Limiter``."""
        demand = await self._estimator.estimate_request(request)
        key, number = principal.name, f"{self._name}{next(self._numbers)}"
        reply = await self._ask(key, self._reserve_fields(number, limits, demand))
        if reply is None:
            return self._without_server(key, limits, demand)
        granted, kind, wait, limit, amount, *state = reply
        left = _state(limits, state)
        if not granted:
            name: RefusalKind = kind.decode()
            raise refused(Refusal(name, wait, limit, amount, left), limits)
        self._open[number] = (key, amount)
        return Reservation(demand, amount, left, partial(self._settle, key, number), self._learn)

    def _reserve_fields(self, number: str, limits: Limits, demand: Demand) -> dict[str, Any]:
        return {
            "op": "reserve",
            "id": number,
            "rpm": _or_none(limits.requests_per_minute),
            "tpm": _or_none(limits.tokens_per_minute),
            "concurrency": _or_none(limits.max_concurrency),
            "budget": _or_none(limits.budget_tokens),
            "per": limits.budget_per,
            "tokens": demand.tokens,
            "least": demand.least,
        }

    def _without_server(self, key: str, limits: Limits, demand: Demand) -> Reservation:
        """Do what the options say while the server is away."""
        if self._refuse:
            raise ApiError(
                503,
                "The limits of this key cannot be checked at the moment; try again shortly",
                code="limits_unavailable",
                retry_after=1.0,
            )
        return self._memory.reserve_nowait(key, limits, demand)

    async def state(self, principal: Principal, limits: Limits) -> LimitState:
        """See ``Limiter``."""
        reply = await self._ask(principal.name, {"op": "state"})
        if reply is None:
            return await self._memory.state(principal, limits)
        return _state(limits, reply[1:])

    def _settle(self, key: str, number: str, tokens: int | None, counts: bool) -> None:
        self._open.pop(number, None)
        used = -1 if tokens is None else tokens
        self._put(_Operation(key, {"op": "settle", "id": number, "used": used, "counts": counts}))

    def _learn(self, call: Call, usage: Usage) -> None:
        self._estimator.learn(call.request, usage)

    async def _ask(self, key: str, fields: dict[str, Any]) -> _Reply | None:
        """Return the reply of the server; ``None`` if it is away, or does not reply in time."""
        if not self._available:
            return None
        operation = _Operation(key, fields, trio.Event())
        assert operation.done is not None
        self._put(operation)
        received = False
        try:
            with trio.move_on_after(self._patience):
                await operation.done.wait()
            received = operation.reply is not None
        finally:
            # There is no checkpoint from here on until the caller has the reply.
            if not received:
                operation.abandoned = True
                if operation.reply is not None:
                    self._forget(operation)
        return operation.reply

    def _put(self, operation: _Operation) -> None:
        self._queue.append(operation)
        self._wake.set()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """See ``Limiter``. Waits for the server for a second at most, at both ends."""
        failure: Exception | None = None
        async with self._memory.opened(), trio.open_nursery() as nursery:
            nursery.start_soon(self._run)
            with trio.move_on_after(self._patience):
                await self._tried.wait()
            try:
                yield
            except Exception as error:
                # Nothing else in this nursery raises, so the error of the block needs no group around it.
                failure = error
            finally:
                with trio.move_on_after(self._patience, shield=True):
                    await self._flush()
                nursery.cancel_scope.cancel(reason="the node has ended")
        if failure is not None:
            raise failure

    async def _flush(self) -> None:
        while (self._queue or self._sending) and self._available:
            self._idle = trio.Event()
            self._wake.set()
            await self._idle.wait()

    async def _run(self) -> None:
        # The library logs every attempt to connect with a traceback.
        library_logger = logging.getLogger("coredis")
        library_logger.propagate = False
        library_logger.addHandler(logging.NullHandler())
        while True:
            why = "the connection was closed"
            try:
                await self._knock()
                async with self._library.Redis.from_url(
                    self._url,
                    connect_timeout=self._patience,
                    stream_timeout=self._patience,
                    retry_policy=self._library.retry.NoRetryPolicy(),
                ) as client:
                    script = client.register_script(self._script)
                    await self._call(script, [])
                    self._set_available()
                    await self._work(script)
            except* Exception as group:
                why = _reason(group)
            self._set_away(why)
            await trio.sleep(_RETRY)

    async def _knock(self) -> None:
        """Raise an error if nothing listens there: the library would leave its unfinished connection unclosed."""
        with trio.fail_after(self._patience):
            stream = await trio.open_tcp_stream(*self._address)
        await stream.aclose()

    async def _work(self, script: Any) -> None:
        """Do what waits, until something fails."""
        renew_at = trio.current_time() + self._lease / 3
        while True:
            with trio.move_on_at(renew_at):
                await self._wake.wait()
            self._wake = trio.Event()
            if trio.current_time() >= renew_at:
                renew_at = trio.current_time() + self._lease / 3
                self._renew()
            while self._queue:
                batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
                await self._do(script, batch)
            self._idle.set()

    def _renew(self) -> None:
        by_key: dict[str, list[str]] = {}
        for number, (key, _) in self._open.items():
            by_key.setdefault(key, []).append(number)
        for key, numbers in by_key.items():
            for begin in range(0, len(numbers), _BATCH):
                self._queue.append(_Operation(key, {"op": "renew", "ids": numbers[begin : begin + _BATCH]}))
        if not self._queue:
            # Only to see whether the server is there.
            self._queue.append(_Operation("", {"op": "renew", "ids": [""]}))

    async def _do(self, script: Any, batch: list[_Operation]) -> None:
        done, self._sending = False, True
        try:
            replies = await self._call(script, batch)
            done = True
        finally:
            self._sending = False
            if not done:
                self._failed(batch)
        for operation, reply in zip(batch, replies, strict=True):
            if operation.done is None:
                continue
            if operation.abandoned:
                self._forget(operation)
            else:
                operation.reply = reply
                operation.done.set()

    def _failed(self, batch: list[_Operation]) -> None:
        """Take note of operations of which it is not known whether they were done. Synchronous."""
        for operation in reversed(batch):
            if operation.done is not None:
                self._forget(operation)
                operation.done.set()
            elif operation.fields["op"] == "settle" and operation.failures < _MOST_FAILURES:
                # Of two, the second one finds nothing.
                operation.failures += 1
                self._queue.appendleft(operation)

    def _forget(self, operation: _Operation) -> None:
        """Settle a reservation that nobody has, if it was made."""
        if operation.fields["op"] == "reserve":
            fields = {"op": "settle", "id": operation.fields["id"], "used": 0, "counts": False}
            self._queue.append(_Operation(operation.key, fields))
            self._wake.set()

    async def _call(self, script: Any, batch: list[_Operation]) -> list[_Reply]:
        """Call the script. Raises an error of the library if the server does not reply in time."""
        keys = [
            f"{_PREFIX}{part}:{operation.key}"
            for operation in batch
            for part in ("log", "entries", "slots", "budget")
        ]
        shared = {"window": self._window, "lease": round(self._lease * 1_000_000)}
        operations = msgspec.json.encode([operation.fields | shared for operation in batch])
        now = b"" if self._clock is None else b"%d" % self._clock()
        with trio.fail_after(self._patience):
            replies: list[_Reply] = await script(keys, [operations, now])
        return replies

    def _set_available(self) -> None:
        self._available = True
        self._tried.set()
        if self._away_logged:
            self._away_logged = False
            logger.info("limits are counted at %s again", self._place)

    def _set_away(self, why: str) -> None:
        self._available = False
        self._tried.set()
        self._idle.set()
        # What waits for a reply gets none; a settlement waits until the server is back.
        waiting = [operation for operation in self._queue if operation.done is not None]
        self._queue = deque(operation for operation in self._queue if operation.fields["op"] == "settle")
        for operation in waiting:
            assert operation.done is not None
            operation.done.set()
        if not self._away_logged:
            self._away_logged = True
            instead = "are refused" if self._refuse else "are counted by this master alone"
            logger.warning(
                "limits cannot be counted at %s: %s; requests of keys with limits %s until it is back",
                self._place, why, instead,
            )  # fmt: skip

    @property
    def open_reservations(self) -> int:
        """See ``Limiter``."""
        return len(self._open) + self._memory.open_reservations

    @property
    def open_tokens(self) -> int:
        """See ``Limiter``."""
        return sum(tokens for _, tokens in self._open.values()) + self._memory.open_tokens


def _address(url: str) -> tuple[str, int]:
    """Return the host and the port of a URL; the rest may have a password."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "localhost", parts.port or 6379
    except ValueError:
        raise OptionsError("limits: not a valid URL") from None
    if parts.scheme not in ("redis", "rediss"):
        raise OptionsError("limits: expected a URL that begins with redis:// or rediss://")
    return host, port


def _reason(error: BaseException) -> str:
    """Return why the server is away, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, (trio.TooSlowError, TimeoutError)):
        return "it does not reply in time"
    return str(error) or type(error).__name__


def _or_none(limit: int | None) -> int:
    return -1 if limit is None else limit


def _state(limits: Limits, state: list[int]) -> LimitState:
    requests, requests_reset, tokens, tokens_reset = state
    return LimitState(
        _standing(limits.requests_per_minute, requests, requests_reset),
        _standing(limits.tokens_per_minute, tokens, tokens_reset),
    )


def _standing(limit: int | None, used: int, reset: int) -> Standing | None:
    return None if limit is None else Standing(limit, max(0, limit - used), reset)
