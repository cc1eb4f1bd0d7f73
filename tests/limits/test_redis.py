"""Counting in a real Redis server: the same rules, several masters, and a server that goes away."""

from __future__ import annotations

import datetime
import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import patience
import pytest
import trio
from hypothesis import HealthCheck, given, settings, strategies as st
from redis_server import REDIS, RedisServer, redis_server

from trio_cluster.core.answer import Done, Head, Usage
from trio_cluster.core.call import Call
from trio_cluster.core.principal import Limits, Principal
from trio_cluster.core.request import Request
from trio_cluster.core.state_dir import StateDir
from trio_cluster.errors import ApiError, OptionsError
from trio_cluster.limits.account import Account, Demand, Grant, Refusal
from trio_cluster.limits.calendar import period_of
from trio_cluster.limits.limiter import Refused
from trio_cluster.limits.redis import RedisLimiter
from trio_cluster.limits.reservation import Reservation
from trio_cluster.security.authority import Authority

pytest.importorskip("coredis", reason="the extra 'redis' is not installed")
pytestmark = [
    pytest.mark.skipif(REDIS is None, reason="no redis-server and no valkey-server is installed here"),
    # The library leaves a connection that could not be opened to the garbage collector.
    pytest.mark.filterwarnings("ignore:.*MemoryObject:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*MemoryObject:ResourceWarning"),
]

WINDOW = 60_000_000
NOON = datetime.datetime(2026, 11, 27, 12, tzinfo=datetime.UTC).timestamp()


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path) as server:
        yield server


def request(key: str, max_tokens: int = 10) -> Request:
    body = b'{"max_tokens": %d}' % max_tokens
    return Request("chat.completions", "chat", "m", body, principal=Principal(key))


async def reserve(limiter: RedisLimiter, key: str, limits: Limits, max_tokens: int = 10) -> Reservation:
    return await limiter.reserve(Principal(key, limits=limits), limits, request(key, max_tokens))


async def refusal(limiter: RedisLimiter, key: str, limits: Limits, max_tokens: int = 10) -> ApiError:
    with pytest.raises(Refused) as refused:
        await reserve(limiter, key, limits, max_tokens)
    return refused.value.error


def finish(reservation: Reservation, usage: Usage | None) -> None:
    """Let a request end with a complete answer."""
    call = Call(request("k"))
    reservation.follow(call)
    call.put(Head())
    call.put(Done(usage))
    call.release()
    reservation.end_request()


class Fields:
    """Plays the script against the account of ``account.py``, by the same clock."""

    def __init__(self, server: RedisServer) -> None:
        self.now = 1
        # Leases do not end here: the account has none.
        self.limiter = RedisLimiter(server.url, clock=lambda: self.now, lease=1e9)

    async def reserve(self, key: str, number: str, limits: Limits, demand: Demand) -> list[Any]:
        fields = self.limiter._reserve_fields(number, limits, demand)
        reply = await self.limiter._ask(key, fields)
        assert reply is not None
        return reply

    async def settle(self, key: str, number: str, used: int, counts: bool) -> None:
        fields = {"op": "settle", "id": number, "used": used, "counts": counts}
        assert await self.limiter._ask(key, fields) is not None


steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "end", "drop"]),
        st.one_of(st.integers(0, 20_000_000), st.sampled_from([0, WINDOW - 1, WINDOW, 40_000_000_000_000])),
        st.integers(0, 400),
    ),
    max_size=40,
)
some_limits = st.builds(
    Limits,
    st.one_of(st.none(), st.integers(0, 9)),
    st.one_of(st.none(), st.integers(1, 500)),
    st.none(),
    st.one_of(st.none(), st.integers(1, 2000)),
    st.sampled_from(["day", "week", "month"]),
)
_keys = iter(range(10**9))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps, some_limits)
def test_the_script_decides_as_the_account_does(
    shared: RedisServer, steps: list[tuple[str, int, int]], limits: Limits
) -> None:
    trio.run(_compare, shared, steps, limits, f"compared-{next(_keys)}")


async def _compare(server: RedisServer, steps: list[tuple[str, int, int]], limits: Limits, key: str) -> None:
    fields, account = Fields(server), Account(WINDOW)
    fields.now = round(NOON * 1_000_000)
    waiting: list[tuple[str, Grant]] = []
    async with fields.limiter.opened():
        for number, (what, pause, tokens) in enumerate(steps):
            fields.now += pause
            now = fields.now
            if what == "ask":
                demand = Demand(tokens, tokens // 3, 0)
                expected = account.reserve(limits, demand, now, now / 1_000_000)
                granted, kind, wait, limit, amount, *state = await fields.reserve(
                    key, str(number), limits, demand
                )
                assert bool(granted) == isinstance(expected, Grant), (expected, granted, kind)
                if isinstance(expected, Refusal):
                    assert (kind.decode(), wait, limit, amount) == (
                        expected.kind, expected.wait, expected.limit, expected.needed
                    )  # fmt: skip
                else:
                    assert amount == expected.tokens
                    waiting.append((str(number), expected))
                left = expected.state
                if left.requests is not None:
                    assert max(0, left.requests.limit - state[0]) == left.requests.remaining
                    assert state[1] == left.requests.reset
                if left.tokens is not None:
                    assert max(0, left.tokens.limit - state[2]) == left.tokens.remaining
                    assert state[3] == left.tokens.reset
            elif waiting:
                name, grant = waiting.pop(0)
                counts = what == "end"
                account.settle(grant, tokens if counts else 0, now, counts=counts)
                await fields.settle(key, name, tokens if counts else 0, counts)


@pytest.mark.parametrize("per", ["day", "week", "month"])
async def test_the_script_has_the_same_calendar(shared: RedisServer, per: Any) -> None:
    fields, limits = Fields(shared), Limits(budget_tokens=1, budget_per=per)
    # Through a February of a leap year, and two turns of a year.
    begin = datetime.datetime(2027, 12, 20, tzinfo=datetime.UTC).timestamp()
    last = ""
    async with fields.limiter.opened():
        for day in range(200):
            for second in (0, 86_399):
                at = begin + 86_400 * day + second
                fields.now = round(at * 1_000_000)
                granted, *_ = await fields.reserve(f"calendar-{per}", f"{at}", limits, Demand(1, 0, 0))
                period = period_of(per, at)
                assert bool(granted) == (period != last), (at, period, last)
                last = period


async def test_more_entries_than_are_kept_one_by_one(shared: RedisServer) -> None:
    fields, limits = Fields(shared), Limits(requests_per_minute=5000)
    fields.now = round(NOON * 1_000_000)
    async with fields.limiter.opened():
        for number in range(1600):
            fields.now += 10_000
            granted, *_ = await fields.reserve("many", str(number), limits, Demand(2, 0, 0))
            assert granted
        reply = await fields.limiter._ask("many", {"op": "state"})
        assert reply is not None
        assert reply[1] == 1600
        assert reply[3] == 3200
        entries = await _count(shared, "ZCARD", "{trio-cluster}:limits:log:many")
        # The first 1024, and then one for each 1024th of a minute.
        assert 1024 < entries < 1024 + 6_000 // 58 + 3
        fields.now += 60_000_000 + 60_000
        reply = await fields.limiter._ask("many", {"op": "state"})
        assert reply is not None
        assert reply[1] == 0


async def _count(server: RedisServer, *command: str) -> int:
    stream = await trio.open_tcp_stream("127.0.0.1", server.port)
    async with stream:
        await stream.send_all(" ".join(command).encode() + b"\r\n")
        return int((await stream.receive_some())[1:])


async def test_two_masters_count_together(shared: RedisServer) -> None:
    limits = Limits(requests_per_minute=3, max_concurrency=2)
    one, two = RedisLimiter(shared.url), RedisLimiter(shared.url)
    async with one.opened(), two.opened():
        first = await reserve(one, "together", limits)
        second = await reserve(two, "together", limits)
        assert (await refusal(one, "together", limits)).type == "concurrency"
        first.end_request()
        second_end = await reserve(one, "together", limits)
        finish(second_end, Usage(1, 1))
        finish(second, Usage(1, 1))
        assert (await reserve(two, "together", limits)).state.requests.remaining == 0  # type: ignore[union-attr]
        error = await refusal(one, "together", limits)
        assert error.type == "requests"
        assert error.retry_after == pytest.approx(60, abs=1)


async def test_a_settlement_comes_before_the_next_request(shared: RedisServer) -> None:
    limits = Limits(max_concurrency=1)
    limiter = RedisLimiter(shared.url)
    async with limiter.opened():
        for _ in range(200):
            finish(await reserve(limiter, "one-slot", limits), None)
        assert limiter.open_reservations == 0


class Count:
    """When a key was admitted, and how many tokens it got."""

    def __init__(self) -> None:
        self.admitted: list[tuple[float, int]] = []

    def most(self, window: float) -> tuple[int, int]:
        requests = tokens = 0
        for begins, _ in self.admitted:
            inside = [each for each in self.admitted if begins <= each[0] < begins + window]
            requests, tokens = max(requests, len(inside)), max(tokens, sum(each[1] for each in inside))
        return requests, tokens


async def _load(
    limiters: list[RedisLimiter], limits: Limits, seconds: float, count: Count, key: str, fail: bool = False
) -> None:
    """Let clients of all masters ask as much as they can."""

    async def client(limiter: RedisLimiter, number: int) -> None:
        turn = 0
        while trio.current_time() < until:
            turn += 1
            try:
                reservation = await reserve(limiter, key, limits, max_tokens=5 + (number + turn) % 20)
            except Refused as refused:
                await trio.sleep(min(refused.error.retry_after or 0.01, 0.02))
                continue
            except ApiError as error:
                refusals.add(error.code)
                await trio.sleep(0.01)
                continue
            if turn % 5 == 4:
                # Nothing is begun for it, so that it does not count.
                reservation.end_request()
            else:
                count.admitted.append((trio.current_time(), reservation.tokens))
                await trio.sleep(0.001 * (turn % 3))
                finish(reservation, None)

    refusals: set[str | None] = set()
    until = trio.current_time() + seconds
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(client, limiters[number % len(limiters)], number)
    assert refusals <= ({"limits_unavailable"} if fail else set())


async def test_the_most_that_a_key_gets_with_two_masters(shared: RedisServer) -> None:
    window = 1.0
    limits = Limits(requests_per_minute=80, tokens_per_minute=2000, max_concurrency=50)
    one, two = RedisLimiter(shared.url, window=window), RedisLimiter(shared.url, window=window)
    count = Count()
    async with one.opened(), two.opened():
        await _load([one, two], limits, 3.0, count, "most")
    # The times are those at which the replies came, and not those of the server: they may be nearer to each other by
    # the time that a reply takes.
    requests, tokens = count.most(window - 0.1)
    print(
        f"most in a window: {requests} requests of 80, {tokens} tokens of 2000; {len(count.admitted)} in all"
    )
    assert requests <= 80
    assert tokens <= 2000
    assert max(requests / 80, tokens / 2000) > 0.8
    assert one.open_reservations == two.open_reservations == 0


async def test_a_server_that_is_away_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(requests_per_minute=1)
    limiter = RedisLimiter("redis://user:secret@127.0.0.1:1/0", patience=0.5)
    watch = patience.Stopwatch()
    async with limiter.opened():
        await reserve(limiter, "k", limits)
        await refusal(limiter, "k", limits)
        assert (await limiter.state(Principal("k"), limits)).requests.remaining == 0  # type: ignore[union-attr]
        await trio.sleep(1.2)
    assert watch.counted < 3
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "127.0.0.1:1" in warnings[0]
    assert "secret" not in caplog.text


async def test_requests_are_refused_if_the_options_say_so() -> None:
    limiter = RedisLimiter("redis://127.0.0.1:1", refuse=True, patience=0.5)
    async with limiter.opened():
        with pytest.raises(ApiError) as raised:
            await reserve(limiter, "k", Limits(requests_per_minute=1))
        assert (raised.value.status, raised.value.code) == (503, "limits_unavailable")
        assert raised.value.retry_after == 1


@pytest.mark.parametrize("refuse", [False, True])
async def test_a_server_is_killed_and_started_again_under_load(
    server: RedisServer, refuse: bool, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(requests_per_minute=100_000)
    limiter = RedisLimiter(server.url, refuse=refuse, patience=0.5)
    count = Count()
    with caplog.at_level(logging.INFO):
        async with limiter.opened():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_load, [limiter], limits, 4.0, count, "k", refuse)
                await trio.sleep(1)
                await trio.to_thread.run_sync(server.kill)
                await trio.sleep(1)
                await trio.to_thread.run_sync(server.start)
            assert limiter.open_reservations == 0
            reservation = await reserve(limiter, "k", limits)
            assert reservation.state.requests is not None
            # What was counted before the server was killed is counted still: it keeps a log of its own.
            assert reservation.state.requests.remaining < 100_000 - 100
            reservation.end_request()
            await trio.sleep(0.1)
            assert await _count(server, "ZCARD", "{trio-cluster}:limits:slots:k") == 0
    messages = [record.getMessage() for record in caplog.records if record.name == "trio_cluster.limits"]
    assert [("cannot be counted" in each, "again" in each) for each in messages] == [
        (True, False),
        (False, True),
    ]
    assert ("are refused" in messages[0]) == refuse


async def test_a_server_that_hangs_holds_no_request_up(server: RedisServer) -> None:
    limits = Limits(requests_per_minute=100_000, max_concurrency=1000)
    limiter = RedisLimiter(server.url, patience=0.4)
    async with limiter.opened():
        (await reserve(limiter, "k", limits)).end_request()
        server.freeze()
        longest = 0.0
        for _ in range(10):
            began = trio.current_time()
            (await reserve(limiter, "k", limits)).end_request()
            longest = max(longest, trio.current_time() - began)
        assert longest < 0.6
        server.thaw()
        with trio.fail_after(10):
            while not limiter._available:  # noqa: ASYNC110
                await trio.sleep(0.05)
        # What the server has done late, and nobody has waited for, is settled.
        finish(await reserve(limiter, "k", limits), None)
        await trio.sleep(0.2)
        assert await _count(server, "ZCARD", "{trio-cluster}:limits:slots:k") == 0
        state = await limiter.state(Principal("k"), limits)
        assert state.requests is not None
        assert state.requests.remaining == 100_000 - 1


async def test_requests_that_are_cancelled_leave_nothing(shared: RedisServer) -> None:
    limits = Limits(requests_per_minute=100_000)
    limiter = RedisLimiter(shared.url)
    async with limiter.opened():
        for number in range(200):
            with trio.move_on_after(number * 0.00001):
                (await reserve(limiter, "cancelled", limits)).end_request()
        await trio.sleep(0.2)
        assert limiter.open_reservations == 0
        assert await _count(shared, "ZCARD", "{trio-cluster}:limits:slots:cancelled") == 0
        state = await limiter.state(Principal("cancelled"), limits)
        assert state.requests is not None
        assert state.requests.remaining == 100_000


async def test_slots_of_a_master_that_died_are_free_when_their_lease_has_ended(
    shared: RedisServer,
) -> None:
    limits = Limits(max_concurrency=1, tokens_per_minute=1000)
    dead, living = RedisLimiter(shared.url, lease=0.6), RedisLimiter(shared.url, lease=0.6)
    async with living.opened():
        async with dead.opened():
            held = await reserve(dead, "leased", limits, 100)
            # A master that lives renews its lease.
            await trio.sleep(1.5)
            assert (await refusal(living, "leased", limits)).type == "concurrency"
        watch = patience.Stopwatch()
        while True:
            try:
                finish(await reserve(living, "leased", limits), None)
                break
            except Refused:
                await trio.sleep(0.02)
        assert watch.counted < 1
        assert not held.settled


async def test_a_budget_of_several_masters(shared: RedisServer) -> None:
    limits = Limits(budget_tokens=200, budget_per="month")
    one, two = RedisLimiter(shared.url), RedisLimiter(shared.url)
    async with one.opened(), two.opened():
        finish(await reserve(one, "budget", limits, 50), Usage(50, 50))
        finish(await reserve(two, "budget", limits, 50), Usage(50, 47))
        await trio.sleep(0.05)
        last = await reserve(one, "budget", limits, 1)
        assert last.tokens == 3
        assert (await refusal(two, "budget", limits, 1)).code == "insufficient_quota"


@pytest.mark.parametrize("trusted", [True, False])
async def test_a_server_with_tls_is_verified(
    tmp_path: Path, trusted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("cryptography", reason="the extra 'tls' is not installed")
    authority = Authority(StateDir(tmp_path / "authority"), datetime.datetime.now(datetime.UTC))
    content = authority.server_certificate(["127.0.0.1"], datetime.datetime.now(datetime.UTC)).read_text()
    split = content.index("-----BEGIN CERTIFICATE")
    certificate, key, ca = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem"))
    key.write_text(content[:split])
    certificate.write_text(content[split:])
    ca.write_bytes((tmp_path / "authority" / "ca.pem").read_bytes())
    tls = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(ca))
    with redis_server(tmp_path, *tls, "--tls-auth-clients", "no") as server:
        limiter = RedisLimiter(server.url + (f"?ssl_ca_certs={ca}" if trusted else ""), refuse=True)
        async with limiter.opened():
            if trusted:
                finish(await reserve(limiter, "k", Limits(requests_per_minute=2)), None)
            else:
                with pytest.raises(ApiError, match="cannot be checked"):
                    await reserve(limiter, "k", Limits(requests_per_minute=2))
    assert ("certificate" in caplog.text.lower()) != trusted


@pytest.mark.parametrize("url", ["http://x", "redis://x:port", "redis"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(OptionsError, match="limits"):
        RedisLimiter(url)


def test_a_missing_library_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "coredis", None)
    with pytest.raises(OptionsError, match="pip install coredis"):
        RedisLimiter("redis://127.0.0.1")


async def test_no_number_of_a_client_or_a_model_stops_the_counting(shared: RedisServer) -> None:
    limits = Limits(requests_per_minute=2000, budget_tokens=2**53 - 1)
    limiter = RedisLimiter(shared.url, refuse=True)
    async with limiter.opened():
        for key, key_limits in (("long", limits), ("longer", Limits(requests_per_minute=2000))):
            for _ in range(20):
                finish(await reserve(limiter, key, key_limits, 10**30), Usage(2**53 - 1, 2**53 - 1))
        # Otherwise this would be refused, since the limits could not be counted.
        await reserve(limiter, "other", Limits(requests_per_minute=1))
        assert (await refusal(limiter, "other", Limits(requests_per_minute=1))).status == 429
