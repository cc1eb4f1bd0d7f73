"""What a process of a group does without its supervisor."""

from __future__ import annotations

import socket

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_cluster.core.principal import Limits
from trio_cluster.group.channel import GroupChannel
from trio_cluster.group.member import Member
from trio_cluster.group.messages import AskState, Notice, Request, Response, Start


async def answer(request: Request) -> Response:
    return Response(200)


async def on_notice(notice: Notice) -> None: ...


async def test_a_question_ends_with_the_supervisor(autojump_clock: MockClock) -> None:
    theirs, ours = socket.socketpair()
    member = Member(GroupChannel(ours), Start(0, 2, "m", 0, ("127.0.0.1", 1)), [])
    orphaned = trio.Event()
    asked: list[object] = []

    async def ask() -> None:
        asked.append(await member.ask(Request("GET", "/metrics")))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(member.run, answer, on_notice, orphaned.set)
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            theirs.close()
            await orphaned.wait()
            # Connections are served on while the requests of this process finish, and may still ask for this.
            await ask()
            assert await member.reserve(AskState(1, "key", Limits())) is None
            nursery.cancel_scope.cancel()
    member.close()
    assert asked == [([], b"")] * 2
