"""Many streams over one link that is cut again and again: no client notices. ``bench/cuts.py`` is the long version."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import trio
from nodes import Nodes, Stream
from served import until
from test_lifetimes_processes import calls_are, wire_to
from test_processes import open_stream

pytestmark = pytest.mark.processes

STREAMS = 20
RESETS = 5

#: Counts until there is a file, and writes down how far; or as far as it is asked to.
APP = """\
from pathlib import Path

import trio

from trio_cluster import ClusterServer

server = ClusterServer()


@server.chat("m")
async def count(request):
    number, ticks = 0, request.raw.get("ticks")
    while number < 3 or (number < ticks if ticks else not Path("enough").exists()):
        yield f"{number} "
        number += 1
        await trio.sleep(0 if ticks else 0.02)
    with Path("notes").open("a") as notes:
        notes.write(f"{number}\\n")
"""

#: What differs between two answers that are the same.
DIFFERS = re.compile(rb'"id":"[^"]*"|"created":[0-9]+')


async def body_of(stream: Stream) -> tuple[int, bytes]:
    """Wait for the end of an answer. Return how far it has counted, and its bytes."""
    ended = await stream.end(within=20)
    assert ended.report.ending == "finished"
    ticks = len(ended.report.text.split())
    assert ended.report.text == "".join(f"{number} " for number in range(ticks))
    return ticks, DIFFERS.sub(b"", ended.body)


async def test_answers_over_a_link_that_is_reset_again_and_again_are_those_of_one_that_is_not(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    (nodes.directory / "app.py").write_text(APP)
    master = await nodes.master()
    async with wire_to(master) as wire:
        flags = ("--internal-port", str(wire.port), "--max-concurrency", "100")
        worker = await nodes.worker(master, "w", *flags, models="m")
        streams: list[Stream] = []

        async def open_one() -> None:
            streams.append(await open_stream(nursery, master, "m"))

        async with trio.open_nursery() as opening:
            for _ in range(STREAMS):
                opening.start_soon(open_one)
        for _ in range(RESETS):
            before = [len(stream.received) for stream in streams]
            wire.reset()
            # The next one comes when this link has carried something of each stream.
            await worker.log("the link to the master goes on")
            for stream, size in zip(streams, before, strict=True):
                await until(lambda stream=stream, size=size: len(stream.received) > size, within=10)
        (nodes.directory / "enough").touch()
        answers = [await body_of(stream) for stream in streams]
        assert Counter(nodes.notes()) == Counter(str(ticks) for ticks, _ in answers)
        for ticks, body in dict(answers).items():
            again = await open_stream(nursery, master, "m", ticks=ticks)
            assert await body_of(again) == (ticks, body)
        asked = len(answers) + len(dict(answers))
        await calls_are(master, admitted=asked, completed=asked, worker_lost=0, in_flight=0)
        assert len(worker.logged("the link was cut")) == RESETS
